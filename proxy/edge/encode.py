"""
A Response → bytes of the answer; an error → status, headers and body.

Pure. Holds the only table from error to HTTP answer. Rows go out as base64 or as JSON floats, whichever the caller
asked for, whatever the upstream gave. Large answers come in pieces, so that no single one holds the event loop.

Source: OpenAI API reference, "The embedding object" and "Error codes"; openai-python and openai-node for what their
clients do with each status and header.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import orjson
from pybase64 import b64encode

from proxy.base import errors
from proxy.base.errors import EmbeddingError
from proxy.base.messages import Response, Row

PIECE_BYTES = 256 * 1024
"""15 rows of 1536 numbers as floats take 0.4 ms; between two pieces other callers get their turn. A small request has
some eight turns of the loop on its way, so beside a huge answer each of them costs it one piece."""

WHOLE_BYTES = 5 * PIECE_BYTES
"""Up to this an answer is one piece: 64 rows of 1536 numbers as floats, in 1.7 ms."""

_FLOAT_CHARS = 11
"""What a float32 takes in JSON on average, comma included."""
_FLOAT32 = numpy.dtype("<f4")


# --- vectors ---


def pieces(response: Response, *, base64: bool, model: str) -> Iterator[bytes]:
    """
    Spell the answer.

    Args:
        response: the rows, by position.
        base64: as base64 of little-endian float32, else as a list of numbers.
        model: the name to put into the answer.

    Yields:
        Pieces of one JSON document: a single one up to some WHOLE_BYTES, else each of some PIECE_BYTES at the most (and
        at least one row).
    """
    spell, quote = (b64encode, b'"') if base64 else (_floats, b"")
    rows = response.rows
    row_bytes = len(rows[0]) if rows else 1
    spelled_bytes = row_bytes * 4 // 3 if base64 else row_bytes // 4 * _FLOAT_CHARS
    is_whole = len(rows) * spelled_bytes <= WHOLE_BYTES
    step = len(rows) if is_whole else max(1, PIECE_BYTES // max(1, spelled_bytes))
    openings = _openings(len(rows), quote)
    for first in range(0, len(rows), step or 1):
        last = first + step
        parts = [*itertools.chain.from_iterable(zip(openings[first:last], map(spell, rows[first:last]), strict=False))]
        if last >= len(rows):
            parts += (quote, _tail(response, model))
        yield b"".join(parts)


_OPENINGS: dict[bytes, list[bytes]] = {b"": [], b'"': []}
"""What stands before each vector, the end of the one before it included: spelled once, since answers are all alike."""


def _openings(count: int, quote: bytes) -> list[bytes]:
    """Return at least so many openings of items."""
    known = _OPENINGS[quote]
    for index in range(len(known), count):
        before = quote + b"}," if index else b'{"object":"list","data":['
        known.append(b'%b{"object":"embedding","index":%d,"embedding":%b' % (before, index, quote))
    return known


def _tail(response: Response, model: str) -> bytes:
    return b'}],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (
        orjson.dumps(model),
        response.tokens,
        response.tokens,
    )


def _floats(row: Row) -> bytes:
    # orjson writes the shortest digits that give the same float32 again, straight from the buffer.
    return orjson.dumps(numpy.frombuffer(row, _FLOAT32), option=orjson.OPT_SERIALIZE_NUMPY)


# --- headers ---


def timing(queue_s: float, upstream_s: float, total_s: float) -> str:
    """Spell the value of `Server-Timing`, milliseconds each."""
    return f"queue;dur={queue_s * 1e3:.2f}, upstream;dur={upstream_s * 1e3:.2f}, total;dur={total_s * 1e3:.2f}"


def cache(response: Response) -> str:
    """Spell the value of `X-Embedding-Cache`."""
    if response.hits == 0:
        return "miss"
    return "hit" if response.hits == len(response.rows) else "partial"


def truncated(indexes: tuple[int, ...], limit: int = 32) -> str:
    """Spell the value of `X-Embedding-Truncated`: positions, and how many more there are."""
    named = ",".join(map(str, indexes[:limit]))
    return named if len(indexes) <= limit else f"{named},+{len(indexes) - limit}"


# --- errors ---


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error as HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes


_ANSWERS: dict[type[EmbeddingError], tuple[int, str, bool]] = {
    # error: status, `type` in the body, whether the caller's SDK should try again. Where we have tried ourselves the
    # SDK should not: three of our attempts times its three are nine calls to an upstream in trouble.
    errors.InvalidRequest: (400, "invalid_request_error", False),
    errors.TooLarge: (413, "invalid_request_error", False),
    errors.UnknownModel: (404, "invalid_request_error", False),
    errors.UnknownRoute: (404, "invalid_request_error", False),
    errors.WrongMethod: (405, "invalid_request_error", False),
    errors.WrongContentType: (415, "invalid_request_error", False),
    errors.Unauthorized: (401, "invalid_request_error", False),
    errors.Forbidden: (403, "permission_error", False),
    errors.SlowBody: (408, "invalid_request_error", False),
    errors.Overloaded: (503, "overloaded_error", True),
    errors.NoUpstream: (503, "upstream_error", True),
    errors.CircuitOpen: (503, "upstream_error", True),
    errors.RateLimited: (429, "rate_limit_error", True),
    errors.DeadlineExceeded: (504, "timeout_error", False),
    errors.UpstreamTimeout: (504, "upstream_error", False),
    errors.UpstreamFailed: (502, "upstream_error", False),
    errors.UpstreamDenied: (502, "upstream_error", False),
    errors.BadVectors: (502, "upstream_error", False),
    EmbeddingError: (500, "internal_error", False),
}


def error_answer(error: EmbeddingError, keys: tuple[bytes, ...] = ()) -> ErrorAnswer:
    """
    Spell an error in OpenAI's shape, so that each SDK raises its own right exception.

    Args:
        error: what went wrong.
        keys: the request's keys, where it got that far: they tell the position of a culprit.

    SDKs try 408, 409, 429 and 5xx again by themselves; `x-should-retry: false` stops them where it is useless, and
    `Retry-After`, in whole seconds since some read nothing else, tells them when.
    """
    param = error.param
    if isinstance(error, errors.UpstreamRefused):
        status, kind, should_retry = error.status, "invalid_request_error", False
    else:
        status, kind, should_retry = next(_ANSWERS[base] for base in type(error).__mro__ if base in _ANSWERS)
    if error.key in keys:
        param = f"input[{keys.index(error.key)}]"
    headers = {"x-should-retry": "true" if should_retry else "false"}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"  # RFC 9110 §15.5.2 insists
    if isinstance(error, errors.WrongMethod) and error.allowed:
        headers["Allow"] = ", ".join(error.allowed)  # RFC 9110 §15.5.6 insists
    body = orjson.dumps({"error": {"message": error.message, "type": kind, "param": param, "code": error.code}})
    return ErrorAnswer(status, headers, body)
