"""
Callers that look at every vector: `python -m tests.load.generator --target http://127.0.0.1:8484/v1/embeddings`.

A closed loop (each caller asks again as soon as it is answered) or an open one (requests at a rate, whatever becomes
of them), over TCP or a Unix socket, as a hand-written protocol over uvloop. Options and the names in the JSON it prints
are those of the Go generator, so that either can stand here. Loopback only, and it ends by itself.

In the open loop a latency counts from the instant of sending: a request never waits for an answer, so nothing is
omitted. How late our own timer was stands beside it as `send_lag_max_ms`.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import gc
import itertools
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson
import uvloop

from tests.load.mock import seconds
from tests.load.results import percentile
from tests.load.vectors import HEAD, Table, head_base64, head_decimals, is_head, key

LOOK_EVERY_S = 0.1
"""How often requests are looked for that have run out of time."""
PAUSE_AFTER_ERROR_S = 0.01
"""A server that refuses connections is not asked again at once, or the generator would measure itself."""
FIRST_BUFFER_BYTES = 65_536
HEAD_NUMBERS_BYTES = HEAD * 30
"""Longer than any way of writing the first numbers."""

WORDS = (
    "how do i reset the billing address for my account when payment fails and what happens to open invoices after "
    "cancel please explain refund policy shipping status order number delivery window change password login error"
).split()
FILLINGS = [" ".join(random.Random(n).choices(WORDS, k=400)) for n in range(64)]
"""Texts differ in their first characters; these fill them up."""


# --- what is asked ---


@dataclass(frozen=True, slots=True)
class Plan:
    """Who asks for what, and how long."""

    target: str
    mode: str = "closed"
    c: int = 8
    rate: float = 100.0
    max_outstanding: int = 20_000
    duration_s: float = 0.0
    requests: int = 0
    """0: until the duration is over."""
    batch: int = 1
    """1: the input is a string, not a list."""
    texts: str = "unique"
    unique_ratio: float = 0.0
    """With texts from the pool: this share is unique all the same."""
    pool: int = 1000
    zipf_s: float = 1.1
    text_len: int = 60
    format: str = "base64"
    model: str = "text-embedding-3-small"
    dims: int = 1536
    timeout_s: float = 30.0
    seed: int = 1
    full_every: int = 16
    max_run_s: float = 300.0


def fit(start: str, length: int, filling: int) -> str:
    """Return a text of this length that begins like this."""
    return f"{start} {FILLINGS[filling % len(FILLINGS)]}"[:length]


def pool_texts(plan: Plan) -> list[str]:
    """Return the texts that are asked for again and again; none of them begins like a unique one."""
    return [fit(f"p{n:05d}", plan.text_len, n) for n in range(plan.pool)]


def zipf_steps(count: int, exponent: float) -> list[float]:
    """Return the cumulated shares of a Zipf distribution: the k-th of `count` has weight k^−exponent."""
    steps = list(itertools.accumulate((k + 1) ** -exponent for k in range(count)))
    return [step / steps[-1] for step in steps]


class Texts:
    """The texts of one caller, one after the other."""

    def __init__(self, plan: Plan, caller: int, pool: list[str], steps: list[float], turn: Callable[[], int]) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed * 1_000_003 + caller)
        self._start = f"u{plan.seed}-{caller}-"
        self._count = 0
        self._pool = pool
        self._steps = steps
        self._turn = turn

    def next(self) -> str:
        """Return the next text."""
        plan = self._plan
        if plan.texts == "unique" or (plan.unique_ratio and self._random.random() < plan.unique_ratio):
            self._count += 1
            return fit(f"{self._start}{self._count}", plan.text_len, self._count)
        if plan.texts == "zipf":
            return self._pool[bisect.bisect(self._steps, self._random.random())]
        if plan.texts == "seq":
            return self._pool[self._turn() % len(self._pool)]
        return self._random.choice(self._pool)


def request(plan: Plan, host: str, path: str) -> Callable[[list[str]], bytes]:
    """Return what makes a request of texts; they contain nothing that needs an escape."""
    encoding = "" if plan.format == "none" else f',"encoding_format":"{plan.format}"'
    after = f',"model":"{plan.model}"{encoding}}}'
    opening, closing = ('{"input":"', '"') if plan.batch == 1 else ('{"input":["', '"]')
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: bench\r\nAccept: application/json\r\n"
        "Authorization: Bearer sk-bench\r\nContent-Type: application/json\r\nContent-Length: "
    )

    def render(texts: list[str]) -> bytes:
        joined = '","'.join(texts)
        body = f"{opening}{joined}{closing}{after}"
        return f"{head}{len(body)}\r\n\r\n{body}".encode("ascii")

    return render


# --- what is answered ---


@dataclass(slots=True)
class Tally:
    """What came of it."""

    requests: int = 0
    items: int = 0
    wrong_vectors: int = 0
    missing_vectors: int = 0
    format_mismatch: int = 0
    usage_tokens: int = 0
    dropped_local: int = 0
    send_lag_max_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    error_latencies_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


_EMBEDDING = re.compile(rb'"embedding"\s*:\s*(["\[])')
_INDEX = re.compile(rb'"index"\s*:\s*(\d+)')
_TOKENS = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')


class Checker:
    """
    Looks at an answer: is each vector that of its text?

    The first numbers of each vector are compared, and all of every n-th. An answer is searched, not parsed: parsing
    64 vectors of decimals takes longer than the proxy needs to answer them.
    """

    def __init__(self, plan: Plan) -> None:
        self._table = Table(plan.dims)
        self._wants_base64 = plan.format == "base64"
        self._full_every = plan.full_every
        self._seen = 0

    def check(self, buffer: bytearray, start: int, end: int, texts: list[str], tally: Tally) -> str:
        """
        Count the vectors of the answer that stands in the buffer from `start` to `end`.

        Returns:
            Empty, or the name of the error.
        """
        spans, rest = self._spans(buffer, start, end)
        indices = [int(index) for index in _INDEX.findall(rest)] or list(range(len(spans)))
        if not spans or len(indices) != len(spans):
            return "bad_json"
        right: set[int] = set()
        wrong = 0
        for index, (first, last) in zip(indices, spans, strict=True):
            if index < len(texts) and index not in right and self._is_right(buffer, first, last, texts[index]):
                right.add(index)
            else:
                wrong += 1
            tally.format_mismatch += (buffer[first] == b'"'[0]) != self._wants_base64
        missing = max(0, len(texts) - len(spans))
        tally.items += len(right)
        tally.wrong_vectors += wrong
        tally.missing_vectors += missing
        tokens = _TOKENS.search(rest)
        tally.usage_tokens += int(tokens[1]) if tokens else 0
        return "wrong_vector" if wrong or missing else ""

    def _spans(self, buffer: bytearray, start: int, end: int) -> tuple[list[tuple[int, int]], bytes]:
        """Return where the vectors stand, from their opening to their closing mark, and all that is between them."""
        spans, between = [], []
        at = start
        while found := _EMBEDDING.search(buffer, at, end):
            between.append(buffer[at : found.start()])
            first = found.start(1)
            at = buffer.find(b'"' if found[1] == b'"' else b"]", first + 1, end) + 1
            if not at:
                return [], b""
            spans.append((first, at - 1))
        between.append(buffer[at:end])
        return spans, b"".join(between)

    def _is_right(self, buffer: bytearray, first: int, last: int, text: str) -> bool:
        self._seen += 1
        is_full = self._seen % self._full_every == 0
        text_key = key(text.encode())
        at = first + 1
        if buffer[first] == b'"'[0]:
            if last - at != self._table.base64_characters:
                return False
            if is_full:
                return buffer[at:last] == b"".join(self._table.base64(text_key))
            return buffer.startswith(head_base64(text_key), at, last)
        # Decimals may be written in more than one way; ours are the shortest, and so are most people's.
        if is_full:
            return buffer[at:last] == b"".join(self._table.decimals(text_key)) or self._is_equal(
                buffer[first : last + 1], text_key
            )
        if buffer.startswith(head_decimals(text_key), at, last):
            return True
        numbers = bytes(buffer[at : min(last, at + HEAD_NUMBERS_BYTES)]).split(b",", HEAD)
        return is_head(numbers[:HEAD], text_key)

    def _is_equal(self, array: bytearray, text_key: bytes) -> bool:
        try:
            return self._table.is_vector(orjson.loads(array), text_key)
        except orjson.JSONDecodeError:
            return False


# --- the wire ---


_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close", re.IGNORECASE)


class Connection(asyncio.BufferedProtocol):
    """One connection: a request, its answer, the next request. Answers are received where they are looked at."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._buffer = bytearray(FIRST_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._is_waiting = False
        self._is_late = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def send(self, request: bytes) -> None:
        """Send a request; its caller hears of the answer, or of the failure."""
        self._filled = self._body = self._end = 0
        self._chunks: list[tuple[int, int]] = []
        self._is_chunked = False
        self._is_waiting = True
        self._transport.write(request)

    def time_out(self) -> None:
        """Give up on the answer."""
        self._is_late = True
        self._transport.abort()

    def close(self) -> None:
        self._is_waiting = False
        self._transport.abort()

    def get_buffer(self, _: int) -> memoryview:
        if self._filled == len(self._buffer):
            self._grow(2 * self._filled)
        return self._view[self._filled :]

    def _grow(self, size: int) -> None:
        larger = bytearray(size)
        larger[: self._filled] = self._view[: self._filled]
        self._buffer = larger
        self._view = memoryview(larger)

    def buffer_updated(self, count: int) -> None:
        self._filled += count
        if not self._body and not self._read_head():
            return
        if self._is_chunked and not self._end:
            self._find_chunks()
        if self._end and self._filled >= self._end:
            self._finish()

    def _read_head(self) -> bool:
        """Read the head; returns whether it is here."""
        end = self._buffer.find(b"\r\n\r\n", 0, self._filled)
        if end < 0:
            return False
        head = bytes(self._view[:end])
        self._status = int(head[9:12])
        self._is_last = bool(_CLOSE.search(head))
        self._body = end + 4
        if _CHUNKED.search(head):
            self._is_chunked = True
            self._chunk = self._body
        else:
            length = _LENGTH.search(head)
            self._end = self._body + (int(length[1]) if length else 0)
            if self._end > len(self._buffer):
                self._grow(self._end)
        return True

    def _find_chunks(self) -> None:
        while (line := self._buffer.find(b"\r\n", self._chunk, self._filled)) >= 0:
            size = int(bytes(self._view[self._chunk : line]).split(b";")[0], 16)
            after = line + 2 + size + 2
            if after > self._filled:
                return
            if not size:
                self._end = after
                return
            self._chunks.append((line + 2, line + 2 + size))
            self._chunk = after

    def _finish(self) -> None:
        self._is_waiting = False
        if self._is_last:
            self._transport.abort()
        if self._is_chunked:
            body = bytearray().join(self._view[first:last] for first, last in self._chunks)
            self._caller.answered(self._status, body, 0, len(body), is_last=self._is_last)
        else:
            self._caller.answered(self._status, self._buffer, self._body, self._end, is_last=self._is_last)

    def connection_lost(self, _: Exception | None) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self._caller.failed("timeout" if self._is_late else "truncated" if self._filled else "reset")
        else:
            self._caller.disconnected(self)


class Caller:
    """Asks, and looks at the answer; then tells the load, which decides whether it asks again."""

    def __init__(self, load: Load, texts: Texts) -> None:
        self._load = load
        self._source = texts
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self.began = 0.0
        """When the request was begun that is on its way; 0 when none is."""

    def ask(self) -> None:
        """Send the next request."""
        self._texts = [self._source.next() for _ in range(self._load.plan.batch)]
        self._request = self._load.render(self._texts)
        self.began = time.perf_counter()
        self._is_reused = self._connection is not None
        self._send()

    def _send(self) -> None:
        if self._connection:
            self._connection.send(self._request)
        else:
            self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            self._connection = await self._load.connect(self)
        except OSError as error:
            self.failed(
                {"ConnectionRefusedError": "refused", "FileNotFoundError": "refused"}.get(type(error).__name__, "other")
            )
            return
        self._connection.send(self._request)

    def answered(self, status: int, buffer: bytearray, start: int, end: int, *, is_last: bool) -> None:
        """Look at an answer."""
        now = time.perf_counter()
        if is_last:
            self._connection = None
        if status == 200:
            error = self._load.checker.check(buffer, start, end, self._texts, self._load.tally)
        else:
            error = f"http_{status}"
        self._done(now, error)

    def failed(self, error: str) -> None:
        """Hear that there will be no answer."""
        self._connection = None
        if error == "reset" and self._is_reused:
            # An idle connection that the server has closed: every client tries once more, on a new one.
            self._is_reused = False
            self._send()
            return
        self._done(time.perf_counter(), error)

    def disconnected(self, connection: Connection) -> None:
        """Hear that an idle connection was closed."""
        if self._connection is connection:
            self._connection = None

    def _done(self, now: float, error: str) -> None:
        latency_s, self.began = now - self.began, 0.0
        tally = self._load.tally
        tally.requests += 1
        if error:
            tally.errors[error] += 1
            tally.error_latencies_s.append(latency_s)
            asyncio.get_running_loop().call_later(PAUSE_AFTER_ERROR_S, self._load.released, self)
        else:
            tally.latencies_s.append(latency_s)
            self._load.released(self)

    def look(self, now: float) -> None:
        """Give up when it has taken too long."""
        if self.began and now - self.began > self._load.plan.timeout_s:
            if self._connection:
                self._connection.time_out()
            elif self._connecting:
                self._connecting.cancel()
                self.failed("timeout")

    def close(self) -> None:
        if self._connection:
            self._connection.close()


class Load:
    """Lets callers ask as the plan says."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tally = Tally()
        self.checker = Checker(plan)
        self._network, self._address, host, path = address(plan.target)
        self.render = request(plan, host, path)
        self._pool = [] if plan.texts == "unique" else pool_texts(plan)
        self._steps = zipf_steps(plan.pool, plan.zipf_s) if plan.texts == "zipf" else []
        self._turns = itertools.count()
        self._callers: list[Caller] = []
        self._idle: list[Caller] = []
        self._begun = 0
        self._outstanding = 0
        self._is_over = asyncio.Event()

    async def run(self) -> float:
        """Run to the end; returns how long it took, in seconds."""
        start = time.perf_counter()
        limit_s = min(self.plan.duration_s or self.plan.max_run_s, self.plan.max_run_s)
        self._stop_at = start + limit_s
        looking = asyncio.create_task(self._look())
        if self.plan.mode == "closed":
            for _ in range(self.plan.c):
                self._begin(self._new())
        else:
            await self._keep_rate(start)
        self._leave()
        await asyncio.wait_for(self._is_over.wait(), limit_s + self.plan.timeout_s + 5)
        took_s = time.perf_counter() - start
        looking.cancel()
        for caller in self._callers:
            caller.close()
        return took_s

    async def connect(self, caller: Caller) -> Connection:
        """Open a connection."""
        loop = asyncio.get_running_loop()
        if self._network == "unix":
            _, connection = await loop.create_unix_connection(lambda: Connection(caller), self._address)
        else:
            host, _, port = self._address.rpartition(":")
            _, connection = await loop.create_connection(lambda: Connection(caller), host, int(port))
        return connection

    def released(self, caller: Caller) -> None:
        """A caller has been answered."""
        self._outstanding -= 1
        if self.plan.mode == "closed":
            self._begin(caller)
        else:
            self._idle.append(caller)
        self._leave()

    def _new(self) -> Caller:
        texts = Texts(self.plan, len(self._callers), self._pool, self._steps, lambda: next(self._turns))
        self._callers.append(Caller(self, texts))
        return self._callers[-1]

    def _may_begin(self) -> bool:
        return time.perf_counter() < self._stop_at and (not self.plan.requests or self._begun < self.plan.requests)

    def _begin(self, caller: Caller) -> None:
        if self._may_begin():
            self._begun += 1
            self._outstanding += 1
            caller.ask()

    async def _keep_rate(self, start: float) -> None:
        intended = start
        while self._may_begin():
            wait_s = intended - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                continue
            self.tally.send_lag_max_s = max(self.tally.send_lag_max_s, -wait_s)
            intended += 1 / self.plan.rate
            if self._outstanding < self.plan.max_outstanding:
                self._begin(self._idle.pop() if self._idle else self._new())
            else:
                self.tally.dropped_local += 1

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            now = time.perf_counter()
            for caller in self._callers:
                caller.look(now)

    def _leave(self) -> None:
        if not self._outstanding and not self._may_begin():
            self._is_over.set()


# --- the command ---


def address(target: str) -> tuple[str, str, str, str]:
    """
    Read a target.

    Returns:
        `tcp` or `unix`, the address, what to say as Host, and the path.
    """
    if target.startswith("unix:"):
        socket, colon, path = target.removeprefix("unix:").partition(":/")
        return "unix", socket, "localhost", f"/{path}" if colon else "/v1/embeddings"
    parts = urlsplit(target)
    if parts.scheme != "http" or parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError("only http on a loopback address is allowed")
    return "tcp", parts.netloc, parts.netloc, parts.path or "/v1/embeddings"


def milliseconds(latencies_s: list[float]) -> dict[str, float]:
    """Return the percentiles, in milliseconds."""
    ordered = sorted(latencies_s)
    found: dict[str, float] = {"n": len(ordered)}
    for name, share in (("min", 0.0), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)):
        found[name] = round(percentile(ordered, share) * 1e3, 3)
    found["mean"] = round(sum(ordered) / len(ordered) * 1e3, 3) if ordered else 0.0
    return found


def report(plan: Plan, tally: Tally, took_s: float) -> dict[str, Any]:
    """Put the numbers under the names that the Go generator gives them."""
    ok = len(tally.latencies_s)
    return {
        "mode": plan.mode,
        "wall_s": took_s,
        "requests": tally.requests,
        "ok": ok,
        "success": ok / tally.requests if tally.requests else 0.0,
        "rps": ok / took_s,
        "emb_per_s": tally.items / took_s,
        "items": tally.items,
        "lat_ms": milliseconds(tally.latencies_s),
        "err_lat_ms": milliseconds(tally.error_latencies_s),
        "errors": dict(tally.errors),
        "wrong_vectors": tally.wrong_vectors,
        "missing_vectors": tally.missing_vectors,
        "format_mismatch": tally.format_mismatch,
        "dropped_local": tally.dropped_local,
        "usage_tokens": tally.usage_tokens,
        "send_lag_max_ms": round(tally.send_lag_max_s * 1e3, 3),
        "cpu_s": time.process_time(),
    }


def plan_of(arguments: list[str] | None = None) -> Plan:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Load that looks at every vector.", allow_abbrev=False)
    parser.add_argument(
        "--target", required=True, help="http://127.0.0.1:PORT/v1/embeddings or unix:PATH:/v1/embeddings"
    )
    parser.add_argument("--mode", choices=("closed", "open"), default="closed")
    parser.add_argument("--c", type=int, default=8, help="closed loop: callers")
    parser.add_argument("--rate", type=float, default=100.0, help="open loop: requests per second")
    parser.add_argument("--max-outstanding", type=int, default=20_000, help="open loop: no more than this at a time")
    parser.add_argument("--duration", dest="duration_s", type=seconds, default=0.0)
    parser.add_argument("--requests", type=int, default=0, help="stop after this many")
    parser.add_argument("--batch", type=int, default=1, help="texts per request")
    parser.add_argument("--texts", choices=("unique", "zipf", "uniform", "seq"), default="unique")
    parser.add_argument("--unique-ratio", type=float, default=0.0)
    parser.add_argument("--pool", type=int, default=1000)
    parser.add_argument("--zipf-s", type=float, default=1.1)
    parser.add_argument("--text-len", type=int, default=60)
    parser.add_argument("--format", choices=("base64", "float", "none"), default="base64")
    parser.add_argument("--model", default="text-embedding-3-small")
    parser.add_argument("--dims", type=int, default=1536)
    parser.add_argument("--timeout", dest="timeout_s", type=seconds, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--full-every", type=int, default=16)
    parser.add_argument("--max-run", dest="max_run_s", type=seconds, default=300.0)
    options = parser.parse_args(arguments)
    if not options.duration_s and not options.requests:
        options.duration_s = 10.0
    return Plan(**vars(options))


async def measured(plan: Plan) -> dict[str, Any]:
    """Run the load, and say what came of it."""
    load = Load(plan)
    gc.freeze()
    gc.disable()
    took_s = await load.run()
    return report(plan, load.tally, took_s)


def main() -> None:
    """Read the command line, run, print JSON."""
    plan = plan_of()
    try:
        address(plan.target)
    except ValueError as error:
        sys.exit(f"generator: {error}")
    print(orjson.dumps(uvloop.run(measured(plan))).decode())


if __name__ == "__main__":
    main()
