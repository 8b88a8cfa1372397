"""The fake upstream itself: what the other tests take from it for granted."""

import base64
import json
import urllib.error
import urllib.request

import numpy as np
import pytest

from tests.clients.fake_openai import MODEL, WIDTH, FakeOpenAI, vector_of


def post(upstream: FakeOpenAI, **fields: object) -> dict:
    """Its answer to this body; HTTPError when it refuses."""
    body = json.dumps({"model": MODEL, **fields}).encode()
    request = urllib.request.Request(f"{upstream.base_url}/embeddings", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_vector_depends_on_input_and_width() -> None:
    """Equal inputs have equal vectors; another text, its ids, or another width have another one."""
    assert vector_of("x").tolist() == vector_of("x").tolist()
    others = [vector_of("x", 512), vector_of("y")[:512], vector_of([87])[:512], vector_of("x")[:512]]
    assert len({vector.tobytes() for vector in others}) == 4
    assert np.linalg.norm(vector_of("x")) == pytest.approx(1, abs=1e-6)


def test_encodings(upstream: FakeOpenAI) -> None:
    """It answers base64 when asked for base64, and floats otherwise."""
    as_floats = post(upstream, input="x")["data"][0]["embedding"]
    as_base64 = post(upstream, input="x", encoding_format="base64")["data"][0]["embedding"]

    assert as_floats == vector_of("x").tolist()
    assert np.frombuffer(base64.b64decode(as_base64), "<f4").tolist() == vector_of("x").tolist()


@pytest.mark.parametrize(
    "refused",
    [
        {"input": "x", "model": "another"},
        {"input": "x", "dimensions": WIDTH + 1},
        {"input": "x", "encoding_format": "int8"},
        {"input": "x", "x_priority": "not OpenAI's"},
        {"input": ""},
        {"input": []},
        {"input": ["x"] * 2049},
        {"input": ["x", 1]},
        {"input": [100_277]},
        {"input": [[1] * 8193]},
        {},
    ],
    ids=lambda refused: str(refused)[:40],
)
def test_refusals(upstream: FakeOpenAI, refused: dict) -> None:
    """It refuses what OpenAI would refuse, so a proxy that sends such a thing is found out."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(upstream, **refused)

    assert caught.value.code in (400, 404)
