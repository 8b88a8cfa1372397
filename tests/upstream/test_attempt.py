"""The tries of one call: the pure rules first, then the loop around them."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base import errors
from proxy.base.messages import Answer, Batch, Limits
from proxy.base.settings import AttemptSettings
from proxy.upstream.attempt import Attempt, Budget, wait_s
from tests.fakes.clock import HandClock, settle
from tests.fakes.stage import AnsweringStage, Call, ScriptedStage, make_batch, rows_of

SETTINGS = AttemptSettings(max_attempts=3, backoff_base_s=0.1, backoff_max_s=5.0)
AT_ONCE = AttemptSettings(max_attempts=3, backoff_base_s=0.0)


class Highest(random.Random):
    """Chance that always draws the upper bound."""

    def uniform(self, a: float, b: float) -> float:
        return b


class Lowest(random.Random):
    """Chance that always draws the lower bound."""

    def uniform(self, a: float, b: float) -> float:
        return a


class Lease:
    """Permission for one attempt, which remembers what became of it."""

    def __init__(self) -> None:
        self.upstream = "u"
        self.limits = Limits(1, 1)
        self.generation = 0
        self.is_probe = False
        self.uses = self.releases = 0

    def charge(self, tokens: float) -> None: ...

    def release(self) -> None:
        self.releases += 1


class Leases:
    """Gives leases to further attempts: at once, when the test says so, or not at all."""

    def __init__(self) -> None:
        self.given: list[Lease] = []
        self.asked: list[Batch] = []
        self.gate: asyncio.Event | None = None
        self.error: errors.EmbeddingError | None = None

    async def __call__(self, batch: Batch) -> Lease:
        self.asked.append(batch)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.given.append(Lease())
        return self.given[-1]


class Releasing:
    """In place of balance: uses the lease for one exchange and releases it, however that ends."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def __call__(self, batch: Batch) -> Answer:
        lease = batch.lease
        assert isinstance(lease, Lease)
        lease.uses += 1
        try:
            return await self._inner(batch)  # type: ignore[no-any-return]
        finally:
            lease.release()

    def snapshot(self) -> dict[str, Any]:
        return {}

    async def aclose(self) -> None:
        await self._inner.aclose()


class Play:
    """The stage between a scripted exchange and leases that the test gives."""

    def __init__(
        self, inner: Any = None, *, settings: AttemptSettings = AT_ONCE, rng: random.Random | None = None
    ) -> None:
        self.clock = HandClock()
        self.inner = inner or ScriptedStage()
        self.leases = Leases()
        self.first = Lease()
        self.attempt = Attempt(
            settings, Releasing(self.inner), lease=self.leases, clock=self.clock, rng=rng or Highest()
        )

    def batch(self, *inputs: str, **changes: Any) -> Batch:
        self.first = Lease()
        return make_batch(inputs or ("a text",), **{"lease": self.first, **changes})

    def called(self, *inputs: str, **changes: Any) -> asyncio.Task[Answer]:
        return asyncio.create_task(self.attempt(self.batch(*inputs, **changes)))

    @property
    def all_leases(self) -> list[Lease]:
        return [self.first, *self.leases.given]

    @property
    def shown(self) -> dict[str, Any]:
        return dict(self.attempt.snapshot())


def answer_to(batch: Batch, **more: Any) -> Answer:
    return Answer(rows_of(batch.inputs), 3, "u", **more)


def failed(upstream: str = "u", **options: Any) -> errors.UpstreamFailed:
    error = errors.UpstreamFailed("it broke", **options)
    error.upstream = upstream
    return error


def all_errors() -> list[errors.EmbeddingError]:
    """Make one of each error of the house."""
    made = []
    for name, error_class in sorted(vars(errors).items()):
        if inspect.isclass(error_class) and issubclass(error_class, errors.EmbeddingError):
            made.append(error_class("no", status=400) if name == "UpstreamRefused" else error_class("no"))
    return made


async def ended(call: asyncio.Task[Answer]) -> Answer:
    """Wait for the end of a call; fails the test when it does not come within five seconds."""
    async with asyncio.timeout(5):
        return await call


def waits(error: errors.EmbeddingError, attempt: int = 1, **changes: Any) -> float | None:
    values: dict[str, Any] = {"settings": SETTINGS, "inputs": 1, "left_s": 10.0, "rng": Highest()}
    values |= changes
    return wait_s(error, attempt, values.pop("settings"), **values)


# --- the rule ---

MAY_SUCCEED = {"RateLimited", "UpstreamFailed", "UpstreamTimeout", "BadVectors", "UpstreamDenied"}


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: type(error).__name__)
def test_what_may_succeed(error: errors.EmbeddingError) -> None:
    """What went wrong in one exchange may go right in the next, here or elsewhere; all else stays the same."""
    assert (waits(error) is not None) == (type(error).__name__ in MAY_SUCCEED)


@pytest.mark.parametrize(("attempt", "is_retried"), [(1, True), (2, True), (3, False), (4, False)])
def test_attempts_around_their_bound(attempt: int, is_retried: bool) -> None:
    """There are `max_attempts` tries, the first included."""
    assert (waits(failed(), attempt) is not None) == is_retried


@pytest.mark.parametrize(("attempt", "longest_s"), [(1, 0.1), (2, 0.2), (3, 0.4), (6, 3.2), (7, 5.0), (18, 5.0)])
def test_backoff_doubles_up_to_its_cap(attempt: int, longest_s: float) -> None:
    """The wait before try n is drawn from 0 to base × 2ⁿ⁻², and never above the cap."""
    settings = AttemptSettings(max_attempts=20, backoff_base_s=0.1, backoff_max_s=5.0)

    assert waits(failed(), attempt, settings=settings) == pytest.approx(longest_s)
    assert waits(failed(), attempt, settings=settings, rng=Lowest()) == 0


def test_jitter_fills_its_range() -> None:
    """Jitter is full: waits spread evenly from nothing to the bound, so those that failed together come apart."""
    rng = random.Random(7)
    found = sorted(waits(failed(), 2, rng=rng) or 0.0 for _ in range(1000))

    assert 0 <= found[0] < 0.002
    assert 0.198 < found[-1] <= 0.2
    assert found[500] == pytest.approx(0.1, abs=0.01)


def test_jitter_is_drawn_from_what_was_passed_in() -> None:
    """The same seed gives the same waits."""
    first, second = ([waits(failed(), 2, rng=rng) for _ in range(5)] for rng in (random.Random(3), random.Random(3)))

    assert first == second


@pytest.mark.parametrize(
    ("left_s", "is_retried"), [(0.11, True), (0.1, False), (0.05, False), (0.0, False), (-1, False)]
)
def test_deadline_comes_before_the_next_attempt(left_s: float, is_retried: bool) -> None:
    """Nobody waits for an attempt that would begin at the deadline or after it."""
    assert (waits(failed(), left_s=left_s) is not None) == is_retried


@pytest.mark.parametrize(
    ("error", "inputs", "is_retried"),
    [
        (failed(may_be_poison=True), 1, True),
        (failed(may_be_poison=True), 2, False),
        (failed(), 2, True),
        (errors.BadVectors("no", index=0), 1, True),
        (errors.BadVectors("no", index=0), 2, False),
        (errors.BadVectors("no"), 2, True),
    ],
)
def test_batch_with_a_suspect(error: errors.EmbeddingError, inputs: int, is_retried: bool) -> None:
    """A batch that may have failed for one of its inputs is not repeated as it is; alone, an input has another try."""
    assert (waits(error, inputs=inputs) is not None) == is_retried


# --- the budget ---


def test_budget_at_the_start() -> None:
    """A few retries are there from the start."""
    budget = Budget(0.2)

    assert [budget.spend(0.0) for _ in range(12)] == [True] * 10 + [False] * 2


def test_budget_grows_with_calls() -> None:
    """Beyond the free ones it is a share of the calls: of fifty, ten."""
    budget = Budget(0.2)
    while budget.spend(0.0):
        pass
    for _ in range(50):
        budget.earn(0.0)

    assert sum(budget.spend(0.0) for _ in range(20)) in (9, 10)  # sums of 0.2 are not exact


@pytest.mark.parametrize(("idle_s", "expected"), [(0.0, 0), (4.9, 0), (5.1, 1), (26.0, 5), (51.0, 10), (1e6, 10)])
def test_budget_comes_back_with_time(idle_s: float, expected: int) -> None:
    """At a call now and then a share would be none at all: the free ones come back, one each five seconds."""
    budget = Budget(0.2)
    while budget.spend(0.0):
        pass

    assert sum(budget.spend(idle_s) for _ in range(20)) == expected


def test_budget_has_a_cap() -> None:
    """A good day saves up a hundred retries for a bad one, no more; and time takes none of them away."""
    budget = Budget(0.2)
    for n in range(10_000):
        budget.earn(float(n))

    assert budget.left == 100
    assert sum(budget.spend(20_000.0) for _ in range(200)) == 100


def test_no_budget() -> None:
    """With a ratio of zero there are no retries, free ones included."""
    budget = Budget(0.0)
    budget.earn(0.0)

    assert not budget.spend(1e6)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    st.lists(st.tuples(st.sampled_from([0.0, 0.001, 1.0, 60.0]), st.integers(0, 5)), max_size=300),
)
def test_budget_over_any_time(ratio: float, calls: list[tuple[float, int]]) -> None:
    """Whatever happens, there are no more retries than the share of the calls and the free ones."""
    budget, now, spent = Budget(ratio), 0.0, 0
    for count, (gap_s, wanted) in enumerate(calls, 1):
        now += gap_s
        budget.earn(now)
        spent += sum(budget.spend(now) for _ in range(wanted))
        assert spent <= (ratio * count + 10 + 0.2 * now if ratio else 0) + 1e-6


# --- the stage ---


async def test_first_attempt_succeeds() -> None:
    """A call that succeeds at once takes one attempt, and its batch goes on as it came, with the lease it has."""
    play = Play(AnsweringStage(answer_to))
    batch = play.batch("one", "two")
    answer = await play.attempt(batch)

    assert answer == Answer(rows_of(["one", "two"]), 3, "u", attempts=1)
    assert play.inner.messages == [batch]
    assert play.leases.asked == []
    assert (play.first.uses, play.first.releases) == (1, 1)
    assert play.shown == {"calls": 1, "attempts": 1, "retries_left": 10.2, "retries_refused": 0}


async def test_success_after_failures() -> None:
    """The answer says how many attempts it took, failed ones included; each further one has a lease of its own."""
    play = Play()
    call = play.called()
    (await play.inner.next()).fail(failed())
    (await play.inner.next()).fail(errors.BadVectors("nonsense"))
    third = await play.inner.next()
    third.answer(answer_to(third.message))
    answer = await ended(call)

    assert answer.attempts == 3
    assert answer.rows == rows_of(["a text"])
    assert [one.message.lease for one in play.inner.calls] == play.all_leases
    assert [(lease.uses, lease.releases) for lease in play.all_leases] == [(1, 1)] * 3
    assert play.shown == {"calls": 1, "attempts": 3, "retries_left": 8.2, "retries_refused": 0}


async def test_next_attempt_knows_who_failed() -> None:
    """Each attempt names the upstreams that have failed this call before, and no other call's."""
    play = Play()
    call = play.called()
    for upstream in ("a", "b"):
        (await play.inner.next()).fail(failed(upstream))
    third = await play.inner.next()
    third.answer(answer_to(third.message))
    await ended(call)
    other = play.called()
    fourth = await play.inner.next()
    fourth.answer(answer_to(fourth.message))
    await ended(other)

    assert [set(batch.avoid) for batch in play.leases.asked] == [{"a"}, {"a", "b"}]
    assert [set(one.message.avoid) for one in play.inner.calls] == [set(), {"a"}, {"a", "b"}, set()]


async def test_all_attempts_fail() -> None:
    """After the last attempt its own error is raised, not the first one's and not a wrapper's."""
    play = Play()
    call = play.called()
    last = errors.RateLimited("third")
    for error in (failed(), errors.UpstreamTimeout("second"), last):
        (await play.inner.next()).fail(error)
    with pytest.raises(errors.RateLimited) as caught:
        await ended(call)

    assert caught.value is last
    assert len(play.inner.calls) == 3


async def test_refusal_is_tried_once() -> None:
    """A request that the upstream finds wrong is not sent again, and takes nothing from the budget."""
    refusal = errors.UpstreamRefused("no", status=400)
    play = Play(AnsweringStage(lambda batch: refusal))
    with pytest.raises(errors.UpstreamRefused) as caught:
        await play.attempt(play.batch())

    assert caught.value is refusal
    assert play.shown == {"calls": 1, "attempts": 1, "retries_left": 10.2, "retries_refused": 0}


async def test_bug_in_a_stage_below() -> None:
    """An exception that is none of ours passes through at the first attempt, since it would hide a bug."""
    play = Play(AnsweringStage(lambda batch: ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        await play.attempt(play.batch())

    assert len(play.inner.messages) == 1


@pytest.mark.parametrize("most", [1, 2, 20])
async def test_bound_of_the_settings(most: int) -> None:
    """There are as many tries as the settings say; the library's own bound is not in the way."""
    play = Play(
        AnsweringStage(lambda batch: failed()),
        settings=AttemptSettings(max_attempts=most, backoff_base_s=0, retry_ratio=1),
    )
    for _ in range(100):
        play.attempt._budget.earn(0.0)
    with pytest.raises(errors.UpstreamFailed):
        await play.attempt(play.batch())

    assert len(play.inner.messages) == most


async def test_no_lease_for_another_attempt() -> None:
    """Where nobody can be asked any more, that is the call's end, and no attempt."""
    play = Play()
    call = play.called()
    play.leases.error = errors.CircuitOpen("left alone")
    (await play.inner.next()).fail(failed())
    with pytest.raises(errors.CircuitOpen):
        await ended(call)

    assert len(play.leases.asked) == 1
    assert play.shown["attempts"] == 1


async def test_lease_that_would_come_too_late() -> None:
    """An error that may succeed in an exchange ends the call when it comes instead of a lease: nobody was asked."""
    play = Play()
    call = play.called()
    play.leases.error = errors.RateLimited("left alone for longer than you have")
    (await play.inner.next()).fail(failed())
    with pytest.raises(errors.RateLimited):
        await ended(call)

    assert len(play.leases.asked) == 1


async def test_budget_is_empty() -> None:
    """When everything fails, retries end with the budget, and every further call has one attempt."""
    play = Play(AnsweringStage(lambda batch: failed()))
    for _ in range(1000):
        with pytest.raises(errors.UpstreamFailed):
            await play.attempt(play.batch())
    retries = play.shown["attempts"] - play.shown["calls"]

    assert 0.19 * 1000 <= retries <= 0.2 * 1000 + 10
    assert play.shown["retries_refused"] >= 700
    assert play.shown["retries_left"] <= 1  # rounded


async def test_others_take_from_the_budget() -> None:
    """Whoever else tries again takes from the same budget."""
    play = Play(AnsweringStage(lambda batch: failed()))
    taken = [play.attempt.may_retry() for _ in range(12)]
    with pytest.raises(errors.UpstreamFailed):
        await play.attempt(play.batch())

    assert taken == [True] * 10 + [False] * 2
    assert play.shown == {"calls": 1, "attempts": 1, "retries_left": 0.2, "retries_refused": 3}


# --- waiting ---


async def test_wait_before_the_next_attempt() -> None:
    """The jittered wait is waited out on our clock, before anybody is asked for a lease."""
    play = Play(settings=SETTINGS)
    call = play.called()
    (await play.inner.next()).fail(failed())
    await play.clock.advance(0.099)
    before = len(play.leases.asked)
    await play.clock.advance(0.001)
    second = await play.inner.next()
    second.fail(failed())
    await play.clock.advance(0.2)
    third = await play.inner.next()
    third.answer(answer_to(third.message))
    await ended(call)

    assert before == 0
    assert play.clock.now() == pytest.approx(1000.3)


async def test_deadline_passes_during_an_attempt() -> None:
    """The time left is read after each attempt, so one that ended too late is the last."""
    play = Play()
    call = play.called(deadline=play.clock.now() + 2)
    (await play.inner.next()).fail(failed())
    second = await play.inner.next()
    await play.clock.advance(2)
    second.fail(errors.UpstreamTimeout("too slow"))
    with pytest.raises(errors.UpstreamTimeout):
        await ended(call)

    assert len(play.inner.calls) == 2
    assert play.shown["retries_left"] == 9.2  # the second failure took nothing


async def test_time_of_all_attempts() -> None:
    """Time upstream is that of all exchanges, queue time that of all waits for a slot; back-off is in neither."""
    play = Play(settings=SETTINGS)
    play.leases.gate = asyncio.Event()
    call = play.called(deadline=2000.0)
    first = await play.inner.next()
    await play.clock.advance(2)
    first.fail(failed())
    await play.clock.advance(0.1 + 7)  # the wait, then seven seconds for a slot
    play.leases.gate.set()
    second = await play.inner.next()
    await play.clock.advance(3)
    play.leases.gate.clear()
    second.fail(failed())
    await play.clock.advance(0.2 + 0.5)
    play.leases.gate.set()
    third = await play.inner.next()
    await play.clock.advance(0.25)
    third.answer(answer_to(third.message, upstream_s=0.25))
    answer = await ended(call)

    assert answer.attempts == 3
    assert answer.upstream_s == pytest.approx(2 + 3 + 0.25)
    assert answer.queue_s == pytest.approx(7 + 0.5)


async def test_batch_without_a_lease() -> None:
    """A batch that comes without a lease gets one, and the wait for it counts."""
    play = Play()
    play.leases.gate = asyncio.Event()
    call = play.called(lease=None)
    await play.clock.advance(4)
    play.leases.gate.set()
    first = await play.inner.next()
    first.answer(answer_to(first.message, upstream_s=1.0))
    answer = await ended(call)

    assert (answer.attempts, answer.queue_s, answer.upstream_s) == (1, 4.0, 1.0)


# --- callers leave ---


async def at_the_exchange(play: Play) -> asyncio.Task[Answer]:
    call = play.called()
    await play.inner.next()
    return call


async def during_the_wait(play: Play) -> asyncio.Task[Answer]:
    call = play.called()
    (await play.inner.next()).fail(failed())
    await settle()
    return call


async def at_the_lease(play: Play) -> asyncio.Task[Answer]:
    play.leases.gate = asyncio.Event()
    call = await during_the_wait(play)
    await play.clock.advance(0.1)
    assert len(play.leases.asked) == 1
    return call


async def at_the_next_exchange(play: Play) -> asyncio.Task[Answer]:
    call = await during_the_wait(play)
    await play.clock.advance(0.1)
    await play.inner.next()
    return call


@pytest.mark.parametrize("place", [at_the_exchange, during_the_wait, at_the_lease, at_the_next_exchange])
async def test_caller_leaves(place: Callable[[Play], Any]) -> None:
    """Wherever a call is when it is cancelled, it ends there, its lease is released once, and nothing follows."""
    play = Play(settings=SETTINGS)
    call = await place(play)
    calls, leases = len(play.inner.calls), len(play.leases.asked)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ended(call)
    await play.clock.advance(60)

    assert (len(play.inner.calls), len(play.leases.asked)) == (calls, leases)
    assert play.inner.calls[-1].was_cancelled or place in (during_the_wait, at_the_lease)
    assert [(lease.uses, lease.releases) for lease in play.all_leases] == [(1, 1)] * len(play.all_leases)
    assert play.shown["attempts"] == calls


# --- several at a time ---


async def test_calls_at_a_time_count_for_themselves() -> None:
    """Concurrent calls share the loop that runs them, and nothing else: each has its own attempts and errors."""
    play = Play()
    leases = {}
    tasks = {}
    for name in ("first", "second", "third"):
        tasks[name] = play.called(name)
        leases[name] = play.first
    firsts = {one.message.inputs[0]: one for one in [await play.inner.next() for _ in range(3)]}
    firsts["second"].fail(failed("b"))
    firsts["first"].fail(failed("a"))
    seconds = {one.message.inputs[0]: one for one in [await play.inner.next() for _ in range(2)]}
    firsts["third"].answer(answer_to(firsts["third"].message))
    seconds["first"].answer(answer_to(seconds["first"].message))
    seconds["second"].fail(failed("c"))
    last = await play.inner.next()
    last.answer(answer_to(last.message))
    answers = {name: await ended(task) for name, task in tasks.items()}

    assert {name: answer.attempts for name, answer in answers.items()} == {"first": 2, "second": 3, "third": 1}
    assert all(answer.rows == rows_of([name]) for name, answer in answers.items())
    assert {name: set(one.message.avoid) for name, one in seconds.items()} == {"first": {"a"}, "second": {"b"}}
    assert last.message.avoid == {"b", "c"}
    assert play.shown["attempts"] == 6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_any_interleaving(seed: int, count: int) -> None:
    """However concurrent calls fail, succeed and leave, each ends as its own exchanges did, and every lease is back."""
    asyncio.run(interleaved(random.Random(seed), count))


async def interleaved(rng: random.Random, count: int) -> None:
    play = Play(settings=AttemptSettings(max_attempts=4, backoff_base_s=0.5, retry_ratio=1), rng=rng)
    leases, tasks = [], []
    for n in range(count):
        tasks.append(play.called(str(n)))
        leases.append(play.first)
    fate: dict[int, list[Any]] = {n: [] for n in range(count)}
    for _ in range(count * 8):
        await play.clock.advance(rng.choice([0.0, 0.1, 0.5]))
        open_calls: list[Call] = [one for one in play.inner.calls if not one.future.done()]
        if rng.random() < 0.1:
            rng.choice(tasks).cancel()
        elif open_calls:
            one = rng.choice(open_calls)
            end: Any = failed(rng.choice("ab")) if rng.random() < 0.6 else answer_to(one.message)
            fate[int(one.message.inputs[0])].append(end)
            one.answer(end) if isinstance(end, Answer) else one.fail(end)
    for task in tasks:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)

    for n, end in enumerate(ends):
        assert len(fate[n]) <= 4
        if isinstance(end, Answer):
            assert end.rows == rows_of([str(n)])
            assert end.attempts == len(fate[n])
        elif not isinstance(end, asyncio.CancelledError):
            assert end is fate[n][-1]
    assert all((lease.uses, lease.releases) == (1, 1) for lease in leases + play.leases.given if lease.uses)
    assert all(lease.uses for lease in play.leases.given)


async def test_close() -> None:
    """Closing closes what follows."""
    play = Play()
    await play.attempt.aclose()

    assert play.inner.is_closed
