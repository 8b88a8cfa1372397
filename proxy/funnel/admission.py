"""
The door: who comes in, and how long anybody stays.

Bounded in inputs and in bytes, so a flood is told to come back instead of being queued until memory ends. It stands
first so that a refusal costs nothing, and it holds the request's deadline over everything behind it: whatever happens
further in, the caller has its answer by then. Whether a request could be in time at all is asked further in, behind
the cache: what is known is answered however long the queue is.

Waiting in our own queue and waiting for the upstream are two clocks and two errors: who was never sent is told so.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.base.clock import Clock
from proxy.base.errors import DeadlineExceeded, EmbeddingError, Overloaded, QueueTimeout
from proxy.base.messages import Request, Response
from proxy.base.settings import AdmissionSettings
from proxy.base.stage import Snapshot, Stage


def refusal(
    request: Request, inputs_inside: int, bytes_inside: int, settings: AdmissionSettings
) -> EmbeddingError | None:
    """Say why a request may not come in, given what is inside already; None when it may."""
    inputs = inputs_inside + len(request.inputs)
    if inputs > settings.max_inputs:
        return Overloaded(
            f"{inputs_inside} inputs are inside and {len(request.inputs)} more would pass the bound "
            f"of {settings.max_inputs}",
            retry_after_s=settings.retry_after_s,
        )
    size_bytes = bytes_inside + request.size_bytes
    if size_bytes > settings.max_bytes:
        return Overloaded(
            f"{bytes_inside} bytes are inside and {request.size_bytes} more would pass the bound "
            f"of {settings.max_bytes}",
            retry_after_s=settings.retry_after_s,
        )
    return None


class Admission:
    """Counts what is inside and ends what stays too long."""

    def __init__(
        self,
        settings: AdmissionSettings,
        inner: Stage[Request, Response],
        *,
        drain_s: Callable[[], float] = float,
        clock: Clock,
    ) -> None:
        """
        Args:
            settings: bounds.
            inner: where requests go.
            drain_s: returns how long what waits inside takes; zero while nobody knows.
            clock: where time comes from.
        """
        self._settings = settings
        self._inner = inner
        self._drain_s = drain_s
        self._clock = clock
        self._inputs = 0
        self._bytes = 0
        self._shed = 0

    async def __call__(self, request: Request) -> Response:
        """
        Raises:
            Overloaded: at once, when the bounds are reached.
            QueueTimeout: at the deadline, when nothing of the request had left for an upstream.
            DeadlineExceeded: at the deadline.
        """
        if error := refusal(request, self._inputs, self._bytes, self._settings):
            self._shed += 1
            error.retry_after_s = self._come_back_s()
            raise error
        self._inputs += len(request.inputs)
        self._bytes += request.size_bytes
        try:
            async with self._clock.timeout_at(request.deadline):
                return await self._inner(request)
        except TimeoutError:
            raise self._late(request) from None
        finally:
            self._inputs -= len(request.inputs)
            self._bytes -= request.size_bytes

    def _come_back_s(self) -> float:
        """Say when it makes sense to come back: when what is inside has left."""
        return max(self._settings.retry_after_s, self._drain_s())

    def _late(self, request: Request) -> EmbeddingError:
        patience_s = request.deadline - request.arrived
        if request.progress.left_at is None:
            return QueueTimeout(
                f"still in our queue after {patience_s:g} s, no upstream has seen it",
                retry_after_s=self._come_back_s(),
            )
        return DeadlineExceeded(f"not answered within {patience_s:g} s; X-Request-Timeout-Ms sets another deadline")

    def snapshot(self) -> Snapshot:
        return {
            "inputs": self._inputs,
            "bytes": self._bytes,
            "max_inputs": self._settings.max_inputs,
            "max_bytes": self._settings.max_bytes,
            "shed_requests": self._shed,
        }

    async def aclose(self) -> None:
        await self._inner.aclose()
