"""
Connections to one upstream, and the exchange over one of them.

aiohttp's connector opens, pools, resolves, encrypts and tunnels, and its parser reads; only what its session puts
around them is left out: redirects, cookies, authentication, traces, a task that writes, and request and response
objects for all of that cost 50 of 90 µs a call, and none of it may happen here anyway. What is the same in each call to
an upstream, which is all of the head but an id and a length, is spelled once.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import re
import ssl
from collections.abc import Mapping
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from proxy.base.settings import TransportSettings
from proxy.upstream.translate import HttpCall

REQUEST_ID = "X-Request-Id"
_OWN = frozenset({"x-request-id", "traceparent", "content-length"})
"""Headers that each call has of its own; whatever else says so is overruled."""
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

_READ_BYTES = 512 * 1024
"""Read from the socket before somebody has to take it: an answer to 64 texts, so that it is not stopped on its way."""


class TooLong(Exception):
    """The answer is longer than its bound."""


class Pool:
    """Bounded, and bound to the loop in which it was made."""

    def __init__(
        self, settings: TransportSettings, *, slots: int, keepalive_s: float, tls: ssl.SSLContext | bool
    ) -> None:
        """
        Args:
            settings: times, bounds, the proxy to go through.
            slots: concurrent calls, and so connections.
            keepalive_s: how long an idle connection is reused.
            tls: what to trust and show.
        """
        self._settings = settings
        self._connector = _Connector(
            limit=slots,
            keepalive_timeout=keepalive_s,
            ttl_dns_cache=max(1, int(settings.dns_ttl_s)),
            ssl=tls,
        )
        self._connect_timeout = aiohttp.ClientTimeout(total=None, connect=settings.connect_timeout_s)
        self._route: _Route | None = None
        self.users = 0
        """Calls that are in it: the last one out of an abandoned pool closes it."""

    async def connect(self, call: HttpCall) -> Line:
        """
        Take an idle connection, or open one.

        Raises:
            TimeoutError: it took longer than `connect_timeout_s`.
            aiohttp.ClientError: it cannot be had.
        """
        route = self._route
        if route is None or route.headers is not call.headers or route.url != call.url:
            # Both are the same objects in each call of an upstream.
            route = self._route = _Route(call.url, call.headers, self._settings.http_proxy or None)
        connection = await self._connector.connect(route.request, traces=[], timeout=self._connect_timeout)
        protocol = connection.protocol
        assert protocol is not None
        is_fresh = protocol in self._connector.fresh
        self._connector.fresh.discard(protocol)
        return Line(connection, protocol, route, is_fresh=is_fresh)

    async def aclose(self) -> None:
        """Close all connections; those in use break."""
        await self._connector.close()


class Line:
    """One connection, for one exchange."""

    def __init__(
        self, connection: aiohttp.connector.Connection, protocol: ResponseHandler, route: _Route, *, is_fresh: bool
    ) -> None:
        self._connection = connection
        self._protocol = protocol
        self._route = route
        self.is_fresh = is_fresh
        """It was opened for this call; one that is not may have been closed by the other end meanwhile."""

    async def exchange(
        self, call: HttpCall, request_id: str, *, max_bytes: int
    ) -> tuple[int, Mapping[str, str], bytes]:
        """
        Send a call and read its whole answer; the connection goes back to the pool, or is closed.

        Args:
            max_bytes: bound of the answer's body, decompressed; what its head claims does not count.

        Returns:
            Status, headers (case-insensitive) and body.

        Raises:
            TooLong: the body has more than `max_bytes`.
            aiohttp.ClientError, aiohttp.http.HttpProcessingError: the exchange broke off, or was no HTTP.
        """
        connection, protocol = self._connection, self._protocol
        try:
            protocol.set_response_params(read_until_eof=True, read_bufsize=_READ_BYTES)
            transport = protocol.transport
            if transport is None:
                raise aiohttp.ServerDisconnectedError
            transport.write(self._route.spelled(call, request_id))
            message, payload = await protocol.read()
            while 100 <= message.code < 200 and message.code != 101:  # RFC 9110 §15.2: the answer is still to come
                message, payload = await protocol.read()
            chunks: list[bytes] = []
            size = 0
            while chunk := await payload.readany():
                chunks.append(chunk)
                size += len(chunk)
                if size > max_bytes:
                    raise TooLong
        except BaseException:
            connection.close()
            raise
        if transport.get_write_buffer_size():
            connection.close()  # answered before it had read all: the rest would precede the next call
        else:
            connection.release()
        return message.code, message.headers, chunks[0] if len(chunks) == 1 else b"".join(chunks)


class _Route:
    """What all calls to one address have in common."""

    def __init__(self, url: str, headers: Mapping[str, str], proxy: str | None) -> None:
        self.url = url
        self.headers = headers
        through = URL(proxy) if proxy else None
        # What the connector is asked with: where to, and through which proxy. aiohttp adds Host, User-Agent and what it
        # can decompress.
        self.request = _Request("POST", URL(url), headers=headers, loop=asyncio.get_running_loop(), proxy=through)
        is_plain = through is not None and not self.request.is_ssl()
        target = url if is_plain else self.request.url.raw_path_qs  # RFC 9112 §3.2.2: a proxy gets all of it
        spelled = [(n, v) for n, v in self.request.headers.items() if n.lower() not in _OWN]
        if is_plain and through is not None and through.user:
            credentials = base64.b64encode(f"{through.user}:{through.password or ''}".encode()).decode()
            spelled.append(("Proxy-Authorization", f"Basic {credentials}"))
        for name, value in spelled:
            if _CONTROL.search(name + value):
                raise ValueError(f"header {name!r} of an upstream holds a control character")
        self._head = "".join((f"POST {target} HTTP/1.1\r\n", *(f"{n}: {v}\r\n" for n, v in spelled))).encode()

    def spelled(self, call: HttpCall, request_id: str) -> bytes:
        """Spell a call."""
        trace = f"traceparent: {call.traceparent}\r\n" if call.traceparent else ""
        own = f"{trace}{REQUEST_ID}: {request_id}\r\nContent-Length: {len(call.body)}\r\n\r\n"
        return b"".join((self._head, own.encode(), call.body))


class _Request(aiohttp.ClientRequest):
    """Made once, and asked for its key at each call."""

    @functools.cached_property
    def connection_key(self) -> Any:
        return super().connection_key


class _Connector(aiohttp.TCPConnector):
    """
    Tells which connections were opened just now; the others are reused, and may be stale.

    aiohttp's TraceConfig tells it too, at 10 µs per call; this costs nothing where a connection is reused. The method
    is one that aiohttp's own connectors override; should it ever be renamed, every reset looks stale to our tests.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.fresh: set[ResponseHandler] = set()

    async def _create_connection(
        self, req: aiohttp.ClientRequest, traces: Any, timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        protocol = await super()._create_connection(req, traces, timeout)
        self.fresh.add(protocol)
        return protocol
