"""
When to ask once more: a sidecar that restarts is away for a second or two, one that is not there stays so.

An embedding asked for twice harms nobody, so a request that found nobody, or was cut off before its answer was whole,
goes out again. How long that makes sense is known by what this client has seen. A sidecar that was there a moment ago
is waited for, RECONNECT_S at the most from the instant it went; after that, and where it has never been there, one
attempt tells: an outage costs a few seconds once, and then milliseconds.

What the sidecar has answered is not asked again: it has tried as often as makes sense. But for two cases: (1) it says
that it is just starting or ending, and for how long; (2) bulk was turned away for lack of room and told when to come
back: hours of ingestion should not end with one full moment.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from rag_adapter.errors import EmbeddingError, SidecarUnavailable, Unavailable

RECONNECT_S = 5.0
"""A restart takes 0.5 s, with the embedded model on a busy machine up to 2 s."""
FIRST_WAIT_S = 0.01
LONGEST_WAIT_S = 0.25
"""Doubling from the first to the longest, less up to a half by chance, so that clients do not knock in step."""

READY_TIMEOUT_S = 2.0
"""A sidecar says in a millisecond whether it is ready; one that does not is not."""
READY_PAUSE_S = 0.05
"""Between two looks, while an app waits for it."""

PASSING = frozenset({"starting", "draining"})
"""Codes of a sidecar that will be well in a moment."""


class Reach:
    """Whether the sidecar is there, as far as one client knows."""

    def __init__(self) -> None:
        self._gone_since: float | None = -float("inf")

    def found(self) -> None:
        """It has answered."""
        self._gone_since = None

    def lost(self, now: float) -> float:
        """It has not; returns since when."""
        # Other threads may write between these lines; then either instant is as good.
        since = now if self._gone_since is None else self._gone_since
        self._gone_since = since
        return since


@dataclass(slots=True)
class Tries:
    """The attempts of one request."""

    reach: Reach
    is_bulk: bool
    rng: random.Random
    count: int = 0
    since: float | None = None

    def wait_s(self, error: EmbeddingError, now: float, deadline: float) -> float | None:
        """
        Return how long to wait before the next attempt; None if there should be none.

        Args:
            error: how the last attempt ended.
            now: the instant.
            deadline: no attempt begins after it.
        """
        if isinstance(error, SidecarUnavailable) and error.retryable:
            self.since = min(self.reach.lost(now), now if self.since is None else self.since)
            wait_s = self._backoff_s() if now - self.since < RECONNECT_S else None
        elif isinstance(error, Unavailable) and error.retryable and error.retry_after_s is not None:
            is_passing = error.code in PASSING
            wait_s = error.retry_after_s * self.rng.uniform(1.0, 1.2) if is_passing or self.is_bulk else None
        else:
            wait_s = None
        self.count += 1
        return wait_s if wait_s is not None and now + wait_s < deadline else None

    def _backoff_s(self) -> float:
        """The first time at once: it was a connection that had been idle for too long, more often than not."""
        if self.count == 0:
            return 0.0
        longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(self.count - 1, 10))
        return longest * self.rng.uniform(0.5, 1.0)
