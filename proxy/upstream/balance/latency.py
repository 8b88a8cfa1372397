"""
What a call should take: learned from the calls of one model at one upstream.

Two answers. `usual`: the least that calls of about this size have taken lately, by which a slow one is told. And a line
through the last calls, a fixed part and a part per input: it says how much is gained by waiting for a fuller batch, and
how long a batch will take.

Pure: nothing waits in here.
"""

from __future__ import annotations

_FORGET_S = 60.0
"""The least time of a size counts twice as much after each minute without a call as fast."""
_MOST_DOUBLINGS = 30.0
"""By then it counts for nothing; a weekend without a call of this size would leave the range of floats."""
_SMOOTHING = 0.05
"""Weight of one call in the line: the last twenty count."""


class Latency:
    """Times of the calls of one model at one upstream."""

    def __init__(self) -> None:
        self._least: dict[tuple[int, int], tuple[float, float]] = {}
        self._n = self._t = self._nn = self._nt = 0.0
        self._calls = 0
        """Those that the line knows."""
        self._is_warm = False
        self._slope = 0.0

    def took(self, now: float, inputs: int, size_bytes: int, seconds: float) -> float:
        """
        Hear of a good call.

        Returns:
            How many times longer it took than a call of this size can.
        """
        # Sizes within a factor of two are alike: at most some 200 pairs, since both are bounded.
        size = (inputs.bit_length(), size_bytes.bit_length())
        least, at = self._least.get(size, (seconds, now))
        least *= 2 ** min((now - at) / _FORGET_S, _MOST_DOUBLINGS)
        self._least[size] = (min(least, seconds), now)
        if self._is_warm:
            self._fit(inputs, seconds)
        self._is_warm = True  # the first call loads the model and opens the connection: nothing to expect of others
        return max(1.0, seconds / max(1e-9, least))

    def _fit(self, inputs: int, seconds: float) -> None:
        self._calls += 1
        weight = max(_SMOOTHING, 1 / self._calls)
        n, t = inputs - self._n, seconds - self._t
        self._n += weight * n
        self._t += weight * t
        self._nn = (1 - weight) * (self._nn + weight * n * n)
        self._nt = (1 - weight) * (self._nt + weight * n * t)

        if self._nn > 0.05 * max(1.0, self._n):  # else they have been too much alike to tell; what was known stays
            self._slope = max(self._nt / self._nn, 1e-6)

    @property
    def per_input_s(self) -> float:
        """What one more input adds; zero while nobody knows."""
        return min(self._slope, self._t / max(1.0, self._n))

    @property
    def fixed_s(self) -> float:
        """What a call takes however little it carries; zero before the first one."""
        return max(0.0, self._t - self.per_input_s * self._n)

    def expected_s(self, inputs: int) -> float:
        """Return what a call of so many inputs should take."""
        return self.fixed_s + self.per_input_s * inputs
