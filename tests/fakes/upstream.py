"""
A real upstream on loopback that speaks OpenAI's dialect, Ollama's or TEI's, by the path, and misbehaves on command.

Its vectors are made of the input alone, so a test can say for each answer whether it is the right one.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
from aiohttp import web

from proxy.upstream.balance.canary import CANARIES


def vector(item: Any, width: int) -> numpy.ndarray:
    """Return the one right vector of an input: unit length, float32, from the digest of its JSON."""
    seed = hashlib.sha256(json.dumps(item).encode()).digest()
    numbers = numpy.random.default_rng(list(seed)).standard_normal(width).astype("<f4")
    return (numbers / numpy.linalg.norm(numbers)).astype("<f4")


@dataclass
class Seen:
    """A request as it arrived."""

    body: dict[str, Any]
    headers: dict[str, str]
    path: str

    @property
    def inputs(self) -> list[Any]:
        given = self.body["inputs" if "inputs" in self.body else "input"]
        return given if isinstance(given, list) else [given]


@dataclass
class Fault:
    """What becomes of one request instead of a right answer; the first that is set counts, in this order."""

    wait_for: asyncio.Event | None = None
    """Wait for this before anything else."""
    hang: bool = False
    """Never answer."""
    reset: bool = False
    """Reset the connection without an answer."""
    raw: bytes | None = None
    """Write these bytes, which need not be HTTP, then close."""
    cut_body: bool = False
    """Send half of the body, then close."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    """Answer with this (JSON, or bytes as they are)."""
    change: Callable[[Any], Any] | None = None
    """Change the right answer."""


OK = Fault()


class FakeUpstream:
    """`async with FakeUpstream() as upstream:` serves at `upstream.base_url`."""

    def __init__(self, *, width: int = 8, has_base64: bool = True, keepalive_s: float = 75.0, tls: Any = None) -> None:
        self.width = width
        self.seen: list[Seen] = []
        self.script: list[Fault] = []
        """Faults of the next requests, in order; when it is empty, `always` counts."""
        self.always = OK
        self.poison: dict[str, Fault] = {}
        """By input, what becomes of each request that holds it, unless a fault stands in the script."""
        self.inside = 0
        self.most_inside = 0
        self.connections: set[Any] = set()
        self.spare_canary = True
        """The proxy's canary is answered rightly and not counted, whatever the script says."""
        self._has_base64 = has_base64
        self._keepalive_s = keepalive_s
        self._tls = tls

    async def __aenter__(self) -> FakeUpstream:
        self._server = web.Server(self._handle, keepalive_timeout=self._keepalive_s, handler_cancellation=True)
        self._runner = web.ServerRunner(self._server, shutdown_timeout=0.1)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await self._site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def root_url(self) -> str:
        """Where Ollama's and TEI's own routes begin."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return f"{self.root_url}/v1"

    def hang_up(self) -> None:
        """Close all connections; the other side finds out when the loop turns."""
        for connection in self.connections:
            connection.close()

    def toml(self, *, kind: str = "openai", upstream: str = "", **model: Any) -> str:
        """Settings of a proxy that has this for its only upstream, with `upstream` as further lines, and model `m`."""
        lines = [f"{key} = {json.dumps(value)}" for key, value in model.items()]
        return "\n".join(
            [
                "[upstreams.fake]",
                f'kind = "{kind}"',
                *(['profile = "openai"'] if kind == "openai" else []),
                f'base_url = "{self.base_url if kind == "openai" else self.root_url}"',
                upstream,
                "[models.m]",
                'upstreams = ["fake"]',
                *lines,
                "",
            ]
        )

    def answer(self, body: dict[str, Any], path: str = "/v1/embeddings") -> Any:
        """Return the right answer to a request, in the dialect of its path."""
        given = body["inputs" if path == "/embed" else "input"]
        inputs = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        width = body.get("dimensions", self.width)
        is_base64 = self._has_base64 and body.get("encoding_format") == "base64"
        rows = [vector(item, width) for item in inputs]
        if path == "/embed":
            return [[float(x) for x in row] for row in rows]
        if path == "/api/embed":
            embeddings = [[float(x) for x in row] for row in rows]
            return {"model": body["model"], "embeddings": embeddings, "prompt_eval_count": self._tokens(inputs)}
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(row.tobytes()).decode() if is_base64 else [float(x) for x in row],
            }
            for index, row in enumerate(rows)
        ]
        tokens = self._tokens(inputs)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": body["model"], "usage": usage}

    def _tokens(self, inputs: list[Any]) -> int:
        return sum(len(str(item)) for item in inputs)

    def _headers(self, seen: Seen) -> dict[str, str]:
        """Return what stands beside a right answer: TEI counts tokens there."""
        return {"x-compute-tokens": str(self._tokens(seen.inputs))} if seen.path == "/embed" else {}

    async def _handle(self, http: web.BaseRequest) -> web.StreamResponse:
        body = json.loads(await http.read())
        self.connections.add(http.transport)
        seen = Seen(body, dict(http.headers), http.path)
        if self.spare_canary and set(map(str, seen.inputs)) <= set(CANARIES):
            return web.json_response(self.answer(body, http.path), headers=self._headers(seen))
        self.seen.append(seen)
        fault = self.script.pop(0) if self.script else self._poisoned(seen)
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            return await self._faulty(http, seen, fault)
        finally:
            self.inside -= 1

    def _poisoned(self, seen: Seen) -> Fault:
        if not self.poison:
            return self.always
        return next((self.poison[item] for item in seen.inputs if item in self.poison), self.always)

    async def _faulty(self, http: web.BaseRequest, seen: Seen, fault: Fault) -> web.StreamResponse:
        assert http.transport is not None
        if fault.wait_for is not None:
            await fault.wait_for.wait()
        if fault.hang:
            await asyncio.Event().wait()
        if fault.reset:
            http.transport.abort()
            raise ConnectionResetError
        if fault.raw is not None:
            http.transport.write(fault.raw)  # type: ignore[attr-defined]
            http.transport.close()
            raise ConnectionResetError
        if fault.status != 200 or fault.body is not None:
            given = fault.body if isinstance(fault.body, bytes) else json.dumps(fault.body).encode()
            return web.Response(status=fault.status, headers=fault.headers, body=given)
        answer = self.answer(seen.body, seen.path)
        if fault.change is not None:
            answer = fault.change(answer)
        spelled = json.dumps(answer).encode()
        if fault.cut_body:
            response = web.StreamResponse(headers={"Content-Length": str(len(spelled))})
            await response.prepare(http)
            await response.write(spelled[: len(spelled) // 2])
            http.transport.abort()
            raise ConnectionResetError
        return web.Response(headers={**self._headers(seen), **fault.headers}, body=spelled)
