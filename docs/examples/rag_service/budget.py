"""
How long a request may take: until one instant, set when it comes in, and no longer than its caller waits.

The caller says it in `X-Request-Timeout-Ms`, in the same words as to the sidecar. A service in the middle hands on what
is left, not what it was given: who has used up a second has a second less to give.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Header, Request

MAX_TIMEOUT_MS = 600_000
"""As in the sidecar."""

Patience = Annotated[int | None, Header(alias="X-Request-Timeout-Ms", ge=1, le=MAX_TIMEOUT_MS)]

T = TypeVar("T")


class CallerLeft(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The time of one request."""

    request: Request
    deadline: float
    """An instant of `time.monotonic()`."""

    def left_s(self) -> float:
        """What is left of it; a hair above nothing when it is over, since nothing is no patience at all."""
        return max(0.001, self.deadline - time.monotonic())

    async def spend(self, work: Coroutine[Any, Any, T]) -> T:
        """
        Await something that is done for the request, and cancel it when there is no sense in it any more.

        FastAPI does not do so by itself: a handler whose caller has hung up runs on to its end.

        Raises:
            TimeoutError: the deadline has come.
            CallerLeft: the caller has hung up.
        """
        task, leaving = asyncio.create_task(work), asyncio.create_task(self._caller_left())
        try:
            async with asyncio.timeout(self.left_s()):
                await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise CallerLeft
            return task.result()
        finally:
            task.cancel()
            leaving.cancel()
            await asyncio.gather(task, leaving, return_exceptions=True)

    async def _caller_left(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


def budget_of(usual_s: float) -> Callable[[Request, Patience], Budget]:
    """Return the dependency that makes a request's budget: what the caller says, else the usual time."""

    def budget(request: Request, patience_ms: Patience = None) -> Budget:
        return Budget(request, time.monotonic() + (usual_s if patience_ms is None else patience_ms / 1000))

    return budget
