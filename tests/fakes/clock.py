"""A clock that stands still until it is moved."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator


async def settle(turns: int = 20) -> None:
    """Let everything that can run do so; nothing in the house needs more turns of the loop than this."""
    for _ in range(turns):
        await asyncio.sleep(0)


class HandClock:
    """Starts at 1000 s. `advance()` wakes sleepers and fires time-outs in the order of their instants."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now
        self._due: list[tuple[float, int, asyncio.Future[None] | asyncio.Timeout]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._due, (self._now + seconds, next(self._order), future))
        await future

    @contextlib.asynccontextmanager
    async def timeout_at(self, deadline: float) -> AsyncIterator[None]:
        async with asyncio.timeout(None) as timeout:
            if deadline <= self._now:
                timeout.reschedule(asyncio.get_running_loop().time())
            else:
                heapq.heappush(self._due, (deadline, next(self._order), timeout))
            yield

    async def advance(self, seconds: float) -> None:
        """Move on, step by step, and let what wakes run."""
        await settle()
        end = self._now + seconds
        while self._due and self._due[0][0] <= end:
            self._now, _, waiting = heapq.heappop(self._due)
            if isinstance(waiting, asyncio.Timeout):
                with contextlib.suppress(RuntimeError):  # its block has been left
                    waiting.reschedule(asyncio.get_running_loop().time())
            elif not waiting.done():
                waiting.set_result(None)
            await settle()
        self._now = end
        await settle()
