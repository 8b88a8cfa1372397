"""Whatever a caller sends, it gets a clear error, nothing is lost, and others do not notice."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.running import Running, running
from tests.fakes.upstream import FakeUpstream, Fault, vector

HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


async def still_serves(proxy: Running) -> bool:
    status, document, _ = await proxy.embed({"input": "others are untouched"})
    return status == 200 and len(document["data"]) == 1


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        (b"", 400, "invalid_json", "empty"),
        (b"{", 400, "invalid_json", "not valid JSON"),
        (b'{"input": "\xff"}', 400, "invalid_json", "byte 11"),
        (b"[1]", 400, "invalid_json", "not a JSON object"),
        (b"{}", 400, "missing_input", "'input' is missing"),
        (b'{"input": null}', 400, "missing_input", "'input' is missing"),
        (b'{"input": []}', 400, "empty_input", "empty list"),
        (b'{"input": ""}', 400, "empty_input", "empty string"),
        (b'{"input": ["a", ""]}', 400, "empty_input", "input[1]"),
        (b'{"input": {"a": 1}}', 400, "invalid_input", "an object"),
        (b'{"input": 7}', 400, "invalid_input", "the number 7"),
        (b'{"input": ["a", 1]}', 400, "invalid_input", "mixes"),
        (b'{"input": ["a", null]}', 400, "invalid_input", "input[1]"),
        (b'{"input": [1, 2]}', 400, "token_ids_not_supported", "check_embedding_ctx_length=False"),
        (b'{"input": "a", "model": "nope"}', 404, "model_not_found", "known: m"),
        (b'{"input": "a", "dimensions": 5}', 400, "unsupported_dimensions", "4, 8"),
        (b'{"input": "a", "dimensions": true}', 400, "invalid_dimensions", "true"),
        (b'{"input": "a", "encoding_format": "hex"}', 400, "unsupported_encoding_format", "'hex'"),
        (b'{"input": "a", "user": 1}', 400, "invalid_user", "the number 1"),
        (b'{"input": "a' + b"a" * 100_000 + b'"}', 413, "request_too_large", "100000"),
        (b"[" * 90_000, 400, "invalid_json", "not valid JSON"),
    ],
    ids=lambda value: value[:24].decode("latin1") if isinstance(value, bytes) else "",
)
async def test_malformed_body(proxy: Running, body: bytes, status: int, code: str, says: str) -> None:
    """Each malformed body gets its own code and a message that names the place, the value or the bound."""
    async with proxy.tcp.post("/v1/embeddings", data=body, headers={"Content-Type": "application/json"}) as answer:
        document = await answer.json()

    assert (answer.status, document["error"]["code"]) == (status, code)
    assert says in document["error"]["message"]
    assert document["error"]["type"] == "invalid_request_error"
    assert answer.headers["x-should-retry"] == "false"
    assert await still_serves(proxy)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
async def test_body_that_is_not_declared_as_json(proxy: Running, kind: str) -> None:
    """Forms and plain text are refused: a browser can post them across sites without asking."""
    async with proxy.tcp.post("/v1/embeddings", data=b'{"input": "a"}', headers={"Content-Type": kind}) as answer:
        document = await answer.json()

    assert (answer.status, document["error"]["code"]) == (415, "unsupported_media_type")
    assert "Content-Type: application/json" in document["error"]["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Request-Timeout-Ms", "soon"),
        ("X-Request-Timeout-Ms", "0"),
        ("X-Request-Timeout-Ms", "-1"),
        ("X-Request-Timeout-Ms", "600001"),
        ("X-Request-Timeout-Ms", "1e3"),
        ("X-Embedding-Priority", "urgent"),
        ("X-Embedding-Client", "two words"),
        ("X-Embedding-Client", "x" * 65),
    ],
)
async def test_header_that_makes_no_sense(proxy: Running, name: str, value: str) -> None:
    """The header is named, with its value and what it may be."""
    status, document, _ = await proxy.embed({"input": "a"}, headers={name: value})

    assert (status, document["error"]["code"], document["error"]["param"]) == (400, "invalid_header", name)
    assert name in document["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/embeddings", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/m", 405, "method_not_allowed"),
        ("GET", "/v1/models/nope", 404, "model_not_found"),
        ("POST", "/v1/chat/completions", 404, "unknown_url"),
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/v1/../etc/passwd", 404, "unknown_url"),
    ],
)
async def test_unknown_route_or_method(proxy: Running, method: str, path: str, status: int, code: str) -> None:
    """Errors of routing have OpenAI's shape too."""
    async with proxy.tcp.request(method, path) as answer:
        document = await answer.json()

    assert (answer.status, document["error"]["code"]) == (status, code)


async def raw(proxy: Running, *parts: bytes) -> bytes:
    """Send bytes as they are and read until the proxy closes or has answered."""
    reader, writer = await asyncio.open_connection(*proxy.address.split(":"))
    for part in parts:
        writer.write(part)
        await writer.drain()
    async with asyncio.timeout(10):
        answer = await reader.read(65536)
    writer.close()
    return answer


async def test_chunked_body_over_the_bound(proxy: Running) -> None:
    """The bound counts what arrives, whatever the head says or leaves out."""
    chunk = b"%x\r\n%b\r\n" % (60_000, b"x" * 60_000)

    answer = await raw(proxy, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk)

    assert answer.startswith(b"HTTP/1.1 413")
    assert b"Connection: close" in answer
    assert await still_serves(proxy)


async def test_declared_body_over_the_bound(proxy: Running) -> None:
    """A length over the bound is refused before a byte of it is read."""
    answer = await raw(proxy, HEAD + b"Content-Length: 100001\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 413")
    assert b"100001 bytes, the bound is 100000" in answer


async def test_body_at_the_bound_is_read(proxy: Running) -> None:
    """Exactly the bound is still in."""
    text = b"x" * (100_000 - len(b'{"input":["",""]}') - 60_000)
    body = b'{"input":["%b","%b"]}' % (text, b"y" * 60_000)
    async with proxy.tcp.post("/v1/embeddings", data=body, headers={"Content-Type": "application/json"}) as answer:
        status = answer.status

    assert (len(body), status) == (100_000, 200)


async def test_slow_body(proxy: Running) -> None:
    """A body that does not arrive in time is told so, with how much was there."""
    answer = await raw(proxy, HEAD + b"Content-Length: 50\r\n\r\n" + b'{"input"')

    assert answer.startswith(b"HTTP/1.1 408")
    assert b"8 bytes were there" in answer
    assert await still_serves(proxy)


async def test_malformed_chunks(proxy: Running) -> None:
    """A body that is no HTTP gets a 400 in OpenAI's shape, which quotes none of it."""
    answer = await raw(proxy, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\nnonsense\r\n\r\n")

    assert b" 400 " in answer.splitlines()[0]
    assert b'"code":"malformed_http"' in answer
    assert b"zz" not in answer
    assert await still_serves(proxy)


@pytest.mark.parametrize(
    "noise", [b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01 tls hello\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n"]
)
async def test_noise_instead_of_http(proxy: Running, noise: bytes) -> None:
    """What is no HTTP at all is answered and counted like any other error."""
    answer = await raw(proxy, noise)
    _, metrics = await proxy.get("/metrics")

    assert b'"code":"malformed_http"' in answer
    assert 'code="malformed_http",listener="tcp",path="other",status="400"' in metrics
    assert await still_serves(proxy)


async def test_client_that_leaves_halfway_cancels_its_call(proxy: Running, upstream: FakeUpstream) -> None:
    """P3: a caller that leaves frees the upstream, and is counted as 499, not as a failure of anybody."""
    upstream.always = Fault(hang=True)
    body = b'{"input": "left behind"}'
    _, writer = await asyncio.open_connection(*proxy.address.split(":"))
    writer.write(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    while not upstream.inside:
        await asyncio.sleep(0.01)
    writer.close()
    async with asyncio.timeout(5):
        while upstream.inside or (await proxy.get("/status"))[1]["stages"]["admission"]["inputs"]:
            await asyncio.sleep(0.01)
    upstream.always = Fault()
    _, text = await proxy.get("/metrics")
    state = (await proxy.get("/status"))[1]["stages"]

    assert 'code="client_left",listener="tcp",path="/v1/embeddings",status="499"' in text
    assert state["circuit"]["fake"] == {"state": "closed", "failures": 0, "max_failures": 5, "wait_s": 0.0}
    assert await still_serves(proxy)


async def test_client_that_leaves_in_the_middle_of_its_body(proxy: Running) -> None:
    """A body that breaks off harms nobody."""
    _, writer = await asyncio.open_connection(*proxy.address.split(":"))
    writer.write(HEAD + b"Content-Length: 5000\r\n\r\n{")
    await writer.drain()
    writer.close()

    assert await still_serves(proxy)


async def test_client_that_never_reads_is_cut_off(tmp_path: Path) -> None:
    """An answer that nobody takes is dropped after listen.write_timeout_s, and its memory with it."""
    toml = "[listen]\nwrite_timeout_s = 0.2\n"
    async with FakeUpstream(width=1536) as upstream, running(tmp_path, toml + upstream.toml()) as proxy:
        host, port = proxy.address.split(":")
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
        texts = ",".join(f'"text {n}"' for n in range(1000))
        body = f'{{"input": [{texts}]}}'.encode()
        await asyncio.get_running_loop().sock_sendall(sock, HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        async with asyncio.timeout(20):
            while 'code="write_timeout"' not in (await proxy.get("/metrics"))[1]:
                await asyncio.sleep(0.02)
        serves = await still_serves(proxy)
        sock.close()

    assert serves


async def test_input_too_long_is_rejected_or_cut_as_the_model_says(tmp_path: Path) -> None:
    """Policy per model: reject with size and bound, or truncate and say which input in a header."""
    async with FakeUpstream() as upstream:
        toml = upstream.toml(max_input_bytes=5) + (
            '[models.cut]\nupstreams = ["fake"]\nmax_input_bytes = 5\nlong_input = "truncate"\n'
        )
        async with running(tmp_path, toml) as proxy:
            texts = ["ok", "12345", "123456", "1234é"]
            rejected = await proxy.embed({"input": texts, "model": "m"})
            status, document, headers = await proxy.embed({"input": texts, "model": "cut"})

    assert rejected[0] == 400
    assert rejected[1]["error"] == {
        "message": "'input[2]' has 6 bytes, the bound is 5",
        "type": "invalid_request_error",
        "param": "input",
        "code": "input_too_long",
    }
    assert status == 200
    assert headers["X-Embedding-Truncated"] == "2,3"
    for item, text in zip(document["data"], ["ok", "12345", "12345", "1234"], strict=True):
        assert item["embedding"] == pytest.approx([float(x) for x in vector(text, 8)])


async def test_too_many_inputs(tmp_path: Path) -> None:
    """A list over request.max_inputs is refused with both numbers; one at the bound passes."""
    async with FakeUpstream() as upstream, running(tmp_path, "[request]\nmax_inputs = 3\n" + upstream.toml()) as proxy:
        good, _, _ = await proxy.embed({"input": ["a", "b", "c"]})
        bad, document, _ = await proxy.embed({"input": ["a", "b", "c", "d"]})

    assert (good, bad, document["error"]["code"]) == (200, 400, "too_many_inputs")
    assert document["error"]["message"] == "'input' has 4 items, the bound is 3"


async def test_more_than_admission_allows_is_shed_at_once(tmp_path: Path) -> None:
    """P7: over the bound of inputs inside, a request is refused with 503 and whole seconds to wait."""
    toml = "[request]\nmax_inputs = 2\n[admission]\nmax_inputs = 3\n"
    async with FakeUpstream() as upstream, running(tmp_path, toml + upstream.toml()) as proxy:
        gate = asyncio.Event()
        upstream.always = Fault(wait_for=gate)
        first = asyncio.create_task(proxy.embed({"input": ["a", "b"]}))
        while not upstream.inside:
            await asyncio.sleep(0.01)
        status, document, headers = await proxy.embed({"input": ["c", "d"]})
        gate.set()
        answered, _, _ = await first

    assert (status, document["error"]["code"], headers["Retry-After"]) == (503, "overloaded", "1")
    assert headers["x-should-retry"] == "true"
    assert answered == 200


def key_settings(key_sha256: str) -> str:
    return f'[callers.app]\nkey_sha256 = "{key_sha256}"\n'


async def test_client_keys_guard_tcp_and_the_unix_socket_stays_open(tmp_path: Path) -> None:
    """With keys configured, TCP needs one of them; health does not; the file mode guards the Unix socket."""
    import hashlib

    digest = hashlib.sha256(b"s3cret").hexdigest()
    async with FakeUpstream() as upstream, running(tmp_path, key_settings(digest) + upstream.toml()) as proxy:
        answers: dict[str, Any] = {}
        for name, headers in {
            "none": {},
            "wrong": {"Authorization": "Bearer nope"},
            "bearer": {"Authorization": "Bearer s3cret"},
            "azure": {"api-key": "s3cret"},
        }.items():
            answers[name] = await proxy.embed({"input": "a"}, headers=headers)
        unix = await proxy.embed({"input": "a"}, is_unix=True)
        wrong_unix = await proxy.embed({"input": "a"}, is_unix=True, headers={"Authorization": "Bearer nope"})
        pages = {
            path: (await proxy.get(path))[0] for path in ("/livez", "/readyz", "/openapi.json", "/metrics", "/status")
        }

    assert {name: answer[0] for name, answer in answers.items()} == {
        "none": 401,
        "wrong": 401,
        "bearer": 200,
        "azure": 200,
    }
    assert answers["none"][1]["error"]["code"] == "invalid_api_key"
    assert (unix[0], wrong_unix[0]) == (200, 200)
    assert pages == {"/livez": 200, "/readyz": 200, "/openapi.json": 200, "/metrics": 401, "/status": 401}


async def test_peer_that_is_not_allowed(tmp_path: Path) -> None:
    """listen.allowed_uids shuts out every other user of the Unix socket, by the kernel's word."""
    toml = "[listen]\nallowed_uids = [4242]\n"
    async with FakeUpstream() as upstream, running(tmp_path, toml + upstream.toml()) as proxy:
        status, document, _ = await proxy.embed({"input": "a"}, is_unix=True)

    assert (status, document["error"]["code"]) == (403, "peer_not_allowed")
