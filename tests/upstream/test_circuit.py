"""The breaker: its way through the states, and whose verdict counts."""

from __future__ import annotations

import asyncio

import pytest

from proxy.base import errors
from proxy.base.events import BreakerMoved, Event
from proxy.base.messages import Answer
from proxy.base.settings import CircuitSettings
from proxy.upstream.circuit import PROBE_LEASE_S, Circuit
from tests.fakes.clock import HandClock, settle
from tests.fakes.stage import Call, ScriptedStage, make_batch, rows_of

ANSWER = Answer(rows_of(["a text"]), 1, "u")
FAILED = errors.UpstreamFailed("it broke")


class Play:
    """A circuit that opens after three failures for ten seconds, and the upstream behind it."""

    def __init__(self, *, failures: int = 3, open_s: float = 10.0) -> None:
        self.clock = HandClock()
        self.inner = ScriptedStage()
        self.events: list[Event] = []
        self.circuit = Circuit(
            "u", CircuitSettings(failures, open_s), self.inner, clock=self.clock, observe=self.events.append
        )

    async def called(self) -> tuple[asyncio.Task[Answer], Call]:
        """Start a call that passes the breaker; returns it and its far end."""
        task = asyncio.create_task(self.circuit(make_batch()))
        return task, await self.inner.next()

    async def ends(self, end: Answer | BaseException) -> None:
        """Let one call pass and end so."""
        task, call = await self.called()
        await self.settled(task, call, end)

    async def settled(self, task: asyncio.Task[Answer], call: Call, end: Answer | BaseException) -> None:
        """End a call that is under way, and see that its end comes out as itself."""
        if isinstance(end, Answer):
            call.answer(end)
            assert await task is end
        else:
            call.fail(end)
            with pytest.raises(type(end)) as caught:
                await task
            assert caught.value is end

    async def refused(self) -> errors.CircuitOpen:
        """See one call refused without a trace at the upstream; returns the error."""
        before = len(self.inner.calls)
        with pytest.raises(errors.CircuitOpen) as caught:
            async with asyncio.timeout(5):
                await self.circuit(make_batch())
        assert len(self.inner.calls) == before
        return caught.value

    async def opened(self) -> None:
        for _ in range(3):
            await self.ends(FAILED)

    @property
    def state(self) -> str:
        return str(self.circuit.snapshot()["state"])

    @property
    def moves(self) -> list[tuple[str, str]]:
        assert all(isinstance(event, BreakerMoved) and event.upstream == "u" for event in self.events)
        return [(event.old, event.new) for event in self.events if isinstance(event, BreakerMoved)]


@pytest.fixture
def play() -> Play:
    return Play()


# --- the states ---


async def test_healthy_upstream(play: Play) -> None:
    """A closed breaker is not in the way."""
    await play.ends(ANSWER)

    assert play.circuit.snapshot() == {"state": "closed", "failures": 0, "max_failures": 3, "wait_s": 0.0}
    assert play.circuit.wait_s(play.clock.now()) == 0
    assert play.moves == []


async def test_failures_one_below_the_bound(play: Play) -> None:
    """One failure less than the bound leaves it closed."""
    await play.ends(FAILED)
    await play.ends(FAILED)

    assert play.circuit.snapshot() == {"state": "closed", "failures": 2, "max_failures": 3, "wait_s": 0.0}
    assert play.moves == []


@pytest.mark.parametrize("error_class", [errors.UpstreamFailed, errors.UpstreamTimeout, errors.BadVectors])
async def test_failures_at_the_bound(play: Play, error_class: type[errors.EmbeddingError]) -> None:
    """Failures in a row, of whatever kind, open it; the call that opens it keeps its own error."""
    for _ in range(3):
        await play.ends(error_class("no"))
    error = await play.refused()

    assert play.state == "open"
    assert play.moves == [("closed", "open")]
    assert error.retry_after_s == 10.0
    assert "'u'" in error.message


async def test_success_between_failures(play: Play) -> None:
    """Only failures in a row count."""
    for end in (FAILED, FAILED, ANSWER, FAILED, FAILED):
        await play.ends(end)

    assert play.state == "closed"
    assert play.circuit.snapshot()["failures"] == 2


async def test_open_until_its_time_is_over(play: Play) -> None:
    """It refuses for `open_s` by the clock it was handed, however much or little the wall's clock moves."""
    await play.opened()
    await play.clock.advance(9.999)
    error = await play.refused()
    left_s = play.circuit.wait_s(play.clock.now())
    await play.clock.advance(0.001)

    assert error.retry_after_s == pytest.approx(0.001)
    assert left_s == pytest.approx(0.001)
    assert play.circuit.wait_s(play.clock.now()) == 0
    assert play.state == "open"


async def test_probe_succeeds(play: Play) -> None:
    """closed → open → half-open → closed, each move told once; failures are counted from zero again."""
    await play.opened()
    await play.clock.advance(10)
    await play.ends(ANSWER)
    await play.ends(FAILED)
    await play.ends(FAILED)

    assert play.moves == [("closed", "open"), ("open", "half-open"), ("half-open", "closed")]
    assert play.circuit.snapshot() == {"state": "closed", "failures": 2, "max_failures": 3, "wait_s": 0.0}


async def test_probe_fails(play: Play) -> None:
    """A single failed probe opens it for its whole time again."""
    await play.opened()
    await play.clock.advance(10)
    await play.ends(FAILED)
    error = await play.refused()
    await play.clock.advance(9.5)
    await play.refused()
    await play.clock.advance(0.5)
    await play.ends(ANSWER)

    assert error.retry_after_s == 10.0
    assert play.moves == [
        ("closed", "open"),
        ("open", "half-open"),
        ("half-open", "open"),
        ("open", "half-open"),
        ("half-open", "closed"),
    ]


# --- the probe ---


async def test_herd_at_half_open(play: Play) -> None:
    """Of fifty callers at once one is the probe; the others are refused at once."""
    await play.opened()
    await play.clock.advance(10)
    tasks = [asyncio.create_task(play.circuit(make_batch())) for _ in range(50)]
    probe = await play.inner.next()
    await settle()
    are_done = [task.done() for task in tasks]
    probe.answer(ANSWER)
    async with asyncio.timeout(5):
        ends = await asyncio.gather(*tasks, return_exceptions=True)

    assert are_done == [False] + [True] * 49
    assert ends[0] is ANSWER
    assert all(isinstance(end, errors.CircuitOpen) for end in ends[1:])
    assert len(play.inner.calls) == 3 + 1
    assert play.state == "closed"


async def test_refused_during_a_probe(play: Play) -> None:
    """Whoever is refused during a probe is told to wait no longer than an open breaker would ask."""
    await play.opened()
    await play.clock.advance(10)
    await play.called()
    error = await play.refused()
    await play.clock.advance(PROBE_LEASE_S - 4)

    assert error.retry_after_s == 10.0
    assert (await play.refused()).retry_after_s == pytest.approx(4.0)


async def test_probe_is_cancelled(play: Play) -> None:
    """A probe whose caller leaves says nothing, and the next call becomes the probe."""
    await play.opened()
    await play.clock.advance(10)
    task, call = await play.called()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    state = play.state
    await play.ends(ANSWER)

    assert call.was_cancelled
    assert state == "half-open"
    assert play.moves == [("closed", "open"), ("open", "half-open"), ("half-open", "closed")]


@pytest.mark.parametrize("error", [errors.RateLimited("later"), errors.UpstreamRefused("no", status=400)])
async def test_probe_is_neutral(play: Play, error: errors.EmbeddingError) -> None:
    """A probe that was rate-limited or refused settles nothing; it gives way to the next."""
    await play.opened()
    await play.clock.advance(10)
    await play.ends(error)
    state = play.state
    await play.ends(FAILED)

    assert state == "half-open"
    assert play.state == "open"


@pytest.mark.parametrize("lateness_s", [-0.001, 0.0, 0.001])
async def test_probe_outlives_its_lease(play: Play, lateness_s: float) -> None:
    """A probe that does not come back is waited for as long as its lease lasts, then another one may pass."""
    await play.opened()
    await play.clock.advance(10)
    await play.called()
    await play.clock.advance(PROBE_LEASE_S + lateness_s)
    if lateness_s < 0:
        await play.refused()
        return
    await play.ends(ANSWER)

    assert play.state == "closed"


async def test_late_probe_keeps_its_hands_off_the_next_lease(play: Play) -> None:
    """A probe that comes back after its lease does not give back the lease of its successor."""
    await play.opened()
    await play.clock.advance(10)
    first, first_call = await play.called()
    await play.clock.advance(PROBE_LEASE_S)
    second, second_call = await play.called()
    await play.settled(first, first_call, errors.RateLimited("late"))
    await play.refused()
    await play.settled(second, second_call, ANSWER)

    assert play.state == "closed"


async def test_two_probes_disagree(play: Play) -> None:
    """Once a probe has settled the matter, the verdict of the other one is of another time."""
    await play.opened()
    await play.clock.advance(10)
    first, first_call = await play.called()
    await play.clock.advance(PROBE_LEASE_S)
    second, second_call = await play.called()
    await play.settled(first, first_call, FAILED)
    await play.settled(second, second_call, ANSWER)

    assert play.state == "open"
    assert play.moves[-1] == ("half-open", "open")


# --- whose verdict counts ---


@pytest.mark.parametrize(
    "error",
    [
        errors.RateLimited("later"),
        errors.UpstreamRefused("no", status=400),
        errors.UpstreamDenied("no"),
        errors.DeadlineExceeded("no"),
        ZeroDivisionError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_neutral_ends(play: Play, error: BaseException) -> None:
    """What says nothing about the upstream's health neither counts as a failure nor forgives the ones before."""
    await play.ends(FAILED)
    await play.ends(FAILED)
    for _ in range(5):
        await play.ends(error)
    failures = play.circuit.snapshot()["failures"]
    await play.ends(FAILED)

    assert failures == 2
    assert play.state == "open"


async def test_callers_leave(play: Play) -> None:
    """Callers that hang up neither open the breaker nor reset its count, and their cancellation passes through."""
    await play.ends(FAILED)
    await play.ends(FAILED)
    for _ in range(5):
        task, _ = await play.called()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert play.circuit.snapshot()["failures"] == 2
    assert play.state == "closed"


async def test_late_failures_of_an_older_time(play: Play) -> None:
    """Failures that come back after it has opened neither open it again nor prolong its time."""
    late = [await play.called() for _ in range(10)]
    await play.opened()
    await play.clock.advance(5)
    for task, call in late:
        await play.settled(task, call, FAILED)

    assert play.moves == [("closed", "open")]
    assert play.circuit.wait_s(play.clock.now()) == pytest.approx(5.0)


async def test_late_success_of_an_older_time(play: Play) -> None:
    """A success from before it opened does not close it."""
    task, call = await play.called()
    await play.opened()
    await play.settled(task, call, ANSWER)

    assert play.state == "open"
    await play.refused()


async def test_late_verdicts_at_half_open(play: Play) -> None:
    """Neither a late success nor a late failure decides in place of the probe."""
    (good, good_call), (bad, bad_call) = await play.called(), await play.called()
    await play.opened()
    await play.clock.advance(10)
    probe, probe_call = await play.called()
    await play.settled(good, good_call, ANSWER)
    await play.settled(bad, bad_call, FAILED)
    state = play.state
    await play.refused()
    await play.settled(probe, probe_call, ANSWER)

    assert state == "half-open"
    assert play.state == "closed"


async def test_late_failure_after_recovery(play: Play) -> None:
    """A failure from before the outage does not count against the upstream that has recovered."""
    task, call = await play.called()
    await play.opened()
    await play.clock.advance(10)
    await play.ends(ANSWER)
    await play.settled(task, call, FAILED)

    assert play.circuit.snapshot()["failures"] == 0


async def test_one_failure_is_enough() -> None:
    """With a bound of one the first failure opens it."""
    play = Play(failures=1, open_s=0.5)
    await play.ends(FAILED)

    assert (await play.refused()).retry_after_s == 0.5
    assert play.moves == [("closed", "open")]


async def test_close(play: Play) -> None:
    """Closing closes what follows."""
    await play.circuit.aclose()

    assert play.inner.is_closed
