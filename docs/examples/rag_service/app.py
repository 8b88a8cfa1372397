"""
The service over HTTP: FastAPI, whose lifespan is that of the service manager.

Each request has one deadline (`budget`), and one answer for each way in which it can fail (`answer_to`). Traces: the
app's span is OpenTelemetry's current one, which the adapter finds by itself and hands on to the sidecar, and that to
the upstream; so one trace id leads through all of it. Give the provider an exporter and the spans go somewhere.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from opentelemetry import trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from pydantic import AfterValidator, BaseModel, Field

from rag_adapter import (
    DeadlineExceeded,
    EmbeddingError,
    EmbeddingService,
    InvalidInput,
    SidecarUnavailable,
    Unavailable,
)
from rag_service import settings as environment
from rag_service.budget import Budget, CallerLeft, budget_of
from rag_service.database import DatabaseUnavailable, Passage
from rag_service.manager import ServiceManager
from rag_service.parts import registered
from rag_service.rag import Ingested, RAGTool

SEARCH_TIMEOUT_S = 10.0
INGESTION_TIMEOUT_S = 60.0
RETRY_AFTER_S = 1.0
"""Where nobody says how long it takes: a restart of the sidecar is over by then."""


def _storable(text: str) -> str:
    """PostgreSQL stores every character but NUL, which texts taken from PDF often have."""
    if "\0" in text:
        raise ValueError("holds the character NUL, which cannot be stored")
    return text


Storable = Annotated[str, AfterValidator(_storable)]


class Document(BaseModel):
    """A text to take in."""

    name: Storable = Field(min_length=1, max_length=200)
    text: Storable = Field(min_length=1, max_length=2_000_000)


class Documents(BaseModel):
    """What POST /documents takes."""

    documents: list[Document] = Field(min_length=1, max_length=100)


class Found(BaseModel):
    """What a search answers."""

    passages: list[Passage]


class Took(BaseModel):
    """What an ingestion answers."""

    documents: list[Ingested]


def create_app(settings: environment.Settings | None = None) -> FastAPI:
    """Return the app; it starts its services when it is served. None means settings of the environment."""
    manager = registered(settings or environment.read())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await manager.start()
        try:
            yield
        finally:
            await manager.stop()

    app = FastAPI(title="RAG service", lifespan=lifespan)
    app.state.manager = manager
    provider = TracerProvider(resource=Resource.create({"service.name": "rag-service"}))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, exclude_spans=["receive", "send"])
    for kind in (EmbeddingError, DatabaseUnavailable, TimeoutError, CallerLeft, RuntimeError):
        app.add_exception_handler(kind, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.get("/search")(search)
    app.post("/documents")(take_in)
    app.get("/documents")(documents)
    app.get("/health")(health)
    return app


# --- what a request is given ---


def _manager(request: Request) -> ServiceManager:
    found: ServiceManager = request.app.state.manager
    return found


Manager = Annotated[ServiceManager, Depends(_manager)]


def _rag(manager: Manager) -> RAGTool:
    found: RAGTool = manager.instances["rag"]
    return found


Rag = Annotated[RAGTool, Depends(_rag)]

# --- routes ---


async def search(
    q: Annotated[str, Query(max_length=10_000)],
    rag: Rag,
    budget: Annotated[Budget, Depends(budget_of(SEARCH_TIMEOUT_S))],
    limit: Annotated[int, Query(ge=1, le=20)] = 5,
) -> Found:
    """Find the passages nearest to a question."""
    tool = rag.within(budget.left_s())
    try:
        passages = await budget.spend(tool.retrieve_chunks_from_text(q, limit))
    except ValueError as error:  # the old method's word for an empty text
        raise InvalidInput(str(error), code="empty_input") from error
    return Found(passages=passages)


async def take_in(
    body: Documents, rag: Rag, budget: Annotated[Budget, Depends(budget_of(INGESTION_TIMEOUT_S))]
) -> Took:
    """Take documents in, each of them whole or not at all."""

    async def one_by_one() -> list[Ingested]:
        return [await rag.ingest(document.name, document.text, budget.left_s()) for document in body.documents]

    return Took(documents=await budget.spend(one_by_one()))


async def documents(manager: Manager) -> dict[str, int]:
    """Say what there is: passages by document."""
    found: dict[str, int] = await manager.instances["database"].documents()
    return found


async def health(manager: Manager) -> JSONResponse:
    """
    Say how each service is; 503 unless all are well.

    For a load balancer, which then sends requests elsewhere. Nothing to restart the app by: that mends no upstream.
    """
    found = {name: asdict(health) for name, health in (await manager.health()).items()}
    embeddings: EmbeddingService = manager.instances["embeddings"]
    if supervision := embeddings.snapshot().supervision:
        found["embeddings"]["sidecar"] = asdict(supervision)
    is_healthy = all(service["state"] == "healthy" for service in found.values())
    return JSONResponse(
        {"status": "healthy" if is_healthy else "unhealthy", "services": found}, 200 if is_healthy else 503
    )


# --- errors ---


def answer_to(error: Exception) -> tuple[int, str, float | None] | None:
    """
    Return status, code and Retry-After of an error; None where it is none of those that we expect.

    The cases: (1) the text makes no sense; (2) too late; (3) not at present: nobody there, no room, a breaker that is
    open, a limit; (4) the upstream failed, or the sidecar; (5) nobody is there to read it.
    """
    if isinstance(error, InvalidInput):
        return 422, error.code, None
    if isinstance(error, DeadlineExceeded):
        return 504, error.code, None
    if isinstance(error, SidecarUnavailable | Unavailable):
        return 503, error.code, error.retry_after_s or RETRY_AFTER_S
    if isinstance(error, EmbeddingError):
        return 502, error.code, None
    if isinstance(error, TimeoutError):
        return 504, "deadline_exceeded", None
    if isinstance(error, DatabaseUnavailable):
        return 503, "database_unavailable", RETRY_AFTER_S
    if isinstance(error, CallerLeft):
        return 499, "client_left", None
    return None


async def _failed(_: Request, error: Exception) -> JSONResponse:
    """Answer an error. The mixin raises RuntimeError, as the old method did, with the adapter's own as its cause."""
    is_mixins = type(error) is RuntimeError and isinstance(error.__cause__, EmbeddingError)
    cause = error.__cause__ if is_mixins else error
    assert isinstance(cause, Exception)
    answer = answer_to(cause)
    if answer is None:
        raise error
    status, code, retry_after_s = answer
    message = str(cause) or "the request's time is over"  # a TimeoutError has no words of its own
    request_id = cause.request_id if isinstance(cause, EmbeddingError) else None
    return _told(status, code, message, retry_after_s, request_id)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    """Answer what FastAPI refuses in the same form, without the caller's text, which its own answer would quote."""
    assert isinstance(error, RequestValidationError)
    flaws = "; ".join(f"{'.'.join(map(str, flaw['loc'][1:]))}: {flaw['msg']}" for flaw in error.errors())
    return _told(422, "invalid_request", flaws)


def _told(
    status: int, code: str, message: str, retry_after_s: float | None = None, request_id: str | None = None
) -> JSONResponse:
    """
    Return an error as the caller gets it.

    With the two ids under which others know of it: the trace's, and the request's in the sidecar's log.
    """
    context = trace.get_current_span().get_span_context()
    trace_id = f"{context.trace_id:032x}" if context.is_valid else None
    error = {"code": code, "message": message, "trace_id": trace_id, "request_id": request_id}
    return JSONResponse(
        {"error": error}, status, None if retry_after_s is None else {"Retry-After": str(math.ceil(retry_after_s))}
    )
