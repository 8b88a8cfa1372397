"""On a leaping loop time passes without waiting, and stands still for nobody who is stuck."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.fakes.loop import LoopClock, leap


def test_hour_that_passes_at_once() -> None:
    """Sleepers wake in the order of their instants, which are exact, and a time-out fires at its own."""
    woken: list[tuple[str, float]] = []
    clock = LoopClock()

    async def sleeps(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.now()))

    async def play() -> None:
        start = clock.now()
        with pytest.raises(TimeoutError):
            async with clock.timeout_at(start + 1800):
                await asyncio.gather(sleeps("last", 3600), sleeps("first", -1), sleeps("second", 60))
        woken.append(("time-out", clock.now()))

    began = time.monotonic()
    leap(play())

    assert [name for name, _ in woken] == ["first", "second", "time-out"]
    assert [instant for _, instant in woken] == pytest.approx([0, 60, 1800], abs=0.001)
    assert time.monotonic() - began < 5


def test_play_that_is_stuck() -> None:
    """When everybody waits and no timer runs, the test fails instead of hanging."""

    async def play() -> None:
        await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="somebody is stuck"):
        leap(play())
