"""The gate: every flaw is found, and what passes has not changed by a bit."""

from __future__ import annotations

import base64
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base.errors import BadVectors
from proxy.upstream.vectors import check_numbers, gate

NAN, INF = float("nan"), float("inf")

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
matrices = st.integers(1, 9).flatmap(
    lambda width: st.lists(st.lists(numbers, min_size=width, max_size=width).filter(any), min_size=1, max_size=5)
)


def spelled(*row: float) -> str:
    return base64.b64encode(numpy.array(row, dtype="<f4").tobytes()).decode()


def row_bytes(*row: float) -> bytes:
    return numpy.array(row, dtype="<f4").tobytes()


def flaw_of(raw: Any, *, count: int | None = None, width: int | None = 2) -> str:
    with pytest.raises(BadVectors) as caught:
        gate(raw, count=len(raw) if count is None else count, width=width)
    return caught.value.message


# --- what passes ---


@given(matrix=matrices)
@settings(derandomize=True, deadline=None)
def test_base64_passes_as_it_is(matrix: list[list[float]]) -> None:
    """From base64 to rows no bit changes, whatever the numbers."""
    rows = gate([spelled(*row) for row in matrix], count=len(matrix), width=len(matrix[0]))

    assert rows == tuple(row_bytes(*row) for row in matrix)


@given(matrix=matrices)
@settings(derandomize=True, deadline=None)
def test_numbers_pass_as_float32(matrix: list[list[float]]) -> None:
    """Lists of numbers give the same rows as base64 of these numbers."""
    rows = gate(matrix, count=len(matrix), width=None)

    assert rows == tuple(row_bytes(*row) for row in matrix)


@pytest.mark.parametrize(
    "row",
    [[1e30, 1e30], [3.4e38, 0.0], [1e-42, 0.0], [1e-30, -1e-30], [0, 1], [-1, 0.5], [0.0, 1e-45]],
    ids=str,
)
@pytest.mark.parametrize("spell", [list, lambda row: spelled(*row)], ids=["numbers", "base64"])
def test_extreme_but_finite_numbers(row: list[float], spell: Any) -> None:
    """Numbers whose squares leave float32 on either side are fine as long as they are float32 themselves."""
    assert gate([spell(row)], count=1, width=2) == (row_bytes(*row),)


def test_spellings_may_differ_by_row() -> None:
    """Each row is read as it is spelled."""
    assert gate([[1, 2], spelled(3, 4)], count=2, width=None) == (row_bytes(1, 2), row_bytes(3, 4))


def test_extreme_row_among_good_ones() -> None:
    """The second, exact look does not refuse good neighbours."""
    raw = [[1.0, 0.0], [1e30, 0.0], [1e-30, 0.0]]

    assert gate(raw, count=3, width=2) == tuple(row_bytes(*row) for row in raw)


# --- what does not ---


@pytest.mark.parametrize(("given_count", "wanted"), [(1, 2), (3, 2), (0, 1)])
def test_other_count(given_count: int, wanted: int) -> None:
    """There is one vector per input; the message names both counts."""
    message = flaw_of([[1.0, 2.0]] * given_count, count=wanted)

    assert f"{given_count} vectors for {wanted} inputs" in message


@pytest.mark.parametrize("row", [[1.0], [1.0, 2.0, 3.0], spelled(1), spelled(1, 2, 3)], ids=str)
def test_other_width(row: Any) -> None:
    """Every vector has the width of the model; the message names both."""
    found = 1 if row in ([1.0], spelled(1)) else 3

    assert flaw_of([[1.0, 2.0], row]) == f"vector 1 has {found} numbers instead of 2"


def test_widths_differ_where_none_is_known() -> None:
    """Where nobody knows the width, the first vector sets it for the others."""
    assert flaw_of([[1.0, 2.0, 3.0], [1.0, 2.0]], width=None) == "vector 1 has 2 numbers instead of 3"


def test_bytes_are_no_whole_numbers() -> None:
    """Base64 of a number of bytes that is no multiple of four is refused."""
    half = base64.b64encode(row_bytes(1, 2)[:-2]).decode()

    assert flaw_of([half]) == "vector 0 has 1.5 numbers instead of 2"
    assert "1.5 numbers" in flaw_of([half], width=None)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("spell", [list, lambda row: spelled(*row)], ids=["numbers", "base64"])
def test_number_that_is_none(bad: float, spell: Any) -> None:
    """NaN and infinity are found in whichever row they are."""
    assert flaw_of([spell([1.0, 2.0]), spell([1.0, bad])]) == "vector 1 holds NaN or infinity"


@pytest.mark.parametrize("number", [1e39, -1e39, 3.5e38, 1e300])
def test_number_beyond_float32(number: float) -> None:
    """A number that float32 cannot hold is none."""
    assert flaw_of([[number, 1.0]]) == "vector 0 holds NaN or infinity"


def test_huge_integer() -> None:
    """An integer that no float can hold is refused, not a crash."""
    assert "vector 0" in flaw_of([[10**400, 1]])


@pytest.mark.parametrize("row", [[0.0, 0.0], [-0.0, 0], spelled(0, 0)], ids=str)
def test_vector_of_zeros(row: Any) -> None:
    """A vector all zero has no direction."""
    assert flaw_of([[1.0, 2.0], row]) == "vector 1 is all zero"


@pytest.mark.parametrize("row", [[1e-60, 0.0]])
def test_vector_that_float32_rounds_to_zero(row: list[float]) -> None:
    """What is zero in float32 is zero."""
    assert flaw_of([row]) == "vector 0 is all zero"


@pytest.mark.parametrize("item", ["AAA", "AA=A", "AAAA AAAA", "AAAA\n", "====", "-_-_", "not base64!"])
def test_bad_base64(item: str) -> None:
    """Base64 is read strictly."""
    assert flaw_of([item], width=None) == "vector 0 is not valid base64"


def test_base64_with_letters_of_other_scripts() -> None:
    """Letters outside ASCII are bad base64 like any other, not a crash."""
    assert flaw_of(["ÄÖÜß"]) == "vector 0 is not valid base64"


@pytest.mark.parametrize("width", [None, 2])
def test_empty_base64(width: int | None) -> None:
    """An empty string is no vector, whether the width is known or not."""
    assert "vector 0" in flaw_of([""], width=width)


def test_null() -> None:
    """Null in place of a vector is named as such."""
    assert flaw_of([[1.0, 2.0], None]) == "vector 1 is null"


@pytest.mark.parametrize("item", [{}, {"values": [1.0]}, 3, 1.5, True, []], ids=str)
def test_no_list(item: Any) -> None:
    """Anything else that JSON can hold in place of a vector is refused."""
    assert flaw_of([item]) == "vector 0 is no list of numbers"


@pytest.mark.parametrize("row", [[1.0, "x"], [1.0, {}], [[1.0], 2.0], [1.0, [2.0]]], ids=str)
def test_something_else_among_numbers(row: Any) -> None:
    """A list with something else in it is refused."""
    assert flaw_of([row]) == "vector 0 holds something that is no number"


def test_null_among_numbers() -> None:
    """A null component, which servers write for NaN, is refused."""
    assert "vector 0 holds" in flaw_of([[1.0, None]])


@pytest.mark.parametrize("row", [["1.0", "2.0"], [True, False], [1.0, True]], ids=str)
def test_strings_and_booleans_are_no_numbers(row: Any) -> None:
    """What merely can be turned into a number is none."""
    assert flaw_of([row]) == "vector 0 holds something that is no number"


def test_one_row_per_token() -> None:
    """A list of lists (llama.cpp without pooling) is refused, even where its numbers add up to the width."""
    assert "vector 0" in flaw_of([[[1.0, 2.0], [3.0, 4.0]]], width=4)


def test_message_shows_no_number() -> None:
    """Messages end in logs, and name places only."""
    for raw in ([[0.123456, NAN]], [[0.123456, "x"]], [[0.123456]]):
        assert "0.123" not in flaw_of(raw)


# --- matrices of the embedded model ---


def test_matrix_of_good_rows() -> None:
    """A good matrix passes in silence."""
    check_numbers(numpy.array([[1, 0], [1e30, 1e30], [1e-30, 0]], dtype="<f4"))


@pytest.mark.parametrize(
    ("row", "problem"), [([NAN, 1], "NaN or infinity"), ([1, INF], "NaN or infinity"), ([0, 0], "all zero")]
)
def test_matrix_with_a_bad_row(row: list[float], problem: str) -> None:
    """The first bad row is named."""
    matrix = numpy.array([[1, 0], [1e30, 1e30], row, [0, 0]], dtype="<f4")
    with pytest.raises(BadVectors, match=f"vector 2 .*{problem}"):
        check_numbers(matrix)
