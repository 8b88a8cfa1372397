"""A loop whose time leaps: a minute passes in no time, and instants are exact."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any


class LeapingSelector(selectors.DefaultSelector):
    """Where a loop would wait for its next timer, this moves the time there; a turn of the loop takes a microsecond."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits and no timer runs: somebody is stuck"
        self.now += max(1e-6, timeout)
        return super().select(0)


class LeapingLoop(asyncio.SelectorEventLoop):
    """A loop without any real waiting."""

    def __init__(self) -> None:
        self._leaping = LeapingSelector()
        super().__init__(self._leaping)

    def time(self) -> float:
        return self._leaping.now


class LoopClock:
    """Obeys base/clock.py by the time of the running loop."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))

    def timeout_at(self, deadline: float) -> AbstractAsyncContextManager[object]:
        return asyncio.timeout_at(deadline)


def leap(play: Coroutine[Any, Any, None]) -> None:
    """Run a play on a leaping loop."""
    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        runner.run(play)
