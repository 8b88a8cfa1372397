"""Heads as bytes. That they are aiohttp's to the byte is shown where both meet: tests/wiring/test_connection.py."""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime
from time import time

import pytest

from proxy.edge.accept.call import Answer
from proxy.edge.accept.head import LAST_CHUNK, chunk, opening


def lines(*parts: bytes) -> list[str]:
    return b"".join(parts).partition(b"\r\n\r\n")[0].decode().split("\r\n")


def test_answer_of_one_piece() -> None:
    """It says how long it is."""
    data = b"".join(opening(Answer(200, {"X-A": "a", "X-B": "b"}, b"body"), is_closing=False))

    *said, date = lines(data)
    assert said == ["HTTP/1.1 200 OK", "X-A: a", "X-B: b", "Content-Length: 4"]
    assert date.startswith("Date: ")
    assert data.endswith(b"\r\n\r\nbody")


def test_answer_of_more_pieces() -> None:
    """It comes in chunks, each with its length in hexadecimal digits."""
    parts = opening(Answer(200, {}, b"x" * 26, iter([b"y"])), is_closing=False)
    data = b"".join((*parts, chunk(b"y"), LAST_CHUNK))

    assert lines(data)[1] == "Transfer-Encoding: chunked"
    assert data.endswith(b"\r\n\r\n1a\r\n" + b"x" * 26 + b"\r\n1\r\ny\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    ("status", "line"),
    [(503, "HTTP/1.1 503 Service Unavailable"), (418, "HTTP/1.1 418 I'm a Teapot"), (599, "HTTP/1.1 599 ")],
)
def test_status(status: int, line: str) -> None:
    """A status without a name keeps the space behind it: RFC 9112 §4."""
    assert lines(*opening(Answer(status, {}, b""), is_closing=False))[0] == line


def test_last_answer_of_a_connection() -> None:
    """It says so."""
    assert lines(*opening(Answer(200, {}, b""), is_closing=True))[-1] == "Connection: close"


def test_date() -> None:
    """It is that of the present second, in the one form that HTTP has."""
    date = lines(*opening(Answer(200, {}, b""), is_closing=False))[-1].removeprefix("Date: ")

    assert re.fullmatch(r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT", date)
    assert abs(parsedate_to_datetime(date).timestamp() - time()) < 10
