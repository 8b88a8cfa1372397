"""Closed-loop callers and a few slots, on a loop whose time leaps: nearly as many inputs a second as can be."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from typing import Any

import pytest

from proxy.base.lease import Outlook
from proxy.base.messages import Answer, Batch, Limits
from proxy.base.settings import MicroBatchSettings
from proxy.funnel.microbatch import MicroBatch
from tests.fakes.leases import ROOMY, ScriptedLeases
from tests.fakes.loop import LoopClock, leap
from tests.fakes.stage import asked, make_request

SLOTS = 8
FIXED_S = 0.030
PER_INPUT_S = 0.001
OUR_S = 0.0001
"""What a request takes of our only processor, half before it waits and half after."""
BACK_S = 0.0008
"""What a caller needs on the average until it asks again."""
WARM_S = 0.2


class Server:
    """An upstream that takes FIXED_S and PER_INPUT_S for a call, however many there are at a time."""

    def __init__(self) -> None:
        self.sizes: Counter[int] = Counter()

    async def __call__(self, batch: Batch) -> Answer:
        self.sizes[len(batch.inputs)] += 1
        await asyncio.sleep(FIXED_S + PER_INPUT_S * len(batch.inputs))
        return Answer((b"1234",) * len(batch.inputs), len(batch.inputs), "u")

    def snapshot(self) -> dict[str, Any]:
        return {}

    async def aclose(self) -> None:
        pass


class Rush:
    """So many callers that ask for one input at a time, again and again."""

    def __init__(self, callers: int, seconds: float, slots: int = SLOTS, limits: Limits = ROOMY) -> None:
        self.server = Server()
        self.leases = ScriptedLeases(slots, limits, Outlook(0, 0, FIXED_S, PER_INPUT_S))
        self.waits: list[float] = []
        self._callers = callers
        self._seconds = seconds
        self._rng = random.Random(3)
        self._processor = asyncio.Lock()
        self._texts = map(str, itertools.count())

    async def play(self) -> None:
        self._clock = LoopClock()
        self._stage = MicroBatch(
            MicroBatchSettings(),
            self.server,
            leases=self.leases,
            may_retry=lambda: True,
            clock=self._clock,
            observe=lambda _: None,
        )
        await asyncio.gather(*[self._caller() for _ in range(self._callers)])
        self.leases.check()
        await self._stage.aclose()

    async def _caller(self) -> None:
        await asyncio.sleep(self._rng.random() * 0.02)
        while (now := self._clock.now()) < self._seconds:
            await self._computes()
            await asked(self._stage, make_request([next(self._texts)], now=now))
            await self._computes()
            if now > WARM_S:
                self.waits.append(self._clock.now() - now)
            await asyncio.sleep(BACK_S * (0.5 + self._rng.random()))

    async def _computes(self) -> None:
        async with self._processor:
            await asyncio.sleep(OUR_S / 2)

    @property
    def per_s(self) -> float:
        return len(self.waits) / (self._seconds - WARM_S)


@pytest.mark.parametrize("callers", [64, 256])
def test_more_callers_than_slots(callers: int) -> None:
    """With many callers and few slots, full and even batches reach at least 92 % of the ideal."""
    rush = Rush(callers, seconds=1.2)
    leap(rush.play())
    each = callers / SLOTS
    ideal_per_s = SLOTS * each / (FIXED_S + PER_INPUT_S * each)

    assert rush.per_s >= 0.92 * ideal_per_s
    assert max(rush.server.sizes) == each


def test_as_many_slots_as_callers() -> None:
    """With a slot for each caller nobody waits for anybody: each call is one input, and takes what a call takes."""
    rush = Rush(SLOTS, seconds=1.2)
    leap(rush.play())

    assert set(rush.server.sizes) == {1}
    assert max(rush.waits) == pytest.approx(FIXED_S + PER_INPUT_S, abs=SLOTS * OUR_S)


@pytest.mark.parametrize(("slots", "limit", "callers"), [(1, 32, 256), (2, 8, 64)])
def test_calls_that_carry_less_than_waits(slots: int, limit: int, callers: int) -> None:
    """Where a call cannot carry a slot's share, slots are never idle, and nobody is refused who can be in time."""
    rush = Rush(callers, 1.2, slots, Limits(limit, 1_000_000))
    leap(rush.play())

    assert rush.per_s >= 0.97 * slots * limit / (FIXED_S + PER_INPUT_S * limit)
    assert max(rush.server.sizes) == limit
