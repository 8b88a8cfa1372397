"""Many texts are cut, and put together again in their order, whichever part comes back first."""

from __future__ import annotations

from array import array
from typing import Any

import numpy
import pytest

from rag_adapter.errors import EmbeddingFailed, InvalidInput
from rag_adapter.many import Job


def job(count: int, *, as_numpy: bool = False, width: int | None = None, on_progress: Any = None) -> Job:
    texts = [f"text {n}" for n in range(count)]
    return Job(texts, request_texts=3, width=width, as_numpy=as_numpy, on_progress=on_progress)


def rows(first: int, count: int, *, as_numpy: bool = False) -> list[Any]:
    """Row n is n, n + 0.5."""
    found = [[float(n), n + 0.5] for n in range(first, first + count)]
    return [array("f", row).tobytes() for row in found] if as_numpy else found


@pytest.mark.parametrize("as_numpy", [False, True])
def test_parts_that_come_back_in_any_order(as_numpy: bool) -> None:
    """The result has the order of the texts, and progress counts what is done."""
    told: list[tuple[int, int]] = []
    work = job(8, as_numpy=as_numpy, on_progress=lambda done, total: told.append((done, total)))
    parts = [(first, len(bodies)) for first, bodies in work.parts]
    assert parts == [(0, 3), (3, 3), (6, 2)]
    for first, count in (parts[2], parts[0], parts[1]):
        work.put(first, rows(first, count, as_numpy=as_numpy), "space")

    result = work.result()

    assert numpy.array(result).tolist() == rows(0, 8)
    assert told == [(2, 8), (5, 8), (8, 8)]
    if as_numpy:
        assert (result.dtype, result.shape, result.flags.writeable) == (numpy.float32, (8, 2), True)


def test_no_texts() -> None:
    """Nothing is asked, and the result has the form it always has."""
    assert job(0).result() == []
    assert job(0, as_numpy=True).result().shape == (0, 0)
    assert job(0, as_numpy=True, width=8).result().shape == (0, 8)
    assert list(job(0).parts) == []


@pytest.mark.parametrize("as_numpy", [False, True])
@pytest.mark.parametrize("has_other_space", [False, True])
def test_model_that_is_changed_meanwhile(as_numpy: bool, has_other_space: bool) -> None:
    """Vectors of two spaces, or two widths, are never mixed."""
    work = job(6, as_numpy=as_numpy)
    work.put(0, rows(0, 3, as_numpy=as_numpy), "old")
    later = rows(3, 3, as_numpy=as_numpy) if has_other_space else [row * 2 for row in rows(3, 3, as_numpy=as_numpy)]

    with pytest.raises(EmbeddingFailed) as caught:
        work.put(3, later, "new" if has_other_space else "old")

    assert caught.value.code == "space_changed"


def test_number_that_is_none_is_placed() -> None:
    """In an array, too, the error names the position in the whole list."""
    work = job(6, as_numpy=True)
    bad = rows(3, 3, as_numpy=True)
    bad[1] = array("f", [float("nan"), 0.0]).tobytes()

    with pytest.raises(EmbeddingFailed) as caught:
        work.put(3, bad, None)

    assert caught.value.index == 4


def test_text_that_cannot_be_spelled() -> None:
    """It is found when its part is cut, and named by its position."""
    work = Job(["a"] * 4 + ["\ud800"], request_texts=3, width=None, as_numpy=False, on_progress=None)
    next(work.parts)

    with pytest.raises(InvalidInput) as caught:
        next(work.parts)

    assert caught.value.index == 4
