"""
Who computes: the choice among the upstreams of a model, and the slots of each.

Only upstreams that have shown a right vector take part. Each embeds a few canary texts, at the start and from time to
time; their vectors have to have the model's width and to lie where the first ones lay, from whichever upstream of the
model these came. Two servers that merely answer to the same name are not the same space, nor is one whose model was
exchanged; and a wrong vector is worse than none.

Balance hands out leases: `model` chooses, `upstream` owns the slots, `limit` learns how many there should be, `latency`
what a call takes, `line` keeps the order of those who wait, `canary` judges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from proxy.base.lease import Lease, Outlook, Wait
from proxy.base.messages import Answer, Batch, Row
from proxy.base.stage import Snapshot
from proxy.upstream.balance.model import Model


class Balance:
    """Sends each batch to an upstream of its model, and gives leases for those that are still to be composed."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models
        self._listeners: list[tuple[Model, Callable[[], None]]] = []
        for model in models.values():
            model.open()

    async def __call__(self, batch: Batch) -> Answer:
        """Ask the upstream that the batch has a lease of."""
        return await self._models[batch.spec.model](batch)

    # --- leases ---

    def outlook(self, model: str) -> Outlook:
        """See `base/lease.py`."""
        return self._models[model].outlook()

    def take(self, model: str, *, least: float, wish: float) -> Lease | Wait:
        """See `base/lease.py`."""
        return self._models[model].take(least, wish)

    async def lease(self, batch: Batch) -> Lease:
        """
        Wait for a lease for a further attempt; it goes before new batches.

        Raises:
            NoUpstream: none has shown a right vector.
            CircuitOpen, UpstreamDenied: all that have are left alone for now.
            EmbeddingError: none can take it before its deadline.
        """
        return await self._models[batch.spec.model].lease(batch)

    def listen(self, model: str, ready: Callable[[], None]) -> None:
        """See `base/lease.py`."""
        self._models[model].listen(ready)
        self._listeners.append((self._models[model], ready))

    # --- canaries ---

    async def sing(self, model: str, timeout_s: float) -> None:
        """Ask each upstream of a model for the canary texts' vectors; what comes of it is in `problems()`."""
        await self._models[model].sing(timeout_s)

    def is_whole(self, model: str) -> bool:
        """Whether the last canary of every upstream of a model was right, and no breaker is open."""
        return self._models[model].is_whole and not self._models[model].is_guarded

    def rest_s(self, model: str) -> float:
        """Return when the next breaker of a model's upstreams lets a probe pass, in seconds; zero where none waits."""
        return self._models[model].rest_s()

    def canaries(self) -> dict[str, tuple[Row, ...]]:
        """Return by model the vectors that stand for its space."""
        return {name: model.canary for name, model in self._models.items() if model.canary is not None}

    def widths(self) -> dict[str, int]:
        """Return by model the width of its vectors, where it is known."""
        return {name: model.width for name, model in self._models.items() if model.width is not None}

    def problems(self) -> dict[str, str]:
        """Say by model why it cannot be served; empty where at least one upstream can."""
        return {name: model.problem() for name, model in self._models.items()}

    def snapshot(self) -> Snapshot:
        return {name: model.snapshot() for name, model in self._models.items()}

    async def aclose(self) -> None:
        """Close the upstreams, each once, but for those that another pipeline goes on with."""
        for model, ready in self._listeners:
            model.unlisten(ready)
        for model in self._models.values():
            model.close()
        for upstream in {u.name: u for model in self._models.values() for u in model.upstreams()}.values():
            await upstream.leave()
