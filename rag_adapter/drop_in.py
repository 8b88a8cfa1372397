"""
The replacement of `async def _generate_embedding(self, text: str) -> list[float]`.

Same signature, same exceptions: ValueError for an empty text, RuntimeError for everything that goes wrong. No thread
and no queue behind it: one pooled client per event loop, shared by all instances, and the modes of `modes`.

Close it where the app ends, on the loop that embedded: `await drop_in.aclose()`.
"""

from __future__ import annotations

import asyncio

from rag_adapter.errors import EmbeddingError, EmbeddingFailed
from rag_adapter.modes import ModalEmbedder, Way

_embedders: dict[asyncio.AbstractEventLoop, ModalEmbedder] = {}
"""By the loop that they belong to; those of closed loops go when a new one comes."""


class GenerateEmbedding:
    """
    A mixin that gives a class its `_generate_embedding`.

    The class itself must not define that method any more. Where it keeps the old one for a while, as
    `_generate_embedding_old`, mode `shadow` answers by it.
    """

    embedding_dimensions: int | None = None
    """What the vector index is made for; a vector of another width is a failure. None: not checked."""
    embedding_model: str | None = None
    """The sidecar's name of the model; None: its default."""
    embedding_timeout_s: float | None = None
    """How long a caller waits; None: the client's 10 s."""

    async def _generate_embedding(self, text: str) -> list[float]:
        """
        Return the vector of a text.

        Raises:
            ValueError: the text is empty.
            RuntimeError: anything else that went wrong; its cause is the adapter's own error.
        """
        return await generate_embedding(
            text,
            dimensions=self.embedding_dimensions,
            model=self.embedding_model,
            timeout_s=self.embedding_timeout_s,
            old=getattr(self, "_generate_embedding_old", None),
        )


async def generate_embedding(
    text: str,
    *,
    dimensions: int | None = None,
    model: str | None = None,
    timeout_s: float | None = None,
    old: Way | None = None,
) -> list[float]:
    """
    Return the vector of a text.

    Args:
        text: what to embed.
        dimensions: how wide the vector has to be; None: not checked.
        model: the sidecar's name of the model; None: its default.
        timeout_s: how long to wait; None: the client's 10 s.
        old: the old way, by which mode `shadow` answers; its exceptions pass as they are.

    Raises:
        ValueError: the text is empty, or blank.
        RuntimeError: anything else that went wrong; says what to do, and its cause is the adapter's own error.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the text is empty: there is nothing to embed")
    try:
        vector = await _embedder().embed(text, old=old, model=model, timeout_s=timeout_s)
        if dimensions is not None and len(vector) != dimensions:
            raise EmbeddingFailed(
                f"the vector has {len(vector)} numbers, and {dimensions} are expected: the sidecar serves another "
                "model or width than the index was made for",
                code="wrong_width",
            )
    except EmbeddingError as error:
        raise RuntimeError(f"no embedding, {error.code}: {error}") from error
    return vector


def use(embedder: ModalEmbedder) -> None:
    """
    Let all instances on this loop embed by this one: with clients of the app's own, or a report of comparisons.

    Called on the loop, before the first embedding; `aclose()` closes it.

    Raises:
        RuntimeError: there is one already.
    """
    if _embedder(embedder) is not embedder:
        raise RuntimeError(
            "this loop has an embedder already: call use() before the first embedding, or aclose() first"
        )


async def aclose() -> None:
    """Close what this loop has used; a later embedding opens it anew."""
    embedder = _embedders.pop(asyncio.get_running_loop(), None)
    if embedder is not None:
        await embedder.aclose()


def _embedder(wanted: ModalEmbedder | None = None) -> ModalEmbedder:
    """Return this loop's; where there is none, the wanted one or a new one becomes it."""
    loop = asyncio.get_running_loop()
    found = _embedders.get(loop)
    if found is None:
        for closed in [other for other in tuple(_embedders) if other.is_closed()]:
            _embedders.pop(closed, None)
        found = _embedders[loop] = wanted or ModalEmbedder()
    return found
