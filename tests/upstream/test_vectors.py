"""The gate: every flaw is found, and what passes has not changed by a bit."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base.errors import BadVectors
from proxy.upstream.vectors import arrays, check_numbers, gate

NAN, INF = float("nan"), float("inf")

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
matrices = st.integers(1, 9).flatmap(
    lambda width: st.lists(st.lists(numbers, min_size=width, max_size=width).filter(any), min_size=1, max_size=5)
)


def spelled(*row: float) -> str:
    return base64.b64encode(numpy.array(row, dtype="<f4").tobytes()).decode()


def row_bytes(*row: float) -> bytes:
    return numpy.array(row, dtype="<f4").tobytes()


def refusal_of(raw: Any, *, count: int | None = None, width: int | None = 2) -> BadVectors:
    with pytest.raises(BadVectors) as caught:
        gate(raw, count=len(raw) if count is None else count, width=width)
    return caught.value


def flaw_of(raw: Any, *, count: int | None = None, width: int | None = 2) -> str:
    return refusal_of(raw, count=count, width=width).message


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


@pytest.mark.parametrize(("given_count", "wanted"), [(1, 2), (3, 2), (0, 1), (0, 2)])
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


GOOD = spelled(1, 2, 3, 4)
"""Sixteen bytes, so that two `=` stand at the end."""


@pytest.mark.parametrize(
    "item",
    [
        *("A", "AA", "AAA", "AAAAA", GOOD[:-1], GOOD[:-2], GOOD[:-3]),  # padding that is missing
        *("=", "====", "A===", "AA=A", "=AAA", GOOD + "=", GOOD + "==", GOOD + "====", "AAAA====", "AAAA="),  # too much
        *(GOOD + GOOD, GOOD + "AAAA", GOOD + "A"),  # data after the end
        *("AAAA AAAA", " AAAA", "AAAA ", "AAAA\n", "\nAAAA", "AAAA\r\nAAAA", "AAAA\tAAAA", "AA==\n", "AA=\n="),  # space
        *("-_-_", "AAA-", "AAA_"),  # the alphabet of URLs
        *("not base64!", "AAA\0", "\0AAA", "AAA.", "AAA,", "AAA$", "AAA\x7f", "AAAA\0"),  # no alphabet at all
    ],
    ids=ascii,
)
def test_bad_base64(item: str) -> None:
    """Base64 is read strictly: the one alphabet, right padding, nothing after it and nothing between."""
    assert flaw_of([item], width=None) == "vector 0 is not valid base64"


@pytest.mark.parametrize("letter", ["-", "_", " ", "\n", "=", "\0", "!", "é", "Ā"], ids=ascii)
def test_bad_letter_anywhere(letter: str) -> None:
    """A bad letter is found wherever it stands in a long vector, whichever way the decoder goes through it."""
    good = spelled(*range(1, 97))
    bad = [good[:at] + letter + good[at + 1 :] for at in range(len(good) - 1)]  # at the very end `=` is padding

    assert all(flaw_of([item], width=96) == "vector 0 is not valid base64" for item in bad)


@given(item=st.text("Aa9+/=-_ \n\0é", max_size=12))
@settings(derandomize=True, deadline=None, max_examples=2000)
def test_base64_is_no_laxer_than_pythons(item: str) -> None:
    """What `binascii` refuses in strict mode is refused, and what is read is read as it reads it."""
    try:
        rows = gate([item, "AACAPw=="], count=2, width=len(item) * 3 // 16 or None)
    except BadVectors:
        return

    assert rows[0] == binascii.a2b_base64(item, strict_mode=True)


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


ONE, TWO = [1.0, 2.0], spelled(3, 4)
BAD = [None, [1.0, NAN], spelled(1, INF), [0.0, 0.0], "not base64!", [1.0, True], [], [1.0, 1e39], [10**400, 1]]


@pytest.mark.parametrize("width", [None, 2])
@pytest.mark.parametrize("bad", [*BAD, [1.0], [1.0, 2.0, 3.0], spelled(5), "AAAA", ""], ids=str)
def test_row_that_is_to_blame(bad: Any, width: int | None) -> None:
    """One bad row among good ones is singled out, wherever it stands: the others may be asked for without it."""
    for at in range(3):
        raw = [ONE, TWO]
        raw.insert(at, bad)
        error = refusal_of(raw, width=width)

        assert error.index == at
        assert error.message.startswith(f"vector {at} ")


def test_first_of_several_bad_rows() -> None:
    """Of several bad rows the first is singled out, whatever their flaws are."""
    error = refusal_of([ONE, [1.0], None, TWO, [0.0, 0.0]])

    assert (error.index, error.message) == (1, "vector 1 has 1 numbers instead of 2")


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_only_row(bad: Any) -> None:
    """Where a batch is one input, its bad row is that input's."""
    assert refusal_of([bad]).index == 0


@pytest.mark.parametrize(
    ("raw", "width"),
    [
        ([[1.0, 2.0, 3.0]], 2),
        ([[1.0, 2.0, 3.0], spelled(1, 2, 3)], 2),
        ([[1.0], [1.0, 2.0, 3.0]], 2),
        ([None, None], 2),
        ([None, [NAN, 1.0], [0.0, 0.0], [1.0]], 2),
        ([[0.0, 0.0], [0.0, 0.0]], None),
        ([None, None], None),
    ],
    ids=str,
)
def test_nobody_is_to_blame(raw: Any, width: int | None) -> None:
    """Where no row is good, or all have another width, it is no input's doing."""
    assert refusal_of(raw, width=width).index is None


@pytest.mark.parametrize("count", [1, 3])
def test_wrong_count_is_no_rows_fault(count: int) -> None:
    """Where rows are missing or too many, none of them is singled out."""
    assert refusal_of([ONE, None], count=count).index is None


def test_width_of_most_rows() -> None:
    """Where nobody knows the width, the row that differs from the others is the bad one, even if it is the first."""
    error = refusal_of([[1.0], ONE, TWO], width=None)

    assert (error.index, error.message) == (0, "vector 0 has 1 numbers instead of 2")


def test_message_shows_no_number() -> None:
    """Messages end in logs, and name places only."""
    for raw in ([[0.123456, NAN]], [[0.123456, "x"]], [[0.123456]]):
        assert "0.123" not in flaw_of(raw)


# --- vectors taken out of an answer before it is read ---


def without_arrays(body: bytes) -> tuple[bytes, list[bytes]]:
    """Return what is left of an answer, with `[]` in each vector's place, and the vectors."""
    left, rows, last = b"", [], 0
    for start, end, row in arrays(body):
        left += body[last:start] + b"[]"
        rows.append(row)
        last = end
    return left + body[last:], rows


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "spell",
    [
        lambda rows: rows,
        lambda rows: {"embeddings": rows, "model": "m", "n": 3},
        lambda rows: {"object": "list", "data": [{"embedding": row, "index": i} for i, row in enumerate(rows)]},
        lambda rows: {"model": "m", "data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]},
    ],
    ids=["tei", "ollama", "openai", "index first"],
)
@given(matrix=matrices)
@settings(derandomize=True, deadline=None, max_examples=30)
def test_arrays_of_each_dialect(spell: Any, indent: int | None, matrix: list[list[float]]) -> None:
    """All vectors of an answer are found, and what is left is the answer without them."""
    left, rows = without_arrays(json.dumps(spell(matrix), indent=indent).encode())

    assert rows == [row_bytes(*row) for row in matrix]
    assert json.loads(left) == spell([[]] * len(matrix))


@pytest.mark.parametrize(
    "body", [b"", b"null", b"{}", b'{"error":"no"}', b'{"data":[]}', b'{"data":["AAAA"]}', b"]", b"]]"]
)
def test_answer_without_arrays(body: bytes) -> None:
    """Where there are no arrays of numbers, base64 above all, nothing is taken out."""
    assert without_arrays(body) == (body, [])


@pytest.mark.parametrize(
    "body",
    [
        b"[[],[1,2]]",
        b"[[null],[1,2]]",
        b'[["x"],[1,2]]',
        b"[[1,true]]",
        b"[[1,NaN]]",
        b"[[1,2,]]",
        b"[[1 2]]",
        b"[[01]]",
        b"[[1e400]]",
        b"[[[1,2],[3,4]],[[1,2],[3,4]]]",
        b'{"shape":[[1],[2]],"data":[[1,2]]}',
        b'{"names":["a","b"],"data":[[1,2]]}',
        b'{"note":"a ] b","data":[[1,2]]}',
        b'{"data":[[1,2]],"note":"[x]"}',
    ],
    ids=lambda body: body.decode(),
)
def test_arrays_of_something_else(body: bytes) -> None:
    """Brackets around anything but a vector, and the answer is better read as a whole."""
    with pytest.raises(ValueError):
        without_arrays(body)


@pytest.mark.parametrize("last", ["[]", "[null]", '["x"]', "null", '"AAAA"', "{}"])
def test_last_one_is_no_array_of_numbers(last: str) -> None:
    """What stands behind the last vector is left for the gate."""
    assert without_arrays(f"[[1,2],{last}]".encode()) == (f"[[],{last}]".encode(), [row_bytes(1, 2)])


def test_row_that_has_been_read_before() -> None:
    """The gate takes rows, too, and looks at them like at all others."""
    assert gate([row_bytes(1, 2), TWO], count=2, width=2) == (row_bytes(1, 2), row_bytes(3, 4))
    assert flaw_of([row_bytes(1, 2), row_bytes(1, NAN)]) == "vector 1 holds NaN or infinity"


# --- matrices of the embedded model ---


def test_matrix_of_good_rows() -> None:
    """A good matrix passes in silence."""
    check_numbers(numpy.array([[1, 0], [0, -1]], dtype="<f4"))
    check_numbers(numpy.array([[1, 0], [1e30, 1e30], [1e-30, 0]], dtype="<f4"))


@pytest.mark.parametrize(
    ("row", "problem"), [([NAN, 1], "NaN or infinity"), ([1, INF], "NaN or infinity"), ([0, 0], "all zero")]
)
def test_matrix_with_a_bad_row(row: list[float], problem: str) -> None:
    """The first bad row is named."""
    matrix = numpy.array([[1, 0], [1e30, 1e30], row, [0, 0]], dtype="<f4")
    with pytest.raises(BadVectors, match=f"vector 2 .*{problem}"):
        check_numbers(matrix)
