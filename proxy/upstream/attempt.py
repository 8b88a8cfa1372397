"""
The tries of one call.

Stands before the choice of an upstream, so each attempt chooses anew: a call that failed at one goes on at another,
and breaker and bucket hear every attempt. aiohttp-retry runs the loop; whether and when is said here: only what may
succeed, with full jitter, as late as the upstream asks within a bound, and never past the deadline.

aiohttp-retry retries things that look like HTTP responses. So each attempt ends as an Outcome, which has a status and
holds the answer or the error; by the time the loop looks at it, the answer has been read and its connection is free.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import aiohttp
from aiohttp_retry import RetryClient, RetryOptionsBase

from proxy.base.clock import Clock
from proxy.base.errors import BadVectors, EmbeddingError, RateLimited, UpstreamFailed, UpstreamTimeout
from proxy.base.messages import Answer, Batch
from proxy.base.settings import AttemptSettings
from proxy.base.stage import Snapshot, Stage

_LOGGER = logging.getLogger("embedding_sidecar.attempt")
"""aiohttp-retry tells it each attempt, in words of its own; `watch/log.py` keeps it quiet."""

MAY_SUCCEED = (RateLimited, UpstreamFailed, UpstreamTimeout, BadVectors)
"""Errors of one exchange. An open breaker, a missing upstream or a refusal is the same a moment later."""


def wait_s(
    error: EmbeddingError, attempt: int, settings: AttemptSettings, *, left_s: float, rng: random.Random
) -> float | None:
    """
    Say how long to wait before the next attempt; None when there should be none.

    Args:
        error: how attempt number `attempt` (from 1) ended.
        left_s: time until the deadline.
        rng: where jitter comes from.
    """
    if attempt >= settings.max_attempts or not isinstance(error, MAY_SUCCEED):
        return None
    wait = rng.uniform(0, min(settings.backoff_max_s, settings.backoff_base_s * 2 ** (attempt - 1)))
    if error.retry_after_s is not None:
        if error.retry_after_s > settings.retry_after_max_s:
            return None
        wait += error.retry_after_s
    return wait if wait < left_s else None


@dataclass(slots=True)
class Outcome:
    """How one attempt ended, with what aiohttp-retry reads of a response."""

    attempt: int
    answer: Answer | None = None
    error: EmbeddingError | None = None
    wait_s: float = 0.0
    method: str = "POST"
    status: int = 0
    closed: bool = True


class Attempt:
    """Tries a batch until it succeeds or should not be tried again."""

    def __init__(
        self, settings: AttemptSettings, inner: Stage[Batch, Answer], *, clock: Clock, rng: random.Random
    ) -> None:
        self._settings = settings
        self._inner = inner
        self._clock = clock
        self._rng = rng
        self._attempts = 0
        self._calls = 0

    async def __call__(self, batch: Batch) -> Answer:
        self._calls += 1
        call = _Call(batch, self._inner, self._clock)
        client = RetryClient(
            client_session=cast(aiohttp.ClientSession, call),
            retry_options=_Options(lambda outcome: self._wait_s(batch, outcome), self._settings.max_attempts),
            logger=_LOGGER,
        )
        try:
            outcome = cast(Outcome, await client.request("POST", ""))
        finally:
            self._attempts += call.tries
        if outcome.error is not None:
            raise outcome.error
        assert outcome.answer is not None
        answer = outcome.answer
        return replace(answer, attempts=outcome.attempt, upstream_s=call.spent_s - answer.queue_s)

    def _wait_s(self, batch: Batch, outcome: Outcome) -> float | None:
        if outcome.error is None:
            return None
        left_s = batch.deadline - self._clock.now()
        return wait_s(outcome.error, outcome.attempt, self._settings, left_s=left_s, rng=self._rng)

    def snapshot(self) -> Snapshot:
        return {"calls": self._calls, "attempts": self._attempts}

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Call:
    """What RetryClient takes for its session: it calls `request()` once per attempt and nothing else."""

    def __init__(self, batch: Batch, inner: Stage[Batch, Answer], clock: Clock) -> None:
        self._batch = batch
        self._inner = inner
        self._clock = clock
        self.tries = 0
        self.spent_s = 0.0
        """Time in all attempts together; the waits between them are not in it."""

    async def request(self, method: str, url: str, *, trace_request_ctx: dict[str, int], **_: Any) -> Outcome:
        self.tries = attempt = trace_request_ctx["current_attempt"]
        start = self._clock.now()
        try:
            return Outcome(attempt, answer=await self._inner(self._batch))
        except EmbeddingError as error:
            self._batch = replace(self._batch, avoid=self._batch.avoid | {error.upstream})
            return Outcome(attempt, error=error)
        finally:
            self.spent_s += self._clock.now() - start


class _Options(RetryOptionsBase):
    """Our rule in aiohttp-retry's words, for one call."""

    def __init__(self, wait: Callable[[Outcome], float | None], max_attempts: int) -> None:
        super().__init__(
            attempts=max_attempts,
            methods={"POST"},
            retry_all_server_errors=False,
            evaluate_response_callback=self._is_final,
        )
        self._wait = wait

    async def _is_final(self, response: aiohttp.ClientResponse) -> bool:
        outcome = cast(Outcome, response)
        wait = self._wait(outcome)
        if wait is None:
            return True
        outcome.wait_s = wait
        return False

    def get_timeout(self, attempt: int, response: aiohttp.ClientResponse | None = None) -> float:
        return cast(Outcome, response).wait_s
