"""
Proves the proxy against an embeddings server that we did not write, with real weights.

Each text is embedded twice, by the server itself and through the proxy. What the proxy hands out must be the server's
own vectors, in order, through each of its doors and in each encoding.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import numpy as np
import pytest

from tests.fakes.sidecar import Sidecar

if TYPE_CHECKING:
    from tests.real.conftest import RealServer

WIDTH = 384
SAME = 0.9999
"""Cosine above which two vectors are the same; what is left is rounding, which depends on who shares a batch."""

TWICE = "The same text, twice in one request."
TEXTS = [
    "a",
    "7",
    "?!",
    "no",
    "Hello, world!",
    TWICE,
    "The quick brown fox jumps over the lazy dog.",
    "How do I reset my password?",
    "I forgot my login and need a new one.",
    "Invoice 2024-117 is due within thirty days.",
    "SHOUTING ALL THE WAY HOME",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "He said: \"It's 5 o'clock\" \\ and left.",
    "Der Zug nach Köln fällt heute aus.",
    "Größe, Maße und Gewicht stehen auf der Rückseite.",
    "Donaudampfschifffahrtsgesellschaftskapitän",
    "Übermorgen gibt es Grünkohl mit Pinkel.",
    "Wie kündige ich meinen Vertrag fristgerecht?",
    "今日は天気がいいですね。",
    "東京から京都まで新幹線で行きます。",
    "ありがとうございます",
    "カタカナのテスト",
    "日本語とEnglishを混ぜた文章です。",
    "Le café est déjà fermé, à demain !",
    "Привет, как дела?",
    "مرحبا بالعالم",
    "Ça coûte 12,50 € — c'est 3 % de plus.",
    "Great job 🎉🚀",
    "👩‍👩‍👧‍👦 family dinner 🍝",
    "I ❤️ Zürich 🇨🇭",
    "def add(a, b):\n    return a + b\n",
    "SELECT name, count(*) FROM users WHERE age > 30 GROUP BY name;",
    "for (let i = 0; i < 10; i++) { console.log(`row ${i}`); }",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b"}}',
    "<p class='x'>markup &amp; entities</p>",
    "https://example.org/path?query=1&other=two#part",
    "First line\nSecond line\r\nThird line\n\nAfter an empty one",
    "tab\tseparated\tvalues",
    "\n  spaces and line breaks around it  \n",
    TWICE,
    "Sentences go on. " * 40,
    " ".join(f"Paragraph {n} tells a little more of a story that nobody will ever read." for n in range(30)),
]

Vectors = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture
def sidecar(real_server: RealServer) -> Iterator[Sidecar]:
    """A proxy in front of the real server; new for each test, so that no test is answered from another's cache."""
    toml = f"""
        [upstreams.real]
        kind = "openai"
        profile = "infinity"
        base_url = "{real_server.base_url}"

        [models.minilm]
        upstreams = ["real"]
        upstream_model = "{real_server.model}"
        dimensions = {WIDTH}
    """
    with Sidecar(toml) as started:
        yield started


class Door:
    """One way in: a base URL, by TCP or through a Unix socket, and the model's name behind it."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, model: str) -> None:
        self.session = session
        self.base_url = base_url
        self.model = model

    async def post(self, **body: Any) -> tuple[int, Any]:
        """Status and parsed body of the answer to one request."""
        async with self.session.post(f"{self.base_url}/embeddings", json={"model": self.model, **body}) as answer:
            return answer.status, json.loads(await answer.read())

    async def embed(self, texts: str | list[str], encoding: str = "float") -> Vectors:
        """The vectors of the texts as the rows of a matrix, after a look at count, order and width."""
        status, body = await self.post(input=texts, encoding_format=encoding)
        assert status == 200, body
        assert [item["index"] for item in body["data"]] == list(range(1 if isinstance(texts, str) else len(texts)))
        rows = np.array([decode(item["embedding"], encoding) for item in body["data"]])
        assert rows.shape[1] == WIDTH
        return rows


def decode(embedding: Any, encoding: str) -> Vectors:
    """One vector from the wire, which must be in the encoding that was asked for."""
    if encoding == "base64":
        return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
    assert all(isinstance(number, float) for number in embedding)
    return np.array(embedding, dtype="<f4")


@asynccontextmanager
async def door_of(server: RealServer) -> AsyncIterator[Door]:
    """Straight to the server."""
    async with aiohttp.ClientSession() as session:
        yield Door(session, server.base_url, server.model)


@asynccontextmanager
async def door_to(sidecar: Sidecar, kind: str, model: str = "minilm") -> AsyncIterator[Door]:
    """Into the proxy, by its port or its Unix socket."""
    connector = aiohttp.UnixConnector(path=sidecar.socket_path) if kind == "unix" else None
    async with aiohttp.ClientSession(connector=connector) as session:
        yield Door(session, "http://localhost/v1" if kind == "unix" else sidecar.base_url, model)


def cosines(left: Vectors, right: Vectors) -> Vectors:
    """The cosine of each row of one matrix with each row of the other."""
    lengths = np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1))
    return np.asarray(left @ right.T / lengths)


def assert_same(ours: Vectors, theirs: Vectors) -> None:
    """Both have as many rows, and each row is the same vector as its counterpart."""
    assert ours.shape == theirs.shape
    likeness = np.diagonal(cosines(ours, theirs))
    assert likeness.min() > SAME, f"row {likeness.argmin()} differs most"


async def test_server_tells_texts_apart(real_server: RealServer) -> None:
    """No two different texts have the same vector, so an answer in the wrong order can't pass for the right one."""
    async with door_of(real_server) as direct:
        vectors = await direct.embed(TEXTS)
    twins = {(TEXTS[i], TEXTS[j]) for i, j in np.argwhere(cosines(vectors, vectors) > SAME).tolist() if i < j}
    assert twins == {(TWICE, TWICE)}


async def test_server_minds_the_name(real_server: RealServer) -> None:
    """The server refuses a name that it does not serve, so the proxy can't get by with a wrong one."""
    async with door_of(real_server) as direct:
        status, body = await direct.post(model="minilm", input="text")
    assert status == 400, body


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_list(real_server: RealServer, sidecar: Sidecar, kind: str, encoding: str) -> None:
    """A list gets the server's vectors, one for each text and in order."""
    async with door_of(real_server) as direct, door_to(sidecar, kind) as proxied:
        assert_same(await proxied.embed(TEXTS, encoding), await direct.embed(TEXTS, encoding))


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_single_string(real_server: RealServer, sidecar: Sidecar, kind: str, encoding: str) -> None:
    """A bare string gets the one vector that the server gives it."""
    async with door_of(real_server) as direct, door_to(sidecar, kind) as proxied:
        assert_same(await proxied.embed(TEXTS[6], encoding), await direct.embed(TEXTS[6], encoding))


async def test_many_callers_at_once(real_server: RealServer, sidecar: Sidecar) -> None:
    """Callers who ask at the same time each get the vector of their own text."""
    async with door_of(real_server) as direct, door_to(sidecar, "tcp") as proxied:
        answers = await asyncio.gather(*(proxied.embed(text) for text in TEXTS))
        assert_same(np.concatenate(answers), await direct.embed(TEXTS))


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_unknown_model(sidecar: Sidecar, kind: str) -> None:
    """A model that the proxy does not know is its own 404, not the server's 400."""
    async with door_to(sidecar, kind, model="no-such-model") as proxied:
        status, body = await proxied.post(input="text")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
