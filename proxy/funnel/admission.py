"""
The door: who comes in, and how long anybody stays.

Bounded in inputs and in bytes, so a flood is told to come back instead of being queued until memory ends. It stands
first so that a refusal costs nothing, and it holds the request's deadline over everything behind it: whatever happens
further in, the caller has its answer by then.
"""

from __future__ import annotations

from proxy.base.clock import Clock
from proxy.base.errors import DeadlineExceeded, EmbeddingError, Overloaded
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

    def __init__(self, settings: AdmissionSettings, inner: Stage[Request, Response], *, clock: Clock) -> None:
        self._settings = settings
        self._inner = inner
        self._clock = clock
        self._inputs = 0
        self._bytes = 0
        self._shed = 0

    async def __call__(self, request: Request) -> Response:
        """
        Raises:
            Overloaded: at once, when the bounds are reached.
            DeadlineExceeded: at the deadline.
        """
        if error := refusal(request, self._inputs, self._bytes, self._settings):
            self._shed += 1
            raise error
        self._inputs += len(request.inputs)
        self._bytes += request.size_bytes
        try:
            async with self._clock.timeout_at(request.deadline):
                return await self._inner(request)
        except TimeoutError:
            patience_s = request.deadline - request.arrived
            raise DeadlineExceeded(
                f"not answered within {patience_s:g} s; X-Request-Timeout-Ms sets another deadline"
            ) from None
        finally:
            self._inputs -= len(request.inputs)
            self._bytes -= request.size_bytes

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
