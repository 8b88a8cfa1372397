"""Texts → requests, answers → rows or errors; nothing that comes back is believed."""

from __future__ import annotations

import base64
import json
import math
from array import array
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.base.settings import Settings
from proxy.edge import decode, encode
from rag_adapter import wire
from rag_adapter.errors import (
    DeadlineExceeded,
    EmbeddingError,
    EmbeddingFailed,
    InvalidInput,
    Unavailable,
)

SPEC = wire.Spec("m", 8, "interactive")


def answer(body: Any, status: int = 200, **headers: str) -> wire.Answer:
    spelled = body if isinstance(body, bytes) else json.dumps(body).encode()
    return wire.Answer(status, {name.replace("_", "-"): value for name, value in headers.items()}, spelled)


def item(index: Any, *numbers: float) -> dict[str, Any]:
    return {"object": "embedding", "index": index, "embedding": base64.b64encode(array("f", numbers)).decode()}


# --- texts → request ---


@given(st.text(min_size=1))
def test_any_text_arrives_as_it_is(text: str) -> None:
    """Quotes, line ends, emoji, NUL: what the sidecar reads is what the app has given."""
    try:
        text.encode()
    except UnicodeEncodeError:
        with pytest.raises(InvalidInput, match="surrogate"):
            wire.spelled(text)
        return

    read = json.loads(wire.body([wire.spelled(text)], SPEC))

    assert read == {"input": text, "encoding_format": "base64", "model": "m", "dimensions": 8}


def test_several_texts_and_no_wishes() -> None:
    """A list in their order; what the app does not ask for is left to the sidecar."""
    read = json.loads(wire.body([wire.spelled("a"), wire.spelled("b")], wire.Spec(None, None, "bulk")))

    assert read == {"input": ["a", "b"], "encoding_format": "base64"}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "empty_input"),
        (None, "invalid_input"),
        (b"x", "invalid_input"),
        (7, "invalid_input"),
        ("\ud800", "invalid_input"),
        ("x" * wire.MAX_TEXT_BYTES, "input_too_long"),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_text_that_cannot_be_sent(text: Any, code: str) -> None:
    """Refused before anything is sent; the message names the place and never the text."""
    for index, place in ((None, "the text"), (5, "texts[5]")):
        with pytest.raises(InvalidInput) as caught:
            wire.spelled(text, index)
        assert (caught.value.code, caught.value.index) == (code, index)
        assert place in str(caught.value)
        assert "xxx" not in str(caught.value)


def test_texts_are_looked_at_before_any_is_sent() -> None:
    """The first that is wrong is named, by its position in the whole list."""
    wire.check(["a", "b"], 10)

    for texts, index in ((["a", ""], 11), (["a", "b", 3, ""], 12)):
        with pytest.raises(InvalidInput) as caught:
            wire.check(texts, 10)
        assert caught.value.index == index


@pytest.mark.parametrize("texts", ["one text", b"bytes"])
def test_one_text_in_the_place_of_many(texts: Any) -> None:
    """Python would take it for a list of its characters, and embed each."""
    with pytest.raises(InvalidInput, match="single text"):
        wire.listed(texts)


@given(st.lists(st.integers(1, 400), max_size=60), st.integers(1, 9))
def test_parts_hold_everything_in_order(sizes: list[int], most: int) -> None:
    """Whatever the sizes: nothing is lost, no part is empty or has too many."""
    bodies = [bytes(size) for size in sizes]

    parts = list(wire.parts(bodies, most))

    assert [body for part in parts for body in part] == bodies
    assert all(1 <= len(part) <= most for part in parts)


def test_part_is_bounded_in_bytes() -> None:
    """At the bound it fits, one byte more begins another part; a text that is larger goes alone."""
    half = bytes(wire.MAX_REQUEST_BYTES // 2)

    assert list(map(len, wire.parts([half, half], 9))) == [2]
    assert list(map(len, wire.parts([half, half + b"x"], 9))) == [1, 1]
    assert list(map(len, wire.parts([b"x", bytes(wire.MAX_REQUEST_BYTES + 1), b"x"], 9))) == [1, 1, 1]


@pytest.mark.parametrize(
    ("left_s", "told_ms"), [(10.0, 9950), (1.0, 950), (0.1, 95), (0.0005, 1), (-1.0, 1), (3600.0, 600_000)]
)
def test_patience_that_is_told(left_s: float, told_ms: int) -> None:
    """A little less than ours, so its own error comes first; in the bounds that it takes."""
    assert wire.headers({}, "bulk", left_s, None)["X-Request-Timeout-Ms"] == str(told_ms)


def test_headers_that_the_sidecar_understands() -> None:
    """The proxy reads them as they were meant; each request has an id of its own."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    usual = wire.usual_headers("ingest/7", "sk-1")
    headers = wire.headers(usual, "interactive", 5.0, trace)
    other = wire.headers(usual, "interactive", 5.0, None)

    decode.content_type(headers["Content-Type"], "")
    assert decode.stated_timeout_s(headers, Settings().request) == 4.95
    assert decode.request_id(headers) == headers["X-Request-Id"] != other["X-Request-Id"]
    assert (headers["X-Embedding-Client"], headers["Authorization"]) == ("ingest/7", "Bearer sk-1")
    assert (headers["X-Embedding-Priority"], headers["traceparent"]) == ("interactive", trace)
    assert "traceparent" not in other


@pytest.mark.parametrize("trace", ["", "00-1-2-3", "x\r\nX-Embedding-Priority: bulk", "00-" + "0" * 55])
def test_trace_context_that_is_none(trace: str) -> None:
    """An invalid one is as good as none, and no way to smuggle in a header."""
    assert "traceparent" not in wire.headers({}, "bulk", 1.0, trace)


# --- answer → rows ---


def test_vectors_out_of_order() -> None:
    """The index counts, not the place."""
    found = wire.vectors(answer({"data": [item(1, 3.0, 4.0), item(0, 1.0, 2.0)]}), 2)

    assert [wire.floats(wire.row(each, 2)) for each in found] == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"data": [{"object": "embedding", "ind',
        b"<html><body>502 Bad Gateway</body></html>",
        b"\xff\xfe",
        b"[" * 100_000,
        [],
        {},
        {"data": None},
        {"data": {}},
        {"data": []},
        {"data": [item(0, 1.0)]},
        {"data": [item(0, 1.0), item(1, 1.0), item(2, 1.0)]},
        {"data": [item(0, 1.0), item(0, 1.0)]},
        {"data": [item(0, 1.0), item(2, 1.0)]},
        {"data": [item(0, 1.0), item(-1, 1.0)]},
        {"data": [item(0, 1.0), item(True, 1.0)]},
        {"data": [item(0, 1.0), item("1", 1.0)]},
        {"data": [item(0, 1.0), {"index": 1}]},
        {"data": [item(0, 1.0), None]},
        {"data": "ab"},
    ],
    ids=lambda body: repr(body)[:40],
)
def test_answer_that_is_no_vectors(body: Any) -> None:
    """Broken JSON, another form, vectors missing, twice or too many: one clear error, with the request's id."""
    with pytest.raises(EmbeddingFailed) as caught:
        wire.vectors(answer(body, x_request_id="r-1"), 2)

    assert (caught.value.code, caught.value.request_id) == ("bad_answer", "r-1")


@pytest.mark.parametrize(
    ("embedding", "width"),
    [
        (None, None),
        (7, None),
        ({}, None),
        ("", None),
        ([], None),
        ("not base64!", None),
        ("AAAA", None),
        ("AACAPw==AACAPw==", None),
        (base64.b64encode(array("f", [1.0, 2.0])).decode(), 3),
        ([1.0, 2.0], 3),
        ([1.0, "2"], None),
        ([1.0, None], None),
    ],
    ids=repr,
)
def test_vector_that_is_none(embedding: Any, width: int | None) -> None:
    """Neither base64 nor numbers, no whole numbers of four bytes, or another width than expected."""
    with pytest.raises(EmbeddingFailed) as caught:
        wire.row(embedding, width)

    assert caught.value.code == "bad_answer"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_number_that_is_none(number: float, place: int) -> None:
    """Wherever it stands, also beside its opposite; for lists and for arrays."""
    numbers = [1.0, math.inf, 3.0] if number == -math.inf else [1.0, 2.0, 3.0]
    numbers[place] = number
    row = array("f", numbers).tobytes()

    with pytest.raises(EmbeddingFailed):
        wire.floats(row)
    with pytest.raises(EmbeddingFailed) as caught:
        wire.numpy_rows([array("f", [0.0, 0.0, 0.0]).tobytes(), row])
    assert caught.value.index == 1


@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3), min_size=1)
)
def test_numbers_to_the_bit(rows: list[list[float]]) -> None:
    """Base64, a list of numbers, floats, an array: the same numbers each way."""
    raw = [array("f", row).tobytes() for row in rows]

    assert [wire.row(base64.b64encode(each).decode(), 3) for each in raw] == raw
    assert [wire.row(row, 3) for row in rows] == raw
    assert [wire.floats(each) for each in raw] == rows
    found = wire.numpy_rows(raw)
    assert found.dtype == numpy.float32
    assert found.tobytes() == b"".join(raw)
    found += 1.0  # it is the app's own


# --- answer → error ---


def proxy_s_errors() -> list[Any]:
    return [kind("words", code=None) for kind in encode._ANSWERS if kind.__name__ != "WrongMethod"]


@pytest.mark.parametrize("error", proxy_s_errors(), ids=lambda error: type(error).__name__)
def test_each_error_of_the_proxy(error: Any) -> None:
    """What the proxy spells is read: its code, its words, whether to try again, and the kind for its status."""
    error.retry_after_s = 3.0
    spelled = encode.error_answer(error)

    headers = {name.lower(): value for name, value in spelled.headers.items()}
    found = wire.failure(wire.Answer(spelled.status, headers, spelled.body), "/s")

    kinds = {400: InvalidInput, 413: InvalidInput, 503: Unavailable, 429: Unavailable, 504: DeadlineExceeded}
    assert type(found) is kinds.get(spelled.status, EmbeddingFailed)
    assert (found.code, found.status, found.retry_after_s) == (error.code, spelled.status, 3.0)
    assert found.retryable == (headers["x-should-retry"] == "true")
    assert str(found) == f"words (HTTP {spelled.status})"


def told(status: int = 400, body: Any = None, **headers: str) -> EmbeddingError:
    return wire.failure(answer(body, status, **headers), "/s")


def test_culprit_s_place() -> None:
    """`param` names it; the caller hears of its own place, not of the one in a request it knows nothing of."""
    error = told(422, {"error": {"message": "'input[12]' is bad", "param": "input[12]", "code": "bad"}})

    assert (error.index, type(error)) == (12, InvalidInput)
    assert str(wire.placed(error, None)) == "'the text' is bad (HTTP 422)"
    assert str(wire.placed(error, 300)) == "'texts[300]' is bad (HTTP 422)"
    assert wire.placed(error, 300).index == 300
    assert told(400, {"error": {"message": "m", "param": "input"}}).index is None


@pytest.mark.parametrize("body", [b"<html>secret</html>", b"", [], {"error": "secret"}, {"error": {"message": 7}}])
@pytest.mark.parametrize("status", [302, 404, 500, 502])
def test_page_of_somebody_else(body: Any, status: int) -> None:
    """It is not quoted; the message says that something else may be listening."""
    error = told(status, body)

    assert (type(error), error.code) == (EmbeddingFailed, "not_a_sidecar")
    assert "listening" in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize(("status", "kind"), [(429, Unavailable), (503, Unavailable), (504, DeadlineExceeded)])
def test_busy_page_of_somebody_else(status: int, kind: type[EmbeddingError]) -> None:
    """A gateway's own 503 means what it says, whoever it is."""
    assert type(told(status, b"<html>", retry_after="7")) is kind
    assert told(status, b"<html>", retry_after="7").retry_after_s == 7.0


def test_words_are_bounded_and_readable() -> None:
    """A message ends in logs: no control characters, and no novel."""
    error = told(500, {"error": {"message": "a\r\nb\x1b[31m" + "x" * 9000, "code": 7}})

    assert str(error).startswith("a b [31mxxx")
    assert len(str(error)) < 600
    assert error.code == "embedding_failed"


@pytest.mark.parametrize("value", ["soon", "-1", "Wed, 21 Oct 2026 07:28:00 GMT", "1e9", ""])
def test_retry_after_that_is_no_number(value: str) -> None:
    """It says nothing."""
    assert told(503, {"error": {"message": "m"}}, retry_after=value).retry_after_s is None


# --- ready or not ---


def test_ready_or_why_not() -> None:
    """The page of the proxy, ready and not, and a page of somebody else."""
    ready = answer({"status": "ready", "reasons": [], "models": {}})
    unready = answer({"status": "not ready", "reasons": ["model m: no key"], "models": {}}, 503)

    assert wire.unready(ready, "/s") is None
    assert isinstance(found := wire.unready(unready, "/s"), Unavailable)
    assert (found.code, "model m: no key" in str(found)) == ("not_ready", True)
    for other in (answer(b"<html>ok</html>"), answer("ok"), answer({"status": "ready"}), answer([], 404)):
        assert isinstance(wrong := wire.unready(other, "/s"), EmbeddingFailed)
        assert wrong.code == "not_a_sidecar"
