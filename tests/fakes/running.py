"""
The whole proxy in the test's own loop: real sockets, real settings, real upstreams; only the process is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from proxy.wiring.lifecycle import Lifecycle
from proxy.wiring.pipeline import Pipeline
from proxy.wiring.server import Listener


class Running:
    """A proxy that serves, with a client for each of its listeners."""

    lifecycle: Lifecycle
    pipeline: Pipeline
    path: Path
    address: str
    socket_path: str
    tcp: aiohttp.ClientSession
    unix: aiohttp.ClientSession

    async def embed(
        self, body: Any, *, headers: Mapping[str, str] | None = None, is_unix: bool = False
    ) -> tuple[int, Any, Any]:
        """Post to /v1/embeddings; returns status, document and headers."""
        session = self.unix if is_unix else self.tcp
        async with session.post("/v1/embeddings", json=body, headers=headers) as answer:
            return answer.status, await answer.json(), answer.headers

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.tcp.get(path) as answer:
            return answer.status, await (answer.json() if "json" in answer.content_type else answer.text())


@contextlib.asynccontextmanager
async def running(folder: Path, toml: str, environ: Mapping[str, str] | None = None) -> AsyncIterator[Running]:
    """Start a proxy, yield it when its first canaries are back, and drain it."""
    proxy = Running()
    proxy.path = folder / "settings.toml"
    proxy.path.write_text(toml, encoding="utf-8")
    greeted: asyncio.Future[tuple[list[Listener], Pipeline]] = asyncio.get_running_loop().create_future()
    variables = {
        "EMBEDDING_SIDECAR__LISTEN__SOCKET": str(folder / "s.sock"),
        "EMBEDDING_SIDECAR__LISTEN__TCP": "127.0.0.1:0",
        **(environ or {}),
    }
    proxy.lifecycle = Lifecycle(
        str(proxy.path), variables, greet=lambda listeners, pipeline: greeted.set_result((listeners, pipeline))
    )
    run = asyncio.create_task(proxy.lifecycle.run())
    done, _ = await asyncio.wait({run, greeted}, return_when=asyncio.FIRST_COMPLETED, timeout=30)
    if run in done:
        run.result()
    listeners, proxy.pipeline = await greeted
    addresses = {listener.name: listener.address for listener in listeners}
    proxy.address, proxy.socket_path = addresses["tcp"], addresses["unix"]
    limit = aiohttp.ClientTimeout(total=30)
    async with (
        aiohttp.ClientSession(f"http://{proxy.address}", timeout=limit) as proxy.tcp,
        aiohttp.ClientSession(
            "http://localhost", connector=aiohttp.UnixConnector(proxy.socket_path), timeout=limit
        ) as proxy.unix,
    ):
        yield proxy
    proxy.lifecycle.stop(is_hasty=True)
    await run
