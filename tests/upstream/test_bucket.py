"""
Limits per minute, on a clock that leaps: hours pass in no time, and instants are exact.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Coroutine, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import aiolimiter
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.base import errors
from proxy.base.messages import Answer, Batch, RateHints
from proxy.base.settings import BucketSettings
from proxy.upstream.bucket import Bucket, Leak
from tests.fakes.clock import HandClock
from tests.fakes.stage import AnsweringStage, ScriptedStage, make_batch

MINUTE_S = 60.0


class LeapingClock(HandClock):
    """Nobody waits here: the test moves on, without a loop."""

    def leap(self, seconds: float) -> None:
        self._now += seconds


class Pending:
    """What a call awaits until the upstream has answered."""

    def __init__(self, end: Answer | BaseException) -> None:
        self._end = end

    def __await__(self) -> Generator[None, None, Answer]:
        yield
        if isinstance(self._end, BaseException):
            raise self._end
        return self._end


class Upstream:
    """Answers when the test says so: a call is begun with `send`, and comes back with the next `send`."""

    def __init__(self) -> None:
        self.end: Answer | BaseException = Answer((), 0, "u")

    async def __call__(self, batch: Batch) -> Answer:
        return await Pending(self.end)

    def snapshot(self) -> dict[str, Any]:
        return {}

    async def aclose(self) -> None:
        pass


class Play:
    """A bucket, its clock and its upstream."""

    def __init__(self, requests: int = 0, tokens: int = 0, *, hold_max_s: float = 60.0) -> None:
        self.clock = LeapingClock()
        self.upstream = Upstream()
        self.bucket = Bucket("u", BucketSettings(requests, tokens, hold_max_s), self.upstream, clock=self.clock)

    def leave(self, tokens: float, end: Answer | BaseException) -> Coroutine[Any, Any, Answer]:
        """Let a call leave, charged as the sender does it; `back()` lets it come back."""
        self.bucket.charge(tokens)
        self.upstream.end = end
        call = self.bucket(make_batch(tokens=tokens))
        call.send(None)
        return call

    def back(self, call: Coroutine[Any, Any, Answer]) -> None:
        """Let a call come back; errors come out as themselves."""
        with pytest.raises((StopIteration, errors.EmbeddingError)):
            call.send(None)

    def exchange(
        self, tokens: float = 0.0, end: Answer | BaseException | None = None, *, used: int = 0, hints: Any = None
    ) -> None:
        """Let a call leave and come back at once."""
        self.back(self.leave(tokens, Answer((), used, "u", hints=hints) if end is None else end))

    def wait_s(self, least: float = 1.0, wish: float | None = None) -> float:
        return self.bucket.wait_s(least, least if wish is None else wish)


def limited(retry_after_s: float | None = None, hints: RateHints | None = None) -> errors.RateLimited:
    error = errors.RateLimited("later", retry_after_s=retry_after_s)
    error.hints = hints
    return error


# --- one bucket ---


def test_what_it_needs_of_aiolimiter() -> None:
    """
    A new aiolimiter has to keep its level, its instant and its rate under these names, and leak in one method.

    Leak asks without waiting, which aiolimiter has no words for; so it lives with these. When this fails, aiolimiter
    has changed inside, and Leak has to follow (`proxy/upstream/bucket.py`).
    """
    inside = {"_level", "_last_check", "_rate_per_sec"}
    slots = set(aiolimiter.AsyncLimiter.__slots__)
    limiter = aiolimiter.AsyncLimiter(10, 5)

    assert inside <= slots, f"aiolimiter {aiolimiter.__version__} has no {inside - slots} any more"
    assert (limiter._level, limiter._rate_per_sec) == (0.0, 2.0)
    assert callable(limiter._leak)
    assert limiter.max_rate == 10
    assert limiter.time_period == 5


async def test_aiolimiter_itself_keeps_our_time() -> None:
    """What the library decides about room, it decides by our leak and our clock."""
    clock = LeapingClock()
    leak = Leak(10, 10, clock=clock)
    leak.pour(10)
    before = leak.has_capacity(1)
    clock.leap(1)

    assert not before
    assert leak.has_capacity(1)


@pytest.mark.parametrize(
    ("level", "amount", "wait_s"),
    [(0, 10, 0), (0, 0, 0), (4, 6, 0), (4, 7, 1), (10, 1, 1), (10, 10, 10), (30, 10, 30), (30, 0, 20)],
)
def test_wait_for_an_amount(level: float, amount: float, wait_s: float) -> None:
    """An amount has to wait until what is in leaves room for it."""
    leak = Leak(10, 10, clock=LeapingClock())
    leak.pour(level)

    assert leak.wait_s(amount) == wait_s


@pytest.mark.parametrize(("amount", "wait_s"), [(10, 0), (11, 1), (40, 30), (60, 50), (61, 50), (1000, 50)])
def test_wait_for_more_than_the_bucket_holds(amount: float, wait_s: float) -> None:
    """What is larger goes after the bucket has been idle for the excess, at most for as long as idling counts."""
    clock = LeapingClock()
    leak = Leak(10, 10, clock=clock, idle=50)
    before = leak.wait_s(amount)
    clock.leap(before)

    assert before == wait_s
    assert leak.wait_s(amount) == 0
    assert leak.room == 10


def test_idle_time_is_used_once() -> None:
    """Whatever leaves ends the idling; it begins anew when the bucket is empty."""
    clock = LeapingClock()
    leak = Leak(10, 10, clock=clock, idle=50)
    clock.leap(1000)
    leak.pour(0.5)

    assert leak.wait_s(60) == 50.5
    assert leak.wait_s(9.5) == 0


def test_waiting_exactly_as_long_as_told() -> None:
    """Whoever waits as long as told may go, whatever the clock's rounding."""
    clock = LeapingClock()
    clock.leap(1e6 + 0.1)
    leak = Leak(1, 0.1, clock=clock)
    for _ in range(1000):
        leak.pour(1)
        clock.leap(leak.wait_s(1))
        assert leak.wait_s(1) == 0


# --- no limits ---


def test_no_limits() -> None:
    """Without limits every call passes at once."""
    play = Play()
    for _ in range(50):
        play.exchange(1e9, used=10**9)

    assert play.wait_s(1e9) == 0
    assert play.bucket.room_tokens == math.inf
    assert play.bucket.interval_s == 0
    assert play.bucket.hold_error is None
    assert play.bucket.snapshot() == {
        "requests_per_minute": 0,
        "tokens_per_minute": 0,
        "room_tokens": None,
        "wait_s": 0.0,
        "hold_s": 0.0,
    }


# --- requests ---


def test_requests_go_evenly() -> None:
    """60 a minute is one a second and a little more, also after a quiet time: nothing is saved up."""
    play = Play(requests=60)
    play.clock.leap(3600)
    play.exchange()

    assert play.wait_s() == pytest.approx(1.02)
    assert play.bucket.interval_s == pytest.approx(1.02)
    play.clock.leap(1.02)
    assert play.wait_s() == 0


# --- tokens ---


@pytest.mark.parametrize(
    ("per_minute", "burst"), [(1_000_000, 100_000), (81_920, 8192), (40_000, 8192), (10_000, 5000), (1, 0.5)]
)
def test_tokens_at_once(per_minute: int, burst: float) -> None:
    """A tenth of a minute's tokens may go at once; at least one large input, but no more than half of them."""
    play = Play(tokens=per_minute)

    assert play.bucket.room_tokens == pytest.approx(burst)
    assert play.wait_s(burst) == 0
    assert play.wait_s(burst * 1.001) > 0


@pytest.mark.parametrize(
    ("least", "wish", "wait_s"),
    [
        (1, 1, 2),  # down to what fits beside one token
        (1, 50_000, 2 + 5 / 3),
        (1, 100_000, 2 + 10 / 3),
        (1, 10_000_000, 2 + 10 / 3),
        (150_000, 10_000_000, 2 + 5),
        (200_000, 200_000, 2 + 20 / 3),
    ],
)
def test_call_that_is_worth_leaving(least: float, wish: float, wait_s: float) -> None:
    """With much waiting a call leaves when half a burst is there, with less when all of it fits; its least always."""
    play = Play(tokens=2_000_000)  # 200 000 at once, 30 000 a second
    play.bucket.charge(260_000)

    assert play.wait_s(least, wish) == pytest.approx(wait_s, abs=1e-3)


def test_estimate_was_too_high() -> None:
    """What was too much is given back, for calls that come at once."""
    play = Play(tokens=1_000_000)
    play.exchange(80_000, used=30_000)

    assert play.bucket.room_tokens == pytest.approx(70_000)


def test_estimate_was_much_too_high_long_ago() -> None:
    """What may have leaked away since is not given back: it would count twice."""
    play = Play(tokens=1_000_000)  # 15 000 a second
    call = play.leave(80_000, Answer((), 10_000, "u"))
    play.clock.leap(3)
    play.bucket.charge(40_000)
    before = play.bucket.room_tokens
    play.back(call)

    assert before == pytest.approx(25_000)
    assert play.bucket.room_tokens == pytest.approx(25_000 + 80_000 - 45_000)


def test_estimate_was_too_low() -> None:
    """What was too little is a debt that those behind wait for."""
    play = Play(tokens=1_000_000)
    play.exchange(10_000, used=160_000)

    assert play.bucket.room_tokens == pytest.approx(-60_000)
    assert play.wait_s(1) == pytest.approx(4, rel=1e-3)


def test_upstream_that_counts_nothing() -> None:
    """Where the answer has no usage, the estimate stands."""
    play = Play(tokens=1_000_000)
    play.exchange(10_000, used=0)

    assert play.bucket.room_tokens == pytest.approx(90_000)


@pytest.mark.parametrize("error", [errors.UpstreamFailed("no"), errors.UpstreamTimeout("no"), errors.BadVectors("no")])
def test_failed_call(error: errors.EmbeddingError) -> None:
    """A call that failed may have been counted over there, so its estimate stands; its error passes through."""
    play = Play(tokens=1_000_000)
    play.exchange(10_000, error)

    assert play.bucket.room_tokens == pytest.approx(90_000)
    assert play.wait_s() == 0


async def test_calls_overlap() -> None:
    """The bucket holds nobody: only asking costs time, not passing."""
    inner = ScriptedStage()
    bucket = Bucket("u", BucketSettings(60), inner, clock=HandClock())
    first, second = bucket(make_batch()), bucket(make_batch())
    first.send(None)
    second.send(None)

    assert len(inner.calls) == 2
    first.close()
    second.close()


async def test_close() -> None:
    """Closing closes what follows."""
    inner = ScriptedStage()
    await Bucket("u", BucketSettings(), inner, clock=HandClock()).aclose()

    assert inner.is_closed


# --- what the upstream says ---


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((0, 0), (500, 40_000), (500, 40_000)),
        ((0, 0), (None, 40_000), (0, 40_000)),
        ((0, 0), (500, None), (500, 0)),
        ((600, 0), (500, 40_000), (500, 40_000)),
        ((600, 50_000), (700, 60_000), (600, 50_000)),
        ((600, 50_000), (None, None), (600, 50_000)),
    ],
)
def test_limits_in_headers(ours: tuple[int, int], theirs: tuple[Any, Any], expected: tuple[int, int]) -> None:
    """Headers count where the settings say nothing, or more; what is no limit is ignored."""
    play = Play(*ours)
    play.exchange(hints=RateHints(*theirs))
    shown = play.bucket.snapshot()

    assert (shown["requests_per_minute"], shown["tokens_per_minute"]) == expected


def test_limits_that_move() -> None:
    """Limits follow the headers up and down; an answer that leaves one out, or all, has not taken it back."""
    play = Play(requests=600)
    shown = []
    for hints in (RateHints(500, 1000), RateHints(550), RateHints(None, 2000), None, RateHints(700, 3000)):
        play.exchange(hints=hints)
        shown.append(play.bucket._per_minute)

    assert shown == [(500, 1000), (550, 1000), (550, 2000), (550, 2000), (600, 3000)]


def test_limits_in_an_error() -> None:
    """What stands beside a rate limit counts as what stands beside an answer."""
    play = Play()
    play.exchange(end=limited(hints=RateHints(60)))

    assert play.bucket.interval_s == pytest.approx(1.02)


def test_what_is_in_the_bucket_when_its_limit_moves() -> None:
    """A new limit does not forgive what has left under the old one, nor holds it against anybody for over a minute."""
    play = Play(requests=60, tokens=1_000_000)
    play.exchange(100_000, used=400_000, hints=RateHints(30, 900_000))
    after = (play.wait_s(1, 1), play.bucket.room_tokens)
    play.exchange(hints=RateHints(30, 10_000))

    assert after == (pytest.approx((400_000 - 90_000) / 13_500, rel=1e-3), pytest.approx(90_000 - 400_000))
    assert play.wait_s(5000) == pytest.approx(120, rel=1e-3)  # two minutes' worth of half a bucket


def test_tokens_that_remain() -> None:
    """Others use the same key: no more goes than the upstream says is left."""
    play = Play(tokens=1_000_000)
    play.exchange(10_000, used=10_000, hints=RateHints(remaining_tokens=20_000))
    less = play.bucket.room_tokens
    play.exchange(0, hints=RateHints(remaining_tokens=800_000))

    assert less == pytest.approx(20_000)
    assert play.bucket.room_tokens == pytest.approx(20_000)


def test_plenty_remains() -> None:
    """An answer that tells of room enough does not end the idling that a large input waits for."""
    play = Play(tokens=100_000)  # 10 000 at once
    call = play.leave(0, Answer((), 0, "u", hints=RateHints(remaining_tokens=99_000)))
    play.clock.leap(60)
    play.back(call)

    assert play.wait_s(50_000) == 0


@pytest.mark.parametrize(
    ("hints", "hold_s"),
    [
        (RateHints(60, remaining_requests=0, reset_requests_s=30.0), 0.5),
        (RateHints(60, remaining_requests=1, reset_requests_s=30.0), 0.0),
        (RateHints(60, remaining_requests=0), 0.0),
        (RateHints(remaining_requests=0, reset_requests_s=30.0), 0.0),
    ],
)
def test_no_request_remains(hints: RateHints, hold_s: float) -> None:
    """With none left, the next one waits for its share of the reset, which is the time of all of them."""
    play = Play()
    play.exchange(hints=hints)

    assert play.bucket.snapshot()["hold_s"] == hold_s
    assert play.bucket.hold_error is None


# --- holds ---


@pytest.mark.parametrize(
    ("retry_after_s", "hold_s"), [(0.0, 0.0), (5.0, 5.0), (60.0, 60.0), (60.1, 60.0), (86_400.0, 60.0)]
)
@pytest.mark.parametrize("error_class", [errors.RateLimited, errors.UpstreamFailed])
def test_upstream_asks_for_time(error_class: Any, retry_after_s: float, hold_s: float) -> None:
    """An upstream that names a time is left alone so long, by everybody, up to the bound; they hear its error."""
    play = Play()
    error = error_class("later", retry_after_s=retry_after_s)
    play.exchange(end=error)
    held = (play.wait_s(), play.bucket.hold_error, play.bucket.snapshot()["hold_s"])
    play.clock.leap(hold_s)

    assert held == (hold_s, error if hold_s else None, hold_s)
    assert play.wait_s() == 0
    assert play.bucket.hold_error is None


def test_upstream_that_is_busy_and_names_no_time() -> None:
    """It is left alone for a moment, twice as long each time in a row, and nobody is refused for that."""
    play = Play()
    waits = []
    for _ in range(8):
        play.exchange(end=limited())
        waits.append(play.wait_s())
        assert play.bucket.hold_error is None
        play.clock.leap(waits[-1])
    play.exchange()
    play.exchange(end=limited())

    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])
    assert play.wait_s() == pytest.approx(0.1)


def test_herd_that_is_told_to_wait() -> None:
    """Calls that were under way together and all hear the same count once."""
    play = Play()
    for _ in range(16):
        play.exchange(end=limited())

    assert play.wait_s() == pytest.approx(0.1)


def test_failure_that_names_no_time() -> None:
    """A failure without Retry-After says nothing about when: that is the breaker's business."""
    play = Play()
    play.exchange(end=errors.UpstreamFailed("broken"))

    assert play.wait_s() == 0


def test_shorter_hold_after_a_longer_one() -> None:
    """The latest instant counts, with its error."""
    play = Play()
    long, short = limited(30.0), limited(1.0)
    play.exchange(end=long)
    play.exchange(end=short)

    assert play.wait_s() == 30
    assert play.bucket.hold_error is long


@pytest.mark.parametrize("hold_max_s", [0.0, 60.0])
def test_key_that_is_not_accepted(hold_max_s: float) -> None:
    """Whoever does not accept our key is left alone for half a minute, which is no wish of theirs to be bounded."""
    play = Play(hold_max_s=hold_max_s)
    error = errors.UpstreamDenied("no")
    play.exchange(end=error)

    assert play.wait_s() == 30
    assert play.bucket.hold_error is error


async def test_refusal() -> None:
    """A request that was wrong says nothing about limits."""
    refusal = errors.UpstreamRefused("no", status=400)
    bucket = Bucket("u", BucketSettings(), AnsweringStage(lambda batch: refusal), clock=HandClock())
    with pytest.raises(errors.UpstreamRefused) as caught:
        await bucket(make_batch())

    assert caught.value is refusal
    assert bucket.wait_s(1, 1) == 0


def test_snapshot() -> None:
    """The snapshot says what may still go, and when."""
    play = Play(requests=60, tokens=1_000_000)
    play.exchange(20_000, limited(7.0))
    play.clock.leap(1)

    assert play.bucket.snapshot() == {
        "requests_per_minute": 60,
        "tokens_per_minute": 1_000_000,
        "room_tokens": 95_000,
        "wait_s": 6.0,
        "hold_s": 6.0,
    }


# --- no window of a minute has more, whatever comes ---


@dataclass
class Arrival:
    """One input: when it comes, how long its call takes, what it is, and what it is taken for."""

    gap_s: float
    took_s: float
    used: int
    estimate: float


@dataclass
class Departure:
    at: float
    used: int
    low: float
    """By how much it was underestimated."""


def sent(
    play: Play, arrivals: Sequence[Arrival], *, until_s: float = math.inf, most: int = 1_000_000
) -> list[Departure]:
    """Send it as the sender does: as soon as the bucket allows, in order, as many as it has room for, up to `most`."""
    clock, bucket = play.clock, play.bucket
    start, at = clock.now(), 0.0
    coming: list[tuple[float, Arrival]] = []
    for arrival in arrivals:
        at += arrival.gap_s
        coming.append((start + at, arrival))
    coming.reverse()
    waiting: deque[Arrival] = deque()
    wish = 0.0
    flying: list[tuple[float, int, Any]] = []
    order = itertools.count()
    departures = []
    while (coming or waiting) and clock.now() - start < until_s:
        while coming and coming[-1][0] <= clock.now():
            waiting.append(coming.pop()[1])
            wish += waiting[-1].estimate
        while flying and flying[0][0] <= clock.now():
            play.back(heapq.heappop(flying)[2])
        wait_s = math.inf
        if waiting:
            wait_s = bucket.wait_s(waiting[0].estimate, wish)
            if wait_s <= 0:
                room = bucket.room_tokens - waiting[0].estimate
                batch = [waiting.popleft()]
                while waiting and len(batch) < most and waiting[0].estimate <= room:
                    room -= waiting[0].estimate
                    batch.append(waiting.popleft())
                used, estimate = sum(item.used for item in batch), sum(item.estimate for item in batch)
                wish -= estimate
                departures.append(Departure(clock.now(), used, max(0.0, used - estimate)))
                call = play.leave(estimate, Answer((), used, "u"))
                heapq.heappush(flying, (clock.now() + max(item.took_s for item in batch), next(order), call))
                continue
        ends = [clock.now() + wait_s, *(at for at, _ in coming[-1:]), *(at for at, _, _ in flying[:1])]
        clock.leap(max(0.0, min(ends) - clock.now()) or 1e-9)
    for _, _, call in flying:
        call.close()
    return departures


def windows(departures: Sequence[Departure]) -> Generator[list[Departure]]:
    """Go through all stretches of a minute that begin with a departure."""
    last = 0
    for first, departure in enumerate(departures):
        while last < len(departures) and departures[last].at <= departure.at + MINUTE_S:
            last += 1
        yield list(departures[first:last])


GAPS = st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.5, 3.0, 20.0, 61.0, 200.0])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.lists(st.builds(Arrival, GAPS, GAPS, st.just(1), st.just(1.0)), max_size=150))
@example(600, [Arrival(0.0, 0.0, 1, 1.0)] * 700)
@example(1, [Arrival(0.0, 0.0, 1, 1.0)] * 5)
@example(7, [Arrival(0.0, 0.0, 1, 1.0)] * 30)
def test_requests_of_any_minute(per_minute: int, arrivals: list[Arrival]) -> None:
    """No stretch of 60 s has more requests than the limit."""
    departures = sent(Play(requests=per_minute), arrivals, most=1)

    assert len(departures) == len(arrivals)
    assert max((len(window) for window in windows(departures)), default=0) <= per_minute


SIZES = st.sampled_from([1, 10, 300, 3000, 8192, 20_000, 60_000])
FACTORS = st.sampled_from([0.1, 0.5, 0.9, 1.0, 1.0, 1.3, 2.0, 10.0])


@st.composite
def token_plays(draw: Any) -> tuple[int, list[Arrival]]:
    """Draw a limit, and inputs that it can take at all, estimated wrongly in both directions."""
    per_minute = draw(st.sampled_from([100, 5000, 40_000, 100_000, 1_000_000]))
    arrivals = draw(st.lists(st.tuples(GAPS, GAPS, SIZES, FACTORS), max_size=60))
    return per_minute, [
        Arrival(gap_s, took_s, used, estimate)
        for gap_s, took_s, used, factor in arrivals
        if max(used, estimate := used * factor) <= per_minute
    ]


@settings(max_examples=300, deadline=None)
@given(token_plays())
@example((100_000, [Arrival(0.0, 0.0, 60_000, 60_000.0)] * 8))
@example((100_000, [Arrival(0.0, 20.0, 300, 3000.0)] * 200))
@example((1_000_000, [Arrival(0.01, 0.5, 8192, 4096.0)] * 200))
def test_tokens_of_any_minute(play: tuple[int, list[Arrival]]) -> None:
    """No stretch of 60 s has more tokens than the limit, but for what its own inputs were underestimated by."""
    per_minute, arrivals = play
    departures = sent(Play(tokens=per_minute), arrivals)

    assert sum(departure.used for departure in departures) == sum(arrival.used for arrival in arrivals)
    for window in windows(departures):
        assert sum(one.used - one.low for one in window) <= per_minute * (1 + 1e-6)


@settings(max_examples=100, deadline=None)
@given(token_plays(), st.integers(1, 300))
def test_both_limits_of_any_minute(play: tuple[int, list[Arrival]], requests: int) -> None:
    """Where both limits are set, both are kept."""
    tokens, arrivals = play
    for window in windows(sent(Play(requests, tokens), arrivals)):
        assert len(window) <= requests
        assert sum(one.used - one.low for one in window) <= tokens * (1 + 1e-6)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(100, 100_000),
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 5.0, 70.0]), st.floats(0, 1), st.floats(0, 1)), max_size=30),
)
def test_giving_back_allows_no_more_than_the_truth(per_minute: int, calls: list[tuple[float, float, float]]) -> None:
    """Whatever was estimated and given back, there is never more room than if the truth had been known at once."""
    guessed, exact = Play(tokens=per_minute), Play(tokens=per_minute)
    flying: list[Any] = []
    for gap_s, estimate, share in calls:
        tokens = max(1.0, estimate * per_minute / 2)
        used = max(1, int(tokens * share))
        flying.append(guessed.leave(tokens, Answer((), used, "u")))
        exact.bucket.charge(used)
        if len(flying) > 2:
            guessed.back(flying.pop(0))
        for play in (guessed, exact):
            play.clock.leap(gap_s)
        assert guessed.bucket.room_tokens <= exact.bucket.room_tokens + per_minute * 1e-9
    for call in flying:
        guessed.back(call)

    assert guessed.bucket.room_tokens <= exact.bucket.room_tokens + per_minute * 1e-9


# --- and most of it is used ---


@pytest.mark.parametrize("per_minute", [10, 60, 600, 3000])
def test_use_of_the_request_limit(per_minute: int) -> None:
    """Under pressure at least 95 % of the requests go."""
    departures = sent(Play(requests=per_minute), [Arrival(0.0, 0.0, 1, 1.0)] * (per_minute * 6), until_s=300, most=1)

    assert len(departures) >= 0.95 * per_minute * 5


@pytest.mark.parametrize("per_minute", [60_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("factor", [0.7, 1.0, 1.5])
def test_use_of_the_token_limit(per_minute: int, factor: float) -> None:
    """Under pressure at least 85 % of the tokens go, be the estimates too low or too high."""
    used = per_minute // 400
    arrivals = [Arrival(0.0, 1.0, used, used * factor)] * 4000
    departures = sent(Play(tokens=per_minute), arrivals, until_s=300)

    assert sum(one.used for one in departures) >= 0.85 * per_minute * 5


@pytest.mark.parametrize(("per_minute", "share"), [(16_000, 0.49), (40_000, 0.79)])
def test_use_of_a_small_token_limit(per_minute: int, share: float) -> None:
    """A limit that hardly holds a large input is used less: what may go at once cannot go evenly too."""
    used = per_minute // 400
    departures = sent(Play(tokens=per_minute), [Arrival(0.0, 0.1, used, float(used))] * 4000, until_s=600)

    assert sum(one.used for one in departures) >= share * per_minute * 10


def test_large_inputs_among_small_ones() -> None:
    """An input of half a minute's tokens goes when its turn comes, and what waits behind it waits."""
    small, large = Arrival(0.0, 0.1, 500, 500.0), Arrival(0.0, 0.1, 50_000, 50_000.0)
    departures = sent(Play(tokens=100_000), [*[small] * 50, large, *[small] * 50])
    at = next(one.at for one in departures if one.used >= 50_000) - 1000

    # 25 000 are ahead of it, 10 000 of them at once; then it waits for 10 000 to leak, and for 40 000 more in idleness.
    assert at == pytest.approx((15_000 + 10_000 + 40_000) / 1500, rel=1e-3)
    assert sum(one.used for one in departures) == 100_000
