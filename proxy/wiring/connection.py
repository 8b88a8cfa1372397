"""
One connection of a caller, with the short way for what is asked a thousand times a second.

aiohttp's way through a connection costs 37 of 80 µs a request: a task, a request, a response, a writer, time-outs,
each of them right for the general case. The short way goes around it for a plain POST of embeddings: what is cached
is answered before the event loop turns, with one write; the rest with one task. Parsing stays aiohttp's in either
case, so what it refuses is refused, and everything that is not plain goes its way.

The trick is one line: while something of ours is under way, aiohttp's handler, which sleeps until a message is there,
does not get to see the future that wakes it (`_waiter`). To all of aiohttp's other parts a connection without it looks
as if a handler were running: further messages queue up in their order, the keep-alive timer keeps off, a shutdown
waits. Afterwards the future is put back, and fulfilled where messages have queued up.

The states of a connection:

    state       _waiter   _call   left by
    long way    not idle  –       aiohttp's handler has answered and sleeps again            → idle
    idle        sleeping  –       bytes that are a plain POST                                → head or answering
                                  any other message                                          → long way
    head        held      set     its body is here                                           → answering
                                  anything else arrives, or it takes too long                → long way
    answering   held      set     the answer is gone                                         → idle, or long way
                                                                                               when messages wait
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from aiohttp import EMPTY_PAYLOAD, HttpVersion11, StreamReader, web
from aiohttp.http import HttpRequestParser, RawRequestMessage

from proxy.edge.accept import EMBEDDINGS, Accept
from proxy.edge.accept.call import Answer, Call
from proxy.edge.accept.head import LAST_CHUNK, chunk, opening
from proxy.edge.accept.peer import Peer

_BODY_S = 0.05
"""A body that is not here this long after its head is waited for on the long way."""

_BODY_BYTES = 16_384
"""A longer one too: until then nobody counts its bytes, and nobody reads them."""

_WHOLE_BYTES = 32_768
"""A smaller body is copied behind its head: one write is faster than several."""

_LEANS_ON = {
    web.RequestHandler: (
        "_close",
        "_force_close",
        "_handler_waiter",
        "_keepalive_handle",
        "_keepalive_timeout",
        "_messages",
        "_next_keepalive_close_time",
        "_parser",
        "_paused",
        "_process_keepalive",
        "_drain_helper",
        "_request_in_progress",
        "_waiter",
    ),
    HttpRequestParser: ("message_consumed",),
    StreamReader: ("_buffer",),
}
HAS_SHORT_WAY = all(hasattr(cls, name) for cls, names in _LEANS_ON.items() for name in names)
"""Whether this aiohttp is built as 3.14 is; with another one everything goes the long way."""


class Connection(web.RequestHandler):
    """
    What aiohttp calls a request handler.

    Handlers of ours raise nothing but for a caller that has left, so what arrives at `handle_error` is no HTTP.
    aiohttp would quote it, in its answer and in the log; it may be anybody's text.
    """

    __slots__ = (
        "_accept",
        "_body_timer",
        "_call",
        "_closed",
        "_held",
        "_is_answering",
        "_is_closing",
        "_listener",
        "_peer",
        "_task",
    )

    def __init__(
        self, manager: web.Server, accept: Accept, listener: str, *, closed: Callable[[], None], **options: Any
    ) -> None:
        """
        Args:
            manager: aiohttp's server.
            accept: who answers.
            listener: `unix` or `tcp`, where it came in.
            closed: called when it is gone.
            options: aiohttp's.
        """
        super().__init__(manager, **options)
        self._accept = accept
        self._listener = listener
        self._closed = closed
        self._peer: Peer | None = None
        self._call: Call | None = None
        self._held: asyncio.Future[None] | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._is_answering = False
        self._is_closing = False
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Writing waits until all of an answer is gone: else a short one, which nobody reads, would count as written,
        # and its connection be closed "after flushing", that is never.
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=0)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        if self._task is not None:
            self._task.add_done_callback(lambda _: self._left())  # one that has not begun ends without a step
            self._task.cancel()
        else:
            self._left()
        self._closed()

    def _left(self) -> None:
        """Tell of a caller that has left before anybody worked for it."""
        if self._call is not None:
            self._over(self._call)

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        await super().shutdown(timeout)
        if self._task is not None:
            self._task.cancel()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):
            return web.Response()  # to nobody
        return self._accept.malformed(self._listener)

    # --- from one way to the other ---

    def data_received(self, data: bytes) -> None:
        if self._call is None:
            waiter = self._waiter
            if waiter is None or waiter.done() or self._accept.is_draining or not HAS_SHORT_WAY:
                super().data_received(data)
                return
            self._held, self._waiter = waiter, None
        super().data_received(data)  # parses into _messages, and sees nobody to wake
        if self._is_answering:
            return
        if len(self._messages) == 1 and _is_plain(*self._messages[0]):
            message, payload = cast(tuple[RawRequestMessage, StreamReader], self._messages[0])
            if payload.is_eof():
                self._answer(message, payload)
                return
            if self._call is not None or self._is_awaited(message):
                return
        self._give_back()

    def _is_awaited(self, message: RawRequestMessage) -> bool:
        """Wait a moment for a body that comes in a packet of its own, as most clients send it; not for a long one."""
        body_bytes = int(message.headers.get("Content-Length", _BODY_BYTES + 1))
        if body_bytes > _BODY_BYTES:
            return False
        call = self._accept.begin(message.method, message.headers, self._listener, message.path)
        if not self._accept.awaits(call, message.headers, body_bytes, self._other_end()):
            self._accept.forget(call)
            return False
        self._call = call
        self._body_timer = self._loop.call_later(_BODY_S, self._give_back)
        return True

    def _other_end(self) -> Peer:
        if self._peer is None:
            self._peer = Peer(self._listener, self.transport)
        return self._peer

    def _give_back(self) -> None:
        """Let aiohttp's handler have the connection again: it sleeps, or takes what has queued up the long way."""
        if self._call is not None:
            self._accept.forget(self._call)
            self._call = None
        self._stop_timer()
        waiter, self._held = self._held, None
        if waiter is not None and self.transport is not None:
            self._waiter = waiter
            if self._messages and not waiter.done():
                waiter.set_result(None)

    def _stop_timer(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    # --- the short way ---

    def _answer(self, message: RawRequestMessage, payload: StreamReader) -> None:
        self._is_answering = self._is_closing = True  # if something breaks, the caller shall not wait
        self._stop_timer()
        self._messages.popleft()
        if self._parser is not None:
            self._parser.message_consumed()
        call = self._call
        if call is None:
            call = self._call = self._accept.begin(message.method, message.headers, self._listener, message.path)
        # What read_nowait() does takes 1 µs: it cares for readers that wait and for what is left over.
        body = b"".join(payload._buffer)
        answer = self._accept.at_once(call, message.headers, body, self._other_end())
        if answer is not None and self._is_written(answer):
            self._over(call)
            return
        self._request_in_progress = True
        self._task = self._loop.create_task(self._answer_slowly(call, answer))

    async def _answer_slowly(self, call: Call, answer: Answer | None) -> None:
        try:
            if answer is None:
                answer = await self._accept.in_time(call)
                if self._is_written(answer):
                    return
            if not await self._accept.taken(call, self._rest(call, answer)):
                self._is_closing = True
                if self.transport is not None:
                    self.transport.abort()
        finally:
            self._over(call)

    def _is_written(self, answer: Answer) -> bool:
        """Write an answer, or its first piece. Return whether that was all and has gone."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return False
        parts = opening(answer, is_closing=self._accept.is_draining)
        self._is_closing = self._accept.is_draining
        if len(answer.body) < _WHOLE_BYTES:
            transport.write(b"".join(parts))
        else:
            transport.writelines(parts)
        return answer.more is None and not self._paused

    async def _rest(self, call: Call, answer: Answer) -> None:
        """Write what is left of an answer, each piece when the one before it has gone."""
        await self._gone()
        if answer.more is None:
            return
        for piece in answer.more:
            await asyncio.sleep(0)  # what is gone at once has not let others have the loop
            await self._gone(chunk(piece))
            call.answer_bytes += len(piece)
        await self._gone(LAST_CHUNK)

    async def _gone(self, data: bytes = b"") -> None:
        """Write something, and wait until it and all before it has gone."""
        if self.transport is None or self.transport.is_closing():
            raise ConnectionResetError
        if data:
            self.transport.write(data)
        await self._drain_helper()

    def _over(self, call: Call) -> None:
        """Close the account of a request, and be ready for the next one."""
        self._accept.end(call)
        self._call = self._task = None
        self._is_answering = self._request_in_progress = False
        if self._handler_waiter is not None and not self._handler_waiter.done():
            self._handler_waiter.set_result(None)
        if self._is_closing or self._close or self._force_close:
            self._end()
        else:
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
            if self._keepalive_handle is None:
                self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)
        self._give_back()

    def _end(self) -> None:
        """Close the connection, and with it aiohttp's handler."""
        self.close()
        if self._held is not None:
            self._held.cancel()
        if self.transport is not None:
            self.transport.close()


def _is_plain(message: Any, payload: StreamReader) -> bool:
    """Whether a message is what the short way is for; what aiohttp could not parse has an empty payload too."""
    return (
        payload is not EMPTY_PAYLOAD
        and message.method == "POST"
        and message.path in EMBEDDINGS
        and message.version == HttpVersion11
        and not (message.should_close or message.upgrade or message.chunked)
        and "Expect" not in message.headers
    )
