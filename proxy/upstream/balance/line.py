"""
Those who wait for a slot, first come, first served: a model's further attempts, an upstream's canaries.

Only the first one in line asks. Whatever may have changed, it is called and asks again; when it leaves, with a slot,
with an error or because its caller has left, the next one asks. So a call is never lost with whom it was meant for, and
nobody loses a place by asking in vain. Those who compose new batches look whether a line stands, and let it go first.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from proxy.base.clock import Clock
from proxy.base.lease import Wait

T = TypeVar("T")


class Line:
    """One queue."""

    def __init__(self, moved: Callable[[], None], *, clock: Clock) -> None:
        """
        Args:
            moved: told when the first one has left; it calls the next, and whom else it concerns.
            clock: where time comes from.
        """
        self._moved = moved
        self._clock = clock
        self._turns: deque[asyncio.Event] = deque()

    def __len__(self) -> int:
        return len(self._turns)

    def call(self) -> None:
        """Let the first one ask again."""
        if self._turns:
            self._turns[0].set()

    async def wait(self, ask: Callable[[], T | Wait]) -> T:
        """
        Return what `ask` gives when it is no Wait any more.

        Args:
            ask: asked when it is the caller's turn, then when called, or at the instant that the Wait names. What it
                raises ends the wait.
        """
        turn = asyncio.Event()
        self._turns.append(turn)
        try:
            while True:
                until = None
                if self._turns[0] is turn:
                    found = ask()
                    if not isinstance(found, Wait):
                        return found
                    until = found.until
                await self._called(turn, until)
        finally:
            was_first = self._turns[0] is turn
            self._turns.remove(turn)
            if was_first:
                self._moved()

    async def _called(self, turn: asyncio.Event, until: float | None) -> None:
        turn.clear()  # nothing can have changed since it asked: there was no await in between
        if until is None:
            await turn.wait()
        else:
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout_at(until):
                    await turn.wait()
