"""
What the app installs to reach the sidecar.

The names below are loaded when they are first used, each with what it needs and no more: `import rag_adapter` costs
nothing, `SyncEmbeddingClient` loads no aiohttp, and a framework is loaded by its own file alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_adapter.address import socket_path as socket_path
    from rag_adapter.blocking import SyncEmbeddingClient as SyncEmbeddingClient
    from rag_adapter.client import EmbeddingClient as EmbeddingClient
    from rag_adapter.drop_in import GenerateEmbedding as GenerateEmbedding
    from rag_adapter.drop_in import generate_embedding as generate_embedding
    from rag_adapter.errors import DeadlineExceeded as DeadlineExceeded
    from rag_adapter.errors import EmbeddingError as EmbeddingError
    from rag_adapter.errors import EmbeddingFailed as EmbeddingFailed
    from rag_adapter.errors import InvalidInput as InvalidInput
    from rag_adapter.errors import SidecarUnavailable as SidecarUnavailable
    from rag_adapter.errors import Unavailable as Unavailable
    from rag_adapter.service import EmbeddingService as EmbeddingService
    from rag_adapter.supervise import SupervisedSidecar as SupervisedSidecar

_HOMES = {
    "DeadlineExceeded": "errors",
    "EmbeddingClient": "client",
    "EmbeddingError": "errors",
    "EmbeddingFailed": "errors",
    "EmbeddingService": "service",
    "GenerateEmbedding": "drop_in",
    "InvalidInput": "errors",
    "SidecarUnavailable": "errors",
    "SupervisedSidecar": "supervise",
    "SyncEmbeddingClient": "blocking",
    "Unavailable": "errors",
    "generate_embedding": "drop_in",
    "socket_path": "address",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605 - names, whatever their order


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next look finds it here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
