"""
rag_adapter.llamaindex with LlamaIndex itself: its index, retriever, ingestion, callbacks and serialisation.
"""

import asyncio
import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import QueryBundle, TextNode

from rag_adapter import DeadlineExceeded, EmbeddingFailed, InvalidInput, SidecarUnavailable
from rag_adapter.llamaindex import SidecarEmbedding
from tests.clients.conftest import KEY
from tests.clients.passages import ANSWERS, PASSAGES


@pytest.fixture
def embedding(embedded: Any) -> SidecarEmbedding:
    return SidecarEmbedding(address=embedded.socket_path)


def nodes() -> list[TextNode]:
    """Nodes without vectors; an index puts vectors into those that it is given."""
    return [TextNode(text=text) for text in PASSAGES]


# --- vectors ---


async def test_texts_and_query(embedding: SidecarEmbedding, wordllama: Callable[..., list[float]]) -> None:
    """Each text gets its own vector, newlines and all; one or many, blocking or awaited."""
    expected = pytest.approx(wordllama("a\nnode "), rel=0, abs=1e-6)
    batch = embedding.get_text_embedding_batch(PASSAGES)

    assert isinstance(embedding, BaseEmbedding)
    assert embedding.get_query_embedding("a\nnode ") == expected
    assert embedding.get_text_embedding("a\nnode ") == expected
    assert await embedding.aget_query_embedding("a\nnode ") == expected
    assert await embedding.aget_text_embedding("a\nnode ") == expected
    np.testing.assert_allclose(batch, [wordllama(text) for text in PASSAGES], rtol=0, atol=1e-6)
    assert await embedding.aget_text_embedding_batch(PASSAGES) == batch


def test_over_tcp_in_another_width(embedded: Any, wordllama: Callable[..., list[float]]) -> None:
    """Address, model and dimensions are what was said."""
    narrow = SidecarEmbedding(address=f"http://{embedded.address}", model_name="wordllama", dimensions=64)

    assert narrow.get_query_embedding("narrow") == pytest.approx(wordllama("narrow", dimensions=64), rel=0, abs=1e-6)
    assert [len(vector) for vector in narrow.get_text_embedding_batch(["a", "b"])] == [64, 64]


async def test_queries_go_before_nodes(embedded: Any, requests: Callable[..., Any]) -> None:
    """A query is interactive and nodes are bulk, also where there is one, blocking and awaited."""
    embedding = SidecarEmbedding(address=embedded.socket_path, client_name="li-kinds")

    embedding.get_query_embedding("one")
    embedding.get_text_embedding("two")
    embedding.get_text_embedding_batch(["three"])
    await embedding.aget_query_embedding("four")
    await embedding.aget_text_embedding("five")
    await embedding.aget_text_embedding_batch(["six", "seven"])

    kinds = [("interactive", 1), ("bulk", 1), ("bulk", 1), ("interactive", 1), ("bulk", 1), ("bulk", 2)]
    assert requests("li-kinds", 7) == kinds


async def test_batches(embedded: Any, requests: Callable[..., Any]) -> None:
    """LlamaIndex steps by `embed_batch_size`; all come back in order, and the default is worth a step."""
    texts = [f"step {number}" for number in range(250)]
    steps = SidecarEmbedding(address=embedded.socket_path, embed_batch_size=100, client_name="li-steps")
    whole = SidecarEmbedding(address=embedded.socket_path)

    vectors = steps.get_text_embedding_batch(texts)

    assert requests("li-steps", 250) == [("bulk", 100), ("bulk", 100), ("bulk", 50)]
    assert vectors == await steps.aget_text_embedding_batch(texts) == whole.get_text_embedding_batch(texts)
    assert (whole.embed_batch_size, whole.num_workers) == (1024, 2)


# --- in LlamaIndex ---


@pytest.mark.parametrize("question", ANSWERS)
def test_index_finds_the_passage(embedding: SidecarEmbedding, question: str) -> None:
    """An index filled and asked by blocking calls."""
    retriever = VectorStoreIndex(nodes(), embed_model=embedding).as_retriever(similarity_top_k=1)

    assert [found.get_content() for found in retriever.retrieve(question)] == [ANSWERS[question]]


async def test_index_finds_the_passages_awaited(embedding: SidecarEmbedding) -> None:
    """An index filled by awaited calls and asked by many at a time."""
    index = VectorStoreIndex([], embed_model=embedding, use_async=False)
    await index.ainsert_nodes(nodes())
    retriever = index.as_retriever(similarity_top_k=1)

    found = await asyncio.gather(*[retriever.aretrieve(question) for question in ANSWERS])

    assert [best[0].get_content() for best in found] == list(ANSWERS.values())


async def test_blocking_calls_inside_a_running_loop(embedding: SidecarEmbedding) -> None:
    """As in a notebook, whose cells run in a loop."""
    retriever = VectorStoreIndex(nodes(), embed_model=embedding).as_retriever(similarity_top_k=1)

    found = [retriever.retrieve(question)[0].get_content() for question in ANSWERS]

    assert found == list(ANSWERS.values())


def test_index_that_goes_its_own_async_way(embedding: SidecarEmbedding) -> None:
    """With `use_async` LlamaIndex runs event loops of its own; the same object serves them all, and then a query."""
    for _ in range(2):
        index = VectorStoreIndex(nodes(), embed_model=embedding, use_async=True)
        found = index.as_retriever(similarity_top_k=1).retrieve("Why reuse database connections?")

        assert found[0].get_content() == PASSAGES[2]


def test_several_queries_in_one_bundle(embedding: SidecarEmbedding) -> None:
    """LlamaIndex takes the mean of a bundle's vectors."""
    vectors = [embedding.get_query_embedding(text) for text in ("glacier", "valley")]
    index = VectorStoreIndex(nodes(), embed_model=embedding)
    bundle = QueryBundle("ice", custom_embedding_strs=["glacier", "valley"])

    found = index.as_retriever(similarity_top_k=1).retrieve(bundle)

    assert embedding.get_agg_embedding_from_queries(["glacier", "valley"]) == np.mean(vectors, axis=0).tolist()
    assert found[0].get_content() == PASSAGES[4]


async def test_ingestion(embedding: SidecarEmbedding) -> None:
    """It is a transformation of a pipeline, blocking, awaited, and in processes of LlamaIndex's own."""
    expected = embedding.get_text_embedding_batch(PASSAGES)
    pipeline = IngestionPipeline(transformations=[embedding], disable_cache=True)

    here = pipeline.run(nodes=nodes())
    awaited = await pipeline.arun(nodes=nodes())
    elsewhere = await asyncio.to_thread(pipeline.run, nodes=nodes(), num_workers=2)

    assert [node.embedding for node in here] == [node.embedding for node in awaited] == expected
    assert [node.embedding for node in elsewhere] == expected


async def test_callbacks(embedded: Any) -> None:
    """LlamaIndex's events begin and end, with texts and vectors, and say of the model what is safe."""
    debug = LlamaDebugHandler(print_trace_on_end=False)
    embedding = SidecarEmbedding(
        address=embedded.socket_path, api_key=KEY, callback_manager=CallbackManager([debug]), embed_batch_size=4
    )

    embedding.get_text_embedding_batch(PASSAGES)
    await embedding.aget_query_embedding("asked")

    pairs = debug.get_event_pairs(CBEventType.EMBEDDING)
    assert [pair[1].payload["chunks"] for pair in pairs] == [PASSAGES[:4], PASSAGES[4:], ["asked"]]
    assert [len(pair[1].payload["embeddings"]) for pair in pairs] == [4, 2, 1]
    assert KEY not in str([pair[0].payload for pair in pairs])
    assert pairs[0][0].payload["serialized"]["class_name"] == "SidecarEmbedding"


# --- fields ---


def test_dictionary_json_and_back(embedded: Any) -> None:
    """Stored and read again it is the same, and gives the same vectors."""
    embedding = SidecarEmbedding(
        address=embedded.socket_path, model_name="wordllama", dimensions=64, timeout_s=3.0, client_name="li-stored"
    )

    again = SidecarEmbedding.from_dict(embedding.to_dict())
    from_json = SidecarEmbedding.from_json(embedding.to_json())

    assert again.to_dict() == from_json.to_dict() == embedding.to_dict()
    assert again.get_query_embedding("stored") == embedding.get_query_embedding("stored")
    assert json.loads(embedding.to_json())["class_name"] == "SidecarEmbedding"


def test_copies_and_pickles(embedding: SidecarEmbedding) -> None:
    """LlamaIndex copies transformations and sends them to its processes."""
    expected = embedding.get_query_embedding("copied")

    for copied in (copy.deepcopy(embedding), embedding.model_copy(), pickle.loads(pickle.dumps(embedding))):
        assert copied.get_query_embedding("copied") == expected
        assert copied.to_dict() == embedding.to_dict()


def test_misspelled_field_is_refused() -> None:
    """Pydantic would drop it in silence, and the vectors would have another width than was meant."""
    with pytest.raises(ValueError, match="dimension\n"):
        SidecarEmbedding(dimension=64)


def test_connection_cannot_change_later(embedding: SidecarEmbedding) -> None:
    """A field that was changed without effect would lie; what LlamaIndex itself sets can be set."""
    with pytest.raises(ValueError, match="frozen"):
        embedding.dimensions = 64
    embedding.callback_manager = CallbackManager([])
    embedding.embed_batch_size = 10

    assert len(embedding.get_query_embedding("as before")) == 256


def test_mistakes_are_told_at_once() -> None:
    """When it is made, not when the first user asks."""
    with pytest.raises(ValueError, match="timeout_s is 0"):
        SidecarEmbedding(timeout_s=0)


# --- keys ---


async def test_key_opens_a_guarded_sidecar(guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By argument or by environment; without it the error says what is wrong."""
    address = f"http://{guarded.address}"
    with pytest.raises(EmbeddingFailed) as caught:
        SidecarEmbedding(address=address).get_query_embedding("closed")
    given = SidecarEmbedding(address=address, api_key=KEY)
    deep = copy.deepcopy(given)
    monkeypatch.setenv("EMBEDDING_SIDECAR_API_KEY", KEY)
    found = SidecarEmbedding(address=address)

    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert given.get_query_embedding("open") == deep.get_query_embedding("open") == found.get_query_embedding("open")
    assert await given.aget_query_embedding("open") == found.get_query_embedding("open")


def test_key_is_in_no_representation() -> None:
    """Neither in a dictionary, nor in JSON, a representation, an event or a pickle."""
    embedding = SidecarEmbedding(address="/s.sock", api_key=KEY)
    written = [embedding.to_dict(), embedding.to_json(), embedding.model_dump(), embedding.to_payload(), embedding]

    assert KEY not in str(written) + repr(written) + repr(vars(embedding))
    assert KEY.encode() not in pickle.dumps(embedding)


# --- errors ---


async def test_no_sidecar(nowhere: str) -> None:
    """The adapter's own error comes through index, retriever and ingestion, and says what to do."""
    embedding = SidecarEmbedding(address=nowhere)
    index = VectorStoreIndex([], embed_model=embedding)
    index.insert_nodes([TextNode(text="has one", embedding=[1.0, 0.0])])
    message = f"no sidecar at {nowhere}: start it with `embedding-sidecar run`"

    with pytest.raises(SidecarUnavailable, match=message):
        index.insert_nodes(nodes())
    with pytest.raises(SidecarUnavailable, match=message):
        IngestionPipeline(transformations=[embedding]).run(nodes=nodes())
    with pytest.raises(SidecarUnavailable, match=message):
        index.as_retriever().retrieve("a question")
    with pytest.raises(SidecarUnavailable, match=message) as caught:
        await index.as_retriever().aretrieve("a question")

    assert isinstance(caught.value, ConnectionError)
    assert caught.value.retryable


async def test_empty_text_and_deadlines(embedded: Any) -> None:
    """They are a ValueError with the place of the text, and TimeoutErrors."""
    embedding = SidecarEmbedding(address=embedded.socket_path)
    with pytest.raises(InvalidInput) as caught:
        embedding.get_text_embedding_batch(["right", ""])
    with pytest.raises(DeadlineExceeded):
        SidecarEmbedding(address=embedded.socket_path, timeout_s=1e-9).get_query_embedding("late")
    with pytest.raises(DeadlineExceeded):
        await SidecarEmbedding(address=embedded.socket_path, bulk_timeout_s=1e-9).aget_text_embedding("late")

    assert (caught.value.index, caught.value.code) == (1, "empty_input")
