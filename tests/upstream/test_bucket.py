"""
Limits per minute, on a loop whose time leaps: a minute passes in no time, and instants are exact.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any

import pytest

from proxy.base.errors import UpstreamFailed
from proxy.base.messages import Answer, Batch
from proxy.base.settings import BucketSettings
from proxy.upstream.bucket import Bucket
from tests.fakes.clock import settle
from tests.fakes.stage import AnsweringStage, ScriptedStage, make_batch, rows_of


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


def leap(play: Coroutine[Any, Any, None]) -> None:
    """Run a play on a leaping loop."""
    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        runner.run(play)


class Arrivals(AnsweringStage):
    """Answers at once and notes when each batch came: (instant, first input)."""

    def __init__(self) -> None:
        super().__init__(self._noted)
        self.seen: list[tuple[float, str]] = []

    def _noted(self, batch: Batch) -> Answer:
        self.seen.append((asyncio.get_running_loop().time(), str(batch.inputs[0])))
        return Answer(rows_of(batch.inputs), 1, "u")

    @property
    def instants(self) -> list[float]:
        return [instant for instant, _ in self.seen]


def sized(size_bytes: int, name: str = "text") -> Batch:
    return make_batch([name], size_bytes=size_bytes)


async def pass_all(bucket: Bucket, batches: list[Batch]) -> None:
    """Send the batches in this order, all at once."""
    async with asyncio.TaskGroup() as group:
        for batch in batches:
            group.create_task(bucket(batch))
            await settle(1)


def test_no_limits() -> None:
    """Without limits every call passes at once."""

    async def play() -> None:
        arrivals = Arrivals()
        bucket = Bucket(BucketSettings(), arrivals)
        answer = await bucket(make_batch(["a", "b"]))
        await pass_all(bucket, [sized(10**9) for _ in range(50)])

        assert answer.rows == rows_of(["a", "b"])
        assert arrivals.instants == pytest.approx([0.0] * 51, abs=1e-3)
        assert bucket.snapshot() == {"requests_per_minute": 0, "bytes_per_minute": 0, "waiting_calls": 0}

    leap(play())


def test_requests_are_spread_evenly() -> None:
    """60 calls per minute go out one a second, in the order in which they came: no burst, no more in any minute."""

    async def play() -> None:
        arrivals = Arrivals()
        await pass_all(Bucket(BucketSettings(requests_per_minute=60), arrivals), [sized(1, str(n)) for n in range(90)])

        assert arrivals.instants == pytest.approx([float(n) for n in range(90)], abs=1e-3)
        assert [name for _, name in arrivals.seen] == [str(n) for n in range(90)]

    leap(play())


def test_idle_minute_saves_nothing_up() -> None:
    """After a quiet time calls are paced as before."""

    async def play() -> None:
        arrivals = Arrivals()
        bucket = Bucket(BucketSettings(requests_per_minute=60), arrivals)
        await bucket(sized(1))
        await asyncio.sleep(600)
        await pass_all(bucket, [sized(1)] * 4)

        assert arrivals.instants == pytest.approx([0, 600, 601, 602, 603], abs=1e-3)

    leap(play())


def test_bytes_per_minute() -> None:
    """Over two minutes no more bytes pass than the limit, and one second's worth of it at the start."""

    async def play() -> None:
        arrivals = Arrivals()
        settings = BucketSettings(bytes_per_minute=60_000)
        await pass_all(Bucket(settings, arrivals), [sized(500) for _ in range(242)])

        assert arrivals.instants[:2] == pytest.approx([0, 0], abs=1e-3)
        assert arrivals.instants[2] == pytest.approx(0.5, abs=1e-3)
        assert arrivals.instants[-1] == pytest.approx(120.0, abs=0.01)

    leap(play())


@pytest.mark.parametrize("size_bytes", [999, 1000, 1001, 5000])
def test_batch_around_the_bucket_size(size_bytes: int) -> None:
    """A batch that holds more than a second allows passes in portions, and takes the time that its bytes take."""

    async def play() -> None:
        arrivals = Arrivals()
        bucket = Bucket(BucketSettings(bytes_per_minute=60_000), arrivals)
        await bucket(sized(size_bytes))
        await bucket(sized(1000))

        assert arrivals.instants[0] == pytest.approx(max(0, size_bytes - 1000) / 1000, abs=2e-3)
        assert arrivals.instants[1] == pytest.approx(size_bytes / 1000, abs=2e-3)

    leap(play())


def test_empty_text() -> None:
    """A batch without bytes takes nothing from the bytes, and still counts as a request."""

    async def play() -> None:
        arrivals = Arrivals()
        bucket = Bucket(BucketSettings(bytes_per_minute=60_000, requests_per_minute=60), arrivals)
        for size in (1000, 0, 0):
            await bucket(sized(size))

        assert arrivals.instants == pytest.approx([0, 1, 2], abs=1e-3)

    leap(play())


@pytest.mark.parametrize("bytes_per_minute", [6, 60, 100, 6000])
def test_limit_of_any_size_is_kept(bytes_per_minute: int) -> None:
    """Whatever the limit, ten minutes' worth of bytes takes ten minutes, not less and hardly more."""

    async def play() -> None:
        arrivals = Arrivals()
        bucket = Bucket(BucketSettings(bytes_per_minute=bytes_per_minute), arrivals)
        await bucket(sized(bytes_per_minute * 10))

        assert 580 <= arrivals.instants[0] <= 620

    leap(play())


def test_large_batch_among_small_ones() -> None:
    """A large batch takes its turn in the order of arrival, however many small ones come after it."""

    async def play() -> None:
        arrivals = Arrivals()
        bucket = Bucket(BucketSettings(bytes_per_minute=60_000), arrivals)
        batches = [sized(1000, "first"), sized(8000, "large"), *(sized(100, f"small {n}") for n in range(200))]
        await pass_all(bucket, batches)

        assert [name for _, name in arrivals.seen] == [str(batch.inputs[0]) for batch in batches]
        assert arrivals.instants[1] == pytest.approx(8.0, abs=0.01)

    leap(play())


def test_both_limits() -> None:
    """Where both limits are set, the stricter one paces."""

    async def play() -> None:
        arrivals = Arrivals()
        bucket = Bucket(BucketSettings(requests_per_minute=60, bytes_per_minute=60_000), arrivals)
        await pass_all(bucket, [sized(10), sized(10), sized(3000), sized(10), sized(10)])

        assert arrivals.instants[1] == pytest.approx(1.0, abs=0.01)
        assert arrivals.instants[2] == pytest.approx(3.0, abs=0.05)
        assert arrivals.instants[4] - arrivals.instants[3] == pytest.approx(1.0, abs=0.05)

    leap(play())


def test_caller_leaves_while_it_waits() -> None:
    """Whoever is cancelled, first in the queue or further behind, leaves nobody stuck and takes nobody's turn."""

    async def play() -> None:
        arrivals = Arrivals()
        bucket = Bucket(BucketSettings(requests_per_minute=60), arrivals)
        tasks = [asyncio.create_task(bucket(sized(1, str(n)))) for n in range(6)]
        await asyncio.sleep(0.5)
        waiting = bucket.snapshot()["waiting_calls"]
        tasks[1].cancel()
        tasks[3].cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)

        assert waiting == 5
        assert [type(end).__name__ for end in ends] == [
            "Answer", "CancelledError", "Answer", "CancelledError", "Answer", "Answer",
        ]  # fmt: skip
        assert [name for _, name in arrivals.seen] == ["0", "2", "4", "5"]
        assert arrivals.instants == pytest.approx([0, 1, 2, 3], abs=1e-3)
        assert bucket.snapshot()["waiting_calls"] == 0

    leap(play())


def test_everybody_leaves_and_somebody_comes() -> None:
    """A queue that was cancelled as a whole does not hinder the next call."""

    async def play() -> None:
        arrivals = Arrivals()
        bucket = Bucket(BucketSettings(bytes_per_minute=6000), arrivals)
        tasks = [asyncio.create_task(bucket(sized(1000, str(n)))) for n in range(5)]
        await asyncio.sleep(3.5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await bucket(sized(100, "late"))

        assert [name for _, name in arrivals.seen] == ["late"]
        assert arrivals.instants[0] <= 5.0

    leap(play())


def test_slow_upstream_does_not_hold_the_turn() -> None:
    """Only passing the bucket is one after the other; the calls themselves overlap."""

    async def play() -> None:
        inner = ScriptedStage()
        bucket = Bucket(BucketSettings(requests_per_minute=60), inner)
        tasks = [asyncio.create_task(bucket(sized(1))) for _ in range(3)]
        await asyncio.sleep(2.5)

        assert len(inner.calls) == 3
        assert bucket.snapshot()["waiting_calls"] == 0

        for call in inner.calls:
            call.answer("answer")
        assert await asyncio.gather(*tasks) == ["answer"] * 3

    leap(play())


async def test_call_fails() -> None:
    """An error of the upstream passes through as itself."""
    error = UpstreamFailed("it broke")
    bucket = Bucket(BucketSettings(requests_per_minute=600_000), AnsweringStage(lambda batch: error))
    with pytest.raises(UpstreamFailed) as caught:
        await bucket(make_batch())

    assert caught.value is error


async def test_close() -> None:
    """Closing closes what follows."""
    inner = ScriptedStage()
    await Bucket(BucketSettings(), inner).aclose()

    assert inner.is_closed
