"""Keys tell any two different inputs apart, and nothing else."""

from __future__ import annotations

import string

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from proxy.base.keys import KEY_BYTES, fingerprint, input_bytes, keys
from proxy.base.messages import Input, Spec

SAME_EACH_TIME = settings(deadline=None, derandomize=True, max_examples=200)

# Few characters, so that examples come close to each other: the letters of the kinds, digits, bytes of lengths.
TEXTS = st.text(alphabet="st01n\0\1\b é€", max_size=9)
TOKENS = st.lists(st.sampled_from([0, 1, 115, 116, 256, 2**31 - 1]), max_size=4).map(tuple)
INPUTS: st.SearchStrategy[Input] = st.one_of(TEXTS, TOKENS)
WIDTHS = st.sampled_from([None, 1, 2, 11, 12, 112])
PARAMS = st.sampled_from([b"{}", b'{"a":1}', b'{"a":11}', b"1", b"11", b"None", b""])
SPACES = st.tuples(TEXTS, WIDTHS, PARAMS)
SPACE = fingerprint("m", Spec("m"))


def key(space: tuple[str, int | None, bytes], item: Input) -> bytes:
    name, width, params = space
    return keys(fingerprint(name, Spec("m", width, params)), [item])[0]


@SAME_EACH_TIME
@given(SPACES, INPUTS, SPACES, INPUTS)
def test_any_two_different_inputs(space: tuple, item: Input, other_space: tuple, other: Input) -> None:
    """Another space, another kind or another input is another key."""
    assume((space, item) != (other_space, other))

    assert key(space, item) != key(other_space, other)


@SAME_EACH_TIME
@given(INPUTS, INPUTS)
def test_any_two_different_inputs_of_one_space(item: Input, other: Input) -> None:
    """Two inputs are spelled alike only when they are alike."""
    assert (input_bytes(item) == input_bytes(other)) == (item == other)


@SAME_EACH_TIME
@given(st.lists(INPUTS, max_size=5))
def test_input_among_others(inputs: list[Input]) -> None:
    """An input has the same key alone and among any others, and keys stand in the order of the inputs."""
    found = keys(SPACE, inputs)

    assert found == tuple(keys(SPACE, [item])[0] for item in inputs)
    assert all(len(digest) == KEY_BYTES for digest in found)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("US", "us"),
        ("a text", "a text "),
        ("a text", " a text"),
        ("a  text", "a text"),
        ("a\ntext", "a text"),
        ("\u00e9", "e\u0301"),
        ("ﬁ", "fi"),
        ("a", "a\0"),
    ],
    ids=lambda text: ascii(text),
)
def test_texts_that_look_alike(text: str, other: str) -> None:
    """Nothing is folded and nothing trimmed: other bytes are another text."""
    first, second = keys(SPACE, [text, other])

    assert first != second


def test_text_that_spells_token_ids() -> None:
    """A text whose bytes are those of token ids is not these token ids."""
    ids = (0x73, 0x74)
    text = "s\0\0\0t\0\0\0"

    assert input_bytes(ids)[1:] == input_bytes(text)[1:]
    assert len(set(keys(SPACE, [ids, text]))) == 2


@pytest.mark.parametrize(
    ("spaces"),
    [
        [("m", 12, b"{}"), ("m1", 2, b"{}")],
        [("m", None, b"{}"), ("mNone", 1, b"{}")],
        [("m", 1, b"1{}"), ("m", 11, b"{}")],
        [("m", 1, b"{}"), ("m", None, b"{}")],
        [("m", None, b'{"a":1}'), ("m", None, b'{"a":2}')],
    ],
    ids=["name and width", "name and none", "width and parameters", "width", "parameters"],
)
def test_parts_of_a_space_that_could_run_together(spaces: list) -> None:
    """A character that moves from one part of the space to the next makes another space."""
    found = {fingerprint(name, Spec("m", width, params)) for name, width, params in spaces}

    assert len(found) == len(spaces)


def test_two_models_of_one_space() -> None:
    """Models whose settings name the same space share vectors, whatever callers call them."""
    assert fingerprint("space", Spec("one")) == fingerprint("space", Spec("other"))


def test_texts_and_token_ids_of_one_space() -> None:
    """Texts and token ids end in the same space; their kind is part of the key instead."""
    assert fingerprint("space", Spec("m")) == fingerprint("space", Spec("m", is_tokens=True))


def test_fingerprint_is_fit_for_a_header() -> None:
    """A space is named in 16 hexadecimal digits, whatever its own name looks like."""
    found = fingerprint("моё\n" * 100, Spec("m"))

    assert len(found) == 16
    assert set(found) <= set(string.hexdigits.lower())


def test_key_after_a_restart() -> None:
    """A key depends on nothing but space and input: the same in each process, on each machine."""
    assert keys("0123456789abcdef", ["a text"])[0].hex() == "491ef55b883c5b60bf59a80e49a59fae9e349492ac0ae1ed"
