"""
The upstream's limits per minute: calls are paced to keep them, so that callers wait a moment instead of failing.

Two of aiolimiter's leaky buckets, requests and tokens. Both are smaller than a minute's worth and leak the rest over
the minute, so that whatever goes in, no window of 60 s has more than the limit. Requests go evenly. A tenth of the
tokens may go at once. Nobody waits inside: `wait_s()` says when the next call may leave, who asks waits where a batch
can still change, and `charge()` pours in what leaves. aiolimiter's own waiters would starve a large batch behind small
ones.

Tokens are charged by estimate before the call and settled by the usage that comes back: more is a debt, less is given
back as far as it has not leaked away meanwhile. Where the settings say nothing, the limits in the upstream's own
headers are taken; what they say is left of the minute counts in any case, since others may use the same key. And an
upstream that asks to be left alone for a while is.

Stands before the breaker: the limit is asked before a probe is given away.

Source: OpenAI's rate-limit guide (x-ratelimit-*); RFC 9110 §10.2.3 (Retry-After).
"""

from __future__ import annotations

import math

from aiolimiter import AsyncLimiter

from proxy.base.clock import Clock
from proxy.base.errors import EmbeddingError, RateLimited, UpstreamDenied, UpstreamFailed
from proxy.base.messages import Answer, Batch, RateHints
from proxy.base.settings import BucketSettings
from proxy.base.stage import Snapshot, Stage

_MINUTE_S = 60.0
_MARGIN = 1.02
"""Requests go this much slower than the limit: on the way to the upstream two of them may come closer together."""
_BURST = 0.1
"""Share of a minute's tokens that may go at once; the others leak evenly."""
_LARGE_INPUT_TOKENS = 8192.0
"""The burst holds one input of the size that models take, where the limit allows that at all."""
_LEAST_WAIT_S = 1e-9
"""What a wait comes to by rounding alone: whoever has waited it out would have to wait once more."""
_BUSY_FIRST_S = 0.1
_BUSY_MOST_S = 5.0
"""An upstream that has too much and does not say for how long is left alone for a moment, twice as long each time in a
row: TEI's places are free again after a batch, a loading model takes seconds."""
_DENIED_S = 30.0
"""How long an upstream is left alone that does not accept our key or account; the next canary may find it mended."""


class Leak(AsyncLimiter):
    """aiolimiter's bucket on our clock, asked without waiting; what it lacks is a look ahead and giving back."""

    def __init__(self, max_rate: float, time_period: float, *, clock: Clock, idle: float = 0.0) -> None:
        """
        Args:
            max_rate: what goes in at once.
            time_period: seconds in which a full bucket leaks empty.
            clock: where time comes from.
            idle: how far below empty an idle bucket goes: only what is larger than the bucket may use it.
        """
        super().__init__(max_rate, time_period)
        self._clock = clock
        self._idle = idle
        self._last_check = clock.now()

    def _leak(self) -> None:
        now = self._clock.now()
        self._level = max(self._level - (now - self._last_check) * self._rate_per_sec, -self._idle)
        self._last_check = now

    @property
    def room(self) -> float:
        """What could go in now."""
        self._leak()
        return self.max_rate - max(0.0, self._level)

    def wait_s(self, amount: float) -> float:
        """Return when so much may go in: zero when now."""
        self._leak()
        # What is larger than the bucket goes only after it has been idle for the excess, so that the minute keeps its
        # limit.
        excess = amount - self.max_rate
        level = self._level if excess > 0 else max(0.0, self._level)
        wait_s = (level + min(excess, self._idle)) / self._rate_per_sec
        return wait_s if wait_s > _LEAST_WAIT_S else 0.0

    def pour(self, amount: float) -> None:
        """Put in what leaves now, or what has turned out to be more than was put in: then it overflows, and waits."""
        self._leak()
        self._level = max(0.0, self._level) + amount

    def shrink(self, room: float) -> None:
        """Leave no more room than this; where there is less already, all stays as it is."""
        if self.room > room:
            self.pour(self.room - room)

    def give_back(self, amount: float, poured: float, age_s: float) -> None:
        """
        Take out what was too much of an earlier amount.

        Args:
            amount: the difference.
            poured: the amount put in.
            age_s: how long ago. What may have leaked meanwhile is not given back: it would count twice.
        """
        self._leak()
        self._level -= max(0.0, min(amount, poured - age_s * self._rate_per_sec, self._level))


class Bucket:
    """Paces the calls to one upstream."""

    def __init__(self, name: str, settings: BucketSettings, inner: Stage[Batch, Answer], *, clock: Clock) -> None:
        self._name = name
        self._settings = settings
        self._inner = inner
        self._clock = clock
        self._per_minute = (0, 0)
        self._said: tuple[int | None, int | None] = (None, None)
        """What the upstream's headers have said last."""
        self._requests: Leak | None = None
        self._tokens: Leak | None = None
        self._hold_until = -math.inf
        self._hold_error: EmbeddingError | None = None
        self._busy_s = 0.0
        self._limit(settings.requests_per_minute, settings.tokens_per_minute)

    def _limit(self, requests: int, tokens: int) -> None:
        """Make the buckets; what is in one of them already stays in it."""
        if requests != self._per_minute[0]:
            self._requests = self._made(self._requests, 1.0, _MINUTE_S / requests * _MARGIN) if requests else None
        if tokens != self._per_minute[1]:
            burst = min(max(tokens * _BURST, _LARGE_INPUT_TOKENS), tokens / 2)
            idle = tokens - burst
            self._tokens = self._made(self._tokens, burst, _MINUTE_S * burst / idle, idle) if tokens else None
        self._per_minute = (requests, tokens)

    def _made(self, old: Leak | None, size: float, period_s: float, idle: float = 0.0) -> Leak:
        leak = Leak(size, period_s, clock=self._clock, idle=idle)
        if old is not None:
            # At most a minute's worth: what a lower limit could not take in is no reason to stand still for longer.
            leak.pour(min(size + idle, old.max_rate - old.room))
        return leak

    # --- asked before a call ---

    def wait_s(self, least: float, wish: float) -> float:
        """
        Return when the next call may leave: zero when now.

        Args:
            least: tokens of the smallest batch that makes sense.
            wish: tokens of all that waits: with less than half a burst it is not worth leaving.
        """
        wait_s = self._hold_until - self._clock.now()
        if self._requests is not None:
            wait_s = max(wait_s, self._requests.wait_s(1.0))
        if self._tokens is not None:
            wait_s = max(wait_s, self._tokens.wait_s(max(least, min(wish, self._tokens.max_rate / 2))))
        return max(0.0, wait_s)

    @property
    def hold_error(self) -> EmbeddingError | None:
        """What to tell those who cannot wait until the upstream may be asked again; None when it may."""
        return self._hold_error if self._hold_until > self._clock.now() else None

    @property
    def room_tokens(self) -> float:
        """How many tokens the next call may carry."""
        return math.inf if self._tokens is None else self._tokens.room

    @property
    def interval_s(self) -> float:
        """How far apart calls have to be."""
        return 0.0 if self._requests is None else self._requests.time_period

    def charge(self, tokens: float) -> None:
        """Note that a call leaves now."""
        if self._requests is not None:
            self._requests.pour(1.0)
        if self._tokens is not None:
            self._tokens.pour(tokens)

    # --- the stage ---

    async def __call__(self, batch: Batch) -> Answer:
        start = self._clock.now()
        try:
            answer = await self._inner(batch)
        except (RateLimited, UpstreamFailed) as error:
            if error.retry_after_s is not None:
                # The caller hears the same bound: a day is no answer, and SDKs give up or come back at once.
                error.retry_after_s = min(error.retry_after_s, self._settings.hold_max_s)
                self._hold(error.retry_after_s, error)
            elif isinstance(error, RateLimited):
                self._pause()
            self._learn(error.hints)
            raise
        except UpstreamDenied as error:
            self._hold(_DENIED_S, error)
            raise
        self._busy_s = 0.0
        self._settle(batch.tokens, answer.tokens, self._clock.now() - start)
        self._learn(answer.hints)
        return answer

    def _pause(self) -> None:
        """Hold for a moment; nobody is refused for it. All who were under way together count once."""
        if self._clock.now() >= self._hold_until:
            self._busy_s = min(_BUSY_MOST_S, 2 * self._busy_s or _BUSY_FIRST_S)
            self._hold(self._busy_s, None)

    def _settle(self, reserved: float, used: int, age_s: float) -> None:
        if self._tokens is None or not used:
            return
        if used > reserved:
            self._tokens.pour(used - reserved)
        else:
            self._tokens.give_back(reserved - used, reserved, age_s)

    def _learn(self, hints: RateHints | None) -> None:
        if hints is None:
            return
        ours = (self._settings.requests_per_minute, self._settings.tokens_per_minute)
        # An answer that leaves one of them out has not taken it back.
        self._said = (hints.requests_per_minute or self._said[0], hints.tokens_per_minute or self._said[1])
        self._limit(*(min(filter(None, pair), default=0) for pair in zip(ours, self._said, strict=True)))
        if self._tokens is not None and hints.remaining_tokens is not None:
            self._tokens.shrink(hints.remaining_tokens)
        if hints.remaining_requests == 0 and hints.reset_requests_s is not None and hints.requests_per_minute:
            # The header says when all of them are back; the next one is back after its share of that.
            wait_s = hints.reset_requests_s / hints.requests_per_minute
            self._hold(min(wait_s, self._settings.hold_max_s), None)

    def _hold(self, seconds: float, error: EmbeddingError | None) -> None:
        until = self._clock.now() + seconds
        if until > self._hold_until:
            self._hold_until, self._hold_error = until, error

    def snapshot(self) -> Snapshot:
        requests, tokens = self._per_minute
        return {
            "requests_per_minute": requests,
            "tokens_per_minute": tokens,
            "room_tokens": None if self._tokens is None else round(self.room_tokens),
            "wait_s": round(self.wait_s(1.0, 1.0), 3),
            "hold_s": round(max(0.0, self._hold_until - self._clock.now()), 3),
        }

    async def aclose(self) -> None:
        await self._inner.aclose()
