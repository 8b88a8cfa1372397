"""
rag_adapter.langchain with LangChain itself: its vector store, its retriever, its serialisation.
"""

import asyncio
import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings
from langchain_core.load import dumps
from langchain_core.vectorstores import InMemoryVectorStore

from rag_adapter import DeadlineExceeded, EmbeddingFailed, InvalidInput, SidecarUnavailable
from rag_adapter.langchain import SidecarEmbeddings
from tests.clients.conftest import KEY
from tests.clients.passages import ANSWERS, PASSAGES


@pytest.fixture
def embeddings(embedded: Any) -> SidecarEmbeddings:
    return SidecarEmbeddings(address=embedded.socket_path)


def close_to(expected: Any) -> Any:
    return pytest.approx(expected, rel=0, abs=1e-6)


# --- vectors ---


async def test_documents_and_query(embeddings: SidecarEmbeddings, wordllama: Callable[..., list[float]]) -> None:
    """Each text gets its own vector, as lists of Python's floats; blocking and awaited get the same."""
    documents = embeddings.embed_documents(PASSAGES)
    query = embeddings.embed_query("a\nquery ")

    assert isinstance(embeddings, Embeddings)
    assert type(query) is list and type(query[0]) is float
    np.testing.assert_allclose(documents, [wordllama(text) for text in PASSAGES], rtol=0, atol=1e-6)
    assert query == close_to(wordllama("a\nquery "))
    assert await embeddings.aembed_documents(PASSAGES) == documents
    assert await embeddings.aembed_query("a\nquery ") == query


def test_over_tcp_in_another_width(embedded: Any, wordllama: Callable[..., list[float]]) -> None:
    """Address, model and dimensions are what was said."""
    narrow = SidecarEmbeddings(address=f"http://{embedded.address}", model="wordllama", dimensions=64)

    assert narrow.embed_query("narrow") == close_to(wordllama("narrow", dimensions=64))
    assert [len(vector) for vector in narrow.embed_documents(["a", "b"])] == [64, 64]


def test_found_by_the_environment(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an address it asks where every client of the sidecar asks."""
    monkeypatch.setenv("EMBEDDING_SIDECAR_SOCKET", embedded.socket_path)

    assert len(SidecarEmbeddings().embed_query("where?")) == 256


async def test_queries_go_before_documents(embedded: Any, requests: Callable[..., Any]) -> None:
    """A query is interactive and documents are bulk, also where there is one, blocking and awaited."""
    embeddings = SidecarEmbeddings(address=embedded.socket_path, client_name="lc-kinds")

    embeddings.embed_query("one")
    embeddings.embed_documents(["two"])
    await embeddings.aembed_query("three")
    await embeddings.aembed_documents(["four", "five"])

    assert requests("lc-kinds", 5) == [("interactive", 1), ("bulk", 1), ("interactive", 1), ("bulk", 2)]


async def test_queries_at_the_same_time_share_requests(embedded: Any, requests: Callable[..., Any]) -> None:
    """A hundred chains of one loop are not a hundred requests, but one for each connection at the most."""
    embeddings = SidecarEmbeddings(address=embedded.socket_path, client_name="lc-shared")
    texts = [f"shared {number}" for number in range(100)]

    vectors = await asyncio.gather(*[embeddings.aembed_query(text) for text in texts])

    seen = requests("lc-shared", 100)
    assert vectors == embeddings.embed_documents(texts)
    assert len(seen) <= 8
    assert {priority for priority, _ in seen} == {"interactive"}


async def test_more_documents_than_one_request_takes(embeddings: SidecarEmbeddings) -> None:
    """They are cut, and come back in order."""
    texts = [f"document {number}" for number in range(700)]

    documents = embeddings.embed_documents(texts)

    assert documents == await embeddings.aembed_documents(texts)
    assert documents[699] == embeddings.embed_query("document 699")


# --- in LangChain ---


@pytest.mark.parametrize("question", ANSWERS)
def test_retriever_finds_the_passage(embeddings: SidecarEmbeddings, question: str) -> None:
    """A store filled and asked by blocking calls."""
    retriever = InMemoryVectorStore.from_texts(PASSAGES, embeddings).as_retriever(search_kwargs={"k": 1})

    assert [document.page_content for document in retriever.invoke(question)] == [ANSWERS[question]]


async def test_retriever_finds_the_passages_awaited(embeddings: SidecarEmbeddings) -> None:
    """A store filled and asked by awaited calls, many at a time."""
    store = await InMemoryVectorStore.afrom_texts(PASSAGES, embeddings)
    found = await store.as_retriever(search_kwargs={"k": 1}).abatch(list(ANSWERS))

    assert [documents[0].page_content for documents in found] == list(ANSWERS.values())


async def test_blocking_calls_inside_a_running_loop(embeddings: SidecarEmbeddings) -> None:
    """As in a notebook, whose cells run in a loop: a chain that was written without async works there."""
    store = InMemoryVectorStore.from_texts(PASSAGES, embeddings)
    retriever = store.as_retriever(search_kwargs={"k": 1})

    found = [retriever.invoke(question)[0].page_content for question in ANSWERS]

    assert found == list(ANSWERS.values())


def test_one_object_in_several_event_loops(embeddings: SidecarEmbeddings) -> None:
    """Each `asyncio.run` has a loop of its own; the object belongs to none of them."""
    vectors = [asyncio.run(embeddings.aembed_query("again and again")) for _ in range(3)]

    assert vectors == [embeddings.embed_query("again and again")] * 3


async def test_after_closing(embeddings: SidecarEmbeddings) -> None:
    """It can be closed, and opens again when it is asked."""
    before = embeddings.embed_query("closed")
    embeddings.close()
    await embeddings.aclose()

    assert embeddings.embed_query("closed") == before
    assert await embeddings.aembed_query("closed") == before


def test_copies_and_pickles(embeddings: SidecarEmbeddings) -> None:
    """What LangChain's users do with their parts: deepcopy a chain, send it to another process."""
    expected = embeddings.embed_query("copied")

    assert copy.deepcopy(embeddings).embed_query("copied") == expected
    assert pickle.loads(pickle.dumps(embeddings)).embed_query("copied") == expected


# --- keys ---


async def test_key_opens_a_guarded_sidecar(guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By argument or by environment; without it the error says what is wrong."""
    address = f"http://{guarded.address}"
    with pytest.raises(EmbeddingFailed) as caught:
        SidecarEmbeddings(address=address).embed_query("closed")
    given = SidecarEmbeddings(address=address, api_key=KEY)
    monkeypatch.setenv("EMBEDDING_SIDECAR_API_KEY", KEY)
    found = SidecarEmbeddings(address=address)

    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert given.embed_query("open") == await given.aembed_query("open") == found.embed_query("open")


def test_key_is_in_no_representation() -> None:
    """Neither in what LangChain writes, nor in a pickle."""
    embeddings = SidecarEmbeddings(address="/s.sock", api_key=KEY)

    assert KEY not in repr(embeddings) + dumps(embeddings) + dumps(InMemoryVectorStore(embeddings).as_retriever())
    with pytest.raises(TypeError, match="EMBEDDING_SIDECAR_API_KEY"):
        pickle.dumps(embeddings)


# --- errors ---


async def test_no_sidecar(nowhere: str) -> None:
    """The adapter's own error comes through the store and the retriever, and says what to do."""
    store = InMemoryVectorStore(SidecarEmbeddings(address=nowhere))
    message = f"no sidecar at {nowhere}: start it with `embedding-sidecar run`"

    with pytest.raises(SidecarUnavailable, match=message):
        store.add_texts(PASSAGES)
    with pytest.raises(SidecarUnavailable, match=message):
        await store.aadd_texts(PASSAGES)
    with pytest.raises(SidecarUnavailable, match=message):
        store.as_retriever().invoke("a question")
    with pytest.raises(SidecarUnavailable, match=message) as caught:
        await store.as_retriever().ainvoke("a question")

    assert isinstance(caught.value, ConnectionError)
    assert caught.value.retryable


async def test_empty_document_is_named(embeddings: SidecarEmbeddings) -> None:
    """The error is a ValueError and has the place of the document, before any is sent."""
    for attempt in (embeddings.embed_documents, lambda texts: asyncio.run(embeddings.aembed_documents(texts))):
        with pytest.raises(InvalidInput) as caught:
            await asyncio.to_thread(attempt, ["right", "", "right"])

        assert (caught.value.index, caught.value.code) == (1, "empty_input")


async def test_deadlines(embedded: Any) -> None:
    """Queries and documents have their own; both are TimeoutErrors."""
    hasty = SidecarEmbeddings(address=embedded.socket_path, timeout_s=1e-9)
    patient = SidecarEmbeddings(address=embedded.socket_path, bulk_timeout_s=1e-9)

    for attempt in (hasty.aembed_query("late"), patient.aembed_documents(["late"])):
        with pytest.raises(DeadlineExceeded):
            await attempt
    assert len(await hasty.aembed_documents(["in time"])) == len([await patient.aembed_query("in time")])


def test_mistakes_are_told_at_once() -> None:
    """When it is made, not when the first user asks."""
    with pytest.raises(ValueError, match="timeout_s is 0"):
        SidecarEmbeddings(timeout_s=0)
