"""A request waits at its model's sender until its rows are there, is refused at once when late, and may leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from proxy.base.errors import (
    BadVectors,
    CircuitOpen,
    EmbeddingError,
    UpstreamFailed,
    UpstreamRefused,
    WouldBeLate,
)
from proxy.base.events import BatchFinished, Event
from proxy.base.lease import Outlook, Wait
from proxy.base.messages import Answer, Batch, Limits, Priority, Response
from proxy.base.settings import MicroBatchSettings
from proxy.funnel.microbatch import SURE, MicroBatch, lateness
from tests.fakes.clock import HandClock, settle
from tests.fakes.leases import ROOMY, UNMEASURED, ScriptedLeases
from tests.fakes.stage import Call, ScriptedStage, asked, make_request, rows_of

NOW = 1000.0
MEASURED = Outlook(0, 0, fixed_s=0.030, per_input_s=0.001)
PACED = Outlook(0, 0, is_paced=True)
EMPTY = {"inputs": 0, "tokens": 0, "callers": 0}


class Room:
    """The stage, leases and an upstream that the test plays, a clock moved by hand, and what is told."""

    def __init__(
        self,
        inner: Any = None,
        *,
        slots: int = 1,
        limits: Limits = ROOMY,
        view: Outlook = UNMEASURED,
        **settings: float,
    ) -> None:
        self.told: list[Event] = []
        self.clock = HandClock()
        self.inner = inner or ScriptedStage()
        self.leases = ScriptedLeases(slots, limits, view)
        self.stage = MicroBatch(
            MicroBatchSettings(**settings),
            self.inner,
            leases=self.leases,
            may_retry=lambda: True,
            clock=self.clock,
            observe=self.told.append,
        )

    def asks(self, *inputs: Any, **changes: Any) -> asyncio.Task[Response]:
        """Send a request."""
        return asyncio.create_task(asked(self.stage, make_request(inputs, **({"now": self.clock.now()} | changes))))

    async def call(self, *inputs: str) -> Call:
        """Return the oldest call that nobody has answered yet, which is of these inputs."""
        await settle()
        call = next(call for call in self.inner.calls if not call.future.done())

        assert call.message.inputs == inputs
        return call

    def check(self) -> None:
        """Nothing is left inside, and nobody runs any more."""
        for sender in self.stage.snapshot().values():
            assert sender["lanes"] == {"interactive": EMPTY, "bulk": EMPTY}
            assert sender["inputs_in_flight"] == {"interactive": 0, "bulk": 0}
            assert sender["batches_in_flight"] == 0
        self.leases.check()
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture(autouse=True)
async def _nobody_complains() -> AsyncIterator[None]:
    """Whatever a test does, asyncio has nothing to report: no callback has failed, and no error went unseen."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    yield
    await settle()

    assert complaints == []


def answer(call: Call, **changes: Any) -> None:
    """Answer a call rightly."""
    inputs = call.message.inputs
    call.answer(Answer(rows_of(inputs), **({"tokens": 0, "upstream": "u"} | changes)))


async def all_done(room: Room, *tasks: asyncio.Task[Response]) -> list[Response | BaseException]:
    """Answer rightly whatever still comes until all tasks are done."""
    await settle()
    while not all(task.done() for task in tasks):
        answer(next(call for call in room.inner.calls if not call.future.done()))
        await settle()
    return await asyncio.gather(*tasks, return_exceptions=True)


# --- the rule ---


@pytest.mark.parametrize(
    ("expected_s", "left_s", "retry_after_s"),
    [(3.0, 4.1, None), (3.0, 4.0, None), (3.0, 3.9, 0.075), (3.0, 0.0, 3.0), (3.0, -2.0, 3.0), (0.0, 0.0, None)],
)
def test_request_that_would_be_late(expected_s: float, left_s: float, retry_after_s: float | None) -> None:
    """Who is not sure to make it is told so, and when it would be; who is, is let through."""
    error = lateness(expected_s, left_s)

    assert (error and error.retry_after_s) == (retry_after_s and pytest.approx(retry_after_s))


def test_words_of_a_refusal() -> None:
    """The refusal names the time it takes and the time that is left."""
    error = lateness(12.3456, -1.0)

    assert isinstance(error, WouldBeLate)
    assert error.message == "what waits ahead takes about 12.3 s, and the deadline leaves 0 s"


# --- the stage ---


async def test_request_that_is_answered() -> None:
    """A request gets the rows of its inputs, and what they cost."""
    room = Room()
    task = room.asks("a", "b")
    answer(await room.call("a", "b"), tokens=2, upstream_s=0.5, attempts=3)

    assert await task == Response(rows_of(("a", "b")), tokens=2, upstream="u", upstream_s=0.5, attempts=3)
    assert room.told == [BatchFinished("m", "u", inputs=2, queue_s=0, upstream_s=0.5)]
    assert room.stage.snapshot()["m"]["batches"] == 1
    room.check()


async def test_requests_of_two_models() -> None:
    """Each model has a sender of its own: they share no batch and no queue."""
    room = Room(slots=2)
    one, other = room.asks("a"), room.asks("a", model="other")
    await settle()
    for call in room.inner.calls:
        answer(call)
    await asyncio.gather(one, other)

    assert [call.message.spec.model for call in room.inner.calls] == ["m", "other"]
    assert set(room.stage.snapshot()) == {"m", "other"}
    room.check()


async def test_request_that_fails() -> None:
    """What befell the batch is what the request raises."""
    room = Room()
    task = room.asks("a")
    failure = UpstreamFailed("broken")
    (await room.call("a")).fail(failure)

    with pytest.raises(UpstreamFailed) as caught:
        await task
    assert caught.value is failure
    room.check()


async def test_defect_behind() -> None:
    """A defect of ours reaches every caller of the batch."""
    room = Room()
    tasks = [room.asks("a"), room.asks("b")]
    failure = ValueError("bug")
    (await room.call("a", "b")).fail(failure)

    assert await asyncio.gather(*tasks, return_exceptions=True) == [failure, failure]
    room.check()


async def test_breaker_that_opens() -> None:
    """When nobody can serve, each caller raises an error of its own: it will get its own trace."""
    room = Room()
    room.leases.say(Wait())
    tasks = [room.asks(str(index)) for index in range(3)]
    await settle()
    room.leases.say(CircuitOpen("open", retry_after_s=5))
    errors = await asyncio.gather(*tasks, return_exceptions=True)

    assert [(type(error), error.retry_after_s) for error in errors] == [(CircuitOpen, 5)] * 3
    assert len(set(map(id, errors))) == 3
    room.check()


# --- too late ---


async def flooded() -> tuple[Room, list[asyncio.Task[Response]]]:
    """A second of one call of one input each, with nine of one caller's ten still to come, and eight waiting."""
    room = Room(limits=Limits(1, 1000))
    tasks = [room.asks("x" * 100, caller="flood", deadline=NOW + 99) for _ in range(10)]
    call = await room.call("x" * 100)
    await room.clock.advance(1)
    answer(call)
    await settle()
    return room, tasks


@pytest.mark.parametrize(("patience_s", "is_late"), [(10 / SURE - 0.1, True), (10 / SURE + 0.01, False)])
async def test_request_behind_a_flood_of_its_own(patience_s: float, is_late: bool) -> None:
    """One call under way, eight ahead and its own take ten seconds: who has no more is told when to come back."""
    room, tasks = await flooded()
    late = room.asks("x" * 100, caller="flood", deadline=room.clock.now() + patience_s)
    await settle()

    assert late.done() is is_late
    assert not is_late or late.exception().retry_after_s == pytest.approx(0.1 * SURE)
    assert room.stage.expected_s() == pytest.approx(8 if is_late else 9)
    results = await all_done(room, *tasks, late)
    assert [result for result in results[:10] if isinstance(result, BaseException)] == []
    room.check()


@pytest.mark.parametrize(("patience_s", "is_late"), [(3 / SURE - 0.1, True), (3 / SURE + 0.1, False)])
async def test_request_beside_another_one_s_flood(patience_s: float, is_late: bool) -> None:
    """A flood of one caller makes another one's request no later than taking turns with it does."""
    room, tasks = await flooded()
    late = room.asks("y" * 100, caller="other", deadline=room.clock.now() + patience_s)
    await settle()

    assert late.done() is is_late
    assert not is_late or isinstance(late.exception(), WouldBeLate)
    await all_done(room, *tasks, late)
    order = [call.message.inputs for call in room.inner.calls]
    assert is_late or order.index(("y" * 100,)) <= 3
    room.check()


async def test_bulk_beside_a_flood_of_queries() -> None:
    """How fast bulk leaves nobody knows before it has: it is let in."""
    room, tasks = await flooded()
    bulk = room.asks("z" * 100, priority=Priority.BULK, deadline=room.clock.now() + 0.5)
    await settle()

    assert not bulk.done()
    await all_done(room, *tasks, bulk)
    room.check()


async def test_work_that_waits() -> None:
    """What a caller is told who finds the house full: nothing before it is known, the longest of all models then."""
    idle = Room()
    room, tasks = await flooded()
    other = room.asks("a", model="other")
    await settle()

    assert idle.stage.expected_s() == 0
    assert room.stage.expected_s() == pytest.approx(8)
    await all_done(room, *tasks, other)
    assert room.stage.expected_s() == 0
    room.check()


# --- leaving, at any moment ---


class Busy:
    """An upstream that takes some turns of the loop for each call, and fails on a poison."""

    def __init__(self, way: Callable[[Batch, int], EmbeddingError]) -> None:
        self.inside = 0
        self._way = way

    async def __call__(self, batch: Batch) -> Answer:
        self.inside += 1
        try:
            for _ in range(3):
                await asyncio.sleep(0)
        finally:
            self.inside -= 1
        for index, text in enumerate(batch.inputs):
            if text == "poison":
                raise self._way(batch, index)
        return Answer(rows_of(batch.inputs), len(batch.inputs), "u")

    def snapshot(self) -> dict[str, Any]:
        return {}

    async def aclose(self) -> None:
        pass


def refused(batch: Batch, index: int) -> EmbeddingError:
    return UpstreamRefused("bad text", status=400)


def bad_row(batch: Batch, index: int) -> EmbeddingError:
    return BadVectors("not a number", index=index)


def broken(batch: Batch, index: int) -> EmbeddingError:
    return UpstreamFailed("HTTP 500", may_be_poison=True)


@dataclass(frozen=True)
class Scene:
    """Who asks, the leaving one first, and how the house is furnished."""

    requests: tuple[tuple[str, ...], ...]
    options: dict[str, Any]
    way: Callable[[Batch, int], EmbeddingError] = refused
    word: Wait | None = None
    """What the leases say at first; they give some when the leaving one has left."""
    is_bulk_second: bool = False


TWO = Limits(2, 1000)
SCENES = {
    "alone": Scene((("a",),), {}),
    "with a mate": Scene((("a",), ("b",)), {}),
    "behind and before others": Scene((("a",), ("b",), ("c",)), {"limits": Limits(1, 1000)}),
    "in several batches": Scene((tuple("abcdefg"), ("h",)), {"limits": TWO, "slots": 2}),
    "beside one in several batches": Scene((("a",), tuple("bcdefgh")), {"limits": TWO, "slots": 3}),
    "guilty": Scene((("a", "poison"), ("b",), ("c",)), {}),
    "guilty, several slots": Scene((("a", "poison"), ("b",), ("c",)), {"slots": 3, "patience_s": 0.0}),
    "innocent": Scene((("a",), ("poison",), ("c",), ("d",)), {}),
    "innocent beside a bad row": Scene((("a",), ("poison",), ("c",), ("d",)), {"slots": 2}, bad_row),
    "innocent beside a break": Scene((("a", "b"), ("c",), ("poison",), ("d",)), {}, broken),
    "at few calls per minute": Scene((("a",), ("b",), ("poison",)), {"view": PACED}, is_bulk_second=True),
    "held for a share": Scene((("a",), *[(str(n),) for n in range(8)]), {"slots": 2, "view": MEASURED}),
    "without a slot": Scene((("a",), ("b",)), {}, word=Wait()),
    "until an instant": Scene((("a",), ("b",)), {}, word=Wait(NOW + 0.5)),
    "until an instant, alone": Scene((("a",),), {}, word=Wait(NOW + 0.5)),
}


@pytest.mark.parametrize("turns", range(14))
@pytest.mark.parametrize("scene", SCENES.values(), ids=list(SCENES))
async def test_caller_that_leaves_after_any_number_of_turns(scene: Scene, turns: int) -> None:
    """Whenever a caller leaves, the others get what is theirs, and no lease, batch, entry or task is left."""
    inner = Busy(scene.way)
    room = Room(inner, **scene.options)
    room.leases.word = scene.word
    tasks = [
        room.asks(*inputs, priority=Priority.BULK if scene.is_bulk_second and index == 1 else Priority.INTERACTIVE)
        for index, inputs in enumerate(scene.requests)
    ]
    await settle(turns)

    tasks[0].cancel()
    await settle()
    if scene.word is not None:
        room.leases.say(None)
    for _ in range(5):
        await room.clock.advance(0.2)
    leaving, *others = await asyncio.gather(*tasks, return_exceptions=True)

    assert isinstance(leaving, asyncio.CancelledError | EmbeddingError | Response)
    for inputs, result in zip(scene.requests[1:], others, strict=True):
        if "poison" in inputs:
            assert isinstance(result, EmbeddingError)
        else:
            assert isinstance(result, Response)
            assert result.rows == rows_of(inputs)
    assert inner.inside == 0
    room.check()


@pytest.mark.parametrize("turns", range(14))
@pytest.mark.parametrize("scene", SCENES.values(), ids=list(SCENES))
async def test_all_callers_leave_after_any_number_of_turns(scene: Scene, turns: int) -> None:
    """Whenever all leave at once, nothing goes on, and nothing is left."""
    inner = Busy(scene.way)
    room = Room(inner, **scene.options)
    room.leases.word = scene.word
    tasks = [room.asks(*inputs) for inputs in scene.requests]
    await settle(turns)

    for task in tasks:
        task.cancel()
    await settle(3)
    inside = inner.inside
    await room.clock.advance(1)
    await asyncio.gather(*tasks, return_exceptions=True)

    assert inside == 0
    room.check()


async def test_caller_that_leaves_when_its_answer_is_there() -> None:
    """Who leaves in the turn in which its rows come loses them, and nobody else does."""
    room = Room()
    one, other = room.asks("a"), room.asks("b")
    call = await room.call("a", "b")
    answer(call)
    await asyncio.sleep(0)
    one.cancel()
    await settle()

    assert one.cancelled()
    assert other.result().rows == rows_of(("b",))
    room.check()


# --- the end ---


async def test_stage_that_is_closed() -> None:
    """Closing ends what waits and what is under way, for its callers too, and closes what is behind."""
    room = Room(limits=Limits(1, 1000))
    tasks = [room.asks("a"), room.asks("b"), room.asks("c", model="other")]
    call = await room.call("a")

    await room.stage.aclose()
    await asyncio.wait(tasks)

    assert call.was_cancelled
    assert all(task.cancelled() for task in tasks)
    assert room.inner.is_closed
    room.check()


async def test_stage_that_is_closed_idle() -> None:
    """Closing an idle stage closes what is behind."""
    room = Room()

    await room.stage.aclose()

    assert room.inner.is_closed
    assert room.stage.snapshot() == {}
