"""
rag_adapter.chroma with Chroma itself: in memory, in a folder that another process opens, and its stored configuration.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from chromadb.api import ClientAPI
from chromadb.utils.embedding_functions import known_embedding_functions

from rag_adapter import DeadlineExceeded, EmbeddingFailed, InvalidInput, SidecarUnavailable
from rag_adapter.chroma import SidecarEmbeddingFunction
from tests.clients.conftest import KEY
from tests.clients.passages import ANSWERS, PASSAGES

ROOT = Path(__file__).resolve().parents[2]
IDS = [str(number) for number in range(len(PASSAGES))]

ASK = """
import json, sys
import chromadb
import rag_adapter.chroma

collection = chromadb.PersistentClient(sys.argv[1]).get_collection("passages")
collection.add(ids=["new"], documents=[sys.argv[2]])
found = collection.query(query_texts=json.loads(sys.argv[3]), n_results=1)["documents"]
json.dump([found, collection.count()], sys.stdout)
"""
"""What another process does with a collection of which it knows the name alone."""


@pytest.fixture
def function(embedded: Any) -> SidecarEmbeddingFunction:
    return SidecarEmbeddingFunction(address=embedded.socket_path)


@pytest.fixture
def client() -> Iterator[ClientAPI]:
    """All ephemeral clients of a process share one store: it is emptied."""
    client = chromadb.EphemeralClient()
    yield client
    for collection in client.list_collections():
        client.delete_collection(collection.name)


def best(result: Any) -> list[str]:
    return [documents[0] for documents in result["documents"]]


# --- vectors ---


def test_documents_and_queries(function: SidecarEmbeddingFunction, wordllama: Callable[..., list[float]]) -> None:
    """Each text gets its own vector, as a float32 array."""
    expected = [wordllama(text) for text in PASSAGES]

    for vectors in (function(PASSAGES), function.embed_query(PASSAGES)):
        assert all(isinstance(vector, np.ndarray) and vector.dtype == np.float32 for vector in vectors)
        np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-6)


def test_over_tcp_in_another_width(embedded: Any, wordllama: Callable[..., list[float]]) -> None:
    """Address, model and dimensions are what was said."""
    narrow = SidecarEmbeddingFunction(address=f"http://{embedded.address}", model="wordllama", dimensions=64)

    np.testing.assert_allclose(narrow(["narrow"])[0], wordllama("narrow", dimensions=64), rtol=0, atol=1e-6)


def test_queries_go_before_documents(client: ClientAPI, embedded: Any, requests: Callable[..., Any]) -> None:
    """Chroma tells them apart, and so does the sidecar: queries are interactive, documents bulk."""
    function = SidecarEmbeddingFunction(address=embedded.socket_path, client_name="ch-kinds")
    collection = client.create_collection("kinds", embedding_function=function)

    collection.add(ids=["1"], documents=["one"])
    collection.query(query_texts=["two", "three"])
    collection.upsert(ids=["1"], documents=["four"])

    assert requests("ch-kinds", 4) == [("bulk", 1), ("interactive", 2), ("bulk", 1)]


# --- in Chroma ---


def test_collection_finds_the_passages(client: ClientAPI, function: SidecarEmbeddingFunction) -> None:
    """In memory; the distance is the cosine unless somebody says otherwise."""
    collection = client.create_collection("passages", embedding_function=function)
    collection.add(ids=IDS, documents=PASSAGES)

    assert best(collection.query(query_texts=list(ANSWERS), n_results=1)) == list(ANSWERS.values())
    assert collection.configuration["hnsw"]["space"] == "cosine"


async def test_inside_a_running_loop(client: ClientAPI, function: SidecarEmbeddingFunction) -> None:
    """As in a notebook, whose cells run in a loop."""
    collection = client.create_collection("notebook", embedding_function=function)
    collection.add(ids=IDS, documents=PASSAGES)

    assert best(collection.query(query_texts=list(ANSWERS), n_results=1)) == list(ANSWERS.values())


def test_collection_is_opened_by_name(client: ClientAPI, function: SidecarEmbeddingFunction) -> None:
    """Chroma makes the function anew, of what it has stored."""
    client.create_collection("named", embedding_function=function).add(ids=IDS, documents=PASSAGES)

    collection = client.get_collection("named")

    assert best(collection.query(query_texts=["Why reuse database connections?"], n_results=1)) == [PASSAGES[2]]
    assert collection.configuration["embedding_function"].get_config() == function.get_config()


def test_functions_of_the_same_arguments_share_connections(embedded: Any) -> None:
    """Chroma makes one for each query of a collection that was opened by name; none of them connects anew."""
    first, second = (SidecarEmbeddingFunction(address=embedded.socket_path, timeout_s=7.0) for _ in range(2))
    other = SidecarEmbeddingFunction(address=embedded.socket_path, timeout_s=8.0)

    assert first._client is second._client
    assert first._client is not other._client


def test_environment_that_changed(embedded: Any, nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that is made later asks where the environment leads then."""
    monkeypatch.setenv("EMBEDDING_SIDECAR_SOCKET", nowhere)
    before = SidecarEmbeddingFunction()
    monkeypatch.setenv("EMBEDDING_SIDECAR_SOCKET", embedded.socket_path)

    assert len(SidecarEmbeddingFunction()(["here"])[0]) == 256
    with pytest.raises(SidecarUnavailable):
        before(["there"])


# --- in a folder ---


def test_another_process_opens_the_collection(tmp_path: Path, function: SidecarEmbeddingFunction) -> None:
    """Importing rag_adapter.chroma is all that it has to do."""
    store = f"{tmp_path}/store"
    client = chromadb.PersistentClient(store)
    client.create_collection("passages", embedding_function=function).add(ids=IDS, documents=PASSAGES)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}

    command = [sys.executable, "-c", ASK, store, "Moss grows on the shady side of trees.", json.dumps(list(ANSWERS))]
    answer = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)

    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == [[[text] for text in ANSWERS.values()], len(PASSAGES) + 1]


def test_collection_without_an_address_follows_the_environment(
    tmp_path: Path, embedded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can move to another machine, where the sidecar listens elsewhere."""
    monkeypatch.setenv("EMBEDDING_SIDECAR_SOCKET", embedded.socket_path)
    client = chromadb.PersistentClient(f"{tmp_path}/store")
    client.create_collection("moved", embedding_function=SidecarEmbeddingFunction())
    monkeypatch.delenv("EMBEDDING_SIDECAR_SOCKET")
    monkeypatch.setenv("EMBEDDING_SIDECAR_URL", f"http://{embedded.address}")

    collection = client.get_collection("moved")
    collection.add(ids=IDS, documents=PASSAGES)

    assert best(collection.query(query_texts=["How does a bird catch fish?"], n_results=1)) == [PASSAGES[0]]


def test_store_has_the_name_of_the_key_only(tmp_path: Path, guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key opens the sidecar, and is in no file of the collection."""
    monkeypatch.setenv("TEAM_KEY", KEY)
    address = f"http://{guarded.address}"
    function = SidecarEmbeddingFunction(address=address, api_key_env_var="TEAM_KEY")
    client = chromadb.PersistentClient(f"{tmp_path}/store")
    client.create_collection("guarded", embedding_function=function).add(ids=IDS, documents=PASSAGES)

    found = client.get_collection("guarded").query(query_texts=["yeast"], n_results=1)
    with pytest.raises(EmbeddingFailed) as caught:
        SidecarEmbeddingFunction(address=address)(["closed"])

    written = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert best(found) == [PASSAGES[1]]
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert b"TEAM_KEY" in written
    assert KEY.encode() not in written
    assert KEY not in str(function.get_config()) + repr(function)


# --- configuration ---


def test_configuration_and_back() -> None:
    """It is JSON, and makes an equal function; Chroma knows the class by its name."""
    function = SidecarEmbeddingFunction(
        address="/s.sock", model="m", dimensions=64, timeout_s=1.0, bulk_timeout_s=2.0, client_name="c"
    )
    config = json.loads(json.dumps(function.get_config()))

    assert SidecarEmbeddingFunction.build_from_config(config).get_config() == function.get_config()
    assert known_embedding_functions[SidecarEmbeddingFunction.name()] is SidecarEmbeddingFunction
    assert not function.is_legacy()


def test_patience_of_a_collection_changes(client: ClientAPI, function: SidecarEmbeddingFunction) -> None:
    """What does not touch the vectors can be stored anew."""
    collection = client.create_collection("changed", embedding_function=function)
    patient = SidecarEmbeddingFunction(address=function.get_config()["address"], bulk_timeout_s=120.0)

    collection.modify(configuration={"embedding_function": patient})

    stored = client.get_collection("changed").configuration["embedding_function"]
    assert stored.get_config() == patient.get_config()


def test_vector_space_of_a_collection_must_stay(client: ClientAPI, function: SidecarEmbeddingFunction) -> None:
    """Another model or width is an error: the vectors would not compare."""
    collection = client.create_collection("kept", embedding_function=function)
    other = SidecarEmbeddingFunction(address=function.get_config()["address"], model="m", dimensions=64)

    with pytest.raises(ValueError, match="model and dimensions of a collection cannot change"):
        collection.modify(configuration={"embedding_function": other})


def test_mistakes_are_told_at_once() -> None:
    """When it is made, not when the first user asks."""
    with pytest.raises(ValueError, match="timeout_s is 0"):
        SidecarEmbeddingFunction(timeout_s=0)


# --- errors ---


def test_no_sidecar(client: ClientAPI, nowhere: str) -> None:
    """The adapter's own error comes through the collection, and says what to do; Chroma adds where it was."""
    collection = client.create_collection("down", embedding_function=SidecarEmbeddingFunction(address=nowhere))
    message = f"no sidecar at {nowhere}: start it with `embedding-sidecar run`"

    with pytest.raises(SidecarUnavailable, match=message):
        collection.add(ids=IDS, documents=PASSAGES)
    with pytest.raises(SidecarUnavailable, match=message) as caught:
        client.get_collection("down").query(query_texts=["a question"])

    assert isinstance(caught.value, ConnectionError)
    assert (caught.value.code, caught.value.retryable) == ("socket_missing", True)
    assert collection.count() == 0


def test_empty_document_and_deadlines(client: ClientAPI, embedded: Any, function: SidecarEmbeddingFunction) -> None:
    """They are a ValueError with the place of the document, and TimeoutErrors."""
    collection = client.create_collection("wrong", embedding_function=function)
    with pytest.raises(InvalidInput) as caught:
        collection.add(ids=["1", "2"], documents=["right", ""])
    with pytest.raises(DeadlineExceeded):
        SidecarEmbeddingFunction(address=embedded.socket_path, bulk_timeout_s=1e-9)(["late"])

    assert (caught.value.index, caught.value.code) == (1, "empty_input")
