"""When a request goes out once more, and when it does not: by what this client has seen, without any waiting here."""

from __future__ import annotations

import random

import pytest

from rag_adapter.errors import DeadlineExceeded, EmbeddingError, EmbeddingFailed, SidecarUnavailable, Unavailable
from rag_adapter.reach import FIRST_WAIT_S, LONGEST_WAIT_S, RECONNECT_S, Reach, Tries

GONE = SidecarUnavailable("gone", code="refused")
FAR = 1e9


def known() -> Reach:
    reach = Reach()
    reach.found()
    return reach


def tries(reach: Reach, *, is_bulk: bool = False) -> Tries:
    return Tries(reach, is_bulk, random.Random(1))


def test_sidecar_that_has_never_been_there() -> None:
    """One attempt tells; nobody waits for what may never come."""
    assert tries(Reach()).wait_s(GONE, 100.0, FAR) is None


def test_sidecar_that_was_there_a_moment_ago() -> None:
    """At once, then in doubling steps up to the longest, until RECONNECT_S are over."""
    attempts = tries(known())
    now, waits = 100.0, []
    while (wait_s := attempts.wait_s(GONE, now, FAR)) is not None:
        waits.append(wait_s)
        now += wait_s

    assert waits[0] == 0.0
    assert FIRST_WAIT_S / 2 <= waits[1] <= FIRST_WAIT_S
    assert all(LONGEST_WAIT_S / 2 <= wait_s <= LONGEST_WAIT_S for wait_s in waits[7:])
    assert RECONNECT_S <= now - 100.0 < RECONNECT_S + LONGEST_WAIT_S
    assert len(waits) < 60


def test_outage_is_waited_for_once() -> None:
    """When one request has waited for long enough, the next ones fail at once, until somebody is there again."""
    reach = known()
    assert tries(reach).wait_s(GONE, 100.0, FAR) == 0.0
    assert tries(reach).wait_s(GONE, 100.0 + RECONNECT_S, FAR) is None
    reach.found()
    assert tries(reach).wait_s(GONE, 200.0, FAR) == 0.0


def test_request_that_ends_every_sidecar() -> None:
    """Others are answered between its attempts, but its own patience counts from its first failure."""
    reach = known()
    attempts = tries(reach)
    assert attempts.wait_s(GONE, 100.0, FAR) == 0.0
    reach.found()
    assert attempts.wait_s(GONE, 100.0 + RECONNECT_S, FAR) is None


def test_no_attempt_after_the_deadline() -> None:
    """What could not even begin in time is not waited for: the caller learns the true reason."""
    attempts = tries(known())
    attempts.wait_s(GONE, 100.0, FAR)

    assert attempts.wait_s(GONE, 100.0, 100.001) is None


@pytest.mark.parametrize(
    "error",
    [
        SidecarUnavailable("no rights", code="socket_denied", retryable=False),
        Unavailable("full", code="overloaded", retry_after_s=1.0),
        Unavailable("starting", code="starting"),
        Unavailable("draining", code="draining", retryable=False, retry_after_s=1.0),
        DeadlineExceeded("late"),
        EmbeddingFailed("broken", retryable=True),
    ],
    ids=str,
)
def test_what_the_sidecar_has_said_counts(error: EmbeddingError) -> None:
    """A query that got an answer is not asked again, nor what time does not mend."""
    assert tries(known()).wait_s(error, 100.0, FAR) is None


@pytest.mark.parametrize("code", ["starting", "draining"])
def test_sidecar_that_will_be_well_in_a_moment(code: str) -> None:
    """It says for how long; a little more is waited, differently by each."""
    error = Unavailable("m", code=code, retry_after_s=2.0)

    assert 2.0 <= (tries(known()).wait_s(error, 100.0, FAR) or 0.0) <= 2.4
    assert tries(known()).wait_s(error, 100.0, 101.0) is None


def test_bulk_that_was_turned_away() -> None:
    """Ingestion comes back when it was told to, within its deadline, as often as that fits."""
    error = Unavailable("full", code="overloaded", retry_after_s=1.0)
    attempts = tries(known(), is_bulk=True)

    waits = [attempts.wait_s(error, now, 110.0) for now in (100.0, 102.0, 109.0)]

    assert [wait_s is not None and 1.0 <= wait_s <= 1.2 for wait_s in waits] == [True, True, False]
    silent = Unavailable("full", code="overloaded")
    assert tries(known(), is_bulk=True).wait_s(silent, 100.0, FAR) is None
