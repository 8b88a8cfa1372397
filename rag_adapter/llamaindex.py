"""
LlamaIndex's `BaseEmbedding`, by the sidecar.

    from rag_adapter.llamaindex import SidecarEmbedding

    Settings.embed_model = SidecarEmbedding(model_name="text-embedding-3-small")

Needs the extra `embedding-sidecar[llamaindex]`.
"""

from __future__ import annotations

from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr

from rag_adapter.retrieval import RetrievalClient

_BATCH_TEXTS = 1024
"""Four requests of the client at a time. LlamaIndex's 10 would be a hundred round trips, one after the other."""
_BATCHES_AT_A_TIME = 2
"""One is sent while the other is read. Without a number LlamaIndex starts all batches of a million nodes at once, and
the last of them would wait for their turn for longer than `bulk_timeout_s`."""


class SidecarEmbedding(BaseEmbedding):
    """
    Embeds nodes and queries by the sidecar, blocking or awaited.

    Blocking methods work everywhere, also where an event loop runs, as in a notebook; the loop stands still for so
    long, so a server calls the awaited ones. All errors are `rag_adapter.EmbeddingError`s.

    The fields that the connections are made from stay as they were given.
    """

    model_config = ConfigDict(extra="forbid")

    model_name: str = Field(default="", frozen=True, description="The sidecar's name of the model; empty: its default.")
    dimensions: int | None = Field(default=None, frozen=True, description="Width; None: the model's own.")
    address: str | None = Field(default=None, frozen=True, description="Of the sidecar; None: found by the usual rule.")
    timeout_s: float = Field(default=10.0, frozen=True, description="How long a query may take.")
    bulk_timeout_s: float = Field(default=60.0, frozen=True, description="How long each request of nodes may take.")
    client_name: str | None = Field(default=None, frozen=True, description="What the sidecar's log calls the app.")
    embed_batch_size: int = Field(
        default=_BATCH_TEXTS, gt=0, le=2048, description="Nodes per step: of progress, callbacks and the cache."
    )
    num_workers: int | None = Field(default=_BATCHES_AT_A_TIME, description="Batches at a time, where awaited.")

    _client: RetrievalClient = PrivateAttr()

    def __init__(self, *, api_key: str | None = None, **fields: Any) -> None:
        """
        Args:
            api_key: where the sidecar wants one; None: `$EMBEDDING_SIDECAR_API_KEY`. No field: it is in no dictionary,
                JSON, pickle or event.
            fields: as declared above.

        Raises:
            ValueError: names everything that is wrong with them.
        """
        super().__init__(**fields)
        self._client = RetrievalClient(
            address=self.address,
            model=self.model_name or None,
            dimensions=self.dimensions,
            timeout_s=self.timeout_s,
            bulk_timeout_s=self.bulk_timeout_s,
            client_name=self.client_name,
            api_key=api_key,
        )

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex stores it."""
        return "SidecarEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._client.query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await self._client.aquery(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._client.documents([text])[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._client.adocuments([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._client.documents(texts)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await self._client.adocuments(texts)

    def close(self) -> None:
        """Close the connections of the blocking methods; a later call opens new ones."""
        self._client.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop; without it, the end of the loop does."""
        await self._client.aclose()
