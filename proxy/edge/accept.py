"""
The caller's HTTP: one handler for aiohttp's low-level server.

It names the route, checks who may come in, reads the body within its bounds, lets `decode` and `encode` do the
spelling, hands the request to the pipeline, writes the answer, and states one fact per request. aiohttp's Application
is left out: its router, middlewares and signals cost more than the rest of this file for the dozen routes we have.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import os
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import orjson
from aiohttp import web

from proxy.base.clock import Clock
from proxy.base.errors import (
    DeadlineExceeded,
    EmbeddingError,
    Forbidden,
    InvalidRequest,
    Overloaded,
    SlowBody,
    TooLarge,
    Unauthorized,
    UnknownRoute,
    WrongMethod,
)
from proxy.base.events import Observer, RequestFinished
from proxy.base.messages import Request, Response
from proxy.base.settings import CallerSettings, Catalogue, ListenSettings, RequestSettings, shown
from proxy.edge import encode
from proxy.edge.decode import Asked, content_type, decode, request_id, stated_timeout_s

CLIENT_LEFT = 499
"""What nginx logs when the caller was gone before the answer; it never goes over the wire."""

SERVER = "embedding-sidecar"
"""Instead of aiohttp's, which tells its version to everybody."""

_BEARER = re.compile(r"^bearer +", re.IGNORECASE)  # RFC 9110 §11.1: schemes know no case
_LOOPBACK = re.compile(r"localhost\.?|127(\.\d{1,3}){3}|\[::1\]")

_PEERCRED = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Page:
    """An answer that somebody else has prepared: health, metrics, status."""

    status: int
    content_type: str
    body: bytes


class Service(Protocol):
    """The pipeline of this moment, and the settings that it was built with."""

    catalogue: Catalogue
    listen: ListenSettings
    request: RequestSettings
    callers: Mapping[str, CallerSettings]

    async def __call__(self, request: Request) -> Response: ...


@dataclass(slots=True)
class _Facts:
    """What is learned of a request on its way, for the one fact told at its end."""

    request_id: str
    listener: str
    path: str = "other"
    status: int = 0
    caller: str = ""
    body_bytes: int = 0
    answer_bytes: int = 0
    error: EmbeddingError | None = None
    asked: Asked | None = None
    response: Response | None = None


_Handler = Callable[[web.BaseRequest, Service, _Facts], Awaitable[web.StreamResponse]]


class Accept:
    """The handler; it serves every listener."""

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
        self.is_draining = False
        """Once true, each answer tells its caller to close the connection."""
        self.requests_inside = 0
        self._body_bytes = 0
        # A random start and a counter: unique across restarts, and cheaper than a random number each time.
        start = os.urandom(5).hex()
        self._ids = (f"{start}-{n}" for n in itertools.count(1))
        self._routes: dict[str, dict[str, _Handler]] = {
            "/v1/embeddings": {"POST": self._embed},
            "/embeddings": {"POST": self._embed},
            "/v1/models": {"GET": self._models},
            "/models": {"GET": self._models},
            **{path: {"GET": self._page} for path in pages},
        }

    async def __call__(self, http: web.BaseRequest, *, listener: str) -> web.StreamResponse:
        """
        Answer one HTTP request.

        Args:
            http: the request; its body has not been read.
            listener: `unix` or `tcp`, where it came in.

        Raises:
            CancelledError, ConnectionError: the caller has left; nothing else.
        """
        arrived = self._clock.now()
        facts = _Facts(request_id(http.headers) or next(self._ids), listener)
        self.requests_inside += 1
        try:
            return await self._answered(http, facts)
        except (asyncio.CancelledError, ConnectionError):
            facts.status = CLIENT_LEFT
            raise
        finally:
            self.requests_inside -= 1
            self._tell(http.method, facts, self._clock.now() - arrived)

    async def _answered(self, http: web.BaseRequest, facts: _Facts) -> web.StreamResponse:
        try:
            return await self._route(http, facts)
        except EmbeddingError as error:
            facts.error = error
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception as error:
            # A bug of ours. Its message may quote a caller's text, so only its place is told.
            facts.error = EmbeddingError(f"internal error {type(error).__name__} at {_place(error)}")
        answer = encode.error_answer(facts.error, facts.asked.request.keys if facts.asked else ())
        return await self._send(http, facts, answer.status, answer.headers, answer.body)

    def malformed(self, listener: str) -> web.Response:
        """Answer what is no HTTP at all, which the server notices before there is a request to handle."""
        error = InvalidRequest("this is not well-formed HTTP/1.1", code="malformed_http")
        answer = encode.error_answer(error)
        facts = _Facts(next(self._ids), listener, status=answer.status, answer_bytes=len(answer.body), error=error)
        self._tell("other", facts, 0.0)
        headers = {"X-Request-Id": facts.request_id, "Content-Type": "application/json", "Server": SERVER}
        response = web.Response(status=answer.status, headers=answer.headers | headers, body=answer.body)
        response.force_close()
        return response

    # --- routes ---

    async def _route(self, http: web.BaseRequest, facts: _Facts) -> web.StreamResponse:
        service = self._service()
        path = http.path
        methods = self._routes.get(path)
        if methods is None and path.startswith(("/v1/models/", "/models/")):
            facts.path, methods = "/v1/models/{model}", {"GET": self._model}
        elif methods is not None:
            facts.path = path
        if facts.listener == "tcp" and not service.callers:
            _refuse_strange_host(http.headers.get("Host", ""))
        if path not in self._open_pages:
            facts.caller = _caller(http, service, facts.listener)
        if methods is None:
            raise UnknownRoute(f"no such path here: {shown(path)}; embeddings are at POST /v1/embeddings")
        handler = methods.get("GET" if http.method == "HEAD" else http.method)
        if handler is None:
            allowed = ("GET", "HEAD") if "GET" in methods else tuple(methods)
            raise WrongMethod(f"{facts.path} takes {allowed[0]}, not {shown(http.method)}", allowed=allowed)
        return await handler(http, service, facts)

    async def _embed(self, http: web.BaseRequest, service: Service, facts: _Facts) -> web.StreamResponse:
        arrived = self._clock.now()
        content_type(http.headers.get("Content-Type", ""), http.headers.get("Content-Encoding", ""))
        body = await self._body(http, service)
        facts.body_bytes = len(body)
        # From here to the call nothing waits: the pipeline asked now is the one that serves, even beside a reload.
        service = self._service()
        asked = decode(
            body,
            http.headers,
            catalogue=service.catalogue,
            settings=service.request,
            request_id=facts.request_id,
            caller=facts.caller,
            now=arrived,
        )
        facts.asked, facts.caller = asked, asked.request.caller
        del body
        facts.response = response = await service(asked.request)
        headers = {
            "X-Embedding-Cache": encode.cache(response),
            "X-Embedding-Space": asked.request.space,
            "Server-Timing": encode.timing(response.queue_s, response.upstream_s, self._clock.now() - arrived),
        }
        if response.upstream:
            headers["X-Embedding-Upstream"] = response.upstream
        if asked.truncated:
            headers["X-Embedding-Truncated"] = encode.truncated(asked.truncated)
        pieces = encode.pieces(response, base64=asked.base64, model=asked.model)
        first = next(pieces)
        return await self._send(http, facts, 200, headers, first, more=pieces)

    async def _models(self, http: web.BaseRequest, service: Service, facts: _Facts) -> web.StreamResponse:
        models = [_model_object(name, service) for name in service.catalogue.models]
        return await self._send(http, facts, 200, {}, orjson.dumps({"object": "list", "data": models}))

    async def _model(self, http: web.BaseRequest, service: Service, facts: _Facts) -> web.StreamResponse:
        name, _ = service.catalogue.resolve(http.path.partition("/models/")[2])
        return await self._send(http, facts, 200, {}, orjson.dumps(_model_object(name, service)))

    async def _page(self, http: web.BaseRequest, service: Service, facts: _Facts) -> web.StreamResponse:
        page = await self._pages[http.path]()
        return await self._send(http, facts, page.status, {}, page.body, content_type=page.content_type)

    # --- reading and writing ---

    async def _body(self, http: web.BaseRequest, service: Service) -> bytes:
        """Read the body, bounded in bytes (whatever its head claims, and with all others) and in time."""
        listen = service.listen
        bound = listen.max_body_bytes
        stated_s = stated_timeout_s(http.headers, service.request)
        patience_s = listen.body_timeout_s if stated_s is None else min(stated_s, listen.body_timeout_s)
        if (http.content_length or 0) > bound:
            raise TooLarge(f"the body has {http.content_length} bytes, the bound is {bound}")
        if http.headers.get("Expect", "").lower() == "100-continue" and http.transport is not None:
            # curl waits a second for this before it sends a larger body (RFC 9110 §10.1.1).
            http.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        chunks: list[bytes] = []
        size = 0
        content = http.content
        try:
            async with self._clock.timeout_at(self._clock.now() + patience_s):
                while chunk := await content.readany():
                    chunks.append(chunk)
                    size += len(chunk)
                    self._body_bytes += len(chunk)
                    if size > bound:
                        raise TooLarge(f"the body has more than {bound} bytes, the bound")
                    if self._body_bytes > listen.max_bodies_bytes:
                        all_of_them = f"all bodies being read have more than {listen.max_bodies_bytes} bytes, the bound"
                        raise Overloaded(all_of_them, retry_after_s=1.0)
        except TimeoutError:
            raise SlowBody(f"the body did not arrive within {patience_s:g} s; {size} bytes were there") from None
        except web.RequestPayloadError as error:
            raise InvalidRequest("the body broke off or is not well-formed HTTP", code="invalid_body") from error
        finally:
            self._body_bytes -= size
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _send(
        self,
        http: web.BaseRequest,
        facts: _Facts,
        status: int,
        headers: dict[str, str],
        body: bytes,
        *,
        more: Iterator[bytes] | None = None,
        content_type: str = "application/json",
    ) -> web.StreamResponse:
        """Write the whole answer, within the time that a caller has to take it."""
        headers |= {"X-Request-Id": facts.request_id, "Content-Type": content_type, "Server": SERVER}
        more = more or iter(())
        piece = next(more, None)
        answer: web.StreamResponse
        if piece is None:
            answer = web.Response(status=status, headers=headers, body=body)
        else:
            answer = web.StreamResponse(status=status, headers=headers)
        if self.is_draining or not http.content.is_eof():
            # Unread bytes of a refused body would be taken for the next request.
            answer.force_close()
        facts.status = status
        facts.answer_bytes = len(body)
        limit_s = self._service().listen.write_timeout_s
        try:
            async with self._clock.timeout_at(self._clock.now() + limit_s):
                await answer.prepare(http)
                if piece is not None:
                    await answer.write(body)
                while piece is not None:
                    await asyncio.sleep(0)  # write() waits only when the socket is full: let others have the loop
                    await answer.write(piece)
                    facts.answer_bytes += len(piece)
                    piece = next(more, None)
                await answer.write_eof()
        except TimeoutError:
            facts.error = DeadlineExceeded(
                f"the caller did not take its answer within {limit_s:g} s", code="write_timeout"
            )
            if http.transport is not None:
                http.transport.abort()
            raise ConnectionResetError from None
        return answer

    def _tell(self, method: str, facts: _Facts, total_s: float) -> None:
        asked, response, error = facts.asked, facts.response, facts.error
        request = asked.request if asked else None
        self._observe(
            RequestFinished(
                request_id=facts.request_id,
                listener=facts.listener,
                method=method if method in ("GET", "POST", "HEAD") else "other",
                path=facts.path,
                status=facts.status,
                total_s=total_s,
                code=error.label if error else ("" if facts.status != CLIENT_LEFT else "client_left"),
                message=error.message if error else "",
                caller=facts.caller,
                model=request.spec.model if request else "",
                priority=request.priority if request else "",
                inputs=len(request.inputs) if request else 0,
                hits=response.hits if response else 0,
                tokens=response.tokens if response else 0,
                upstream=response.upstream if response else error.upstream if error else "",
                attempts=response.attempts if response else 0,
                queue_s=response.queue_s if response else 0.0,
                upstream_s=response.upstream_s if response else 0.0,
                trace_id=request.traceparent[3:35] if request and request.traceparent else "",
                body_bytes=facts.body_bytes,
                answer_bytes=facts.answer_bytes,
            )
        )


# --- who asks ---


def _refuse_strange_host(host: str) -> None:
    """
    Insist that a caller without a key means this machine.

    A web page can make its own name point to 127.0.0.1 and then post to us as to itself (DNS rebinding); the name is
    still in `Host`. An HTTP/1.0 caller without the header is no browser.
    """
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    if name and not _LOOPBACK.fullmatch(name.lower()):
        raise Forbidden(
            f"host {shown(host)} is not this machine; without client keys only localhost and loopback addresses are",
            code="host_not_allowed",
        )


def _caller(http: web.BaseRequest, service: Service, listener: str) -> str:
    """
    Name the caller, or refuse it.

    The cases: (1) the Unix socket: the peer's uid, which has to be an allowed one where such are set; (2) keys are
    configured and one of them was shown: its owner, on every listener; (3) TCP with keys configured, and none or a
    wrong one shown: refused; (4) TCP without keys: loopback, anybody on this machine. On the Unix socket the file's
    mode guards the door, so a key that nobody knows is what SDKs make up, and no matter.
    """
    if listener == "unix":
        uid = _peer_uid(http)
        allowed = service.listen.allowed_uids
        if allowed and uid not in allowed:
            raise Forbidden(f"uid {uid} is not among listen.allowed_uids")
    if service.callers:
        key = _BEARER.sub("", http.headers.get("Authorization", "")) or http.headers.get("api-key", "")
        if owner := _key_owner(key, service.callers):
            return owner
        if listener == "tcp":
            problem = "this client key is none of the configured ones" if key else "this listener needs a client key"
            raise Unauthorized(f"{problem}: send 'Authorization: Bearer <key>'")
    return f"uid:{uid}" if listener == "unix" else "loopback"


def _key_owner(key: str, callers: Mapping[str, CallerSettings]) -> str:
    """Return whose key it is; empty when it is nobody's."""
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
    owner = ""
    for name, caller in callers.items():  # all of them, so that the time taken tells nothing
        if hmac.compare_digest(digest, caller.key_sha256.lower()):
            owner = name
    return owner


def _peer_uid(http: web.BaseRequest) -> int | None:
    peer = http.transport.get_extra_info("socket") if http.transport else None
    if peer is None:
        return None
    _, uid, _ = _PEERCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    return int(uid)


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


def _place(error: BaseException) -> str:
    """Name the innermost line of ours."""
    trace, place = error.__traceback__, "?"
    while trace is not None:
        code = trace.tb_frame.f_code
        place = f"{os.path.basename(code.co_filename)}:{trace.tb_lineno} {code.co_name}"
        trace = trace.tb_next
    return place
