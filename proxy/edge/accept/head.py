"""
The head of an answer as bytes, as aiohttp would spell it.

Pure but for the date. Values come from closed sets, from the settings or from us; the one that a caller chooses, its
request id, is visible ASCII (`decode.request_id`), so nothing can begin a line of its own.
"""

from __future__ import annotations

import time
from email.utils import formatdate
from http import HTTPStatus

from proxy.edge.accept.call import Answer

LAST_CHUNK = b"0\r\n\r\n"

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}


def opening(answer: Answer, *, is_closing: bool) -> tuple[bytes, ...]:
    """
    Spell status line, headers and the first piece of an answer to an HTTP/1.1 request.

    Args:
        answer: with pieces to come it goes out in chunks (RFC 9112 §7.1), else with its length.
        is_closing: whether the connection is closed behind it.

    Returns:
        Its parts; joined, a large body would be copied.
    """
    line = _STATUS_LINES.get(answer.status) or f"HTTP/1.1 {answer.status} \r\n"
    fields = "".join([f"{name}: {value}\r\n" for name, value in answer.headers.items()])
    length = f"Content-Length: {len(answer.body)}" if answer.more is None else "Transfer-Encoding: chunked"
    close = "Connection: close\r\n" if is_closing else ""
    head = f"{line}{fields}{length}\r\nDate: {_date()}\r\n{close}\r\n".encode()
    if answer.more is None:
        return head, answer.body
    return b"%b%x\r\n" % (head, len(answer.body)), answer.body, b"\r\n"


def chunk(piece: bytes) -> bytes:
    """Spell one piece of an answer that goes out in chunks."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


_second, _spelled = 0, ""


def _date() -> str:
    """Return the value of `Date`; it is spelled once a second."""
    global _second, _spelled
    if (second := int(time.time())) != _second:
        _second, _spelled = second, formatdate(second, usegmt=True)
    return _spelled
