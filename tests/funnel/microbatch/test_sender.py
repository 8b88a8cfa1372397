"""With a lease in hand, not before, the sender takes what waits; and whatever befalls a batch, each input is told."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from proxy.base.errors import (
    BadVectors,
    CircuitOpen,
    EmbeddingError,
    NoUpstream,
    RateLimited,
    UpstreamFailed,
    UpstreamRefused,
    UpstreamTimeout,
)
from proxy.base.events import BatchFinished, BatchSplit, Event
from proxy.base.lease import Outlook, Wait
from proxy.base.messages import Answer, Batch, Limits, Priority, Response, Spec
from proxy.base.settings import MicroBatchSettings
from proxy.funnel.microbatch.part import Part
from proxy.funnel.microbatch.sender import Sender
from tests.fakes.clock import HandClock, settle
from tests.fakes.leases import ROOMY, UNMEASURED, ScriptedLeases
from tests.fakes.stage import Call, ScriptedStage, make_request, rows_of

INTERACTIVE, BULK = Priority.INTERACTIVE, Priority.BULK
NOW = 1000.0
MEASURED = Outlook(0, 0, fixed_s=0.030, per_input_s=0.001)
SLOW = Outlook(0, 0, fixed_s=0.5, per_input_s=0.5)
PACED = Outlook(0, 0, fixed_s=0.030, per_input_s=0.010, is_paced=True)


class Room:
    """A sender, leases and an upstream that the test plays, a clock moved by hand, and what is told."""

    def __init__(
        self,
        *,
        slots: int = 1,
        limits: Limits = ROOMY,
        retries: int = 1000,
        view: Outlook = UNMEASURED,
        **settings: float,
    ) -> None:
        self.told: list[Event] = []
        self.clock = HandClock()
        self.inner = ScriptedStage()
        self.leases = ScriptedLeases(slots, limits, view)
        self.parts: list[Part] = []
        OPEN.append(self)
        self.retries = retries
        self.sender = Sender(
            "m",
            MicroBatchSettings(**settings),
            self.inner,
            leases=self.leases,
            may_retry=self._may_retry,
            clock=self.clock,
            observe=self.told.append,
        )

    def _may_retry(self) -> bool:
        self.retries -= 1
        return self.retries >= 0

    def comes(self, *inputs: Any, **changes: Any) -> Part:
        """Let a request wait from now on."""
        request = make_request(inputs, **({"now": self.clock.now()} | changes))
        costs = self.sender.costs(request.sizes, is_tokens=request.spec.is_tokens)
        part = Part(request, costs, self.sender.forget)
        self.parts.append(part)
        self.sender.add(part)
        return part

    async def leaves(self, part: Part) -> None:
        """Let its caller leave."""
        part.failed(asyncio.CancelledError())
        self.sender.forget(part)
        await settle()

    async def calls(self, *expected: tuple[str, ...]) -> list[Call]:
        """Return the calls that nobody has answered yet: of these inputs, in this order."""
        await settle()
        pending = [call for call in self.inner.calls if not call.future.done()]

        assert [call.message.inputs for call in pending] == list(expected)
        return pending

    @property
    def splits(self) -> list[int]:
        return [event.inputs for event in self.told if isinstance(event, BatchSplit)]

    def number(self, *path: str) -> Any:
        """Return a number of the snapshot."""
        found: Any = self.sender.snapshot()
        for name in path:
            found = found[name]
        return found

    def check(self) -> None:
        """Nothing is left inside."""
        snapshot = self.sender.snapshot()

        assert snapshot["lanes"] == {name: {"inputs": 0, "tokens": 0, "callers": 0} for name in ("interactive", "bulk")}
        assert snapshot["inputs_in_flight"] == {"interactive": 0, "bulk": 0}
        assert snapshot["batches_in_flight"] == 0
        self.leases.check()


OPEN: list[Room] = []


@pytest.fixture(autouse=True)
async def _nothing_is_left() -> AsyncIterator[None]:
    """Whatever a test does, at its end nothing is inside its rooms, no lease is out, and no error went unseen."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    OPEN.clear()
    yield
    for room in OPEN:
        await room.sender.aclose()
        await settle()
        room.check()
        for part in room.parts:
            assert part.is_over

    assert complaints == []


def answer(call: Call, **changes: Any) -> None:
    """Answer a call rightly."""
    inputs = call.message.inputs
    call.answer(Answer(rows_of(inputs), **({"tokens": len(inputs), "upstream": "u"} | changes)))


def gets_its_rows(part: Part) -> bool:
    return part.is_over and part.result().rows == rows_of(part.request.inputs)


async def finish(room: Room, poison: Callable[[Batch], EmbeddingError | None] = lambda _: None) -> int:
    """Answer rightly, or by `poison`, whatever still comes; returns how many calls that took."""
    count = 0
    await settle()
    while pending := [call for call in room.inner.calls if not call.future.done()]:
        count += 1
        call = pending[0]
        if error := poison(call.message):
            call.fail(error)
        else:
            answer(call)
        await settle()
    return count


# --- one request ---


async def test_request_that_meets_a_free_slot() -> None:
    """With a slot to spare a request leaves at once, and its batch says all that the upstream has to know."""
    room = Room()
    spec = Spec("m", 4, b'{"x":1}')
    part = room.comes("a", "é", spec=spec, user="somebody", traceparent="00-1-2-01", deadline=NOW + 7)
    [call] = await room.calls(("a", "é"))
    [lease] = room.leases.given
    in_flight = room.number("batches_in_flight"), room.number("inputs_in_flight", "interactive")

    answer(call, tokens=9, queue_s=0.5, upstream_s=1.5, attempts=2)
    await settle()

    assert call.message == Batch(
        spec=spec,
        inputs=("a", "é"),
        size_bytes=3,
        deadline=NOW + 7,
        tokens=pytest.approx(2 + 3 * 0.33),
        lease=lease,
        user="somebody",
        traceparent="00-1-2-01",
    )
    assert lease.charges == [call.message.tokens]
    assert in_flight == (1, 2)
    assert part.result() == Response(
        rows_of(("a", "é")), tokens=9, upstream="u", queue_s=0.5, upstream_s=1.5, attempts=2
    )
    assert room.told == [BatchFinished("m", "u", inputs=2, queue_s=0.5, upstream_s=1.5)]


async def test_asking_for_a_lease() -> None:
    """Who asks says what the next input weighs, and all that waits."""
    room = Room()
    room.leases.say(Wait())
    room.comes("x" * 100, "y" * 200)
    room.comes("z" * 300)
    await settle()

    assert room.leases.asked == [(pytest.approx(34), pytest.approx(201))]


async def test_snapshot() -> None:
    """The numbers of now: what waits, what is under way, and how full batches have been."""
    room = Room()
    fresh = room.sender.snapshot()
    room.comes("a", "b", "c")
    [call] = await room.calls(("a", "b", "c"))
    room.comes("d", priority=BULK)
    waiting = room.sender.snapshot()
    answer(call)
    await finish(room)

    assert fresh["inputs_per_batch"] is None
    assert waiting == {
        "lanes": {
            "interactive": {"inputs": 0, "tokens": 0, "callers": 0},
            "bulk": {"inputs": 1, "tokens": 1, "callers": 1},
        },
        "inputs_in_flight": {"interactive": 3, "bulk": 0},
        "batches_in_flight": 1,
        "batches": 0,
        "inputs_per_batch": None,
        "splits": 0,
        "quarantined_inputs": 0,
        "tokens_per_byte": 0.33,
    }
    assert room.number("batches") == 2
    assert room.number("inputs_per_batch") == 2.0


async def test_first_instant_at_which_something_left() -> None:
    """A request knows when the first of its inputs left for an upstream: until then it has only waited."""
    room = Room()
    part = room.comes(*"abcdefgh", deadline=NOW + 100)
    room.leases.limits = Limits(5, 1000)
    waiting = part.request.progress.left_at
    [call] = await room.calls(tuple("abcde"))
    await room.clock.advance(3)
    answer(call)
    await finish(room)

    assert waiting is None
    assert part.request.progress.left_at == NOW


# --- late binding ---


async def test_query_that_comes_after_bulk() -> None:
    """Whoever came first, at the moment of the lease an interactive query leaves before bulk."""
    room = Room()
    room.comes("busy")
    [busy] = await room.calls(("busy",))
    room.comes("b1", "b2", priority=BULK)
    await settle()
    room.comes("query")
    await settle()

    answer(busy)
    [query] = await room.calls(("query",))
    answer(query)

    answer(*await room.calls(("b1", "b2")))


async def test_batch_of_what_waits_when_it_can_leave() -> None:
    """A batch is composed with the lease in hand: all who came until then are in it."""
    room = Room()
    room.comes("busy")
    [busy] = await room.calls(("busy",))
    parts = []
    for text in "abcdef":
        parts.append(room.comes(text, caller=text, now=room.clock.now()))
        await room.clock.advance(0.01)

    answer(busy)
    [call] = await room.calls(tuple("abcdef"))
    answer(call, tokens=12, queue_s=0.0, upstream_s=0.5)
    await settle()

    assert all(gets_its_rows(part) for part in parts)
    assert [part.result().tokens for part in parts] == [2] * 6
    assert [part.result().queue_s for part in parts] == pytest.approx([0.06, 0.05, 0.04, 0.03, 0.02, 0.01])
    assert room.told[-1] == BatchFinished("m", "u", inputs=6, queue_s=pytest.approx(0.06), upstream_s=0.5)


async def test_requests_of_one_turn_of_the_loop() -> None:
    """Who comes in the same turn of the loop leaves together, also with a slot to spare."""
    room = Room()
    room.comes("a")
    room.comes("b")

    answer(*await room.calls(("a", "b")))


async def test_batch_of_several_users() -> None:
    """Several users are nobody in particular, the most patient one's deadline counts, and the first one's trace."""
    room = Room()
    room.comes("a", user="one", traceparent="first", deadline=NOW + 5)
    room.comes("b", "é", user="other", traceparent="second", deadline=NOW + 9)
    room.comes("c", user="one", deadline=NOW + 1)
    [call] = await room.calls(("a", "b", "é", "c"))
    answer(call)

    message = call.message
    assert (message.user, message.traceparent, message.deadline, message.size_bytes) == (None, "first", NOW + 9, 5)


async def test_batch_of_one_user() -> None:
    """Several requests of one user are this user's."""
    room = Room()
    room.comes("a", user="one")
    room.comes("b", user="one")
    [call] = await room.calls(("a", "b"))
    answer(call)

    assert call.message.user == "one"


async def test_different_specs() -> None:
    """What is to be embedded in different ways goes in calls of its own."""
    room = Room()
    room.comes("a")
    room.comes("b", spec=Spec("m", 4))
    room.comes("c")

    [call] = await room.calls(("a", "c"))
    answer(call)

    answer(*await room.calls(("b",)))


async def test_share_of_each_slot() -> None:
    """Several free slots share what waits, so that none is idle."""
    room = Room(slots=3, patience_s=0.0)
    room.leases.say(Wait())
    parts = [room.comes(str(index)) for index in range(13)]
    await settle()
    room.leases.say(None)
    await settle()

    assert sorted(len(call.message.inputs) for call in room.inner.calls) == [3, 5, 5]
    await finish(room)
    assert all(gets_its_rows(part) for part in parts)


async def test_short_list_with_many_slots() -> None:
    """Where nobody knows what an input adds to a call, a few inputs are not worth several calls."""
    room = Room(slots=8, patience_s=0.0)
    room.comes("a", "b", "c", "d", "e")

    for call in await room.calls(("a", "b", "c", "d"), ("e",)):
        answer(call)


async def test_bulk_call_that_would_take_long() -> None:
    """A bulk batch is as small as its call may last, since an interactive input may have to wait for its end."""
    room = Room(view=SLOW)
    room.comes(*"abcdef", priority=BULK)

    answer(*await room.calls(("a", "b", "c")))
    answer(*await room.calls(("d", "e", "f")))


async def test_interactive_call_that_would_take_long() -> None:
    """Interactive inputs are few, and wait for nobody: only the upstream's limits count."""
    room = Room(view=SLOW)
    room.comes(*"abcdefg")

    answer(*await room.calls(tuple("abcdefg")))


# --- the hold ---


async def test_slot_that_waits_for_its_callers() -> None:
    """After a rush a free slot waits a moment for who comes back, and leaves when its share is there."""
    room = Room(slots=2, view=MEASURED)
    for index in range(8):
        room.comes(f"first {index}")
    one, other = await room.calls(
        tuple(f"first {index}" for index in range(4)), *[tuple(f"first {index}" for index in range(4, 8))]
    )
    answer(one)
    await settle()
    for index in range(3):
        room.comes(f"again {index}")
        await room.clock.advance(0.002)
    await room.calls(other.message.inputs)
    room.comes("again 3")

    _, again = await room.calls(other.message.inputs, tuple(f"again {index}" for index in range(4)))
    answer(other)
    answer(again)


async def test_slot_that_has_waited_long_enough() -> None:
    """When nobody comes back within the patience, the slot leaves with who is there."""
    room = Room(slots=2, view=MEASURED)
    for index in range(8):
        room.comes(f"first {index}")
    one, other = await room.calls(
        tuple(f"first {index}" for index in range(4)), *[tuple(f"first {index}" for index in range(4, 8))]
    )
    answer(one)
    await settle()
    room.comes("again")
    await room.clock.advance(0.0049)
    await room.calls(other.message.inputs)
    await room.clock.advance(0.0002)

    _, again = await room.calls(other.message.inputs, ("again",))
    answer(other)
    answer(again)


async def test_slot_that_takes_no_more_than_is_there() -> None:
    """Where a call cannot carry more than waits already, there is nothing to wait for: by inputs, or by tokens."""
    for limits in (Limits(3, 1000), Limits(100, 1000, max_tokens=5.0)):
        room = Room(view=MEASURED, limits=limits)
        room.comes("first")
        [first] = await room.calls(("first",))
        for text in "abcdefghi":
            room.comes(text)
        answer(first)
        [call] = await room.calls(tuple("abc"))
        answer(call)
        await room.calls(tuple("def"))
        await finish(room)
        await room.clock.advance(0.01)
        await finish(room)


async def test_slots_to_spare() -> None:
    """With as many slots as callers nobody waits for anybody."""
    room = Room(slots=8, view=MEASURED)
    for index in range(8):
        room.comes(str(index))
        await room.clock.advance(0.001)

    assert len(await room.calls(*[(str(index),) for index in range(8)])) == 8
    await finish(room)


async def test_no_patience() -> None:
    """With a patience of zero a free slot takes what is there."""
    room = Room(slots=2, view=MEASURED, patience_s=0.0)
    for index in range(8):
        room.comes(f"first {index}")
    one, other = await room.calls(
        tuple(f"first {index}" for index in range(4)), *[tuple(f"first {index}" for index in range(4, 8))]
    )
    answer(one)
    await settle()
    room.comes("again")

    _, again = await room.calls(other.message.inputs, ("again",))
    answer(other)
    answer(again)


async def test_turn_of_bulk_while_a_query_waits() -> None:
    """Bulk may have its turn, but no query waits for bulk that might come."""
    room = Room(slots=2, view=MEASURED, bulk_share=0.5)
    for index in range(8):
        room.comes(f"bulk {index}", priority=BULK)
    one, other = await room.calls(
        tuple(f"bulk {index}" for index in range(4)), *[tuple(f"bulk {index}" for index in range(4, 8))]
    )
    room.comes("query 1")
    room.comes("more bulk", priority=BULK)
    answer(one)
    _, query = await room.calls(other.message.inputs, ("query 1",))
    room.comes("query 2")
    answer(query)
    _, bulk = await room.calls(other.message.inputs, ("more bulk",))
    answer(other)
    answer(bulk)

    answer(*await room.calls(("query 2",)))


# --- there is no lease ---


async def test_wait_until_an_instant() -> None:
    """Where the leases say when, the sender asks again then, and not before; meanwhile it waits."""
    room = Room()
    room.leases.say(Wait(NOW + 2))
    room.comes("a", deadline=NOW + 1)
    await settle()
    asked = len(room.leases.asked)
    await room.clock.advance(1.9)
    asked_later = len(room.leases.asked)
    room.leases.word = None
    await room.clock.advance(0.1)

    assert (asked, asked_later) == (1, 1)
    answer(*await room.calls(("a",)))


async def test_wait_that_becomes_shorter_and_longer() -> None:
    """The earlier of two instants counts; what is asked then says when to ask next."""
    room = Room()
    room.leases.say(Wait(NOW + 5))
    room.comes("a")
    await settle()
    room.leases.say(Wait(NOW + 2))
    await settle()
    room.leases.say(Wait(NOW + 9))
    await settle()
    asked = len(room.leases.asked)
    await room.clock.advance(2)
    asked_at_2 = len(room.leases.asked)
    await room.clock.advance(6.9)
    asked_before_9 = len(room.leases.asked)
    room.leases.word = None
    await room.clock.advance(0.2)

    assert (asked, asked_at_2, asked_before_9) == (3, 4, 4)
    answer(*await room.calls(("a",)))


async def test_slot_that_becomes_free() -> None:
    """Where nobody knows when, whoever frees a slot calls."""
    room = Room()
    room.leases.say(Wait())
    room.comes("a")
    await room.calls()
    await room.clock.advance(5)
    await room.calls()

    room.leases.say(None)

    answer(*await room.calls(("a",)))


async def test_free_slot_while_nothing_waits() -> None:
    """A slot that nobody needs is not asked for."""
    room = Room()
    room.leases.ready()
    await settle()

    assert room.leases.asked == []


async def test_deadlines_before_the_end_of_a_hold() -> None:
    """Whose deadline comes by the end of a hold is told so at once, each by its own error; the others wait."""
    room = Room()
    failure = RateLimited("later", retry_after_s=3)
    parts = [
        room.comes(str(index), deadline=NOW + 3 + late, priority=priority)
        for index, (late, priority) in enumerate(
            [(-0.001, INTERACTIVE), (0, BULK), (0.001, INTERACTIVE), (-1, INTERACTIVE)]
        )
    ]
    room.leases.say(Wait(NOW + 3, failure))
    await settle()

    errors = [parts[index].error for index in (0, 1, 3)]
    assert all(isinstance(error, RateLimited) and error.retry_after_s == 3 for error in errors)
    assert len({id(error) for error in (*errors, failure)}) == 4
    assert not parts[2].is_over
    for index in (0, 1, 3):
        room.sender.forget(parts[index])
    room.leases.word = None
    await room.clock.advance(3)
    answer(*await room.calls(("2",)))


async def test_request_that_comes_during_a_hold() -> None:
    """During a hold whoever comes is asked at the door, without asking for a lease again."""
    room = Room()
    room.leases.say(Wait(NOW + 3, RateLimited("later")))
    patient = room.comes("patient", deadline=NOW + 9)
    await settle()
    asked = len(room.leases.asked)
    hasty = room.comes("hasty", deadline=NOW + 3)
    is_told = hasty.is_over
    await settle()

    assert is_told
    assert isinstance(hasty.error, RateLimited)
    assert len(room.leases.asked) == asked == 1
    room.leases.word = None
    await room.clock.advance(3)
    answer(*await room.calls(("patient",)))
    await settle()
    assert gets_its_rows(patient)


async def test_hold_that_ends_early() -> None:
    """When a lease may be had again nobody is told of the hold any more, also when nobody was waiting then."""
    room = Room()
    room.leases.say(Wait(NOW + 60, RateLimited("later")))
    refused = room.comes("refused")
    await settle()
    assert isinstance(refused.error, RateLimited)
    room.sender.forget(refused)

    room.leases.say(None)
    part = room.comes("a")
    answer(*await room.calls(("a",)))
    await settle()

    assert gets_its_rows(part)


async def test_hold_that_becomes_longer() -> None:
    """A longer hold is told to those whom the shorter one had let wait; the same one is told nobody twice."""
    room = Room()
    parts = [room.comes(str(late), deadline=NOW + late) for late in (4, 6, 8)]
    refused = []
    for until in (3, 3.0000001, 5, 4, 7):
        room.leases.word = Wait(NOW + until, RateLimited(f"until {until}"))
        room.sender.wake()
        await settle()
        refused.append([part.is_over for part in parts])

    assert refused == [[False] * 3, [False] * 3, [True, False, False], [True, False, False], [True, True, False]]
    assert [part.error.message for part in parts[:2]] == ["until 5", "until 7"]
    await room.leaves(parts[2])


@pytest.mark.parametrize("failure", [CircuitOpen("open", retry_after_s=9), NoUpstream("none")], ids=lambda e: e.code)
async def test_nobody_can_serve(failure: EmbeddingError) -> None:
    """When waiting would not help, all who wait hear so at once, each by an error of its own."""
    room = Room()
    room.leases.say(Wait())
    parts = [room.comes(str(index), priority=priority) for index, priority in enumerate([*Priority] * 3)]
    long = room.comes(*"abc")
    await settle()

    room.leases.say(failure)
    await settle()

    errors = [part.error for part in (*parts, long)]
    assert {type(error) for error in errors} == {type(failure)}
    assert {error.retry_after_s for error in errors} == {failure.retry_after_s}
    assert len({id(error) for error in (*errors, failure)}) == 8
    assert all(error.__cause__ is failure for error in errors)
    assert room.number("lanes", "interactive", "inputs") == 0


async def test_request_that_comes_while_nobody_can_serve() -> None:
    """While the breaker is open, who comes is told so within a turn of the loop."""
    room = Room()
    room.leases.word = CircuitOpen("open")
    part = room.comes("a")
    await settle(2)

    assert isinstance(part.error, CircuitOpen)


async def test_batch_in_flight_when_nobody_can_serve_any_more() -> None:
    """What has left already is not told: its answer is still to come."""
    room = Room()
    flying = room.comes("a")
    [call] = await room.calls(("a",))
    waiting = room.comes("b")
    room.leases.say(CircuitOpen("open"))
    await settle()

    answer(call)
    await settle()

    assert isinstance(waiting.error, CircuitOpen)
    assert gets_its_rows(flying)


# --- probes and limits per minute ---


async def test_probe() -> None:
    """The call that finds out if an upstream has recovered risks one input, whatever waits."""
    room = Room()
    room.leases.is_probing = True
    part = room.comes("a", "b", "c")
    [call] = await room.calls(("a",))
    room.leases.is_probing = False
    answer(call)

    answer(*await room.calls(("b", "c")))
    await settle()
    assert gets_its_rows(part)


async def test_probe_that_meets_a_sealed_piece() -> None:
    """A probe risks one input of a piece of a batch that failed, too; the rest goes on looking for the culprit."""
    room = Room()
    parts = [room.comes(text) for text in "abcd"]
    [call] = await room.calls(tuple("abcd"))
    room.leases.is_probing = True
    call.fail(UpstreamFailed("broken", may_be_poison=True))
    [probe] = await room.calls(("a",))
    room.leases.is_probing = False
    answer(probe)
    answer(*await room.calls(("b",)))
    await finish(room)

    assert all(gets_its_rows(part) for part in parts)


async def test_calls_per_minute_as_the_bottleneck() -> None:
    """When so few calls may go, each is filled up: with more than a slot's share, and across the classes."""
    room = Room(slots=8, limits=Limits(6, 1000), view=PACED)
    room.leases.say(Wait())
    queries = [room.comes(f"query {index}") for index in range(4)]
    room.comes("odd", priority=BULK, spec=Spec("m", 4))
    bulk = room.comes(*[f"bulk {index}" for index in range(5)], priority=BULK)
    await settle()
    room.leases.slots = 1
    room.leases.say(None)
    [call] = await room.calls(("query 0", "query 1", "query 2", "query 3", "bulk 0", "bulk 1"))
    in_flight = room.number("inputs_in_flight", "interactive")
    answer(call, tokens=12)
    await settle()

    assert in_flight == 6
    assert all(gets_its_rows(part) and part.result().tokens == 2 for part in queries)
    assert bulk.missing == 3
    await finish(room)
    assert gets_its_rows(bulk)


async def test_turn_of_bulk_at_few_calls_per_minute() -> None:
    """A bulk batch that has room takes queries along."""
    room = Room(limits=Limits(6, 1000), view=PACED)
    room.leases.say(Wait())
    room.comes("bulk", priority=BULK)
    await settle()
    for index in range(8):
        room.comes(f"query {index}")
    room.leases.say(None)
    await settle()

    answer(*await room.calls(tuple(f"query {index}" for index in range(6))))
    answer(*await room.calls(("query 6", "query 7", "bulk")))


async def test_batch_across_the_classes_that_fails() -> None:
    """A batch of both classes goes back to both lanes when it fails, and each input counts in its own."""
    room = Room(limits=Limits(4, 1000), view=PACED)
    queries = [room.comes(text) for text in "ab"]
    bulk = room.comes("c", "d", priority=BULK)
    [call] = await room.calls(tuple("abcd"))
    room.leases.word = Wait()
    call.fail(UpstreamRefused("bad text", status=400))
    await settle()
    waiting = [room.number("lanes", name, "inputs") for name in ("interactive", "bulk")]
    await room.leaves(bulk)
    left = [room.number("lanes", name, "inputs") for name in ("interactive", "bulk")]
    room.leases.say(None)
    await finish(room)

    assert waiting == [2, 2]
    assert left == [2, 0]
    assert all(gets_its_rows(part) for part in queries)


# --- large requests ---


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)], ids=str)
async def test_request_of_several_batches(order: tuple[int, ...]) -> None:
    """A long request goes out in several calls at once and is put together by position, whoever answers first."""
    room = Room(slots=4, limits=Limits(3, 1000), patience_s=0.0)
    part = room.comes(*"abcdefghij")
    calls = await room.calls(tuple("abc"), tuple("def"), tuple("ghi"), tuple("j"))
    for index in order:
        answer(calls[index], tokens=10 + index, upstream=f"u{index}", upstream_s=float(index), attempts=2)
        await settle()

    assert part.result() == Response(
        rows_of("abcdefghij"), tokens=46, upstream=f"u{order[0]}", upstream_s=3.0, attempts=8
    )


async def test_request_that_fails_in_one_of_its_batches() -> None:
    """A request has all its rows or none: when one batch fails, what else it has under way or waiting is dropped."""
    room = Room(slots=2, limits=Limits(2, 1000))
    part, mate = room.comes(*"abcdef"), room.comes("mate", caller="mate")
    first, second = await room.calls(("a", "b"), ("mate", "c"))
    failure = UpstreamTimeout("slow")

    first.fail(failure)
    await settle()
    room.sender.forget(part)
    await settle()

    assert part.error.message == "slow"
    assert not second.was_cancelled
    answer(second)
    await room.calls()
    assert gets_its_rows(mate)


async def test_usage_of_a_batch_of_several() -> None:
    """What the upstream bills is shared out by what each has sent, and the shares add up exactly."""
    room = Room()
    room.comes("busy")
    [busy] = await room.calls(("busy",))
    parts = [room.comes("x" * length) for length in (10, 100, 1000)]
    answer(busy, tokens=0)
    await settle()
    [call] = await room.calls(tuple("x" * length for length in (10, 100, 1000)))

    answer(call, tokens=367)
    await settle()

    tokens = [part.result().tokens for part in parts]
    assert sum(tokens) == 367
    assert tokens == pytest.approx([4.2, 33.6, 329], abs=1)


async def test_estimate_that_learns() -> None:
    """The usage of texts teaches how many tokens a byte has; token ids teach nothing."""
    room = Room()
    room.comes(tuple(range(1000)), spec=Spec("m", is_tokens=True))
    [call] = await room.calls((tuple(range(1000)),))
    charged = room.leases.given[0].charges
    answer(call, tokens=10)
    await settle()
    unchanged = room.number("tokens_per_byte")
    room.comes("x" * 100_000)
    await settle()
    answer(room.inner.calls[1], tokens=60_000)
    await settle()

    assert charged == [1000.0]
    assert unchanged == 0.33
    assert room.number("tokens_per_byte") == pytest.approx(0.6, abs=0.01)
    assert room.sender.costs((1000,), is_tokens=False) == [pytest.approx(601, abs=10)]


# --- looking for the culprit ---


def refused(batch: Batch) -> EmbeddingError:
    return UpstreamRefused("bad text", status=400)


def refused_by_index(batch: Batch) -> EmbeddingError:
    index = next(index for index, text in enumerate(batch.inputs) if str(text).startswith("poison"))
    return UpstreamRefused("bad text", status=422, index=index)


def bad_row(batch: Batch) -> EmbeddingError:
    index = next(index for index, text in enumerate(batch.inputs) if str(text).startswith("poison"))
    return BadVectors("not a number", index=index)


def broken(batch: Batch) -> EmbeddingError:
    return UpstreamFailed("HTTP 500", may_be_poison=True)


WAYS = [refused, refused_by_index, bad_row, broken]


def poisoned(way: Callable[[Batch], EmbeddingError]) -> Callable[[Batch], EmbeddingError | None]:
    """Fail in this way whatever holds a poison."""
    return lambda batch: way(batch) if any(str(text).startswith("poison") for text in batch.inputs) else None


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("requests", [1, 3, 16], ids=lambda count: f"{count} requests")
@pytest.mark.parametrize(
    "places", [*[(place,) for place in range(16)], (0, 1), (0, 15), (3, 4, 9), (1, 5, 9, 13)], ids=str
)
async def test_poison_among_others(
    way: Callable[[Batch], EmbeddingError], requests: int, places: tuple[int, ...]
) -> None:
    """Exactly the requests with a poison fail, with its key; all others are answered, after few calls."""
    room = Room()
    texts = [f"poison {index}" if index in places else f"text {index}" for index in range(16)]
    cut = [16] if requests == 1 else [5, 10, 16] if requests == 3 else list(range(1, 17))
    parts = [room.comes(*texts[first:last]) for first, last in zip([0, *cut], cut, strict=False)]

    calls = await finish_and_forget(room, parts, poisoned(way))

    k = len(places)
    assert calls <= 2 * k * (math.log2(16) + 1) + k
    for part in parts:
        guilty = [text for text in part.request.inputs if str(text).startswith("poison")]
        error = part.error
        assert (error is not None) == bool(guilty)
        if error is None:
            assert gets_its_rows(part)
        else:
            assert isinstance(error, type(way(Batch(Spec("m"), tuple(guilty), 0, 0))))
            assert error.key in make_request(guilty).keys or (way is broken and error.key is None)
    if requests == 16:
        assert room.number("quarantined_inputs") == k


async def finish_and_forget(room: Room, parts: list[Part], poison: Callable[[Batch], EmbeddingError | None]) -> int:
    """Like `finish`, while the stage lets go of requests that have failed."""
    for part in parts:
        waiter = part.join()
        waiter.add_done_callback(part.leave)
    return await finish(room, poison)


async def test_culprit_that_the_upstream_names() -> None:
    """Where the upstream says which, one call finds it, and one serves all others."""
    room = Room()
    parts = [room.comes(text) for text in ("a", "b", "poison", "c")]

    calls = await finish(room, poisoned(refused_by_index))

    assert calls == 3
    assert [call.message.inputs for call in room.inner.calls[1:]] == [("poison",), ("a", "b", "c")]
    assert parts[2].error.key == parts[2].request.keys[0]
    assert all(gets_its_rows(part) for index, part in enumerate(parts) if index != 2)
    assert room.splits == [4]
    assert room.number("splits") == 1


@pytest.mark.parametrize("index", [-1, 4])
async def test_culprit_that_is_not_in_the_batch(index: int) -> None:
    """A position that the batch does not have says nothing: the batch is cut in two."""
    room = Room()
    for text in "abcd":
        room.comes(text)
    [call] = await room.calls(tuple("abcd"))
    call.fail(UpstreamRefused("bad text", status=400, index=index))

    answer(*await room.calls(("a", "b")))
    answer(*await room.calls(("c", "d")))


async def test_halves_leave_before_others() -> None:
    """What has waited before goes first, each half alone; whoever came meanwhile is next."""
    room = Room()
    for text in "abcd":
        room.comes(text)
    [call] = await room.calls(tuple("abcd"))
    room.comes("late")
    call.fail(UpstreamRefused("bad text", status=400))

    answer(*await room.calls(("a", "b")))
    answer(*await room.calls(("c", "d")))
    answer(*await room.calls(("late",)))


@pytest.mark.parametrize(("retries", "calls"), [(0, 1), (1, 3), (2, 5), (3, 7)])
async def test_broken_upstream_and_the_budget(retries: int, calls: int) -> None:
    """Looking for a culprit after a failure takes from the budget of retries; without any left, all hear of it."""
    room = Room(retries=retries)
    parts = [room.comes(str(index)) for index in range(4)]

    assert await finish(room, broken) == calls
    errors = [part.error for part in parts]
    assert all(isinstance(error, UpstreamFailed) for error in errors)
    assert len({id(error) for error in errors}) == 4
    assert [error.key for error in errors] == [None] * 4


async def test_refusal_needs_no_budget() -> None:
    """Who refuses has answered well enough: looking for the culprit is no retry."""
    room = Room(retries=0)
    parts = [room.comes(text) for text in ("a", "poison", "b")]
    await finish(room, poisoned(refused))

    assert [gets_its_rows(part) for part in (parts[0], parts[2])] == [True, True]
    assert room.retries == 0


@pytest.mark.parametrize(
    "failure",
    [
        UpstreamFailed("connection reset"),
        UpstreamTimeout("slow"),
        RateLimited("later"),
        CircuitOpen("open"),
        UpstreamRefused("no model", status=404),
        BadVectors("wrong width"),
    ],
    ids=lambda error: error.code,
)
async def test_failure_of_the_whole_batch(failure: EmbeddingError) -> None:
    """What is no input's doing befalls all at once, each by an error of its own, and nobody is looked for."""
    room = Room()
    parts = [room.comes(*"ab"), room.comes("c")]
    [call] = await room.calls(tuple("abc"))
    call.fail(failure)
    await settle()

    errors = [part.error for part in parts]
    assert [type(error) for error in errors] == [type(failure)] * 2
    assert len({id(error) for error in (*errors, failure)}) == 3
    assert [error.key for error in errors] == [None, None]
    assert room.splits == []


@pytest.mark.parametrize("way", [refused, broken, bad_row], ids=lambda way: way.__name__)
async def test_server_that_fails_on_everything(way: Callable[[Batch], EmbeddingError]) -> None:
    """A server that takes nothing has convicted nobody: when it has recovered, all travel together again."""
    room = Room()
    texts = [f"poison {index}" for index in range(8)]
    for text in texts:
        room.comes(text)
    await finish(room, way)
    quarantined = room.number("quarantined_inputs")
    for text in texts:
        room.comes(text)

    assert quarantined == 0
    answer(*await room.calls(tuple(texts)))
    await settle()


async def test_single_input_that_is_refused() -> None:
    """A refusal of a single input names it: there is nobody else to blame."""
    room = Room()
    part = room.comes("poison")
    await finish(room, poisoned(refused))

    assert part.error.key == part.request.keys[0]
    assert room.number("quarantined_inputs") == 0


@pytest.mark.parametrize(
    "failure", [UpstreamFailed("HTTP 500", may_be_poison=True), UpstreamTimeout("slow")], ids=lambda error: error.code
)
async def test_single_input_that_fails(failure: EmbeddingError) -> None:
    """A failure on a single input may be the upstream's: nobody is named."""
    room = Room()
    part = room.comes("a")
    [call] = await room.calls(("a",))
    call.fail(failure)
    await settle()

    assert part.error is failure
    assert failure.key is None


@pytest.mark.parametrize("is_poison_first", [True, False])
async def test_culprit_and_mate_in_either_order(is_poison_first: bool) -> None:
    """Whether the culprit fails before or after its mate has gone well, it is kept apart from then on."""
    room = Room(slots=2)
    room.comes("poison")
    mate = room.comes("a")
    [call] = await room.calls(("poison", "a"))
    call.fail(broken(call.message))
    poison, good = await room.calls(("poison",), ("a",))
    for each in (poison, good) if is_poison_first else (good, poison):
        if each is poison:
            each.fail(broken(each.message))
        else:
            answer(each)
        await settle()

    assert gets_its_rows(mate)
    assert room.number("quarantined_inputs") == 1


async def test_text_that_was_found_guilty() -> None:
    """The same text, from whomever, travels alone for a while, the rest of its request together; and then no more."""
    room = Room()
    room.comes("a")
    room.comes("poison")
    await finish(room, poisoned(refused))
    again = room.comes("b", "c", "poison", "d", caller="other")
    seen = len(room.inner.calls)
    await finish(room)
    batches = [call.message.inputs for call in room.inner.calls[seen:]]
    await room.clock.advance(600)
    room.comes("e", "poison")

    assert batches == [("b", "c"), ("poison",), ("d",)]
    assert gets_its_rows(again)
    answer(*await room.calls(("e", "poison")))


async def test_request_of_guilty_texts() -> None:
    """Each guilty text travels alone, wherever it stands in its request."""
    room = Room()
    room.comes("a")
    room.comes("poison 1", "poison 2")
    await finish_and_forget(room, room.parts, poisoned(refused))
    seen = len(room.inner.calls)
    room.comes("poison 2", "b", "poison 1")
    await finish(room)

    assert room.number("quarantined_inputs") == 1
    assert [call.message.inputs for call in room.inner.calls[seen:]] == [("poison 2", "b"), ("poison 1",)]
    room.comes("poison 1", "c")
    await finish(room)
    assert [call.message.inputs for call in room.inner.calls[seen + 2 :]] == [("poison 1",), ("c",)]


async def test_text_that_is_found_guilty_again() -> None:
    """A known culprit that fails again is to blame, not the upstream: it is named, and its time begins anew."""
    room = Room()
    room.comes("a")
    room.comes("poison")
    await finish(room, poisoned(broken))
    await room.clock.advance(599)
    again = room.comes("poison")
    await finish(room, poisoned(broken))
    await room.clock.advance(599)
    room.comes("poison", "b")
    await finish(room)

    assert again.error.key == again.request.keys[0]
    assert [call.message.inputs for call in room.inner.calls[-2:]] == [("poison",), ("b",)]


async def test_batches_that_are_expected_to_fail() -> None:
    """What looks for a culprit, or is a known one, says so: its failure is not held against the upstream."""
    room = Room()
    room.comes("a")
    room.comes("poison", "b")
    await finish_and_forget(room, room.parts, poisoned(broken))
    room.comes("poison", "c")
    await finish(room)

    assert [(call.message.inputs, call.message.is_suspect) for call in room.inner.calls] == [
        (("a", "poison", "b"), False),
        (("a",), True),
        (("poison", "b"), True),
        (("poison",), True),
        (("poison",), True),
        (("c",), False),
    ]


async def test_no_quarantine() -> None:
    """With a quarantine of zero nobody is kept apart."""
    room = Room(quarantine_s=0.0)
    room.comes("a")
    room.comes("poison")
    await finish(room, poisoned(refused))
    room.comes("b", "poison")

    answer(*await room.calls(("b", "poison")))


async def test_suspects_wait_for_nobody() -> None:
    """A piece that travels alone need not wait for others to come."""
    room = Room(slots=2, view=MEASURED)
    for index in range(8):
        room.comes(f"first {index}")
    one, other = await room.calls(
        tuple(f"first {index}" for index in range(4)), *[tuple(f"first {index}" for index in range(4, 8))]
    )
    one.fail(UpstreamRefused("bad text", status=400))
    await settle()
    assert len([call for call in room.inner.calls if not call.future.done()]) == 2

    answer(other)
    await finish(room)


# --- leaving ---


async def test_caller_that_leaves_before_its_turn() -> None:
    """Who leaves while it waits is not sent, and those behind it are."""
    room = Room()
    room.comes("busy")
    [busy] = await room.calls(("busy",))
    gone, stays = room.comes("gone"), room.comes("stays")
    await room.leaves(gone)

    answer(busy)

    answer(*await room.calls(("stays",)))
    await settle()
    assert gets_its_rows(stays)


async def test_caller_that_leaves_at_the_moment_of_the_lease() -> None:
    """When the only one who waited leaves in the very turn in which a slot becomes free, no lease is taken."""
    room = Room()
    room.comes("busy")
    [busy] = await room.calls(("busy",))
    gone = room.comes("gone")
    await settle()
    leases = len(room.leases.given)

    room.sender.wake()
    gone.failed(asyncio.CancelledError())  # the stage has not heard of it yet
    await settle()
    answer(busy)
    await settle()
    room.sender.forget(gone)

    assert len(room.leases.given) == leases
    await room.calls()


async def test_caller_that_leaves_in_flight() -> None:
    """A batch that nobody waits for any more is cancelled, and its slot is free."""
    room = Room()
    part = room.comes("a")
    [call] = await room.calls(("a",))

    await room.leaves(part)

    assert call.was_cancelled
    assert room.leases.busy == 0


async def test_caller_that_leaves_before_its_call_has_begun() -> None:
    """A call that is cancelled before its first step gives its lease back."""
    room = Room()
    part = room.comes("a")
    await asyncio.sleep(0)  # the batch is composed, its task has not run
    given = len(room.leases.given)

    await room.leaves(part)

    assert given == 1
    assert room.inner.calls == []


async def test_mates_of_a_caller_that_leaves() -> None:
    """A batch flies on for those who stay; when the last one leaves it is cancelled."""
    room = Room()
    one, other = room.comes("a"), room.comes("b")
    [call] = await room.calls(("a", "b"))
    await room.leaves(one)
    was_cancelled = call.was_cancelled
    await room.leaves(other)

    assert not was_cancelled
    assert call.was_cancelled


async def test_caller_that_leaves_with_a_request_of_several_batches() -> None:
    """What of a long request is under way is cancelled, and what waits is not sent."""
    room = Room(limits=Limits(2, 1000))
    part = room.comes(*"abcdef")
    [call] = await room.calls(("a", "b"))

    await room.leaves(part)

    assert call.was_cancelled
    await room.calls()


async def test_caller_that_leaves_while_a_culprit_is_looked_for() -> None:
    """Of a batch that failed only what somebody waits for is sent again."""
    room = Room()
    parts = [room.comes(text) for text in "abcd"]
    [call] = await room.calls(tuple("abcd"))
    parts[0].failed(asyncio.CancelledError())
    parts[1].failed(asyncio.CancelledError())
    call.fail(UpstreamRefused("bad text", status=400))
    for part in parts[:2]:
        room.sender.forget(part)

    answer(*await room.calls(("c", "d")))


async def test_all_callers_leave_as_their_batch_fails() -> None:
    """When nobody is left, nobody is looked for."""
    room = Room()
    parts = [room.comes(text) for text in "ab"]
    [call] = await room.calls(tuple("ab"))
    call.fail(UpstreamRefused("bad text", status=400))
    for part in parts:
        part.failed(asyncio.CancelledError())
    await settle()

    await room.calls()
    assert room.splits == []


async def test_alarm_of_callers_that_have_left() -> None:
    """When all who waited for an instant have left, nothing waits for it any more."""
    room = Room()
    room.leases.say(Wait(NOW + 60))
    part = room.comes("a")
    await settle()
    tasks = len(asyncio.all_tasks())
    await room.leaves(part)

    assert len(asyncio.all_tasks()) == tasks - 1
    part = room.comes("b")
    await settle()
    room.leases.word = None
    await room.clock.advance(60)
    answer(*await room.calls(("b",)))


# --- how long it takes ---


async def test_work_ahead() -> None:
    """What is under way and waits ahead of a caller, at the rate at which it leaves, is how long it takes."""
    room = Room(limits=Limits(1, 1000))
    fresh = room.sender.expected_s("x", INTERACTIVE, 34.0)
    for _ in range(10):
        room.comes("x" * 100, caller="flood", deadline=NOW + 99)
    [call] = await room.calls(("x" * 100,))
    unknown = room.sender.expected_s("x", INTERACTIVE, 34.0)
    await room.clock.advance(1)
    answer(call, tokens=0)
    [call] = await room.calls(("x" * 100,))

    assert (fresh, unknown) == (0, 0)
    assert room.sender.backlog_s() == pytest.approx(8)
    assert room.sender.expected_s("flood", INTERACTIVE, 34.0) == pytest.approx(1 + 9)
    assert room.sender.expected_s("x", INTERACTIVE, 34.0) == pytest.approx(1 + 2)
    assert room.sender.expected_s("x", BULK, 34.0) == 0
    await finish(room)
    assert room.sender.backlog_s() == 0
    assert room.sender.expected_s("x", INTERACTIVE, 34.0) == 0


async def test_work_ahead_of_several_slots() -> None:
    """Before each slot has brought one call back nobody knows, and nobody is refused."""
    room = Room(slots=4, limits=Limits(1, 1000))
    for _ in range(16):
        room.comes("x" * 100, deadline=NOW + 99)
    await settle()
    await room.clock.advance(5)
    expected = []
    for call in list(room.inner.calls):
        answer(call, tokens=0)
        await settle()
        expected.append(room.sender.expected_s("test", INTERACTIVE, 34.0))

    assert expected == [0, 0, 0, pytest.approx(5 * (4 + 9) / 4)]
    await finish(room)


async def test_call_that_took_all_that_waited() -> None:
    """A slow first call that left with the only text shows nothing of how fast many leave: nobody is refused for it."""
    room = Room(limits=Limits(10, 1000))
    room.comes("x" * 100)
    await room.calls(("x" * 100,))
    for _ in range(50):
        room.comes("x" * 10, deadline=NOW + 99)
    await room.clock.advance(20)
    before = room.sender.expected_s("test", INTERACTIVE, 4.0)
    [call] = [call for call in room.inner.calls if not call.future.done()]
    answer(call, tokens=0)
    await settle()
    after_the_first = room.sender.expected_s("test", INTERACTIVE, 4.0)
    await room.clock.advance(1)
    answer(next(call for call in room.inner.calls if not call.future.done()), tokens=0)
    await settle()

    assert (before, after_the_first) == (0, 0)
    assert room.sender.expected_s("test", INTERACTIVE, 4.0) == pytest.approx(4.1, abs=0.3)
    await finish(room)


async def test_work_of_the_other_class() -> None:
    """Each class leaves at a rate of its own: a query is not measured by bulk, nor a flood of bulk by queries."""
    room = Room(limits=Limits(1, 100_000), bulk_share=0.5)
    for _ in range(6):
        room.comes("x" * 100, deadline=NOW + 99)
        room.comes("y" * 10_000, priority=BULK, deadline=NOW + 99)
    await settle()
    for _ in range(4):
        await room.clock.advance(1)
        answer(next(call for call in room.inner.calls if not call.future.done()), tokens=0)
        await settle()

    assert room.sender.expected_s("test", INTERACTIVE, 34.0) == pytest.approx(2 * (1 + 4), rel=0.4)
    assert room.sender.expected_s("test", BULK, 3301.0) == pytest.approx(2 * 5, rel=0.4)
    await finish(room)


async def test_work_after_an_outage() -> None:
    """The time of an outage, in which nothing waited, is not held against the upstream."""
    room = Room(limits=Limits(1, 1000))
    for _ in range(3):
        room.comes("x" * 100, deadline=NOW + 999)
    [call] = await room.calls(("x" * 100,))
    await room.clock.advance(1)
    answer(call, tokens=0)
    await settle()
    room.leases.say(CircuitOpen("open"))
    room.inner.calls[-1].fail(UpstreamTimeout("slow"))
    await room.clock.advance(500)
    room.leases.say(None)
    for _ in range(4):
        room.comes("x" * 100, deadline=NOW + 999)
    [call] = await room.calls(("x" * 100,))
    await room.clock.advance(1)
    answer(call, tokens=0)
    await settle()

    assert room.sender.backlog_s() == pytest.approx(2)
    await finish(room)


# --- defects and the end ---


async def test_defect_behind() -> None:
    """A defect of ours reaches all who are in the batch, whatever else they have under way."""
    room = Room(slots=2, limits=Limits(2, 1000))
    parts = [room.comes(*"abc"), room.comes("d")]
    failing, other = await room.calls(("a", "b"), ("c", "d"))
    failure = ValueError("bug")
    failing.fail(failure)
    await settle()

    assert parts[0].error is failure
    assert not parts[1].is_over
    room.sender.forget(parts[0])
    answer(other)
    await settle()
    assert gets_its_rows(parts[1])


async def test_defect_at_the_landing() -> None:
    """A defect of our own is no silence: whoever waits hears of it."""
    room = Room()
    parts = [room.comes("a"), room.comes("b")]
    [call] = await room.calls(("a", "b"))
    call.answer(None)
    await settle()

    assert all(isinstance(part.error, AttributeError) for part in parts)


async def test_call_that_was_cancelled_from_behind() -> None:
    """Whoever cancels a call behind us cancels its requests: nobody waits for what will not come."""
    room = Room()
    part = room.comes("a")
    [call] = await room.calls(("a",))
    call.future.cancel()
    await settle()

    assert isinstance(part.error, asyncio.CancelledError)


async def test_sender_that_is_closed() -> None:
    """Closing ends what is under way and what waits, and nothing is sent any more."""
    room = Room(slots=1)
    room.leases.limits = Limits(1, 1000)
    parts = [room.comes("a"), room.comes("b", "c"), room.comes("d", priority=BULK)]
    [call] = await room.calls(("a",))

    await room.sender.aclose()
    await settle()

    assert call.was_cancelled
    assert all(isinstance(part.error, asyncio.CancelledError) for part in parts)
    assert len(room.inner.calls) == 1


async def test_sender_that_is_closed_while_it_waits_for_an_instant() -> None:
    """Closing ends the waiting too."""
    room = Room()
    room.leases.say(Wait(NOW + 60))
    part = room.comes("a")
    await settle()
    tasks = len(asyncio.all_tasks())

    await room.sender.aclose()

    assert len(asyncio.all_tasks()) == tasks - 1
    assert isinstance(part.error, asyncio.CancelledError)
