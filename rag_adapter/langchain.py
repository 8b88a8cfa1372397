"""
LangChain's `Embeddings`, by the sidecar.

    from rag_adapter.langchain import SidecarEmbeddings

    store = InMemoryVectorStore(SidecarEmbeddings(model="text-embedding-3-small"))

Needs the extra `embedding-sidecar[langchain]`.
"""

from __future__ import annotations

from langchain_core.embeddings import Embeddings

from rag_adapter.retrieval import RetrievalClient


class SidecarEmbeddings(Embeddings):
    """
    Embeds documents and queries by the sidecar, blocking or awaited.

    Blocking methods work everywhere, also where an event loop runs, as in a notebook; the loop stands still for so
    long, so a server calls the awaited ones. All errors are `rag_adapter.EmbeddingError`s.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        model: str | None = None,
        dimensions: int | None = None,
        timeout_s: float = 10.0,
        bulk_timeout_s: float = 60.0,
        client_name: str | None = None,
        api_key: str | None = None,
    ) -> None:
        """
        Args:
            address: of the sidecar; None: found as by `EmbeddingClient`.
            model: None: the sidecar's default.
            dimensions: width of the vectors; None: the model's own.
            timeout_s: how long a query may take.
            bulk_timeout_s: how long each request of `embed_documents` may take; it sends as many as are needed.
            client_name: what the sidecar's log calls the app.
            api_key: where the sidecar wants one; None: `$EMBEDDING_SIDECAR_API_KEY`. Never pickled.

        Raises:
            ValueError: names everything that is wrong with them.
        """
        self.model = model
        self.dimensions = dimensions
        self._client = RetrievalClient(
            address=address,
            model=model,
            dimensions=dimensions,
            timeout_s=timeout_s,
            bulk_timeout_s=bulk_timeout_s,
            client_name=client_name,
            api_key=api_key,
        )

    def __repr__(self) -> str:
        return f"SidecarEmbeddings(model={self.model!r}, dimensions={self.dimensions!r})"

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of any number of documents, in their order."""
        return self._client.documents(texts)

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a query."""
        return self._client.query(text)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of any number of documents, in their order."""
        return await self._client.adocuments(texts)

    async def aembed_query(self, text: str) -> list[float]:
        """Return the vector of a query. Queries of one event loop share requests."""
        return await self._client.aquery(text)

    def close(self) -> None:
        """Close the connections of the blocking methods; a later call opens new ones."""
        self._client.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop; without it, the end of the loop does."""
        await self._client.aclose()
