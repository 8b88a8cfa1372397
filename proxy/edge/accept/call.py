"""
One request on its way, and what goes back for it: the same whichever way it came in and is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from proxy.base.errors import EmbeddingError
from proxy.base.events import RequestFinished
from proxy.base.messages import Request, Response
from proxy.base.settings import CallerSettings, Catalogue, ListenSettings, RequestSettings
from proxy.edge.decode import Asked

CLIENT_LEFT = 499
"""What nginx logs when the caller was gone before the answer; it never goes over the wire."""

_METHODS = frozenset({"GET", "POST", "HEAD"})


class Service(Protocol):
    """The pipeline of this moment, and the settings that it was built with."""

    catalogue: Catalogue
    listen: ListenSettings
    request: RequestSettings
    callers: Mapping[str, CallerSettings]

    def known(self, request: Request) -> Response | None:
        """Answer a request of which every input is known already; None when somebody has to be asked."""
        ...

    async def __call__(self, request: Request) -> Response: ...


@dataclass(slots=True)
class Call:
    """What is learned of a request, for the one fact told at its end."""

    request_id: str
    listener: str
    """`unix` or `tcp`, where it came in."""
    method: str
    arrived: float
    """Instant at which its head was read."""
    path: str = "other"
    caller: str = ""
    status: int = CLIENT_LEFT
    """Of the answer; as long as there is none, what it means when nobody waits for one any more."""
    body_bytes: int = 0
    answer_bytes: int = 0
    error: EmbeddingError | None = None
    service: Service | None = None
    """The pipeline that serves it, even beside a reload."""
    asked: Asked | None = None
    response: Response | None = None

    def finished(self, now: float) -> RequestFinished:
        """Put it into one fact."""
        asked, response, error = self.asked, self.response, self.error
        request = asked.request if asked else None
        return RequestFinished(
            request_id=self.request_id,
            listener=self.listener,
            method=self.method if self.method in _METHODS else "other",
            path=self.path,
            status=self.status,
            total_s=now - self.arrived,
            code=error.label if error else ("" if self.status != CLIENT_LEFT else "client_left"),
            message=error.message if error else "",
            caller=self.caller,
            model=request.spec.model if request else "",
            priority=request.priority if request else "",
            inputs=len(request.inputs) if request else 0,
            hits=response.hits if response else 0,
            tokens=response.tokens if response else 0,
            upstream=response.upstream if response else error.upstream if error else "",
            attempts=response.attempts if response else 0,
            queue_s=response.queue_s if response else 0.0,
            upstream_s=response.upstream_s if response else 0.0,
            trace_id=request.traceparent[3:35] if request and request.traceparent else "",
            body_bytes=self.body_bytes,
            answer_bytes=self.answer_bytes,
        )


@dataclass(slots=True)
class Answer:
    """What goes back, but for what depends on how it is written: length, date, connection."""

    status: int
    headers: dict[str, str]
    body: bytes
    """All of it, or its first piece."""
    more: Iterator[bytes] | None = None
    """Further pieces of a large one, each made when its turn comes."""


def defect(error: Exception) -> EmbeddingError:
    """Name a bug of ours. Its message may quote a caller's text, so only its place is told."""
    return EmbeddingError(f"internal error {type(error).__name__} at {_place(error)}")


def _place(error: BaseException) -> str:
    """Name the innermost line of ours."""
    trace, place = error.__traceback__, "?"
    while trace is not None:
        code = trace.tb_frame.f_code
        place = f"{os.path.basename(code.co_filename)}:{trace.tb_lineno} {code.co_name}"
        trace = trace.tb_next
    return place
