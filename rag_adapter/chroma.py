"""
Chroma's embedding function, by the sidecar.

    from rag_adapter.chroma import SidecarEmbeddingFunction

    collection = client.create_collection("chunks", embedding_function=SidecarEmbeddingFunction())

Chroma stores its arguments with the collection. Whoever has imported this file gets the function again with
`client.get_collection("chunks")`, with the key from the environment.

Needs the extra `embedding-sidecar[chroma]`.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.utils.embedding_functions import register_embedding_function

from rag_adapter.address import Address, find
from rag_adapter.retrieval import RetrievalClient

_OF_THE_SPACE = ("model", "dimensions")
"""Arguments that vectors of one collection have to share."""


@register_embedding_function
class SidecarEmbeddingFunction(EmbeddingFunction[Documents]):
    """
    Embeds documents and queries by the sidecar; returns float32 arrays.

    Blocking, as Chroma wants it, also in its asyncio client: a server that uses that embeds with `EmbeddingClient` and
    hands the vectors over. All errors are `rag_adapter.EmbeddingError`s.
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
        api_key_env_var: str = "EMBEDDING_SIDECAR_API_KEY",
    ) -> None:
        """
        Args:
            address: of the sidecar; None: found as by `EmbeddingClient`, anew wherever the collection is opened.
            model: None: the sidecar's default.
            dimensions: width of the vectors; None: the model's own.
            timeout_s: how long a single query may take.
            bulk_timeout_s: how long each request may take that carries several texts, or documents.
            client_name: what the sidecar's log calls the app.
            api_key_env_var: name of the variable that has the key, where the sidecar wants one; only the name is
                stored.

        Raises:
            ValueError: names everything that is wrong with them.
        """
        self._config: dict[str, Any] = {
            "address": address,
            "model": model,
            "dimensions": dimensions,
            "timeout_s": timeout_s,
            "bulk_timeout_s": bulk_timeout_s,
            "client_name": client_name,
            "api_key_env_var": api_key_env_var,
        }
        self._client = _client(
            find(address),
            address=address,
            model=model,
            dimensions=dimensions,
            timeout_s=timeout_s,
            bulk_timeout_s=bulk_timeout_s,
            client_name=client_name,
            api_key=os.environ.get(api_key_env_var),
        )

    def __call__(self, input: Documents) -> Embeddings:  # noqa: A002 - Chroma compares the names
        """Return the vectors of documents, in their order."""
        return list(self._client.document_rows(input))

    def embed_query(self, input: Documents) -> Embeddings:  # noqa: A002
        """Return the vectors of queries, in their order."""
        return list(self._client.query_rows(input))

    @staticmethod
    def name() -> str:
        """Return the name under which Chroma finds it again."""
        return "embedding_sidecar"

    def default_space(self) -> Space:
        """Return the distance of new collections: not every model's vectors have length 1."""
        return "cosine"

    def supported_spaces(self) -> list[Space]:
        """Return the distances that make sense."""
        return ["cosine", "l2", "ip"]

    def get_config(self) -> dict[str, Any]:
        """Return what Chroma stores: the arguments."""
        return dict(self._config)

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> SidecarEmbeddingFunction:
        """Make it of what `get_config` has returned."""
        return SidecarEmbeddingFunction(**config)

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """
        Let everything change but the vector space.

        Chroma asks only after it has stored the change (1.5.9: `Collection.modify`), so this tells of it and cannot
        prevent it; the old configuration has to be put back.

        Raises:
            ValueError: names what must not change.
        """
        changed = [name for name in _OF_THE_SPACE if old_config.get(name) != new_config.get(name)]
        if changed:
            raise ValueError(f"{' and '.join(changed)} of a collection cannot change: its vectors would not compare")


@functools.lru_cache(maxsize=16)
def _client(place: Address, **options: Any) -> RetrievalClient:
    """
    Return one client for all functions of the same arguments.

    Chroma makes a function anew for every query of a collection that it has opened by itself, and each with connections
    of its own would connect for every query.

    Args:
        place: where `address` leads at present; only so that a changed environment is noticed.
        options: of the client.
    """
    return RetrievalClient(**options)
