"""
Permission for one call: what passes between who fills a batch and who chooses an upstream.

A batch is composed when it can leave, not before. So the sender first asks for a lease: an upstream with a free slot,
with rate to spare, and with a breaker that lets it pass. Only with that in hand it looks at what is waiting, takes
what the lease allows, says how many tokens that is, and goes. Asking never waits: the answer is a lease, or when to
ask again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from proxy.base.errors import EmbeddingError
from proxy.base.messages import Limits, message


class Lease(Protocol):
    """One slot of one upstream, until it is released."""

    upstream: str
    limits: Limits
    """What the call may carry, rate limits included."""
    generation: int
    """State of the breaker that let it pass: a verdict from an older one is ignored."""
    is_probe: bool
    """Whether it is the one call that finds out if the upstream has recovered."""

    def charge(self, tokens: float) -> None:
        """Say that the call leaves now, with so many estimated tokens: they count against the limits per minute."""
        ...

    def release(self) -> None:
        """Give it back, used or not; once is enough."""
        ...


@dataclass(frozen=True, slots=True)
class Wait:
    """There is no lease at present."""

    until: float | None = None
    """Instant from which on asking again makes sense; None: somebody will call when a slot is free."""
    error: EmbeddingError | None = None
    """What to tell whose deadline is before that instant."""


@message
class Outlook:
    """What a model's upstreams can take at present, all of them together."""

    slots: int
    """Calls at a time."""
    busy: int
    """Calls under way."""
    fixed_s: float = 0.0
    """What a call takes however little it carries."""
    per_input_s: float = 0.0
    """What each further input adds."""
    is_paced: bool = False
    """Whether requests per minute are the bottleneck: then batches should be as full as they can be."""


class Leases(Protocol):
    """Who hands out leases."""

    def outlook(self, model: str) -> Outlook: ...

    def take(self, model: str, *, least: float, wish: float) -> Lease | Wait:
        """
        Ask for a lease.

        Args:
            least: estimated tokens of the smallest batch that makes sense, its first input.
            wish: estimated tokens of all that could leave with it.

        Raises:
            EmbeddingError: nobody can serve the model, and waiting would not help.
        """
        ...

    def listen(self, model: str, ready: Callable[[], None]) -> None:
        """Name who is called when asking for a model may have become worth while."""
        ...
