"""One server: its slots, who may use them, and what their use teaches."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from proxy.base import errors
from proxy.base.messages import Answer, Batch, Limits
from proxy.upstream.balance.upstream import Permit
from tests.fakes.balance import HandUpstream, answer
from tests.fakes.clock import HandClock, settle
from tests.fakes.stage import Call, make_batch

FAILED = errors.UpstreamFailed("it broke")
SLOW = errors.UpstreamTimeout("too slow")


class Play:
    """An upstream, its clock, and who has been told of it."""

    def __init__(self, **options: Any) -> None:
        self.clock = HandClock()
        self.upstream = HandUpstream("u", self.clock, **options)
        self.told = 0
        self.upstream.listen(self._told)

    def _told(self) -> None:
        self.told += 1

    def take(self) -> Permit:
        assert self.upstream.is_free
        return self.upstream.take(self.clock.now())

    async def called(self, permit: Permit | None = None, **changes: Any) -> tuple[asyncio.Task[Answer], Call]:
        """Start a call with a lease; returns it and its far end."""
        permit = permit or self.take()
        batch: Batch = make_batch(lease=permit, now=self.clock.now(), **changes)
        task = asyncio.create_task(self.upstream.call(permit, batch))
        return task, await self.upstream.scripted.next()  # type: ignore[no-any-return]

    async def ended(self, end: Answer | BaseException, *, seconds: float = 0.0, **changes: Any) -> None:
        """Let one call last so long and end so."""
        task, call = await self.called(**changes)
        await self.clock.advance(seconds)
        await self.settled(task, call, end)

    async def settled(self, task: asyncio.Task[Answer], call: Call, end: Answer | BaseException) -> None:
        if isinstance(end, Answer):
            call.answer(end)
            assert await task is end
        elif isinstance(end, asyncio.CancelledError):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            call.fail(end)
            with pytest.raises(type(end)) as caught:
                await task
            assert caught.value is end

    def canary(self, *, tokens: float = 11.0, patience_s: float = 20.0) -> asyncio.Task[Permit]:
        return asyncio.create_task(self.upstream.lease(tokens, self.clock.now() + patience_s))

    @property
    def slots(self) -> tuple[int, int, int]:
        """Calls under way, haunted slots, slots."""
        shown = self.upstream.snapshot()
        return shown["calls"], shown["haunted_slots"], shown["slots"]


# --- leases ---


def test_slots() -> None:
    """There are as many leases as slots, and its load is the share of them that is in use."""
    play = Play(slots=2)
    loads = [play.upstream.load]
    for _ in range(2):
        play.take()
        loads.append(play.upstream.load)

    assert loads == [0.0, 0.5, 1.0]
    assert not play.upstream.has_slot
    assert not play.upstream.is_free


async def test_slots_are_fewer_than_calls() -> None:
    """When there are fewer slots than calls under way, all of these end as they like before a new one begins."""
    play = Play(slots=4)
    calls = [await play.called() for _ in range(4)]
    await play.clock.advance(1)
    await play.settled(*calls[0], errors.RateLimited("later"))
    free = [play.upstream.is_free]
    for task, call in calls[1:]:
        await play.settled(task, call, answer())
        free.append(play.upstream.is_free)

    assert play.slots == (0, 0, 2)
    assert free == [False, False, True, True]


@pytest.mark.parametrize(
    ("room", "bound", "expected"),
    [(math.inf, math.inf, math.inf), (500.0, math.inf, 500.0), (500.0, 400.0, 400.0), (400.0, 400.0, 400.0)],
)
def test_lease_says_what_it_may_carry(room: float, bound: float, expected: float) -> None:
    """The upstream's bound or what its limit per minute leaves, whichever is less."""
    play = Play(limits=Limits(10, 1000, bound))
    play.upstream.hand_pace.room_tokens = room
    limits = play.take().limits

    assert limits == Limits(10, 1000, expected)


def test_charge_once() -> None:
    """What leaves with a lease is charged once."""
    play = Play()
    permit = play.take()
    permit.charge(7.0)
    permit.charge(7.0)

    assert play.upstream.hand_pace.charged == [7.0]


def test_lease_that_is_not_used() -> None:
    """A lease that is given back, once or twice, frees one slot and costs no tokens."""
    play = Play(slots=2)
    permit, _ = play.take(), play.take()
    permit.release()
    permit.release()

    assert play.slots == (1, 0, 2)
    assert play.upstream.hand_pace.charged == []
    assert play.told == 1


def test_probe() -> None:
    """A lease carries the breaker's generation; a probe is given back to the breaker, once."""
    play = Play()
    ordinary = play.take()
    play.upstream.hand_guard.is_closed = False
    probe = play.take()
    for permit in (ordinary, probe, probe):
        permit.release()

    assert [(permit.generation, permit.is_probe) for permit in (ordinary, probe)] == [(0, False), (1, True)]
    assert play.upstream.hand_guard.given_back == [1]


# --- the call ---

ENDS = [answer(), FAILED, errors.RateLimited("later"), SLOW, errors.DeadlineExceeded("late"), asyncio.CancelledError()]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
async def test_slot_is_given_back(end: Answer | BaseException) -> None:
    """However a call ends, its slot is free at once where an abandoned call stops, and everybody is told."""
    play = Play(slots=1)
    await play.ended(end, seconds=1.0)

    assert play.slots == (0, 0, 1)
    assert play.told == 1


async def test_lease_is_released_after_its_call() -> None:
    """Whoever releases the lease of a call that is over frees no second slot."""
    play = Play(slots=2)
    other, permit = play.take(), play.take()
    await play.settled(*await play.called(permit), answer())
    permit.release()
    other.release()

    assert play.slots == (0, 0, 2)


async def test_call_is_cancelled_before_it_begins() -> None:
    """A task that is cancelled before its first step never calls; whoever made it releases the lease."""
    play = Play(slots=1)
    permit = play.take()
    task = asyncio.create_task(play.upstream.call(permit, make_batch(lease=permit)))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    before = play.slots
    permit.release()

    assert before == (1, 0, 1)
    assert play.slots == (0, 0, 1)
    assert play.upstream.scripted.calls == []


# --- haunted slots ---


async def known(play: Play, seconds: float = 2.0) -> None:
    """Let it be known what a call takes here."""
    for _ in range(2):  # the first one does not count
        await play.ended(answer(), seconds=seconds)


@pytest.mark.parametrize(
    ("end", "spent_s", "haunted_s"),
    [
        (asyncio.CancelledError(), 0.5, 1.5),
        (errors.DeadlineExceeded("late"), 0.5, 1.5),
        (asyncio.CancelledError(), 2.5, 0.0),
        (SLOW, 0.5, 5.0),
    ],
    ids=["cancelled", "deadline", "cancelled late", "timeout"],
)
async def test_abandoned_call(end: BaseException, spent_s: float, haunted_s: float) -> None:
    """A call that was given up counts until it should have ended; one that takes too long, for as long as allowed."""
    play = Play(slots=2, abandoned_s=5.0)
    await known(play, 2.0)
    told = play.told
    await play.ended(end, seconds=spent_s)
    at_once = play.slots
    await play.clock.advance(haunted_s - 0.001)
    before = play.slots
    await play.clock.advance(0.001)

    assert at_once[:2] == before[:2] == ((0, 1) if haunted_s else (0, 0))
    assert play.slots[:2] == (0, 0)
    assert play.told == told + (2 if haunted_s else 1)


async def test_abandoned_call_at_an_unknown_upstream() -> None:
    """Where nobody knows what a call takes, an abandoned one counts as long as allowed."""
    play = Play(slots=2, abandoned_s=5.0)
    await play.ended(asyncio.CancelledError(), seconds=1.0)
    await play.clock.advance(4.9)
    before = play.slots
    await play.clock.advance(0.1)

    assert before == (0, 1, 2)
    assert play.slots == (0, 0, 2)


async def test_abandoned_call_that_should_take_long() -> None:
    """The bound counts, however long the call should have gone on."""
    play = Play(slots=2, abandoned_s=5.0)
    await known(play, 100.0)
    await play.ended(asyncio.CancelledError(), seconds=1.0)
    await play.clock.advance(5)

    assert play.slots == (0, 0, 2)


async def test_call_that_was_never_sent() -> None:
    """A call that is turned back at once, since its deadline has come, haunts nobody."""
    play = Play(slots=1, abandoned_s=5.0)
    await play.ended(errors.DeadlineExceeded("no time was left"))

    assert play.slots == (0, 0, 1)


async def test_haunted_slot_is_not_given_away() -> None:
    """A haunted slot counts as used."""
    play = Play(slots=1, abandoned_s=5.0)
    await play.ended(SLOW, seconds=1.0)

    assert not play.upstream.is_free
    assert play.upstream.load == 1.0


async def test_breaker_opens_with_a_call_that_haunts() -> None:
    """Whoever waits is told at once when a call ends, also where its slot is haunted: the breaker may be open now."""
    play = Play(slots=1, abandoned_s=30.0)
    task, call = await play.called()
    waiting = play.canary()
    await settle()
    play.upstream.hand_guard.open(10.0)
    await play.settled(task, call, SLOW)
    await settle()

    assert play.told >= 1
    assert isinstance(waiting.exception(), errors.CircuitOpen)


async def test_closing_a_haunted_upstream() -> None:
    """Ghosts end with the last pipeline."""
    play = Play(slots=1, abandoned_s=30.0)
    play.upstream.join()
    await play.ended(SLOW, seconds=1.0)
    await play.upstream.leave()
    await settle()

    assert play.slots[:2] == (0, 0)
    assert play.upstream.scripted.closings == 1


# --- what calls teach ---


async def test_good_calls_teach_times() -> None:
    """Times are learned by model."""
    play = Play()
    await known(play, 0.5)

    assert play.upstream.latency("m").expected_s(1) == pytest.approx(0.5)
    assert play.upstream.latency("another").expected_s(1) == 0.0
    assert play.upstream.snapshot()["latency"] == {"m": {"fixed_ms": 500.0, "per_input_ms": 0.0}}


@pytest.mark.parametrize("end", [FAILED, SLOW, errors.DeadlineExceeded("late"), asyncio.CancelledError()])
async def test_bad_calls_teach_no_times(end: BaseException) -> None:
    """Only a call that was answered says what one takes."""
    play = Play()
    await play.ended(end, seconds=5.0)

    assert play.upstream.snapshot()["latency"] == {}


async def test_full_house_gets_more_slots() -> None:
    """Calls that use all slots, and are no slower for it, bring further ones."""
    play = Play(slots=2, most=4)
    calls = [await play.called() for _ in range(2)]
    await play.settled(*calls[0], answer())
    slots = play.slots
    await play.settled(*calls[1], answer())

    assert slots == (1, 0, 3)
    assert play.slots == (0, 0, 3)


async def test_slow_calls_cost_slots() -> None:
    """Calls that take much longer than their like used to bring fewer slots."""
    play = Play(slots=10)
    await known(play, 0.01)
    for _ in range(8):
        await play.ended(answer(), seconds=0.04)

    assert play.slots[2] == 9
    assert play.upstream.snapshot()["inflation"] > 1.5


@pytest.mark.parametrize(("end", "slots"), [(errors.RateLimited("later"), 6), (SLOW, 6), (FAILED, 10), (answer(), 10)])
async def test_overload_costs_slots(end: Answer | BaseException, slots: int) -> None:
    """An upstream that says "too many", or does not answer in time, gets fewer at a time; one that broke does not."""
    play = Play(slots=10)
    await play.ended(end, seconds=1.0)

    assert play.slots[2] == slots


async def test_herd_that_is_turned_away() -> None:
    """Calls under way together and turned away one after the other cost as much as one."""
    play = Play(slots=10)
    calls = [await play.called() for _ in range(10)]
    for task, call in calls:
        await play.clock.advance(0.1)
        await play.settled(task, call, errors.RateLimited("later"))

    assert play.slots[2] == 6


async def test_probe_that_succeeds() -> None:
    """After an outage it begins with few slots, and finds out anew; a probe that fails changes nothing."""
    play = Play(slots=10, most=16)
    play.upstream.hand_guard.is_closed = False
    await play.ended(FAILED, seconds=1.0)
    failed = play.slots
    await play.ended(answer(), seconds=1.0)

    assert failed == (0, 0, 10)
    assert play.slots[2] <= 2


# --- canaries ---


async def test_canary_finds_a_slot() -> None:
    """A canary takes a slot like any other call, and is charged."""
    play = Play(slots=1)
    permit = await play.canary()

    assert play.slots == (1, 0, 1)
    assert play.upstream.hand_pace.charged == [11.0]
    permit.release()


async def test_canary_waits_for_a_slot() -> None:
    """A canary gets the next slot, before batches: these are told that there is none until it has it."""
    play = Play(slots=1)
    busy = play.take()
    canary = play.canary()
    await settle()
    waiting = play.upstream.snapshot()["waiting_canaries"]
    busy.release()
    is_free = play.upstream.is_free
    await settle()

    assert waiting == 1
    assert not is_free
    assert canary.done()
    canary.result().release()
    assert play.upstream.is_free
    assert play.told == 3


async def test_several_canaries_wait() -> None:
    """Canaries of several models take their turns."""
    play = Play(slots=1)
    busy = play.take()
    canaries = [play.canary() for _ in range(3)]
    await settle()
    order = []
    busy.release()
    for _ in range(3):
        await settle()
        done = [n for n, canary in enumerate(canaries) if canary.done()]
        order.append(done)
        canaries[done[-1]].result().release()

    assert order == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("is_called", [False, True])
async def test_waiting_canary_leaves(is_called: bool) -> None:
    """A canary that gives up passes its turn on, also when it has just been called."""
    play = Play(slots=1)
    busy = play.take()
    first, second = play.canary(), play.canary()
    await settle()
    if is_called:
        busy.release()
    first.cancel()
    await settle()
    if not is_called:
        busy.release()
        await settle()

    assert first.cancelled()
    assert second.done()
    second.result().release()
    assert play.slots == (0, 0, 1)
    assert play.upstream.is_free


async def test_last_canary_leaves() -> None:
    """When no canary waits any more, batches are told: they have been told before that they come later."""
    play = Play(slots=1)
    busy = play.take()
    canary = play.canary()
    await settle()
    busy.release()
    canary.cancel()
    told = play.told
    await settle()

    assert play.told == told + 1
    assert play.upstream.is_free


async def test_canary_waits_for_the_limit() -> None:
    """A canary keeps the limits per minute too, and nobody overtakes it meanwhile."""
    play = Play()
    play.upstream.hand_pace.until = 1003.0
    canary = play.canary()
    await play.clock.advance(2.9)
    before = (canary.done(), play.upstream.is_free)
    await play.clock.advance(0.1)

    assert before == (False, False)
    assert canary.done()
    canary.result().release()


async def test_canary_of_an_upstream_that_is_left_alone() -> None:
    """An open breaker refuses the canary at once."""
    play = Play()
    play.upstream.hand_guard.open(7.0)
    with pytest.raises(errors.CircuitOpen) as caught:
        await play.canary()

    assert caught.value.message == "upstream 'u' has failed repeatedly and is left alone"
    assert caught.value.retry_after_s == 7.0


@pytest.mark.parametrize(("hold_s", "is_refused"), [(19.0, False), (20.0, False), (20.1, True)])
async def test_canary_of_an_upstream_that_asks_for_time(hold_s: float, is_refused: bool) -> None:
    """A canary waits as the upstream asks, but hears its error where that is longer than it can wait."""
    play = Play()
    error = errors.UpstreamDenied("check its API key")
    play.upstream.hand_pace.until, play.upstream.hand_pace.error = 1000.0 + hold_s, error
    canary = play.canary(patience_s=20.0)
    await settle()
    is_over = canary.done()

    assert is_over is is_refused
    if is_refused:
        found = canary.exception()
        assert isinstance(found, errors.UpstreamDenied)
        assert found is not error
        assert found.message == error.message
    else:
        await play.clock.advance(hold_s)
        canary.result().release()


# --- who is told ---


def test_turns_of_several_models() -> None:
    """Of those who listen, the one that was served last is told last, so a busy model leaves something to others."""
    play = Play()
    order: list[str] = []

    def told(name: str) -> Any:
        return lambda: order.append(name)

    listeners = [told(name) for name in "ab"]
    play.upstream.unlisten(play._told)
    for ready in listeners:
        play.upstream.listen(ready)
    play.upstream.tell()
    play.upstream.served(listeners[0])
    play.upstream.tell()
    play.upstream.served(listeners[0])
    play.upstream.served(play._told)  # does not listen any more
    play.upstream.tell()

    assert order == ["a", "b", "b", "a", "b", "a"]


def test_listener_leaves() -> None:
    """Whoever does not listen any more is told nothing; to leave twice is no harm."""
    play = Play()
    play.upstream.unlisten(play._told)
    play.upstream.unlisten(play._told)
    play.upstream.tell()

    assert play.told == 0


# --- pipelines ---


async def test_shared_by_pipelines() -> None:
    """It is closed by the last pipeline that has it, once."""
    play = Play()
    assert play.upstream.join() is play.upstream
    play.upstream.join()
    await play.upstream.leave()
    after_the_first = play.upstream.scripted.closings
    await play.upstream.leave()

    assert after_the_first == 0
    assert play.upstream.scripted.closings == 1


def test_snapshot() -> None:
    """The snapshot tells calls and ghosts apart."""
    play = Play(slots=3)
    play.take()

    assert play.upstream.snapshot() == {
        "calls": 1,
        "haunted_slots": 0,
        "waiting_canaries": 0,
        "slots": 3,
        "inflation": 1.0,
        "latency": {},
    }
