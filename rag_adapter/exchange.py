"""
One request and its answer, on the connections of one event loop.

Home of aiohttp. Its exceptions get our names here; above, nobody knows them. No timeouts: whoever waits has a deadline,
and cancels.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import aiohttp

from rag_adapter.address import cut_off, insist_on_ours, unreachable
from rag_adapter.errors import EmbeddingError, EmbeddingFailed
from rag_adapter.settings import ClientSettings
from rag_adapter.tally import Tally
from rag_adapter.wire import MAX_ANSWER_BYTES, Answer

IDLE_S = 60.0
"""An idle connection is kept this long; the sidecar keeps it 95 s, so it is us who close it."""


class Exchange:
    """The session of one event loop; made and used there only."""

    def __init__(self, settings: ClientSettings, tally: Tally) -> None:
        address = self._address = settings.address
        self._tally = tally
        self._url = f"{address.origin}{address.prefix}/embeddings"
        options: dict[str, Any] = {"limit": 0, "keepalive_timeout": IDLE_S}  # the outbox bounds them
        self._connector = _UnixConnector(address.path, **options) if address.path else _TcpConnector(**options)
        self._connector.tally = tally
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            timeout=aiohttp.ClientTimeout(),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            auto_decompress=False,
            trust_env=address.is_tls,  # nothing on this machine is reached through an HTTP proxy
        )

    async def post(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        """
        Ask for vectors.

        Raises:
            SidecarUnavailable: no connection, or cut off.
            EmbeddingFailed: no HTTP, or too much of it.
        """
        self._tally.add("requests")
        return await self._exchanged("POST", self._url, data=body, headers=headers)

    async def get(self, path: str) -> Answer:
        """Ask for a page; raises as `post()` does."""
        return await self._exchanged("GET", self._address.origin + path)

    async def _exchanged(self, method: str, url: str, **options: Any) -> Answer:
        insist_on_ours(self._address)
        try:
            # A redirect would carry texts and key to whomever it names.
            async with self._session.request(method, url, allow_redirects=False, **options) as response:
                return Answer(response.status, response.headers, await _read(response))
        except aiohttp.ClientError as error:
            raise self._renamed(error) from error

    def _renamed(self, error: aiohttp.ClientError) -> EmbeddingError:
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return unreachable(self._address, socket.gaierror())
        if isinstance(error, aiohttp.ClientConnectorError):
            return unreachable(self._address, error.os_error)
        if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError):
            return cut_off(self._address)
        return EmbeddingFailed(f"what {self._address} answers is no HTTP: is it a sidecar?", code="not_a_sidecar")

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()

    def abandon(self, *, is_foreign: bool) -> None:
        """
        Leave the connections without asking their event loop for anything.

        Args:
            is_foreign: this is a forked child, and they are the parent's; otherwise their loop is closed.
        """
        self._session.detach()
        self._connector.abandon(is_foreign=is_foreign)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Read the whole body, bounded: a length that is stated is a claim, the sum is what counts."""
    chunks: list[bytes] = []
    size = 0
    while chunk := await response.content.readany():
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise EmbeddingFailed(f"the answer has more than {MAX_ANSWER_BYTES} bytes, the bound", code="bad_answer")
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class _Connector(aiohttp.BaseConnector):
    """
    Counts the connections and remembers them for a fork.

    aiohttp's TraceConfig tells of them too, at 10 µs per request. The method below is one that aiohttp's own connectors
    override, `_conns` and `_closed` are what its own `close()` sets; should they ever be renamed, our tests fail.
    """

    tally: Tally

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._protocols: WeakSet[Any] = WeakSet()

    async def _create_connection(self, req: aiohttp.ClientRequest, traces: Any, timeout: aiohttp.ClientTimeout) -> Any:
        protocol = await super()._create_connection(req, traces, timeout)
        self.tally.add("connections_opened")
        self._protocols.add(protocol)
        return protocol

    def abandon(self, *, is_foreign: bool) -> None:
        """
        In a forked child, put /dev/null in the place of each socket.

        Closing them in the ordinary way would take them out of the parent's epoll, which parent and child share, and
        the parent would wait for its answers forever. Left open, they would keep the sidecar from seeing when the
        parent hangs up.
        """
        if is_foreign and not self._loop.is_closed():
            null = os.open(os.devnull, os.O_RDWR)
            for protocol in tuple(self._protocols):
                transport = protocol.transport
                if transport is not None and (sock := transport.get_extra_info("socket")) and sock.fileno() >= 0:
                    os.dup2(null, sock.fileno(), inheritable=False)
            os.close(null)
        self._closed = True
        self._conns.clear()


class _UnixConnector(_Connector, aiohttp.UnixConnector):
    pass


class _TcpConnector(_Connector, aiohttp.TCPConnector):
    pass
