"""Rows and errors become bytes that each client reads rightly."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base import errors
from proxy.base.errors import EmbeddingError, UpstreamRefused
from proxy.base.messages import Response, Row
from proxy.edge import encode
from proxy.edge.encode import PIECE_BYTES, error_answer, pieces

SAME_EACH_TIME = settings(deadline=None, derandomize=True)
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
VECTORS = st.lists(NUMBERS, min_size=1, max_size=8)
BITS = st.integers(0, 2**32 - 1).filter(lambda bits: bits & 0x7F80_0000 != 0x7F80_0000)  # all finite float32
DENORMALS = st.integers(1, 2**23 - 1)


def row_of(numbers: Any) -> Row:
    return numpy.array(numbers, dtype="<f4").tobytes()


def row_of_bits(bits: list[int]) -> Row:
    return numpy.array(bits, dtype="<u4").tobytes()


def some_rows(count: int, width: int) -> tuple[Row, ...]:
    """Make up rows as models give them: unit length, the same each time."""
    numbers = numpy.random.default_rng([count, width]).standard_normal((count, width))
    numbers /= numpy.linalg.norm(numbers, axis=1, keepdims=True)
    return tuple(row.astype("<f4").tobytes() for row in numbers)


def spelled(response: Response, *, is_base64: bool, model: str = "m") -> bytes:
    return b"".join(pieces(response, base64=is_base64, model=model))


def read(spelling: Any) -> Row:
    """Read an embedding as clients do."""
    return base64.b64decode(spelling, validate=True) if isinstance(spelling, str) else row_of(spelling)


# --- vectors ---


def test_answer_in_floats() -> None:
    """The answer is the one that OpenAI's reference shows."""
    response = Response((row_of([0.5, -0.25]), row_of([1.0, 0.0])), tokens=7)

    document = json.loads(spelled(response, is_base64=False))

    assert document == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.5, -0.25]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 0.0]},
        ],
        "model": "m",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }


def test_answer_in_base64() -> None:
    """In base64 an embedding is the bytes of its float32, little end first."""
    response = Response((b"\x00\x00\x80\x3f\x00\x00\x00\xc0",), tokens=0)

    document = json.loads(spelled(response, is_base64=True))

    assert document == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": "AACAPwAAAMA="}],
        "model": "m",
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }


@SAME_EACH_TIME
@given(st.lists(VECTORS, min_size=1, max_size=4))
def test_any_vectors_in_base64(vectors: list[list[float]]) -> None:
    """Base64 gives back each bit."""
    rows = tuple(row_of(vector) for vector in vectors)

    document = json.loads(spelled(Response(rows, tokens=1), is_base64=True))

    assert tuple(base64.b64decode(item["embedding"], validate=True) for item in document["data"]) == rows


@settings(SAME_EACH_TIME, max_examples=200)
@given(st.lists(st.one_of(BITS, DENORMALS, st.sampled_from([0, 0x8000_0000, 1, 0x8000_0001, 0x7F7F_FFFF])), min_size=1))
def test_any_numbers_in_floats(bits: list[int]) -> None:
    """The digits mean the very float32 that was given: no other is as near, and zero keeps its sign."""
    row = row_of_bits(bits)

    document = json.loads(spelled(Response((row,), tokens=1), is_base64=False), parse_float=str, parse_int=str)

    digits = document["data"][0]["embedding"]
    numbers = numpy.frombuffer(row, dtype="<f4")
    assert len(digits) == len(numbers)
    assert all(means(text, number) for text, number in zip(digits, numbers, strict=True))


def means(digits: str, number: numpy.float32) -> bool:
    """Whether a decimal is nearer to this float32 than to any other; exactly, without a double in between."""
    exact = Fraction(digits)
    with numpy.errstate(all="ignore"):
        others = [numpy.nextafter(number, numpy.float32(end), dtype="f4") for end in ("inf", "-inf")]
    distance = abs(exact - Fraction(float(number)))
    is_nearest = all(distance < abs(exact - Fraction(float(other))) for other in others if numpy.isfinite(other))
    return is_nearest and digits.startswith("-") == bool(numpy.signbit(number))


@pytest.mark.parametrize(
    "bits",
    [
        0x0000_0000,
        0x8000_0000,
        0x0000_0001,
        0x8000_0001,
        0x007F_FFFF,
        0x0080_0000,
        0x7F7F_FFFF,
        0xFF7F_FFFF,
        0x3DCC_CCCD,
    ],
    ids=hex,
)
@pytest.mark.parametrize("is_base64", [False, True])
def test_numbers_at_the_edges_of_float32(bits: int, is_base64: bool) -> None:
    """A client that reads doubles and makes float32 of them has the same bits: zeros, denormals, the largest."""
    row = row_of_bits([bits])

    document = json.loads(spelled(Response((row,), tokens=1), is_base64=is_base64))

    assert read(document["data"][0]["embedding"]) == row


@pytest.mark.parametrize("is_base64", [False, True])
@pytest.mark.parametrize(
    ("count", "width"),
    [(1, 1), (1, 8), (1, 3072), (61, 1536), (62, 1536), (63, 1536), (127, 1536), (128, 1536), (129, 1536), (900, 256)],
)
def test_answer_of_any_size(count: int, width: int, is_base64: bool) -> None:
    """However many pieces an answer has, together they are one document with each row at its position."""
    rows = some_rows(count, width)

    document = json.loads(spelled(Response(rows, tokens=9), is_base64=is_base64))

    data = document.pop("data")
    assert document == {"object": "list", "model": "m", "usage": {"prompt_tokens": 9, "total_tokens": 9}}
    assert [item["index"] for item in data] == list(range(count))
    assert all(item.keys() == {"object", "index", "embedding"} for item in data)
    assert all(isinstance(item["embedding"], str if is_base64 else list) for item in data)
    assert tuple(read(item["embedding"]) for item in data) == rows


@pytest.mark.parametrize("is_base64", [False, True])
def test_large_answer_beside_small_ones(is_base64: bool) -> None:
    """A large answer is the small ones' items, one after the other."""
    rows = some_rows(130, 1536)
    head, tail = b'{"object":"list","data":[', b'],"model":"m","usage":{"prompt_tokens":0,"total_tokens":0}}'

    whole = spelled(Response(rows, tokens=0), is_base64=is_base64)

    items = []
    for index, row in enumerate(rows):
        small = spelled(Response((row,), tokens=0), is_base64=is_base64)
        item = small.removeprefix(head).removesuffix(tail)
        items.append(item.replace(b'"index":0', b'"index":%d' % index, 1))
    assert whole == head + b",".join(items) + tail


@pytest.mark.parametrize(("is_base64", "rows_whole", "rows_a_piece"), [(True, 160, 32), (False, 77, 15)])
def test_number_of_pieces(is_base64: bool, rows_whole: int, rows_a_piece: int) -> None:
    """Up to a bound an answer is one piece; with one row more it goes in small ones."""
    counts = {
        count: len(list(pieces(Response(some_rows(count, 1536), tokens=0), base64=is_base64, model="m")))
        for count in (1, rows_whole, rows_whole + 1)
    }

    assert list(counts.values()) == [1, 1, math.ceil((rows_whole + 1) / rows_a_piece)]


@pytest.mark.parametrize("is_base64", [False, True])
def test_size_of_pieces(is_base64: bool) -> None:
    """No piece is much larger than its bound, and none much smaller but the last."""
    sizes = [len(piece) for piece in pieces(Response(some_rows(2000, 512), tokens=0), base64=is_base64, model="m")]

    assert len(sizes) > 3
    assert max(sizes) < 1.25 * PIECE_BYTES
    assert min(sizes[:-1]) > 0.8 * PIECE_BYTES


@pytest.mark.parametrize("is_base64", [False, True])
def test_row_that_is_larger_than_a_piece(is_base64: bool) -> None:
    """A piece has a row at least, however wide it is."""
    rows = some_rows(2, 300_000)

    found = list(pieces(Response(rows, tokens=0), base64=is_base64, model="m"))

    assert len(found) == 2
    assert tuple(read(item["embedding"]) for item in json.loads(b"".join(found))["data"]) == rows


@pytest.mark.parametrize("name", ['a "quoted" name', "back\\slash", "моё", "line\nbreak"], ids=ascii)
def test_model_with_an_odd_name(name: str) -> None:
    """The model's name is JSON whatever it is."""
    document = json.loads(spelled(Response((row_of([1.0]),), tokens=0), is_base64=True, model=name))

    assert document["model"] == name


# --- headers ---


def test_timing_of_a_request() -> None:
    """Times are milliseconds with two digits, as Server-Timing wants them."""
    assert encode.timing(0.0012345, 1.5, 2.0) == "queue;dur=1.23, upstream;dur=1500.00, total;dur=2000.00"


@pytest.mark.parametrize(("hits", "word"), [(0, "miss"), (1, "partial"), (2, "partial"), (3, "hit")])
def test_word_for_the_cache(hits: int, word: str) -> None:
    """All, some or none of the rows came from the cache."""
    assert encode.cache(Response((b"",) * 3, tokens=0, hits=hits)) == word


@pytest.mark.parametrize(
    ("indexes", "expected"),
    [
        ((0,), "0"),
        ((1, 5), "1,5"),
        (tuple(range(4)), "0,1,2,3"),
        (tuple(range(5)), "0,1,2,3,+1"),
        (tuple(range(9)), "0,1,2,3,+5"),
    ],
)
def test_positions_that_were_cut(indexes: tuple[int, ...], expected: str) -> None:
    """Positions are listed up to a bound, and the rest is counted."""
    assert encode.truncated(indexes, limit=4) == expected


def test_header_of_a_request_that_was_cut_everywhere() -> None:
    """A header stays short even when each input of a full request was cut."""
    found = encode.truncated(tuple(range(2048)))

    assert found.endswith(",31,+2016")
    assert len(found) < 128


# --- errors ---

ANSWERS: list[tuple[type[EmbeddingError], int, str, bool]] = [
    (errors.InvalidRequest, 400, "invalid_request_error", False),
    (errors.TooLarge, 413, "invalid_request_error", False),
    (errors.UnknownModel, 404, "invalid_request_error", False),
    (errors.UnknownRoute, 404, "invalid_request_error", False),
    (errors.WrongMethod, 405, "invalid_request_error", False),
    (errors.WrongContentType, 415, "invalid_request_error", False),
    (errors.Unauthorized, 401, "invalid_request_error", False),
    (errors.Forbidden, 403, "permission_error", False),
    (errors.SlowBody, 408, "invalid_request_error", False),
    (errors.Overloaded, 503, "overloaded_error", True),
    (errors.WouldBeLate, 503, "overloaded_error", True),
    (errors.QueueTimeout, 503, "overloaded_error", True),
    (errors.NoUpstream, 503, "upstream_error", True),
    (errors.CircuitOpen, 503, "upstream_error", True),
    (errors.RateLimited, 429, "rate_limit_error", True),
    (errors.DeadlineExceeded, 504, "timeout_error", False),
    (errors.UpstreamTimeout, 504, "upstream_error", False),
    (errors.UpstreamFailed, 502, "upstream_error", False),
    (errors.UpstreamDenied, 502, "upstream_error", False),
    (errors.BadVectors, 502, "upstream_error", False),
    (errors.EmbeddingError, 500, "internal_error", False),
]


def error_classes(cls: type[EmbeddingError] = EmbeddingError) -> Iterator[type[EmbeddingError]]:
    yield cls
    for inner in cls.__subclasses__():
        yield from error_classes(inner)


def test_table_of_answers_is_complete() -> None:
    """Each error of the house has an answer of its own here; a refusal brings its own."""
    ours = {cls for cls in error_classes() if cls.__module__ == errors.__name__}

    assert {cls for cls, *_ in ANSWERS} | {UpstreamRefused} == ours


@pytest.mark.parametrize(
    ("cls", "status", "kind", "should_retry"), ANSWERS, ids=lambda value: getattr(value, "__name__", "")
)
def test_answer_to_each_error(cls: type[EmbeddingError], status: int, kind: str, should_retry: bool) -> None:
    """An error is a status, a type, a stable code, and a word for SDKs whether to come again."""
    answer = error_answer(cls("what happened", param="p"))

    assert answer.status == status
    more = {"WWW-Authenticate": "Bearer"} if cls is errors.Unauthorized else {}
    assert answer.headers == {"x-should-retry": "true" if should_retry else "false"} | more
    assert json.loads(answer.body) == {
        "error": {"message": "what happened", "type": kind, "param": "p", "code": cls.code}
    }


def test_error_that_the_table_does_not_know() -> None:
    """A closer kind of a known error is answered like that one."""

    class Narrower(errors.RateLimited):
        code = "narrower"

    answer = error_answer(Narrower("what happened"))

    assert answer.status == 429
    assert json.loads(answer.body)["error"] == {
        "message": "what happened",
        "type": "rate_limit_error",
        "param": None,
        "code": "narrower",
    }


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(None, None), (0.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (2.0, "2"), (29.5, "30"), (86_400.0, "86400")],
)
def test_wait_that_a_caller_is_told(seconds: float | None, expected: str | None) -> None:
    """A wait goes out in whole seconds, rounded up, never zero; an error without one says nothing."""
    answer = error_answer(errors.Overloaded("full", retry_after_s=seconds))

    assert answer.headers.get("Retry-After") == expected


@pytest.mark.parametrize(("allowed", "expected"), [(("GET",), "GET"), (("GET", "POST"), "GET, POST"), ((), None)])
def test_method_that_a_path_does_not_take(allowed: tuple[str, ...], expected: str | None) -> None:
    """A wrong method is answered with the right ones, where they are known."""
    answer = error_answer(errors.WrongMethod("not this", allowed=allowed))

    assert answer.headers.get("Allow") == expected


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_refusal_of_an_upstream(status: int) -> None:
    """A refusal keeps the upstream's own status, code and parameter, and no SDK tries it again."""
    answer = error_answer(UpstreamRefused("too odd", status=status, code="odd_text", param="input"))

    assert answer.status == status
    assert answer.headers == {"x-should-retry": "false"}
    assert json.loads(answer.body) == {
        "error": {"message": "too odd", "type": "invalid_request_error", "param": "input", "code": "odd_text"}
    }


@pytest.mark.parametrize(
    ("key", "keys", "param"),
    [
        (b"k1", (b"k0", b"k1", b"k2"), "input[1]"),
        (b"k0", (b"k0",), "input[0]"),
        (b"k1", (b"k0", b"k1", b"k1"), "input[1]"),
        (b"k9", (b"k0", b"k1"), "given"),
        (None, (b"k0", b"k1"), "given"),
        (b"k1", (), "given"),
    ],
    ids=["in the middle", "alone", "twice", "elsewhere", "not named", "not known"],
)
def test_culprit_among_the_inputs(key: bytes | None, keys: tuple[bytes, ...], param: str) -> None:
    """Where the culprit is known by its key, the answer names its position in this very request."""
    error = UpstreamRefused("too odd", status=400, param="given")
    error.key = key

    answer = error_answer(error, keys)

    assert json.loads(answer.body)["error"]["param"] == param
