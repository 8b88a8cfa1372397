"""
The vector of a text: what the mock answers and the generator expects, so that every answer can be checked.

The first nine numbers are the first eight bytes of the SHA-256 and their exclusive or, each as (byte − 128) / 4096:
exact in float32 and in short decimals, so they survive every way of writing them down. The others are one of 256 rows
made once, so that an answer is a look-up and a copy, not 1536 numbers to format.

The same numbers as those of the Go tools, so that either mock goes with either generator.
"""

from __future__ import annotations

import binascii
import hashlib

import numpy
import orjson
from numpy.typing import NDArray

HEAD = 9
"""Numbers that tell the text."""
ROWS = 256
HEAD_BASE64 = HEAD * 4 // 3 * 4
"""Characters of the head in base64: 36 bytes are twelve whole groups, so head and row can be joined as text."""
TOLERANCE = 2e-6
"""Of a number that went through decimals and float32."""

_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""SplitMix64 (Steele, Lea, Flood 2014)."""
_ROW_SEED, _FIRST_SEED = 0x5851F42D4C957F2D, 12345
_SPREAD = 0.0884
"""Width of the numbers, so that 1536 of them have a length near one."""

_NUMBERS = (numpy.arange(256, dtype=numpy.float32) - 128) / numpy.float32(4096)
_PACKED = [number.tobytes() for number in _NUMBERS]
_DECIMALS = [orjson.dumps(number, option=orjson.OPT_SERIALIZE_NUMPY) for number in _NUMBERS]
_VALUES = [float(number) for number in _NUMBERS]


def key(text: bytes) -> bytes:
    """Return the nine bytes that tell a text (UTF-8) from others."""
    first = hashlib.sha256(text).digest()[:8]
    folded = int.from_bytes(first, "little")
    folded ^= folded >> 32
    folded ^= folded >> 16
    return first + bytes(((folded ^ folded >> 8) & 0xFF,))


def head_base64(text_key: bytes) -> bytes:
    """Return the head in base64, HEAD_BASE64 characters."""
    return binascii.b2a_base64(b"".join([_PACKED[byte] for byte in text_key]), newline=False)


def head_decimals(text_key: bytes) -> bytes:
    """Return the head as JSON numbers, with commas between."""
    return b",".join([_DECIMALS[byte] for byte in text_key])


def is_head(numbers: list[bytes], text_key: bytes) -> bool:
    """Say whether these decimals are the head of the text."""
    try:
        return all(
            abs(float(number) - _VALUES[byte]) <= TOLERANCE for number, byte in zip(numbers, text_key, strict=True)
        )
    except ValueError:
        return False


class Table:
    """The rows, as numbers and as text."""

    def __init__(self, dimensions: int = 1536) -> None:
        if dimensions <= HEAD:
            raise ValueError(f"dimensions is {dimensions}, at least {HEAD + 1} are needed")
        self.dimensions = dimensions
        self._rows = _rows(dimensions - HEAD)
        self._base64 = [binascii.b2a_base64(row.tobytes(), newline=False) for row in self._rows]
        self._decimals = [b"," + orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1] for row in self._rows]
        self.base64_characters = HEAD_BASE64 + len(self._base64[0])

    def base64(self, text_key: bytes) -> tuple[bytes, bytes]:
        """Return the vector in base64, without quotes: the head, and the row."""
        return head_base64(text_key), self._base64[_row_of(text_key)]

    def decimals(self, text_key: bytes) -> tuple[bytes, bytes]:
        """Return the vector as JSON numbers, without brackets: the head, and the row, which begins with a comma."""
        return head_decimals(text_key), self._decimals[_row_of(text_key)]

    def vector(self, text_key: bytes) -> NDArray[numpy.float32]:
        """Return the vector as numbers."""
        return numpy.concatenate([_NUMBERS[list(text_key)], self._rows[_row_of(text_key)]])

    def is_vector(self, numbers: object, text_key: bytes) -> bool:
        """Say whether these numbers, read from JSON, are the vector of the text."""
        try:
            found = numpy.asarray(numbers, dtype=numpy.float64)
        except (TypeError, ValueError):
            return False
        expected = self.vector(text_key)
        return found.shape == expected.shape and bool(numpy.all(numpy.abs(found - expected) <= TOLERANCE))


def _row_of(text_key: bytes) -> int:
    # The Go tools take the first two bytes, little-endian, modulo 256: that is the first byte.
    return text_key[0]


def _rows(width: int) -> NDArray[numpy.float32]:
    """Return the rows: SplitMix64, one seed per row, the upper 24 bits as a number around zero."""
    seeds = numpy.arange(ROWS, dtype=numpy.uint64) * numpy.uint64(_ROW_SEED) + numpy.uint64(_FIRST_SEED)
    steps = numpy.arange(1, width + 1, dtype=numpy.uint64) * numpy.uint64(_GAMMA)
    z = seeds[:, None] + steps[None, :]
    z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(_MIX_1)
    z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(_MIX_2)
    z ^= z >> numpy.uint64(31)
    unit = (z >> numpy.uint64(40)).astype(numpy.float32) / numpy.float32(1 << 24)
    return (unit - numpy.float32(0.5)) * numpy.float32(_SPREAD)
