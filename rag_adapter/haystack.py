"""
Haystack's embedders, by the sidecar: of the text of a query, and of documents.

    from rag_adapter.haystack import SidecarDocumentEmbedder, SidecarTextEmbedder

    pipeline.add_component("embedder", SidecarTextEmbedder(model="text-embedding-3-small"))

Parameters are named as those of Haystack's own embedders, where these have them. There is no `batch_size`, since the
client cuts lists and the sidecar batches; and no `raise_on_failure`, since documents that were stored without vectors
are never found again: an error is always raised.

Needs the extra `embedding-sidecar[haystack]`.
"""

# Without `from __future__ import annotations`: Haystack 2 makes sockets of the types of run(), and takes them as they
# stand there. And without super(): the decorator makes a class of its own from each of these.

from dataclasses import replace
from typing import Any, Self

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import Secret
from tqdm import tqdm

from rag_adapter.retrieval import RetrievalClient

_KEY = Secret.from_env_var("EMBEDDING_SIDECAR_API_KEY", strict=False)


class _Embedder:
    """What both embedders have in common: most parameters, the client, and its end."""

    address: str | None
    model: str | None
    dimensions: int | None
    timeout_s: float
    bulk_timeout_s: float
    client_name: str | None
    api_key: Secret
    prefix: str
    suffix: str
    _client: RetrievalClient | None

    def warm_up(self) -> None:
        """Make the client and look up its key; run() does it, too. Nothing is connected before the first text."""
        self._warm()

    def close(self) -> None:
        """Close the connections of run(); a later run() opens new ones."""
        if self._client is not None:
            self._client.close()

    async def close_async(self) -> None:
        """Close the connections that run_async() has on this event loop; without it, the end of the loop does."""
        if self._client is not None:
            await self._client.aclose()

    def _warm(self) -> RetrievalClient:
        if self._client is None:
            self._client = RetrievalClient(
                address=self.address,
                model=self.model,
                dimensions=self.dimensions,
                timeout_s=self.timeout_s,
                bulk_timeout_s=self.bulk_timeout_s,
                client_name=self.client_name,
                api_key=self.api_key.resolve_value(),
            )
        return self._client

    def _parameters(self) -> dict[str, Any]:
        """Return what both have, ready for a file: a key is there as the name of its environment variable."""
        return {
            "address": self.address,
            "model": self.model,
            "dimensions": self.dimensions,
            "timeout_s": self.timeout_s,
            "bulk_timeout_s": self.bulk_timeout_s,
            "client_name": self.client_name,
            "api_key": self.api_key.to_dict(),
            "prefix": self.prefix,
            "suffix": self.suffix,
        }

    def _meta(self) -> dict[str, Any]:
        return {"model": self.model}


@component
class SidecarTextEmbedder(_Embedder):
    """Embeds a text, such as a query, by the sidecar."""

    def __init__(
        self,
        *,
        address: str | None = None,
        model: str | None = None,
        dimensions: int | None = None,
        timeout_s: float = 10.0,
        bulk_timeout_s: float = 60.0,
        client_name: str | None = None,
        api_key: Secret = _KEY,
        prefix: str = "",
        suffix: str = "",
    ) -> None:
        """
        Args:
            address: of the sidecar; None: found as by `EmbeddingClient`.
            model: None: the sidecar's default.
            dimensions: width of the vectors; None: the model's own.
            timeout_s: how long a text may take.
            bulk_timeout_s: how long each request of documents may take; of no use to texts.
            client_name: what the sidecar's log calls the app.
            api_key: where the sidecar wants one.
            prefix, suffix: put before and behind each text.
        """
        self.address = address
        self.model = model
        self.dimensions = dimensions
        self.timeout_s = timeout_s
        self.bulk_timeout_s = bulk_timeout_s
        self.client_name = client_name
        self.api_key = api_key
        self.prefix = prefix
        self.suffix = suffix
        self._client = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as Haystack stores it; a key that was given as a token cannot be stored, and is refused."""
        return default_to_dict(self, **self._parameters())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make it of what `to_dict` has returned."""
        return default_from_dict(cls, data)

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str) -> dict[str, Any]:
        """
        Return `embedding`, the vector of a text, and `meta`, the name of the model as it was asked for.

        Raises:
            EmbeddingError: see `EmbeddingClient.embed`. A pipeline wraps it in its own error, with this as the cause.
        """
        return {"embedding": self._warm().query(self._query(text)), "meta": self._meta()}

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    async def run_async(self, text: str) -> dict[str, Any]:
        """Return the same as run(). Texts of one event loop share requests."""
        return {"embedding": await self._warm().aquery(self._query(text)), "meta": self._meta()}

    def _query(self, text: str) -> str:
        if not isinstance(text, str):
            raise TypeError("SidecarTextEmbedder embeds a text; SidecarDocumentEmbedder embeds documents")
        return f"{self.prefix}{text}{self.suffix}"


@component
class SidecarDocumentEmbedder(_Embedder):
    """Embeds documents by the sidecar, any number of them at a time."""

    def __init__(
        self,
        *,
        address: str | None = None,
        model: str | None = None,
        dimensions: int | None = None,
        timeout_s: float = 10.0,
        bulk_timeout_s: float = 60.0,
        client_name: str | None = None,
        api_key: Secret = _KEY,
        prefix: str = "",
        suffix: str = "",
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        progress_bar: bool = True,
    ) -> None:
        """
        Args:
            address: of the sidecar; None: found as by `EmbeddingClient`.
            model: None: the sidecar's default.
            dimensions: width of the vectors; None: the model's own.
            timeout_s: how long a text may take; of no use to documents.
            bulk_timeout_s: how long each request may take; as many are sent as are needed.
            client_name: what the sidecar's log calls the app.
            api_key: where the sidecar wants one.
            prefix, suffix: put before and behind each text.
            meta_fields_to_embed: fields of `meta` that are put before the content, where a document has them.
            embedding_separator: stands between them.
            progress_bar: shown while it runs.
        """
        self.address = address
        self.model = model
        self.dimensions = dimensions
        self.timeout_s = timeout_s
        self.bulk_timeout_s = bulk_timeout_s
        self.client_name = client_name
        self.api_key = api_key
        self.prefix = prefix
        self.suffix = suffix
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.embedding_separator = embedding_separator
        self.progress_bar = progress_bar
        self._client = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as Haystack stores it; a key that was given as a token cannot be stored, and is refused."""
        return default_to_dict(
            self,
            **self._parameters(),
            meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
            progress_bar=self.progress_bar,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make it of what `to_dict` has returned."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """
        Return `documents`, copies that have vectors, and `meta`, the name of the model as it was asked for.

        Raises:
            EmbeddingError: see `EmbeddingClient.embed_many`; its `index` is the place of the document to blame, where
                one is. A pipeline wraps it in its own error, with this as the cause.
        """
        texts = self._texts(documents)
        with self._bar(len(texts)) as bar:
            vectors = self._warm().documents(texts, lambda done, _: bar.update(done - bar.n))
        return self._answer(documents, vectors)

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """Return the same as run()."""
        texts = self._texts(documents)
        with self._bar(len(texts)) as bar:
            vectors = await self._warm().adocuments(texts, lambda done, _: bar.update(done - bar.n))
        return self._answer(documents, vectors)

    def _texts(self, documents: list[Document]) -> list[str]:
        if not isinstance(documents, list) or not all(isinstance(document, Document) for document in documents):
            raise TypeError("SidecarDocumentEmbedder embeds a list of documents; SidecarTextEmbedder embeds a text")
        return [self._text(document) for document in documents]

    def _text(self, document: Document) -> str:
        fields = [document.meta.get(name) for name in self.meta_fields_to_embed]
        parts = [str(field) for field in fields if field is not None]
        return self.prefix + self.embedding_separator.join([*parts, document.content or ""]) + self.suffix

    def _bar(self, count: int) -> Any:
        return tqdm(total=count, desc="Calculating embeddings", disable=not self.progress_bar)

    def _answer(self, documents: list[Document], vectors: list[list[float]]) -> dict[str, Any]:
        found = [replace(document, embedding=vector) for document, vector in zip(documents, vectors, strict=True)]
        return {"documents": found, "meta": self._meta()}
