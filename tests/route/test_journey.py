"""From a caller's socket to a real upstream and back."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import numpy
import pytest
from multidict import CIMultiDict

from proxy.upstream.balance.canary import CANARIES
from tests.fakes.running import Running, running
from tests.fakes.upstream import FakeUpstream, Fault, vector


def floats(document: dict) -> numpy.ndarray:
    return numpy.array([item["embedding"] for item in document["data"]], dtype="<f4")


def right(inputs: list, width: int = 8) -> numpy.ndarray:
    return numpy.array([vector(item, width) for item in inputs])


@pytest.mark.parametrize("is_unix", [False, True], ids=["tcp", "unix"])
async def test_list_of_texts_comes_back_in_order(proxy: Running, is_unix: bool) -> None:
    """Each text gets its own vector, by position, over either listener."""
    texts = ["one", "two", "three", "two"]

    status, document, headers = await proxy.embed({"input": texts, "model": "m"}, is_unix=is_unix)

    assert status == 200
    assert [item["index"] for item in document["data"]] == [0, 1, 2, 3]
    assert (floats(document) == right(texts)).all()
    assert document["model"] == "m"
    assert document["usage"]["prompt_tokens"] == document["usage"]["total_tokens"] == len("onetwothree")
    assert headers["X-Embedding-Upstream"] == "fake"


@pytest.mark.parametrize("upstream_has_base64", [True, False])
@pytest.mark.parametrize("encoding", ["base64", "float", None])
async def test_caller_gets_the_encoding_it_asked_for(
    tmp_path: Path, upstream_has_base64: bool, encoding: str | None
) -> None:
    """base64 and floats are answered as asked, whichever the upstream gives; to the bit."""
    async with FakeUpstream(has_base64=upstream_has_base64) as upstream, running(tmp_path, upstream.toml()) as proxy:
        body = {"input": ["text"]} | ({"encoding_format": encoding} if encoding else {})
        _, document, _ = await proxy.embed(body)

    embedding = document["data"][0]["embedding"]
    if encoding == "base64":
        assert base64.b64decode(embedding) == vector("text", 8).tobytes()
    else:
        assert numpy.array(embedding, dtype="<f4").tobytes() == vector("text", 8).tobytes()


async def test_token_ids_reach_an_upstream_that_speaks_them(tmp_path: Path) -> None:
    """A list of ids is one input, a list of lists many; both reach OpenAI's own as they are."""
    async with FakeUpstream() as upstream, running(tmp_path, upstream.toml(token_ids=True)) as proxy:
        _, one, _ = await proxy.embed({"input": [1, 2, 3]})
        _, many, _ = await proxy.embed({"input": [[1, 2, 3], [4]]})

    assert (floats(one) == right([[1, 2, 3]])).all()
    assert (floats(many) == right([[1, 2, 3], [4]])).all()


async def test_dimensions_user_and_unknown_parameters_are_forwarded(proxy: Running, upstream: FakeUpstream) -> None:
    """What the caller adds reaches the upstream; explicit nulls do not."""
    body = {"input": "t", "dimensions": 4, "user": "u-1", "truncate": "END", "task": {"b": 1, "a": None}, "extra": None}

    status, document, _ = await proxy.embed(body)

    assert status == 200
    assert (floats(document) == right(["t"], 4)).all()
    sent = upstream.seen[0].body
    assert sent == {
        "model": "m",
        "input": ["t"],
        "encoding_format": "base64",
        "dimensions": 4,
        "user": "u-1",
        "truncate": "END",
        "task": {"b": 1, "a": None},
    }


async def test_parameters_are_part_of_the_identity(proxy: Running, upstream: FakeUpstream) -> None:
    """The same text with another parameter or width is another input; the order of the parameters is none."""
    bodies = [{}, {"task": "query"}, {"task": "query", "x": 1}, {"x": 1, "task": "query"}, {"dimensions": 4}, {}]
    caches, spaces = [], []
    for body in bodies:
        _, _, headers = await proxy.embed({"input": "same", **body})
        caches.append(headers["X-Embedding-Cache"])
        spaces.append(headers["X-Embedding-Space"])

    assert caches == ["miss", "miss", "miss", "hit", "miss", "hit"]
    assert len(upstream.seen) == 4
    assert len(set(spaces)) == 4


async def test_curl_explains_a_request_by_its_headers(proxy: Running) -> None:
    """Request id, cache, space, upstream and timing stand in the head of the answer."""
    _, _, headers = await proxy.embed({"input": ["a", "b"]}, headers={"X-Request-Id": "mine-1"})
    _, _, again = await proxy.embed({"input": ["a", "c"]})

    assert headers["X-Request-Id"] == "mine-1"
    assert headers["X-Embedding-Cache"] == "miss"
    assert again["X-Embedding-Cache"] == "partial"
    assert again["X-Request-Id"]
    assert len(headers["X-Embedding-Space"]) == 16
    assert [part.split(";")[0] for part in headers["Server-Timing"].split(", ")] == ["queue", "upstream", "total"]


async def test_cached_texts_need_no_upstream(proxy: Running, upstream: FakeUpstream) -> None:
    """P5: what was computed once is answered even while the upstream is down."""
    await proxy.embed({"input": ["a", "b"]})
    upstream.always = Fault(reset=True)

    status, document, headers = await proxy.embed({"input": ["b", "a", "b"]})

    assert status == 200
    assert (floats(document) == right(["b", "a", "b"])).all()
    assert headers["X-Embedding-Cache"] == "hit"
    assert document["usage"]["prompt_tokens"] == 0


async def test_cache_control_is_honoured(proxy: Running, upstream: FakeUpstream) -> None:
    """no-cache asks anew, no-store leaves no trace."""
    for headers in ({"Cache-Control": "no-store"}, {}, {"Cache-Control": "no-cache"}, {}):
        await proxy.embed({"input": "t"}, headers=headers)

    assert len(upstream.seen) == 3


async def test_equal_texts_in_flight_share_one_call(proxy: Running, upstream: FakeUpstream) -> None:
    """Ten callers with the same text at the same time cost one call."""
    gate = asyncio.Event()
    upstream.always = Fault(wait_for=gate)
    callers = [asyncio.create_task(proxy.embed({"input": ["same", "same"]})) for _ in range(10)]
    while not upstream.inside:
        await asyncio.sleep(0.01)
    while (await proxy.get("/status"))[1]["stages"]["admission"]["inputs"] < 20:
        await asyncio.sleep(0.01)
    gate.set()
    answers = await asyncio.gather(*callers)

    assert [len(seen.inputs) for seen in upstream.seen] == [1]
    assert all((floats(document) == right(["same", "same"])).all() for _, document, _ in answers)


async def test_list_over_the_upstreams_limit_is_split(tmp_path: Path) -> None:
    """A long list goes out in several calls and comes back as one answer, in order."""
    texts = [f"text {n}" for n in range(100)]
    async with FakeUpstream() as upstream:
        toml = upstream.toml().replace("[models.m]", "batch.max_inputs = 7\n[models.m]")
        async with running(tmp_path, toml) as proxy:
            status, document, _ = await proxy.embed({"input": texts})

    assert status == 200
    assert (floats(document) == right(texts)).all()
    assert sorted(len(seen.inputs) for seen in upstream.seen) == [2] + [7] * 14


async def test_upstream_sees_no_more_calls_at_a_time_than_slots(tmp_path: Path) -> None:
    """P4: the number of concurrent calls stays within balance.slots."""
    async with FakeUpstream() as upstream:
        toml = upstream.toml().replace("[models.m]", "balance.slots = 3\n[models.m]")
        async with running(tmp_path, toml) as proxy:
            gate = asyncio.Event()
            upstream.always = Fault(wait_for=gate)
            callers = [asyncio.create_task(proxy.embed({"input": f"t{n}"})) for n in range(40)]
            while upstream.inside < 3 or (await proxy.get("/status"))[1]["stages"]["admission"]["inputs"] < 40:
                await asyncio.sleep(0.01)
            gate.set()
            answers = await asyncio.gather(*callers)

    assert all(status == 200 for status, _, _ in answers)
    assert upstream.most_inside == 3


async def test_large_float_answer_is_written_in_pieces(tmp_path: Path) -> None:
    """2048 vectors of 1536 numbers as JSON arrive whole and right."""
    texts = [f"text {n}" for n in range(2048)]
    async with FakeUpstream(width=1536) as upstream, running(tmp_path, upstream.toml()) as proxy:
        status, document, headers = await proxy.embed({"input": texts})

    assert status == 200
    assert headers["Transfer-Encoding"] == "chunked"
    assert (floats(document) == right(texts, 1536)).all()


async def test_models_are_listed_with_their_widths(proxy: Running) -> None:
    """GET /v1/models lists them, GET /v1/models/m shows one, with and without the prefix."""
    listed = (await proxy.get("/v1/models"))[1]
    one = (await proxy.get("/v1/models/m"))[1]

    assert listed == {"object": "list", "data": [one]} == (await proxy.get("/models"))[1]
    assert (
        one
        == {
            "id": "m",
            "object": "model",
            "created": 0,
            "owned_by": "fake",
            "aliases": [],
            "dimensions": [4, 8],
        }
        == (await proxy.get("/models/m"))[1]
    )


async def test_unprefixed_route_serves_too(proxy: Running) -> None:
    """POST /embeddings is POST /v1/embeddings."""
    async with proxy.tcp.post("/embeddings", json={"input": "t"}) as answer:
        document = await answer.json()

    assert (floats(document) == right(["t"])).all()


async def test_trace_context_travels_to_the_upstream(proxy: Running, upstream: FakeUpstream) -> None:
    """A valid traceparent goes along, an invalid one does not; each call has a request id of its own."""
    valid = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await proxy.embed({"input": "a"}, headers={"traceparent": valid, "X-Request-Id": "same"})
    await proxy.embed({"input": "b"}, headers={"traceparent": valid.replace("0af7", "0AF7"), "X-Request-Id": "same"})

    first, second = (CIMultiDict(seen.headers) for seen in upstream.seen)
    assert first["traceparent"] == valid
    assert "traceparent" not in second
    assert first["X-Request-Id"] != second["X-Request-Id"]


async def test_embedded_model_answers_without_any_settings(tmp_path: Path) -> None:
    """With an empty file the embedded model serves unit vectors of 256, 128 and 64 numbers."""
    async with running(tmp_path, "") as proxy:
        answers = [await proxy.embed({"input": ["hello", "world"], "dimensions": d}) for d in (64, 128, 256)]

    for (status, document, _), width in zip(answers, (64, 128, 256), strict=True):
        assert status == 200
        assert floats(document).shape == (2, width)
        assert numpy.allclose(numpy.linalg.norm(floats(document), axis=1), 1, atol=1e-6)


async def test_redirect_of_the_upstream_is_not_followed(proxy: Running, upstream: FakeUpstream) -> None:
    """A redirect would carry the key and the texts to whoever it names."""
    upstream.always = Fault(status=307, headers={"Location": upstream.base_url + "/elsewhere"}, body={})

    status, document, _ = await proxy.embed({"input": "t"})

    assert (status, document["error"]["code"]) == (502, "upstream_failed")
    assert {seen.path for seen in upstream.seen} == {"/v1/embeddings"}


async def test_openapi_document_is_served(proxy: Running) -> None:
    """The API is published where it is served."""
    status, document = await proxy.get("/openapi.json")

    assert status == 200
    assert set(document["paths"]) >= {"/v1/embeddings", "/v1/models", "/livez", "/readyz", "/metrics", "/status"}


async def test_metrics_count_what_happened(proxy: Running) -> None:
    """Requests, inputs, cache, batches and attempts are there after one request, and parse."""
    from prometheus_client.parser import text_string_to_metric_families

    await proxy.embed({"input": ["a", "b"]})
    await proxy.embed({"input": ["a"]})
    _, text = await proxy.get("/metrics")
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def value(name: str, **labels: str) -> float:
        return samples[f"embedding_sidecar_{name}", tuple(sorted(labels.items()))]

    assert value("cache_inputs_total", model="m", result="hit") == 1
    assert value("cache_inputs_total", model="m", result="miss") == 2
    assert value("batch_inputs_sum", model="m", upstream="fake") == 2
    assert value("tokens_total", upstream="fake") == sum(map(len, CANARIES)) + 2
    assert value("inputs_total", model="m", priority="bulk") == 2
    assert value("requests_total", path="/v1/embeddings", listener="tcp", status="200", code="") == 2
    assert value("ready") == 1


async def test_every_session_of_the_pool_is_reused(proxy: Running, upstream: FakeUpstream) -> None:
    """A hundred calls one after the other take one connection upstream."""
    for n in range(100):
        await proxy.embed({"input": f"t{n}"})

    assert len(upstream.connections) <= 2  # the canary's and the calls'


async def test_pipelined_requests_are_answered_in_order(proxy: Running) -> None:
    """Two requests written at once on one connection get two answers, in order."""
    reader, writer = await asyncio.open_connection(*proxy.address.split(":"))
    for text in ("a", "b"):
        body = f'{{"input": "{text}", "encoding_format": "base64"}}'.encode()
        writer.write(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
    found = b""
    async with asyncio.timeout(5):
        while found.count(b'"usage"') < 2:
            found += await reader.read(65536)
    writer.close()

    first, second = (base64.b64encode(vector(text, 8).tobytes()) for text in ("a", "b"))
    assert 0 < found.index(first) < found.index(second)


async def test_large_body_is_invited(proxy: Running) -> None:
    """A client that waits for 100-continue (curl, with a larger body) is asked to go on."""
    async with proxy.tcp.post("/v1/embeddings", json={"input": "t"}, expect100=True) as answer:
        status = answer.status

    assert status == 200


async def test_compressed_body_is_refused(proxy: Running) -> None:
    """A small body that unpacks to gigabytes would hold up everybody; no client of embeddings compresses."""
    async with proxy.tcp.post("/v1/embeddings", json={"input": "t"}, compress="deflate") as answer:
        document = await answer.json()

    assert (answer.status, document["error"]["code"]) == (415, "unsupported_media_type")
    assert "'deflate'" in document["error"]["message"]
