"""
LlamaIndex's OpenAIEmbedding: it sends text, with newlines made spaces, in lists of at most 100.
"""

from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from llama_index.embeddings.openai import OpenAIEmbedding

from tests.clients.fake_openai import MODEL, vector_of

# No retries, since one would hide a failure; a timeout, so that a hang fails too.
OPTIONS = {"api_key": "any", "max_retries": 0, "timeout": 30}


@pytest.fixture
def embedding(sidecar: Any) -> OpenAIEmbedding:
    return OpenAIEmbedding(model=MODEL, api_base=sidecar.base_url, **OPTIONS)


@pytest.fixture
def wordllama_embedding(embedded: Any) -> OpenAIEmbedding:
    # `model` must be one that LlamaIndex knows; `model_name` is its way to name any other.
    return OpenAIEmbedding(model_name="wordllama", api_base=embedded.base_url, **OPTIONS)


def test_text_and_query(embedding: OpenAIEmbedding) -> None:
    """A node's text and a query each get the vector of what was sent, newlines made spaces by LlamaIndex."""
    assert embedding.get_text_embedding("text of\na node") == vector_of("text of a node").tolist()
    assert embedding.get_query_embedding("a query") == vector_of("a query").tolist()


async def test_async_text_and_query(embedding: OpenAIEmbedding) -> None:
    """The async methods get the same."""
    assert await embedding.aget_text_embedding("async text") == vector_of("async text").tolist()
    assert await embedding.aget_query_embedding("async query") == vector_of("async query").tolist()


def test_batch_of_texts(embedding: OpenAIEmbedding) -> None:
    """More texts than one request of LlamaIndex carries come back in order."""
    texts = [f"node {number}" for number in range(250)]

    assert embedding.get_text_embedding_batch(texts) == [vector_of(text).tolist() for text in texts]


async def test_async_batch_of_texts(embedding: OpenAIEmbedding) -> None:
    """The requests of an async batch, in flight together, come back in order."""
    texts = [f"async node {number}" for number in range(250)]

    assert await embedding.aget_text_embedding_batch(texts) == [vector_of(text).tolist() for text in texts]


def test_dimensions(sidecar: Any) -> None:
    """The vector has the width asked for and is the upstream's own at that width."""
    narrow = OpenAIEmbedding(model=MODEL, api_base=sidecar.base_url, dimensions=512, **OPTIONS)

    assert narrow.get_text_embedding("a narrow node") == vector_of("a narrow node", 512).tolist()


async def test_embedded_model(wordllama_embedding: OpenAIEmbedding, wordllama: Callable[..., list[float]]) -> None:
    """LlamaIndex gets the embedded model's vectors: sync, async and in a batch."""
    texts = ["a llama in an index", "another one"]
    expected = [wordllama(text) for text in texts]

    one = wordllama_embedding.get_text_embedding(texts[0])
    one_async = await wordllama_embedding.aget_text_embedding(texts[0])
    batch = wordllama_embedding.get_text_embedding_batch(texts)

    np.testing.assert_allclose([one, one_async], [expected[0]] * 2, rtol=0, atol=1e-6)
    np.testing.assert_allclose(batch, expected, rtol=0, atol=1e-6)


def test_unknown_model(sidecar: Any) -> None:
    """A model that is not configured raises openai's NotFoundError, which LlamaIndex does not retry."""
    unknown = OpenAIEmbedding(model_name="no-such-model", api_base=sidecar.base_url, **OPTIONS)

    with pytest.raises(openai.NotFoundError) as caught:
        unknown.get_text_embedding("x")

    assert caught.value.code == "model_not_found"


async def test_over_the_unix_socket(sidecar: Any) -> None:
    """Given httpx clients with a Unix socket transport, as its signature says, LlamaIndex uses the socket."""
    uds = sidecar.socket_path
    with httpx.Client(transport=httpx.HTTPTransport(uds=uds)) as http_client:
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=uds)) as async_http_client:
            embedding = OpenAIEmbedding(
                model=MODEL,
                api_base="http://localhost/v1",
                http_client=http_client,
                async_http_client=async_http_client,
                **OPTIONS,
            )
            sync_vector = embedding.get_text_embedding("an index on a socket")
            async_vector = await embedding.aget_text_embedding("an async index on a socket")

    assert sync_vector == vector_of("an index on a socket").tolist()
    assert async_vector == vector_of("an async index on a socket").tolist()
