"""
The wire, both ways and without any socket: texts → requests; answers → rows of numbers, or an error.

Always asks for base64: a vector of 1536 numbers is read in 27 µs, as JSON numbers in 110. Looks at everything that
comes back: the number of vectors, their order, width and values. An answer is what a stranger says until then.

Source: OpenAI API reference, "Create embeddings"; docs/api.md and docs/errors.md for what the sidecar adds.
"""

from __future__ import annotations

import binascii
import functools
import json
import math
import os
import re
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from rag_adapter.errors import (
    DeadlineExceeded,
    EmbeddingError,
    EmbeddingFailed,
    InvalidInput,
    Unavailable,
)

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

Priority = Literal["interactive", "bulk"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "bulk")

MAX_REQUEST_BYTES = 1024 * 1024
"""Texts of one request, unless it has a single one: spelling so much as JSON takes 1 to 3 ms."""
MAX_TEXT_BYTES = 16 * 1024 * 1024
"""Half of what the sidecar takes as a body by default; no model reads a hundredth of it."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""2048 vectors of 6000 numbers as base64."""

_MAX_MESSAGE_CHARS = 500
_MAX_TIMEOUT_MS = 600_000
"""The sidecar refuses more by default (`request.max_timeout_s`), so it is told no more than this."""
_ANSWER_MARGIN_S = 0.05
"""The sidecar is told this much less (at most a twentieth), so that its own error, which knows why, is here before our
clock runs out."""
_PLACE = re.compile(r"input\[([0-9]{1,9})\]")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}[!-~]*")
_UNREADABLE = re.compile(r"[^\x20-\x7e\xa0-\uffff]+")


class Spec(NamedTuple):
    """How texts are to be embedded; texts of one spec may travel in one request."""

    model: str | None
    dimensions: int | None
    priority: Priority


class Answer(NamedTuple):
    """An HTTP answer as it came."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case, or a mapping that does not care."""
    body: bytes


# --- texts → request ---


def spelled(text: object, index: int | None = None) -> bytes:
    """
    Return a text as JSON.

    Args:
        text: what the app has given.
        index: its position, for the error.

    Raises:
        InvalidInput: it is no text, is empty, too long, or cannot be spelled in UTF-8.
    """
    if not isinstance(text, str):
        _refuse(index, f"is of type {type(text).__name__}, not a text")
    if not text:
        _refuse(index, "is an empty text", code="empty_input")
    try:
        found = encode_basestring(text).encode()
    except UnicodeEncodeError as error:
        _refuse(index, f"has half of a surrogate pair at character {error.start - 1}, which UTF-8 cannot spell")
    if len(found) > MAX_TEXT_BYTES:
        _refuse(index, f"has {len(found)} bytes, the bound is {MAX_TEXT_BYTES}", code="input_too_long")
    return found


def check(texts: Sequence[object], first: int = 0) -> None:
    """
    Look at some texts before any of them is sent; a good many in a few microseconds.

    Args:
        texts: what the app has given.
        first: position of the first of them, for the error.

    Raises:
        InvalidInput: one of them is no text, or is empty.
    """
    if set(map(type, texts)) <= {str} and all(texts):
        return
    for index, text in enumerate(texts, first):
        spelled(text, index)


def listed(texts: Iterable[str]) -> list[str]:
    """
    Return texts as a list of our own.

    Raises:
        InvalidInput: it is a single one, which Python would take for a list of its characters.
    """
    if isinstance(texts, str | bytes):
        raise InvalidInput("texts is a single text, not a list of them; `embed` takes one")
    return list(texts)


def parts(bodies: Iterable[bytes], max_texts: int) -> Iterator[list[bytes]]:
    """Cut spelled texts into the texts of one request each: at most so many, of at most MAX_REQUEST_BYTES or one."""
    part: list[bytes] = []
    size = 0
    for body in bodies:
        if part and (len(part) == max_texts or size + len(body) > MAX_REQUEST_BYTES):
            yield part
            part, size = [], 0
        part.append(body)
        size += len(body)
    if part:
        yield part


def body(texts: Sequence[bytes], spec: Spec) -> bytes:
    """Return the body of a request for these spelled texts."""
    opening, closing = (b'{"input":', b"") if len(texts) == 1 else (b'{"input":[', b"]")
    return b"".join((opening, b",".join(texts), closing, _rest(spec.model, spec.dimensions)))


@functools.lru_cache(maxsize=256)
def _rest(model: str | None, dimensions: int | None) -> bytes:
    """The part of the body that an app sends with each request."""
    fields: dict[str, object] = {"encoding_format": "base64"}
    if model is not None:
        fields["model"] = model
    if dimensions is not None:
        fields["dimensions"] = dimensions
    return b"," + json.dumps(fields).encode()[1:]


def usual_headers(client_name: str | None, api_key: str | None) -> dict[str, str]:
    """Return the headers that all requests of a client have."""
    headers = {"Content-Type": "application/json"}
    if client_name is not None:
        headers["X-Embedding-Client"] = client_name
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    return headers


def headers(usual: Mapping[str, str], priority: Priority, left_s: float, traceparent: str | None) -> dict[str, str]:
    """
    Return the headers of one request.

    The priority is always said: the sidecar takes an unlabelled list for bulk, and so would hold back a query that
    travels with others.

    Args:
        usual: what all requests have.
        priority: of all its texts.
        left_s: how long an answer is waited for.
        traceparent: the trace context, if there is one.
    """
    left_ms = int((left_s - min(_ANSWER_MARGIN_S, left_s * 0.05)) * 1000)
    found = {
        **usual,
        "X-Embedding-Priority": priority,
        "X-Request-Timeout-Ms": str(max(1, min(left_ms, _MAX_TIMEOUT_MS))),
        "X-Request-Id": os.urandom(8).hex(),
    }
    if traceparent is not None and _TRACEPARENT.fullmatch(traceparent):
        found["traceparent"] = traceparent
    return found


def _refuse(index: int | None, flaw: str, *, code: str | None = None) -> NoReturn:
    place = "the text" if index is None else f"texts[{index}]"
    raise InvalidInput(f"{place} {flaw}", code=code, index=index)


# --- answer → rows ---


def vectors(answer: Answer, count: int) -> list[Any]:
    """
    Return what an answer of status 200 gives for each text, by position; each is judged by `row()`.

    Args:
        answer: as it came.
        count: how many texts were sent.

    Raises:
        EmbeddingFailed: it is not JSON, not of OpenAI's form, or has vectors missing, twice or too many.
    """
    try:
        data = json.loads(answer.body)["data"]
        found: list[Any] = [None] * count
        for item in data:
            index = item["index"]
            if type(index) is not int or not 0 <= index < count or found[index] is not None:
                raise LookupError
            found[index] = item["embedding"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        why = "not JSON" if isinstance(error, ValueError) else "not of OpenAI's form, or has wrong indexes"
        raise _bad(f"the answer ({len(answer.body)} bytes) is {why}", answer) from None
    if len(data) != count:
        raise _bad(f"the answer has {len(data)} vectors for {count} texts", answer)
    return found


def row(item: object, width: int | None) -> bytes:
    """
    Return one vector as little-endian float32.

    Args:
        item: base64; or a list of numbers, as an upstream gives it that is asked directly and knows no base64.
        width: how many numbers it has to have, if that is known.

    Raises:
        EmbeddingFailed: it is neither, or of another width.
    """
    try:
        if isinstance(item, str):
            found = binascii.a2b_base64(item, strict_mode=True)
        elif isinstance(item, list):
            numbers = array("f", item)
            found = _swapped(numbers).tobytes()
        else:
            raise TypeError
    except (ValueError, TypeError, OverflowError):
        raise _bad("a vector is neither base64 nor a list of numbers") from None
    if len(found) % 4 or not found:
        raise _bad(f"a vector has {len(found)} bytes, which are no float32 numbers")
    if width is not None and len(found) != width * 4:
        raise _bad(f"a vector has {len(found) // 4} numbers, {width} were expected")
    return found


def floats(row: bytes) -> list[float]:
    """
    Return the numbers of a row.

    Raises:
        EmbeddingFailed: one of them is infinite or none at all.
    """
    numbers = _swapped(array("f", row)).tolist()
    # A single one of them makes the sum so; finite float32 numbers cannot overflow a double.
    if not math.isfinite(sum(numbers)):
        raise _bad("a vector has numbers that are none (NaN or infinite)")
    return numbers


def numpy_row(row: bytes) -> NDArray[float32]:
    """Return one row as float32, to be changed at will; raises as `numpy_rows()` does, without a place."""
    try:
        found: NDArray[float32] = numpy_rows([row])[0]
    except EmbeddingFailed as error:
        raise error.own() from None
    return found


def numpy_rows(rows: Sequence[bytes]) -> NDArray[float32]:
    """
    Return rows of one width as count × width float32, to be changed at will.

    Raises:
        EmbeddingFailed: one of the numbers is infinite or none at all.
    """
    import numpy

    found = numpy.frombuffer(bytearray().join(rows), "<f4").reshape(len(rows), -1)
    is_right = numpy.isfinite(found).all(axis=1)
    if not is_right.all():
        raise _bad("a vector has numbers that are none (NaN or infinite)").own(int(is_right.argmin()))
    return found.astype(numpy.float32, copy=False)


def _swapped(numbers: array[float]) -> array[float]:
    """The wire is little-endian; so is this machine, nearly always."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _bad(message: str, answer: Answer | None = None) -> EmbeddingFailed:
    request_id = None if answer is None else answer.headers.get("x-request-id")
    return EmbeddingFailed(message, code="bad_answer", request_id=request_id)


# --- answer → error ---


def failure(answer: Answer, place: str) -> EmbeddingError:
    """
    Return the error that an answer of another status than 200 means.

    The cases: (1) the request makes no sense; (2) the deadline; (3) not at present; (4) anything else. In the sidecar's
    own words where it is one; a page of anybody else is not quoted: it may hold anything.

    Args:
        answer: as it came.
        place: where it came from.
    """
    status = answer.status
    told = _told(answer.body)
    if told is None:
        message = f"HTTP {status} from {place}, and no error as a sidecar words it: is something else listening there?"
        code: str | None = "not_a_sidecar" if status not in (429, 503, 504) else None
    else:
        message, code = f"{told.message} (HTTP {status})", told.code
    should_retry = answer.headers.get("x-should-retry")
    return _kind(status)(
        message,
        code=code,
        retryable=None if should_retry is None else should_retry == "true",
        retry_after_s=_seconds(answer.headers.get("retry-after")),
        request_id=answer.headers.get("x-request-id"),
        index=None if told is None else told.position,
        status=status,
    )


def unready(answer: Answer, place: str) -> EmbeddingError | None:
    """Return why a sidecar that answers /readyz like this is not ready; None if it is."""
    try:
        page = json.loads(answer.body)
        state, reasons = page["status"], page["reasons"]
        if answer.status == 200 and state == "ready":
            return None
        told = _UNREADABLE.sub(" ", "; ".join(reasons)[:_MAX_MESSAGE_CHARS])
    except (ValueError, LookupError, TypeError, RecursionError):
        message = (
            f"what {place} answers about being ready is not what a sidecar says: is something else listening there?"
        )
        return EmbeddingFailed(message, code="not_a_sidecar", status=answer.status)
    return Unavailable(f"the sidecar at {place} is not ready: {told}", code="not_ready", status=answer.status)


def placed(error: EmbeddingError, index: int | None) -> EmbeddingError:
    """Return the error of one text for its caller, who knows nothing of the others it has travelled with."""
    own = error.own(index)
    place = "the text" if index is None else f"texts[{index}]"
    own.message = _PLACE.sub(place, own.message)
    own.args = (own.message,)
    return own


def _kind(status: int) -> type[EmbeddingError]:
    if status in (400, 413, 422):
        return InvalidInput
    if status == 504:
        return DeadlineExceeded
    if status in (429, 503):
        return Unavailable
    return EmbeddingFailed


class _Told(NamedTuple):
    message: str
    code: str | None
    position: int | None


def _told(body: bytes) -> _Told | None:
    """Read an error of OpenAI's form; None if it is none."""
    try:
        error = json.loads(body)["error"]
        message, code, param = error["message"], error.get("code"), error.get("param")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(message, str):
        return None
    # The sidecar's own checks say `param: input`, and name the place at the beginning of their message.
    place = (_PLACE.match(param) if isinstance(param, str) else None) or _PLACE.match(message.removeprefix("'"))
    return _Told(
        _UNREADABLE.sub(" ", message[:_MAX_MESSAGE_CHARS]),
        code if isinstance(code, str) and code else None,
        int(place[1]) if place else None,
    )


def _seconds(value: str | None) -> float | None:
    """Read Retry-After; its form as a date is nothing that a sidecar says."""
    return float(value) if value is not None and re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", value) else None
