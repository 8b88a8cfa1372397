"""
The gate: what an upstream calls vectors → rows that may be cached and answered, or BadVectors.

Pure. Checked on every answer, not on the first: count, width, every number finite, no vector all zero. (The order is
the dialect's business, which knows the upstream's `index`.) Rows come out as little-endian float32 bytes; from base64
they go there without becoming Python numbers.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import cast

import numpy
import orjson
from pybase64 import b64decode

from proxy.base.errors import BadVectors
from proxy.base.messages import FLOAT32_BYTES, Raw, Row

_FLOAT32 = numpy.dtype("<f4")
_NUMBER_START = b"-0123456789 \t\r\n"
"""What follows the bracket of an array of numbers, where nothing else does that is worth a look."""


def gate(raw: Sequence[Raw], *, count: int, width: int | None) -> tuple[Row, ...]:
    """
    Let good vectors pass.

    Args:
        raw: one per input, in the order of the batch.
        count: how many inputs were sent.
        width: how wide each has to be; None where nobody knows yet, then all have to be alike.

    Returns:
        count × width little-endian float32, one bytes object per row.

    Raises:
        BadVectors: names what is wrong and where, never a number of a vector. Where it is single rows, `index` is the
            first of them: without that input the others may be asked for again.
    """
    if len(raw) != count:
        raise BadVectors(f"it sent {len(raw)} vectors for {count} inputs")
    rows = _passed_at_once(raw, width)
    return _passed_singly(raw, width) if rows is None else rows


def arrays(body: bytes) -> Iterator[tuple[int, int, Row]]:
    """
    Find the vectors in the JSON of an answer, before it is read as a whole.

    A vector is an array without another one in it. Whether the rest is JSON is seen by whoever reads that.

    Yields:
        Where an array of numbers begins, where it has ended, and the row that it is.

    Raises:
        ValueError: there are other arrays than these and those around them; then nothing that was found counts.
    """
    last = 0
    while end := body.find(b"]", last) + 1:
        start = body.rfind(b"[", last, end)
        if start < 0 or body[start + 1] not in _NUMBER_START:
            break
        yield start, end, _row(orjson.loads(memoryview(body)[start:end]))
        last = end
    if body.find(b"[", end) >= 0:
        raise ValueError("other arrays follow")


def check_numbers(matrix: numpy.ndarray) -> None:
    """
    Check that each row of a count × width float32 matrix is finite and not all zero.

    Raises:
        BadVectors: for the first row that is not.
    """
    if _are_fine(matrix):
        return
    for index, row in enumerate(matrix):
        if flaw := _flaw(row):
            raise BadVectors(f"vector {index} {flaw}")


def _passed_at_once(raw: Sequence[Raw], width: int | None) -> tuple[Row, ...] | None:
    """Return the rows if a look at all of them together finds nothing; None when each wants a look of its own."""
    try:
        if set(map(type, raw)) == {str}:  # the usual kind: a call per row is a third of the whole
            rows = tuple([b64decode(item, None, True) for item in cast(Sequence[str], raw)])
        else:
            rows = tuple([_row(item) for item in raw])
    except ValueError:
        return None
    size = width * FLOAT32_BYTES if width else len(rows[0])
    if set(map(len, rows)) != {size} or size % FLOAT32_BYTES:
        return None
    matrix = numpy.frombuffer(b"".join(rows), _FLOAT32).reshape(len(rows), size // FLOAT32_BYTES)
    return rows if _are_fine(matrix) else None


def _passed_singly(raw: Sequence[Raw], width: int | None) -> tuple[Row, ...]:
    """
    Return the rows if each of them is good.

    What is wrong is the whole answer's fault, not a row's, in two cases: (1) there are several vectors, and none is
    good; (2) there is one, of another width. Elsewhere the first bad row is singled out.
    """
    rows: dict[int, Row] = {}
    flaws: dict[int, str] = {}
    for index, item in enumerate(raw):
        try:
            rows[index] = _row(item)
        except ValueError as error:
            flaws[index] = str(error)
    if width is None and rows:
        ((usual_bytes, _),) = Counter(map(len, rows.values())).most_common(1)
        width = usual_bytes // FLOAT32_BYTES
    other_width = {index for index, row in rows.items() if len(row) / FLOAT32_BYTES != width}
    for index, row in rows.items():
        if index in other_width:
            flaws[index] = f"has {len(row) / FLOAT32_BYTES:g} numbers instead of {width}"
        elif flaw := _flaw(numpy.frombuffer(row, _FLOAT32)):
            flaws[index] = flaw
    if not flaws:
        return tuple(rows.values())
    first = min(flaws)
    is_whole = len(flaws) == len(raw) and (len(raw) > 1 or first in other_width)
    raise BadVectors(f"vector {first} {flaws[first]}", index=None if is_whole else first)


def _are_fine(matrix: numpy.ndarray) -> bool:
    """Tell in one pass whether all rows are finite and none is all zero; False where that would take a closer look."""
    # A sum of squares is finite and above zero exactly when the row is fine, but for numbers beyond 1e±19, whose
    # squares leave float32. min() may pass over a NaN, sum() cannot.
    squares: list[float] = numpy.einsum("ij,ij->i", matrix, matrix).tolist()
    return min(squares) > 0 and sum(squares) < math.inf


def _flaw(row: numpy.ndarray) -> str:
    if not numpy.isfinite(row).all():
        return "holds NaN or infinity"
    return "" if row.any() else "is all zero"


def _row(item: Raw) -> Row:
    """
    Read one vector.

    Raises:
        ValueError: says what is wrong with it.
    """
    if isinstance(item, bytes):
        return item
    if isinstance(item, str):
        try:
            return b64decode(item, None, True)
        except ValueError:  # binascii.Error is one
            raise ValueError("is not valid base64") from None
    if not isinstance(item, list) or not item:
        raise ValueError(f"is {'null' if item is None else 'no list of numbers'}")
    kinds = list(map(type, item))
    if kinds.count(float) != len(kinds) and not set(kinds) <= {float, int}:  # struct would make a number of true
        raise ValueError("holds something that is no number")
    try:
        # 8 µs for 1536 numbers; numpy.array() takes 16.
        return struct.pack(f"<{len(item)}f", *item)
    except (OverflowError, struct.error):
        raise ValueError("holds NaN or infinity") from None
