"""
How many tokens an input is, without a tokenizer; and when what waits will be done.

Both learn from what comes back. Bytes times a ratio per model: English has about a quarter of a token per byte, code
and other scripts up to one; the usage that upstreams report says which. The drain is measured while work waits.

Pure: nothing waits in here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from proxy.base.messages import TOKEN_ID_BYTES

_FIRST_RATIO = 0.33
"""Tokens per byte before anything was learned: rather too many, since limits are reserved by it."""
_FIRST_BYTES = 2000
"""How much the first guess weighs against what is learned."""
_OWN_TOKENS = 1.0
"""Each input has a token or two of its own: a beginning, an end, a word cut in pieces."""
_MEMORY_BYTES = 2_000_000
"""About so many bytes count; older ones fade, as callers turn from prose to code."""


class Tokens:
    """Tokens per byte of one model."""

    def __init__(self) -> None:
        self._bytes = float(_FIRST_BYTES)
        self._tokens = _FIRST_RATIO * _FIRST_BYTES

    @property
    def ratio(self) -> float:
        return self._tokens / self._bytes

    def costs(self, sizes: Sequence[int], *, is_tokens: bool) -> list[float]:
        """Estimate each input, from its bytes; token ids are counted."""
        if is_tokens:
            return [float(size // TOKEN_ID_BYTES) for size in sizes]
        ratio = self.ratio
        return [size * ratio + _OWN_TOKENS for size in sizes]

    def learn(self, size_bytes: int, inputs: int, tokens: int) -> None:
        """Take what an upstream has counted for so many inputs of so many bytes together."""
        if tokens <= 0 or size_bytes <= 0:
            return
        fade = math.exp(-size_bytes / _MEMORY_BYTES)
        self._bytes = self._bytes * fade + size_bytes
        # No text has more tokens than bytes, but for the few of its own: whoever says so counts something else.
        counted = min(max(tokens - inputs * _OWN_TOKENS, 0.0), float(size_bytes))
        self._tokens = self._tokens * fade + counted


_DRAIN_MEMORY_S = 2.0
"""About so much busy time counts; and what was measured longer ago than this, before a rest, not at all."""


class Drain:
    """How fast work leaves while more of it waits: tokens a second. Without anything waiting there is no telling."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._busy_s = 0.0
        self._calls = 0
        self._since: float | None = None
        self._measured_at = -math.inf

    @property
    def is_running(self) -> bool:
        """Whether work has been waiting since it was last looked at."""
        return self._since is not None

    def began(self, now: float) -> None:
        """Note that work has to wait."""
        if self._since is None:
            self._since = now

    def done(self, now: float, tokens: float, *, is_more: bool) -> None:
        """Note that so much has come back, and whether more of it waits."""
        if self._since is not None:
            spent_s = now - self._since
            fade = math.exp(-spent_s / _DRAIN_MEMORY_S)
            self._tokens = self._tokens * fade + tokens
            self._busy_s = self._busy_s * fade + spent_s
            self._calls += bool(tokens)
            self._measured_at = now
        self._since = now if is_more else None

    def looked_at(self, now: float, *, is_more: bool) -> None:
        """
        Begin anew from here, since what has just come back shows nothing.

        It had taken all that waited when it left: had there been more, it would have carried more. The call for which a
        server loads its model is such a one, and those who wait for it must not be told that all calls take so long.
        """
        self._since = now if is_more else None

    def rested(self, now: float) -> None:
        """Note that nothing waits, whatever was the last that was heard: a rest is no slow work."""
        self._since = None
        if now - self._measured_at > _DRAIN_MEMORY_S:
            self._tokens = self._busy_s = 0.0
            self._calls = 0

    def needs_s(self, tokens: float, *, calls: int = 1) -> float | None:
        """
        Return how long so much work takes; None while nobody knows.

        Args:
            calls: how many go at a time. Before that many have come back, the first of a round that left together
                would make it look as if there were no others.
        """
        if self._busy_s <= 0 or self._tokens <= 0 or self._calls < calls:
            return None
        return tokens * self._busy_s / self._tokens
