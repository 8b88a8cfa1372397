"""
The caller's HTTP: what a request meets first, and where its answer is decided.

It names the route, checks who may come in, reads the body within its bounds, lets `decode` and `encode` do the
spelling, hands the request to the pipeline, and states one fact per request. aiohttp's Application is left out: its
router, middlewares and signals cost more than the rest of this room for the dozen routes we have.

There are two ways in. The long way is a handler for aiohttp's low-level server and takes everything. The short way is
for what arrives a thousand times a second, a plain POST of embeddings whose body is here: `wiring.connection` calls it
with the parsed head and the body, and writes what it returns. Which way it was, a caller cannot tell: both meet the
same checks in the same order, and one place decides the answer.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

import orjson
from aiohttp import web

from proxy.base.clock import Clock
from proxy.base.errors import DeadlineExceeded, EmbeddingError, InvalidRequest, UnknownRoute, WrongMethod
from proxy.base.events import Observer
from proxy.base.messages import Request, Response
from proxy.base.settings import shown
from proxy.edge import encode
from proxy.edge.accept.body import Bodies
from proxy.edge.accept.call import CLIENT_LEFT, Answer, Call, Service, defect
from proxy.edge.accept.peer import Peer
from proxy.edge.decode import content_type, decode, request_id, stated_timeout_s
from proxy.edge.decode.lists import TURN_BYTES, taken_out

EMBEDDINGS: Final = frozenset({"/v1/embeddings", "/embeddings"})
"""Paths that have a short way."""

SERVER = "embedding-sidecar"
"""Instead of aiohttp's, which tells its version to everybody."""


@dataclass(frozen=True, slots=True)
class Page:
    """An answer that somebody else has prepared: health, metrics, status."""

    status: int
    content_type: str
    body: bytes


_T = TypeVar("_T")
_Handler = Callable[[web.BaseRequest, Service, Call], Awaitable[Answer]]


class Accept:
    """What answers requests; it serves every listener."""

    def __init__(
        self,
        *,
        service: Callable[[], Service],
        pages: Mapping[str, Callable[[], Awaitable[Page]]],
        open_pages: frozenset[str],
        clock: Clock,
        observe: Observer,
    ) -> None:
        """
        Args:
            service: returns the pipeline in force; asked anew for each request, since a reload swaps it.
            pages: further GET routes.
            open_pages: those of them that need no client key.
            clock: where time comes from.
            observe: who is told when a request is over.
        """
        self._service = service
        self._pages = pages
        self._open_pages = open_pages
        self._clock = clock
        self._observe = observe
        self._bodies = Bodies(clock)
        self.is_draining = False
        """Once true, each answer tells its caller to close the connection."""
        self.requests_inside = 0
        # A random start and a counter: unique across restarts, and cheaper than a random number each time.
        start = os.urandom(5).hex()
        self._ids = (f"{start}-{n}" for n in itertools.count(1))
        self._routes: dict[str, dict[str, _Handler]] = {
            **{path: {"POST": self._embed} for path in EMBEDDINGS},
            "/v1/models": {"GET": self._models},
            "/models": {"GET": self._models},
            **{path: {"GET": self._page} for path in pages},
        }

    # --- the account of a request ---

    def begin(self, method: str, headers: Mapping[str, str], listener: str, path: str = "other") -> Call:
        """Open it when the head is here; `end()` closes it."""
        self.requests_inside += 1
        return Call(request_id(headers) or next(self._ids), listener, method, self._clock.now(), path)

    def end(self, call: Call) -> None:
        """Close it: the request is over, and its fact is told."""
        self.requests_inside -= 1
        self._observe(call.finished(self._clock.now()))

    def forget(self, call: Call) -> None:
        """Close it without a word: the request takes the long way after all, which opens one of its own."""
        self.requests_inside -= 1

    # --- the short way ---

    def awaits(self, call: Call, headers: Mapping[str, str], body_bytes: int, peer: Peer) -> bool:
        """Judge by its head whether a request's body may be waited for; else the long way tells at once why not."""
        service = self._service()
        try:
            call.caller = peer.admit(headers, service.listen, service.callers)
            _patience_s(headers, service)
        except EmbeddingError:
            return False
        return body_bytes <= service.listen.max_body_bytes

    def at_once(self, call: Call, headers: Mapping[str, str], body: bytes, peer: Peer) -> Answer | None:
        """
        Answer a POST of embeddings, if nobody has to be asked.

        Args:
            call: its account.
            headers: case-insensitive.
            body: all of it.
            peer: who asks.

        Returns:
            The answer, which may be an error; None when only `in_time()` can tell.
        """
        try:
            service = self._service()
            call.caller = peer.admit(headers, service.listen, service.callers)
            _patience_s(headers, service)
            self._bodies.insist(body, service.listen)
            call.body_bytes = len(body)
            response = service.known(self._decoded(call, body, headers, service))
            return None if response is None else self._embedded(call, response)
        except Exception as error:
            return self._refused(call, error)

    async def in_time(self, call: Call) -> Answer:
        """Answer a request that `at_once()` could not."""
        asked, service = call.asked, call.service
        assert asked is not None and service is not None
        try:
            return self._embedded(call, await service(asked.request))
        except Exception as error:
            return self._refused(call, error)

    async def taken(self, call: Call, writing: Awaitable[None]) -> bool:
        """
        Let an answer be written, within the time that a caller has to take it.

        Returns:
            Whether it was; else the connection is of no use any more.

        Raises:
            CancelledError: the caller has left.
        """
        limit_s = self._service().listen.write_timeout_s
        status, call.status = call.status, CLIENT_LEFT
        try:
            async with self._clock.timeout_at(self._clock.now() + limit_s):
                await writing
        except TimeoutError:
            call.error = DeadlineExceeded(
                f"the caller did not take its answer within {limit_s:g} s", code="write_timeout"
            )
        except ConnectionError:
            pass
        except Exception as error:
            call.status, call.error = 500, defect(error)
        else:
            call.status = status
            return True
        return False

    # --- the long way ---

    async def __call__(self, http: web.BaseRequest, *, listener: str) -> web.StreamResponse:
        """
        Answer one HTTP request of any kind.

        Args:
            http: the request; its body has not been read.
            listener: `unix` or `tcp`, where it came in.

        Raises:
            CancelledError, ConnectionError: the caller has left; nothing else.
        """
        call = self.begin(http.method, http.headers, listener)
        try:
            try:
                answer = await self._routed(http, call)
            except Exception as error:
                if isinstance(error, ConnectionError) and http.transport is None:
                    raise  # it broke off while its body was read
                answer = self._refused(call, error)
            return await self._sent(http, call, answer)
        finally:
            self.end(call)

    async def _routed(self, http: web.BaseRequest, call: Call) -> Answer:
        service = self._service()
        path = http.path
        methods = self._routes.get(path)
        if methods is None and path.startswith(("/v1/models/", "/models/")):
            call.path, methods = "/v1/models/{model}", {"GET": self._model}
        elif methods is not None:
            call.path = path
        peer = Peer(call.listener, http.transport)
        call.caller = peer.admit(http.headers, service.listen, service.callers, is_open=path in self._open_pages)
        if methods is None:
            raise UnknownRoute(f"no such path here: {shown(path)}; embeddings are at POST /v1/embeddings")
        handler = methods.get("GET" if http.method == "HEAD" else http.method)
        if handler is None:
            allowed = ("GET", "HEAD") if "GET" in methods else tuple(methods)
            raise WrongMethod(f"{call.path} takes {allowed[0]}, not {shown(http.method)}", allowed=allowed)
        return await handler(http, service, call)

    async def _sent(self, http: web.BaseRequest, call: Call, answer: Answer) -> web.StreamResponse:
        response: web.StreamResponse
        if answer.more is None:
            response = web.Response(status=answer.status, headers=answer.headers, body=answer.body)
        else:
            response = web.StreamResponse(status=answer.status, headers=answer.headers)
        if self.is_draining or not http.content.is_eof():
            # Unread bytes of a refused body would be taken for the next request.
            response.force_close()
        if not await self.taken(call, _written(http, call, answer, response)):
            if http.transport is not None:
                http.transport.abort()
            raise ConnectionResetError
        return response

    def malformed(self, listener: str) -> web.Response:
        """Answer what is no HTTP at all, which the server notices before there is a request to handle."""
        call = Call(next(self._ids), listener, "other", self._clock.now())
        answer = self._refused(call, InvalidRequest("this is not well-formed HTTP/1.1", code="malformed_http"))
        self._observe(call.finished(call.arrived))
        response = web.Response(status=answer.status, headers=answer.headers, body=answer.body)
        response.force_close()
        return response

    async def _embed(self, http: web.BaseRequest, service: Service, call: Call) -> Answer:
        headers = http.headers
        body = await self._bodies.read(http, service.listen, _patience_s(headers, service))
        call.body_bytes = len(body)
        lists: list[Any] = []
        if len(body) > TURN_BYTES:
            body, lists = await _in_turns(taken_out(body))
        # From here to the call nothing waits: the pipeline asked now is the one that serves, even beside a reload.
        service = self._service()
        return self._embedded(call, await service(self._decoded(call, body, headers, service, lists)))

    async def _models(self, http: web.BaseRequest, service: Service, call: Call) -> Answer:
        models = [_model_object(name, service) for name in service.catalogue.models]
        return self._answer(call, 200, {}, orjson.dumps({"object": "list", "data": models}))

    async def _model(self, http: web.BaseRequest, service: Service, call: Call) -> Answer:
        name, _ = service.catalogue.resolve(http.path.partition("/models/")[2])
        return self._answer(call, 200, {}, orjson.dumps(_model_object(name, service)))

    async def _page(self, http: web.BaseRequest, service: Service, call: Call) -> Answer:
        page = await self._pages[http.path]()
        return self._answer(call, page.status, {}, page.body, content_type=page.content_type)

    # --- both ways ---

    def _decoded(
        self, call: Call, body: bytes, headers: Mapping[str, str], service: Service, lists: Sequence[Any] = ()
    ) -> Request:
        call.service = service
        call.asked = asked = decode(
            body,
            headers,
            catalogue=service.catalogue,
            settings=service.request,
            request_id=call.request_id,
            caller=call.caller,
            now=call.arrived,
            lists=lists,
        )
        call.caller = asked.request.caller
        return asked.request

    def _embedded(self, call: Call, response: Response) -> Answer:
        """Decide how vectors go back."""
        asked = call.asked
        assert asked is not None
        call.response = response
        headers = {
            "X-Embedding-Cache": encode.cache(response),
            "X-Embedding-Space": asked.request.space,
            "Server-Timing": encode.timing(response.queue_s, response.upstream_s, self._clock.now() - call.arrived),
        }
        if response.upstream:
            headers["X-Embedding-Upstream"] = response.upstream
        if asked.truncated:
            headers["X-Embedding-Truncated"] = encode.truncated(asked.truncated)
        pieces = encode.pieces(response, base64=asked.base64, model=asked.model)
        first = next(pieces)
        second = next(pieces, None)
        more = None if second is None else itertools.chain((second,), pieces)
        return self._answer(call, 200, headers, first, more=more)

    def _refused(self, call: Call, error: Exception) -> Answer:
        """Decide how an error goes back."""
        call.error = error if isinstance(error, EmbeddingError) else defect(error)
        answer = encode.error_answer(call.error, call.asked.request.keys if call.asked else ())
        return self._answer(call, answer.status, answer.headers, answer.body)

    def _answer(
        self,
        call: Call,
        status: int,
        headers: dict[str, str],
        body: bytes,
        *,
        more: Iterator[bytes] | None = None,
        content_type: str = "application/json",
    ) -> Answer:
        headers["X-Request-Id"] = call.request_id
        headers["Content-Type"] = content_type
        headers["Server"] = SERVER
        call.status = status
        call.answer_bytes = len(body)
        return Answer(status, headers, body, more)


async def _written(http: web.BaseRequest, call: Call, answer: Answer, response: web.StreamResponse) -> None:
    await response.prepare(http)
    if answer.more is not None:
        await response.write(answer.body)
        for piece in answer.more:
            await asyncio.sleep(0)  # write() waits only when the socket is full: let others have the loop
            await response.write(piece)
            call.answer_bytes += len(piece)
    await response.write_eof()


async def _in_turns(steps: Generator[None, None, _T]) -> _T:
    """Let others have their turn between any two steps."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast(_T, end.value)
        await asyncio.sleep(0)


def _patience_s(headers: Mapping[str, str], service: Service) -> float:
    """
    Return how long a body is waited for: no longer than its caller waits for the answer.

    Raises:
        InvalidRequest, WrongContentType: the head makes no sense, so that there is nothing to wait for.
    """
    content_type(headers.get("Content-Type", ""), headers.get("Content-Encoding", ""))
    stated_s = stated_timeout_s(headers, service.request)
    return service.listen.body_timeout_s if stated_s is None else min(stated_s, service.listen.body_timeout_s)


def _model_object(name: str, service: Service) -> dict[str, object]:
    model = service.catalogue.models[name]
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": ", ".join(model.upstreams),
        "aliases": list(model.aliases),
        "dimensions": list(service.catalogue.widths(name)),
    }
