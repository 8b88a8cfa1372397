"""
An upstream that speaks OpenAI's /v1/embeddings and costs next to nothing: `python -m tests.load.mock`.

A hand-written protocol over uvloop; vectors are looked up and joined as text. Options, settings and counts are named
like those of the Go mock, so that either can stand here. Loopback only, and it ends by itself.

    POST /v1/embeddings     vectors of texts; after base_ms + per_item_ms × texts
    GET /stats              requests, texts, concurrency, refusals, faults, connections
    POST /admin/config      another latency, other limits, other faults
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import random
import re
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import orjson
import uvloop

from tests.load.vectors import Table, key

TIMER_STEP_S = 0.001
"""The loop's timers are a millisecond apart. The last one before an answer is due is spent polling, since a slot that
is held a millisecond too long, or not long enough, is one to three percent of the ideal that is judged."""
LARGEST_HEAD_BYTES = 65_536
FAULT_SEED = 42
"""Which calls fail is the same in each run that asks in the same order."""
NO_LINGER = struct.pack("ii", 1, 0)
"""With it a close is a reset (RST), as of a peer that has crashed, not a polite end."""

WORDS = {
    400: b"400 Bad Request",
    404: b"404 Not Found",
    429: b"429 Too Many Requests",
    500: b"500 Internal Server Error",
    503: b"503 Service Unavailable",
}

_LENGTH = re.compile(rb"content-length:[ \t]*(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Config:
    """How slow and how strict it is; 0 means no limit."""

    base_ms: float = 0.0
    per_item_ms: float = 0.0
    max_concurrent: int = 0
    overflow: str = "queue"
    """`queue` or `429`: what happens above `max_concurrent`."""
    rpm: float = 0.0
    burst_s: float = 1.0
    """The bucket holds what this many seconds allow, at least one request."""
    max_batch: int = 2048
    err500_p: float = 0.0
    """This share of the calls ends with it, after its time; the shares of the faults add up."""
    err503_p: float = 0.0
    err429_p: float = 0.0
    reset_p: float = 0.0
    hang_p: float = 0.0
    """A hanging call holds no slot: it is stuck in the network."""
    hang_max_s: float = 120.0

    @classmethod
    def read(cls, text: str | bytes) -> Config:
        """Read it from JSON; refuses names it does not know, since a limit that is not kept spoils a measurement."""
        given = orjson.loads(text)
        unknown = given.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"this mock has no {', '.join(sorted(unknown))}")
        config = cls(**given)
        if config.overflow not in ("queue", "429"):
            raise ValueError(f"overflow is {config.overflow!r}, not 'queue' or '429'")
        if sum(share for _, share in config.faults) > 1:
            raise ValueError("the shares of the faults are more than 1 together")
        return config

    @property
    def faults(self) -> tuple[tuple[str, float], ...]:
        """The faults that there are, by the name of their count, and their shares."""
        shares = (
            ("E500", self.err500_p),
            ("E503", self.err503_p),
            ("E429", self.err429_p),
            ("Reset", self.reset_p),
            ("Hang", self.hang_p),
        )
        return tuple(share for share in shares if share[1])


@dataclass(slots=True)
class Stats:
    """Counts since the start."""

    Requests: int = 0
    Items: int = 0
    OK: int = 0
    RateLimited: int = 0
    OverflowRejected: int = 0
    BadRequest: int = 0
    Abandoned: int = 0
    E500: int = 0
    E503: int = 0
    E429: int = 0
    Reset: int = 0
    Hang: int = 0
    ExecMax: int = 0
    InflightMax: int = 0
    BatchMax: int = 0
    ConnsNew: int = 0
    ConnsOpen: int = 0
    ConnsPeak: int = 0


class Bucket:
    """Requests per minute, as a bucket that fills evenly."""

    def __init__(self, per_minute: float, burst_s: float) -> None:
        self.rate = per_minute / 60
        self.size = max(1.0, self.rate * burst_s)
        self._level = self.size
        self._then: float | None = None

    def take(self, now: float) -> float:
        """Take one request out; returns 0, or for how many seconds there is none."""
        if self._then is not None:
            self._level = min(self.size, self._level + (now - self._then) * self.rate)
        self._then = now
        if self._level >= 1:
            self._level -= 1
            return 0.0
        return (1 - self._level) / self.rate


@dataclass(slots=True)
class Call:
    """One request on its way."""

    connection: Connection
    keys: list[bytes]
    is_base64: bool
    model: str
    is_abandoned: bool = False
    hang_end: asyncio.TimerHandle | None = None


class Upstream:
    """The rules: limits, slots, latency, faults. Connections hand it bodies, it hands them answers."""

    def __init__(self, table: Table, config: Config) -> None:
        self.stats = Stats()
        self.inflight = 0
        self._table = table
        self._executing = 0
        self._queue: deque[Call] = deque()
        self._random = random.Random(FAULT_SEED)
        self._openings = [b'{"object":"embedding","index":%d,"embedding":' % index for index in range(2048)]
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Be as slow and as strict as this says from now on."""
        self._config = config
        self._faults = config.faults
        self._bucket = Bucket(config.rpm, config.burst_s) if config.rpm else None

    def embed(self, connection: Connection, body: bytes) -> None:
        """Take a request in: it is answered now or later, or refused."""
        self.stats.Requests += 1
        try:
            call = self._read(connection, body)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self.stats.BadRequest += 1
            connection.refuse(400, "invalid_request_error", "invalid_input", f"invalid input: {error}")
            return
        if self._bucket:
            wait_s = self._bucket.take(time.perf_counter())
            if wait_s:
                self.stats.RateLimited += 1
                connection.refuse(429, "requests", "rate_limit_exceeded", "Rate limit reached", wait_s=wait_s)
                return
        self.inflight += 1
        self.stats.InflightMax = max(self.stats.InflightMax, self.inflight)
        if not self._config.max_concurrent or self._executing < self._config.max_concurrent:
            connection.call = call
            self._execute(call)
        elif self._config.overflow == "queue":
            connection.call = call
            self._queue.append(call)
        else:
            self.inflight -= 1
            self.stats.OverflowRejected += 1
            connection.refuse(429, "concurrency", "rate_limit_exceeded", "Too many at a time", wait_s=0.1)

    def _read(self, connection: Connection, body: bytes) -> Call:
        request = orjson.loads(body)
        given = request["input"]
        texts = [given] if isinstance(given, str) else given
        if not 0 < len(texts) <= self._config.max_batch:
            raise ValueError(f"{len(texts)} inputs, the bound is {self._config.max_batch}")
        dimensions = request.get("dimensions", self._table.dimensions)
        if dimensions != self._table.dimensions:
            raise ValueError(f"dimensions is {dimensions}, this mock has {self._table.dimensions}")
        keys = [key(text.encode()) for text in texts]
        return Call(connection, keys, request.get("encoding_format") == "base64", request.get("model", ""))

    def _execute(self, call: Call) -> None:
        self._executing += 1
        self.stats.ExecMax = max(self.stats.ExecMax, self._executing)
        inputs = len(call.keys)
        self.stats.Items += inputs
        self.stats.BatchMax = max(self.stats.BatchMax, inputs)
        latency_s = (self._config.base_ms + self._config.per_item_ms * inputs) / 1e3
        if latency_s <= 0:
            self._finish(call)
        else:
            _at(time.perf_counter() + latency_s, lambda: self._finish(call))

    def _finish(self, call: Call) -> None:
        self._executing -= 1
        fault = self._fault() if self._faults and not call.is_abandoned else ""
        if fault == "Hang":
            self._hang(call)
        else:
            self.inflight -= 1
            if call.is_abandoned:
                self.stats.Abandoned += 1
            elif fault:
                self._fail(call, fault)
            else:
                self.stats.OK += 1
                call.connection.answer(self._answer(call))
        while self._queue and (not self._config.max_concurrent or self._executing < self._config.max_concurrent):
            waiting = self._queue.popleft()
            if waiting.is_abandoned:
                self.inflight -= 1
                self.stats.Abandoned += 1
            else:
                self._execute(waiting)

    def _fault(self) -> str:
        """Draw how this call ends: the name of a fault, or empty."""
        drawn = self._random.random()
        for name, share in self._faults:
            if drawn < share:
                return name
            drawn -= share
        return ""

    def _fail(self, call: Call, fault: str) -> None:
        setattr(self.stats, fault, getattr(self.stats, fault) + 1)
        if fault == "Reset":
            call.connection.reset()
        elif fault == "E500":
            call.connection.refuse(500, "server_error", "internal", "The server had an error")
        elif fault == "E503":
            call.connection.refuse(503, "server_error", "overloaded", "The engine is overloaded", wait_s=1.0)
        else:
            call.connection.refuse(429, "requests", "rate_limit_exceeded", "Rate limit reached", wait_s=1.0)

    def _hang(self, call: Call) -> None:
        self.stats.Hang += 1
        loop = asyncio.get_running_loop()
        call.hang_end = loop.call_later(self._config.hang_max_s, call.connection.reset)

    def leave(self, call: Call) -> None:
        """Hear that the call's caller has gone, or has been cut off."""
        call.is_abandoned = True
        if call.hang_end:
            call.hang_end.cancel()
            self.inflight -= 1

    def _answer(self, call: Call) -> list[bytes]:
        """Return the answer in pieces: joining megabytes would take longer than everything else here."""
        render = self._table.base64 if call.is_base64 else self._table.decimals
        before, after = (b'"', b'"},') if call.is_base64 else (b"[", b"]},")
        pieces = [b'{"object":"list","data":[']
        for opening, text_key in zip(self._openings, call.keys, strict=False):
            pieces += (opening, before, *render(text_key), after)
        pieces[-1] = after[:-1]
        tokens = 16 * len(call.keys)
        pieces.append(
            b'],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (orjson.dumps(call.model), tokens, tokens)
        )
        return pieces


def _at(instant: float, call: Callable[[], None]) -> None:
    """Call at an instant, neither before nor a timer's step later."""
    loop = asyncio.get_running_loop()

    def look() -> None:
        left = instant - time.perf_counter()
        if left <= 0:
            call()
        elif left > 2 * TIMER_STEP_S:
            loop.call_later(left - TIMER_STEP_S, look)
        else:
            loop.call_soon(look)

    look()


# --- the wire ---


class Connection(asyncio.Protocol):
    """One connection: requests one after the other."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._received = bytearray()
        self.call: Call | None = None
        self._is_busy = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        stats = self._upstream.stats
        stats.ConnsNew += 1
        stats.ConnsOpen += 1
        stats.ConnsPeak = max(stats.ConnsPeak, stats.ConnsOpen)

    def connection_lost(self, _: Exception | None) -> None:
        self._upstream.stats.ConnsOpen -= 1
        if self.call:
            self._upstream.leave(self.call)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._is_busy:
            self._next()

    def _next(self) -> None:
        """Take one request from what was received, if a whole one is there."""
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            if len(self._received) > LARGEST_HEAD_BYTES:
                self._transport.abort()
            return
        head = bytes(self._received[:end])
        length = _LENGTH.search(head)
        whole = end + 4 + (int(length[1]) if length else 0)
        if len(self._received) < whole:
            return
        body = bytes(self._received[end + 4 : whole])
        del self._received[:whole]
        self._is_busy = True
        method, path = head.split(b" ", 2)[:2]
        self._route(method, path, body)

    def _route(self, method: bytes, path: bytes, body: bytes) -> None:
        if method == b"POST" and path in (b"/v1/embeddings", b"/embeddings"):
            self._upstream.embed(self, body)
        elif path == b"/stats":
            now = {"Inflight": self._upstream.inflight, "CPUSeconds": time.process_time()}
            self.answer([orjson.dumps({**asdict(self._upstream.stats), **now})])
        elif path == b"/admin/config":
            try:
                self._upstream.configure(Config.read(body))
            except (ValueError, TypeError) as error:
                self.refuse(400, "invalid_request_error", "bad_config", str(error))
            else:
                self.answer([orjson.dumps(asdict(self._upstream.stats))])
        elif path == b"/v1/models":
            self.answer([b'{"object":"list","data":[]}'])
        else:
            self.refuse(404, "invalid_request_error", "not_found", "there is nothing here")

    def answer(self, body: list[bytes], *, status: bytes = b"200 OK", headers: bytes = b"") -> None:
        """Send an answer, given in pieces, and look for the next request."""
        self.call = None
        self._is_busy = False
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n" % (
            status,
            headers,
            sum(map(len, body)),
        )
        self._transport.writelines([head, *body])
        if self._received:
            self._next()

    def reset(self) -> None:
        """Cut the connection off."""
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self._transport.abort()

    def refuse(self, status: int, kind: str, code: str, message: str, *, wait_s: float = 0.0) -> None:
        """Send an error in OpenAI's form."""
        words = WORDS[status]
        headers = b""
        if wait_s:
            headers = b"Retry-After: %d\r\nRetry-After-Ms: %d\r\n" % (
                max(1, math.ceil(wait_s)),
                max(1, math.ceil(wait_s * 1e3)),
            )
        error = {"message": message, "type": kind, "param": None, "code": code}
        self.answer([orjson.dumps({"error": error})], status=words, headers=headers)


# --- the command ---


def seconds(text: str) -> float:
    """Read a duration as Go writes it: 90s, 1.5m, 200ms."""
    found = re.fullmatch(r"([\d.]+)(ms|s|m|h)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration like 90s, 1.5m, 200ms")
    return float(found[1]) * {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}[found[2]]


async def serve(host: str, port: int, upstream: Upstream, life_s: float) -> None:
    """Answer until the life is over; says where it listens."""
    server = await asyncio.get_running_loop().create_server(lambda: Connection(upstream), host, port, backlog=1024)
    bound = server.sockets[0].getsockname()
    print(f"listening {bound[0]}:{bound[1]}", flush=True)
    gc.freeze()
    gc.disable()
    await asyncio.sleep(life_s)


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description="An upstream for measuring.", allow_abbrev=False)
    parser.add_argument("--listen", default="127.0.0.1:0", help="loopback address and port")
    parser.add_argument("--dims", type=int, default=1536)
    parser.add_argument("--config", type=Config.read, default=Config(), help="JSON")
    parser.add_argument("--max-life", type=seconds, default=3600.0)
    options = parser.parse_args()
    host, _, port = options.listen.rpartition(":")
    if host != "127.0.0.1":
        sys.exit("mock: only 127.0.0.1 is allowed")
    uvloop.run(serve(host, int(port), Upstream(Table(options.dims), options.config), options.max_life))


if __name__ == "__main__":
    main()
