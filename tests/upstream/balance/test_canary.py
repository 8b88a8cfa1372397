"""The rule about canaries: a right vector has the model's width, and lies where the first one lay."""

from __future__ import annotations

import math

import numpy
import pytest

from proxy.base.messages import Row
from proxy.upstream.balance.canary import CANARIES, LEAST_COSINE, flaw
from tests.fakes.balance import RIGHT
from tests.fakes.stage import rows_of
from tests.fakes.upstream import vector


def turned(degrees: float) -> tuple[Row, Row]:
    """Return two directions that differ by so much."""
    angle = math.radians(degrees)
    one, other = [1.0, 0.0, 0.0], [math.cos(angle), math.sin(angle), 0.0]
    return numpy.array(one, "<f4").tobytes(), numpy.array(other, "<f4").tobytes()


@pytest.mark.parametrize(("width", "is_right"), [(0, True), (8, True), (7, False), (9, False)])
def test_width_that_the_settings_say(width: int, is_right: bool) -> None:
    """A canary has the width of the settings, where they say one; the flaw names both."""
    found = flaw([RIGHT], None, width)

    assert found == ("" if is_right else f"its vectors have 8 numbers, the model's have {width}")


def test_width_of_the_reference() -> None:
    """Where the settings leave the width open, the reference's is due."""
    shorter = vector(CANARIES[0], 4).tobytes()

    assert flaw([shorter], [RIGHT], 0) == "its vectors have 4 numbers, the model's have 8"
    assert flaw([RIGHT], [RIGHT], 0) == ""


@pytest.mark.parametrize(
    ("cosine", "is_right"), [(1.0, True), (LEAST_COSINE + 1e-5, True), (LEAST_COSINE - 1e-5, False), (0.0, False)]
)
def test_cosine_around_its_bound(cosine: float, is_right: bool) -> None:
    """A canary lies where the reference lies; the flaw tells how far away it is."""
    one, other = turned(math.degrees(math.acos(cosine)))
    found = flaw([other], [one], 0)

    assert (found == "") == is_right
    assert is_right or f"cosine {cosine:.4f}" in found


def test_opposite_direction() -> None:
    """The opposite of a vector is not the vector."""
    one, other = turned(180)

    assert "cosine -1.0000" in flaw([other], [one], 3)


@pytest.mark.parametrize("length", [1e-3, 7.0, 1e6])
def test_length_is_no_flaw(length: float) -> None:
    """Upstreams may normalise or not: only the direction counts."""
    assert flaw([(numpy.frombuffer(RIGHT, "<f4") * numpy.float32(length)).tobytes()], [RIGHT], 0) == ""


@pytest.mark.parametrize("length", [1e30, 1e-30])
def test_direction_of_extreme_vectors(length: float) -> None:
    """Numbers that pass the gate are compared like any others, whatever their size."""
    one, other = (numpy.array(row, "<f4").tobytes() for row in ([length, length], [length, -length]))

    assert "cosine 0.0000" in flaw([other], [one], 2)
    assert flaw([one], [one], 2) == ""


@pytest.mark.parametrize("index", range(3))
def test_one_text_of_several(index: int) -> None:
    """A server that treats one of the texts in its own way is another one, whichever it is."""
    rows = list(rows_of(CANARIES))
    rows[index] = RIGHT if index else rows[1]

    assert "lie elsewhere" in flaw(rows, rows_of(CANARIES), 8)


def test_texts_of_different_width() -> None:
    """All vectors have one width."""
    assert flaw([RIGHT, RIGHT[4:]], None, 0) == "its vectors have 7 numbers, the model's have 8"
