"""Requests become batches within the upstream's limits, and batches an answer by position."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base.errors import EmbeddingError, RateLimited, UpstreamFailed, UpstreamRefused
from proxy.base.events import BatchFinished, Event
from proxy.base.messages import Answer, Batch, Input, Response, Spec
from proxy.funnel.microbatch import Limits, MicroBatch, spans
from tests.fakes.clock import settle
from tests.fakes.stage import AnsweringStage, Call, ScriptedStage, make_request, rows_of

SAME_EACH_TIME = settings(deadline=None, derandomize=True, max_examples=200)
TWO_INPUTS = Limits(max_inputs=2, max_bytes=1000)


class Room:
    """A micro-batcher of at most two inputs a call, a scripted upstream, and what is told."""

    def __init__(self, limits: Limits = TWO_INPUTS) -> None:
        self.told: list[Event] = []
        self.specs: list[Spec] = []
        self.inner = ScriptedStage()
        self.stage = MicroBatch(self.inner, limits=self._limits, observe=self.told.append)
        self._given = limits

    def _limits(self, spec: Spec) -> Limits:
        self.specs.append(spec)
        return self._given

    async def sent(self, *inputs: Input, count: int) -> tuple[asyncio.Task[Response], list[Call]]:
        """Send a request; return it and its calls."""
        task = asyncio.create_task(self.stage(make_request(inputs)))
        calls = [await self.inner.next() for _ in range(count)]
        await settle()

        assert len(self.inner.calls) == count
        return task, calls


def answer(batch: Batch, *, upstream: str = "u", queue_s: float = 0.0, upstream_s: float = 0.0) -> Answer:
    """Answer a batch rightly."""
    return Answer(rows_of(batch.inputs), len(batch.inputs), upstream, queue_s, upstream_s, attempts=2)


# --- the cut ---


@pytest.mark.parametrize(
    ("sizes", "limits", "expected"),
    [
        ([1], Limits(3, 10), [(0, 1)]),
        ([1, 1], Limits(3, 10), [(0, 2)]),
        ([1, 1, 1], Limits(3, 10), [(0, 3)]),
        ([1, 1, 1, 1], Limits(3, 10), [(0, 3), (3, 4)]),
        ([1] * 7, Limits(3, 10), [(0, 3), (3, 6), (6, 7)]),
        ([1, 1], Limits(1, 10), [(0, 1), (1, 2)]),
        ([4, 5], Limits(3, 10), [(0, 2)]),
        ([5, 5], Limits(3, 10), [(0, 2)]),
        ([5, 6], Limits(3, 10), [(0, 1), (1, 2)]),
        ([11], Limits(3, 10), [(0, 1)]),
        ([11, 1, 1], Limits(3, 10), [(0, 1), (1, 3)]),
        ([1, 11, 1], Limits(3, 10), [(0, 1), (1, 2), (2, 3)]),
        ([1, 1, 11], Limits(3, 10), [(0, 2), (2, 3)]),
        ([0, 0, 0, 0], Limits(3, 10), [(0, 3), (3, 4)]),
    ],
)
def test_inputs_around_the_limits(sizes: list[int], limits: Limits, expected: list[tuple[int, int]]) -> None:
    """A batch is filled up to each limit exactly; an input that is too large for any goes alone."""
    assert list(spans(sizes, limits)) == expected


@SAME_EACH_TIME
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=40),
    limits=st.builds(Limits, max_inputs=st.integers(1, 6), max_bytes=st.integers(1, 15)),
)
def test_any_inputs_and_limits(sizes: list[int], limits: Limits) -> None:
    """Each input is in one batch, in order; no batch passes a limit unless alone; none could have taken the next."""
    cuts = list(spans(sizes, limits))

    assert [index for first, last in cuts for index in range(first, last)] == list(range(len(sizes)))
    for first, last in cuts:
        assert 1 <= last - first <= limits.max_inputs
        assert last - first == 1 or sum(sizes[first:last]) <= limits.max_bytes
        if last < len(sizes):
            is_full = last - first == limits.max_inputs
            assert is_full or sum(sizes[first : last + 1]) > limits.max_bytes


# --- the stage ---


async def test_request_that_fits_one_call() -> None:
    """A small request is one batch that carries all the upstream has to know."""
    room = Room()
    request = make_request(
        ("a", "é"), spec=Spec("m", 4, b'{"x":1}'), user="somebody", traceparent="00-1-2-01", deadline=1234.5
    )

    task = asyncio.create_task(room.stage(request))
    call = await room.inner.next()
    call.answer(answer(call.message, upstream="u", queue_s=0.5, upstream_s=1.5))
    response = await task

    assert call.message == Batch(
        spec=request.spec, inputs=("a", "é"), size_bytes=3, deadline=1234.5, user="somebody", traceparent="00-1-2-01"
    )
    assert response == Response(rows_of(("a", "é")), tokens=2, upstream="u", queue_s=0.5, upstream_s=1.5, attempts=2)
    assert room.told == [BatchFinished("m", "u", inputs=2, queue_s=0.5, upstream_s=1.5)]


async def test_request_of_a_model_with_limits_of_its_own() -> None:
    """The limits asked for are those of the request's spec."""
    room = Room()
    spec = Spec("m", 4, is_tokens=True)

    task = asyncio.create_task(room.stage(make_request(((1, 2),), spec=spec)))
    call = await room.inner.next()
    call.answer(answer(call.message))
    await task

    assert room.specs == [spec]
    assert call.message.inputs == ((1, 2),)
    assert call.message.size_bytes == 8


async def test_batches_of_one_request() -> None:
    """A large request goes out as several calls at once, each within the limits."""
    room = Room()

    task, calls = await room.sent("a", "bb", "ccc", "dddd", "eeeee", count=3)
    for call in calls:
        call.answer(answer(call.message))
    await task

    assert [call.message.inputs for call in calls] == [("a", "bb"), ("ccc", "dddd"), ("eeeee",)]
    assert [call.message.size_bytes for call in calls] == [3, 7, 5]
    assert room.stage.snapshot() == {"batches": 3}


async def test_bytes_decide_the_cut() -> None:
    """Bytes are UTF-8 bytes, not characters: three letters may be too much."""
    room = Room(Limits(max_inputs=100, max_bytes=4))

    task, calls = await room.sent("é", "é", "é", count=2)
    for call in calls:
        call.answer(answer(call.message))
    await task

    assert [call.message.inputs for call in calls] == [("é", "é"), ("é",)]


async def test_answers_out_of_order() -> None:
    """Whoever answers first, each input gets its own row; counts add up, times are those of the slowest."""
    room = Room()
    inputs = ("a", "b", "c", "d", "e")

    task, calls = await room.sent(*inputs, count=3)
    calls[2].answer(answer(calls[2].message, upstream="u3", queue_s=0.1, upstream_s=9.0))
    await settle()
    calls[0].answer(answer(calls[0].message, upstream="u1", queue_s=0.2, upstream_s=1.0))
    await settle()
    calls[1].answer(answer(calls[1].message, upstream="u2", queue_s=7.0, upstream_s=2.0))
    response = await task

    assert response == Response(rows_of(inputs), tokens=5, upstream="u1", queue_s=7.0, upstream_s=9.0, attempts=6)
    assert [event.upstream for event in room.told if isinstance(event, BatchFinished)] == ["u3", "u1", "u2"]


@settings(SAME_EACH_TIME, max_examples=50)
@given(
    inputs=st.lists(st.sampled_from(["", "a", "bb", "ccc", "€€€€"]), min_size=1, max_size=15),
    limits=st.builds(Limits, max_inputs=st.integers(1, 4), max_bytes=st.integers(1, 8)),
)
async def test_any_request_put_together(inputs: list[str], limits: Limits) -> None:
    """However a request is cut, and however often a text comes in it, each position gets its own row."""
    inner = AnsweringStage(answer)
    stage = MicroBatch(inner, limits=lambda _: limits, observe=lambda _: None)

    response = await stage(make_request(inputs))

    assert response.rows == rows_of(inputs)
    assert response.tokens == len(inputs)
    assert [text for batch in inner.messages for text in batch.inputs] == inputs


# --- failing ---


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_part_that_fails(failing: int) -> None:
    """One failed part fails the request with its own error, and the parts still in the air are cancelled."""
    room = Room()
    failure = RateLimited("later", retry_after_s=3)
    task, calls = await room.sent("a", "b", "c", "d", "e", count=3)

    calls[failing].fail(failure)
    with pytest.raises(EmbeddingError) as caught:
        await task

    assert caught.value is failure
    assert [call.was_cancelled for call in calls] == [index != failing for index in range(3)]
    assert room.told == []


async def test_two_parts_that_fail() -> None:
    """When two parts fail in the same moment, the first one's error tells why."""
    room = Room()
    task, calls = await room.sent("a", "b", "c", "d", count=2)

    calls[1].fail(UpstreamFailed("second batch, failed first"))
    calls[0].fail(UpstreamFailed("first batch, failed second"))
    with pytest.raises(UpstreamFailed) as caught:
        await task

    assert caught.value.message == "second batch, failed first"


async def test_part_that_fails_after_another_was_answered() -> None:
    """A request has all its rows or none; what was answered before is told, but not given."""
    room = Room()
    task, calls = await room.sent("a", "b", "c", count=2)

    calls[0].answer(answer(calls[0].message))
    await settle()
    calls[1].fail(UpstreamFailed("broke off"))
    with pytest.raises(UpstreamFailed):
        await task

    assert [type(event) for event in room.told] == [BatchFinished]


async def test_single_batch_that_fails() -> None:
    """The only batch's error is the request's."""
    room = Room()
    task, [call] = await room.sent("a", count=1)
    failure = UpstreamFailed("broke off")

    call.fail(failure)
    with pytest.raises(UpstreamFailed) as caught:
        await task

    assert caught.value is failure
    assert room.told == []


@pytest.mark.parametrize("inputs", [("a", "b"), ("a", "b", "c", "d", "e")], ids=["one call", "three calls"])
async def test_caller_that_leaves(inputs: tuple[str, ...]) -> None:
    """A cancelled request takes all its calls with it, and stays a cancellation."""
    room = Room()
    task, calls = await room.sent(*inputs, count=(len(inputs) + 1) // 2)

    task.cancel()
    await asyncio.wait({task})

    assert task.cancelled()
    assert all(call.was_cancelled for call in calls)


@pytest.mark.parametrize(
    ("inputs", "batch", "index", "culprit"),
    [
        (("a", "b"), 0, 1, "b"),
        (("a", "b", "c", "d", "e"), 0, 0, "a"),
        (("a", "b", "c", "d", "e"), 1, 1, "d"),
        (("a", "b", "c", "d", "e"), 2, 0, "e"),
    ],
)
async def test_culprit_that_the_upstream_names(inputs: tuple[str, ...], batch: int, index: int, culprit: str) -> None:
    """A position in a batch becomes the key of the input that stands there: above, batches are unknown."""
    room = Room()
    task, calls = await room.sent(*inputs, count=(len(inputs) + 1) // 2)

    calls[batch].fail(UpstreamRefused("bad text", status=400, index=index))
    with pytest.raises(UpstreamRefused) as caught:
        await task

    assert caught.value.key == make_request((culprit,)).keys[0]


async def test_culprit_that_the_upstream_does_not_name() -> None:
    """A refusal without a position accuses nobody."""
    room = Room()
    task, [call] = await room.sent("a", count=1)

    call.fail(UpstreamRefused("bad text", status=400))
    with pytest.raises(UpstreamRefused) as caught:
        await task

    assert caught.value.key is None


async def test_stage_that_is_closed() -> None:
    """Closing ends nothing: a batch belongs to its request."""
    room = Room()
    task, [call] = await room.sent("a", count=1)

    await room.stage.aclose()
    call.answer(answer(call.message))

    assert (await task).rows == rows_of(("a",))
