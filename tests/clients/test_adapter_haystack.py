"""
rag_adapter.haystack with Haystack itself: its pipelines, blocking and awaited, its document store, its files.
"""

import asyncio
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.core.errors import DeserializationError, PipelineRuntimeError
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import Secret

from rag_adapter import DeadlineExceeded, EmbeddingFailed, InvalidInput, SidecarUnavailable
from rag_adapter.haystack import SidecarDocumentEmbedder, SidecarTextEmbedder
from tests.clients.conftest import KEY
from tests.clients.passages import ANSWERS, PASSAGES

TRUSTED = ["rag_adapter.haystack"]


@pytest.fixture
def text_embedder(embedded: Any) -> Iterator[SidecarTextEmbedder]:
    embedder = SidecarTextEmbedder(address=embedded.socket_path)
    yield embedder
    embedder.close()


@pytest.fixture
def document_embedder(embedded: Any) -> Iterator[SidecarDocumentEmbedder]:
    embedder = SidecarDocumentEmbedder(address=embedded.socket_path, progress_bar=False)
    yield embedder
    embedder.close()


def documents(*texts: str) -> list[Document]:
    return [Document(content=text) for text in texts]


def indexing(embedder: Any, store: InMemoryDocumentStore) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("embedder", embedder)
    pipeline.add_component("writer", DocumentWriter(store))
    pipeline.connect("embedder.documents", "writer.documents")
    return pipeline


def querying(embedder: Any, store: InMemoryDocumentStore) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("embedder", embedder)
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    return pipeline


def found(result: dict[str, Any]) -> str:
    return result["retriever"]["documents"][0].content


# --- vectors ---


async def test_text(text_embedder: SidecarTextEmbedder, wordllama: Callable[..., list[float]]) -> None:
    """A text gets its vector, newlines and all, blocking and awaited; it works without warm_up, too."""
    answer = text_embedder.run(text="a\nquery ")

    assert answer["embedding"] == pytest.approx(wordllama("a\nquery "), rel=0, abs=1e-6)
    assert answer["meta"] == {"model": None}
    assert await text_embedder.run_async(text="a\nquery ") == answer


async def test_documents(document_embedder: SidecarDocumentEmbedder, wordllama: Callable[..., list[float]]) -> None:
    """Copies of the documents get vectors; those that were given stay as they are."""
    given = [Document(content=text, meta={"page": number}) for number, text in enumerate(PASSAGES)]

    answer = document_embedder.run(documents=given)

    vectors = [document.embedding for document in answer["documents"]]
    np.testing.assert_allclose(vectors, [wordllama(text) for text in PASSAGES], rtol=0, atol=1e-6)
    assert [document.meta for document in answer["documents"]] == [document.meta for document in given]
    assert [document.embedding for document in given] == [None] * len(given)
    assert await document_embedder.run_async(documents=given) == answer
    assert document_embedder.run(documents=[])["documents"] == []


def test_what_is_embedded_of_a_document(embedded: Any, wordllama: Callable[..., list[float]]) -> None:
    """Prefix, the fields of meta that are there, content, suffix: as Haystack's own embedders put them together."""
    embedder = SidecarDocumentEmbedder(
        address=embedded.socket_path,
        prefix="passage: ",
        suffix=" (end)",
        meta_fields_to_embed=["title", "missing", "year", "none"],
        embedding_separator=" | ",
        progress_bar=False,
    )
    given = Document(content="Herons fish.", meta={"title": "Birds", "year": 1998, "none": None, "other": "no"})

    answer = embedder.run(documents=[given, Document(content=None, meta={"title": "Only a title"})])

    expected = ["passage: Birds | 1998 | Herons fish. (end)", "passage: Only a title |  (end)"]
    vectors = [document.embedding for document in answer["documents"]]
    np.testing.assert_allclose(vectors, [wordllama(text) for text in expected], rtol=0, atol=1e-6)


def test_what_is_embedded_of_a_text(embedded: Any, wordllama: Callable[..., list[float]]) -> None:
    """Prefix and suffix, and the model and width that were said."""
    embedder = SidecarTextEmbedder(
        address=f"http://{embedded.address}", model="wordllama", dimensions=64, prefix="query: ", suffix="?"
    )

    answer = embedder.run(text="fish")

    assert answer["embedding"] == pytest.approx(wordllama("query: fish?", dimensions=64), rel=0, abs=1e-6)
    assert answer["meta"] == {"model": "wordllama"}


async def test_queries_go_before_documents(embedded: Any, requests: Callable[..., Any]) -> None:
    """A text is interactive and documents are bulk, also where there is one, blocking and awaited."""
    named = {"address": embedded.socket_path, "client_name": "hs-kinds"}
    text, document = SidecarTextEmbedder(**named), SidecarDocumentEmbedder(**named, progress_bar=False)

    text.run(text="one")
    document.run(documents=documents("two"))
    await text.run_async(text="three")
    await document.run_async(documents=documents("four", "five"))

    assert requests("hs-kinds", 5) == [("interactive", 1), ("bulk", 1), ("interactive", 1), ("bulk", 2)]


def test_progress(embedded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The bar counts documents, over all requests."""
    many = documents(*[f"progress {number}" for number in range(600)])
    embedder = SidecarDocumentEmbedder(address=embedded.socket_path)

    embedder.run(documents=many)
    asyncio.run(embedder.run_async(documents=many))

    assert capsys.readouterr().err.count("600/600") == 2


# --- in Haystack ---


def test_pipelines_find_the_passages(
    text_embedder: SidecarTextEmbedder, document_embedder: SidecarDocumentEmbedder
) -> None:
    """One pipeline fills the store, another asks it, both blocking."""
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    indexing(document_embedder, store).run({"embedder": {"documents": documents(*PASSAGES)}})
    pipeline = querying(text_embedder, store)

    answers = [found(pipeline.run({"embedder": {"text": question}})) for question in ANSWERS]

    assert answers == list(ANSWERS.values())


async def test_pipelines_find_the_passages_awaited(
    text_embedder: SidecarTextEmbedder, document_embedder: SidecarDocumentEmbedder
) -> None:
    """The same, with many questions at a time, and closed by the pipelines themselves."""
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    filling, asking = indexing(document_embedder, store), querying(text_embedder, store)
    await filling.run_async({"embedder": {"documents": documents(*PASSAGES)}})

    results = await asyncio.gather(*[asking.run_async({"embedder": {"text": question}}) for question in ANSWERS])
    await filling.close_async()
    await asking.close_async()

    assert [found(result) for result in results] == list(ANSWERS.values())
    assert found(await asking.run_async({"embedder": {"text": next(iter(ANSWERS))}})) == PASSAGES[0]


def test_one_component_in_several_event_loops(text_embedder: SidecarTextEmbedder) -> None:
    """Each `asyncio.run` has a loop of its own; the component belongs to none of them."""
    answers = [asyncio.run(text_embedder.run_async(text="again")) for _ in range(3)]

    assert answers == [text_embedder.run(text="again")] * 3


def test_closed_before_it_was_used_and_after(text_embedder: SidecarTextEmbedder) -> None:
    """Closing harms at no time."""
    text_embedder.close()
    asyncio.run(text_embedder.close_async())
    text_embedder.warm_up()
    text_embedder.warm_up()
    first = text_embedder.run(text="open")
    text_embedder.close()

    assert text_embedder.run(text="open") == first
    assert copy.deepcopy(text_embedder).run(text="open") == first


# --- files ---


def test_pipeline_from_a_file(embedded: Any) -> None:
    """Written and read again it does the same; Haystack wants to be told that it may load from here."""
    store = InMemoryDocumentStore()
    named = {"address": embedded.socket_path, "dimensions": 64, "client_name": "hs-file"}
    pipeline = indexing(
        SidecarDocumentEmbedder(**named, meta_fields_to_embed=["title"], prefix="p", progress_bar=False), store
    )
    query = SidecarTextEmbedder(**named, model="wordllama", timeout_s=3.0, bulk_timeout_s=4.0, suffix="s")

    again = Pipeline.loads(pipeline.dumps(), allowed_modules=TRUSTED)
    result = again.run({"embedder": {"documents": documents("stored")}}, include_outputs_from={"embedder"})

    assert again.to_dict() == pipeline.to_dict()
    assert len(result["embedder"]["documents"][0].embedding) == 64
    assert SidecarTextEmbedder.from_dict(query.to_dict()).run(text="stored") == query.run(text="stored")
    assert SidecarTextEmbedder.from_dict(query.to_dict()).to_dict() == query.to_dict()


def test_file_has_the_name_of_the_key_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key itself is looked up where the pipeline runs; one that was given as a token is refused by Haystack."""
    monkeypatch.setenv("TEAM_KEY", KEY)
    pipeline = Pipeline()
    pipeline.add_component("embedder", SidecarTextEmbedder(address="/s", api_key=Secret.from_env_var("TEAM_KEY")))
    pipeline.warm_up()
    written = pipeline.dumps()

    assert "TEAM_KEY" in written
    assert KEY not in written + repr(pipeline.get_component("embedder"))
    with pytest.raises(ValueError, match="Cannot serialize token-based secret"):
        SidecarTextEmbedder(api_key=Secret.from_token(KEY)).to_dict()


def test_untrusted_file(text_embedder: SidecarTextEmbedder) -> None:
    """Haystack's own allowlist holds for these components as for all that are not its own."""
    pipeline = Pipeline()
    pipeline.add_component("embedder", text_embedder)

    with pytest.raises(DeserializationError, match="allowed_modules"):
        Pipeline.loads(pipeline.dumps())


async def test_key_opens_a_guarded_sidecar(guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a token or from the environment; without it the error says what is wrong."""
    address = f"http://{guarded.address}"
    with pytest.raises(EmbeddingFailed) as caught:
        SidecarTextEmbedder(address=address).run(text="closed")
    given = SidecarTextEmbedder(address=address, api_key=Secret.from_token(KEY))
    monkeypatch.setenv("EMBEDDING_SIDECAR_API_KEY", KEY)
    from_environment = SidecarTextEmbedder(address=address)

    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert given.run(text="open") == await given.run_async(text="open") == from_environment.run(text="open")


# --- errors ---


async def test_no_sidecar(nowhere: str) -> None:
    """A component raises the adapter's own error; a pipeline wraps it in Haystack's, with it as the cause."""
    text = SidecarTextEmbedder(address=nowhere)
    document = SidecarDocumentEmbedder(address=nowhere, progress_bar=False)
    store = InMemoryDocumentStore()
    message = f"no sidecar at {nowhere}: start it with `embedding-sidecar run`"

    with pytest.raises(SidecarUnavailable, match=message):
        text.run(text="a question")
    with pytest.raises(SidecarUnavailable, match=message):
        await document.run_async(documents=documents("a"))
    with pytest.raises(PipelineRuntimeError, match=message) as blocking:
        indexing(document, store).run({"embedder": {"documents": documents("a")}})
    with pytest.raises(PipelineRuntimeError, match=message) as awaited:
        await querying(text, store).run_async({"embedder": {"text": "a question"}})

    for caught in (blocking, awaited):
        assert isinstance(caught.value.__cause__, SidecarUnavailable)
        assert caught.value.__cause__.retryable
    assert store.count_documents() == 0


async def test_empty_document_and_deadlines(embedded: Any, document_embedder: SidecarDocumentEmbedder) -> None:
    """They are a ValueError with the place of the document, and TimeoutErrors; no document goes without its vector."""
    with pytest.raises(InvalidInput) as caught:
        document_embedder.run(documents=[*documents("right"), Document(content=None)])
    with pytest.raises(DeadlineExceeded):
        SidecarTextEmbedder(address=embedded.socket_path, timeout_s=1e-9).run(text="late")
    with pytest.raises(DeadlineExceeded):
        hasty = SidecarDocumentEmbedder(address=embedded.socket_path, bulk_timeout_s=1e-9, progress_bar=False)
        await hasty.run_async(documents=documents("late"))

    assert (caught.value.index, caught.value.code) == (1, "empty_input")


def test_wrong_component_for_the_input(
    text_embedder: SidecarTextEmbedder, document_embedder: SidecarDocumentEmbedder
) -> None:
    """Each names the other, as Haystack's own do."""
    with pytest.raises(TypeError, match="SidecarDocumentEmbedder embeds documents"):
        text_embedder.run(text=documents("a"))
    with pytest.raises(TypeError, match="SidecarTextEmbedder embeds a text"):
        document_embedder.run(documents="a text")


def test_mistakes_are_told_when_the_pipeline_warms_up() -> None:
    """Before the first user asks; a pipeline can be read from its file without its sidecar's settings."""
    with pytest.raises(ValueError, match="timeout_s is 0"):
        SidecarTextEmbedder(timeout_s=0).warm_up()
