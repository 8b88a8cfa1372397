"""
Who serves a socket, and is it ready? Asked of `/readyz`, by hand: supervision needs no HTTP library.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass

from rag_adapter.address import Address, insist_on_ours, unreachable
from rag_adapter.errors import SidecarUnavailable

ANSWER_S = 2.0
"""A proxy that is alive answers this in a millisecond, whatever else it has to do."""

_ANSWER_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Answer:
    """What was heard on the socket."""

    status: int
    """Of /readyz: 200 or 503; 0 when somebody listens and says nothing."""
    detail: str = ""
    """Why it is not ready."""
    problem: SidecarUnavailable | None = None
    """Why it cannot even be asked: no rights, no file descriptors."""


async def ask(path: str, timeout_s: float = ANSWER_S) -> Answer | None:
    """Ask who listens on a socket whether it is ready; None when nobody listens."""
    try:
        insist_on_ours(Address(path=path))
    except SidecarUnavailable as error:
        return Answer(0, error.message, error)
    try:
        async with asyncio.timeout(timeout_s):
            raw = await _got(path)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return None
    except (TimeoutError, ConnectionError):
        return Answer(0, "no answer")
    except OSError as error:
        problem = unreachable(Address(path=path), error)
        return Answer(0, problem.message, problem)
    head, _, body = raw.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if len(words) < 2 or not words[1].isdigit():
        return Answer(0, "no answer")
    status = int(words[1])
    return Answer(status, "" if status == 200 else _reasons(body) or f"HTTP {status}")


async def _got(path: str) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        raw = b""
        while len(raw) < _ANSWER_BYTES and (piece := await reader.read(65_536)):
            raw += piece
        return raw
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _reasons(body: bytes) -> str:
    """Return why the proxy is not ready, in its own words; nothing if these are not its own."""
    try:
        return "; ".join(map(str, json.loads(body)["reasons"]))
    except (ValueError, TypeError, LookupError):
        return ""
