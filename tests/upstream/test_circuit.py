"""The breaker: its way through the states, and whose verdict counts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base import errors
from proxy.base.events import BreakerMoved, Event
from proxy.base.messages import Answer, Limits
from proxy.base.settings import CircuitSettings
from proxy.upstream.circuit import FAILURES, Circuit
from tests.fakes.clock import HandClock
from tests.fakes.stage import Call, ScriptedStage, make_batch, rows_of

ANSWER = Answer(rows_of(["a text"]), 1, "u")
FAILED = errors.UpstreamFailed("it broke")
OPEN_S, PROBE_S = 10.0, 60.0


@dataclass
class Pass:
    """A call that the breaker has let pass: what a lease carries of it."""

    circuit: Circuit
    generation: int
    is_probe: bool
    upstream: str = "u"
    limits: Limits = field(default_factory=lambda: Limits(1, 1))

    def charge(self, tokens: float) -> None: ...

    def release(self) -> None:
        if self.is_probe:
            self.circuit.give_back(self.generation)


class Play:
    """A circuit that opens after three failures for ten seconds, and the upstream behind it."""

    def __init__(self, *, failures: int = 3, open_s: float = OPEN_S, probe_s: float = PROBE_S) -> None:
        self.clock = HandClock()
        self.inner = ScriptedStage()
        self.events: list[Event] = []
        self.circuit = Circuit(
            "u", CircuitSettings(failures, open_s, probe_s), self.inner, clock=self.clock, observe=self.events.append
        )

    @property
    def wait_s(self) -> float:
        return self.circuit.wait_s(self.clock.now())

    def entered(self) -> Pass:
        assert self.wait_s == 0
        return Pass(self.circuit, *self.circuit.enter(self.clock.now()))

    async def called(self, **changes: Any) -> tuple[asyncio.Task[Answer], Call]:
        """Start a call that passes the breaker; returns it and its far end."""
        lease = self.entered()

        async def call() -> Answer:
            try:
                return await self.circuit(make_batch(lease=lease, **changes))
            finally:
                lease.release()

        task = asyncio.create_task(call())
        return task, await self.inner.next()

    async def ends(self, end: Answer | BaseException, **changes: Any) -> None:
        """Let one call pass and end so."""
        await self.settled(*await self.called(**changes), end)

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

    async def opened(self) -> None:
        for _ in range(3):
            await self.ends(FAILED)

    @property
    def state(self) -> str:
        return str(self.circuit.snapshot()["state"])

    @property
    def failures(self) -> int:
        return int(self.circuit.snapshot()["failures"])

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
    assert play.circuit.is_closed
    assert play.moves == []


async def test_failures_one_below_the_bound(play: Play) -> None:
    """One failure less than the bound leaves it closed."""
    await play.ends(FAILED)
    await play.ends(FAILED)

    assert play.circuit.snapshot() == {"state": "closed", "failures": 2, "max_failures": 3, "wait_s": 0.0}
    assert play.moves == []


@pytest.mark.parametrize("error_class", FAILURES)
async def test_failures_at_the_bound(play: Play, error_class: type[errors.EmbeddingError]) -> None:
    """Failures in a row, of whatever kind, open it; the call that opens it keeps its own error."""
    for _ in range(3):
        await play.ends(error_class("no"))

    assert play.state == "open"
    assert not play.circuit.is_closed
    assert play.moves == [("closed", "open")]
    assert play.wait_s == OPEN_S


async def test_success_between_failures(play: Play) -> None:
    """Only failures in a row count."""
    for end in (FAILED, FAILED, ANSWER, FAILED, FAILED):
        await play.ends(end)

    assert play.state == "closed"
    assert play.failures == 2


@pytest.mark.parametrize(("after_s", "wait_s"), [(0.0, 10.0), (9.999, 0.001), (10.0, 0.0), (10.001, 0.0)])
async def test_open_until_its_time_is_over(play: Play, after_s: float, wait_s: float) -> None:
    """It refuses for `open_s` by the clock it was handed, however much or little the wall's clock moves."""
    await play.opened()
    await play.clock.advance(after_s)

    assert play.wait_s == pytest.approx(wait_s)
    assert play.state == "open"


async def test_probe_succeeds(play: Play) -> None:
    """closed → open → half-open → closed, each move told once; failures are counted from zero again."""
    await play.opened()
    await play.clock.advance(OPEN_S)
    await play.ends(ANSWER)
    await play.ends(FAILED)
    await play.ends(FAILED)

    assert play.moves == [("closed", "open"), ("open", "half-open"), ("half-open", "closed")]
    assert play.circuit.snapshot() == {"state": "closed", "failures": 2, "max_failures": 3, "wait_s": 0.0}


async def test_probe_fails(play: Play) -> None:
    """A single failed probe opens it for its whole time again."""
    await play.opened()
    await play.clock.advance(OPEN_S)
    await play.ends(FAILED)
    waits = [play.wait_s]
    await play.clock.advance(9.5)
    waits.append(play.wait_s)
    await play.clock.advance(0.5)
    await play.ends(ANSWER)

    assert waits == [10.0, 0.5]
    assert play.moves == [
        ("closed", "open"),
        ("open", "half-open"),
        ("half-open", "open"),
        ("open", "half-open"),
        ("half-open", "closed"),
    ]


async def test_one_failure_is_enough() -> None:
    """With a bound of one the first failure opens it."""
    play = Play(failures=1, open_s=0.5)
    await play.ends(FAILED)

    assert play.wait_s == 0.5
    assert play.moves == [("closed", "open")]


# --- the probe ---


async def test_only_a_probe_is_a_probe(play: Play) -> None:
    """While all is well a lease is an ordinary one; after an outage the first one is the probe."""
    before = play.entered()
    await play.opened()
    await play.clock.advance(OPEN_S)
    probe = play.entered()

    assert (before.is_probe, probe.is_probe) == (False, True)
    assert probe.generation > before.generation


async def test_herd_at_half_open(play: Play) -> None:
    """Of fifty that ask at once, one is the probe."""
    await play.opened()
    await play.clock.advance(OPEN_S)
    passed = []
    for _ in range(50):
        if play.wait_s <= 0:
            passed.append(play.entered())

    assert len(passed) == 1


async def test_refused_during_a_probe(play: Play) -> None:
    """Whoever is refused during a probe is told to wait no longer than an open breaker would ask."""
    await play.opened()
    await play.clock.advance(OPEN_S)
    await play.called()
    waits = [play.wait_s]
    await play.clock.advance(PROBE_S - 4)
    waits.append(play.wait_s)

    assert waits == [10.0, pytest.approx(4.0)]


async def test_probe_is_cancelled(play: Play) -> None:
    """A probe whose caller leaves says nothing, and the next call becomes the probe."""
    await play.opened()
    await play.clock.advance(OPEN_S)
    task, call = await play.called()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    state = play.state
    await play.ends(ANSWER)

    assert call.was_cancelled
    assert state == "half-open"
    assert play.moves == [("closed", "open"), ("open", "half-open"), ("half-open", "closed")]


async def test_probe_is_given_back_unused(play: Play) -> None:
    """A lease that nobody used settles nothing, and gives way to the next."""
    await play.opened()
    await play.clock.advance(OPEN_S)
    play.entered().release()

    assert play.entered().is_probe


@pytest.mark.parametrize(
    "error", [errors.RateLimited("later"), errors.UpstreamRefused("no", status=400), errors.UpstreamDenied("no")]
)
async def test_probe_is_neutral(play: Play, error: errors.EmbeddingError) -> None:
    """A probe that was rate-limited or refused settles nothing; it gives way to the next."""
    await play.opened()
    await play.clock.advance(OPEN_S)
    await play.ends(error)
    state = play.state
    await play.ends(FAILED)

    assert state == "half-open"
    assert play.state == "open"


@pytest.mark.parametrize(("after_s", "wait_s"), [(59.999, 0.001), (60.0, 0.0), (60.001, 0.0)])
async def test_probe_outlives_its_lease(play: Play, after_s: float, wait_s: float) -> None:
    """A probe that does not come back is waited for as long as its lease lasts, then another one may pass."""
    await play.opened()
    await play.clock.advance(OPEN_S)
    await play.called()
    await play.clock.advance(after_s)
    found = play.wait_s
    if not wait_s:
        await play.ends(ANSWER)

    assert found == pytest.approx(wait_s)
    assert play.state == ("half-open" if wait_s else "closed")


@pytest.mark.parametrize("end", [ANSWER, FAILED], ids=["success", "failure"])
async def test_late_probe_without_a_successor(play: Play, end: Answer | BaseException) -> None:
    """A probe that comes back after its lease still decides, as long as no other one has been sent."""
    await play.opened()
    await play.clock.advance(OPEN_S)
    task, call = await play.called()
    await play.clock.advance(PROBE_S + 1)
    await play.settled(task, call, end)

    assert play.state == ("closed" if end is ANSWER else "open")


@pytest.mark.parametrize("end", [ANSWER, FAILED, errors.RateLimited("late")], ids=["success", "failure", "neutral"])
async def test_late_probe_with_a_successor(play: Play, end: Answer | BaseException) -> None:
    """Of two probes the later one decides; the earlier one does not give back its lease either."""
    await play.opened()
    await play.clock.advance(OPEN_S)
    first, first_call = await play.called()
    await play.clock.advance(PROBE_S)
    second, second_call = await play.called()
    await play.settled(first, first_call, end)
    after_the_first = (play.state, play.wait_s)
    await play.settled(second, second_call, ANSWER)

    assert after_the_first == ("half-open", 10.0)
    assert play.state == "closed"


@pytest.mark.parametrize("end", [ANSWER, FAILED], ids=["success", "failure"])
async def test_late_probe_after_its_successor(play: Play, end: Answer | BaseException) -> None:
    """Once a probe has settled the matter, the verdict of the other one is of another time."""
    await play.opened()
    await play.clock.advance(OPEN_S)
    first, first_call = await play.called()
    await play.clock.advance(PROBE_S)
    await play.ends(FAILED if end is ANSWER else ANSWER)
    before = (play.state, play.failures)
    await play.settled(first, first_call, end)

    assert (play.state, play.failures) == before


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
    failures = play.failures
    await play.ends(FAILED)

    assert failures == 2
    assert play.state == "open"


@pytest.mark.parametrize(
    ("is_suspect", "error", "failures"),
    [
        (True, errors.UpstreamFailed("it broke", may_be_poison=True), 0),
        (True, errors.BadVectors("one is empty", index=0), 0),
        (True, FAILED, 1),
        (True, errors.UpstreamTimeout("slow"), 1),
        (False, errors.UpstreamFailed("it broke", may_be_poison=True), 1),
    ],
)
async def test_looking_for_the_one_to_blame(
    play: Play, is_suspect: bool, error: errors.EmbeddingError, failures: int
) -> None:
    """A part of a batch that is sent to find the bad input says nothing when it fails as that input makes it fail."""
    await play.ends(error, is_suspect=is_suspect)

    assert play.failures == failures


async def test_callers_leave(play: Play) -> None:
    """Callers that hang up neither open the breaker nor reset its count, and their cancellation passes through."""
    await play.ends(FAILED)
    await play.ends(FAILED)
    for _ in range(5):
        task, _ = await play.called()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert play.failures == 2
    assert play.state == "closed"


async def test_late_failures_of_an_older_time(play: Play) -> None:
    """Failures that come back after it has opened neither open it again nor prolong its time."""
    late = [await play.called() for _ in range(10)]
    await play.opened()
    await play.clock.advance(5)
    for task, call in late:
        await play.settled(task, call, FAILED)

    assert play.moves == [("closed", "open")]
    assert play.wait_s == pytest.approx(5.0)


async def test_late_success_of_an_older_time(play: Play) -> None:
    """A success from before it opened does not close it."""
    task, call = await play.called()
    await play.opened()
    await play.settled(task, call, ANSWER)

    assert play.state == "open"
    assert play.wait_s == OPEN_S


async def test_late_verdicts_at_half_open(play: Play) -> None:
    """Neither a late success nor a late failure decides in place of the probe."""
    (good, good_call), (bad, bad_call) = await play.called(), await play.called()
    await play.opened()
    await play.clock.advance(OPEN_S)
    probe, probe_call = await play.called()
    await play.settled(good, good_call, ANSWER)
    await play.settled(bad, bad_call, FAILED)
    after_the_late = (play.state, play.wait_s)
    await play.settled(probe, probe_call, ANSWER)

    assert after_the_late == ("half-open", 10.0)
    assert play.state == "closed"


@pytest.mark.parametrize("end", [ANSWER, FAILED], ids=["success", "failure"])
async def test_late_verdict_after_recovery(play: Play, end: Answer | BaseException) -> None:
    """A verdict from before the outage neither counts against the upstream that has recovered, nor for it."""
    task, call = await play.called()
    await play.opened()
    await play.clock.advance(OPEN_S)
    await play.ends(ANSWER)
    await play.ends(FAILED)
    await play.settled(task, call, end)

    assert play.failures == 1


async def test_close(play: Play) -> None:
    """Closing closes what follows."""
    await play.circuit.aclose()

    assert play.inner.is_closed


# --- no wedge ---


class Flight:
    """A call driven without a loop: under way until the test ends it."""

    def __init__(self, play: Play, end: list[Answer | BaseException]) -> None:
        self._end = end
        self.lease = play.entered()
        self._call: Coroutine[Any, Any, Answer] = play.circuit(make_batch(lease=self.lease))
        self._call.send(None)

    def ends(self, end: Answer | BaseException) -> None:
        self._end[0] = end
        with pytest.raises((StopIteration, errors.EmbeddingError, asyncio.CancelledError)):
            self._call.send(None)
        self.lease.release()


class Yielding:
    """An upstream that each call waits for once."""

    def __init__(self) -> None:
        self.end: list[Answer | BaseException] = [ANSWER]

    def __await__(self) -> Any:
        yield
        if isinstance(self.end[0], BaseException):
            raise self.end[0]
        return self.end[0]

    async def __call__(self, batch: Any) -> Answer:
        return await self  # type: ignore[no-any-return]

    def snapshot(self) -> dict[str, Any]:
        return {}

    async def aclose(self) -> None: ...


STEPS = st.one_of(
    st.just(("call", 0)),
    st.just(("call", 0)),
    st.tuples(st.just("wait"), st.sampled_from([0.1, 3, 10, 30, 61])),
    st.tuples(st.sampled_from(["fail", "fail", "answer", "limit", "cancel"]), st.integers(0, 20)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=60))
def test_never_wedged(steps: list[tuple[str, float]]) -> None:
    """
    From whatever state, an upstream that is well again is served after `open_s` + `probe_s` at the latest.

    And on the way there, never two probes are under way, but for those whose lease has run out.
    """
    play, upstream = Play(failures=2), Yielding()
    play.circuit._inner = upstream
    flying: list[Flight] = []
    probes: list[tuple[float, Flight]] = []

    def leap(seconds: float) -> None:
        play.clock._now += seconds

    for kind, value in steps:
        if kind == "wait":
            leap(value)
        elif kind == "call":
            if play.wait_s <= 0:
                flight = Flight(play, upstream.end)
                if flight.lease.is_probe:
                    assert not [at for at, probe in probes if probe in flying and at + PROBE_S > play.clock.now()]
                    probes.append((play.clock.now(), flight))
                flying.append(flight)
        elif flying:
            flight = flying[int(value) % len(flying)]
            flying.remove(flight)
            flight.ends(
                {
                    "fail": FAILED,
                    "answer": ANSWER,
                    "limit": errors.RateLimited("later"),
                    "cancel": asyncio.CancelledError(),
                }[kind]
            )

    # It is well from now on: each call that passes is answered at once, those that hang come back as they like.
    end = play.clock.now() + OPEN_S + PROBE_S
    rng = random.Random(len(steps))
    while not play.circuit.is_closed:
        assert play.clock.now() <= end, f"still {play.state}"
        if flying and rng.random() < 0.1:
            flying.pop().ends(FAILED if rng.random() < 0.5 else ANSWER)
        if play.wait_s <= 0:
            Flight(play, upstream.end).ends(ANSWER)
        else:
            leap(min(play.wait_s, 1.0))
