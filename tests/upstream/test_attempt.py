"""The tries of one call: the pure rule first, then the loop around it."""

from __future__ import annotations

import asyncio
import random

import pytest

from proxy.base import errors
from proxy.base.messages import Answer, Batch
from proxy.base.settings import AttemptSettings
from proxy.upstream.attempt import Attempt, wait_s
from tests.fakes.clock import HandClock, settle
from tests.fakes.stage import AnsweringStage, ScriptedStage, make_batch, rows_of

SETTINGS = AttemptSettings(max_attempts=3, backoff_base_s=0.1, backoff_max_s=5.0, retry_after_max_s=30.0)
AT_ONCE = AttemptSettings(max_attempts=3, backoff_base_s=0.0)


class Highest(random.Random):
    """Chance that always draws the upper bound."""

    def uniform(self, a: float, b: float) -> float:
        return b


class Lowest(random.Random):
    """Chance that always draws the lower bound."""

    def uniform(self, a: float, b: float) -> float:
        return a


def answer_to(batch: Batch) -> Answer:
    return Answer(rows_of(batch.inputs), 3, "u")


def failed(retry_after_s: float | None = None) -> errors.UpstreamFailed:
    return errors.UpstreamFailed("it broke", retry_after_s=retry_after_s)


async def ended(call: asyncio.Task[Answer]) -> Answer:
    """Wait for the end of a call; fails the test when it does not come within five seconds."""
    async with asyncio.timeout(5):
        return await call


# --- the rule ---


@pytest.mark.parametrize(
    "error_class", [errors.RateLimited, errors.UpstreamFailed, errors.UpstreamTimeout, errors.BadVectors]
)
def test_error_of_one_exchange(error_class: type[errors.EmbeddingError]) -> None:
    """What went wrong in one exchange may go right in the next."""
    wait = wait_s(error_class("no"), 1, SETTINGS, left_s=10, rng=Highest())

    assert wait == pytest.approx(0.1)


@pytest.mark.parametrize(
    "error",
    [
        errors.CircuitOpen("no", retry_after_s=0.0),
        errors.NoUpstream("no", retry_after_s=0.0),
        errors.DeadlineExceeded("no"),
        errors.UpstreamDenied("no"),
        errors.UpstreamRefused("no", status=400),
        errors.InvalidRequest("no"),
        errors.Overloaded("no"),
        errors.EmbeddingError("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_that_stays_the_same(error: errors.EmbeddingError) -> None:
    """What is no failure of one exchange is not tried again."""
    wait = wait_s(error, 1, SETTINGS, left_s=10, rng=Highest())

    assert wait is None


@pytest.mark.parametrize(("attempt", "is_retried"), [(1, True), (2, True), (3, False), (4, False)])
def test_attempts_around_their_bound(attempt: int, is_retried: bool) -> None:
    """There are `max_attempts` tries, the first included."""
    wait = wait_s(failed(), attempt, SETTINGS, left_s=10, rng=Highest())

    assert (wait is not None) == is_retried


@pytest.mark.parametrize(("attempt", "longest_s"), [(1, 0.1), (2, 0.2), (3, 0.4), (6, 3.2), (7, 5.0), (18, 5.0)])
def test_backoff_doubles_up_to_its_cap(attempt: int, longest_s: float) -> None:
    """The wait before try n is drawn from 0 to base × 2ⁿ⁻², and never above the cap."""
    settings = AttemptSettings(max_attempts=20, backoff_base_s=0.1, backoff_max_s=5.0)

    assert wait_s(failed(), attempt, settings, left_s=10, rng=Highest()) == pytest.approx(longest_s)
    assert wait_s(failed(), attempt, settings, left_s=10, rng=Lowest()) == 0


def test_jitter_fills_its_range() -> None:
    """Jitter is full: waits spread evenly from nothing to the bound, so those that failed together come apart."""
    rng = random.Random(7)
    waits = sorted(wait_s(failed(), 2, SETTINGS, left_s=10, rng=rng) or 0.0 for _ in range(1000))

    assert 0 <= waits[0] < 0.002
    assert 0.198 < waits[-1] <= 0.2
    assert waits[500] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("retry_after_s", "wait"),
    [(0.0, 0.1), (1.0, 1.1), (29.99, 30.09), (30.0, 30.1), (30.01, None), (86_400.0, None)],
)
def test_upstream_asks_for_a_wait(retry_after_s: float, wait: float | None) -> None:
    """Retry-After is obeyed, with jitter on top, up to its cap; beyond it the call ends."""
    found = wait_s(failed(retry_after_s), 1, SETTINGS, left_s=100, rng=Highest())

    assert found == (None if wait is None else pytest.approx(wait))


@pytest.mark.parametrize(("left_s", "is_retried"), [(1.2, True), (1.11, True), (1.1, False), (1.0, False), (-1, False)])
def test_deadline_comes_before_the_next_attempt(left_s: float, is_retried: bool) -> None:
    """Nobody waits for an attempt that would begin at the deadline or after it."""
    wait = wait_s(failed(retry_after_s=1.0), 1, SETTINGS, left_s=left_s, rng=Highest())

    assert (wait is not None) == is_retried


# --- the stage ---


def stage(inner: object, settings: AttemptSettings = AT_ONCE, clock: HandClock | None = None) -> Attempt:
    return Attempt(settings, inner, clock=clock or HandClock(), rng=Highest())  # type: ignore[arg-type]


async def test_first_attempt_succeeds() -> None:
    """A call that succeeds at once takes one attempt, and its batch goes on as it came."""
    inner = AnsweringStage(answer_to)
    attempt = stage(inner)
    batch = make_batch(["one", "two"])
    answer = await attempt(batch)

    assert answer == Answer(rows_of(["one", "two"]), 3, "u", attempts=1)
    assert inner.messages == [batch]
    assert attempt.snapshot() == {"calls": 1, "attempts": 1}


async def test_success_after_failures() -> None:
    """The answer says how many attempts it took, failed ones included."""
    inner = ScriptedStage()
    attempt = stage(inner)
    batch = make_batch()
    call = asyncio.create_task(attempt(batch))
    (await inner.next()).fail(failed())
    (await inner.next()).fail(errors.BadVectors("nonsense"))
    (await inner.next()).answer(answer_to(batch))
    answer = await ended(call)

    assert answer.attempts == 3
    assert answer.rows == rows_of(batch.inputs)
    assert [c.message.inputs for c in inner.calls] == [batch.inputs] * 3
    assert attempt.snapshot() == {"calls": 1, "attempts": 3}


async def test_next_attempt_knows_who_failed() -> None:
    """Each attempt names the upstreams that have failed this call before, and no other call's."""
    inner = ScriptedStage()
    attempt = stage(inner)
    call = asyncio.create_task(attempt(make_batch()))
    for upstream in ("a", "b"):
        error = failed()
        error.upstream = upstream
        (await inner.next()).fail(error)
    (await inner.next()).answer(answer_to(make_batch()))
    await ended(call)
    other = asyncio.create_task(attempt(make_batch()))
    (await inner.next()).answer(answer_to(make_batch()))
    await ended(other)

    assert [set(c.message.avoid) for c in inner.calls] == [set(), {"a"}, {"a", "b"}, set()]


async def test_all_attempts_fail() -> None:
    """After the last attempt its own error is raised, not the first one's and not a wrapper's."""
    inner = ScriptedStage()
    call = asyncio.create_task(stage(inner)(make_batch()))
    last = errors.RateLimited("third")
    for error in (failed(), errors.UpstreamTimeout("second"), last):
        (await inner.next()).fail(error)
    with pytest.raises(errors.RateLimited) as caught:
        await ended(call)

    assert caught.value is last
    assert len(inner.calls) == 3


async def test_refusal_is_tried_once() -> None:
    """A request that the upstream finds wrong is not sent again."""
    refusal = errors.UpstreamRefused("no", status=400)
    inner = AnsweringStage(lambda batch: refusal)
    with pytest.raises(errors.UpstreamRefused) as caught:
        await stage(inner)(make_batch())

    assert caught.value is refusal
    assert len(inner.messages) == 1


async def test_bug_in_a_stage_below() -> None:
    """An exception that is none of ours passes through at the first attempt, since it would hide a bug."""
    inner = AnsweringStage(lambda batch: ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        await stage(inner)(make_batch())

    assert len(inner.messages) == 1


async def test_single_attempt_allowed() -> None:
    """With `max_attempts` of one there is no second try."""
    inner = AnsweringStage(lambda batch: failed())
    with pytest.raises(errors.UpstreamFailed):
        await stage(inner, AttemptSettings(max_attempts=1, backoff_base_s=0))(make_batch())

    assert len(inner.messages) == 1


async def test_deadline_passes_during_an_attempt() -> None:
    """The time left is read after each attempt, so one that ended too late is the last."""
    clock = HandClock()
    inner = ScriptedStage()
    call = asyncio.create_task(stage(inner, clock=clock)(make_batch(deadline=clock.now() + 2)))
    (await inner.next()).fail(failed())
    second = await inner.next()
    await clock.advance(2)
    second.fail(errors.UpstreamTimeout("too slow"))
    with pytest.raises(errors.UpstreamTimeout):
        await ended(call)

    assert len(inner.calls) == 2


async def test_caller_leaves_during_an_attempt() -> None:
    """A cancellation reaches the attempt under way, and no other attempt follows."""
    inner = ScriptedStage()
    call = asyncio.create_task(stage(inner)(make_batch()))
    attempt = await inner.next()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ended(call)
    await settle()

    assert attempt.was_cancelled
    assert len(inner.calls) == 1


async def test_caller_leaves_between_attempts() -> None:
    """A cancellation ends the wait before the next attempt, which never happens."""
    inner = ScriptedStage()
    settings = AttemptSettings(max_attempts=3, backoff_base_s=0, retry_after_max_s=3600)
    call = asyncio.create_task(stage(inner, settings)(make_batch(deadline=1e9)))
    (await inner.next()).fail(failed(retry_after_s=3000))
    await settle()
    is_waiting = not call.done()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ended(call)
    await settle()

    assert is_waiting
    assert len(inner.calls) == 1


async def test_time_of_all_attempts() -> None:
    """The time upstream is that of all attempts together, without the wait for a slot."""
    clock = HandClock()
    inner = ScriptedStage()
    call = asyncio.create_task(stage(inner, clock=clock)(make_batch()))
    first = await inner.next()
    await clock.advance(2)
    first.fail(failed())
    second = await inner.next()
    await clock.advance(4)
    second.answer(Answer(rows_of(["a text"]), 1, "u", queue_s=1.0, upstream_s=3.0))
    answer = await ended(call)

    assert answer.upstream_s == pytest.approx(5.0)
    assert answer.queue_s == 1.0


async def test_calls_at_a_time_count_for_themselves() -> None:
    """Concurrent calls share nothing: each has its own attempts."""
    inner = ScriptedStage()
    attempt = stage(inner)
    first = asyncio.create_task(attempt(make_batch(["first"])))
    failing = await inner.next()
    second = asyncio.create_task(attempt(make_batch(["second"])))
    (await inner.next()).answer(Answer(rows_of(["second"]), 1, "u"))
    failing.fail(failed())
    (await inner.next()).answer(Answer(rows_of(["first"]), 1, "u"))
    answers = await ended(first), await ended(second)

    assert [answer.attempts for answer in answers] == [2, 1]
    assert [answer.rows for answer in answers] == [rows_of(["first"]), rows_of(["second"])]
    assert attempt.snapshot() == {"calls": 2, "attempts": 3}


async def test_close() -> None:
    """Closing closes what follows."""
    inner = ScriptedStage()
    await stage(inner).aclose()

    assert inner.is_closed
