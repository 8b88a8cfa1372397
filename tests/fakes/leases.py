"""Leases that the test plays: slots that it counts, and waits and errors that it orders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from proxy.base.errors import EmbeddingError
from proxy.base.lease import Outlook, Wait
from proxy.base.messages import Limits

ROOMY = Limits(max_inputs=1000, max_bytes=1_000_000)
UNMEASURED = Outlook(slots=0, busy=0)


@dataclass(eq=False)
class GivenLease:
    """One slot that was given away, and what has been done with it."""

    owner: ScriptedLeases = field(repr=False)
    limits: Limits
    upstream: str = "u"
    generation: int = 0
    is_probe: bool = False
    charges: list[float] = field(default_factory=list)
    releases: int = 0

    def charge(self, tokens: float) -> None:
        assert not self.charges, "charged twice"
        assert not self.releases, "charged after its release"
        self.charges.append(tokens)

    def release(self) -> None:
        assert not self.releases, "released twice"
        self.releases += 1
        self.owner.busy -= 1
        self.owner.ready()


class ScriptedLeases:
    """
    Obeys base/lease.py: gives a lease while a slot is free, unless the test has said something else.

    `word` is what `take` says instead of a lease: a Wait, or an error that it raises. `view` is the outlook but for
    its slots. Whatever is changed, `ready()` tells those who listen.
    """

    def __init__(self, slots: int = 1, limits: Limits = ROOMY, view: Outlook = UNMEASURED) -> None:
        self.slots = slots
        self.limits = limits
        self.busy = 0
        """Leases that are out."""
        self.is_probing = False
        self.word: Wait | EmbeddingError | None = None
        self.view = view
        self.given: list[GivenLease] = []
        self.asked: list[tuple[float, float]] = []
        """(least, wish) of each asking."""
        self._listeners: list[Callable[[], None]] = []

    def outlook(self, model: str) -> Outlook:
        return replace(self.view, slots=self.slots, busy=min(self.busy, self.slots))

    def take(self, model: str, *, least: float, wish: float) -> GivenLease | Wait:
        self.asked.append((least, wish))
        if isinstance(self.word, EmbeddingError):
            raise self.word
        if self.word is not None:
            return self.word
        if self.busy >= self.slots:
            return Wait()
        self.busy += 1
        lease = GivenLease(self, self.limits, is_probe=self.is_probing)
        self.given.append(lease)
        return lease

    def listen(self, model: str, ready: Callable[[], None]) -> None:
        self._listeners.append(ready)

    def ready(self) -> None:
        """Tell everybody that asking may have become worth while."""
        for listener in self._listeners:
            listener()

    def say(self, word: Wait | EmbeddingError | None) -> None:
        """Say this from now on, and tell everybody that something has changed; None gives leases again."""
        self.word = word
        self.ready()

    def check(self) -> None:
        """Each lease that was given was charged once, when its call left, and is back."""
        assert [(len(lease.charges), lease.releases) for lease in self.given] == [(1, 1)] * len(self.given)
