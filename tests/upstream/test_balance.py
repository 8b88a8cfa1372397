"""Who computes: canaries prove the upstreams, load and breakers choose among them, slots bound each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest

from proxy.base import errors
from proxy.base.events import CanaryFinished, Event
from proxy.base.messages import Answer, Row, Spec
from proxy.base.settings import AttemptSettings, CircuitSettings, ModelSettings
from proxy.upstream.attempt import Attempt
from proxy.upstream.balance import CANARY, LEAST_COSINE, Balance, Model, Upstream, flaw
from proxy.upstream.circuit import Circuit
from tests.fakes.clock import HandClock, settle
from tests.fakes.stage import AnsweringStage, Call, ScriptedStage, make_batch, rows_of
from tests.fakes.upstream import vector
from tests.upstream.test_attempt import Highest

RIGHT: Row = rows_of([CANARY])[0]
ELSEWHERE: Row = rows_of(["another space"])[0]


class CountedStage(ScriptedStage):
    """Counts how often it is closed."""

    closings = 0

    async def aclose(self) -> None:
        self.closings += 1


def turned(degrees: float) -> tuple[Row, Row]:
    """Return two directions that differ by so much."""
    angle = math.radians(degrees)
    one, other = [1.0, 0.0, 0.0], [math.cos(angle), math.sin(angle), 0.0]
    return numpy.array(one, "<f4").tobytes(), numpy.array(other, "<f4").tobytes()


class Play:
    """Upstreams that the test plays, and the model that they serve."""

    def __init__(self, *names: str, slots: int = 4, **settings: Any) -> None:
        self.clock = HandClock()
        self.events: list[Event] = []
        self.waits = dict.fromkeys(names, 0.0)
        self.inners = {name: CountedStage() for name in names}
        self.upstreams = [
            Upstream(name, self.inners[name], slots=slots, refuses_s=self._refuses(name)) for name in names
        ]
        self.settings = ModelSettings(upstreams=names, **settings)
        self.model = self.another("m")
        self.balance = Balance({"m": self.model})

    def _refuses(self, name: str) -> Callable[[float], float]:
        return lambda now: self.waits[name]

    def another(self, name: str) -> Model:
        return Model(name, self.settings, self.upstreams, clock=self.clock, observe=self.events.append)

    async def sing(self, *ends: Row | BaseException) -> bool:
        """Send a round of canaries and let each upstream answer so; all of them rightly without any."""
        round_ = asyncio.create_task(self.balance.sing("m", self.clock.now() + 20))
        for inner, end in zip(self.inners.values(), ends or [RIGHT] * len(self.inners), strict=True):
            call = await inner.next()
            if isinstance(end, bytes):
                call.answer(Answer((end,), 9, ""))
            else:
                call.fail(end)
        await round_
        return self.balance.is_whole("m")

    async def refused(self) -> errors.EmbeddingError:
        """See a call fail before it reaches anybody; returns the error."""
        with pytest.raises(errors.EmbeddingError) as caught:
            async with asyncio.timeout(5):
                await self.balance(make_batch())
        return caught.value

    async def called(self, name: str, text: str = "a text", **changes: Any) -> tuple[asyncio.Task[Answer], Call]:
        """Start a call and see it arrive at this upstream."""
        task = asyncio.create_task(self.balance(make_batch([text], **changes)))
        return task, await self.inners[name].next()

    @property
    def shown(self) -> dict[str, Any]:
        return self.balance.snapshot()["m"]["upstreams"]  # type: ignore[no-any-return]

    @property
    def last(self) -> CanaryFinished:
        event = self.events[-1]
        assert isinstance(event, CanaryFinished)
        return event


def answer(text: str = "a text", upstream_s: float = 0.0) -> Answer:
    return Answer(rows_of([text]), 1, "", upstream_s=upstream_s)


# --- the rule about canaries ---


@pytest.mark.parametrize(("width", "is_right"), [(0, True), (8, True), (7, False), (9, False)])
def test_width_that_the_settings_say(width: int, is_right: bool) -> None:
    """A canary has the width of the settings, where they say one; the flaw names both."""
    found = flaw(RIGHT, None, width)

    assert found == ("" if is_right else f"its vectors have 8 numbers, the model's have {width}")


def test_width_of_the_reference() -> None:
    """Where the settings leave the width open, the reference's is due."""
    shorter = vector(CANARY, 4).tobytes()

    assert flaw(shorter, RIGHT, 0) == "its vectors have 4 numbers, the model's have 8"
    assert flaw(RIGHT, RIGHT, 0) == ""


@pytest.mark.parametrize(
    ("cosine", "is_right"), [(1.0, True), (LEAST_COSINE + 1e-5, True), (LEAST_COSINE - 1e-5, False), (0.0, False)]
)
def test_cosine_around_its_bound(cosine: float, is_right: bool) -> None:
    """A canary lies where the reference lies; the flaw tells how far away it is."""
    one, other = turned(math.degrees(math.acos(cosine)))
    found = flaw(other, one, 0)

    assert (found == "") == is_right
    assert is_right or f"cosine {cosine:.4f}" in found


def test_opposite_direction() -> None:
    """The opposite of a vector is not the vector."""
    one, other = turned(180)

    assert "cosine -1.0000" in flaw(other, one, 3)


@pytest.mark.parametrize("length", [1e-3, 7.0, 1e6])
def test_length_is_no_flaw(length: float) -> None:
    """Upstreams may normalise or not: only the direction counts."""
    assert flaw((numpy.frombuffer(RIGHT, "<f4") * numpy.float32(length)).tobytes(), RIGHT, 0) == ""


@pytest.mark.parametrize("length", [1e30, 1e-30])
def test_direction_of_extreme_vectors(length: float) -> None:
    """Numbers that pass the gate are compared like any others, whatever their size."""
    one, other = (numpy.array(row, "<f4").tobytes() for row in ([length, length], [length, -length]))

    assert "cosine 0.0000" in flaw(other, one, 2)
    assert flaw(one, one, 2) == ""


# --- the first round ---


async def test_before_the_first_round() -> None:
    """Calls that come before the first canaries are back wait for them."""
    play = Play("a")
    early = asyncio.create_task(play.balance(make_batch()))
    await settle()
    was_waiting = not early.done() and not play.inners["a"].calls
    is_right = await play.sing()
    (await play.inners["a"].next()).answer(answer())

    assert was_waiting
    assert is_right
    assert (await early).rows == rows_of(["a text"])


async def test_early_call_leaves() -> None:
    """A caller that leaves during the first round takes nothing with it."""
    play = Play("a")
    early = asyncio.create_task(play.balance(make_batch()))
    await settle()
    early.cancel()
    with pytest.raises(asyncio.CancelledError):
        await early

    assert await play.sing()
    assert play.balance.problems() == {"m": ""}


async def test_no_upstream_is_right() -> None:
    """Where no upstream has shown a right vector, the error says of each why."""
    play = Play("a", "b", dimensions=8)
    is_right = await play.sing(errors.UpstreamFailed("no connection"), vector(CANARY, 4).tobytes())
    error = await play.refused()

    assert not is_right
    assert type(error) is errors.NoUpstream
    assert error.message == (
        "no upstream of model 'm' is ready (a: no connection; b: its vectors have 4 numbers, the model's have 8)"
    )
    assert error.retry_after_s == 1.0
    assert play.balance.problems() == {
        "m": "a: no connection; b: its vectors have 4 numbers, the model's have 8",
    }


async def test_before_any_canary() -> None:
    """Until the first canary is back, that is the problem."""
    play = Play("a")

    assert play.balance.problems() == {"m": "a: its first canary has not come back yet"}
    assert play.model.width is None
    assert play.balance.snapshot()["m"]["dimensions"] is None


# --- canaries ---


async def test_canary() -> None:
    """The canary is a batch like any other, under the model's name at the upstream; its end is told."""
    play = Play("a", upstream_model="the-real-name")
    round_ = asyncio.create_task(play.balance.sing("m", play.clock.now() + 20))
    call = await play.inners["a"].next()
    await play.clock.advance(2)
    call.answer(Answer((RIGHT,), 9, ""))
    await round_
    batch = call.message

    assert play.balance.is_whole("m")
    assert batch.inputs == (CANARY,)
    assert batch.model == "the-real-name"
    assert batch.spec == Spec("m")
    assert batch.deadline == 1020.0
    assert batch.size_bytes == len(CANARY)
    assert play.events == [CanaryFinished("m", "a", 2.0, "", changed=True)]


async def test_repeated_canary() -> None:
    """A canary that brings nothing new says so."""
    play = Play("a")
    changes = []
    for end in (RIGHT, RIGHT, errors.UpstreamFailed("gone"), errors.UpstreamFailed("gone"), RIGHT):
        await play.sing(end)
        changes.append((play.last.changed, play.last.problem))

    assert changes == [(True, ""), (False, ""), (True, "gone"), (False, "gone"), (True, "")]


async def test_canary_of_another_space() -> None:
    """An upstream whose vectors lie elsewhere is refused, although it answers."""
    play = Play("a", "b")
    is_right = await play.sing(RIGHT, ELSEWHERE)
    calls = [await play.called("a") for _ in range(4)]
    await settle()

    assert not is_right
    assert play.balance.problems() == {"m": ""}
    assert play.shown["a"]["is_verified"] and not play.shown["b"]["is_verified"]
    assert "its vectors lie elsewhere" in play.shown["b"]["problem"]
    assert len(play.inners["b"].calls) == 1
    for task, call in calls:
        call.answer(answer())
        await task


async def test_first_upstream_is_down_at_the_start() -> None:
    """The first right canary is the reference, so a later one is measured against it, the first upstream's too."""
    play = Play("a", "b")
    await play.sing(errors.UpstreamFailed("down"), RIGHT)
    await play.sing(ELSEWHERE, RIGHT)
    is_a_verified = play.shown["a"]["is_verified"]
    is_right = await play.sing(RIGHT, RIGHT)

    assert not is_a_verified
    assert is_right
    assert play.shown["a"]["is_verified"]


async def test_upstream_changes_its_model() -> None:
    """A verified upstream whose vectors move away is refused from then on."""
    play = Play("a", "b")
    await play.sing()
    await play.sing(RIGHT, ELSEWHERE)

    assert not play.shown["b"]["is_verified"]
    assert play.shown["a"]["is_verified"]


async def test_all_upstreams_change_their_model() -> None:
    """
    Where all upstreams move together, all are refused: the index of the app still holds the old vectors.

    A reload starts anew, and clears what was cached.
    """
    play = Play("a", "b")
    await play.sing()
    await play.sing(ELSEWHERE, ELSEWHERE)

    assert "a: its vectors lie elsewhere" in play.balance.problems()["m"]
    assert "b: its vectors lie elsewhere" in play.balance.problems()["m"]


async def test_verified_upstream_fails_a_canary() -> None:
    """A canary that fails says nothing about the space: the upstream stays, the breaker judges its health."""
    play = Play("a")
    await play.sing()
    is_right = await play.sing(errors.UpstreamTimeout("slow"))
    task, call = await play.called("a")
    call.answer(answer())
    await task

    assert not is_right
    assert play.shown["a"]["is_verified"]
    assert play.shown["a"]["problem"] == "slow"
    assert play.balance.problems() == {"m": ""}


async def test_canary_takes_too_long() -> None:
    """A canary has its own deadline; the upstream after it gets its turn with what is left."""
    play = Play("a", "b")
    round_ = asyncio.create_task(play.balance.sing("m", play.clock.now() + 20))
    await play.inners["a"].next()
    await play.clock.advance(19.9)
    was_done = round_.done()
    await play.clock.advance(0.1)
    await round_

    assert not was_done
    assert not play.balance.is_whole("m")
    assert play.shown["a"]["problem"] == "its canary took longer than 20 s"
    assert play.inners["a"].calls[0].was_cancelled
    assert play.shown["a"]["calls"] == 0


async def test_slow_upstream_before_a_good_one() -> None:
    """An upstream that hangs does not keep the model from being served by the others."""
    play = Play("a", "b")
    round_ = asyncio.create_task(play.balance.sing("m", play.clock.now() + 20))
    await play.inners["a"].next()
    await settle()
    if play.inners["b"].calls:
        play.inners["b"].calls[0].answer(Answer((RIGHT,), 9, ""))
    await play.clock.advance(20)
    await round_

    assert play.balance.problems() == {"m": ""}


async def test_round_is_cancelled() -> None:
    """A round whose owner leaves ends at once and gives its slot back."""
    play = Play("a")
    round_ = asyncio.create_task(play.balance.sing("m", play.clock.now() + 20))
    call = await play.inners["a"].next()
    round_.cancel()
    with pytest.raises(asyncio.CancelledError):
        await round_

    assert call.was_cancelled
    assert play.shown["a"]["calls"] == 0


# --- what the upstream is told ---


@pytest.mark.parametrize(
    ("settings", "asked", "width"),
    [({}, None, 8), ({"dimensions": 8}, None, 8), ({"dimensions": 8}, 4, 4), ({}, 2, 2)],
    ids=str,
)
async def test_expected_width(settings: dict[str, int], asked: int | None, width: int) -> None:
    """The gate is told what to expect: the width asked for, else the settings', else the first canary's."""
    play = Play("a", **settings)
    await play.sing()
    task, call = await play.called("a", spec=Spec("m", dimensions=asked))
    call.answer(answer())
    await task

    assert call.message.width == width
    assert play.balance.snapshot()["m"]["dimensions"] == 8


@pytest.mark.parametrize(("upstream_model", "name"), [("", "m"), ("the-real-name", "the-real-name")])
async def test_name_at_the_upstream(upstream_model: str, name: str) -> None:
    """The upstream is asked for the model by the name that it knows."""
    play = Play("a", upstream_model=upstream_model)
    await play.sing()
    task, call = await play.called("a", model="m")
    call.answer(answer())
    await task

    assert call.message.model == name
    assert call.message.inputs == ("a text",)


# --- the choice ---


async def test_least_loaded_upstream() -> None:
    """Calls go where the fewest are, in proportion to the slots."""
    play = Play("a", "b")
    play.upstreams[1] = Upstream("b", play.inners["b"], slots=8, refuses_s=lambda now: 0.0)
    play.balance = Balance({"m": play.another("m")})
    await play.sing()
    tasks = [asyncio.create_task(play.balance(make_batch([str(n)]))) for n in range(12)]
    await settle()
    counts = {name: len(inner.calls) - 1 for name, inner in play.inners.items()}
    for inner in play.inners.values():
        for call in inner.calls[1:]:
            call.answer(answer())
    await asyncio.gather(*tasks)

    assert counts == {"a": 4, "b": 8}
    assert [u.asked for u in play.upstreams] == [0, 0]


async def test_open_breaker_is_avoided() -> None:
    """An upstream that its breaker refuses gets no calls while another passes them, however loaded."""
    play = Play("a", "b")
    await play.sing()
    play.waits["a"] = 3.0
    calls = [await play.called("b") for _ in range(3)]
    play.waits["a"] = 0.0
    calls.append(await play.called("a"))
    for task, call in calls:
        call.answer(answer())
        await task

    assert len(play.inners["b"].calls) == 1 + 3


async def test_all_breakers_open() -> None:
    """Where all are left alone, the error names them and asks for the shortest wait."""
    play = Play("a", "b", "c")
    await play.sing(RIGHT, RIGHT, ELSEWHERE)
    play.waits |= {"a": 7.0, "b": 3.0, "c": 1.0}
    error = await play.refused()

    assert type(error) is errors.CircuitOpen
    assert error.message == "upstream a, b failed repeatedly and is left alone for another 3.0 s"
    assert error.retry_after_s == 3.0


async def test_upstream_that_has_failed_this_call() -> None:
    """An upstream that failed the call before is asked only where there is no other, and is named by the error."""
    play = Play("a", "b")
    await play.sing()
    first, first_call = await play.called("a")
    first_call.fail(errors.UpstreamFailed("it broke"))
    with pytest.raises(errors.UpstreamFailed) as caught:
        await first
    second, second_call = await play.called("b", avoid=frozenset({"a"}))
    second_call.answer(answer())
    third, third_call = await play.called("a", avoid=frozenset({"a", "b"}))
    third_call.answer(answer())
    play.waits["b"] = 5.0
    fourth, fourth_call = await play.called("a", avoid=frozenset({"a"}))
    fourth_call.answer(answer())
    await asyncio.gather(second, third, fourth)

    assert caught.value.upstream == "a"


async def test_calls_queue_at_an_upstream_whose_breaker_opens() -> None:
    """Calls that wait for a slot when the breaker of their upstream opens go on at the other, which is well."""
    clock = HandClock()
    events: list[Event] = []
    ill, well = ScriptedStage(), AnsweringStage(lambda batch: Answer(rows_of(batch.inputs), 1, "b"))
    circuits = {
        name: Circuit(name, CircuitSettings(failures=1), inner, clock=clock, observe=events.append)
        for name, inner in (("a", ill), ("b", well))
    }
    upstreams = [Upstream(name, circuit, slots=1, refuses_s=circuit.wait_s) for name, circuit in circuits.items()]
    model = Model("m", ModelSettings(upstreams=("a", "b")), upstreams, clock=clock, observe=events.append)
    attempt = Attempt(AttemptSettings(backoff_base_s=0), Balance({"m": model}), clock=clock, rng=Highest())
    round_ = asyncio.create_task(model.sing(clock.now() + 20))
    (await ill.next()).answer(Answer((RIGHT,), 1, "a"))
    await round_
    # All three queue at `a`, since they would rather not go to `b`.
    calls = [asyncio.create_task(attempt(make_batch([str(n)], avoid=frozenset({"b"})))) for n in range(3)]
    (await ill.next()).fail(errors.UpstreamFailed("it broke"))
    ends = await asyncio.gather(*calls, return_exceptions=True)

    assert [type(end).__name__ for end in ends] == ["Answer"] * 3


# --- slots ---


async def test_slots_are_never_exceeded() -> None:
    """So many calls at a time as there are slots; the others wait, first come first served."""
    play = Play("a", slots=2)
    await play.sing()
    inner = play.inners["a"]
    tasks = [asyncio.create_task(play.balance(make_batch([str(n)]))) for n in range(6)]
    arrived = []
    for _ in range(6):
        await settle()
        inside = [call for call in inner.calls[1:] if not call.future.done()]
        assert len(inside) <= 2
        arrived.append(inside[0].message.inputs[0])
        inside[0].answer(answer())
    await asyncio.gather(*tasks)

    assert arrived == ["0", "1", "2", "3", "4", "5"]
    assert [call.message.inputs[0] for call in inner.calls[1:]] == arrived


@pytest.mark.parametrize("end", ["success", "failure", "cancellation"])
async def test_slot_is_given_back(end: str) -> None:
    """However a call ends, its slot goes to the next."""
    play = Play("a", slots=1)
    await play.sing()
    first, call = await play.called("a", "first")
    second = asyncio.create_task(play.balance(make_batch(["second"])))
    await settle()
    if end == "success":
        call.answer(answer("first"))
    elif end == "failure":
        call.fail(errors.UpstreamFailed("it broke"))
    else:
        first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    (await play.inners["a"].next()).answer(answer("second"))

    assert (await second).rows == rows_of(["second"])
    assert play.shown["a"]["calls"] == 0


async def test_caller_leaves_while_it_waits_for_a_slot() -> None:
    """Whoever leaves the queue is skipped, and nobody behind is stuck."""
    play = Play("a", slots=1)
    await play.sing()
    first, call = await play.called("a", "first")
    second, third = (asyncio.create_task(play.balance(make_batch([text]))) for text in ("second", "third"))
    await settle()
    asked = play.shown["a"]["calls"]
    second.cancel()
    await settle()
    call.answer(answer("first"))
    last = await play.inners["a"].next()
    last.answer(answer("third"))
    await asyncio.gather(first, third)

    assert second.cancelled()
    assert asked == 3
    assert last.message.inputs == ("third",)
    assert play.shown["a"]["calls"] == 0


async def test_time_in_the_queue() -> None:
    """The answer tells how long it waited before the exchange, and the exchange is not part of it."""
    play = Play("a", slots=1)
    await play.sing()
    first, call = await play.called("a", "first")
    second = asyncio.create_task(play.balance(make_batch(["second"])))
    await play.clock.advance(3)
    call.answer(answer("first", upstream_s=3.0))
    later = await play.inners["a"].next()
    await play.clock.advance(2)
    later.answer(answer("second", upstream_s=2.0))

    assert (await first).queue_s == 0.0
    assert (await second).queue_s == pytest.approx(3.0)
    assert (await second).upstream_s == 2.0


# --- several models ---


async def test_models_share_an_upstream() -> None:
    """Two models share the slots of an upstream, and it is closed once."""
    play = Play("a", "b", slots=1)
    play.balance = Balance({"m": play.model, "n": play.another("n")})
    await play.sing()
    await play.balance.aclose()

    assert [inner.closings for inner in play.inners.values()] == [1, 1]


async def test_each_model_has_its_own_proof() -> None:
    """An upstream that serves one model rightly is unproven for another."""
    play = Play("a")
    play.balance = Balance({"m": play.model, "n": play.another("n")})
    await play.sing()

    assert play.balance.problems() == {"m": "", "n": "a: its first canary has not come back yet"}


async def test_snapshot() -> None:
    """The snapshot says of each upstream how it stands and how old its last right vector is."""
    play = Play("a", "b", slots=2)
    before = play.balance.snapshot()["m"]["upstreams"]["a"]["right_vector_age_s"]
    await play.sing(RIGHT, errors.UpstreamFailed("down"))
    await play.clock.advance(5)
    canary_age = play.shown["a"]["right_vector_age_s"]
    task, call = await play.called("a")
    during = play.shown["a"]["calls"]
    call.answer(answer())
    await task
    await play.clock.advance(1)

    assert before is None
    assert canary_age == 5.0
    assert during == 1
    assert play.balance.snapshot() == {
        "m": {
            "dimensions": 8,
            "upstreams": {
                "a": {"is_verified": True, "problem": "", "right_vector_age_s": 1.0, "calls": 0, "slots": 2},
                "b": {"is_verified": False, "problem": "down", "right_vector_age_s": None, "calls": 0, "slots": 2},
            },
        }
    }
