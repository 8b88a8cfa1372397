"""
The passages in PostgreSQL: one table, an HNSW index for the cosine, a pool of connections.

A passage is known by what it says: its key is the document's name and the SHA-256 of the text. Taking in the same
document again embeds nothing, and one that has changed embeds what is new in it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg
from asyncpg import Connection, Pool
from pgvector.asyncpg import register_vector

from rag_service.postgres import Postgres

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

POOL_CONNECTIONS = 10
"""A search holds one for a millisecond; who finds none waits, within its own deadline."""

_SCHEMA = """
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE IF NOT EXISTS passages (
    document text NOT NULL,
    hash bytea NOT NULL,
    position integer NOT NULL,
    content text NOT NULL,
    embedding vector({dimensions}) NOT NULL,
    PRIMARY KEY (document, hash)
);
CREATE INDEX IF NOT EXISTS passages_embedding ON passages USING hnsw (embedding vector_cosine_ops);
"""
_WIDTH = "SELECT atttypmod FROM pg_attribute WHERE attrelid = 'passages'::regclass AND attname = 'embedding'"
_UPSERT = """
INSERT INTO passages (document, hash, position, content, embedding) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (document, hash) DO UPDATE SET position = excluded.position, embedding = excluded.embedding
"""
_HASHES = "SELECT hash FROM passages WHERE document = $1"
_LOCK = "SELECT pg_advisory_xact_lock(hashtext($1))"
_DELETE = "DELETE FROM passages WHERE document = $1 AND hash <> ALL($2::bytea[])"
_MOVE = "UPDATE passages SET position = $3 WHERE document = $1 AND hash = $2 AND position <> $3"
_NEAREST = """
SELECT document, position, content, 1 - (embedding <=> $1) AS similarity
FROM passages ORDER BY embedding <=> $1 LIMIT $2
"""

_GONE = (OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.OperatorInterventionError)
"""What asyncpg raises where the server is not there, goes down, or has not come up yet."""


class DatabaseUnavailable(Exception):
    """The database is not there at present."""


@dataclass(frozen=True, slots=True)
class Passage:
    """What a search finds."""

    document: str
    position: int
    content: str
    similarity: float
    """Cosine: 1 is the same."""


def hash_of(content: str) -> bytes:
    """Return what a passage is known by."""
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()


class Database:
    """The pool, and PostgreSQL itself where it is ours."""

    def __init__(self, pool: Pool, server: Postgres | None) -> None:
        self._pool = pool
        self.server = server
        """None where it is somebody else's."""

    @classmethod
    async def start(cls, url: str | None, *, folder: str, dimensions: int) -> Database:
        """
        Connect, and make the table where there is none.

        Args:
            url: of a PostgreSQL with pgvector; None: start one.
            folder: where that one has its data.
            dimensions: how wide the vectors are.

        Raises:
            PostgresFailed: it could not be started.
            ValueError: the table was made for vectors of another width.
        """
        server = None if url else await Postgres.start(folder)
        url = url or (server.url if server else "")
        try:
            connection = await asyncpg.connect(url)
            try:
                await connection.execute(_SCHEMA.format(dimensions=dimensions))
                width = await connection.fetchval(_WIDTH)
            finally:
                await connection.close()
            if width != dimensions:
                raise ValueError(
                    f"the table passages has vectors of {width} numbers, RAG_DIMENSIONS is {dimensions}: vectors of "
                    "two models do not belong into one index; take another database, or drop the table"
                )
            pool = await asyncpg.create_pool(url, min_size=1, max_size=POOL_CONNECTIONS, init=register_vector)
        except BaseException:
            if server:
                await server.stop()
            raise
        return cls(pool, server)

    async def stop(self) -> None:
        """Close the pool, then end the server, if it is ours."""
        try:
            await self._pool.close()
        finally:
            if self.server:
                await self.server.stop()

    async def is_healthy(self) -> bool:
        """Ask it something."""
        with _told():
            return await self._pool.fetchval("SELECT true") is True

    async def known(self, document: str) -> set[bytes]:
        """Return the hashes of the passages that there are of a document."""
        with _told():
            return await _hashes(self._pool, document)

    async def replace(self, document: str, contents: Sequence[str], embeddings: Mapping[str, NDArray[float32]]) -> bool:
        """
        Make these the passages of a document: all of it, or nothing.

        Returns:
            Whether it is done. It is not when a passage without a vector here is gone by now.

        Args:
            document: its name.
            contents: its passages in their order; none twice.
            embeddings: vectors of those that are new; the others stay as they are.
        """
        rows = [(document, hash_of(content), position, content) for position, content in enumerate(contents)]
        new = [(*row, embeddings[row[3]]) for row in rows if row[3] in embeddings]
        old = [row[:3] for row in rows if row[3] not in embeddings]
        with _told():
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute(_LOCK, document)  # two versions at once would become a mixture
                if not {row[1] for row in old} <= await _hashes(connection, document):
                    return False
                await connection.execute(_DELETE, document, [row[1] for row in rows])
                await connection.executemany(_UPSERT, new)
                await connection.executemany(_MOVE, old)
                return True

    async def nearest(self, embedding: Sequence[float], limit: int) -> list[Passage]:
        """Return the passages nearest to a vector, the nearest first."""
        with _told():
            rows = await self._pool.fetch(_NEAREST, embedding, limit)
        return [Passage(**row) for row in rows]

    async def documents(self) -> dict[str, int]:
        """Return how many passages each document has."""
        with _told():
            rows = await self._pool.fetch("SELECT document, count(*) FROM passages GROUP BY document ORDER BY document")
        return {row["document"]: row["count"] for row in rows}


async def _hashes(connection: Connection | Pool, document: str) -> set[bytes]:
    return {row["hash"] for row in await connection.fetch(_HASHES, document)}


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Rename what means that the database is away; anything else, a wrong query for instance, is ours and stays."""
    try:
        yield
    except TimeoutError:  # an OSError too, but it is the request's deadline
        raise
    except _GONE as error:
        raise DatabaseUnavailable(f"the database cannot be reached: {type(error).__name__}") from error
