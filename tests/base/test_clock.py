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
    """A block that ends before its deadline knows nothing of it, nor does what comes after."""
    clock = MonotonicClock()

    async with clock.timeout_at(clock.now() + 0.01):
        await settle()
    async with clock.timeout_at(clock.now() + 3600):
        await asyncio.sleep(0.02)

    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_caller_leaves_before_the_deadline() -> None:
    """Somebody else's cancellation stays one."""
    clock = MonotonicClock()

    async def waits() -> None:
        async with clock.timeout_at(clock.now() + 3600):
            await asyncio.Event().wait()

    task = asyncio.create_task(waits())
    await settle()
    task.cancel()
    await settle()

    assert task.cancelled()


async def test_caller_leaves_as_the_deadline_comes() -> None:
    """Where both come in one turn of the loop, the caller has left: nobody hears of a time-out."""
    clock = MonotonicClock()

    async def waits() -> None:
        async with clock.timeout_at(clock.now() - 1):
            await asyncio.Event().wait()

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()
    await settle()

    assert task.cancelled()


@pytest.mark.parametrize("is_inner", [True, False], ids=["the inner one", "the outer one"])
async def test_deadline_within_a_deadline(is_inner: bool) -> None:
    """The one that has come ends its own block, and the other one goes on."""
    clock = MonotonicClock()
    soon, late = clock.now() + 0.01, clock.now() + 3600
    ended = []

    try:
        async with clock.timeout_at(late if is_inner else soon):
            try:
                async with clock.timeout_at(soon if is_inner else late):
                    await asyncio.Event().wait()
            except TimeoutError:
                ended.append("inner")
            await settle()
    except TimeoutError:
        ended.append("outer")

    assert ended == (["inner"] if is_inner else ["outer"])


async def test_error_at_the_deadline() -> None:
    """What the block itself raises when it is told to end is not hidden."""
    clock = MonotonicClock()

    with pytest.raises(ZeroDivisionError):
        async with clock.timeout_at(clock.now() - 1):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ZeroDivisionError from None


class ElsewhereLoop(asyncio.SelectorEventLoop):
    """Its clock shows another instant than ours."""

    def time(self) -> float:
        return super().time() + 1e6


def test_deadline_on_the_loop_s_own_clock() -> None:
    """A deadline is as far away for the loop as it is for us, whatever instant the loop's clock shows."""
    clock = MonotonicClock()

    async def ends(seconds: float) -> None:
        async with clock.timeout_at(clock.now() + seconds):
            await asyncio.sleep(0.02)

    with asyncio.Runner(loop_factory=ElsewhereLoop) as runner:
        runner.run(ends(3600))
        with pytest.raises(TimeoutError):
            runner.run(ends(0.001))


async def _note(seen: list[str]) -> None:
    seen.append("ran")
