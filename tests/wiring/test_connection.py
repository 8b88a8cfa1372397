"""Both ways through a connection give the same bytes and tell the same facts; the short one only costs less."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
import uvloop

from proxy.base.clock import Clock, MonotonicClock
from proxy.base.errors import Overloaded, UpstreamRefused
from proxy.base.events import RequestFinished
from proxy.base.messages import Request, Response
from proxy.base.settings import CallerSettings, Catalogue, ListenSettings, ModelSettings, RequestSettings
from proxy.edge.accept import Accept, Page
from proxy.wiring.connection import HAS_SHORT_WAY, Connection
from proxy.wiring.server import Server, close_listeners, open_listeners
from tests.fakes.clock import HandClock, settle
from tests.fakes.loop import LoopClock, leap

ROW = b"\0\0\x80?\0\0\0\0"
KEY_SHA256 = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"  # of "key"


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on asyncio's loop and on uvloop, where the proxy runs: their sockets write at other moments."""

    @pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
    @functools.wraps(test)
    def on_a_loop(run: Callable[[Coroutine[Any, Any, None]], None], **fixtures: Any) -> None:
        run(test(**fixtures))

    own = inspect.signature(test)
    parameters = [inspect.Parameter("run", inspect.Parameter.KEYWORD_ONLY), *own.parameters.values()]
    parameters.sort(key=lambda parameter: parameter.kind)
    on_a_loop.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return on_a_loop


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: a socket's path is bounded, and pytest's folders have long ones."""
    with tempfile.TemporaryDirectory(prefix="es-") as name:
        yield Path(name)


class Service:
    """In place of the pipeline: texts that begin with `known` are, others wait until the test lets them go."""

    def __init__(self, listen: ListenSettings) -> None:
        model = ModelSettings(upstreams=("u",), dimensions=2, max_input_bytes=100)
        self.catalogue = Catalogue({"m": model, "cut": dataclasses.replace(model, long_input="truncate")}, "m")
        self.listen = listen
        self.request = RequestSettings()
        self.callers: dict[str, CallerSettings] = {}
        self.row = ROW
        self.release = asyncio.Event()
        self.release.set()
        self.asked: list[str] = []
        self.cancelled = 0
        self.error: Exception | None = None

    def known(self, request: Request) -> Response | None:
        if not all(str(text).startswith("known") for text in request.inputs):
            return None
        return Response((self.row,) * len(request.inputs), tokens=0, hits=len(request.inputs))

    async def __call__(self, request: Request) -> Response:
        self.asked.append(str(request.inputs[0]))
        if (response := self.known(request)) is not None:  # what comes the long way does not ask before
            return response
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return Response((self.row,) * len(request.inputs), tokens=3, upstream="u", queue_s=0.001, attempts=1)


class House:
    """A server with real sockets and a service that knows what the test says."""

    def __init__(self, folder: Path, clock: Clock, **listen: Any) -> None:
        self.settings = ListenSettings(socket=str(folder / "s"), tcp="127.0.0.1:0", **listen)
        self.service = Service(self.settings)
        self.facts: list[Any] = []
        pages: dict[str, Callable[[], Awaitable[Page]]] = {"/page": self._page}
        self.accept = Accept(
            service=lambda: self.service,
            pages=pages,
            open_pages=frozenset(pages),
            clock=clock,
            observe=self.facts.append,
        )
        self.listeners = open_listeners(self.settings, {}, has_keys=False)
        self.server = Server(self.accept, self.listeners, self.settings, clock)
        self.port = self.listeners[1].sock.getsockname()[1]
        self.callers: list[Caller] = []

    async def _page(self) -> Page:
        return Page(200, "text/plain", b"page")

    @property
    def long_ways(self) -> int:
        """How many requests aiohttp's handler has seen."""
        return sum(server.requests_count for server in self.server._servers)

    async def caller(self, *, is_tcp: bool = False, buffer_bytes: int = 0) -> Caller:
        sock = socket.socket(socket.AF_INET if is_tcp else socket.AF_UNIX)
        if buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        sock.connect(("127.0.0.1", self.port) if is_tcp else self.settings.socket)
        sock.setblocking(False)
        before = self.server.connections
        self.callers.append(Caller(*await asyncio.open_connection(sock=sock, limit=2**24)))
        await until(lambda: self.server.connections == before + 1)
        await settle()
        return self.callers[-1]

    def statuses(self) -> list[tuple[int, str]]:
        return [(fact.status, fact.code) for fact in self.facts if isinstance(fact, RequestFinished)]


class Caller:
    """A connection on which a test speaks HTTP by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    async def answer(self) -> bytes:
        """Return the next answer, head and body as they came; empty when the connection was closed instead."""
        async with asyncio.timeout(5):
            try:
                head = await self._reader.readuntil(b"\r\n\r\n")
                if found := re.search(rb"content-length: (\d+)", head, re.IGNORECASE):
                    return head + await self._reader.readexactly(int(found[1]))
                if b"chunked" in head.lower():
                    return head + await self._reader.readuntil(b"0\r\n\r\n")
                return head
            except (asyncio.IncompleteReadError, ConnectionResetError):
                return b""

    async def ask(self, data: bytes) -> bytes:
        self.write(data)
        return await self.answer()

    async def end(self) -> bytes:
        """Wait until the other side has closed; returns what came before."""
        async with asyncio.timeout(5):
            try:
                return await self._reader.read()
            except ConnectionResetError:
                return b""

    def pause(self) -> None:
        """Read no more."""
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


@contextlib.asynccontextmanager
async def house(folder: Path, clock: Clock | None = None, **listen: Any) -> AsyncIterator[House]:
    clock = clock or MonotonicClock()
    it = House(folder, clock, **listen)
    await it.server.start()
    try:
        yield it
    finally:
        it.service.release.set()
        for caller in it.callers:
            await caller.close()
        drain = asyncio.create_task(it.server.drain(timeout_s=0, linger_s=0))
        if isinstance(clock, HandClock):
            await clock.advance(1)
        await drain
        close_listeners(it.listeners)
        assert it.accept.requests_inside == 0


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_so():
            await asyncio.sleep(0.001)


def post(text: Any = "known", *, headers: Mapping[str, str] | None = None, version: str = "1.1", **more: Any) -> bytes:
    """Spell a plain POST of embeddings."""
    body = text if isinstance(text, bytes) else orjson.dumps({"input": text, **more})
    fields = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= headers or {}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"POST /v1/embeddings HTTP/{version}\r\n{lines}\r\n".encode() + body


GET = b"GET /page HTTP/1.1\r\nHost: localhost\r\n\r\n"


def status(answer: bytes) -> int:
    return int(answer.split()[1]) if answer else 0


def test_aiohttp_is_built_as_expected() -> None:
    """The short way leans on parts of aiohttp that have no name outside; this version has them."""
    assert HAS_SHORT_WAY


# --- the same both ways ---


ID = {"X-Request-Id": "mine"}
TRACE = f"00-{'1' * 32}-{'2' * 16}-01"
SAME: dict[str, tuple[bytes, int]] = {
    "hit": (post(headers=ID, encoding_format="base64"), 200),
    "hit as floats": (post(headers=ID), 200),
    "hit under the other name": (post(headers=ID).replace(b"/v1/", b"/"), 200),
    "miss": (post("new", headers=ID), 200),
    "many": (post(["known"] * 50, headers=ID), 200),
    "many new ones": (post(["new"] * 50, headers=ID, encoding_format="base64"), 200),
    "caller that says who it is": (post(headers=ID | {"X-Embedding-Client": "me", "traceparent": TRACE}), 200),
    "type with a charset": (post(headers=ID | {"Content-Type": "application/json; charset=utf-8"}), 200),
    "text that is cut": (post("known" * 30, headers=ID, model="cut"), 200),
    "no JSON": (post(b"{", headers=ID), 400),
    "nothing": (post(b"null", headers=ID), 400),
    "empty text": (post("", headers=ID), 400),
    "text too long": (post("known" * 30, headers=ID), 400),
    "client that is none": (post(headers=ID | {"X-Embedding-Client": "two words"}), 400),
    "patience that makes no sense": (post(b"{", headers=ID | {"X-Request-Timeout-Ms": "soon"}), 400),
    "strange host": (post(b"{", headers=ID | {"Host": "evil.example"}), 403),
    "model that nobody has": (post(headers=ID, model="other"), 404),
    "too large": (post("known" + "x" * 2000, headers=ID), 413),
    "form": (post(headers=ID | {"Content-Type": "text/plain"}), 415),
    "no type": (post(headers=ID | {"Content-Type": ""}), 415),
    "compressed": (post(headers=ID | {"Content-Encoding": "gzip"}), 415),
}


async def both_ways(it: House, request: bytes, *, is_tcp: bool = True) -> tuple[bytes, Any]:
    """Ask once the short way and twice the long way; returns answer and fact, which have to be the same."""
    caller = await it.caller(is_tcp=is_tcp)
    answers = [await caller.ask(request)]
    await until(lambda: len(it.facts) == 1)
    ways = [it.long_ways]
    caller.write(request * 2)  # two in one packet are no plain case
    answers += [await caller.answer(), await caller.answer()]
    await until(lambda: len(it.facts) == 3)
    ways.append(it.long_ways)
    same = [re.sub(rb"(?m)^Date: .*\r\n", b"", answer) for answer in answers]
    facts = [dataclasses.asdict(fact) for fact in it.facts]

    assert ways == [0, 2]
    assert same == [same[0]] * 3
    assert facts == [facts[0]] * 3
    return answers[0], it.facts[0]


@pytest.mark.parametrize(("request_", "expected"), SAME.values(), ids=SAME)
@pytest.mark.parametrize("is_tcp", [True, False], ids=["tcp", "unix"])
@on_both_loops
async def test_answers_of_both_ways(request_: bytes, expected: int, folder: Path, *, is_tcp: bool) -> None:
    """Both ways give the same bytes, but for the date, and tell the same fact."""
    async with house(folder, HandClock(), max_body_bytes=1500) as it:
        answer, fact = await both_ways(it, request_, is_tcp=is_tcp)

    if b"evil" in request_ and not is_tcp:
        expected = 400  # the Unix socket asks for no host, and the body is none
    assert (status(answer), fact.status) == (expected, expected)
    assert b"\r\nX-Request-Id: mine\r\n" in answer


@pytest.mark.parametrize("text", ["known", "new"])
@on_both_loops
async def test_large_answers_of_both_ways(text: str, folder: Path) -> None:
    """An answer of several pieces goes out in chunks."""
    async with house(folder, HandClock()) as it:
        it.service.row = ROW * 30_000
        answer, fact = await both_ways(it, post([text] * 4, headers=ID))

    assert b"\r\nTransfer-Encoding: chunked\r\n" in answer
    assert answer.endswith(b"\r\n0\r\n\r\n")
    assert len(answer) > fact.answer_bytes > 900_000


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Overloaded("full", retry_after_s=2.0), (503, "overloaded")),
        (UpstreamRefused("no", status=418, code="teapot"), (418, "upstream_refused")),
        (UpstreamRefused("no", status=599), (599, "upstream_refused")),
        (ValueError("a marked text"), (500, "internal_error")),
        (ConnectionResetError("a marked text"), (500, "internal_error")),
    ],
    ids=["overloaded", "refused", "status without a name", "defect", "defect that looks like a caller's"],
)
@on_both_loops
async def test_errors_of_both_ways(error: Exception, expected: tuple[int, str], folder: Path) -> None:
    """What goes wrong behind the edge is spelled the same."""
    async with house(folder, HandClock()) as it:
        it.service.error = error
        answer, fact = await both_ways(it, post("new", headers=ID))

    assert (status(answer), fact.status, fact.code) == (expected[0], *expected)
    assert b"marked" not in answer


@pytest.mark.parametrize("key", ["Bearer key", "bearer key", "Bearer other", ""])
@on_both_loops
async def test_client_keys_of_both_ways(key: str, folder: Path) -> None:
    """Client keys are asked for on both ways."""
    async with house(folder, HandClock()) as it:
        it.service.callers = {"app": CallerSettings(key_sha256=KEY_SHA256)}
        answer, fact = await both_ways(it, post(headers=ID | {"Authorization": key}))

    expected = (200, "app") if key.lower() == "bearer key" else (401, "")
    assert (status(answer), fact.caller) == expected


@on_both_loops
async def test_request_id_that_is_none(folder: Path) -> None:
    """An id that would break a header is replaced, on the short way too."""
    async with house(folder) as it:
        caller = await it.caller()
        answers = [await caller.ask(post(headers={"X-Request-Id": value})) for value in ("two words", "é", "x" * 129)]
        ways = it.long_ways

    ids = {re.search(rb"X-Request-Id: (.*)\r\n", answer)[1] for answer in answers}  # type: ignore[index]
    assert ways == 0
    assert len(ids) == 3
    assert all(re.fullmatch(rb"[0-9a-f]{10}-\d+", name) for name in ids)


# --- the short way ---


class Wire(asyncio.Transport):
    """A transport that takes everything, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def take(self) -> bytes:
        """Return what has been written since the last time."""
        taken, self.written = self.written, b""
        return taken

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def wired(it: House) -> tuple[Connection, Wire]:
    """Return a connection whose other end is in the test's hands."""
    connection, wire = it.server._servers[0](), Wire()
    it.server.connections += 1
    connection.connection_made(wire)
    await settle()  # aiohttp's handler begins to sleep
    assert isinstance(connection, Connection)
    return connection, wire


async def test_hit_is_answered_before_the_loop_turns(folder: Path) -> None:
    """A hit needs no task: its answer is written, and its fact told, when the bytes have been taken."""
    async with house(folder) as it:
        connection, wire = await wired(it)
        tasks = asyncio.all_tasks()
        answers = []
        for _ in range(3):
            connection.data_received(post())
            answers.append(wire.take())
        facts, more = it.statuses(), asyncio.all_tasks() - tasks
        connection.connection_lost(None)

    assert [status(answer) for answer in answers] == [200] * 3
    assert all(answer.endswith(b"}}") for answer in answers)
    assert facts == [(200, "")] * 3
    assert more == set()


async def test_refusal_is_answered_before_the_loop_turns(folder: Path) -> None:
    """Neither does what is wrong."""
    async with house(folder) as it:
        connection, wire = await wired(it)
        connection.data_received(post(b"{"))
        written = wire.written
        connection.connection_lost(None)

    assert status(written) == 400


async def test_miss_takes_one_task(folder: Path) -> None:
    """Who has to wait gets a task, and nothing else of aiohttp's."""
    async with house(folder) as it:
        it.service.release.clear()
        connection, wire = await wired(it)
        tasks = asyncio.all_tasks()
        connection.data_received(post("new"))
        during = len(asyncio.all_tasks() - tasks)
        await settle()
        inside, before = it.accept.requests_inside, wire.written
        it.service.release.set()
        await settle()
        after = asyncio.all_tasks() - tasks
        ways = it.long_ways
        connection.connection_lost(None)

    assert (during, inside, before, ways) == (1, 1, b"", 0)
    assert status(wire.written) == 200
    assert after == set()


@pytest.mark.parametrize("text", ["known", "new"])
def test_request_cut_at_every_byte(text: str, folder: Path) -> None:
    """However a request is cut into two packets, it is answered once, the short way, and the connection goes on."""
    data = post(text)

    async def play() -> None:
        async with house(folder, LoopClock()) as it:
            connection, wire = await wired(it)
            answers = []
            for at in range(1, len(data)):
                connection.data_received(data[:at])
                await asyncio.sleep(0.04)
                connection.data_received(data[at:])
                await settle()
                answers.append(wire.take())
            ways = it.long_ways
            connection.connection_lost(None)

        assert [status(answer) for answer in answers] == [200] * (len(data) - 1)
        assert it.statuses() == [(200, "")] * len(answers)
        assert ways == 0

    leap(play())


async def test_request_that_comes_byte_by_byte(folder: Path) -> None:
    """One byte at a time is the same request."""
    async with house(folder) as it:
        connection, wire = await wired(it)
        for byte in post():
            connection.data_received(bytes([byte]))
        ways = it.long_ways
        connection.connection_lost(None)

    assert status(wire.written) == 200
    assert ways == 0


@on_both_loops
async def test_two_requests_in_one_packet(folder: Path) -> None:
    """They are answered in their order, and the next one goes the short way again."""
    async with house(folder) as it:
        caller = await it.caller()
        caller.write(post("new") + post("known"))
        first, second = await caller.answer(), await caller.answer()
        await settle()
        third = await caller.ask(post())
        ways = it.long_ways

    assert [b"X-Embedding-Cache: miss" in first, b"X-Embedding-Cache: hit" in second] == [True, True]
    assert status(third) == 200
    assert ways == 2


@pytest.mark.parametrize("is_slow", [True, False], ids=["while one waits", "at once"])
@on_both_loops
async def test_pipeline(folder: Path, *, is_slow: bool) -> None:
    """What arrives while a request is being answered is answered after it, whichever way, in its order."""
    async with house(folder) as it:
        caller = await it.caller()
        it.service.release.clear()
        caller.write(post("new"))
        if is_slow:
            await until(lambda: it.service.asked == ["new"])
        caller.write(GET + post("known"))
        caller.write(post("new too"))
        await asyncio.sleep(0.01)
        early = it.statuses()
        it.service.release.set()
        answers = [await caller.answer() for _ in range(4)]
        last = await caller.ask(post())

    kinds = [re.search(rb"Cache: (\w+)|page", answer)[0] for answer in answers]  # type: ignore[index]
    assert early == []
    assert kinds == [b"Cache: miss", b"page", b"Cache: hit", b"Cache: miss"]
    assert status(last) == 200
    assert [fact.path for fact in it.facts] == ["/v1/embeddings", "/page"] + ["/v1/embeddings"] * 3


@on_both_loops
async def test_long_pipeline(folder: Path) -> None:
    """More requests than aiohttp queues are read on when there is room again, and none is lost."""
    async with house(folder) as it:
        caller = await it.caller()
        it.service.release.clear()
        caller.write(post("new"))
        await until(lambda: it.service.asked == ["new"])
        caller.write(post("known") * 100)
        await asyncio.sleep(0.01)
        it.service.release.set()
        answers = [await caller.answer() for _ in range(101)]

    assert [status(answer) for answer in answers] == [200] * 101
    assert b"Cache: miss" in answers[0]
    assert sum(b"Cache: hit" in answer for answer in answers) == 100


@on_both_loops
async def test_noise_behind_a_request(folder: Path) -> None:
    """What is no HTTP behind a good request does not spoil its answer, and ends the connection."""
    async with house(folder) as it:
        for text in ("known", "new"):
            caller = await it.caller()
            it.service.release.clear()
            caller.write(post(text))
            await until(lambda text=text: len(it.facts if text == "known" else it.service.asked) == 1)  # type: ignore[misc]
            caller.write(b"my secret diary\r\n\r\n")
            await asyncio.sleep(0.01)
            it.service.release.set()
            answers = [await caller.answer(), await caller.answer(), await caller.end()]

            assert [status(answers[0]), status(answers[1]), answers[2]] == [200, 400, b""]
            assert b"diary" not in answers[1]
        caller = await it.caller()
        same_packet = [await caller.ask(post() + b"my secret diary\r\n\r\n"), await caller.end()]

    assert it.statuses() == [(200, ""), (400, "malformed_http")] * 2 + [(400, "malformed_http")]
    assert (status(same_packet[0]), same_packet[1]) == (400, b"")  # aiohttp gives up what came with it


# --- what is not plain ---


BODY = orjson.dumps({"input": "known"})
UNUSUAL: dict[str, tuple[bytes, str]] = {
    "HTTP/1.0": (post(version="1.0"), "closed"),
    "HTTP/1.0 that stays": (post(version="1.0", headers={"Connection": "keep-alive"}), "kept"),
    "close": (post(headers={"Connection": "close"}), "closed"),
    "chunks": (
        post(b"", headers={"Content-Length": "", "Transfer-Encoding": "chunked"})
        + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
        "kept",
    ),
    "query": (post().replace(b"embeddings HTTP", b"embeddings?api-version=1 HTTP"), "kept"),
    "whole address": (post().replace(b"POST /v1", b"POST http://localhost/v1"), "kept"),
    "upgrade": (post(headers={"Connection": "Upgrade", "Upgrade": "h2c"}), "kept"),
}


@pytest.mark.parametrize(("request_", "expected"), UNUSUAL.values(), ids=UNUSUAL)
@on_both_loops
async def test_what_is_not_plain(request_: bytes, expected: str, folder: Path) -> None:
    """It goes aiohttp's way and ends as HTTP wants it, also behind plain requests."""
    async with house(folder) as it:
        caller = await it.caller(is_tcp=True)
        before = [await caller.ask(post()), it.long_ways]
        answer = await caller.ask(request_)
        ways = it.long_ways
        after = await caller.end() if expected == "closed" else await caller.ask(post())

    assert [status(before[0]), before[1]] == [200, 0]
    assert status(answer) == 200
    assert ways == 1
    assert (after == b"") == (expected == "closed")
    assert answer.startswith(b"HTTP/1.0" if b"HTTP/1.0" in request_ else b"HTTP/1.1")


@on_both_loops
async def test_body_that_asks_for_permission(folder: Path) -> None:
    """Who waits for 100 Continue gets it, then its answer."""
    head, body = post(headers={"Expect": "100-continue"}).split(b"\r\n\r\n")
    async with house(folder) as it:
        caller = await it.caller()
        permission = await caller.ask(head + b"\r\n\r\n")
        answer = await caller.ask(body)

    assert (permission, status(answer)) == (b"HTTP/1.1 100 Continue\r\n\r\n", 200)


@on_both_loops
async def test_other_methods(folder: Path) -> None:
    """GET, HEAD and what nobody takes are answered as ever."""
    async with house(folder) as it:
        caller = await it.caller()
        page = await caller.ask(GET)
        caller.write(GET.replace(b"GET", b"HEAD") + GET.replace(b"GET /page", b"GET /v1/embeddings"))
        head = await caller._reader.readuntil(b"\r\n\r\n")
        wrong = await caller.answer()
        lost = await caller.ask(post().replace(b"POST /v1/embeddings", b"POST /v1/nowhere"))
        bare = await caller.ask(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        last = await caller.ask(post())

    assert page.endswith(b"page")
    assert b"Content-Length: 4\r\n" in head
    assert [status(answer) for answer in (head, wrong, lost, bare, last)] == [200, 405, 404, 415, 200]


# --- bodies that come later ---


def cut(data: bytes) -> tuple[bytes, bytes]:
    """Cut a request behind its head."""
    head, body = data.split(b"\r\n\r\n", 1)
    return head + b"\r\n\r\n", body


@on_both_loops
async def test_body_in_a_packet_of_its_own(folder: Path) -> None:
    """A request counts as inside from its head on."""
    head, body = cut(post())
    async with house(folder) as it:
        caller = await it.caller()
        caller.write(head)
        await until(lambda: it.accept.requests_inside == 1)
        answer = await caller.ask(body)

    assert status(answer) == 200
    assert it.statuses() == [(200, "")]


def test_body_that_takes_its_time(folder: Path) -> None:
    """One that takes longer is waited for on the long way, and what follows takes the short one again."""
    head, body = cut(post())

    async def play() -> None:
        async with house(folder, LoopClock()) as it:
            connection, wire = await wired(it)
            connection.data_received(head + body[:5])
            ways = []
            for wait_s in (0.049, 0.002, 5.0):
                await asyncio.sleep(wait_s)
                ways.append((it.long_ways, it.accept.requests_inside))
            connection.data_received(body[5:])
            await settle()
            answers = [wire.take()]
            connection.data_received(post())
            answers.append(wire.take())
            ways.append((it.long_ways, it.accept.requests_inside))
            connection.connection_lost(None)

        assert ways == [(0, 1), (1, 1), (1, 1), (1, 0)]
        assert [status(answer) for answer in answers] == [200, 200]
        assert it.statuses() == [(200, "")] * 2

    leap(play())


def test_body_that_never_comes(folder: Path) -> None:
    """It is given up after the settings' time, which is told."""
    head, _ = cut(post())

    async def play() -> None:
        async with house(folder, LoopClock(), body_timeout_s=10.0) as it:
            connection, wire = await wired(it)
            connection.data_received(head)
            await asyncio.sleep(10.0)
            early = wire.take()
            await asyncio.sleep(0.1)
            answer = wire.take()
            await asyncio.sleep(3)
            was_closed = wire.is_closed
            connection.connection_lost(None)

        assert (early, status(answer), was_closed) == (b"", 408, True)
        assert b"Connection: close" in answer
        assert it.statuses() == [(408, "body_timeout")]

    leap(play())


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Content-Length": "2000"}, (413, "request_too_large")),
        ({"Content-Length": "999999999999"}, (413, "request_too_large")),
        ({"Host": "evil.example"}, (403, "host_not_allowed")),
        ({"Content-Type": "text/plain"}, (415, "unsupported_media_type")),
        ({"X-Request-Timeout-Ms": "soon"}, (400, "invalid_header")),
    ],
)
@on_both_loops
async def test_head_that_is_refused(headers: dict[str, str], expected: tuple[int, str], folder: Path) -> None:
    """What a head says wrong is refused before its body is read, at once."""
    head, _ = cut(post(headers=headers))
    async with house(folder, max_body_bytes=1500, body_timeout_s=60) as it:
        caller = await it.caller(is_tcp=True)
        answer = await caller.ask(head)

    assert (status(answer), it.statuses()) == (expected[0], [expected])
    assert b"Connection: close" in answer


@on_both_loops
async def test_caller_that_leaves_behind_its_head(folder: Path) -> None:
    """A caller that leaves before its body is there is told of once, by name and path."""
    head, body = cut(post())
    async with house(folder) as it:
        for packet in (head, head + body[:4]):
            caller = await it.caller()
            caller.write(packet)
            await until(lambda: it.accept.requests_inside == 1)
            await caller.close()
            await until(lambda: it.server.connections == 0)
        facts = [(fact.status, fact.code, fact.path, fact.caller[:4], fact.model) for fact in it.facts]

    assert facts == [(499, "client_left", "/v1/embeddings", "uid:", "")] * 2


# --- callers that leave, or do not read ---


@on_both_loops
async def test_caller_that_leaves_in_the_middle(folder: Path) -> None:
    """A caller that leaves takes its request with it, and is told of once."""
    async with house(folder) as it:
        it.service.release.clear()
        caller = await it.caller()
        caller.write(post("new"))
        await until(lambda: it.service.asked == ["new"])
        await caller.close()
        await until(lambda: it.server.connections == 0 and it.accept.requests_inside == 0)
        cancelled, ways = it.service.cancelled, it.long_ways

    assert (cancelled, ways) == (1, 0)
    assert [(fact.status, fact.code, fact.model) for fact in it.facts] == [(499, "client_left", "m")]


async def test_caller_that_leaves_before_the_loop_turns(folder: Path) -> None:
    """Even one whose task has not begun is told of, once."""
    async with house(folder) as it:
        connection, _ = await wired(it)
        connection.data_received(post("new"))
        connection.connection_lost(None)
        await settle()

    assert it.service.asked == []
    assert it.statuses() == [(499, "client_left")]


@on_both_loops
async def test_caller_that_leaves_with_a_pipeline(folder: Path) -> None:
    """What was queued behind goes with it; nobody is asked for it."""
    async with house(folder) as it:
        it.service.release.clear()
        caller = await it.caller()
        caller.write(post("new"))
        await until(lambda: it.service.asked == ["new"])
        caller.write(post("new too") + GET)
        await caller.close()
        await until(lambda: it.server.connections == 0 and it.accept.requests_inside == 0)

    assert it.service.asked == ["new"]
    assert it.statuses() == [(499, "client_left")]


@pytest.mark.parametrize("text", ["known", "new"])
@pytest.mark.parametrize("inputs", [1, 40], ids=["one piece", "many pieces"])
@on_both_loops
async def test_answer_that_nobody_reads(text: str, inputs: int, folder: Path) -> None:
    """A caller that leaves its answer lying is cut off after the settings' time, and not a moment before."""
    clock = HandClock()
    async with house(folder, clock, write_timeout_s=3.0) as it:
        it.service.row = ROW * 90_000  # more than a socket takes, less than a piece
        caller = await it.caller()
        caller.pause()
        caller.write(post([text] * inputs, encoding_format="base64"))
        await until(lambda: it.accept.requests_inside == 1)
        await asyncio.sleep(0.02)
        await clock.advance(2.9)
        before = it.accept.requests_inside, it.server.connections
        await clock.advance(0.2)
        await until(lambda: it.server.connections == 0)
        await caller.close()

    assert before == (1, 1)
    assert it.statuses() == [(499, "write_timeout")]


@on_both_loops
async def test_answer_that_is_read_slowly(folder: Path) -> None:
    """A caller that reads on gets all of it, and its connection goes on."""
    async with house(folder) as it:
        it.service.row = ROW * 90_000
        caller = await it.caller()
        caller.pause()
        caller.write(post(["known"] * 8, headers=ID, encoding_format="base64"))
        await until(lambda: it.accept.requests_inside == 1)
        caller._writer.transport.resume_reading()  # type: ignore[attr-defined]
        answer = await caller.answer()
        it.service.row = ROW
        last = await caller.ask(post())

    assert len(answer) > 7_000_000
    assert status(last) == 200
    assert it.statuses() == [(200, "")] * 2


@on_both_loops
async def test_caller_that_leaves_while_it_is_written_to(folder: Path) -> None:
    """A caller that leaves in the middle of its answer is one that has left."""
    async with house(folder) as it:
        it.service.row = ROW * 90_000
        caller = await it.caller()
        caller.pause()
        caller.write(post(["known"] * 8, encoding_format="base64"))
        await until(lambda: it.accept.requests_inside == 1)
        caller._writer.transport.abort()
        await until(lambda: it.server.connections == 0 and it.accept.requests_inside == 0)

    assert it.statuses() == [(499, "client_left")]


@pytest.mark.parametrize("copies", [1, 2], ids=["short", "long"])
@on_both_loops
async def test_defect_in_a_later_piece(copies: int, folder: Path) -> None:
    """An answer that cannot be finished breaks off, on both ways: its caller sees the end, and the fact is an error."""
    async with house(folder) as it:
        it.service.row = ROW * 90_000
        caller = await it.caller()
        rows = [it.service.row] * 3 + [None]
        it.service.known = lambda request: Response(tuple(rows), tokens=0, hits=4)  # type: ignore
        caller.write(post("known", encoding_format="base64") * copies)
        rest = await caller.end()
        await until(lambda: len(it.facts) == 1)

    assert rest.startswith(b"HTTP/1.1 200 OK")
    assert not rest.endswith(b"0\r\n\r\n")
    assert it.statuses() == [(500, "internal_error")]


# --- idle connections and the drain ---


def test_idle_connection_after_the_short_way(folder: Path) -> None:
    """Behind requests of the short way an idle connection is closed after the settings' time, from the last answer."""

    async def play() -> None:
        async with house(folder, LoopClock(), keepalive_timeout_s=10.0) as it:
            connection, wire = await wired(it)
            for text in ("known", "new", "known", "new"):
                await asyncio.sleep(9.9)
                connection.data_received(post(text))
                await settle()
            await asyncio.sleep(9.9)
            early = wire.is_closed
            await asyncio.sleep(0.2)
            late = wire.is_closed
            connection.connection_lost(None)

        assert (early, late) == (False, True)
        assert it.statuses() == [(200, "")] * 4

    leap(play())


def test_request_that_outlasts_the_idle_time(folder: Path) -> None:
    """A connection on which somebody waits is not idle, and is so again when nobody does."""

    async def play() -> None:
        async with house(folder, LoopClock(), keepalive_timeout_s=10.0) as it:
            connection, wire = await wired(it)
            it.service.release.clear()
            connection.data_received(post("new"))
            await asyncio.sleep(60)
            it.service.release.set()
            await asyncio.sleep(9.9)
            answer, early = wire.take(), wire.is_closed
            await asyncio.sleep(0.2)
            late = wire.is_closed
            connection.connection_lost(None)

        assert (status(answer), early, late) == (200, False, True)

    leap(play())


def test_head_that_outlasts_the_idle_time(folder: Path) -> None:
    """Nor is one that a body has been promised on."""
    head, body = cut(post())

    async def play() -> None:
        async with house(folder, LoopClock(), keepalive_timeout_s=10.0) as it:
            connection, wire = await wired(it)
            await asyncio.sleep(9.98)
            connection.data_received(head)
            await asyncio.sleep(0.04)
            connection.data_received(body)
            answer, was_closed = wire.take(), wire.is_closed
            connection.connection_lost(None)

        assert (status(answer), was_closed) == (200, False)

    leap(play())


@on_both_loops
async def test_drain_of_an_idle_connection(folder: Path) -> None:
    """What arrives on it during the linger is answered and told to close."""
    clock = HandClock()
    async with house(folder, clock) as it:
        caller, other = await it.caller(), await it.caller()
        before = [await caller.ask(post()), await other.ask(post())]
        drain = asyncio.create_task(it.server.drain(timeout_s=30, linger_s=5))
        await clock.advance(4.9)
        answer, rest = await caller.ask(post()), await caller.end()
        still = it.server.connections
        await clock.advance(0.2)
        await drain
        end = await other.end()

    assert [b"Connection: close" in each for each in (*before, answer)] == [False, False, True]
    assert (status(answer), rest, still, end) == (200, b"", 1, b"")


@on_both_loops
async def test_drain_in_the_middle_of_a_request(folder: Path) -> None:
    """A request inside is finished and told to close, be it that its answer or its body is waited for."""
    clock = HandClock()
    head, body = cut(post())
    async with house(folder, clock) as it:
        it.service.release.clear()
        caller, other = await it.caller(), await it.caller()
        caller.write(post("new"))
        other.write(head)
        await until(lambda: it.accept.requests_inside == 2)
        drain = asyncio.create_task(it.server.drain(timeout_s=30, linger_s=0))
        await clock.advance(1)
        was_done = drain.done()
        second = await other.ask(body)
        it.service.release.set()
        first = await caller.answer()
        ends = [await caller.end(), await other.end()]
        await clock.advance(0.1)
        await drain

    assert not was_done
    assert [status(first), status(second)] == [200, 200]
    assert [b"Connection: close" in answer for answer in (first, second)] == [True, True]
    assert ends == [b"", b""]


@on_both_loops
async def test_request_that_hangs_at_the_drain(folder: Path) -> None:
    """What has not finished at the time-out is cut off."""
    clock = HandClock()
    async with house(folder, clock) as it:
        it.service.release.clear()
        caller = await it.caller()
        caller.write(post("new"))
        await until(lambda: it.service.asked == ["new"])
        drain = asyncio.create_task(it.server.drain(timeout_s=2, linger_s=1))
        await clock.advance(2.1)
        async with asyncio.timeout(5):
            await drain
        rest = await caller.end()
        await until(lambda: it.accept.requests_inside == 0)

    assert rest == b""
    assert it.service.cancelled == 1
    assert it.statuses() == [(499, "client_left")]


@on_both_loops
async def test_answer_that_nobody_reads_at_the_drain(folder: Path) -> None:
    """Nor does an answer that lies there hold the drain longer than its time-out."""
    clock = HandClock()
    async with house(folder, clock, write_timeout_s=30.0) as it:
        it.service.row = ROW * 90_000
        caller = await it.caller()
        caller.pause()
        caller.write(post("known", encoding_format="base64"))
        await until(lambda: it.accept.requests_inside == 1)
        drain = asyncio.create_task(it.server.drain(timeout_s=2, linger_s=1))
        await clock.advance(2.1)
        async with asyncio.timeout(5):
            await drain
        await until(lambda: it.accept.requests_inside == 0)

    assert it.statuses() == [(499, "client_left")]


@on_both_loops
async def test_connections_are_counted(folder: Path) -> None:
    """The bound of connections holds for those of the short way too."""
    async with house(folder, max_connections=2) as it:
        first, second = await it.caller(), await it.caller()
        answers = [await first.ask(post()), await second.ask(post("new"))]
        reader, writer = await asyncio.open_unix_connection(it.settings.socket)
        refused = await reader.read()
        writer.close()
        await first.close()
        await until(lambda: it.server.connections == 1)
        answers.append(await (await it.caller()).ask(post()))

    assert [status(answer) for answer in answers] == [200] * 3
    assert refused == b""
