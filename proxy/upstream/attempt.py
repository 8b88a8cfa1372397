"""
The tries of one call.

Stands before the choice of an upstream, so each attempt chooses anew: a call that failed at one goes on at another,
and breaker and bucket hear every attempt. aiohttp-retry runs the loop; whether and when is said here: only what may
succeed, with full jitter, never past the deadline, and within a budget. An upstream that asks for time is left alone
by its bucket, for everybody; a call that can go elsewhere meanwhile does.

Why a budget and not "three tries": tries help against what goes wrong now and then. When everything goes wrong they
only multiply the load, and by three at each layer that has the same idea. So they are a share of the calls: a fifth
more at the most, whatever happens.

aiohttp-retry retries things that look like HTTP responses. So each attempt ends as an Outcome, which has a status and
holds the answer or the error; by the time the loop looks at it, the answer has been read and its connection is free.

Source: linkerd and Finagle, retry budgets; tower `tower/src/retry/budget`; Amazon Builders' Library, "Timeouts,
retries and backoff with jitter".
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import aiohttp
from aiohttp_retry import RetryClient, RetryOptionsBase

from proxy.base.clock import Clock
from proxy.base.errors import (
    BadVectors,
    EmbeddingError,
    RateLimited,
    UpstreamDenied,
    UpstreamFailed,
    UpstreamTimeout,
)
from proxy.base.lease import Lease
from proxy.base.messages import Answer, Batch
from proxy.base.settings import AttemptSettings
from proxy.base.stage import Snapshot, Stage

_LOGGER = logging.getLogger("embedding_sidecar.attempt")
"""aiohttp-retry tells it each attempt, in words of its own; `watch/log.py` keeps it quiet."""

MAY_SUCCEED = (RateLimited, UpstreamFailed, UpstreamTimeout, BadVectors, UpstreamDenied)
"""Errors of one exchange with one upstream. One that does not accept our key is not asked again; another one may be. An
open breaker, a missing upstream or a refusal is the same a moment later, wherever."""

_FREE_RETRIES = 10.0
"""Retries that are there from the start and come back with time: at a call a minute a fifth would be none."""
_FREE_PER_S = 0.2
_MOST_RETRIES = 100.0


class Budget:
    """How many further tries are allowed at present."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._left = _FREE_RETRIES if ratio else 0.0
        self._at: float | None = None

    def earn(self, now: float) -> None:
        """Note a call."""
        self._refill(now)
        self._left = min(_MOST_RETRIES, self._left + self._ratio)

    def spend(self, now: float) -> bool:
        """Take one try, if there is one."""
        self._refill(now)
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def _refill(self, now: float) -> None:
        if self._at is not None and self._ratio and self._left < _FREE_RETRIES:
            self._left = min(_FREE_RETRIES, self._left + _FREE_PER_S * (now - self._at))
        self._at = now

    @property
    def left(self) -> float:
        return self._left


def wait_s(
    error: EmbeddingError, attempt: int, settings: AttemptSettings, *, inputs: int, left_s: float, rng: random.Random
) -> float | None:
    """
    Say how long to wait before the next attempt; None when there should be none.

    Args:
        error: how attempt number `attempt` (from 1) ended.
        inputs: how many the batch has: one that may have failed for the sake of a single input is cut, not repeated.
        left_s: time until the deadline.
        rng: where jitter comes from.
    """
    if attempt >= settings.max_attempts or not isinstance(error, MAY_SUCCEED):
        return None
    if inputs > 1 and error.may_be_poison:
        return None
    wait = rng.uniform(0, min(settings.backoff_max_s, settings.backoff_base_s * 2 ** (attempt - 1)))
    return wait if wait < left_s else None


@dataclass(slots=True)
class Outcome:
    """How one attempt ended, with what aiohttp-retry reads of a response."""

    call: _Call
    attempt: int
    answer: Answer | None = None
    error: EmbeddingError | None = None
    method: str = "POST"
    status: int = 0


class _Call:
    """One call, on its way through its attempts."""

    __slots__ = ("batch", "queue_s", "spent_s", "tries")

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.tries = 0
        self.spent_s = 0.0
        """Time in failed exchanges; waits for slots and between attempts are not in it."""
        self.queue_s = 0.0
        """Time spent waiting for slots."""


class Attempt:
    """Tries a batch until it succeeds or should not be tried again."""

    def __init__(
        self,
        settings: AttemptSettings,
        inner: Stage[Batch, Answer],
        *,
        lease: Callable[[Batch], Awaitable[Lease]],
        clock: Clock,
        rng: random.Random,
    ) -> None:
        """
        Args:
            settings: how often, and how far apart.
            inner: where a batch with a lease goes.
            lease: waits for the lease of a further attempt.
            clock, rng: time, and where jitter comes from.
        """
        self._settings = settings
        self._inner = inner
        self._lease = lease
        self._clock = clock
        self._rng = rng
        self._budget = Budget(settings.retry_ratio)
        self._attempts = 0
        self._calls = 0
        self._refused = 0
        # One for all calls: it holds no state of a call, each carries its own through `request()`.
        self._client = RetryClient(
            client_session=cast(aiohttp.ClientSession, self), retry_options=_Options(self), logger=_LOGGER
        )

    async def __call__(self, batch: Batch) -> Answer:
        self._calls += 1
        self._budget.earn(self._clock.now())
        call = _Call(batch)
        try:
            outcome = cast(Outcome, await self._client.request("POST", "", call=call))
        finally:
            self._attempts += call.tries
        if outcome.error is not None:
            raise outcome.error
        assert outcome.answer is not None
        if call.tries == 1 and not call.queue_s:
            return outcome.answer
        return replace(
            outcome.answer,
            attempts=call.tries,
            queue_s=call.queue_s,
            upstream_s=call.spent_s + outcome.answer.upstream_s,
        )

    async def request(
        self, method: str, url: str, *, call: _Call, trace_request_ctx: dict[str, int], **_: Any
    ) -> Outcome:
        """
        One attempt: what RetryClient takes for its session calls this, and nothing else of it.

        Raises:
            EmbeddingError: there is no lease to be had, which ends the call: it says what holds now, and until when.
        """
        start = self._clock.now()
        batch = call.batch
        if batch.lease is None:
            batch = replace(batch, lease=await self._lease(batch))
            call.queue_s += self._clock.now() - start
            start = self._clock.now()
        call.tries = attempt = trace_request_ctx["current_attempt"]
        try:
            return Outcome(call, attempt, answer=await self._inner(batch))
        except EmbeddingError as error:
            call.spent_s += self._clock.now() - start
            call.batch = replace(batch, lease=None, avoid=batch.avoid | {error.upstream})
            return Outcome(call, attempt, error=error)

    async def is_final(self, outcome: Outcome) -> bool:
        """Whether there is no further attempt after this one; else returns when it is time for that."""
        if outcome.error is None:
            return True
        batch = outcome.call.batch
        left_s = batch.deadline - self._clock.now()
        wait = wait_s(
            outcome.error, outcome.attempt, self._settings, inputs=len(batch.inputs), left_s=left_s, rng=self._rng
        )
        if wait is None or not self.may_retry():
            return True
        await self._clock.sleep(wait)
        return False

    def may_retry(self) -> bool:
        """Take one try from the budget; False when there is none left."""
        if self._budget.spend(self._clock.now()):
            return True
        self._refused += 1
        return False

    def snapshot(self) -> Snapshot:
        return {
            "calls": self._calls,
            "attempts": self._attempts,
            "retries_left": round(self._budget.left, 1),
            "retries_refused": self._refused,
        }

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Options(RetryOptionsBase):
    """Our rule in aiohttp-retry's words."""

    def __init__(self, stage: Attempt) -> None:
        super().__init__(
            attempts=20,  # the stage says when it is enough
            methods={"POST"},
            retry_all_server_errors=False,
            evaluate_response_callback=self._is_final,
        )
        self._stage = stage

    async def _is_final(self, response: aiohttp.ClientResponse) -> bool:
        return await self._stage.is_final(cast(Outcome, response))

    def get_timeout(self, attempt: int, response: aiohttp.ClientResponse | None = None) -> float:
        return 0.0  # by then it has waited, on our clock
