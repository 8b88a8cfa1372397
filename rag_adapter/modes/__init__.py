"""
Three ways from a text to its vector, chosen by the operator while the app runs: sidecar, direct, shadow.

For the time of a migration, and for the way back. `sidecar` asks the sidecar. `direct` asks the upstream itself, by
the same pooled client: no sidecar is needed, and none of its batching, limits, retries and cache is there. `shadow`
answers by the old way and asks the sidecar beside it.

`switch` reads the mode, `shadow` compares. docs/migration.md tells when to choose what.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from rag_adapter.client import EmbeddingClient
from rag_adapter.errors import EmbeddingFailed
from rag_adapter.modes.shadow import Comparison, Shadow, ShadowSnapshot, Way
from rag_adapter.modes.switch import Mode, ModeSwitch

__all__ = ["Comparison", "ModalEmbedder", "Mode", "ShadowSnapshot", "Way"]

OPENAI_URL = "https://api.openai.com/v1"


class ModalEmbedder:
    """
    Embeds by the mode of now: `async with ModalEmbedder() as embedder: await embedder.embed("a text")`.

    Its clients are made when a mode first needs them, so `direct` works where no sidecar is configured and the other
    way round. Belongs to one loop.
    """

    def __init__(
        self,
        *,
        sidecar: EmbeddingClient | None = None,
        direct: EmbeddingClient | None = None,
        report: Callable[[Comparison], None] | None = None,
        max_shadows: int = 16,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            sidecar: asks the sidecar; None: `EmbeddingClient()`.
            direct: asks the upstream; None: one by `$EMBEDDING_DIRECT_URL` (else OpenAI's) and
                `$EMBEDDING_DIRECT_API_KEY` (else `$OPENAI_API_KEY`).
            report: is told of each comparison.
            max_shadows: questions to the sidecar beside the old way that may be under way at a time.
            environ: where the mode and the direct way's variables are; None: this process's environment.
        """
        self._sidecar = sidecar
        self._direct = direct
        self._environ = os.environ if environ is None else environ
        self._switch = ModeSwitch(self._environ)
        self._shadow = Shadow(report=report, max_tasks=max_shadows)

    @property
    def mode(self) -> Mode:
        """The mode of now."""
        return self._switch.now()

    async def embed(
        self, text: str, *, old: Way | None = None, model: str | None = None, timeout_s: float | None = None
    ) -> list[float]:
        """
        Return the vector of a text.

        Args:
            text: what to embed.
            old: the old way, for `shadow`; None: the direct one.
            model: the sidecar's name of the model; None: its default. The direct way takes `$EMBEDDING_DIRECT_MODEL`
                where that is set: an upstream may know the model by another name.
            timeout_s: patience with the sidecar and with the direct way; the old way keeps its own.

        Raises:
            EmbeddingError: by the sidecar or the direct way. The old way raises what it always did.
        """

        async def by_sidecar(text: str) -> list[float]:
            return await self._sidecar_client().embed(text, model=model, timeout_s=timeout_s)

        async def directly(text: str) -> list[float]:
            own_model = self._environ.get("EMBEDDING_DIRECT_MODEL") or model
            return await self._direct_client().embed(text, model=own_model, timeout_s=timeout_s)

        mode = self._switch.now()
        if mode == Mode.SIDECAR:
            return await by_sidecar(text)
        if mode == Mode.DIRECT:
            return await directly(text)
        return await self._shadow.answer(text, old or directly, by_sidecar)

    def shadow_snapshot(self) -> ShadowSnapshot:
        """Say what the comparisons have shown so far."""
        return self._shadow.snapshot()

    async def aclose(self) -> None:
        """Give up what is compared in the background, and close the connections."""
        await self._shadow.aclose()
        clients = (self._sidecar, self._direct)
        self._sidecar = self._direct = None
        for client in clients:
            if client is not None:
                await client.aclose()

    async def __aenter__(self) -> ModalEmbedder:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # --- clients, when they are needed ---

    def _sidecar_client(self) -> EmbeddingClient:
        if self._sidecar is None:
            try:
                self._sidecar = EmbeddingClient()
            except ValueError as error:
                raise _bad_settings(error) from error
        return self._sidecar

    def _direct_client(self) -> EmbeddingClient:
        if self._direct is None:
            key = self._environ.get("EMBEDDING_DIRECT_API_KEY") or self._environ.get("OPENAI_API_KEY")
            try:
                if not key:
                    # A client without a key takes the sidecar's, and would show it to a stranger.
                    raise ValueError("set EMBEDDING_DIRECT_API_KEY, to any word where the server wants none")
                self._direct = EmbeddingClient(self._environ.get("EMBEDDING_DIRECT_URL") or OPENAI_URL, api_key=key)
            except ValueError as error:
                raise _bad_settings(error) from error
        return self._direct


def _bad_settings(error: ValueError) -> EmbeddingFailed:
    # Not a ValueError: an app takes that for a text that is empty.
    return EmbeddingFailed(str(error), code="invalid_settings", retryable=False)
