"""
Continuous load that looks at every answer: pooled, fresh and patient callers on both listeners.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from typing import Any

import aiohttp
import numpy

from tests.fakes.upstream import vector

PAUSE_S = 0.002


class Load:
    """`async with Load(...) as load:` runs until the block ends; `load.failures` says what went wrong."""

    def __init__(self, address: str, socket_path: str, *, width: int = 8, model: str = "m") -> None:
        self._address = address
        self._socket_path = socket_path
        self._width = width
        self._model = model
        self._numbers = itertools.count()
        self._stopping = False
        self.answered: Counter[str] = Counter()
        self.failures: list[str] = []

    async def __aenter__(self) -> Load:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        for _ in range(4):
            self._group.create_task(self._pooled("tcp"))
            self._group.create_task(self._pooled("unix"))
        self._group.create_task(self._fresh("tcp"))
        self._group.create_task(self._fresh("unix"))
        # These never look for the end of the stream before they send: what they lose, the proxy has lost.
        self._group.create_task(self._bare("tcp"))
        self._group.create_task(self._bare("unix"))
        return self

    async def __aexit__(self, *failure: Any) -> None:
        self._stopping = True
        await self._group.__aexit__(*failure)

    async def more(self, count: int) -> None:
        """Let `count` further requests be answered; fails after 30 s."""
        goal = self.answered.total() + count
        async with asyncio.timeout(30):
            while self.answered.total() < goal and not self.failures:
                await asyncio.sleep(0.005)

    def _session(self, listener: str) -> aiohttp.ClientSession:
        if listener == "tcp":
            return aiohttp.ClientSession(f"http://{self._address}")
        return aiohttp.ClientSession("http://localhost", connector=aiohttp.UnixConnector(self._socket_path))

    async def _pooled(self, listener: str) -> None:
        async with self._session(listener) as session:
            while not self._stopping:
                await self._asked(f"pooled {listener}", session)
                await asyncio.sleep(PAUSE_S)

    async def _fresh(self, listener: str) -> None:
        while not self._stopping:
            async with self._session(listener) as session:
                await self._asked(f"fresh {listener}", session)
            await asyncio.sleep(PAUSE_S)

    async def _asked(self, kind: str, session: aiohttp.ClientSession) -> None:
        text = f"load {next(self._numbers)}"
        try:
            async with session.post("/v1/embeddings", json={"input": text, "model": self._model}) as answer:
                self._judge(kind, text, answer.status, await answer.read())
        except (aiohttp.ClientError, OSError) as error:
            self.failures.append(f"{kind}: {error!r}")

    async def _bare(self, listener: str) -> None:
        """One connection, kept as long as the proxy does not say `Connection: close`."""
        reader = writer = None
        while not self._stopping:
            text = f"load {next(self._numbers)}"
            body = json.dumps({"input": text, "model": self._model}).encode()
            try:
                if writer is None:
                    if listener == "tcp":
                        reader, writer = await asyncio.open_connection(*self._address.split(":"))
                    else:
                        reader, writer = await asyncio.open_unix_connection(self._socket_path)
                assert reader is not None
                writer.write(
                    b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
                )
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.split("content-length: ")[1].split("\r\n")[0])
                self._judge(f"bare {listener}", text, int(head.split(" ")[1]), await reader.readexactly(length))
                if "connection: close" in head:
                    writer.close()
                    writer = None
            except (OSError, EOFError, IndexError) as error:
                self.failures.append(f"bare {listener}: {error!r}")
                writer = None
            await asyncio.sleep(0.05)
        if writer is not None:
            writer.close()

    def _judge(self, kind: str, text: str, status: int, body: bytes) -> None:
        if status != 200:
            self.failures.append(f"{kind}: {status} {body[:300]!r}")
            return
        found = numpy.array(json.loads(body)["data"][0]["embedding"], dtype="<f4")
        if (found != vector(text, self._width)).any():
            self.failures.append(f"{kind}: wrong vector")
        self.answered[kind] += 1
