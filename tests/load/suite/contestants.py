"""
Three ways in which an app embeds: what hung, what it was replaced with at first, and the adapter with the proxy.

Each is imported when it is asked for, inside the app's process, so that its memory is its own. `embed` is what a search
calls, `embed_many` what an ingestion calls, as it was done with each of them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rag_adapter import EmbeddingClient

MODEL = "text-embedding-3-small"
JOIN_TIMEOUT_S = 25
"""As the old method had it."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where a contestant finds its upstream or its proxy, and how patient its callers are."""

    upstream: str
    """host:port"""
    socket_path: str
    deadline_s: float

    @property
    def openai(self) -> dict[str, Any]:
        """What an OpenAI client is made of; everything else is as the package has it, its own retries among it."""
        return {"api_key": "unused", "base_url": f"http://{self.upstream}/v1"}


@dataclass(frozen=True, slots=True)
class Failure:
    """How an error counts."""

    name: str
    is_refusal: bool = False


class Contestant(Protocol):
    """How an app embeds."""

    async def embed(self, text: str) -> Sequence[float]: ...
    async def embed_many(self, texts: list[str]) -> Sequence[Sequence[float]]: ...
    def failure(self, error: Exception) -> Failure: ...
    def counts(self) -> dict[str, int]:
        """Texts, requests and connections, as far as it knows them."""
        ...


class Legacy:
    """
    The old method: a thread per call, a fresh client in it, and a join inside the async method.

    `join` waits without letting the loop do anything else: while one call is under way, no other one begins, no timer
    fires, no health check is answered. Calls line up behind each other, and one that hangs holds the app for 25 s. Its
    thread stays behind.
    """

    def __init__(self, surroundings: Surroundings) -> None:
        from openai import OpenAI  # imported once, as the app did; the client is what is fresh

        self._client: Callable[[], OpenAI] = lambda: OpenAI(**surroundings.openai)

    async def embed(self, text: str) -> list[float]:
        result: list[list[float]] = []
        errors: list[Exception] = []

        def call() -> None:
            try:
                answer = self._client().embeddings.create(model=MODEL, input=text)
                result.append(answer.data[0].embedding)
            except Exception as error:  # the thread's errors are raised by the method
                errors.append(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(timeout=JOIN_TIMEOUT_S)
        if thread.is_alive():
            raise RuntimeError(f"no embedding within {JOIN_TIMEOUT_S} s")
        if errors:
            raise errors[0]
        return result[0]

    async def embed_many(self, texts: list[str]) -> list[list[float]]:
        return [await self.embed(text) for text in texts]

    def failure(self, error: Exception) -> Failure:
        return Failure("join_timeout") if isinstance(error, RuntimeError) else openai_failure(error)

    def counts(self) -> dict[str, int]:
        return {}


class FirstRepair:
    """
    The first repair: a fresh async client per call. The loop runs, and nothing is bounded.

    Each client has its own pool, so each call opens a connection, and makes its own TLS context, which takes
    milliseconds of the loop's time; all calls go out at once, and each retries for itself.
    """

    def __init__(self, surroundings: Surroundings) -> None:
        from openai import AsyncOpenAI

        self._client: Callable[[], AsyncOpenAI] = lambda: AsyncOpenAI(**surroundings.openai)

    async def embed(self, text: str) -> list[float]:
        async with self._client() as client:
            answer = await client.embeddings.create(model=MODEL, input=text)
            return answer.data[0].embedding

    async def embed_many(self, texts: list[str]) -> list[list[float]]:
        return list(await asyncio.gather(*map(self.embed, texts)))

    def failure(self, error: Exception) -> Failure:
        return openai_failure(error)

    def counts(self) -> dict[str, int]:
        return {}


class Adapter:
    """The adapter: one client for all calls, the proxy behind it."""

    def __init__(self, surroundings: Surroundings) -> None:
        from rag_adapter import EmbeddingClient

        self._client: EmbeddingClient = EmbeddingClient(
            surroundings.socket_path, model=MODEL, timeout_s=surroundings.deadline_s
        )

    async def embed(self, text: str) -> list[float]:
        return await self._client.embed(text)

    async def embed_many(self, texts: list[str]) -> list[list[float]]:
        return await self._client.embed_many(texts)

    def failure(self, error: Exception) -> Failure:
        from rag_adapter import EmbeddingError, Unavailable

        if not isinstance(error, EmbeddingError):
            return Failure(type(error).__name__)
        return Failure(error.code, isinstance(error, Unavailable))

    def counts(self) -> dict[str, int]:
        snapshot = self._client.snapshot()
        return {"texts": snapshot.texts, "requests": snapshot.requests, "connections": snapshot.connections_opened}


CONTESTANTS: dict[str, Callable[[Surroundings], Contestant]] = {
    "legacy": Legacy,
    "first repair": FirstRepair,
    "adapter": Adapter,
}


def openai_failure(error: Exception) -> Failure:
    """Name an error of the openai package."""
    status = getattr(error, "status_code", None)
    if status is not None:
        return Failure(f"http_{status}", status in (429, 503))
    names = {"APITimeoutError": "timeout", "APIConnectionError": "connection"}
    return Failure(names.get(type(error).__name__, type(error).__name__))
