"""The example as people start it: a process of its own, spoken to over HTTP, ended by its id."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
LIMIT_S = 60.0
"""What takes longer on a busy machine has failed."""
_PAUSE_S = 0.02

_URL = re.compile(r"A RAG service at (http://\S+), with")


@dataclass
class Answer:
    """What the service answered."""

    status: int
    headers: Mapping[str, str]
    document: Any

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document["error"]
        return found

    @property
    def found_in(self) -> list[str]:
        """The documents that a search has led to."""
        return [passage["document"] for passage in self.document["passages"]]


class Service:
    """`async with Service(folder, …) as service:` is ready."""

    def __init__(self, folder: str, documents: tuple[str, ...] = (), **environ: str) -> None:
        """
        Args:
            folder: a short path, for sockets and data.
            documents: files to take in at the start.
            environ: variables beside those that keep it off this machine's own sidecar and database.
        """
        self._documents = documents
        self._environ = {
            "RAG_FOLDER": f"{folder}/rag",
            "EMBEDDING_SIDECAR_SOCKET": f"{folder}/sidecar.sock",
            **environ,
        }
        self._lines: list[str] = []

    async def __aenter__(self) -> Service:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("EMBEDDING_", "OPENAI_", "OTEL_", "RAG_", "DATABASE_URL"))
        }
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rag_service", "--port", "0", *self._documents),
            env={**inherited, "PYTHONPATH": str(EXAMPLES), **self._environ},
            cwd=EXAMPLES,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._reader = asyncio.create_task(self._read())
        try:
            self.greeting = await self._greeted()
        except BaseException:
            await self._end()
            raise
        found = _URL.search(self.greeting)
        assert found
        self.url = found[1]
        self.session = aiohttp.ClientSession(self.url, timeout=aiohttp.ClientTimeout(total=LIMIT_S))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()
        await self._end()

    async def _end(self) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(LIMIT_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
            raise
        finally:
            await self._reader

    async def _read(self) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            self._lines.append(line.decode())

    async def _greeted(self) -> str:
        async with asyncio.timeout(LIMIT_S):
            while "Ctrl-C" not in self.output:
                if self.process.returncode is not None:
                    raise RuntimeError(f"the service ended with {self.process.returncode}: {self.output}")
                await asyncio.sleep(_PAUSE_S)
        return self.output

    @property
    def output(self) -> str:
        """Everything that it has written."""
        return "".join(self._lines)

    def kill(self) -> None:
        """End it as the kernel does when memory is short."""
        self.process.kill()

    # --- HTTP ---

    async def get(self, path: str, *, headers: Mapping[str, str] | None = None, **params: str) -> Answer:
        async with self.session.get(path, params=params, headers=headers) as answer:
            return await _read(answer)

    async def search(self, question: str, *, headers: Mapping[str, str] | None = None, limit: int = 5) -> Answer:
        return await self.get("/search", headers=headers, q=question, limit=str(limit))

    async def take_in(self, headers: Mapping[str, str] | None = None, **documents: str) -> Answer:
        body = {"documents": [{"name": name, "text": text} for name, text in documents.items()]}
        async with self.session.post("/documents", json=body, headers=headers) as answer:
            return await _read(answer)

    async def states(self) -> dict[str, str]:
        """Return the state of each service, by /health."""
        return {name: service["state"] for name, service in (await self.get("/health")).document["services"].items()}

    async def proxy(self) -> dict[str, Any]:
        """Return what the service says of the proxy that is its child."""
        found: dict[str, Any] = (await self.get("/health")).document["services"]["embeddings"]["sidecar"]
        return found


async def _read(answer: aiohttp.ClientResponse) -> Answer:
    return Answer(answer.status, answer.headers, json.loads(await answer.read()))


async def until(look: Callable[[], Awaitable[T]], is_there: Callable[[T], bool]) -> T:
    """Look again and again until it is there; returns what was seen then."""
    async with asyncio.timeout(LIMIT_S):
        while not is_there(seen := await look()):
            await asyncio.sleep(_PAUSE_S)
        return seen


def is_running(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
