"""Lists of token ids are read one by one; whatever else is in a body is read as ever."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy.base.errors import EmbeddingError
from proxy.base.settings import Catalogue, ModelSettings, RequestSettings
from proxy.edge.decode import Asked, decode
from proxy.edge.decode.lists import TURN_BYTES, taken_out

SAME_EACH_TIME = settings(deadline=None, derandomize=True, max_examples=300)


def taken(body: bytes) -> tuple[bytes, list[Any], int]:
    """Return what is left, what was taken out, and in how many turns."""
    steps, turns = taken_out(body), 1
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return *end.value, turns
        turns += 1


def outcome(body: bytes, lists: Any = ()) -> Any:
    """Decode a body; returns what counts of the request, or the error's message."""
    model = ModelSettings(dimensions=8, token_ids=True)
    try:
        asked: Asked = decode(
            body,
            CIMultiDict(),
            catalogue=Catalogue({"m": model}, "m"),
            settings=RequestSettings(),
            request_id="r",
            caller="c",
            now=0.0,
            lists=lists,
        )
    except EmbeddingError as error:
        return error.code, error.message, error.param
    return asked.request.inputs, asked.request.keys, asked.request.spec


def both(body: bytes) -> bool:
    """Whether a body means the same, read in turns and as a whole."""
    left, lists, _ = taken(body)
    return bool(outcome(left, lists) == outcome(body))


def test_lists_of_ids() -> None:
    """They come out as tuples, in order, and the rest stays."""
    left, lists, _ = taken(b'{"model": "m", "input": [[1, 2], [3]], "dimensions": 4}')

    assert lists == [(1, 2), (3,)]
    assert json.loads(left) == {"model": "m", "input": "\0", "dimensions": 4}


@pytest.mark.parametrize("indent", [None, 1])
def test_large_body(indent: int | None) -> None:
    """Others have their turn after each so many bytes, and the request is the same."""
    body = json.dumps({"input": [[n % 100_000] * 250 for n in range(1000)], "user": "u"}, indent=indent).encode()
    _, lists, turns = taken(body)

    assert len(lists) == 1000
    assert len(body) / TURN_BYTES * 0.9 < turns < len(body) / TURN_BYTES + 1
    assert both(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"input":"[[1]]"}',
        b'{"input":["a","[1,2]","x"]}',
        b'{"input":["\\"input\\":[[1,2]]","b"]}',
        b'{"input":[1,2]}',
        b'{"input":[]}',
        b'{"input":[[1,2],"a"]}',
        b'{"input":[[1,2],3]}',
        b'{"input":["a",[1,2]]}',
        b'{"input":[[1,[2]],[3]]}',
        b'{"input":[[1,2]',
        b'{"input":[[1,2],',
        b'{"input":[[1,2],]}',
        b'{"input":[[1,2][3]]}',
        b'{"input":[[1,2}]}',
        b'{"x":{"input":[[1,2]]},"input":"a"}',
        b'{"x":{"input":[[1,2]]},"input":[[3]]}',
        b'{"x":{"input":[[1,2]]},"input":"\\u0000"}',
        b'{"input":[[1,2]],"input":"a"}',
        b'{"input":"a","input":[[1,2]]}',
        b'{"input":[[1]],"input":[[2]]}',
        b'[{"input":[[1,2]]}]',
        b'{"input":[[1,2]]} x',
        b'"input":[[1,2]]',
        b"",
    ],
)
def test_anything_else(body: bytes) -> None:
    """What is no list of such lists, or not the request's own, means what it always has, errors included."""
    assert both(body)


@pytest.mark.parametrize("wrong", ["[]", "[1.5]", "[-1]", "[true]", "[2147483648]", '["a"]', "[null]", "[ ]"])
def test_list_that_is_no_token_ids(wrong: str) -> None:
    """What is wrong with one of them is told as ever, with its place."""
    body = f'{{"input":[[1],{wrong},[2]]}}'.encode()
    left, lists, _ = taken(body)

    assert outcome(left, lists) == outcome(body)
    assert outcome(body)[2] == "input"


ids = st.lists(st.integers(0, 2**31 - 1) | st.sampled_from([-1, True, 1.5, "x", None, []]), max_size=4)
value = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text('ab"[]\\,{}: input', max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["input", "x"]), inner, max_size=2),
    max_leaves=6,
)


@SAME_EACH_TIME
@given(
    st.lists(st.tuples(st.sampled_from(["input", "x", "user"]), st.lists(ids, max_size=4) | value), max_size=4),
    st.sampled_from([None, 0, 2]),
    st.integers(0, 200),
)
def test_any_body(fields: list[tuple[str, Any]], indent: int | None, cut: int) -> None:
    """Any body, also with a key twice, and cut off anywhere, means the same either way."""
    spelled = ",".join(f"{json.dumps(key)}:{json.dumps(item, indent=indent)}" for key, item in fields)
    body = f"{{{spelled}}}".encode()

    assert both(body)
    assert both(body[:cut])
