"""
The gate: what an upstream calls vectors → rows that may be cached and answered, or BadVectors.

Pure. Checked on every answer, not on the first: count, width, every number finite, no vector all zero. (The order is
the dialect's business, which knows the upstream's `index`.) Rows come out as little-endian float32 bytes; from base64
they go there without becoming Python numbers.
"""

from __future__ import annotations

import binascii
from collections.abc import Sequence

import numpy

from proxy.base.errors import BadVectors
from proxy.base.messages import FLOAT32_BYTES, Raw, Row


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
        BadVectors: names what is wrong and where, never a number of a vector.
    """
    if len(raw) != count:
        raise BadVectors(f"it sent {len(raw)} vectors for {count} inputs")
    rows = [_row(item, index) for index, item in enumerate(raw)]
    width = width or len(rows[0]) // FLOAT32_BYTES
    for index, row in enumerate(rows):
        if len(row) != width * FLOAT32_BYTES:
            raise BadVectors(f"vector {index} has {len(row) / FLOAT32_BYTES:g} numbers instead of {width}")
    check_numbers(numpy.frombuffer(b"".join(rows), dtype="<f4").reshape(count, width))
    return tuple(rows)


def check_numbers(matrix: numpy.ndarray) -> None:
    """
    Check that each row of a count × width float32 matrix is finite and not all zero.

    Raises:
        BadVectors: for the first row that is not.
    """
    # One pass: a sum of squares is finite and above zero exactly when the row is fine, but for numbers beyond 1e±19,
    # whose squares leave float32; those few rows get a second, exact look.
    squares = numpy.einsum("ij,ij->i", matrix, matrix)
    if numpy.isfinite(squares).all() and squares.all():
        return
    for index, row in enumerate(matrix):
        if not numpy.isfinite(row).all():
            raise BadVectors(f"vector {index} holds NaN or infinity")
        if not row.any():
            raise BadVectors(f"vector {index} is all zero")


def _row(item: Raw, index: int) -> Row:
    if isinstance(item, str):
        try:
            return binascii.a2b_base64(item, strict_mode=True)
        except ValueError:  # binascii.Error is one; letters beyond ASCII raise it bare
            raise BadVectors(f"vector {index} is not valid base64") from None
    if not isinstance(item, list) or not item:
        raise BadVectors(f"vector {index} is {'null' if item is None else 'no list of numbers'}")
    if not set(map(type, item)) <= {float, int}:  # numpy would make numbers of true and of "1.0"
        raise BadVectors(f"vector {index} holds something that is no number")
    try:
        # Out-of-range numbers become infinity, which check_numbers() finds.
        with numpy.errstate(over="ignore"):
            return numpy.array(item, dtype="<f4").tobytes()
    except OverflowError:
        raise BadVectors(f"vector {index} holds a number beyond every float") from None
