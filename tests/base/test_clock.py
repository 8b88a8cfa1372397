"""The real clock: what is tested needs no waiting."""

from __future__ import annotations

import asyncio

import pytest

from proxy.base.clock import MonotonicClock
from tests.fakes.clock import settle


def test_clock_asked_twice() -> None:
    """An instant is never before an earlier one."""
    clock = MonotonicClock()

    instants = [clock.now() for _ in range(1000)]

    assert instants == sorted(instants)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("-inf")])
async def test_sleep_that_is_over_already(seconds: float) -> None:
    """Zero or less is no wait, but still a turn for others."""
    seen: list[str] = []
    other = asyncio.create_task(_note(seen))

    await MonotonicClock().sleep(seconds)
    await other

    assert seen == ["ran"]


async def test_sleep_that_is_not_over() -> None:
    """A sleeper sleeps, and can be woken by its cancellation only."""
    sleeper = asyncio.create_task(MonotonicClock().sleep(3600))
    await settle()
    was_done = sleeper.done()
    sleeper.cancel()
    await asyncio.wait({sleeper})

    assert not was_done
    assert sleeper.cancelled()


@pytest.mark.parametrize("seconds", [0.0, -5.0])
async def test_deadline_that_has_passed(seconds: float) -> None:
    """A block whose deadline has passed ends at its first wait."""
    clock = MonotonicClock()

    with pytest.raises(TimeoutError):
        async with clock.timeout_at(clock.now() + seconds):
            await asyncio.Event().wait()


async def test_deadline_that_is_far() -> None:
    """A block that ends before its deadline knows nothing of it."""
    clock = MonotonicClock()

    async with clock.timeout_at(clock.now() + 3600) as timeout:
        await settle()

    assert isinstance(timeout, asyncio.Timeout)
    assert not timeout.expired()


async def test_deadline_on_the_loop_s_own_clock() -> None:
    """A deadline is as far away for the loop as it is for us, whatever instant the loop's clock shows."""
    clock = MonotonicClock()
    loop = asyncio.get_running_loop()

    async with clock.timeout_at(clock.now() + 3600) as timeout:
        assert isinstance(timeout, asyncio.Timeout)
        when = timeout.when()

    assert when is not None
    assert when - loop.time() == pytest.approx(3600, abs=60)


async def _note(seen: list[str]) -> None:
    seen.append("ran")
