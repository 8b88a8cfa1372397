"""Equal inputs in flight are computed once, and a flight belongs to all who wait for it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base.errors import (
    BadVectors,
    CircuitOpen,
    DeadlineExceeded,
    EmbeddingError,
    InvalidRequest,
    NoUpstream,
    Overloaded,
    RateLimited,
    TooLarge,
    UpstreamDenied,
    UpstreamFailed,
    UpstreamRefused,
    UpstreamTimeout,
)
from proxy.base.events import Event, InputsJoined
from proxy.base.messages import Request, Response
from proxy.funnel.coalesce import Coalesce, is_leaders_own
from tests.fakes.clock import settle
from tests.fakes.stage import AnsweringStage, Begins, Call, ScriptedStage, make_request, rows_of

LANDED = {"inputs_in_flight": 0}


@pytest.fixture(autouse=True)
async def _nobody_complains() -> AsyncIterator[None]:
    """Whatever a test does, asyncio has nothing to report at its end: no error that nobody has looked at."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    gc.freeze()  # what is older than the test need not be looked through
    yield
    await settle()
    gc.collect()
    gc.unfreeze()

    assert complaints == []


class Room:
    """The stage, a scripted one behind it, and what is told."""

    def __init__(self) -> None:
        self.told: list[Event] = []
        self.inner = ScriptedStage()
        self.stage = Coalesce(Begins(self.inner), observe=self.told.append)

    async def asks(self, *inputs: str, calls: int, **changes: Any) -> tuple[asyncio.Task[Response], list[Call]]:
        """Send a request; return it and the calls that it has led to, which are as many as expected."""
        before = len(self.inner.calls)
        task = asyncio.create_task(self.stage(make_request(inputs, **changes)))
        await settle()
        new = self.inner.calls[before:]

        assert len(new) == calls
        return task, new

    @property
    def joined(self) -> int:
        return sum(event.inputs for event in self.told if isinstance(event, InputsJoined))


def answer(call: Call, **changes: Any) -> None:
    """Answer a call rightly."""
    inputs = call.message.inputs
    call.answer(Response(rows_of(inputs), **({"tokens": len(inputs), "upstream": "u", "attempts": 1} | changes)))


async def left(task: asyncio.Task[Response]) -> None:
    """Let a caller leave."""
    task.cancel()
    await asyncio.wait({task})
    await settle()

    assert task.cancelled()


# --- the rule ---


@pytest.mark.parametrize(
    ("error", "is_own"),
    [
        (InvalidRequest("no"), True),
        (TooLarge("no"), True),
        (UpstreamRefused("no", status=400), True),
        (DeadlineExceeded("late"), True),
        (asyncio.CancelledError(), True),
        (Overloaded("full"), False),
        (NoUpstream("none"), False),
        (CircuitOpen("open"), False),
        (RateLimited("later"), False),
        (UpstreamTimeout("slow"), False),
        (UpstreamFailed("broken"), False),
        (UpstreamDenied("key"), False),
        (BadVectors("odd"), False),
        (EmbeddingError("bug"), False),
        (ValueError("bug"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_trouble_of_a_leader(error: BaseException, is_own: bool) -> None:
    """A refused request, a deadline and a cancellation are one request's own; all else befalls everybody."""
    assert is_leaders_own(error, is_more_patient=False) is is_own


@pytest.mark.parametrize(
    ("error", "is_own"),
    [
        (RateLimited("later"), True),
        (UpstreamTimeout("slow"), True),
        (UpstreamFailed("broken"), True),
        (DeadlineExceeded("late"), True),
        (UpstreamDenied("key"), False),
        (EmbeddingError("bug"), False),
        (ValueError("bug"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_trouble_of_a_less_patient_leader(error: BaseException, is_own: bool) -> None:
    """A follower with more time may succeed where another attempt or a longer wait can help."""
    assert is_leaders_own(error, is_more_patient=True) is is_own


# --- one request ---


async def test_request_alone() -> None:
    """A request without equals goes on as it is, and its answer comes back as it is."""
    room = Room()
    request = make_request(("a", "b"))
    task = asyncio.create_task(room.stage(request))
    call = await room.inner.next()
    in_flight = room.stage.snapshot()

    answer(call, tokens=2, queue_s=1.0, upstream_s=2.0, attempts=3)
    response = await task

    assert call.message is request
    assert response == Response(rows_of(("a", "b")), tokens=2, upstream="u", queue_s=1.0, upstream_s=2.0, attempts=3)
    assert in_flight == {"inputs_in_flight": 2}
    assert room.stage.snapshot() == LANDED
    assert room.told == []


async def test_duplicates_inside_a_request() -> None:
    """A text that comes several times in a request is computed once and given at each of its places."""
    room = Room()

    task, [call] = await room.asks("a", "b", "a", "c", "b", "a", calls=1)
    answer(call)
    response = await task

    assert call.message == make_request(("a", "b", "c"))
    assert response.rows == rows_of(("a", "b", "a", "c", "b", "a"))
    assert room.told == [InputsJoined("m", 3)]
    assert room.stage.snapshot() == LANDED


async def test_request_that_fails_alone() -> None:
    """A request's own call fails it with the error of that call, whatever it is."""
    room = Room()
    failure = InvalidRequest("no")

    task, [call] = await room.asks("a", calls=1)
    call.fail(failure)
    with pytest.raises(InvalidRequest) as caught:
        await task

    assert caught.value is failure
    assert room.stage.snapshot() == LANDED


# --- leaders and followers ---


async def test_follower() -> None:
    """Who asks for what is in flight gets its rows in its own order, costs no call, and is billed nothing."""
    room = Room()
    leader, [call] = await room.asks("a", "b", "c", calls=1)
    follower, _ = await room.asks("c", "a", calls=0)

    answer(call)
    responses = await asyncio.gather(leader, follower)

    assert responses[0].rows == rows_of(("a", "b", "c"))
    assert responses[1] == Response(rows_of(("c", "a")), tokens=0)
    assert room.told == [InputsJoined("m", 2)]
    assert room.stage.snapshot() == LANDED


async def test_same_text_in_another_space() -> None:
    """Equal means equal keys: the same text at another model flies for itself."""
    room = Room()
    one, [first] = await room.asks("a", calls=1)
    other, [second] = await room.asks("a", model="other", calls=1)

    answer(first)
    answer(second)
    await asyncio.gather(one, other)

    assert room.told == []


async def test_text_that_has_landed() -> None:
    """A flight is shared while it lasts; what comes later asks anew, for keeping is the cache's business."""
    room = Room()
    first, [call] = await room.asks("a", calls=1)
    answer(call)
    await first

    second, [call] = await room.asks("a", calls=1)
    answer(call)

    assert (await second).tokens == 1
    assert room.told == []


async def test_request_in_the_moment_of_landing() -> None:
    """A flight that has its answer takes nobody in any more, even before its waiters have heard of it."""
    told: list[Event] = []
    has_landed = asyncio.Event()

    def lands(request: Request) -> Response:
        has_landed.set()
        return Response(rows_of(request.inputs), tokens=1)

    stage = Coalesce(Begins(AnsweringStage(lands)), observe=told.append)
    first = asyncio.create_task(stage(make_request(("a",))))
    await has_landed.wait()
    still_known = stage.snapshot()
    second = await stage(make_request(("a",)))

    assert still_known == {"inputs_in_flight": 1}
    assert second.tokens == 1
    assert (await first).tokens == 1
    assert told == []
    assert stage.snapshot() == LANDED


async def test_own_and_joined_inputs() -> None:
    """A request joins what is in flight and flies the rest itself; its rows come together by position."""
    room = Room()
    leader, [first] = await room.asks("a", "b", calls=1)
    mixed, [second] = await room.asks("c", "b", "d", "c", "a", calls=1)

    answer(second, tokens=20)
    await settle()
    waits_for_leader = not mixed.done()
    answer(first, tokens=10)
    response = await mixed
    await leader

    assert second.message == make_request(("c", "d"))
    assert waits_for_leader
    assert response.rows == rows_of(("c", "b", "d", "c", "a"))
    assert response.tokens == 20
    assert room.told == [InputsJoined("m", 3)]
    assert room.stage.snapshot() == LANDED


async def test_inputs_of_several_flights() -> None:
    """A request may ride with several leaders at a time, and with nobody of its own."""
    room = Room()
    one, [first] = await room.asks("a", calls=1)
    other, [second] = await room.asks("b", calls=1)
    follower, _ = await room.asks("b", "a", calls=0)

    answer(second)
    answer(first)
    response = await follower
    await asyncio.gather(one, other)

    assert response == Response(rows_of(("b", "a")), tokens=0)


# --- leaving ---


async def test_follower_survives_leader_cancellation() -> None:
    """A follower gets its vectors even when the leader's caller has left."""
    room = Room()
    leader, [call] = await room.asks("a", calls=1)
    follower, _ = await room.asks("a", calls=0)

    await left(leader)
    was_cancelled = call.was_cancelled
    answer(call)

    assert not was_cancelled
    assert (await follower).rows == rows_of(("a",))
    assert room.stage.snapshot() == LANDED


async def test_leader_survives_follower_cancellation() -> None:
    """A follower that leaves takes nothing from anybody."""
    room = Room()
    leader, [call] = await room.asks("a", calls=1)
    follower, _ = await room.asks("a", calls=0)

    await left(follower)
    answer(call)

    assert (await leader).rows == rows_of(("a",))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
async def test_last_one_out(order: tuple[int, int, int]) -> None:
    """The flight is cancelled when the last one leaves, in whichever order, and not before."""
    room = Room()
    leader, [call] = await room.asks("a", calls=1)
    waiting = [leader, *[(await room.asks("a", calls=0))[0] for _ in range(2)]]

    seen = []
    for index in order:
        await left(waiting[index])
        seen.append(call.was_cancelled)

    assert seen == [False, False, True]
    assert room.stage.snapshot() == LANDED


async def test_caller_that_leaves_at_once() -> None:
    """A request that is cancelled in the turn in which its call starts leaves no flight behind."""
    room = Room()
    task = asyncio.create_task(room.stage(make_request(("a",))))
    await asyncio.sleep(0)

    await left(task)

    assert all(call.was_cancelled for call in room.inner.calls)
    assert room.stage.snapshot() == LANDED


async def test_request_in_the_moment_of_leaving() -> None:
    """A flight that is being cancelled takes nobody in: who comes in the same turn of the loop flies anew."""
    room = Room()
    task, [call] = await room.asks("a", calls=1)

    task.cancel()
    late = asyncio.create_task(room.stage(make_request(("a",))))
    await settle()
    [again] = room.inner.calls[1:]
    answer(again)

    assert (await late).rows == rows_of(("a",))
    assert call.was_cancelled
    assert room.told == []


class SlowToLeave:
    """A stage that needs a few turns, and `gate`, to end its work when it is cancelled, and fails over it."""

    def __init__(self, failure: BaseException) -> None:
        self.requests: list[Request] = []
        self.gate = asyncio.Event()
        self._failure = failure

    async def __call__(self, request: Request, /) -> Response:
        self.requests.append(request)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await self.gate.wait()
            raise self._failure from None
        raise AssertionError

    def snapshot(self) -> dict[str, Any]:
        return {}

    async def aclose(self) -> None:
        pass


async def test_request_while_an_abandoned_flight_ends() -> None:
    """A cancelled flight may take its time to end: who comes meanwhile starts another, which it does not disturb."""
    inner = SlowToLeave(UpstreamFailed("broke off"))
    stage = Coalesce(Begins(inner), observe=lambda _: None)
    first = asyncio.create_task(stage(make_request(("a",))))
    await settle()
    await left(first)

    second = asyncio.create_task(stage(make_request(("a",))))
    await settle()
    flying = stage.snapshot()
    inner.gate.set()
    await settle()

    assert len(inner.requests) == 2
    assert flying == {"inputs_in_flight": 1}
    assert stage.snapshot() == {"inputs_in_flight": 1}
    assert not second.done()
    await left(second)
    assert stage.snapshot() == LANDED


async def test_failure_that_nobody_waits_for() -> None:
    """A flight that fails after all have left fails in silence; see `_nobody_complains`."""
    inner = SlowToLeave(UpstreamFailed("broke off"))
    inner.gate.set()
    stage = Coalesce(Begins(inner), observe=lambda _: None)
    task = asyncio.create_task(stage(make_request(("a",))))
    await settle()

    await left(task)
    await settle()

    assert stage.snapshot() == LANDED


async def test_request_that_leaves_own_and_joined_flights() -> None:
    """Who leaves ends what only it waited for, and nothing that others wait for."""
    room = Room()
    leader, [first] = await room.asks("a", calls=1)
    mixed, [second] = await room.asks("a", "b", calls=1)

    await left(mixed)
    left_over = room.stage.snapshot()
    answer(first)
    await leader

    assert second.was_cancelled
    assert not first.was_cancelled
    assert left_over == {"inputs_in_flight": 1}
    assert room.stage.snapshot() == LANDED


# --- failing ---


SHARED_TROUBLE = {
    "upstream": lambda: UpstreamFailed("broken"),
    "limit": lambda: RateLimited("later", retry_after_s=3),
    "bug": lambda: ValueError("bug"),
}


@pytest.mark.parametrize("kind", SHARED_TROUBLE)
async def test_upstream_s_trouble(kind: str) -> None:
    """An upstream's failure is everybody's: nobody asks again for what has just failed."""
    room, failure = Room(), SHARED_TROUBLE[kind]()
    leader, [call] = await room.asks("a", "b", calls=1)
    follower, _ = await room.asks("b", calls=0)

    call.fail(failure)
    results = await asyncio.gather(leader, follower, return_exceptions=True)

    assert results == [failure, failure]
    assert len(room.inner.calls) == 1
    assert room.stage.snapshot() == LANDED


OWN_TROUBLE = {
    "request": lambda: InvalidRequest("no"),
    "refusal": lambda: UpstreamRefused("no", status=400),
    "deadline": lambda: DeadlineExceeded("late"),
    "cancellation": asyncio.CancelledError,
}


@pytest.mark.parametrize("kind", OWN_TROUBLE)
async def test_leader_s_own_trouble(kind: str) -> None:
    """When the leader's own trouble ends the flight, the follower asks again for itself, with its own request."""
    room, trouble = Room(), OWN_TROUBLE[kind]()
    leader, [call] = await room.asks("a", "b", calls=1, id="leader")
    follower, _ = await room.asks("b", calls=0, id="follower", deadline=2000.0)

    call.fail(trouble)
    await settle()
    [again] = room.inner.calls[1:]
    answer(again, tokens=5)
    response = await follower
    await asyncio.wait({leader})

    assert again.message == make_request(("b",), id="follower", deadline=2000.0)
    assert response.rows == rows_of(("b",))
    assert response.tokens == 5
    assert leader.cancelled() or leader.exception() is trouble
    assert room.stage.snapshot() == LANDED


async def test_followers_of_a_leader_in_trouble() -> None:
    """Of several followers that ask again, one leads and the others follow it."""
    room = Room()
    leader, [call] = await room.asks("a", calls=1)
    followers = [(await room.asks("a", calls=0))[0] for _ in range(3)]

    call.fail(InvalidRequest("no"))
    await settle()
    [again] = room.inner.calls[1:]
    answer(again)
    responses = await asyncio.gather(*followers)

    assert [response.tokens for response in responses] == [1, 0, 0]
    assert {response.rows for response in responses} == {rows_of(("a",))}
    assert isinstance(leader.exception(), InvalidRequest)


async def test_follower_that_is_in_trouble_too() -> None:
    """A follower that asks again answers for itself: the trouble of its own call is its own."""
    room = Room()
    leader, [call] = await room.asks("a", calls=1)
    follower, _ = await room.asks("a", calls=0)
    other = UpstreamRefused("me too", status=400)

    call.fail(UpstreamRefused("no", status=400))
    await settle()
    room.inner.calls[1].fail(other)
    await asyncio.wait({leader, follower})

    assert follower.exception() is other
    assert leader.exception() is not other


async def test_joined_flight_in_trouble_beside_an_own_one() -> None:
    """A request keeps the rows that its own flight has brought, and asks again for the others only."""
    room = Room()
    leader, [first] = await room.asks("a", calls=1)
    mixed, [second] = await room.asks("a", "b", "a", calls=1)

    answer(second, tokens=20)
    await settle()
    first.fail(DeadlineExceeded("late"))
    await settle()
    [third] = room.inner.calls[2:]
    answer(third, tokens=1)
    response = await mixed
    await asyncio.wait({leader})

    assert third.message == make_request(("a",))
    assert response.rows == rows_of(("a", "b", "a"))
    assert isinstance(leader.exception(), DeadlineExceeded)
    assert room.stage.snapshot() == LANDED


async def test_tokens_of_a_request_that_asked_twice() -> None:
    """A request that flew twice is billed for both of its flights."""
    room = Room()
    leader, [first] = await room.asks("a", calls=1)
    mixed, [second] = await room.asks("a", "b", calls=1)
    answer(second, tokens=20, attempts=2, queue_s=3.0, upstream_s=1.0)
    first.fail(DeadlineExceeded("late"))
    await settle()

    answer(room.inner.calls[2], tokens=1, attempts=1, queue_s=1.0, upstream_s=4.0)
    response = await mixed
    await asyncio.wait({leader})

    assert isinstance(leader.exception(), DeadlineExceeded)
    assert (response.tokens, response.attempts) == (21, 3)
    assert (response.queue_s, response.upstream_s) == (3.0, 4.0)


async def test_inputs_that_are_asked_for_again_are_not_joined() -> None:
    """What joined once is told once; a second round that joins nobody tells nothing."""
    room = Room()
    leader, [first] = await room.asks("a", calls=1)
    mixed, [second] = await room.asks("a", "b", calls=1)
    answer(second)
    first.fail(DeadlineExceeded("late"))
    await settle()

    answer(room.inner.calls[2])
    await mixed
    await asyncio.wait({leader})

    assert isinstance(leader.exception(), DeadlineExceeded)
    assert room.told == [InputsJoined("m", 1)]


async def test_own_flight_that_fails_beside_a_joined_one() -> None:
    """The failure of a request's own call is the request's, and the joined flight goes on for its leader."""
    room = Room()
    leader, [first] = await room.asks("a", calls=1)
    mixed, [second] = await room.asks("a", "b", calls=1)

    second.fail(InvalidRequest("no"))
    await settle()
    answer(first)
    response = await leader
    await asyncio.wait({mixed})

    assert isinstance(mixed.exception(), InvalidRequest)
    assert response.rows == rows_of(("a",))
    assert room.stage.snapshot() == LANDED


async def test_joined_flight_that_fails_beside_an_own_one() -> None:
    """An upstream's failure of a joined flight fails the request: it has all its rows or none."""
    room = Room()
    leader, [first] = await room.asks("a", calls=1)
    mixed, [second] = await room.asks("a", "b", calls=1)
    failure = UpstreamFailed("broken")

    answer(second)
    first.fail(failure)
    await asyncio.wait({mixed, leader})

    assert mixed.exception() is failure
    assert leader.exception() is failure
    assert room.stage.snapshot() == LANDED


async def test_follower_of_a_refused_input_shares_the_refusal() -> None:
    """Where the input itself was refused, its followers hear so at once: asking again would only repeat it."""
    room = Room()
    leader, [call] = await room.asks("poison", calls=1)
    follower, _ = await room.asks("poison", calls=0)
    error = UpstreamRefused("no", status=400)
    error.key = call.message.keys[0]

    call.fail(error)
    await asyncio.wait({leader, follower})

    assert leader.exception() is follower.exception() is error
    assert len(room.inner.calls) == 1


@pytest.mark.parametrize("kind", [BadVectors, UpstreamFailed])
async def test_follower_of_an_innocent_input(kind: type[EmbeddingError]) -> None:
    """Where another input of the leader is to blame, its followers' texts are innocent: they are asked for again."""
    room = Room()
    leader, [call] = await room.asks("poison", "a", calls=1)
    follower, _ = await room.asks("a", calls=0)
    error = kind("one of them")
    error.key = call.message.keys[0]

    call.fail(error)
    await settle()
    for again in room.inner.calls[1:]:
        answer(again)
    await asyncio.wait({leader, follower})

    assert leader.exception() is error
    assert follower.exception() is None
    assert follower.result().rows == rows_of(("a",))


# --- how far it has come ---


async def test_own_flight_that_has_left() -> None:
    """What is noted on a request's own flight counts for the request: it is the same one, or a part of it."""
    room = Room()
    leader, [call] = await room.asks("a", calls=1)
    request = make_request(("a", "b"))
    task = asyncio.create_task(room.stage(request))
    await settle()
    call.message.progress.left_at = 1001.0
    waits = request.progress.left_at
    room.inner.calls[1].message.progress.left_at = 1003.0

    for call in room.inner.calls:
        answer(call)
    await asyncio.gather(leader, task)

    assert waits is None
    assert request.progress.left_at == 1003.0


@pytest.mark.parametrize(
    ("leaders", "follower"),
    [((None, None), None), ((1002.0, None), 1002.0), ((1007.0, 1002.0), 1002.0)],
    ids=["none has", "one has", "both have"],
)
async def test_follower_of_flights_that_have_left(leaders: tuple[float | None, ...], follower: float | None) -> None:
    """When a follower's time is over, it knows whether any of what it followed had left for an upstream."""
    room = Room()
    flying = [await room.asks(text, calls=1) for text in "ab"]
    request = make_request(("a", "b"))
    task = asyncio.create_task(room.stage(request))
    await settle()
    for (_, [call]), left_at in zip(flying, leaders, strict=True):
        call.message.progress.left_at = left_at

    await left(task)

    assert request.progress.left_at == follower
    for leader, _ in flying:
        await left(leader)


async def test_follower_that_has_left_before_its_leader() -> None:
    """What a request has noted itself stays, whatever it follows."""
    room = Room()
    leader, [call] = await room.asks("a", calls=1)
    request = make_request(("a", "b"))
    task = asyncio.create_task(room.stage(request))
    await settle()
    request.progress.left_at, call.message.progress.left_at = 1005.0, 1001.0

    await left(task)
    await left(leader)

    assert request.progress.left_at == 1005.0


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("inputs", [("a",), ("a", "b"), ("b",)], ids=["follows", "follows and flies", "flies"])
async def test_caller_that_leaves_while_its_flight_lands(inputs: tuple[str, ...], turns: int) -> None:
    """In whichever turn of a landing a caller leaves, the others have their rows, and nothing is left."""
    room = Room()
    leader, _ = await room.asks("a", calls=1)
    task = asyncio.create_task(room.stage(make_request(inputs)))
    await settle()
    for call in room.inner.calls:
        answer(call)
    await settle(turns)
    task.cancel()
    await settle()

    assert (await leader).rows == rows_of(("a",))
    assert task.cancelled() or task.result().rows == rows_of(inputs)
    assert room.stage.snapshot() == LANDED


# --- the end ---


async def test_stage_that_is_closed_with_flights() -> None:
    """Closing ends what is in flight, for the leader too, and returns when it has ended."""
    room = Room()
    task, [call] = await room.asks("a", "b", calls=1)

    await room.stage.aclose()
    left_over = room.stage.snapshot()
    await asyncio.wait({task})

    assert call.was_cancelled
    assert left_over == LANDED
    assert task.cancelled()


async def test_stage_that_is_closed_without_flights() -> None:
    """Closing an idle stage does nothing."""
    stage = Coalesce(
        Begins(AnsweringStage(lambda request: Response(rows_of(request.inputs), tokens=1))), observe=lambda _: None
    )
    await stage(make_request(("a",)))

    await stage.aclose()

    assert stage.snapshot() == LANDED


# --- any history ---

TEXTS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=5)
PLACE = st.integers(0, 9)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), TEXTS),
        st.tuples(st.sampled_from(["answer", "refuse", "break", "leave", "turn", "settle"]), PLACE),
    ),
    max_size=25,
)


class History:
    """Requests that come, leave and are answered in any order, and what has to hold meanwhile."""

    def __init__(self) -> None:
        self.room = Room()
        self.asked: list[tuple[tuple[str, ...], asyncio.Task[Response]]] = []

    @property
    def pending(self) -> list[Call]:
        return [call for call in self.room.inner.calls if not call.future.done()]

    @property
    def waiting(self) -> list[asyncio.Task[Response]]:
        return [task for _, task in self.asked if not task.done()]

    async def step(self, verb: str, what: Any) -> None:
        if verb == "ask":
            request = make_request(what, id=f"r{len(self.asked)}")
            self.asked.append((tuple(what), asyncio.create_task(self.room.stage(request))))
        elif verb == "turn":
            await asyncio.sleep(0)
        elif verb == "settle":
            await settle()
            self.check()
        elif verb == "leave":
            for task in self.waiting[what : what + 1]:
                task.cancel()
        else:
            for call in self.pending[what : what + 1]:
                self.end(call, verb)

    def end(self, call: Call, verb: str) -> None:
        if verb == "answer":
            answer(call)
        elif verb == "refuse":
            call.fail(InvalidRequest(call.message.id))
        else:
            call.fail(UpstreamFailed("broken"))

    def check(self) -> None:
        """No key flies twice, each flight has somebody who waits for it, and the snapshot knows them all."""
        flying = [key for call in self.pending for key in call.message.keys]
        wanted = {text for inputs, task in self.asked if not task.done() for text in inputs}

        assert len(flying) == len(set(flying))
        assert all(wanted.intersection(call.message.inputs) for call in self.pending)
        assert self.room.stage.snapshot() == {"inputs_in_flight": len(flying)}


@settings(deadline=None, derandomize=True, max_examples=200)
@given(STEPS)
async def test_any_history_of_requests(steps: list[tuple[str, Any]]) -> None:
    """Whoever stays gets its own rows, the refusal of its own request, or an upstream's failure; nothing stays."""
    history = History()
    for verb, what in steps:
        await history.step(verb, what)
    await settle()
    while history.waiting:
        history.check()
        answer(history.pending[0])
        await settle()

    history.check()
    assert history.room.stage.snapshot() == LANDED
    for index, (inputs, task) in enumerate(history.asked):
        if not task.cancelled():
            error = task.exception()
            assert isinstance(error, InvalidRequest | UpstreamFailed | None)
            assert not isinstance(error, InvalidRequest) or error.message == f"r{index}"
            assert error or task.result().rows == rows_of(inputs)
