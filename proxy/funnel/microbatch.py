"""
Requests → batches, and back. The only place where the currency changes.

A request goes upstream as few batches as its upstream's limits allow; they run concurrently, and the answer is
assembled by position.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from proxy.base.errors import EmbeddingError, UpstreamRefused
from proxy.base.events import BatchFinished, Observer
from proxy.base.messages import Answer, Batch, Request, Response, Spec, size_bytes
from proxy.base.stage import Snapshot, Stage


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may carry."""

    max_inputs: int
    max_bytes: int
    """UTF-8 bytes of all inputs together."""


def spans(sizes: list[int], limits: Limits) -> Iterator[tuple[int, int]]:
    """
    Cut a list of inputs into batches.

    Args:
        sizes: bytes of each input.
        limits: an input over `max_bytes` goes alone; whether it is too large is the upstream's to say.

    Yields:
        Half-open ranges that cover each input once, in order.
    """
    first = size_bytes = 0
    for index, size in enumerate(sizes):
        is_full = index - first >= limits.max_inputs or size_bytes + size > limits.max_bytes
        if index > first and is_full:
            yield first, index
            first, size_bytes = index, 0
        size_bytes += size
    yield first, len(sizes)


class MicroBatch:
    """Sends a request as batches and puts its answer together."""

    def __init__(self, inner: Stage[Batch, Answer], *, limits: Callable[[Spec], Limits], observe: Observer) -> None:
        """
        Args:
            inner: where batches go.
            limits: what a call for a spec may carry, at whichever upstream it ends.
            observe: who is told of each batch.
        """
        self._inner = inner
        self._limits = limits
        self._observe = observe
        self._batches = 0

    async def __call__(self, request: Request) -> Response:
        cuts = list(spans(list(map(size_bytes, request.inputs)), self._limits(request.spec)))
        if len(cuts) == 1:
            answers = [await self._sent(request, 0, len(request.inputs))]
        else:
            answers = await self._all_sent(request, cuts)
        return Response(
            rows=tuple(row for answer in answers for row in answer.rows),
            tokens=sum(answer.tokens for answer in answers),
            upstream=answers[0].upstream,
            queue_s=max(answer.queue_s for answer in answers),
            upstream_s=max(answer.upstream_s for answer in answers),
            attempts=sum(answer.attempts for answer in answers),
        )

    async def _all_sent(self, request: Request, cuts: list[tuple[int, int]]) -> list[Answer]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._sent(request, first, last)) for first, last in cuts]
        except* EmbeddingError as failures:
            # One part that fails fails the request; the group has cancelled the others. The first tells why.
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _sent(self, request: Request, first: int, last: int) -> Answer:
        inputs = request.inputs[first:last]
        batch = Batch(
            spec=request.spec,
            inputs=inputs,
            size_bytes=sum(map(size_bytes, inputs)),
            deadline=request.deadline,
            user=request.user,
            traceparent=request.traceparent,
        )
        self._batches += 1
        try:
            answer = await self._inner(batch)
        except UpstreamRefused as error:
            if error.index is not None:
                error.key = request.keys[first + error.index]
            raise
        self._observe(
            BatchFinished(request.spec.model, answer.upstream, len(inputs), answer.queue_s, answer.upstream_s)
        )
        return answer

    def snapshot(self) -> Snapshot:
        return {"batches": self._batches}

    async def aclose(self) -> None:
        await self._inner.aclose()
