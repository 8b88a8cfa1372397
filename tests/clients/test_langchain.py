"""
LangChain's OpenAIEmbeddings: it tokenizes with cl100k and sends token ids, unless it is told to send text.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest
import tiktoken
from httpx2 import AsyncHTTPTransport, HTTPTransport
from langchain_openai import OpenAIEmbeddings
from openai import DefaultAsyncHttpxClient, DefaultHttpxClient

from tests.clients.fake_openai import MODEL, vector_of

# No retries, since one would hide a failure; a timeout, so that a hang fails too.
OPTIONS = {"api_key": "any", "max_retries": 0, "timeout": 30}
TEXTS = ["LangChain says hello", "and\nsays it twice", "  LangChain says hello  "]


def ids_of(text: str) -> list[int]:
    return tiktoken.get_encoding("cl100k_base").encode_ordinary(text)


@pytest.fixture
def as_token_ids(sidecar: Any) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(model=MODEL, base_url=sidecar.base_url, **OPTIONS)


@pytest.fixture
def as_text(sidecar: Any) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(model=MODEL, base_url=sidecar.base_url, check_embedding_ctx_length=False, **OPTIONS)


# --- token ids, the default ---


def test_documents_as_token_ids(as_token_ids: OpenAIEmbeddings) -> None:
    """Documents go as cl100k ids, and each gets the vector of exactly its ids."""
    assert as_token_ids.embed_documents(TEXTS) == [vector_of(ids_of(text)).tolist() for text in TEXTS]


def test_query_as_token_ids(as_token_ids: OpenAIEmbeddings) -> None:
    """A query goes as cl100k ids too."""
    assert as_token_ids.embed_query("what is asked") == vector_of(ids_of("what is asked")).tolist()


async def test_async_as_token_ids(as_token_ids: OpenAIEmbeddings) -> None:
    """The async methods get the same vectors for documents and query."""
    documents = await as_token_ids.aembed_documents([f"async {text}" for text in TEXTS])
    query = await as_token_ids.aembed_query("asked without waiting")

    assert documents == [vector_of(ids_of(f"async {text}")).tolist() for text in TEXTS]
    assert query == vector_of(ids_of("asked without waiting")).tolist()


def test_document_longer_than_the_context(as_token_ids: OpenAIEmbeddings) -> None:
    """A long document goes in pieces of 8191 ids and comes back as their average, weighted by length."""
    ids = ids_of("llama " * 10_000)
    pieces = [ids[:8191], ids[8191:]]
    average = np.average([vector_of(piece) for piece in pieces], axis=0, weights=[len(piece) for piece in pieces])

    vector = as_token_ids.embed_documents(["llama " * 10_000])[0]

    np.testing.assert_allclose(vector, average / np.linalg.norm(average), rtol=0, atol=1e-6)


def test_more_documents_than_one_request_takes(sidecar: Any) -> None:
    """LangChain cuts at 1000 documents a request; all come back in order, in the width asked for."""
    texts = [f"document {number}" for number in range(1100)]
    narrow = OpenAIEmbeddings(model=MODEL, base_url=sidecar.base_url, dimensions=256, **OPTIONS)

    assert narrow.embed_documents(texts) == [vector_of(ids_of(text), 256).tolist() for text in texts]


def test_token_ids_for_the_embedded_model(embedded: Any) -> None:
    """With its defaults LangChain cannot use the embedded model, and is told so by a code of its own."""
    embeddings = OpenAIEmbeddings(model="wordllama", base_url=embedded.base_url, **OPTIONS)

    with pytest.raises(openai.BadRequestError) as caught:
        embeddings.embed_query("cl100k ids mean other words to wordllama")

    assert caught.value.code == "token_ids_not_supported"


# --- text ---


def test_documents_as_text(as_text: OpenAIEmbeddings) -> None:
    """Told not to check lengths, LangChain sends each text as it is and gets that text's vector."""
    assert as_text.embed_documents(TEXTS) == [vector_of(text).tolist() for text in TEXTS]


async def test_async_as_text(as_text: OpenAIEmbeddings) -> None:
    """The async methods send text too."""
    documents = await as_text.aembed_documents([f"async text {text}" for text in TEXTS])
    query = await as_text.aembed_query("asked in words")

    assert documents == [vector_of(f"async text {text}").tolist() for text in TEXTS]
    assert query == vector_of("asked in words").tolist()


async def test_embedded_model_as_text(embedded: Any, wordllama: Callable[..., list[float]]) -> None:
    """With text, LangChain gets the embedded model's vectors, sync and async."""
    embeddings = OpenAIEmbeddings(
        model="wordllama", base_url=embedded.base_url, check_embedding_ctx_length=False, **OPTIONS
    )
    texts = ["a llama in a chain", "another one"]
    expected = [wordllama(text) for text in texts]

    np.testing.assert_allclose(embeddings.embed_documents(texts), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(await embeddings.aembed_documents(texts), expected, rtol=0, atol=1e-6)


# --- the Unix socket ---


async def test_over_the_unix_socket(sidecar: Any) -> None:
    """Given openai's HTTP clients with a Unix socket transport, LangChain uses the socket, sync and async."""
    uds = sidecar.socket_path
    with DefaultHttpxClient(transport=HTTPTransport(uds=uds)) as http_client:
        async with DefaultAsyncHttpxClient(transport=AsyncHTTPTransport(uds=uds)) as http_async_client:
            embeddings = OpenAIEmbeddings(
                model=MODEL,
                base_url="http://localhost/v1",
                http_client=http_client,
                http_async_client=http_async_client,
                **OPTIONS,
            )
            sync_vector = embeddings.embed_query("a chain on a socket")
            async_vector = await embeddings.aembed_query("an async chain on a socket")

    assert sync_vector == vector_of(ids_of("a chain on a socket")).tolist()
    assert async_vector == vector_of(ids_of("an async chain on a socket")).tolist()
