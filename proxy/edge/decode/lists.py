"""
Lists of token ids in a large body, read one by one before the rest is.

JSON is read in one go, which holds the loop: a thousand lists of 250 ids, a usual body of LangChain's OpenAIEmbeddings,
take 20 ms, and the largest body that we take half a second. Texts take a thousandth of that, and are read as they are.

Pure: it says when others should have their turn, and waits for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

import orjson

TURN_BYTES = 64 * 1024
"""So many bytes of ids are read between two turns, in 1 ms. A body that is no longer than that needs none of this."""

MAX_TOKEN_ID = 2**31 - 1
"""cl100k has about 100 000 ids; the bound only keeps nonsense and overflow away."""

# A quote within a text is escaped, so what looks like this field is one; whose it is shows when the rest is read.
_BEGINNING = re.compile(rb'"input"[ \t\r\n]*:[ \t\r\n]*(\[)(?=[ \t\r\n]*\[)')
_PLACE = rb'"\u0000"'
"""What stands in their place meanwhile: a text that nobody sends, and that is looked for before."""
_BETWEEN = re.compile(rb"[ \t\r\n]*([,\]])[ \t\r\n]*")


def are_token_ids(ids: list[Any]) -> bool:
    """Whether a list holds token ids only, at least one. All at once, since they come by the million."""
    # type, not isinstance: true and false are no token ids
    return bool(ids) and list(map(type, ids)).count(int) == len(ids) and min(ids) >= 0 and max(ids) <= MAX_TOKEN_ID


def taken_out(body: bytes) -> Generator[None, None, tuple[bytes, list[Any]]]:
    """
    Take the lists of `input` out of a body.

    Yields:
        Whenever others should have their turn.

    Returns:
        The body without them, and the lists: a tuple where it is token ids, a list where something is wrong with it.
        The body as it is, and nothing, where `input` is anything else: then it has to be read as a whole, and what is
        wrong with it is told there.
    """
    found: list[Any] = []
    begun = _BEGINNING.search(body)
    if begun is None or _PLACE in body:
        return body, []
    at = turn = begun.end()
    while True:
        first = body.find(b"[", at)
        last = body.find(b"]", first) + 1
        if first < 0 or not last or body[at:first].strip():
            return body, []
        try:
            ids = orjson.loads(memoryview(body)[first:last])
        except orjson.JSONDecodeError:
            return body, []
        found.append(tuple(ids) if are_token_ids(ids) else ids)
        between = _BETWEEN.match(body, last)
        if between is None:
            return body, []
        at = between.end()
        if between[1] == b"]":
            break
        if at - turn > TURN_BYTES:
            turn = at
            yield
    rest = b"".join((body[: begun.start(1)], _PLACE, body[at:]))
    return (rest, found) if _is_in_place(rest) else (body, [])


def _is_in_place(rest: bytes) -> bool:
    """Whether it was the request's own `input`, and the one that counts: not another object's, nor one of two."""
    try:
        fields = orjson.loads(rest)
    except orjson.JSONDecodeError:
        return False
    return isinstance(fields, dict) and fields.get("input") == "\0"
