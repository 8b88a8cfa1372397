"""How servers spell "wait"."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import formatdate

import pytest

from proxy.upstream.translate import wait_s

WALL_NOW = 1_760_000_000.0


def waited(headers: dict[str, str], message: str = "") -> float | None:
    return wait_s(headers, message, wall_now=WALL_NOW)


@pytest.fixture
def far_from_greenwich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let local time be five hours away from UTC."""
    monkeypatch.setenv("TZ", "XST5")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "wait"), [("1500", 1.5), ("0", 0.0), ("20", 0.02), ("0.5", 0.0005), (" 40 ", 0.04), ("86400000", 86400.0)]
)
def test_milliseconds(text: str, wait: float) -> None:
    """`retry-after-ms` counts milliseconds."""
    assert waited({"retry-after-ms": text}) == pytest.approx(wait)


@pytest.mark.parametrize("text", ["nan", "inf", "-5", "soon", ""])
def test_milliseconds_that_make_no_sense(text: str) -> None:
    """A senseless `retry-after-ms` leaves the word to `retry-after`."""
    assert waited({"retry-after-ms": text, "retry-after": "7"}) == 7.0


def test_milliseconds_beside_seconds() -> None:
    """The most exact one counts."""
    assert waited({"retry-after-ms": "1500", "retry-after": "2"}, "try again in 3s") == 1.5


@pytest.mark.parametrize(
    ("text", "wait"),
    [("0", 0.0), ("1", 1.0), ("20", 20.0), ("0.25", 0.25), (" 3 ", 3.0), ("86400", 86_400.0), ("1e2", 100.0)],
)
def test_seconds(text: str, wait: float) -> None:
    """`retry-after` counts seconds, with or without a fraction."""
    assert waited({"retry-after": text}) == wait


@pytest.mark.parametrize("text", ["nan", "-1", "inf", "-inf", "soon", "", "5 apples", "1x", "s", "5s later"])
def test_seconds_that_make_no_sense(text: str) -> None:
    """A senseless `retry-after` counts as none."""
    assert waited({"retry-after": text}) is None
    assert waited({"retry-after": text}, "Please try again in 2s.") == 2.0


@pytest.mark.parametrize(("offset_s", "wait"), [(30, 30.0), (0, 0.0), (-3600, 0.0)])
def test_date(offset_s: int, wait: float) -> None:
    """A date is the instant until which to wait; one that is past means now."""
    assert waited({"retry-after": formatdate(WALL_NOW + offset_s, usegmt=True)}) == pytest.approx(wait)


@pytest.mark.parametrize(
    "form",
    ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"],
    ids=["RFC 1123", "RFC 850", "asctime"],
)
def test_forms_of_a_date(form: str, far_from_greenwich: None) -> None:
    """All three forms of RFC 9110 are in UTC, wherever the proxy runs."""
    assert waited({"retry-after": time.strftime(form, time.gmtime(WALL_NOW + 60))}) == pytest.approx(60.0)


@pytest.mark.parametrize("text", ["Wed, 32 Oct 2099 07:28:00 GMT", "Wed, 21 Oct", "Wed, 21 Oct 99999999 07:28:00 GMT"])
def test_impossible_date(text: str) -> None:
    """A date that does not exist counts as none."""
    assert waited({"retry-after": text}) is None


@pytest.mark.parametrize(
    ("text", "wait"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("20ms", 0.02),
        ("1h2m3.5s", 3723.5),
        ("500us", 0.0005),
        ("500µs", 0.0005),
        ("34s", 34.0),
        ("29.057s", 29.057),
    ],
)
def test_go_duration(text: str, wait: float) -> None:
    """A Go duration is summed up; `ms` is not a minute."""
    assert waited({"retry-after": text}) == pytest.approx(wait)


@pytest.mark.parametrize(
    ("message", "wait"),
    [
        ("Please try again in 41.724s. Visit the site.", 41.724),
        ("Please retry after 55 seconds.", 55.0),
        ("Please retry after 1 second.", 1.0),
        ("please Try Again In 20ms", 0.02),
        ("retry in 250 milliseconds", 0.25),
        ("try again after 3 s", 3.0),
    ],
)
def test_words_in_the_message(message: str, wait: float) -> None:
    """Where no header says it, OpenAI's and Azure's words do."""
    assert waited({}, message) == pytest.approx(wait)


@pytest.mark.parametrize(("duration", "wait"), [("6m0s", 360.0), ("1m12.5s", 72.5), ("1h0m0s", 3600.0)])
def test_go_duration_in_the_message(duration: str, wait: float) -> None:
    """OpenAI spells longer waits in its messages as Go durations too."""
    assert waited({}, f"Rate limit reached for requests. Please try again in {duration}.") == pytest.approx(wait)


@pytest.mark.parametrize("message", ["", "Too many requests.", "Limit 3 per minute", "in 5s", "retry after a while"])
def test_nobody_says(message: str) -> None:
    """No word about waiting means that we choose."""
    assert waited({}, message) is None


def test_reset_of_the_whole_bucket() -> None:
    """`x-ratelimit-reset-*` says when the bucket is full again, which is later than needed: it is not obeyed."""
    assert waited({"x-ratelimit-reset-requests": "6m0s", "x-ratelimit-reset-tokens": "1s"}) is None
