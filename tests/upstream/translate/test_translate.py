"""What dialects share: how servers spell "wait" and their limits, and how a call is signed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest
from multidict import CIMultiDict

from proxy.base.messages import RateHints
from proxy.upstream.translate import MAX_LIMIT, Profile, call_headers, ollama, openai, rate_hints, tei, wait_s

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


# --- limits ---


def test_everything_that_openai_says() -> None:
    """Limits, what remains of them and when they are whole again are read for requests and for tokens."""
    headers = {
        "x-ratelimit-limit-requests": "3000",
        "x-ratelimit-limit-tokens": "1000000",
        "x-ratelimit-remaining-requests": "2999",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-requests": "20ms",
        "x-ratelimit-reset-tokens": "6m0s",
    }

    assert rate_hints(headers) == RateHints(3000, 1_000_000, 2999, 0, pytest.approx(0.02), 360.0)


def test_headers_in_any_case() -> None:
    """Jina spells them with capitals."""
    headers = CIMultiDict({"X-RateLimit-Remaining-Requests": "7", "X-RateLimit-Limit-Requests": "60"})

    assert rate_hints(headers) == RateHints(requests_per_minute=60, remaining_requests=7)


@pytest.mark.parametrize("headers", [{}, {"content-type": "application/json"}, {"retry-after": "5"}], ids=str)
def test_nothing_about_limits(headers: dict[str, str]) -> None:
    """Without any such header there is nothing to know."""
    assert rate_hints(headers) is None


@pytest.mark.parametrize(
    ("limit", "remaining", "reset", "expected"),
    [
        ("60", "59", "1s", (60, 59, 1.0)),
        ("60", None, None, (60, None, None)),
        (None, "59", None, (None, 59, None)),
        (None, None, "1s", (None, None, 1.0)),
        # A number without a unit is seconds.
        ("60", "59", "30", (60, 59, 30.0)),
        ("60", "59", "0", (60, 59, 0.0)),
        ("60", "59", "0s", (60, 59, 0.0)),
        # Azure's placeholders: beside a limit that is none, nothing counts.
        ("-1", "-1", "0", None),
        ("-1", "0", "5", None),
        ("0", "0", "0", None),
        ("0", "7", "5", None),
        (None, "0", None, None),
        ("60", "-1", None, (60, None, None)),
        # Nothing remaining counts beside a limit.
        ("60", "0", None, (60, 0, None)),
        # What makes no sense is as good as missing.
        ("nan", "59", "1s", None),
        ("inf", "59", "1s", None),
        ("many", "59", "1s", None),
        ("", "59", "1s", None),
        ("60", "nan", "nan", (60, None, None)),
        ("60", "few", "soon", (60, None, None)),
        ("60", "59", "-1", (60, 59, None)),
        ("60", "59", "-1s", (60, 59, None)),
        ("60", "", "", (60, None, None)),
        # At the caps and above.
        ("60", "59", "900", (60, 59, 900.0)),
        ("60", "59", "15m0s", (60, 59, 900.0)),
        ("60", "59", "900.1", (60, 59, None)),
        ("60", "59", "86400", (60, 59, None)),
        ("60", "59", "24h0m0s", (60, 59, None)),
        (str(MAX_LIMIT), "59", None, (MAX_LIMIT, 59, None)),
        (str(MAX_LIMIT + 1), "59", None, None),
        ("60", str(MAX_LIMIT + 1), None, (60, None, None)),
        (" 60 ", " 59 ", " 1s ", (60, 59, 1.0)),
        ("60.0", "59.9", None, (60, 59, None)),
    ],
)
@pytest.mark.parametrize("what", ["requests", "tokens"])
def test_limit_that_a_server_states(
    what: str, limit: str | None, remaining: str | None, reset: str | None, expected: Any
) -> None:
    """Only what makes sense counts: placeholders, strange words and numbers beyond the caps are as good as missing."""
    said = {"limit": limit, "remaining": remaining, "reset": reset}
    hints = rate_hints({f"x-ratelimit-{key}-{what}": value for key, value in said.items() if value is not None})

    if expected is None:
        assert hints is None
    elif what == "requests":
        assert hints == RateHints(expected[0], None, expected[1], None, expected[2], None)
    else:
        assert hints == RateHints(None, expected[0], None, expected[1], None, expected[2])


def test_placeholders_for_one_of_two() -> None:
    """Where a server knows its limit of tokens only, that one counts."""
    headers = {
        "x-ratelimit-limit-requests": "-1",
        "x-ratelimit-remaining-requests": "-1",
        "x-ratelimit-limit-tokens": "350000",
        "x-ratelimit-remaining-tokens": "349000",
    }

    assert rate_hints(headers) == RateHints(tokens_per_minute=350_000, remaining_tokens=349_000)


# --- the call ---


def test_key_in_its_header() -> None:
    """A key is a bearer's, or stands alone where the server has a header of its own; it stands above the settings'."""
    plain = call_headers(Profile(), "k-1", {"Authorization": "other", "X-Team": "a"})
    azure = call_headers(Profile(key_header="api-key"), "k-1", {})

    assert (plain["Authorization"], plain["X-Team"]) == ("Bearer k-1", "a")
    assert azure["api-key"] == "k-1"
    assert "Authorization" not in azure
    assert set(call_headers(Profile(), "", {})) == {"Content-Type", "Accept"}


# --- profiles ---

PROFILES = {**openai.PROFILES, "ollama": ollama.PROFILE, **{f"tei {name}": row for name, row in tei.PROFILES.items()}}
HOSTED = {"openai", "azure"}


@pytest.mark.parametrize("name", PROFILES)
def test_profile_makes_sense(name: str) -> None:
    """Nobody starts above the bound; a hosted server is asked in full from the start, a local one by one or two."""
    profile = PROFILES[name]

    assert 1 <= profile.start_slots <= profile.slots
    assert profile.start_slots == profile.slots if name in HOSTED else profile.start_slots <= 2
    assert profile.max_tokens == (300_000 if name in HOSTED else 0)
    if name in HOSTED:
        assert (profile.abandoned_s, profile.first_answer_s) == (0, 0)
    assert profile.abandoned_s <= 30
    assert profile.first_answer_s <= 300
    assert 0 < profile.keepalive_s <= 30
