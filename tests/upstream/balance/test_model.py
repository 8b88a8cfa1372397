"""The upstreams of one model: which have shown the right vectors, and which one takes the next call."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from proxy.base import errors
from proxy.base.events import CanaryFinished
from proxy.base.lease import Outlook, Wait
from proxy.base.messages import Answer, Limits, Spec, size_bytes
from proxy.upstream.balance.canary import CANARIES, CANARY_GRACE_S
from proxy.upstream.balance.upstream import Permit
from tests.fakes.balance import ELSEWHERE, RIGHT, HandUpstream, Play, answer
from tests.fakes.clock import settle
from tests.fakes.stage import Call, rows_of
from tests.fakes.upstream import vector

FAILED = errors.UpstreamFailed("it broke")


async def ended(task: asyncio.Task[Any]) -> Any:
    """Wait for the end; fails the test when it does not come within five seconds."""
    async with asyncio.timeout(5):
        return await task


async def called(play: Play, permit: Permit, **changes: Any) -> tuple[asyncio.Task[Answer], Call]:
    task = play.called(permit, **changes)
    await settle()
    return task, play[permit.upstream].calls[-1]


async def taught(play: Play, name: str, fixed_s: float, per_input_s: float) -> None:
    """Let an upstream show what its calls take."""
    for inputs in (1, 1, 4, 8, 2, 6):  # the first one does not count
        permit = play[name].take(play.clock.now())
        texts = tuple("text" for _ in range(inputs))
        task = asyncio.create_task(play.balance(play.batch(*texts, lease=permit)))
        await play.clock.advance(fixed_s + per_input_s * inputs)
        play[name].calls[-1].answer(answer())
        await task


# --- the first round ---


async def test_before_the_first_round() -> None:
    """Whoever comes before the first canaries are back waits for them: new batches and further attempts."""
    play = Play("a")
    ready: list[int] = []
    play.model.listen(lambda: ready.append(1))
    early = play.refused()
    retry = play.retry()
    await settle()
    was_waiting = not retry.done()
    await play.sing()

    assert early == Wait()
    assert was_waiting
    assert ready
    assert (await ended(retry)).upstream == "a"


async def test_first_canary_that_is_right_opens_the_model() -> None:
    """One right upstream is enough: nobody waits for the others."""
    play = Play("a", "b")
    round_ = asyncio.create_task(play.balance.sing("m", 20.0))
    retry = play.retry()
    await settle()
    play.answer_canary(play["a"])
    await settle()
    permit = await ended(retry)
    play.answer_canary(play["b"])
    await round_

    assert permit.upstream == "a"


async def test_early_caller_leaves() -> None:
    """A caller that leaves during the first round takes nothing with it."""
    play = Play("a")
    retry = play.retry()
    await settle()
    retry.cancel()
    await settle()

    assert await play.sing()
    assert play.shown["a"]["calls"] == 0


async def test_no_upstream_is_right() -> None:
    """Where no upstream has shown a right vector, the error says of each why, to those who waited too."""
    play = Play("a", "b", dimensions=8)
    retries = [play.retry(), play.retry()]
    await settle()
    is_whole = await play.sing(errors.UpstreamFailed("no connection"), vector(CANARIES[0], 4).tobytes())
    with pytest.raises(errors.NoUpstream) as caught:
        play.take()
    late = [await asyncio.gather(retry, return_exceptions=True) for retry in retries]

    assert not is_whole
    assert caught.value.message == (
        "no upstream of model 'm' is ready (a: no connection; b: its vectors have 4 numbers, the model's have 8)"
    )
    assert caught.value.retry_after_s == 1.0
    assert play.model.problem() == "a: no connection; b: its vectors have 4 numbers, the model's have 8"
    assert [type(end) for (end,) in late] == [errors.NoUpstream] * 2


async def test_before_any_canary() -> None:
    """Until the first canary is back, that is the problem."""
    play = Play("a")

    assert play.model.problem() == "a: its first canary has not come back yet"
    assert play.model.width is None
    assert not play.model.is_whole


# --- canaries ---


async def test_canary() -> None:
    """The canary is a batch like any other, under the model's name at the upstream; its end is told."""
    play = Play("a", upstream_model="the-real-name")
    round_ = asyncio.create_task(play.balance.sing("m", 20.0))
    call = await play["a"].scripted.next()
    await play.clock.advance(2)
    call.answer(Answer(rows_of(CANARIES), 9, ""))
    await round_
    batch = call.message

    assert play.model.is_whole
    assert batch.inputs == CANARIES
    assert batch.model == "the-real-name"
    assert batch.spec == Spec("m")
    assert batch.deadline == 1020.0
    assert batch.size_bytes == sum(map(size_bytes, CANARIES))
    assert play["a"].hand_pace.charged == [batch.tokens]
    assert play.events == [CanaryFinished("m", "a", 2.0, "", changed=True)]


async def test_canary_of_a_server_that_takes_one_text_at_a_time() -> None:
    """What the upstream takes in one call holds for the canary texts too: they go one after the other."""
    play = Play("a", options={"limits": Limits(1, 1000)})
    round_ = asyncio.create_task(play.balance.sing("m", 20.0))
    for text in CANARIES:
        call = await play["a"].scripted.next()
        assert call.message.inputs == (text,)
        call.answer(Answer(rows_of([text]), 9, ""))
    await round_

    assert play.model.canary == rows_of(CANARIES)
    assert play.events == [CanaryFinished("m", "a", 0.0, "", changed=True)]


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
    play = Play("a", "b", slots=2)
    is_whole = await play.sing(RIGHT, ELSEWHERE)
    permits = [play.take() for _ in range(2)]
    full = play.refused()

    assert not is_whole
    assert play.model.problem() == ""
    assert {permit.upstream for permit in permits} == {"a"}
    assert full == Wait()
    assert "its vectors lie elsewhere" in play.shown["b"]["problem"]


async def test_first_upstream_is_down_at_the_start() -> None:
    """The first right canary is the reference, so a later one is measured against it, the first upstream's too."""
    play = Play("a", "b")
    await play.sing(errors.UpstreamFailed("down"), RIGHT)
    await play.sing(ELSEWHERE, RIGHT)
    is_a_verified = play.shown["a"]["is_verified"]
    is_whole = await play.sing(RIGHT, RIGHT)

    assert not is_a_verified
    assert is_whole
    assert play.shown["a"]["is_verified"]


async def test_upstream_changes_its_model() -> None:
    """A verified upstream whose vectors move away is refused from then on."""
    play = Play("a", "b")
    await play.sing()
    await play.sing(RIGHT, ELSEWHERE)

    assert not play.shown["b"]["is_verified"]
    assert play.shown["a"]["is_verified"]
    assert {play.take().upstream for _ in range(4)} == {"a"}


async def test_all_upstreams_change_their_model() -> None:
    """
    Where all upstreams move together, all are refused: the index of the app still holds the old vectors.

    A reload starts anew, and clears what was cached.
    """
    play = Play("a", "b")
    await play.sing()
    await play.sing(ELSEWHERE, ELSEWHERE)

    assert "a: its vectors lie elsewhere" in play.model.problem()
    assert "b: its vectors lie elsewhere" in play.model.problem()


async def test_verified_upstream_fails_a_canary() -> None:
    """A canary that fails says nothing about the space: the upstream stays, the breaker judges its health."""
    play = Play("a")
    await play.sing()
    is_whole = await play.sing(errors.UpstreamTimeout("slow"))

    assert not is_whole
    assert play.take().upstream == "a"
    assert play.shown["a"]["problem"] == "slow"
    assert play.model.problem() == ""


async def test_canary_finds_a_defect() -> None:
    """A defect of ours is a problem of that upstream, told by its kind alone; the canaries go on."""
    play = Play("a", "b")
    await play.sing(ZeroDivisionError("secret"), RIGHT)

    assert play.shown["a"]["problem"] == "internal error ZeroDivisionError"
    assert play.model.problem() == ""


async def test_canary_without_a_vector() -> None:
    """An answer without rows is a defect like any other."""
    play = Play("a")
    round_ = asyncio.create_task(play.balance.sing("m", 20.0))
    (await play["a"].scripted.next()).answer(Answer((), 9, ""))
    await round_

    assert play.shown["a"]["problem"] == "0 vectors came for 3 canary texts"


async def test_canary_of_an_upstream_that_is_left_alone() -> None:
    """An open breaker is the problem; nobody is asked."""
    play = Play("a")
    await play.sing()
    play["a"].hand_guard.open(5.0)
    await play.balance.sing("m", 20.0)

    assert len(play["a"].scripted.calls) == 1
    assert play.shown["a"]["problem"] == "upstream 'a' has failed repeatedly and is left alone"


async def test_canary_takes_too_long() -> None:
    """A canary has its own deadline, and leaves nothing behind."""
    play = Play("a", "b")
    round_ = asyncio.create_task(play.balance.sing("m", 20.0))
    await play["a"].scripted.next()
    await play.clock.advance(19.9)
    was_done = round_.done()
    await play.clock.advance(0.1)
    await ended(round_)

    assert not was_done
    assert not play.model.is_whole
    assert play.shown["a"]["problem"] == "its canary took longer than 20 s"
    assert play["a"].scripted.calls[0].was_cancelled
    assert play.shown["a"]["calls"] == 0


async def test_first_answer_may_take_longer() -> None:
    """An upstream that has to load its model gets the time for it, once."""
    play = Play("a", options={"first_answer_s": 120.0})
    first = asyncio.create_task(play.balance.sing("m", 20.0))
    call = await play["a"].scripted.next()
    await play.clock.advance(119.9)
    call.answer(Answer(rows_of(CANARIES), 9, ""))
    await ended(first)
    second = asyncio.create_task(play.balance.sing("m", 20.0))
    await settle()
    await play.clock.advance(20)
    await ended(second)

    assert call.message.deadline == 1120.0
    assert play.shown["a"]["problem"] == "its canary took longer than 20 s"


async def test_first_answer_that_fails() -> None:
    """As long as it has not answered, it is still loading for all we know."""
    play = Play("a", options={"first_answer_s": 120.0})
    await play.sing(FAILED)
    round_ = asyncio.create_task(play.balance.sing("m", 20.0))
    await play.clock.advance(100)
    play.answer_canary(play["a"])
    await ended(round_)

    assert play.model.is_whole


@pytest.mark.parametrize(("late_s", "is_reference"), [(CANARY_GRACE_S - 0.1, True), (CANARY_GRACE_S + 0.1, False)])
async def test_grace_for_the_first_upstream(late_s: float, is_reference: bool) -> None:
    """The first upstream of the settings is the reference if its canary comes soon; else whoever comes next is."""
    play = Play("a", "b")
    round_ = asyncio.create_task(play.balance.sing("m", 20.0))
    await settle()
    play.answer_canary(play["b"], ELSEWHERE)
    await play.clock.advance(late_s)
    play.answer_canary(play["a"], RIGHT)
    await ended(round_)

    assert play.shown["a"]["is_verified"] is is_reference
    assert play.shown["b"]["is_verified"] is not is_reference


async def test_slow_upstream_before_a_good_one() -> None:
    """An upstream that hangs does not keep the model from being served by the others, the slower ones among them."""
    play = Play("a", "b", "c")
    round_ = asyncio.create_task(play.balance.sing("m", 20.0))
    await play.clock.advance(7)
    play.answer_canary(play["b"])
    await settle()
    is_served = play.model.problem() == ""
    play.answer_canary(play["c"], ELSEWHERE)
    await play.clock.advance(13)
    await ended(round_)

    assert is_served
    assert [play.shown[name]["is_verified"] for name in "abc"] == [False, True, False]


async def test_late_canaries_at_the_same_time() -> None:
    """Of late ones that come together the first of the settings is the reference."""
    play = Play("a", "b", "c")
    round_ = asyncio.create_task(play.balance.sing("m", 20.0))
    await play.clock.advance(10)
    for name, row in (("c", ELSEWHERE), ("b", RIGHT), ("a", RIGHT)):
        play.answer_canary(play[name], row)
    await ended(round_)

    assert [play.shown[name]["is_verified"] for name in "abc"] == [True, True, False]


async def test_round_is_cancelled() -> None:
    """A round whose owner leaves ends at once and gives its slot back."""
    play = Play("a", "b")
    round_ = asyncio.create_task(play.balance.sing("m", 20.0))
    call = await play["a"].scripted.next()
    await play.clock.advance(3)
    round_.cancel()
    with pytest.raises(asyncio.CancelledError):
        await round_

    assert call.was_cancelled
    assert [play.shown[name]["calls"] for name in "ab"] == [0, 0]


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
    task, call = await called(play, play.take(), spec=Spec("m", dimensions=asked))
    call.answer(answer())
    await task

    assert call.message.width == width
    assert play.model.width == 8


@pytest.mark.parametrize(("upstream_model", "name"), [("", "m"), ("the-real-name", "the-real-name")])
async def test_name_at_the_upstream(upstream_model: str, name: str) -> None:
    """The upstream is asked for the model by the name that it knows."""
    play = Play("a", upstream_model=upstream_model)
    await play.sing()
    task, call = await called(play, play.take(), model="m")
    call.answer(answer())
    await task

    assert call.message.model == name
    assert call.message.inputs == ("a text",)


async def test_error_names_its_upstream() -> None:
    """An error of an exchange says where it happened, and the slot is free again."""
    play = Play("a")
    await play.sing()
    task, call = await called(play, play.take())
    call.fail(errors.UpstreamFailed("it broke"))
    with pytest.raises(errors.UpstreamFailed) as caught:
        await task

    assert caught.value.upstream == "a"
    assert play.shown["a"]["calls"] == 0


# --- the choice ---


async def test_least_loaded() -> None:
    """Of two, the one with the smaller share of its slots in use takes the call."""
    play = Play("a", "b")
    play.upstreams["b"] = HandUpstream("b", play.clock, slots=8)
    play.model = play.another("m")
    play.balance._models = {"m": play.model}
    await play.sing()
    counts = Counter(play.take().upstream for _ in range(12))

    assert counts == {"a": 4, "b": 8}


def chosen(seed: int) -> list[str]:
    """Choose among five upstreams, of which the last one is the least loaded."""

    async def run() -> list[str]:
        play = Play("a", "b", "c", "d", "e", seed=seed, slots=100)
        await play.sing()
        for load, name in enumerate("edcba"):
            play[name].in_use = load
        found = []
        for _ in range(200):
            permit = play.take()
            found.append(permit.upstream)
            permit.release()
        return found

    return asyncio.run(run())


def test_two_random_choices() -> None:
    """Of many, two are drawn from the seed that was passed in: the least loaded wins whenever drawn, the most never."""
    counts = Counter(chosen(1))

    assert chosen(1) == chosen(1) != chosen(2)
    assert counts["e"] > counts["d"] > counts["c"] > counts["b"]
    assert counts["e"] == pytest.approx(200 * 4 / 10, rel=0.2)
    assert counts["a"] == 0


async def test_open_breaker_is_avoided() -> None:
    """An upstream that its breaker refuses gets no calls while another passes them, however loaded."""
    play = Play("a", "b")
    await play.sing()
    play["a"].hand_guard.until = 1003.0
    during = [play.take().upstream for _ in range(3)]
    await play.clock.advance(3)

    assert during == ["b", "b", "b"]
    assert play.take().upstream == "a"


async def test_paced_upstream_is_avoided() -> None:
    """An upstream whose limit per minute is used up gets no calls while another has rate to spare."""
    play = Play("a", "b")
    await play.sing()
    play["a"].hand_pace.until = 1003.0

    assert [play.take().upstream for _ in range(3)] == ["b", "b", "b"]


async def test_upstream_whose_canary_waits_is_avoided() -> None:
    """A canary goes first at its upstream, so batches go elsewhere, or are told when it has gone."""
    play = Play("a", "b", slots=1)
    await play.sing()
    at_a = play["a"].take(play.clock.now())
    round_ = asyncio.create_task(play.balance.sing("m", 20.0))
    await settle()
    play.answer_canary(play["b"])
    await settle()
    at_a.release()
    elsewhere = play.take().upstream
    in_vain = play.refused()
    await settle()
    play.answer_canary(play["a"])
    await ended(round_)

    assert elsewhere == "b"
    assert in_vain == Wait()
    assert play.take().upstream == "a"


# --- when to ask again ---


async def test_all_breakers_open() -> None:
    """(1) Where all are left alone, the error names them and asks for the shortest wait."""
    play = Play("a", "b", "c")
    await play.sing(RIGHT, RIGHT, ELSEWHERE)
    for name, wait_s in {"a": 7.0, "b": 3.0, "c": 1.0}.items():
        play[name].hand_guard.open(wait_s)
    with pytest.raises(errors.CircuitOpen) as caught:
        play.take()

    assert caught.value.message == "upstream a, b failed repeatedly and is left alone for another 3.0 s"
    assert caught.value.retry_after_s == 3.0


def deny(upstream: HandUpstream, seconds: float = 30.0) -> errors.UpstreamDenied:
    error = errors.UpstreamDenied(f"{upstream.name}: check its API key")
    error.upstream = upstream.name
    upstream.hand_pace.until, upstream.hand_pace.error = 1000.0 + seconds, error
    return error


async def test_key_is_not_accepted() -> None:
    """(1) Where no upstream accepts our key, each caller hears so, by an error of its own, until the hold is over."""
    play = Play("a", "b")
    await play.sing()
    error = deny(play["a"])
    deny(play["b"])
    with pytest.raises(errors.UpstreamDenied) as caught:
        play.take()
    with pytest.raises(errors.UpstreamDenied) as again:
        play.take()
    await play.clock.advance(30)

    assert caught.value.message == error.message
    assert len({id(error), id(caught.value), id(again.value)}) == 3
    assert play.take().upstream == "a"


async def test_key_is_not_accepted_by_one_of_two() -> None:
    """One that denies us is passed over; it decides nothing as long as another may come back."""
    play = Play("a", "b")
    await play.sing()
    deny(play["a"])
    served = play.take().upstream
    play["b"].hand_guard.open(4.0)
    with pytest.raises(errors.CircuitOpen) as caught:
        play.take()

    assert served == "b"
    assert caught.value.message == "upstream b failed repeatedly and is left alone for another 4.0 s"
    assert caught.value.retry_after_s == 4.0


async def test_no_slot_is_free() -> None:
    """(2) Where only slots are missing, nobody knows when: somebody calls."""
    play = Play("a", slots=1)
    await play.sing()
    ready: list[int] = []
    permit = play.take()
    play.model.listen(lambda: ready.append(1))
    wait = play.refused()
    permit.release()

    assert wait == Wait()
    assert ready == [1]
    play.take()


@pytest.mark.parametrize("kind", ["pace", "guard"])
async def test_no_slot_here_and_no_leave_there(kind: str) -> None:
    """(2) Where one lacks a slot, another one may be ready before it: that instant is told too, and no error."""
    play = Play("a", "b", slots=1)
    await play.sing()
    play["a"].take(play.clock.now())
    if kind == "pace":
        play["b"].hand_pace.until, play["b"].hand_pace.error = 1002.0, errors.RateLimited("later")
    else:
        play["b"].hand_guard.open(2.0)
    wait = play.refused()
    await play.clock.advance(2)

    assert wait == Wait(1002.0)
    assert play.take().upstream == "b"


async def test_limits_say_when() -> None:
    """(3) Where limits per minute are used up, the soonest says when, and nobody has said anything."""
    play = Play("a", "b")
    await play.sing()
    play["a"].hand_pace.until, play["b"].hand_pace.until = 1005.0, 1002.5

    assert play.refused() == Wait(1002.5)


async def test_upstreams_ask_for_time() -> None:
    """(3) Where all have asked for time, the soonest one's own words are told, with the wait that is left."""
    play = Play("a", "b")
    await play.sing()
    for name, until in (("a", 1005.0), ("b", 1003.0)):
        play[name].hand_pace.until = until
        play[name].hand_pace.error = errors.RateLimited(f"{name}: later", retry_after_s=60.0)
    await play.clock.advance(1)
    wait = play.refused()

    assert wait.until == 1003.0
    assert wait.error is not None
    assert wait.error is not play["b"].hand_pace.error
    assert (wait.error.message, wait.error.retry_after_s) == ("b: later", 2.0)
    assert play["b"].hand_pace.error is not None
    assert play["b"].hand_pace.error.retry_after_s == 60.0


async def test_limits_and_slots_at_once() -> None:
    """(3) An upstream that has neither rate nor slot is asked again when it has rate."""
    play = Play("a", slots=1)
    await play.sing()
    permit = play.take()
    play["a"].hand_pace.until = 1002.0
    first = play.refused()
    await play.clock.advance(2)
    second = play.refused()
    permit.release()

    assert (first, second) == (Wait(1002.0), Wait())


async def test_breaker_ends_before_the_limit() -> None:
    """(3) A breaker that lets a probe pass sooner than the limits let a call go says when."""
    play = Play("a", "b")
    await play.sing()
    play["a"].hand_pace.until = 1009.0
    play["b"].hand_guard.open(2.0)

    assert play.refused() == Wait(1002.0)


# --- further attempts ---


async def test_attempt_finds_a_slot() -> None:
    """A further attempt gets its own lease, which is charged with its tokens."""
    play = Play("a")
    await play.sing()
    play["a"].hand_pace.charged.clear()
    permit = await ended(play.retry(tokens=70.0))

    assert permit.upstream == "a"
    assert play["a"].hand_pace.charged == [70.0]
    assert play.shown["a"]["calls"] == 1


@pytest.mark.parametrize(
    ("avoid", "guarded", "expected"), [("a", "", "b"), ("b", "", "a"), ("ab", "", "a"), ("a", "b", "a"), ("", "", "a")]
)
async def test_upstream_that_has_failed_this_call(avoid: str, guarded: str, expected: str) -> None:
    """An upstream that failed the call before is asked only where there is no other."""
    play = Play("a", "b")
    await play.sing()
    for name in guarded:
        play[name].hand_guard.open(5.0)

    assert (await ended(play.retry(avoid=frozenset(avoid)))).upstream == expected


async def test_failover_among_right_ones_only() -> None:
    """A further attempt goes to no upstream that has not shown the right vectors, though the others have failed it."""
    play = Play("a", "b")
    await play.sing(RIGHT, ELSEWHERE)

    assert (await ended(play.retry(avoid=frozenset("a")))).upstream == "a"


async def test_attempts_wait_in_order() -> None:
    """Attempts that wait for a slot get it first come, first served, also after a call in vain."""
    play = Play("a", slots=1)
    await play.sing()
    busy = play.take()
    retries = [play.retry(str(n)) for n in range(4)]
    await settle()
    waiting = play.balance.snapshot()["m"]["waiting_attempts"]
    play["a"].tell()
    await settle()
    order = []
    busy.release()
    for _ in range(4):
        await settle()
        order.append([n for n, retry in enumerate(retries) if retry.done()])
        retries[order[-1][-1]].result().release()

    assert waiting == 4
    assert order == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


async def test_attempts_go_before_new_batches() -> None:
    """While an attempt waits, a free slot is its; new batches are told when it has gone."""
    play = Play("a", slots=1)
    await play.sing()
    busy = play.take()
    retry = play.retry()
    await settle()
    ready: list[int] = []
    play.model.listen(lambda: ready.append(1))
    busy.release()
    in_vain = play.refused()  # asked in the same turn of the loop
    before = len(ready)
    await settle()
    retry.result().release()

    assert in_vain == Wait()
    assert len(ready) >= before + 2
    play.take()


async def test_large_attempt_is_not_starved() -> None:
    """An attempt that needs much of the limit waits for it at the head: small batches do not use it up meanwhile."""
    play = Play("a")
    await play.sing()
    play["a"].hand_pace.needs = {500.0: 8.0}
    retry = play.retry(tokens=500.0)
    await settle()
    in_vain = play.refused()
    await play.clock.advance(7.9)
    play["a"].hand_pace.needs = {}
    was_waiting = not retry.done()
    await play.clock.advance(0.1)

    assert in_vain == Wait()
    assert was_waiting
    assert retry.done()
    play.take()


@pytest.mark.parametrize("is_called", [False, True])
async def test_waiting_attempt_leaves(is_called: bool) -> None:
    """An attempt whose callers leave passes its turn on, also when it has just been called; no slot is lost."""
    play = Play("a", slots=1)
    await play.sing()
    busy = play.take()
    first, second = play.retry(), play.retry()
    await settle()
    if is_called:
        busy.release()
    first.cancel()
    await settle()
    if not is_called:
        busy.release()
        await settle()
    second.result().release()

    assert first.cancelled()
    assert play.shown["a"]["calls"] == 0
    play.take()


async def test_breaker_opens_while_attempts_wait() -> None:
    """When all that is left is left alone, everybody who waits hears so at once, not the first one only."""
    play = Play("a", slots=1)
    await play.sing()
    permit = play.take()
    task, call = await called(play, permit)
    retries = [play.retry() for _ in range(3)]
    await settle()
    play["a"].hand_guard.open(10.0)
    call.fail(errors.UpstreamFailed("it broke"))
    await asyncio.gather(task, return_exceptions=True)
    await settle()

    assert [type(retry.exception()) for retry in retries] == [errors.CircuitOpen] * 3


async def test_attempts_go_on_elsewhere() -> None:
    """Attempts that wait for a slot when the breaker of that upstream opens go on at the other one."""
    play = Play("a", "b", slots=1)
    await play.sing()
    at_a, at_b = play.take(), play.take()
    retries = [play.retry(avoid=frozenset("b")) for _ in range(2)]
    await settle()
    play[at_a.upstream].hand_guard.open(10.0)
    at_a.release()
    await settle()
    was_waiting = [retry.done() for retry in retries]
    at_b.release()
    await settle()

    assert was_waiting == [False, False]
    assert retries[0].result().upstream == "b"
    retries[1].cancel()


async def test_upstream_turns_wrong_while_attempts_wait() -> None:
    """When the only upstream is refused by its canary, nobody waits for a slot of it any more."""
    play = Play("a", slots=2)
    await play.sing()
    busy = play.take()
    round_ = asyncio.create_task(play.balance.sing("m", 20.0))
    await settle()
    retries = [play.retry() for _ in range(2)]
    await play.clock.advance(1)
    play["a"].limit.overloaded(play.clock.now(), 1000.0)  # one slot is left, and that is in use
    play.answer_canary(play["a"], ELSEWHERE)
    await ended(round_)
    await settle()

    assert [type(retry.exception()) for retry in retries] == [errors.NoUpstream] * 2
    busy.release()


async def test_no_slot_before_the_deadline() -> None:
    """An attempt waits no longer than its deadline allows, and says so."""
    play = Play("a", slots=1)
    await play.sing()
    play.take()
    retry = play.retry(deadline=1004.0)
    await play.clock.advance(3.9)
    was_waiting = not retry.done()
    await play.clock.advance(0.1)

    assert was_waiting
    with pytest.raises(errors.DeadlineExceeded):
        await ended(retry)


@pytest.mark.parametrize(("until", "is_refused"), [(1003.9, False), (1004.0, True), (1010.0, True)])
async def test_hold_ends_after_the_deadline(until: float, is_refused: bool) -> None:
    """An attempt hears the upstream's own words at once where it has asked for more time than there is."""
    play = Play("a")
    await play.sing()
    play["a"].hand_pace.until, play["a"].hand_pace.error = until, errors.RateLimited("later", retry_after_s=60.0)
    retry = play.retry(deadline=1004.0)
    await settle()
    is_over = retry.done()
    await play.clock.advance(3.95)

    assert is_over is is_refused
    if is_refused:
        error = retry.exception()
        assert isinstance(error, errors.RateLimited)
        assert error.retry_after_s == pytest.approx(until - 1000.0)
    else:
        assert retry.result().upstream == "a"


# --- who is told ---


async def test_listeners() -> None:
    """Whoever listens is told of each change; whoever does not any more, of none; to leave twice is no harm."""
    play = Play("a")
    told: list[str] = []

    def ready() -> None:
        told.append("x")

    play.model.listen(ready)
    play["a"].tell()
    before = len(told)
    play.model.unlisten(ready)
    play.model.unlisten(ready)
    play["a"].tell()

    assert (before, len(told)) == (1, 1)


async def test_pipelines_share_a_model() -> None:
    """It hears of its upstreams' slots once, however many pipelines it serves, until the last one closes."""
    play = Play("a")
    heard = [len(play["a"]._listeners)]
    for step in (play.model.open, play.model.close, play.model.close):
        step()
        heard.append(len(play["a"]._listeners))

    assert heard == [1, 1, 1, 0]
    assert play.model.upstreams() == [play["a"]]


# --- the outlook ---


async def test_outlook_before_anything() -> None:
    """Nothing is known, nothing can be taken."""
    assert Play("a").model.outlook() == Outlook(0, 0)


async def test_outlook() -> None:
    """It sums up right upstreams whose breaker lets calls pass; of times the longest count."""
    play = Play("a", "b", "c", "d")
    await play.sing(RIGHT, RIGHT, RIGHT, ELSEWHERE)
    await taught(play, "a", 0.03, 0.001)
    await taught(play, "b", 0.02, 0.005)
    play["c"].hand_guard.open(5.0)
    play["a"].take(play.clock.now())
    outlook = play.model.outlook()

    assert (outlook.slots, outlook.busy, outlook.is_paced) == (8, 1, False)
    assert outlook.fixed_s == pytest.approx(0.03)
    assert outlook.per_input_s == pytest.approx(0.005)


async def test_outlook_with_fewer_slots_than_calls() -> None:
    """Where slots have become fewer than calls, all of them are busy, and no more."""
    play = Play("a", slots=10)
    await play.sing()
    for _ in range(10):
        play.take()
    play["a"].limit.overloaded(2000.0, 1500.0)

    assert play.model.outlook() == Outlook(6, 6)


@pytest.mark.parametrize(
    ("interval_s", "fixed_s", "is_paced"),
    [(0.0, 0.0, False), (0.0, 0.1, False), (0.001, 0.0, True), (0.1, 0.1, True), (0.02, 0.1, False), (0.03, 0.1, True)],
)
async def test_outlook_under_a_request_limit(interval_s: float, fixed_s: float, is_paced: bool) -> None:
    """Requests per minute are the bottleneck where calls have to be further apart than all slots could send them."""
    play = Play("a", slots=4)
    await play.sing()
    if fixed_s:
        await taught(play, "a", fixed_s, 0.001)
    play["a"].hand_pace.interval_s = interval_s

    assert play.model.outlook().is_paced is is_paced


# --- looking ---


async def test_breakers_of_a_model() -> None:
    """It tells whether a breaker is not closed, and when the next one lets a probe pass."""
    play = Play("a", "b")
    await play.sing()
    before = (play.model.is_guarded, play.model.rest_s())
    play["a"].hand_guard.open(7.0)
    play["b"].hand_guard.open(3.0)
    during = (play.model.is_guarded, play.model.rest_s())
    await play.clock.advance(5)
    later = play.model.rest_s()
    await play.clock.advance(2)

    assert (before, during) == ((False, 0.0), (True, 3.0))
    assert later == 2.0
    assert (play.model.is_guarded, play.model.rest_s()) == (True, 0.0)


async def test_snapshot() -> None:
    """The snapshot says of each upstream how it stands and how old its last right vector is."""
    play = Play("a", "b", slots=2)
    before = play.shown["a"]["right_vector_age_s"]
    await play.sing(RIGHT, errors.UpstreamFailed("down"))
    await play.clock.advance(5)
    canary_age = play.shown["a"]["right_vector_age_s"]
    task, call = await called(play, play.take())
    during = play.shown["a"]["calls"]
    call.answer(answer())
    await task
    await play.clock.advance(1)
    numbers = {"calls": 0, "haunted_slots": 0, "waiting_canaries": 0, "slots": 2, "inflation": 1.0}

    assert before is None
    assert canary_age == 5.0
    assert during == 1
    assert play.model.snapshot() == {
        "dimensions": 8,
        "waiting_attempts": 0,
        "upstreams": {
            "a": {
                "is_verified": True,
                "problem": "",
                "right_vector_age_s": 1.0,
                **numbers,
                "latency": {"m": {"fixed_ms": 0.0, "per_input_ms": 0.0}},
            },
            "b": {"is_verified": False, "problem": "down", "right_vector_age_s": None, **numbers, "latency": {}},
        },
    }


async def test_wait_that_is_over_while_it_is_looked_at() -> None:
    """A limit whose wait ends between two looks is no lack of slots: the answer names an instant, or is a slot."""
    play = Play("a")
    await play.sing()
    waits = iter([1e-6, 0.0, 0.0])
    play["a"].hand_pace.wait_s = lambda least, wish: next(waits)  # type: ignore[method-assign]

    found = play.model.take(1.0, 1.0)

    assert isinstance(found, Wait)
    assert found.until == pytest.approx(play.clock.now() + 1e-6)
