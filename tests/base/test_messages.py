"""Messages count their bytes, keep their parts together, and never change."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base.keys import keys
from proxy.base.messages import TOKEN_ID_BYTES, Input, Priority, Spec, size_bytes
from tests.fakes.stage import make_request

SAME_EACH_TIME = settings(deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("item", "size"),
    [("", 0), ("text", 4), ("é", 2), ("€", 3), ("text 🙂", 9), ((), 0), ((1, 2, 3), 3 * TOKEN_ID_BYTES)],
)
def test_size_of_an_input(item: Input, size: int) -> None:
    """A text counts its UTF-8 bytes, a list of token ids a fixed number of bytes for each id."""
    assert size_bytes(item) == size


@SAME_EACH_TIME
@given(st.text(alphabet="a\x7f\x80é\u07ff\u0800€\uffff🙂"))
def test_size_of_any_text(text: str) -> None:
    """The short way for ASCII counts the same as encoding does."""
    assert size_bytes(text) == len(text.encode())


@SAME_EACH_TIME
@given(st.lists(st.integers(0, 3)))
def test_part_of_a_request(indexes: list[int]) -> None:
    """A part has the inputs asked for, in the order asked for, each with its own key, and counts their bytes."""
    inputs = ("a", "ß", "four", "€")
    whole = make_request(inputs, user="somebody", no_store=True, traceparent="00-1-2-00")

    part = whole.part(indexes)

    chosen = [inputs[index] for index in indexes]
    assert part.inputs == tuple(chosen)
    assert part.keys == keys(whole.space, chosen)
    assert part.size_bytes == sum(len(text.encode()) for text in chosen)


def test_part_keeps_all_else() -> None:
    """Besides inputs, keys and size a part is the request that it was taken from."""
    whole = make_request(
        ("a", "b"), user="somebody", no_cache=True, no_store=True, traceparent="t", priority=Priority.BULK
    )

    part = whole.part([1])

    changed = {"inputs", "keys", "sizes", "size_bytes"}
    for field in dataclasses.fields(whole):
        if field.name not in changed:
            assert getattr(part, field.name) == getattr(whole, field.name), field.name
    assert whole.inputs == ("a", "b")


def test_part_of_token_ids() -> None:
    """Lists of token ids are parted like texts."""
    whole = make_request(((1, 2, 3), (4,)), spec=Spec("m", is_tokens=True))

    part = whole.part([1])

    assert part.inputs == ((4,),)
    assert part.size_bytes == TOKEN_ID_BYTES
