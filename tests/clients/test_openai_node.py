"""
The official client for Node, over TCP and over the Unix socket.

One run of embed.mjs asks all questions of this file at once; each test judges one answer.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.fake_openai import MODEL, vector_of

SCRIPT = Path(__file__).with_name("embed.mjs")

REQUESTS = {
    "default": {"model": MODEL, "input": ["from node", "zwei\nZeilen", "from node"]},
    "float": {"model": MODEL, "input": "node numbers", "encoding_format": "float"},
    "dimensions": {"model": MODEL, "input": "narrow node", "dimensions": 512},
    "token ids": {"model": MODEL, "input": [[9906], [9906, 1917]]},
    "unknown model": {"model": "no-such-model", "input": "x"},
    "bad dimensions": {"model": MODEL, "input": "x", "dimensions": 255},
}


def run_node(sidecar: Any, over: str, requests: list[dict]) -> dict:
    """What embed.mjs printed: the listed models, and one answer per request."""
    spoken = {
        "baseURL": "http://localhost/v1" if over == "unix" else sidecar.base_url,
        "socketPath": sidecar.socket_path if over == "unix" else None,
        "requests": requests,
    }
    done = subprocess.run(["node", SCRIPT], input=json.dumps(spoken), capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["tcp", "unix"])
def over(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def printed(over: str, sidecar: Any) -> dict:
    return run_node(sidecar, over, list(REQUESTS.values()))


@pytest.fixture
def answers(printed: dict) -> dict[str, dict]:
    return dict(zip(REQUESTS, printed["answers"], strict=True))


def test_default_encoding(answers: dict[str, dict]) -> None:
    """Without a choice the vectors travel as base64 and arrive bit for bit, each at its own place."""
    answer = answers["default"]

    assert answer["onWire"] == "string"
    assert answer["model"] == MODEL
    assert answer["vectors"] == [vector_of(text).tolist() for text in REQUESTS["default"]["input"]]


def test_explicit_float(answers: dict[str, dict]) -> None:
    """A user who asks for floats gets JSON numbers of the same vector."""
    answer = answers["float"]

    assert answer["onWire"] == "object"
    np.testing.assert_allclose(answer["vectors"], [vector_of("node numbers")], rtol=0, atol=1e-6)


def test_dimensions(answers: dict[str, dict]) -> None:
    """The vector has the width asked for and is the upstream's own at that width."""
    assert answers["dimensions"]["vectors"] == [vector_of("narrow node", 512).tolist()]


def test_lists_of_token_ids(answers: dict[str, dict]) -> None:
    """Each list of ids is an input of its own and reaches the upstream as ids."""
    assert answers["token ids"]["vectors"] == [vector_of([9906]).tolist(), vector_of([9906, 1917]).tolist()]


def test_unknown_model(answers: dict[str, dict]) -> None:
    """A model that is not configured raises NotFoundError with OpenAI's own code."""
    assert answers["unknown model"] == {"error": "NotFoundError", "status": 404, "code": "model_not_found"}


def test_dimensions_not_allowed(answers: dict[str, dict]) -> None:
    """A width that the model does not have raises BadRequestError with a code of its own."""
    assert answers["bad dimensions"] == {"error": "BadRequestError", "status": 400, "code": "unsupported_dimensions"}


def test_models_list(printed: dict) -> None:
    """The client lists the models that this proxy serves."""
    assert MODEL in printed["models"]


def test_embedded_model(over: str, embedded: Any, wordllama: Callable[..., list[float]]) -> None:
    """Without configuration Node gets the embedded model's vectors, and a plain refusal of token ids."""
    requests = [{"model": "wordllama", "input": "a llama in node"}, {"model": "wordllama", "input": [9906, 1917]}]
    printed = run_node(embedded, over, requests)
    vector, refusal = printed["answers"]

    assert vector["onWire"] == "string"
    np.testing.assert_allclose(vector["vectors"], [wordllama("a llama in node")], rtol=0, atol=1e-6)
    assert refusal == {"error": "BadRequestError", "status": 400, "code": "token_ids_not_supported"}
    assert "wordllama" in printed["models"]
