"""
How many calls at a time: learned, between a least and a most.

Additive increase, multiplicative decrease. One more while all slots are in use and the upstream is no slower for it;
fewer when it says that it is overloaded, when a call takes too long, or when calls of one size take much longer than
they used to. Servers that compute one thing after the other so get one thing after the other, and a proxy that is
short of processor time itself sends fewer and fuller calls.

Pure: nothing waits in here.

Source: Netflix/concurrency-limits, Gradient2Limit and AIMDLimit; RFC 5681 for the two phases of the increase.
"""

from __future__ import annotations

import math

INFLATED = 2.5
"""Calls that take this many times their usual time are queueing somewhere. Hosted servers vary by 2 by themselves."""
CALM = 1.7
"""Below this, one more at a time is worth a try."""
_SMOOTHING = 0.1
"""Weight of one call in the average."""
_FEWER_INFLATED = 0.9
_FEWER_OVERLOADED = 0.6


class Limit:
    """The number of slots of one upstream."""

    def __init__(self, least: int, start: int, most: int) -> None:
        self._least = float(least)
        self._start = float(start)
        self._most = float(most)
        self._value = self._start
        self._inflation = 1.0
        self._is_ramping = True
        """Until the first decrease the limit grows by one a call, as TCP's slow start does."""
        self._fewer_at = -math.inf
        """Instant of the last decrease: calls that left before it say nothing about what came of it."""

    @property
    def slots(self) -> int:
        return int(self._value)

    @property
    def inflation(self) -> float:
        return self._inflation

    def succeeded(self, now: float, left_at: float, *, inflation: float, busy: int) -> None:
        """
        Hear of a good call.

        Args:
            now, left_at: when it ended, and began.
            inflation: how many times longer than usual for its size it took.
            busy: calls under way when it ended, itself included.
        """
        if left_at < self._fewer_at:
            return
        self._inflation += _SMOOTHING * (min(inflation, 10.0) - self._inflation)
        if self._inflation > INFLATED:
            self._fewer(now, left_at, _FEWER_INFLATED)
        elif self._inflation < CALM and busy >= self.slots:
            self._value = min(self._most, self._value + (1.0 if self._is_ramping else 1.0 / self._value))

    def overloaded(self, now: float, left_at: float) -> None:
        """Hear that the upstream had too much at a time, or that a call ran out of time."""
        self._fewer(now, left_at, _FEWER_OVERLOADED)

    def recovered(self) -> None:
        """Begin anew with the least: the upstream has been away, and should not be met by all who waited."""
        self._value = self._least
        self._inflation = 1.0
        self._is_ramping = True

    def _fewer(self, now: float, left_at: float, factor: float) -> None:
        if left_at >= self._fewer_at:
            self._value = max(self._least, self._value * factor)
            self._fewer_at = now
            self._inflation = min(self._inflation, CALM)
            self._is_ramping = False
