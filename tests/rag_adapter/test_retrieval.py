"""What frameworks hold: queries and documents are told apart, and copies and pickles are what a framework needs."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from rag_adapter.errors import SidecarUnavailable
from rag_adapter.retrieval import RetrievalClient
from tests.fakes.upstream import FakeUpstream, vector


def right(text: str) -> list[float]:
    return [float(x) for x in vector(text, 8)]


@pytest.fixture
def client(peer: FakeUpstream) -> Iterator[RetrievalClient]:
    """Its blocking calls run in threads: the peer lives in the test's own loop."""
    client = RetrievalClient(address=peer.root_url, model="m", client_name="framework", api_key="s3cret")
    yield client
    client.close()


def priorities(peer: FakeUpstream) -> list[str]:
    return [seen.headers["X-Embedding-Priority"] for seen in peer.seen]


async def test_queries_are_interactive(peer: FakeUpstream, client: RetrievalClient) -> None:
    """Somebody waits for them, whether one or several, blocking or awaited."""
    blocking = await asyncio.to_thread(client.query, "a")
    awaited = await client.aquery("b")
    rows = await asyncio.to_thread(client.query_rows, ["c", "d"])
    await client.aclose()

    assert (blocking, awaited, rows.tolist()) == (right("a"), right("b"), [right("c"), right("d")])
    assert rows.dtype == numpy.float32
    assert priorities(peer) == ["interactive"] * 3


async def test_documents_are_bulk(peer: FakeUpstream, client: RetrievalClient) -> None:
    """Queries go before them, even where there is one document only; whoever wants to know hears of progress."""
    heard: list[tuple[int, int]] = []
    blocking = await asyncio.to_thread(client.documents, ["a"], lambda *done: heard.append(done))
    awaited = await client.adocuments(["b", "c"], lambda *done: heard.append(done))
    rows = await asyncio.to_thread(client.document_rows, ["d"])
    await client.aclose()

    assert (blocking, awaited, rows.tolist()) == ([right("a")], [right("b"), right("c")], [right("d")])
    assert rows.dtype == numpy.float32
    assert priorities(peer) == ["bulk"] * 3
    assert heard == [(1, 1), (2, 2)]


async def test_options_reach_both_clients(peer: FakeUpstream, client: RetrievalClient) -> None:
    """What a framework was given is sent by the blocking and by the awaited calls."""
    await asyncio.to_thread(client.query, "a")
    await client.aquery("b")
    await client.aclose()

    for seen in peer.seen:
        assert seen.body["model"] == "m"
        assert (seen.headers["X-Embedding-Client"], seen.headers["Authorization"]) == ("framework", "Bearer s3cret")


def test_mistakes_are_told_when_it_is_made() -> None:
    """Not when the first text comes, and all at once."""
    with pytest.raises(ValueError, match=r"(?s)dimensions is 0.*timeout_s is -1"):
        RetrievalClient(dimensions=0, timeout_s=-1)


def test_copies_are_the_same_object(client: RetrievalClient) -> None:
    """A framework that copies its parts does not open connections for each."""
    assert copy.copy(client) is client
    assert copy.deepcopy({"embedder": client})["embedder"] is client


def test_pickle_carries_the_arguments(tmp_path: Path) -> None:
    """Another process asks at the same place, with connections of its own."""
    there = f"{tmp_path}/other.sock"

    found = pickle.loads(pickle.dumps(RetrievalClient(address=there)))

    with pytest.raises(SidecarUnavailable, match=there):
        found.query("a")


def test_key_is_not_pickled(client: RetrievalClient) -> None:
    """A pickle may become a file; the error says where the key belongs, and does not hold it."""
    with pytest.raises(TypeError, match="set EMBEDDING_SIDECAR_API_KEY") as caught:
        pickle.dumps(client)

    assert "s3cret" not in str(caught.value) + repr(client)


def test_key_of_the_environment_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no argument, so a pickle goes without it."""
    monkeypatch.setenv("EMBEDDING_SIDECAR_API_KEY", "s3cret")

    assert b"s3cret" not in pickle.dumps(RetrievalClient(address="/s.sock"))


async def test_dropped_client_closes_its_sockets(peer: FakeUpstream) -> None:
    """Frameworks close nothing, so there is no warning of a socket that was left open."""
    client = RetrievalClient(address=peer.root_url, model="m")
    await asyncio.to_thread(client.query, "a")

    with warnings.catch_warnings(record=True, action="always") as caught:
        del client
        gc.collect()

    assert caught == []
