"""
Time as the house knows it.

Everything that waits or compares instants asks a Clock that it was handed, so tests move time by hand. Instants are
seconds of the monotonic clock; wall time appears in log lines only.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager
from typing import Protocol


class Clock(Protocol):
    """What the stages need of time."""

    def now(self) -> float:
        """Return the present instant, in seconds of a clock that never steps back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait; not at all for zero or less."""
        ...

    def timeout_at(self, deadline: float) -> AbstractAsyncContextManager[object]:
        """Raise TimeoutError from the block when `deadline`, an instant of this clock, has passed."""
        ...


class MonotonicClock:
    """The real one."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))

    def timeout_at(self, deadline: float) -> AbstractAsyncContextManager[object]:
        # Relative on purpose: the loop's clock may be another one (uvloop caches its own per turn).
        return asyncio.timeout(deadline - time.monotonic())
