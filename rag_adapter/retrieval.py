"""
What retrieval frameworks embed: queries, for which somebody waits, and documents, of which there are many.

A framework calls blocking and awaiting methods of one object, copies it, and pickles it; so both clients are one object
here, and each framework's file is a translation of names. What tells a query from a document is said in this file and
nowhere else.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from rag_adapter.blocking import SyncEmbeddingClient
from rag_adapter.client import EmbeddingClient
from rag_adapter.many import Progress
from rag_adapter.wire import Priority

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray


class Options(TypedDict, total=False):
    """Arguments of both clients that every framework's class takes as well; `EmbeddingClient` explains them."""

    address: str | None
    model: str | None
    dimensions: int | None
    timeout_s: float
    bulk_timeout_s: float
    client_name: str | None
    api_key: str | None


class _Kind(TypedDict):
    """What the sidecar is told of texts of one kind."""

    priority: Priority


_QUERY: _Kind = {"priority": "interactive"}
_DOCUMENT: _Kind = {"priority": "bulk"}


class RetrievalClient:
    """Embeds queries and documents, from any thread and any event loop. Errors are those of the clients."""

    def __init__(self, **options: Unpack[Options]) -> None:
        self._options = options
        self._blocking = SyncEmbeddingClient(**options)
        self._awaited = EmbeddingClient(**options)
        # Frameworks drop what they were given and never close it. The awaited connections go with their event loop.
        weakref.finalize(self, self._blocking.close)

    def query(self, text: str) -> list[float]:
        """Return the vector of a query."""
        return self._blocking.embed(text, **_QUERY)

    async def aquery(self, text: str) -> list[float]:
        """Return the vector of a query."""
        return await self._awaited.embed(text, **_QUERY)

    def query_rows(self, texts: Iterable[str]) -> NDArray[float32]:
        """Return the vectors of queries, count × width."""
        return self._blocking.embed_many(texts, as_numpy=True, **_QUERY)

    def documents(self, texts: Iterable[str], on_progress: Progress | None = None) -> list[list[float]]:
        """Return the vectors of documents, in their order."""
        return self._blocking.embed_many(texts, on_progress=on_progress, **_DOCUMENT)

    async def adocuments(self, texts: Iterable[str], on_progress: Progress | None = None) -> list[list[float]]:
        """Return the vectors of documents, in their order."""
        return await self._awaited.embed_many(texts, on_progress=on_progress, **_DOCUMENT)

    def document_rows(self, texts: Iterable[str]) -> NDArray[float32]:
        """Return the vectors of documents, count × width."""
        return self._blocking.embed_many(texts, as_numpy=True, **_DOCUMENT)

    def close(self) -> None:
        """Close the connections of the blocking calls; a later call opens new ones."""
        self._blocking.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop; a later call opens new ones."""
        await self._awaited.aclose()

    # --- copies ---

    def __copy__(self) -> RetrievalClient:
        """Return itself: it can be shared by everybody, and a copy would need connections of its own."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RetrievalClient:
        return self

    def __reduce__(self) -> tuple[Callable[[], RetrievalClient], tuple[()]]:
        """
        Pickle the arguments: another process connects by itself.

        Raises:
            TypeError: there is a key among them. A pickle may become a file, and a key must not.
        """
        if self._options.get("api_key") is not None:
            raise TypeError("an api_key that was given as an argument is not pickled: set EMBEDDING_SIDECAR_API_KEY")
        return functools.partial(RetrievalClient, **self._options), ()
