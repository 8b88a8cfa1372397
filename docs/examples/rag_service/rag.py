"""
The class that searches, shaped like the old one: retrieve_chunks_from_text → _generate_embedding → pgvector.

`_generate_embedding` comes from the mixin: it has the old signature and the old exceptions, and there is no thread, no
queue and no client in it. docs/migration.md shows the difference line by line.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Self

from rag_adapter import EmbeddingService, GenerateEmbedding, drop_in
from rag_adapter.modes import ModalEmbedder
from rag_service.chunks import chunks
from rag_service.database import Database, Passage, hash_of


@dataclass(frozen=True, slots=True)
class Ingested:
    """What taking in a document has come to."""

    name: str
    passages: int
    embedded: int
    """Those that were not known yet."""


class RAGTool(GenerateEmbedding):
    """Takes documents in, and finds passages in them."""

    def __init__(self, database: Database, embeddings: EmbeddingService, *, model: str, dimensions: int) -> None:
        self.embedding_model = model
        self.embedding_dimensions = dimensions
        self._database = database
        self._embeddings = embeddings
        # The mixin embeds by the client that we have, so that searches and ingestion share its connections.
        drop_in.use(ModalEmbedder(sidecar=embeddings.client))

    async def aclose(self) -> None:
        """Let go of the mixin's client."""
        await drop_in.aclose()

    def within(self, timeout_s: float) -> Self:
        """
        Return the tool as one request sees it.

        `_generate_embedding` keeps the old signature, which knows no deadline; the object it is called on does.
        """
        tool = copy.copy(self)
        tool.embedding_timeout_s = timeout_s
        return tool

    async def retrieve_chunks_from_text(self, text: str, limit: int = 5) -> list[Passage]:
        """
        Return the passages that are nearest to a text.

        Raises:
            ValueError: the text is empty.
            RuntimeError: it could not be embedded; `__cause__` is the adapter's own error.
            DatabaseUnavailable: the database is away.
        """
        embedding = await self._generate_embedding(text)
        return await self._database.nearest(embedding, limit)

    async def ingest(self, name: str, text: str, timeout_s: float | None = None) -> Ingested:
        """
        Take a document in, or its new version; the same text again costs one query.

        Args:
            name: which document it is.
            text: all of it.
            timeout_s: how long embedding it may take; None: 60 s per request to the sidecar.

        Raises:
            EmbeddingError: it could not be embedded; nothing has changed then.
            DatabaseUnavailable: the database is away; the same.
        """
        contents = list(dict.fromkeys(chunks(text)))
        for known in (await self._database.known(name), set[bytes]()):
            new = [content for content in contents if hash_of(content) not in known]
            # Numpy rows: a tenth of the memory of lists, and pgvector takes them as they are.
            vectors = await self._embeddings.client.embed_many(
                new, model=self.embedding_model, timeout_s=timeout_s, as_numpy=True
            )
            if await self._database.replace(name, contents, dict(zip(new, vectors, strict=True))):
                break
            # Somebody has replaced the document meanwhile, and what was known is gone: now with all vectors at hand.
        return Ingested(name, len(contents), len(new))
