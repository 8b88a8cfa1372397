"""
The official Python client, run four ways: sync and async, each over TCP and over the Unix socket.

Every test asks through `ask`, which gives a call its client and hands back its result, whichever of the four it is.
"""

import asyncio
import base64
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import openai
import pytest
from httpx2 import AsyncHTTPTransport, HTTPTransport  # what openai is built on since 3.0; it exports no transports
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI

from tests.clients.fake_openai import MODEL, WIDTH, vector_of

Ask = Callable[[Callable[[Any], Any]], Any]

# No retries, since one would hide a failure; a timeout far below the client's ten minutes, so that a hang fails too.
OPTIONS = {"api_key": "the-callers-own-key", "max_retries": 0, "timeout": 30}


@contextmanager
def asking(way: str, sidecar: Any) -> Iterator[Ask]:
    """Open the client for one of the four ways, and close it afterwards."""
    over_socket = way.endswith("unix")
    # On a Unix socket the host is only a name in the Host header.
    base_url = "http://localhost/v1" if over_socket else sidecar.base_url
    uds = sidecar.socket_path if over_socket else None

    if way.startswith("sync"):
        http_client = DefaultHttpxClient(transport=HTTPTransport(uds=uds)) if uds else None
        with OpenAI(base_url=base_url, http_client=http_client, **OPTIONS) as client:
            yield lambda call: call(client)
        return

    async def result_of(value: Any) -> Any:
        return await value if inspect.isawaitable(value) else value

    with asyncio.Runner() as runner:
        http_client = DefaultAsyncHttpxClient(transport=AsyncHTTPTransport(uds=uds)) if uds else None
        client = AsyncOpenAI(base_url=base_url, http_client=http_client, **OPTIONS)
        yield lambda call: runner.run(result_of(call(client)))
        runner.run(client.close())


@pytest.fixture(scope="module", params=["sync-tcp", "sync-unix", "async-tcp", "async-unix"])
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ask(way: str, sidecar: Any) -> Iterator[Ask]:
    with asking(way, sidecar) as opened:
        yield opened


@pytest.fixture(scope="module")
def ask_embedded(way: str, embedded: Any) -> Iterator[Ask]:
    with asking(way, embedded) as opened:
        yield opened


# --- vectors ---


def test_single_string(ask: Ask) -> None:
    """One text gives one vector, bit for bit the upstream's, under the model's own name."""
    answer = ask(lambda client: client.embeddings.create(model=MODEL, input="a single string"))

    assert [item.embedding for item in answer.data] == [vector_of("a single string").tolist()]
    assert answer.model == MODEL
    assert answer.object == "list"
    assert answer.usage.total_tokens >= answer.usage.prompt_tokens >= 0


def test_list_of_strings(ask: Ask) -> None:
    """Each text of a list gets its own vector at its own place, a repeated text included."""
    texts = ["first", "second", "first", "  spaces and\nnewlines stay  ", "日本語 🦙"]
    answer = ask(lambda client: client.embeddings.create(model=MODEL, input=texts))

    assert [item.embedding for item in answer.data] == [vector_of(text).tolist() for text in texts]
    assert [item.index for item in answer.data] == [0, 1, 2, 3, 4]


def test_default_encoding(ask: Ask) -> None:
    """The client asks for base64 when its user does not choose, and gets it."""
    raw = ask(lambda client: client.embeddings.with_raw_response.create(model=MODEL, input="by default"))
    on_wire = raw.http_response.json()["data"][0]["embedding"]

    assert base64.b64decode(on_wire, validate=True) == vector_of("by default").astype("<f4").tobytes()
    assert raw.parse().data[0].embedding == vector_of("by default").tolist()


def test_explicit_base64(ask: Ask) -> None:
    """A user who asks for base64 gets the string untouched: little-endian float32."""
    answer = ask(lambda client: client.embeddings.create(model=MODEL, input="raw bytes", encoding_format="base64"))

    assert base64.b64decode(answer.data[0].embedding, validate=True) == vector_of("raw bytes").astype("<f4").tobytes()


def test_explicit_float(ask: Ask) -> None:
    """A user who asks for floats gets JSON numbers of the same vector."""
    answer = ask(lambda client: client.embeddings.create(model=MODEL, input="numbers", encoding_format="float"))

    np.testing.assert_allclose(answer.data[0].embedding, vector_of("numbers"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dimensions", [256, 512, WIDTH])
def test_dimensions(ask: Ask, dimensions: int) -> None:
    """The vector has the width asked for and is the upstream's own at that width."""
    answer = ask(lambda client: client.embeddings.create(model=MODEL, input="narrower", dimensions=dimensions))

    assert answer.data[0].embedding == vector_of("narrower", dimensions).tolist()


def test_one_list_of_token_ids(ask: Ask) -> None:
    """A flat list of ids is one input and reaches the upstream as ids."""
    answer = ask(lambda client: client.embeddings.create(model=MODEL, input=[9906, 1917]))

    assert [item.embedding for item in answer.data] == [vector_of([9906, 1917]).tolist()]


def test_many_lists_of_token_ids(ask: Ask) -> None:
    """Each list of ids is an input of its own, at its own place."""
    lists = [[9906], [9906, 1917], [0, 100276]]
    answer = ask(lambda client: client.embeddings.create(model=MODEL, input=lists))

    assert [item.embedding for item in answer.data] == [vector_of(ids).tolist() for ids in lists]


async def test_concurrent_calls_of_one_async_client(sidecar: Any) -> None:
    """Calls that are in flight together, merged or not on their way, each get the vector of their own text."""
    texts = [f"concurrent text {number}" for number in range(64)]
    async with AsyncOpenAI(base_url=sidecar.base_url, **OPTIONS) as client:
        answers = await asyncio.gather(*(client.embeddings.create(model=MODEL, input=text) for text in texts))

    assert [answer.data[0].embedding for answer in answers] == [vector_of(text).tolist() for text in texts]


# --- the embedded model ---


def test_embedded_model(ask_embedded: Ask, wordllama: Callable[..., list[float]]) -> None:
    """Without configuration the client gets the embedded model's vectors, the same as plain HTTP gives."""
    texts = ["a llama of words", "something else"]
    answer = ask_embedded(lambda client: client.embeddings.create(model="wordllama", input=texts))

    assert len(answer.data[0].embedding) == 256
    for item, text in zip(answer.data, texts, strict=True):
        np.testing.assert_allclose(item.embedding, wordllama(text), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dimensions", [64, 128])
def test_embedded_model_with_dimensions(
    ask_embedded: Ask, wordllama: Callable[..., list[float]], dimensions: int
) -> None:
    """The embedded model answers in the width asked for."""
    answer = ask_embedded(
        lambda client: client.embeddings.create(model="wordllama", input="narrow llama", dimensions=dimensions)
    )
    vector = answer.data[0].embedding

    assert len(vector) == dimensions
    np.testing.assert_allclose(vector, wordllama("narrow llama", dimensions=dimensions), rtol=0, atol=1e-6)


# --- refusals ---


def test_unknown_model(ask: Ask) -> None:
    """A model that is not configured raises NotFoundError with OpenAI's own code."""
    with pytest.raises(openai.NotFoundError) as caught:
        ask(lambda client: client.embeddings.create(model="no-such-model", input="x"))

    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("dimensions", [255, 100_000])
def test_dimensions_not_allowed(ask: Ask, dimensions: int) -> None:
    """A width that the model does not have raises BadRequestError, with a code of its own and the field's name."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(lambda client: client.embeddings.create(model=MODEL, input="x", dimensions=dimensions))

    assert caught.value.code == "unsupported_dimensions"
    assert caught.value.param == "dimensions"
    assert caught.value.type == "invalid_request_error"


def test_token_ids_for_a_model_without_them(ask_embedded: Ask) -> None:
    """Token ids for a model with another vocabulary raise BadRequestError: never a vector of other words."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask_embedded(lambda client: client.embeddings.create(model="wordllama", input=[9906, 1917]))

    assert caught.value.code == "token_ids_not_supported"


# --- the rest of the API ---


def test_models_list(ask: Ask, ask_embedded: Ask) -> None:
    """The client lists the models that this proxy serves."""
    listed = ask(lambda client: client.models.list()).data
    listed_embedded = ask_embedded(lambda client: client.models.list()).data

    assert MODEL in [model.id for model in listed]
    assert "wordllama" in [model.id for model in listed_embedded]
    assert {(model.object, type(model.created), type(model.owned_by)) for model in listed} == {("model", int, str)}


def test_models_retrieve(ask: Ask) -> None:
    """The client looks one model up by its name, and an unknown name raises NotFoundError."""
    assert ask(lambda client: client.models.retrieve(MODEL)).id == MODEL

    with pytest.raises(openai.NotFoundError) as caught:
        ask(lambda client: client.models.retrieve("no-such-model"))

    assert caught.value.code == "model_not_found"


def test_request_id(ask: Ask) -> None:
    """An answer carries the id to quote when asking about it, another one each time."""
    ids = [ask(lambda client: client.embeddings.create(model=MODEL, input="which"))._request_id for _ in range(2)]

    assert all(ids)
    assert len(set(ids)) == 2


def test_callers_key_stays_inside(ask: Ask, way: str, upstream: Any) -> None:
    """The key that the client must be given, and sends, is not passed on to the upstream."""
    text = f"a caller with a key, {way}"  # another text each way, or the cache would answer and nothing be sent
    ask(lambda client: client.embeddings.create(model=MODEL, input=text, user="somebody"))

    assert text in upstream.inputs
    assert not any(OPTIONS["api_key"] in (header or "") for header in upstream.authorizations)
