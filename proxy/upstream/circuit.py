"""
The breaker of one upstream: after enough failures in a row it is left alone for a while.

    closed --failures in a row--> open --open_s later--> half-open --probe succeeds--> closed
                                                          half-open --probe fails--> open

pybreaker keeps the state and the counters; this guard adds what it lacks in asyncio. (1) Verdicts are three: a call
that was cancelled, refused as wrong, or rate-limited says nothing about the upstream's health and is not told to
pybreaker at all, whose `exclude` would count it as a success. (2) In half-open one probe passes, as a lease: whatever
becomes of it, it is given back, and one that outlives its time is no longer waited for. (3) A verdict from before the
breaker moved is ignored: it speaks of another time. pybreaker is touched in synchronous stretches only, so nothing
can interleave; and its own clock, which is the wall's, is never asked.

Stands inside the bucket, so that a probe keeps the rate limit too, and around the transport, so that it hears every
attempt.
"""

from __future__ import annotations

import contextlib

import pybreaker

from proxy.base.clock import Clock
from proxy.base.errors import BadVectors, UpstreamFailed, UpstreamTimeout
from proxy.base.events import BreakerMoved, Observer
from proxy.base.messages import Answer, Batch
from proxy.base.settings import CircuitSettings
from proxy.base.stage import Snapshot, Stage

FAILURES = (UpstreamFailed, UpstreamTimeout, BadVectors)
"""What speaks against an upstream's health. Rate limits and refusals do not: it answered."""


class Circuit:
    """Guards one upstream."""

    def __init__(
        self, name: str, settings: CircuitSettings, inner: Stage[Batch, Answer], *, clock: Clock, observe: Observer
    ) -> None:
        self._name = name
        self._settings = settings
        self._inner = inner
        self._clock = clock
        self._observe = observe
        self._generation = 0
        self._opened_at = 0.0
        self._probe_until: float | None = None
        self._has_failures = False
        self._state = pybreaker.STATE_CLOSED
        """What the breaker was last seen in; asking pybreaker itself takes a lock and a microsecond."""
        self._breaker = pybreaker.CircuitBreaker(
            fail_max=settings.failures, throw_new_error_on_trip=False, listeners=[_Listener(self)]
        )

    # --- asked before a call ---

    @property
    def is_closed(self) -> bool:
        """Whether everything passes."""
        return bool(self._state == pybreaker.STATE_CLOSED)

    def wait_s(self, now: float) -> float:
        """Return how long it will still refuse; zero when a call may pass."""
        if self._state == pybreaker.STATE_CLOSED:
            return 0.0
        if self._state == pybreaker.STATE_OPEN:
            return max(0.0, self._opened_at + self._settings.open_s - now)
        if self._probe_until is not None:
            return max(0.0, min(self._probe_until - now, self._settings.open_s))
        return 0.0

    def enter(self, now: float) -> tuple[int, bool]:
        """
        Let a call pass; only asked when `wait_s()` is zero.

        Returns:
            The generation that its verdict will be of, and whether it is the probe, which has to be given back.
        """
        if self._state == pybreaker.STATE_CLOSED:
            return self._generation, False
        if self._state == pybreaker.STATE_OPEN:
            self._breaker.half_open()
        self._generation += 1  # of two probes, the second one sent since the first was too late, only that one counts
        self._probe_until = now + self._settings.probe_s
        return self._generation, True

    def give_back(self, generation: int) -> None:
        """Take a probe back, whatever became of it; one of an older generation is not waited for any more."""
        if generation == self._generation:
            self._probe_until = None

    # --- the stage ---

    async def __call__(self, batch: Batch) -> Answer:
        assert batch.lease is not None
        try:
            answer = await self._inner(batch)
        except FAILURES as error:
            # What is sent to find the one input to blame is expected to fail: it says nothing of the upstream's health.
            if not (batch.is_suspect and error.may_be_poison):
                self._verdict(batch.lease.generation, error)
            raise
        self._verdict(batch.lease.generation, None)
        return answer

    def _verdict(self, generation: int, error: BaseException | None) -> None:
        if generation != self._generation:
            return
        if error is None and self._state == pybreaker.STATE_CLOSED and not self._has_failures:
            return  # nothing would change
        self._has_failures = error is not None
        with contextlib.suppress(*FAILURES):  # ours, played back to us
            self._breaker.call(_play, error)

    def _moved(self, old: str, new: str) -> None:
        self._generation += 1
        self._state = new
        self._probe_until = None
        if new == pybreaker.STATE_OPEN:
            self._opened_at = self._clock.now()
        self._observe(BreakerMoved(self._name, old, new))

    def snapshot(self) -> Snapshot:
        return {
            "state": self._state,
            "failures": self._breaker.fail_counter,
            "max_failures": self._settings.failures,
            "wait_s": round(self.wait_s(self._clock.now()), 3),
        }

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Listener(pybreaker.CircuitBreakerListener):
    def __init__(self, circuit: Circuit) -> None:
        self._circuit = circuit

    def state_change(
        self,
        cb: pybreaker.CircuitBreaker,
        old_state: pybreaker.CircuitBreakerState | None,
        new_state: pybreaker.CircuitBreakerState,
    ) -> None:
        self._circuit._moved(old_state.name if old_state else "", new_state.name)


def _play(error: BaseException | None) -> None:
    """What pybreaker watches instead of the call itself, which was awaited outside."""
    if error is not None:
        raise error
