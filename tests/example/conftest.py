"""One PostgreSQL for all tests, a database and a short folder for each, and services that run."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest
from rag_service.postgres import Postgres

from tests.example.service import Service
from tests.fakes.upstream import FakeUpstream


@contextlib.contextmanager
def short_folder() -> Iterator[str]:
    """A folder whose path is short enough for sockets, and which lets others through, as /tmp does."""
    folder = tempfile.mkdtemp(prefix="rag-")
    os.chmod(folder, 0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def folder() -> Iterator[str]:
    """A folder of the test's own."""
    with short_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
async def postgres() -> AsyncIterator[Postgres]:
    """The embedded PostgreSQL."""
    with short_folder() as folder:
        server = await Postgres.start(f"{folder}/pg")
        yield server
        await server.stop()


_numbers = itertools.count()


@pytest.fixture
async def database_url(postgres: Postgres) -> str:
    """A database that is empty."""
    name = f"test{next(_numbers)}"
    connection = await asyncpg.connect(postgres.url)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    return postgres.url.replace("/postgres?", f"/{name}?")


@pytest.fixture(scope="module")
async def example() -> AsyncIterator[Service]:
    """The example as `make example` starts it: PostgreSQL and the proxy are its children, the documents docs/*.md."""
    with short_folder() as folder:
        async with Service(folder) as service:
            yield service


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    """An upstream on loopback that misbehaves on command; its vectors are 256 wide."""
    async with FakeUpstream(width=256) as upstream:
        yield upstream


@pytest.fixture
async def service(folder: str, database_url: str, upstream: FakeUpstream) -> AsyncIterator[Service]:
    """The service with the proxy as its child, and behind that the upstream; it knows one document, `note`."""
    config = f"{folder}/sidecar.toml"
    with open(config, "w", encoding="utf-8") as file:
        file.write(upstream.toml(upstream="circuit.open_s = 0.3\ntransport.attempt_timeout_s = 5", dimensions=256))
    note = f"{folder}/note"
    with open(note, "w", encoding="utf-8") as file:
        file.write("Otters hold hands.")
    async with Service(
        folder, (note,), DATABASE_URL=database_url, EMBEDDING_SIDECAR_CONFIG=config, RAG_MODEL="m"
    ) as service:
        yield service
