"""
The wire to one upstream: one batch, one exchange, within its time.

Home of aiohttp's client. Its exceptions get our names here. The pool is bounded; an idle connection is reused for a
shorter time than the upstream keeps it; where one turns out to be closed all the same, before the first byte of an
answer, the exchange goes out once more at once, on a fresh one: an embedding computed twice harms nobody, and it is no
failure.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import aiohttp
from aiohttp.http import HttpProcessingError

from proxy.base.clock import Clock
from proxy.base.errors import BadVectors, DeadlineExceeded, EmbeddingError, UpstreamFailed, UpstreamTimeout
from proxy.base.events import AttemptFinished, ConnectionStale, Observer
from proxy.base.messages import Answer, Batch, Raw, Row
from proxy.base.settings import TransportSettings
from proxy.base.stage import Snapshot
from proxy.upstream.translate import Dialect, HttpCall, RawAnswer
from proxy.upstream.transport.pool import Line, Pool, TooLong
from proxy.upstream.vectors import arrays, gate

FAIR_TIMES = 5.0
FAIR_TIME_S = 2.0
"""A deadline that cuts an attempt is the caller's impatience, unless the upstream has had FAIR_TIMES as long as its
good answers take on average (FAIR_TIME_S while none is known): then it is slow, and its breaker should hear of it."""

TURN_BYTES = 512 * 1024
"""So much of an answer is read before others get their turn: 25 000 to 45 000 numbers, in 1 to 2 ms."""

_ANSWER_MARGIN_S = 0.02
"""An attempt ends this long before its deadline, so that the caller's answer is out by then."""


class Transport:
    """Sends batches to one upstream and gates what comes back."""

    def __init__(
        self,
        name: str,
        dialect: Dialect,
        settings: TransportSettings,
        *,
        slots: int,
        keepalive_s: float,
        first_answer_s: float = 0.0,
        tls: ssl.SSLContext | bool,
        clock: Clock,
        observe: Observer,
    ) -> None:
        """
        Args:
            name: the upstream's name.
            dialect: how it is spoken to.
            settings: times and bounds.
            slots: concurrent calls, and so connections.
            keepalive_s: how long an idle connection is reused.
            first_answer_s: how long the first good answer may take, where a model is loaded for it.
            tls: what to trust and show; see `tls_context()`.
            clock: where time comes from.
            observe: who is told of each attempt.
        """
        self._name = name
        self._dialect = dialect
        self._settings = settings
        self._slots = slots
        self._keepalive_s = keepalive_s
        self._first_answer_s = first_answer_s
        self._tls = tls
        self._clock = clock
        self._observe = observe
        self._pool: Pool | None = None
        self._is_closed = False
        self._typical_s: float | None = None
        """How long good answers take, a moving average."""
        # vLLM takes this for its own id of the request: two alike at a time break it.
        start = os.urandom(5).hex()
        self._ids = (f"{start}-{n}" for n in itertools.count(1))

    async def __call__(self, batch: Batch) -> Answer:
        """
        Raises:
            DeadlineExceeded: too little time was left.
            UpstreamTimeout, UpstreamFailed, BadVectors, …: the attempt failed; see `base/errors.py`.
        """
        start = self._clock.now()
        code = "ignored"
        tokens = 0
        try:
            raw = await self._exchanged(batch, start)
            rows = self._gated(raw.vectors, batch)
            code, tokens = "", raw.tokens
            took_s = self._clock.now() - start
            self._typical_s = took_s if self._typical_s is None else 0.9 * self._typical_s + 0.1 * took_s
        except EmbeddingError as error:
            code = error.label
            raise
        finally:
            seconds = self._clock.now() - start
            self._observe(AttemptFinished(self._name, code, seconds, len(batch.inputs), tokens))
        return Answer(rows, raw.tokens, self._name, upstream_s=seconds, hints=raw.hints)

    def _gated(self, vectors: Sequence[Raw], batch: Batch) -> tuple[Row, ...]:
        try:
            return gate(vectors, count=len(batch.inputs), width=batch.width)
        except BadVectors as error:
            raise BadVectors(f"upstream {self._name!r}: {error.message}", index=error.index) from error

    async def _exchanged(self, batch: Batch, start: float) -> RawAnswer:
        settings = self._settings
        patience_s = batch.deadline - start - _ANSWER_MARGIN_S
        if patience_s <= 0:
            raise DeadlineExceeded("no time was left to ask the upstream")
        is_first = self._typical_s is None  # a server may have to load its model for it
        attempt_s = max(settings.attempt_timeout_s, self._first_answer_s if is_first else 0.0)
        limit_s = min(attempt_s, patience_s)
        try:
            async with self._clock.timeout_at(start + limit_s):
                status, headers, body = await self._sent(self._dialect.call(batch))
        except TimeoutError:
            waited_s = self._clock.now() - start
            message = f"upstream {self._name!r} did not answer within {waited_s:.3g} s"
            first_s = max(FAIR_TIME_S, self._first_answer_s)
            fair_s = first_s if self._typical_s is None else max(0.1, FAIR_TIMES * self._typical_s)
            if limit_s < min(attempt_s, fair_s):
                raise DeadlineExceeded(message) from None
            raise UpstreamTimeout(message) from None
        return await self._answered(batch, status, headers, body)

    async def _answered(self, batch: Batch, status: int, headers: Mapping[str, str], body: bytes) -> RawAnswer:
        if len(body) <= TURN_BYTES:
            return self._dialect.answer(batch, status, headers, body, wall_now=time.time())
        body, rows = await thinned(body)
        raw = self._dialect.answer(batch, status, headers, body, wall_now=time.time())
        await asyncio.sleep(0)  # the gate gets a turn of its own
        return replace(raw, vectors=[_filled(item, rows) for item in raw.vectors]) if rows else raw

    async def _sent(self, call: HttpCall) -> tuple[int, Mapping[str, str], bytes]:
        """Send a call, once more where a pooled connection was stale, and give foreign exceptions our names."""
        for is_last in (False, True):
            if self._is_closed:
                raise UpstreamFailed(f"upstream {self._name!r} is no longer used")
            pool = self._pool = self._pool or Pool(
                # Not before the first call: it belongs to the loop that runs then.
                self._settings,
                slots=self._slots,
                keepalive_s=self._keepalive_s,
                tls=self._tls,
            )
            pool.users += 1
            try:
                line = await self._connected(pool, call)
                try:
                    return await line.exchange(call, next(self._ids), max_bytes=self._settings.max_answer_bytes)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                    if is_last or line.is_fresh:
                        raise UpstreamFailed(f"upstream {self._name!r}: {_reason(error)}") from error
                    self._observe(ConnectionStale(self._name))
                    # Where one is stale, its neighbours are too: after a restart, all of them. A new pool has none.
                    if self._pool is pool:
                        self._pool = None
                except (aiohttp.ClientError, HttpProcessingError) as error:
                    raise UpstreamFailed(f"upstream {self._name!r}: {_reason(error)}") from error
                except TooLong:
                    bound = self._settings.max_answer_bytes
                    raise BadVectors(
                        f"the answer of upstream {self._name!r} has more than {bound} bytes, the bound"
                    ) from None
            finally:
                pool.users -= 1
                if pool is not self._pool and not pool.users:
                    await pool.aclose()
        raise AssertionError("the second time either returns or raises")

    async def _connected(self, pool: Pool, call: HttpCall) -> Line:
        try:
            return await pool.connect(call)
        except TimeoutError as error:
            connecting_s = self._settings.connect_timeout_s
            raise UpstreamTimeout(f"upstream {self._name!r}: no connection within {connecting_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamFailed(f"upstream {self._name!r}: {_reason(error)}") from error

    def snapshot(self) -> Snapshot:
        return {"keepalive_s": self._keepalive_s, "slots": self._slots}

    async def aclose(self) -> None:
        """Close the pool and wait until its sockets are gone."""
        self._is_closed = True
        if self._pool is not None:
            await self._pool.aclose()
            await asyncio.sleep(0)


async def thinned(body: bytes) -> tuple[bytes, list[Row]]:
    """
    Take the vectors out of a large answer, one by one; `[n]` stays behind in the place of the n-th.

    JSON is read in one go, and orjson keeps the GIL meanwhile, so that a thread would hold the loop as well: 20 MB, 256
    × 4096 numbers, for 45 ms, and the gate for 15 more. Here others get their turn each 1 to 2 ms; and as one vector's
    numbers at a time are Python objects, all of it takes 37 ms. Base64 has no arrays, and is read as it is: 256 × 4096
    numbers in 3 ms.
    """
    parts: list[bytes] = []
    rows: list[Row] = []
    last = turn = 0
    try:
        for start, end, row in arrays(body):
            parts += (body[last:start], b"[%d]" % len(rows))
            rows.append(row)
            last = end
            if end - turn > TURN_BYTES:
                turn = end
                await asyncio.sleep(0)
    except ValueError:
        return body, []  # what is wrong with it is told by whoever reads it as a whole
    return b"".join((*parts, body[last:])), rows


def _filled(item: Raw, rows: Sequence[Row]) -> Raw:
    """Put the row back whose place this is; anything else is left for the gate to judge."""
    if isinstance(item, list) and len(item) == 1 and type(item[0]) is int:
        return rows[item[0]]
    return item


def tls_context(settings: TransportSettings) -> ssl.SSLContext | bool:
    """
    Make what TLS trusts and shows; True, aiohttp's default, where the settings say nothing.

    Raises:
        OSError, ssl.SSLError: a file is missing or is not what it should be.
    """
    if not settings.ca_file and not settings.client_cert_file:
        return True
    context = ssl.create_default_context(cafile=settings.ca_file or None)
    if settings.client_cert_file:
        context.load_cert_chain(settings.client_cert_file, settings.client_key_file or None)
    return context


def _reason(error: Exception) -> str:
    """Say what went wrong in words of our own: a foreign message may hold anything."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return "its TLS certificate or handshake was not accepted (transport.ca_file names the CAs to trust)"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"its name {error.host!r} is not known"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"no connection to {error.host}:{error.port}: {os.strerror(error.errno) if error.errno else 'failed'}"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "its answer broke off"
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError):
        return "it closed the connection before it answered"
    return f"{type(error).__name__}"
