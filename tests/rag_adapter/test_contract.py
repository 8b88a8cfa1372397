"""Adapter and sidecar, both real, in front of a scripted upstream: what one says, the other understands."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from rag_adapter.blocking import SyncEmbeddingClient
from rag_adapter.client import EmbeddingClient
from rag_adapter.errors import DeadlineExceeded, EmbeddingError, EmbeddingFailed, InvalidInput, Unavailable
from tests.fakes.sidecar import Sidecar
from tests.fakes.upstream import FakeUpstream, Fault, vector

KEY = "sk-client"
SETTINGS = f"""
[attempt]
max_attempts = 1
[callers.app]
key_sha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"
"""


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture
async def proxy(upstream: FakeUpstream) -> AsyncIterator[Sidecar]:
    """Model `m`, 8 wide or 4; texts of 100 bytes at the most; a client key over TCP."""
    toml = SETTINGS + upstream.toml(
        upstream="circuit.failures = 1000\ntransport.attempt_timeout_s = 0.3",
        dimensions=8,
        dimensions_allowed=[4],
        max_input_bytes=100,
    )
    proxy = Sidecar(toml)
    await asyncio.to_thread(proxy.__enter__)
    try:
        yield proxy
    finally:
        await asyncio.to_thread(proxy.__exit__)


def right(text: str, width: int = 8) -> list[float]:
    return [float(x) for x in vector(text, width)]


async def logged(proxy: Sidecar, is_so: Callable[[str], bool]) -> None:
    """Wait until the log says something: a line is written after its answer."""
    async with asyncio.timeout(5):
        while not is_so(proxy.log()):
            await asyncio.sleep(0.01)


async def outcomes(*calls: Any) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize("is_unix", [True, False])
async def test_vectors_by_both_clients(proxy: Sidecar, is_unix: bool) -> None:
    """The same to the bit, over the Unix socket and over TCP with a key, in the width that was asked for."""
    address = proxy.socket_path if is_unix else f"http://{proxy.address}"
    texts = [f"text {n}" for n in range(300)]
    with SyncEmbeddingClient(address, api_key=KEY) as blocking:
        async with EmbeddingClient(address, api_key=KEY) as client:
            shared = await asyncio.gather(*map(client.embed, texts))
            many = await client.embed_many(texts)
            threads = await asyncio.to_thread(blocking.embed_many, texts)
            narrow = [
                await client.embed("a", dimensions=4),
                await asyncio.to_thread(lambda: blocking.embed("a", dimensions=4)),
            ]

    assert shared == many == threads == [right(text) for text in texts]
    assert narrow == [right("a", 4)] * 2


async def test_errors_that_the_sidecar_says(proxy: Sidecar, upstream: FakeUpstream) -> None:
    """Each kind, by both clients, with the sidecar's own code."""
    upstream.poison = {
        "slow": Fault(hang=True),
        "broken": Fault(status=500, body={"error": {"message": "boom"}}),
        "limited": Fault(status=429, headers={"Retry-After": "60"}, body={"error": {"message": "slow down"}}),
    }
    expected: list[tuple[str, dict[str, Any], type[EmbeddingError], str]] = [
        ("a", {"model": "nope"}, EmbeddingFailed, "model_not_found"),
        ("a", {"dimensions": 5}, InvalidInput, "unsupported_dimensions"),
        ("x" * 101, {}, InvalidInput, "input_too_long"),
        ("broken", {}, EmbeddingFailed, "upstream_failed"),
        ("slow", {}, DeadlineExceeded, "upstream_timeout"),
        ("limited", {"timeout_s": 2.0}, Unavailable, "rate_limit_exceeded"),
    ]
    ids: list[str] = []
    with SyncEmbeddingClient(proxy.socket_path) as blocking:
        async with EmbeddingClient(proxy.socket_path) as client:
            for text, wish, kind, code in expected:
                for error in (
                    *await outcomes(client.embed(text, **wish)),
                    *await outcomes(asyncio.to_thread(lambda t=text, w=wish: blocking.embed(t, **w))),
                ):
                    assert (type(error), error.code) == (kind, code)
                    assert error.status is not None
                    assert text == "a" or text not in str(error)
                    assert error.request_id is not None
                    ids.append(error.request_id)
    await logged(proxy, lambda log: all(each in log for each in ids))


async def test_key_that_is_missing(proxy: Sidecar) -> None:
    """Over TCP the sidecar wants one, and the error says which argument that is about."""
    async with EmbeddingClient(f"http://{proxy.address}") as client:
        with pytest.raises(EmbeddingFailed) as caught:
            await client.embed("a")

    assert (caught.value.code, caught.value.status) == ("invalid_api_key", 401)


async def test_one_bad_text_among_good_ones(proxy: Sidecar, upstream: FakeUpstream) -> None:
    """Refused by the sidecar or by the upstream: it is its own caller's trouble, and placed in a list."""
    upstream.poison = {"refused": Fault(status=400, body={"error": {"message": "invalid input", "code": "bad_thing"}})}
    texts = ["a", "x" * 101, "b", "refused", "c"]
    async with EmbeddingClient(proxy.socket_path) as client:
        found = await outcomes(*map(client.embed, texts))
        with pytest.raises(InvalidInput) as too_long:
            await client.embed_many(texts)
        with pytest.raises(InvalidInput) as refused:
            await client.embed_many(texts[2:])

    assert [type(each) for each in found] == [list, InvalidInput, list, InvalidInput, list]
    assert [found[1].code, found[3].code] == ["input_too_long", "bad_thing"]
    assert (found[0], found[2], found[4]) == (right("a"), right("b"), right("c"))
    assert (too_long.value.index, too_long.value.code) == (1, "input_too_long")
    assert (refused.value.index, refused.value.code) == (1, "bad_thing")


async def test_sidecar_with_a_smaller_bound(upstream: FakeUpstream) -> None:
    """It takes fewer texts per request than we send: those who share one do not notice."""
    proxy = Sidecar(upstream.toml(dimensions=8) + "[request]\nmax_inputs = 5\n")
    await asyncio.to_thread(proxy.__enter__)
    try:
        texts = [f"text {n}" for n in range(100)]
        async with EmbeddingClient(proxy.socket_path) as client:
            found = await asyncio.gather(*map(client.embed, texts))
    finally:
        await asyncio.to_thread(proxy.__exit__)

    assert found == [right(text) for text in texts]


async def test_query_stays_a_query_when_it_travels_with_others(proxy: Sidecar) -> None:
    """The sidecar takes an unlabelled list for bulk; what `embed` sends together is interactive all the same."""
    async with EmbeddingClient(proxy.socket_path, client_name="search") as client:
        await asyncio.gather(client.embed("a"), client.embed("b"))
        await client.embed_many(["c"])
    await logged(proxy, lambda log: log.count('"inputs":') == 2)
    requests = [line for line in proxy.lines() if line.get("inputs")]

    assert [(line["inputs"], line["priority"]) for line in requests] == [(2, "interactive"), (1, "bulk")]
    assert all(str(line["caller"]).endswith("/search") for line in requests)


async def test_trace_from_the_app_to_the_upstream(proxy: Sidecar, upstream: FakeUpstream) -> None:
    """One trace id all the way, by both clients."""
    with TracerProvider().get_tracer("app").start_as_current_span("search") as span:
        async with EmbeddingClient(proxy.socket_path) as client:
            await client.embed("a")
        with SyncEmbeddingClient(proxy.socket_path) as blocking:
            await asyncio.to_thread(blocking.embed, "b")  # the thread has this task's context

    trace_id = f"{span.get_span_context().trace_id:032x}"
    assert [trace_id in seen.headers["traceparent"] for seen in upstream.seen] == [True, True]
