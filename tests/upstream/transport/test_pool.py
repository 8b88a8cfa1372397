"""Connections and exchanges, against a server that is played byte by byte."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator

import aiohttp
import pytest

from proxy.base.settings import TransportSettings
from proxy.upstream.translate import HttpCall
from proxy.upstream.transport.pool import Pool, TooLong

HEADERS = {"Content-Type": "application/json", "X-Team": "a"}
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Server:
    """Reads requests, and answers each with the next piece of its script."""

    def __init__(self) -> None:
        self.script: list[bytes] = []
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self.connections = 0

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
                self.heads.append(head)
                self.bodies.append(await reader.readexactly(length))
                writer.write(self.script.pop(0) if self.script else OK)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


class Play:
    """A server and a pool to it."""

    def __init__(self, server: Server, **settings: str) -> None:
        self.server = server
        self.pool = Pool(TransportSettings(**settings), slots=2, keepalive_s=30.0, tls=True)
        self.url = f"http://127.0.0.1:{server.port}/v1/embeddings?api-version=1"
        self.headers = HEADERS

    async def sends(self, body: bytes = b"{}", traceparent: str | None = None) -> tuple[int, bytes]:
        """Send a call; returns status and body."""
        call = HttpCall(self.url, self.headers, body, traceparent)
        async with asyncio.timeout(10):
            line = await self.pool.connect(call)
            status, _, answer = await line.exchange(call, f"id-{len(self.server.heads)}", max_bytes=1000)
        return status, answer


@pytest.fixture
async def play() -> AsyncIterator[Play]:
    async with Server() as server:
        play = Play(server)
        yield play
        await play.pool.aclose()


async def test_what_goes_over_the_wire(play: Play) -> None:
    """Target with its query, host, the settings' headers, what aiohttp can decompress, our id, and the length."""
    await play.sends(b'{"a":1}')
    line, *fields = play.server.heads[0].removesuffix("\r\n\r\n").split("\r\n")
    headers = dict(field.split(": ", 1) for field in fields)

    assert line == "POST /v1/embeddings?api-version=1 HTTP/1.1"
    assert headers["Host"] == f"127.0.0.1:{play.server.port}"
    assert (headers["Content-Type"], headers["X-Team"]) == ("application/json", "a")
    assert (headers["X-Request-Id"], headers["Content-Length"]) == ("id-0", "7")
    assert "gzip" in headers["Accept-Encoding"]
    assert len(headers) == len(fields)
    assert play.server.bodies == [b'{"a":1}']


async def test_headers_that_each_call_has_of_its_own(play: Play) -> None:
    """Settings cannot send a second request id, trace or length beside ours."""
    play.headers = {**HEADERS, "x-request-id": "theirs", "Traceparent": "theirs", "content-length": "1"}
    await play.sends(traceparent="00-ab-cd-01")
    await play.sends()
    first, second = play.server.heads

    assert first.lower().count("x-request-id: ") == first.lower().count("content-length: ") == 1
    assert "traceparent: 00-ab-cd-01\r\n" in first
    assert "traceparent" not in second.lower()
    assert "theirs" not in first + second


async def test_header_with_a_line_of_its_own(play: Play) -> None:
    """A value that would end its line is refused before anything is sent."""
    play.headers = {**HEADERS, "X-Team": "a\r\nX-Evil: b"}

    with pytest.raises(ValueError, match="control character"):
        await play.sends()
    assert play.server.heads == []


async def test_other_headers(play: Play) -> None:
    """Another dialect's headers, as after a reload, are spelled anew; the connection stays."""
    await play.sends()
    play.headers = {"X-Team": "b"}
    await play.sends()

    assert "X-Team: a\r\n" in play.server.heads[0]
    assert "X-Team: b\r\n" in play.server.heads[1]
    assert play.server.connections == 1


async def test_answer_behind_a_hundred(play: Play) -> None:
    """What comes before the answer, 100 and 103, is passed over."""
    early = b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n"
    play.server.script = [b"HTTP/1.1 100 Continue\r\n\r\n" + early + OK]

    assert await play.sends() == (200, b"{}")
    assert await play.sends() == (200, b"{}")
    assert play.server.connections == 1


@pytest.mark.parametrize(
    ("answer", "body", "connections"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", 1),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n[1]\r\n0\r\n\r\n", b"[1]", 1),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}", b"{}", 2),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}", b"{}", 2),
        (OK + OK, b"{}", 2),
    ],
    ids=["without a body", "in chunks", "the last one", "of HTTP/1.0", "with another one behind it"],
)
async def test_connection_behind_an_answer(play: Play, answer: bytes, body: bytes, connections: int) -> None:
    """It is used again where the answer allows that, and never where anything is left on it."""
    play.server.script = [answer]

    assert (await play.sends())[1] == body
    assert (await play.sends())[1] == b"{}"
    assert play.server.connections == connections


async def test_answer_over_its_bound(play: Play) -> None:
    """It is not read to its end, and its connection is not used again."""
    play.server.script = [b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001]

    with pytest.raises(TooLong):
        await play.sends()
    await play.sends()
    assert play.server.connections == 2


async def test_answer_before_the_call_was_read(play: Play) -> None:
    """A server may refuse while the body is still on its way: what is left of that precedes no other call."""
    opened = 0

    async def refuses(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await gone.wait()
        writer.close()

    gone = asyncio.Event()
    server = await asyncio.start_server(refuses, "127.0.0.1", 0, limit=1024)
    play.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    statuses = [(await play.sends(b"x" * 20_000_000))[0] for _ in range(2)]
    gone.set()
    server.close()
    await server.wait_closed()

    assert statuses == [413, 413]
    assert opened == 2


async def test_call_that_is_given_up(play: Play) -> None:
    """A caller who leaves in the middle leaves no connection behind that would answer the next one."""
    play.server.script = [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"]
    task = asyncio.create_task(play.sends())
    while not play.server.heads:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})

    assert await play.sends() == (200, b"{}")
    assert play.server.connections == 2


async def test_proxy_with_a_password() -> None:
    """A proxy is sent the whole address, and the name and password that the setting has; the upstream's host stays."""
    async with Server() as server:
        play = Play(server, http_proxy=f"http://me:s3cret@127.0.0.1:{server.port}")
        play.url = "http://upstream.invalid/v1/embeddings"
        await play.sends()
        await play.sends()
        await play.pool.aclose()
    credentials = base64.b64encode(b"me:s3cret").decode()

    for head in server.heads:
        assert head.startswith("POST http://upstream.invalid/v1/embeddings HTTP/1.1\r\nHost: upstream.invalid\r\n")
        assert head.count(f"Proxy-Authorization: Basic {credentials}\r\n") == 1
    assert server.connections == 1


async def test_fresh_and_reused(play: Play) -> None:
    """The first call opens its connection; the second one takes it over, and that is told."""
    call = HttpCall(play.url, play.headers, b"{}")
    fresh = []
    for _ in range(2):
        line = await play.pool.connect(call)
        fresh.append(line.is_fresh)
        await line.exchange(call, "id", max_bytes=10)

    assert fresh == [True, False]


async def test_nobody_there(play: Play) -> None:
    """Where nobody listens there is no connection, fresh or not."""
    play.url = "http://127.0.0.1:1/"

    with pytest.raises(aiohttp.ClientConnectorError):
        await play.sends()
