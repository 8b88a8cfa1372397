"""The whole proxy in front of upstreams that speak dialects of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.fakes.running import Running, running
from tests.fakes.upstream import FakeUpstream, Fault, vector
from tests.route.conftest import FAST

KINDS: dict[str, dict[str, Any]] = {
    "ollama": {"kind": "ollama"},
    "tei": {"kind": "tei"},
    "tei openai": {"kind": "tei", "upstream": 'route = "openai"'},
}
PATHS = {"ollama": "/api/embed", "tei": "/embed", "tei openai": "/embeddings"}


def floats(document: dict[str, Any]) -> numpy.ndarray:
    return numpy.array([item["embedding"] for item in document["data"]], dtype="<f4")


def right(inputs: list[str], width: int = 8) -> numpy.ndarray:
    return numpy.array([vector(item, width) for item in inputs])


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def proxy(tmp_path: Path, upstream: FakeUpstream, kind: str) -> AsyncIterator[Running]:
    """Model `m`, 8 wide, on an upstream of each kind."""
    toml = upstream.toml(**KINDS[kind], dimensions=8, dimensions_allowed=[4], upstream_model="theirs")
    async with running(tmp_path, FAST + toml) as proxy:
        yield proxy


async def test_list_of_texts_comes_back_in_order(proxy: Running, upstream: FakeUpstream, kind: str) -> None:
    """Each text gets its own vector, to the bit, and the tokens are those that the upstream counted."""
    texts = ["one", "two", "three"]

    status, document, headers = await proxy.embed({"input": texts})

    assert status == 200
    assert (floats(document) == right(texts)).all()
    assert document["usage"]["total_tokens"] == len("onetwothree")
    assert headers["X-Embedding-Upstream"] == "fake"
    assert {seen.path for seen in upstream.seen} == {PATHS[kind]}


async def test_what_the_upstream_is_told(proxy: Running, upstream: FakeUpstream, kind: str) -> None:
    """It hears its own name for the model, the width, and the further parameters of the caller."""
    body = {"input": "t", "dimensions": 4, "user": "u-1", "options": {"a": 1}}

    status, document, _ = await proxy.embed(body)

    assert status == 200
    assert (floats(document) == right(["t"], 4)).all()
    assert (
        upstream.seen[0].body
        == {
            "ollama": {
                "model": "theirs",
                "input": ["t"],
                "dimensions": 4,
                "truncate": False,
                "keep_alive": "30m",
                "options": {"a": 1},
            },
            "tei": {"inputs": ["t"], "dimensions": 4, "truncate": False, "normalize": True, "options": {"a": 1}},
            "tei openai": {
                "model": "theirs",
                "input": ["t"],
                "dimensions": 4,
                "encoding_format": "base64",
                "options": {"a": 1},
            },
        }[kind]
    )


async def test_list_over_the_upstreams_limit_is_split(proxy: Running, upstream: FakeUpstream, kind: str) -> None:
    """A long list goes out in calls that the server takes, and comes back as one answer, in order."""
    texts = [f"text {n}" for n in range(100)]

    status, document, _ = await proxy.embed({"input": texts})

    assert status == 200
    assert (floats(document) == right(texts)).all()
    assert max(len(seen.inputs) for seen in upstream.seen) <= (16 if kind == "ollama" else 32)


ONE_OFF = [
    pytest.param("ollama", Fault(status=503, body={"error": "server busy, please try again."}), id="ollama busy"),
    pytest.param("ollama", Fault(status=400, body={"error": "do embedding request: EOF"}), id="ollama runner"),
    pytest.param("ollama", Fault(change=lambda answer: answer | {"embeddings": []}), id="ollama no vectors"),
    pytest.param("tei", Fault(status=429, body={"error": "x", "error_type": "Overloaded"}), id="tei overloaded"),
    pytest.param("tei", Fault(status=503, body={"error": "x", "error_type": "Unhealthy"}), id="tei unhealthy"),
    pytest.param("tei", Fault(change=lambda rows: [[None] * 8 for _ in rows]), id="tei nulls"),
    pytest.param(
        "tei openai", Fault(status=429, body={"message": "x", "type": "Overloaded"}), id="tei openai overloaded"
    ),
]


@pytest.mark.parametrize(("kind", "fault"), ONE_OFF)
async def test_one_off_trouble_is_tried_again(proxy: Running, upstream: FakeUpstream, fault: Fault) -> None:
    """P2: trouble of one exchange never reaches the caller: the next attempt gives the right vectors."""
    upstream.script = [fault]

    status, document, _ = await proxy.embed({"input": ["a", "b", "c"]})

    assert status == 200
    assert (floats(document) == right(["a", "b", "c"])).all()


LONG = {
    "error": "Input validation error: `inputs` must have less than 512 tokens. Given: 600",
    "error_type": "Validation",
}
FINAL = [
    pytest.param(
        "ollama",
        Fault(status=400, body={"error": "the input length exceeds the context length"}),
        (400, "input_too_long"),
        id="ollama long",
    ),
    pytest.param("ollama", Fault(status=401, body=b""), (502, "upstream_denied"), id="ollama key"),
    pytest.param("tei", Fault(status=422, body=LONG), (422, "input_too_long"), id="tei long"),
    pytest.param("tei", Fault(status=413, body=b"length limit exceeded"), (413, "batch_too_large"), id="tei bytes"),
    pytest.param("tei", Fault(status=401, body=b""), (502, "upstream_denied"), id="tei key"),
    pytest.param(
        "tei openai",
        Fault(status=422, body={"message": LONG["error"], "type": "Validation", "code": 422}),
        (422, "input_too_long"),
        id="tei openai long",
    ),
]


@pytest.mark.parametrize(("kind", "fault", "expected"), FINAL)
async def test_what_cannot_succeed_is_tried_once(
    proxy: Running, upstream: FakeUpstream, fault: Fault, expected: tuple[int, str]
) -> None:
    """P4: a long text and a denied key are final, and no SDK is told to try again."""
    upstream.always = fault

    status, document, headers = await proxy.embed({"input": "x"})

    assert (status, document["error"]["code"]) == expected
    assert headers["x-should-retry"] == "false"
    assert len(upstream.seen) == 1


POISON = [
    pytest.param("ollama", Fault(status=400, body={"error": "embedding contains NaN or Inf values"}), 502, id="ollama"),
    pytest.param("ollama", Fault(status=500, body={"error": "json: unsupported value: NaN"}), 502, id="ollama before"),
    pytest.param("tei", Fault(status=424, body={"error": "x", "error_type": "Backend"}), 502, id="tei"),
    pytest.param("tei", Fault(status=422, body=LONG), 422, id="tei long"),
    pytest.param("tei openai", Fault(status=424, body={"message": "x", "type": "Backend"}), 502, id="tei openai"),
]


@pytest.mark.parametrize(("kind", "fault", "expected"), POISON)
async def test_text_that_spoils_its_batch(
    tmp_path: Path, upstream: FakeUpstream, kind: str, fault: Fault, expected: int
) -> None:
    """P3: a text on which the model fails, or that is too long, fails its own request and none beside it."""
    kinds = KINDS[kind] | {"upstream": f"{KINDS[kind].get('upstream', '')}\nbalance.slots = 1"}
    async with running(tmp_path, FAST + upstream.toml(**kinds)) as proxy:
        gate = asyncio.Event()
        upstream.script = [Fault(wait_for=gate)]
        upstream.poison = {"bad": fault}
        first = asyncio.create_task(proxy.embed({"input": "first"}))
        while not upstream.inside:
            await asyncio.sleep(0.01)
        others = [asyncio.create_task(proxy.embed({"input": text})) for text in ("a", "b", "bad", "c", "d")]
        while (await proxy.get("/status"))[1]["stages"]["admission"]["inputs"] < 6:
            await asyncio.sleep(0.01)
        gate.set()
        answers = await asyncio.gather(first, *others)

    assert [status for status, _, _ in answers] == [200, 200, 200, expected, 200, 200]
    assert max(len(seen.inputs) for seen in upstream.seen) > 1


@pytest.mark.parametrize("kind", ["ollama"])
async def test_model_that_nobody_has_pulled(proxy: Running, upstream: FakeUpstream) -> None:
    """Whoever has forgotten to pull the model reads how in the answer."""
    upstream.always = Fault(status=404, body={"error": "model 'theirs' not found"})

    status, document, _ = await proxy.embed({"input": "x"})

    assert (status, document["error"]["code"]) == (502, "upstream_not_found")
    assert document["error"]["message"].endswith("ollama pull theirs")


async def test_routes_of_one_server_stand_in_for_each_other(tmp_path: Path, upstream: FakeUpstream) -> None:
    """Kinds may be mixed within a model: what counts is that the vectors are the same, and the canary says so."""
    blocks = [
        f'[upstreams."{name}"]\n{lines}\nbase_url = "{upstream.root_url}"\n'
        for name, lines in {
            "ollama": 'kind = "ollama"',
            "tei": 'kind = "tei"',
            "tei-openai": 'kind = "tei"\nroute = "openai"',
            "openai": 'kind = "openai"',
        }.items()
    ]
    toml = FAST + "".join(blocks) + '[models.m]\nupstreams = ["ollama", "tei", "tei-openai", "openai"]\n'
    async with running(tmp_path, toml) as proxy:
        answers = [await proxy.embed({"input": f"t{n}"}) for n in range(40)]
        _, ready = await proxy.get("/readyz")

    assert all((floats(document) == right([f"t{n}"])).all() for n, (_, document, _) in enumerate(answers))
    assert [one["is_verified"] for one in ready["models"]["m"]["upstreams"].values()] == [True] * 4
