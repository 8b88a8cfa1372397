"""
The upstream's limits per minute: calls are paced to keep them.

Two aiolimiter buckets, requests and bytes of text. Both are kept small and drained fast: a bucket of a minute's worth
would let all of it go at once and twice the limit pass within one minute. Only one call at a time waits in them,
behind a fair lock: aiolimiter wakes the smallest waiter first, so a large batch would starve.
"""

from __future__ import annotations

import asyncio

from aiolimiter import AsyncLimiter

from proxy.base.messages import Answer, Batch
from proxy.base.settings import BucketSettings
from proxy.base.stage import Snapshot, Stage

_MINUTE_S = 60.0
_BYTES_PERIOD_S = 1.0
"""The byte bucket holds what a second allows."""


class Bucket:
    """Paces the calls to one upstream."""

    def __init__(self, settings: BucketSettings, inner: Stage[Batch, Answer]) -> None:
        self._settings = settings
        self._inner = inner
        self._turn = asyncio.Lock()
        self._waiting = 0
        requests, size = settings.requests_per_minute, settings.bytes_per_minute
        self._requests = AsyncLimiter(1, _MINUTE_S / requests) if requests else None
        self._bytes = AsyncLimiter(size / _MINUTE_S * _BYTES_PERIOD_S, _BYTES_PERIOD_S) if size else None

    async def __call__(self, batch: Batch) -> Answer:
        if self._requests or self._bytes:
            self._waiting += 1
            try:
                async with self._turn:
                    await self._passed(batch.size_bytes)
            finally:
                self._waiting -= 1
        return await self._inner(batch)

    async def _passed(self, size_bytes: int) -> None:
        if self._bytes:
            # More than the bucket holds would be refused: it is drawn in portions, and nobody gets between them.
            left = float(size_bytes)
            while left > 0:
                portion = min(left, self._bytes.max_rate)
                await self._bytes.acquire(portion)
                left -= portion
        if self._requests:
            await self._requests.acquire()

    def snapshot(self) -> Snapshot:
        return {
            "requests_per_minute": self._settings.requests_per_minute,
            "bytes_per_minute": self._settings.bytes_per_minute,
            "waiting_calls": self._waiting,
        }

    async def aclose(self) -> None:
        await self._inner.aclose()
