"""The door counts what is inside, refuses above its bounds, and ends what stays too long."""

from __future__ import annotations

import asyncio

import pytest

from proxy.base.clock import MonotonicClock
from proxy.base.errors import DeadlineExceeded, EmbeddingError, Overloaded, QueueTimeout, UpstreamFailed
from proxy.base.messages import Request, Response
from proxy.base.settings import AdmissionSettings
from proxy.funnel.admission import Admission, refusal
from tests.fakes.clock import HandClock, settle
from tests.fakes.stage import AnsweringStage, ScriptedStage, make_request, rows_of

BOUNDS = AdmissionSettings(max_inputs=10, max_bytes=100, retry_after_s=2.5)
EMPTY = {"inputs": 0, "bytes": 0, "max_inputs": 10, "max_bytes": 100, "shed_requests": 0}


# --- the rule ---


@pytest.mark.parametrize(("inside", "is_refused"), [(0, False), (6, False), (7, False), (8, True), (10, True)])
def test_request_at_the_bound_of_inputs(inside: int, is_refused: bool) -> None:
    """A request comes in when it fits exactly, and not with one input more."""
    error = refusal(make_request(("a", "b", "c")), inside, 0, BOUNDS)

    assert (error is not None) == is_refused


@pytest.mark.parametrize(("inside", "is_refused"), [(0, False), (95, False), (96, False), (97, True), (100, True)])
def test_request_at_the_bound_of_bytes(inside: int, is_refused: bool) -> None:
    """A request comes in when it fits exactly, and not with one byte more."""
    error = refusal(make_request(("four",)), 0, inside, BOUNDS)

    assert (error is not None) == is_refused


def test_refusal_for_inputs_names_the_bound() -> None:
    """A refused caller is told how full it is, what it wanted, the bound, and when to come back."""
    error = refusal(make_request(("a", "b", "c")), 8, 0, BOUNDS)

    assert isinstance(error, Overloaded)
    assert error.message == "8 inputs are inside and 3 more would pass the bound of 10"
    assert error.retry_after_s == 2.5


def test_refusal_for_bytes_names_the_bound() -> None:
    """The same holds for bytes."""
    error = refusal(make_request(("four",)), 1, 97, BOUNDS)

    assert isinstance(error, Overloaded)
    assert error.message == "97 bytes are inside and 4 more would pass the bound of 100"
    assert error.retry_after_s == 2.5


# --- the stage ---


async def test_request_that_is_answered() -> None:
    """A request inside is counted in inputs and bytes until its answer is there, which is passed on as it is."""
    inner = ScriptedStage()
    admission = Admission(BOUNDS, inner, clock=HandClock())
    request = make_request(("four", "six666"))
    response = Response(rows_of(request.inputs), tokens=3)

    task = asyncio.create_task(admission(request))
    call = await inner.next()
    inside = admission.snapshot()
    call.answer(response)
    answer = await task

    assert inside == EMPTY | {"inputs": 2, "bytes": 10}
    assert call.message is request
    assert answer is response
    assert admission.snapshot() == EMPTY


async def test_flood() -> None:
    """Requests come in up to the bound; the next is refused at once and costs the stages behind nothing."""
    inner = ScriptedStage()
    admission = Admission(BOUNDS, inner, clock=HandClock())
    tasks = [asyncio.create_task(admission(make_request(("a",) * 5))) for _ in range(2)]
    await settle()

    with pytest.raises(Overloaded):
        await admission(make_request(("a",)))

    assert len(inner.calls) == 2
    assert admission.snapshot() == EMPTY | {"inputs": 10, "bytes": 10, "shed_requests": 1}
    for call in inner.calls:
        call.answer(Response((), tokens=0))
    await asyncio.gather(*tasks)
    assert admission.snapshot() == EMPTY | {"shed_requests": 1}


@pytest.mark.parametrize(("drain_s", "retry_after_s"), [(0.0, 2.5), (2.6, 2.6), (60.0, 60.0)])
async def test_when_to_come_back(drain_s: float, retry_after_s: float) -> None:
    """A refused caller is told how long it takes until what is inside has left, where that is known."""
    admission = Admission(BOUNDS, ScriptedStage(), drain_s=lambda: drain_s, clock=HandClock())

    with pytest.raises(Overloaded) as caught:
        await admission(make_request(("a",) * 11))

    assert caught.value.retry_after_s == retry_after_s


async def test_place_that_becomes_free() -> None:
    """What was refused comes in as soon as somebody has left."""
    inner = ScriptedStage()
    admission = Admission(BOUNDS, inner, clock=HandClock())
    first = asyncio.create_task(admission(make_request(("a",) * 10)))
    call = await inner.next()
    with pytest.raises(Overloaded):
        await admission(make_request(("b",)))
    call.answer(Response((), tokens=1))
    await first

    second = asyncio.create_task(admission(make_request(("b",))))
    (await inner.next()).answer(Response((), tokens=2))

    assert (await second).tokens == 2


async def test_request_that_fails() -> None:
    """An error from behind travels on as it is, and nothing stays counted."""
    failure = UpstreamFailed("broke off")
    admission = Admission(BOUNDS, AnsweringStage(lambda _: failure), clock=HandClock())

    with pytest.raises(EmbeddingError) as caught:
        await admission(make_request())

    assert caught.value is failure
    assert admission.snapshot() == EMPTY


async def test_request_whose_caller_leaves() -> None:
    """A cancelled request takes its call with it, stays a cancellation, and is counted no more."""
    inner = ScriptedStage()
    admission = Admission(BOUNDS, inner, clock=HandClock())
    task = asyncio.create_task(admission(make_request()))
    call = await inner.next()

    task.cancel()
    await asyncio.wait({task})

    assert task.cancelled()
    assert call.was_cancelled
    assert admission.snapshot() == EMPTY


# --- the deadline ---


async def test_request_just_before_its_deadline() -> None:
    """An answer a moment before the deadline is an answer."""
    clock, inner = HandClock(), ScriptedStage()
    admission = Admission(BOUNDS, inner, clock=clock)
    task = asyncio.create_task(admission(make_request(now=clock.now())))
    call = await inner.next()

    await clock.advance(9.999)
    call.answer(Response((), tokens=7))

    assert (await task).tokens == 7


async def at_its_deadline(
    admission: Admission, clock: HandClock, inner: ScriptedStage, request: Request
) -> EmbeddingError:
    """Let a request come to its deadline; returns the error that it gets."""
    task = asyncio.create_task(admission(request))
    call = await inner.next()
    await clock.advance(request.deadline - clock.now())

    assert task.done()
    assert call.was_cancelled
    assert admission.snapshot() == EMPTY
    error = task.exception()
    assert isinstance(error, EmbeddingError)
    return error


async def test_request_at_its_deadline() -> None:
    """At the deadline the caller has its answer, the work behind is cancelled, and nothing stays counted."""
    clock, inner = HandClock(), ScriptedStage()
    admission = Admission(BOUNDS, inner, clock=clock)
    request = make_request(now=clock.now(), deadline=clock.now() + 2.5)
    request.progress.left_at = clock.now()

    error = await at_its_deadline(admission, clock, inner, request)

    assert type(error) is DeadlineExceeded
    assert error.message == "not answered within 2.5 s; X-Request-Timeout-Ms sets another deadline"
    assert error.retry_after_s is None


@pytest.mark.parametrize(("drain_s", "retry_after_s"), [(0.0, 2.5), (2.4, 2.5), (7.0, 7.0)])
async def test_request_at_its_deadline_in_our_own_queue(drain_s: float, retry_after_s: float) -> None:
    """Who was never sent is told so, and when to come back: when what waits has left."""
    clock, inner = HandClock(), ScriptedStage()
    admission = Admission(BOUNDS, inner, drain_s=lambda: drain_s, clock=clock)

    error = await at_its_deadline(admission, clock, inner, make_request(now=clock.now()))

    assert type(error) is QueueTimeout
    assert error.message == "still in our queue after 10 s, no upstream has seen it"
    assert error.retry_after_s == retry_after_s


async def test_part_of_a_request_that_has_left() -> None:
    """What a later stage notes on a part of the request counts for the whole."""
    clock, inner = HandClock(), ScriptedStage()
    admission = Admission(BOUNDS, inner, clock=clock)
    request = make_request(("a", "b"), now=clock.now())
    request.part([1]).progress.left_at = clock.now()

    assert type(await at_its_deadline(admission, clock, inner, request)) is DeadlineExceeded


@pytest.mark.parametrize("clock", [HandClock(), MonotonicClock()], ids=["by hand", "real"])
async def test_request_that_comes_too_late(clock: HandClock | MonotonicClock) -> None:
    """A request whose deadline has passed on its way here ends at its first wait."""
    inner = ScriptedStage()
    admission = Admission(BOUNDS, inner, clock=clock)

    with pytest.raises(QueueTimeout):
        await admission(make_request(now=clock.now() - 10, deadline=clock.now()))

    assert all(call.was_cancelled for call in inner.calls)
    assert admission.snapshot() == EMPTY


async def test_deadlines_of_two_requests() -> None:
    """Each request has a deadline of its own: the patient one goes on when the other has ended."""
    clock, inner = HandClock(), ScriptedStage()
    admission = Admission(BOUNDS, inner, clock=clock)
    hasty = asyncio.create_task(admission(make_request(("a",), deadline=clock.now() + 1)))
    patient = asyncio.create_task(admission(make_request(("b", "c"), deadline=clock.now() + 60)))
    await inner.next()
    call = await inner.next()
    await clock.advance(59)

    with pytest.raises(QueueTimeout):
        await hasty
    inside = admission.snapshot()
    call.answer(Response((), tokens=1))
    await patient

    assert inside == EMPTY | {"inputs": 2, "bytes": 2}
    assert admission.snapshot() == EMPTY


async def test_stage_that_is_closed() -> None:
    """Closing ends nothing: a request inside belongs to its caller and gets its answer."""
    inner = ScriptedStage()
    admission = Admission(BOUNDS, inner, clock=HandClock())
    task = asyncio.create_task(admission(make_request()))
    call = await inner.next()

    await admission.aclose()
    call.answer(Response((), tokens=4))

    assert (await task).tokens == 4
