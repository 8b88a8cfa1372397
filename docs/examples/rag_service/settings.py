"""What the environment says; everything has a default that needs no key and no network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """The service's settings."""

    database_url: str | None
    """`$DATABASE_URL`, a PostgreSQL with pgvector; None: one is started as a child, with its data in `folder`."""
    folder: str
    """`$RAG_FOLDER`: the child's data and socket. Short, since the path of a Unix socket may have 107 bytes."""
    model: str
    """`$RAG_MODEL`: the sidecar's name of the model."""
    dimensions: int
    """`$RAG_DIMENSIONS`: how wide its vectors are; the column and its index are made for it."""
    ready_timeout_s: float = 30.0
    """Each service of others has to be there by then, or the app does not start."""


def read(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the environment; None means this process's."""
    environ = os.environ if environ is None else environ
    return Settings(
        database_url=environ.get("DATABASE_URL") or None,
        folder=environ.get("RAG_FOLDER") or f"/tmp/rag-service-{os.getuid()}",  # noqa: S108 - it has to be ours
        model=environ.get("RAG_MODEL") or "wordllama",
        dimensions=int(environ.get("RAG_DIMENSIONS") or 256),
    )
