"""What waits is cut, shared out, and put together by position."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base.errors import UpstreamFailed
from proxy.base.messages import Answer, Response
from proxy.funnel.microbatch.part import Part, Piece, Span, cut, halves, shares
from tests.fakes.stage import make_request, rows_of

SAME_EACH_TIME = settings(deadline=None, derandomize=True, max_examples=200)


def part_of(loop: asyncio.AbstractEventLoop, *inputs: str, **changes: str) -> Part:
    """Make a part whose inputs cost what their length is."""
    return Part(make_request(inputs, **changes), [float(len(text)) for text in inputs], lambda _: None)


def answered(tokens: int = 0, upstream: str = "u", upstream_s: float = 0.0, attempts: int = 1) -> Answer:
    """Make an answer of which only this counts here."""
    return Answer((), tokens, upstream, upstream_s=upstream_s, attempts=attempts)


# --- shares ---


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (10, [1.0], [10]),
        (10, [1.0, 1.0], [5, 5]),
        (10, [1.0, 1.0, 1.0], [4, 3, 3]),
        (11, [1.0, 1.0, 1.0], [4, 4, 3]),
        (10, [3.0, 1.0], [8, 2]),
        (0, [3.0, 1.0], [0, 0]),
        (1, [1.0, 100.0], [0, 1]),
        (5, [0.0, 0.0], [3, 2]),
        (5, [0.0, 1.0], [0, 5]),
    ],
)
def test_tokens_of_several_callers(total: int, weights: list[float], expected: list[int]) -> None:
    """Each gets what is due, in whole tokens; what rounding leaves goes to who lost most, among equals to the first."""
    assert shares(total, weights) == expected


@SAME_EACH_TIME
@given(st.integers(0, 10**9), st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_any_shares(total: int, weights: list[float]) -> None:
    """The shares add up to the total exactly, and none is a whole token away from what is due."""
    given_out = shares(total, weights)
    weight = sum(weights)

    assert sum(given_out) == total
    if weight > 1e-3:
        assert all(abs(given - total * each / weight) < 1.001 for given, each in zip(given_out, weights, strict=True))


# --- cutting ---


def test_piece_and_its_part(still_loop: asyncio.AbstractEventLoop) -> None:
    """A piece is of the spec and the caller of its first span, and over when nobody waits for any of it."""
    one, other = part_of(still_loop, "a", "bb", caller="one"), part_of(still_loop, "c", caller="other")
    piece = Piece([Span(one, 1, 2), Span(other, 0, 1)])
    one.failed(asyncio.CancelledError())
    is_over = piece.is_over
    other.failed(asyncio.CancelledError())

    assert (piece.spec, piece.caller) == (one.request.spec, "one")
    assert [len(span) for span in piece.spans] == [1, 1]
    assert [span.tokens for span in piece.spans] == [2.0, 1.0]
    assert not is_over
    assert piece.is_over


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (0, 6, [(0, 0, 3), (1, 0, 1), (2, 0, 2)]),
        (0, 3, [(0, 0, 3)]),
        (1, 2, [(0, 1, 2)]),
        (2, 5, [(0, 2, 3), (1, 0, 1), (2, 0, 1)]),
        (3, 4, [(1, 0, 1)]),
        (4, 6, [(2, 0, 2)]),
        (3, 3, []),
        (6, 6, []),
    ],
)
def test_cut_of_a_batch(
    still_loop: asyncio.AbstractEventLoop, first: int, last: int, expected: list[tuple[int, int, int]]
) -> None:
    """What lies between two positions of a batch is a list of spans, the outer ones cut."""
    parts = [part_of(still_loop, *inputs) for inputs in ("abc", "d", "ef")]
    spans = [Span(part, 0, len(part.request.inputs)) for part in parts]

    assert cut(spans, first, last) == [Span(parts[index], start, end) for index, start, end in expected]


@pytest.mark.parametrize(
    ("sizes", "left"),
    [
        ([2], 1),
        ([3], 1),
        ([8], 4),
        ([1, 1], 1),
        ([2, 1], 2),
        ([3, 4, 3], 3),
        ([1, 99], 1),
        ([99, 1], 99),
        ([1, 1, 1], 1),
        ([1] * 8, 4),
        ([30, 20, 50], 50),
        ([1, 40, 40, 1], 41),
    ],
)
def test_halves_of_a_batch(still_loop: asyncio.AbstractEventLoop, sizes: list[int], left: int) -> None:
    """A batch is cut between two requests, as near the middle as they allow; one request in its middle."""
    spans = [Span(part_of(still_loop, *("x" * size)), 0, size) for size in sizes]

    one, other = halves(spans)

    assert sum(map(len, one)) == left
    assert sum(map(len, other)) == sum(sizes) - left


def _positions(spans: Sequence[Span]) -> list[tuple[int, int]]:
    return [(id(span.part), index) for span in spans for index in range(span.first, span.last)]


@SAME_EACH_TIME
@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=12), data=st.data())
def test_any_cut(still_loop: asyncio.AbstractEventLoop, sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    """However a batch is cut, each input is in one of the pieces, in order, and no piece is empty."""
    spans = [Span(part_of(still_loop, *("x" * (size + skip))), skip, skip + size) for size, skip in sizes]
    total = sum(map(len, spans))
    at = data.draw(st.integers(0, total))

    whole = cut(spans, 0, at) + cut(spans, at, total)

    assert _positions(whole) == _positions(spans)
    if total >= 2:
        one, other = halves(spans)
        assert one
        assert other
        assert _positions(one + other) == _positions(spans)


# --- a part ---


def test_request_that_lands_at_once(still_loop: asyncio.AbstractEventLoop) -> None:
    """A request whose inputs went together is complete with their answer, and says what that cost."""
    part = part_of(still_loop, "a", "b")

    part.landed(0, 2, rows_of(("a", "b")), 7, answered(upstream_s=2.0, attempts=3), 0.5)

    assert part.is_over
    assert part.result() == Response(
        rows_of(("a", "b")), tokens=7, upstream="u", queue_s=0.5, upstream_s=2.0, attempts=3
    )


def test_request_that_lands_in_pieces(still_loop: asyncio.AbstractEventLoop) -> None:
    """Counts add up, times are those of the slowest piece, and the upstream is the first one to answer."""
    part = part_of(still_loop, "a", "b", "c")

    part.landed(2, 3, rows_of(("c",)), 1, answered(upstream="third", upstream_s=9.0), 0.1)
    part.landed(0, 1, rows_of(("a",)), 2, answered(upstream="first", upstream_s=1.0, attempts=2), 0.2)
    was_over, missing = part.is_over, part.missing
    part.landed(1, 2, rows_of(("b",)), 4, answered(upstream="second", upstream_s=2.0), 0.7)

    assert not was_over
    assert missing == 1
    assert part.result() == Response(
        rows_of(("a", "b", "c")), tokens=7, upstream="third", queue_s=0.7, upstream_s=9.0, attempts=4
    )


@SAME_EACH_TIME
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), order=st.randoms(use_true_random=False))
def test_any_order_of_landings(still_loop: asyncio.AbstractEventLoop, sizes: list[int], order: Random) -> None:
    """In whichever order the pieces land, each input has its own row at its own place."""
    inputs = [f"text {index}" for index in range(sum(sizes))]
    part = part_of(still_loop, *inputs)
    ends = list(itertools.accumulate(sizes))
    pieces = list(zip([0, *ends], ends, strict=False))
    order.shuffle(pieces)

    for first, last in pieces:
        assert not part.is_over
        part.landed(first, last, rows_of(inputs[first:last]), last - first, answered(), 0.0)

    assert part.result().rows == rows_of(inputs)
    assert part.result().tokens == len(inputs)


def test_request_that_fails(still_loop: asyncio.AbstractEventLoop) -> None:
    """The first error is the request's; a later one, or a late row, changes nothing."""
    part, failure = part_of(still_loop, "a", "b"), UpstreamFailed("broken")

    part.failed(failure)
    part.failed(UpstreamFailed("again"))
    part.landed(0, 2, rows_of(("a", "b")), 2, answered(), 0.0)

    assert part.error is failure


def test_request_whose_caller_has_left(still_loop: asyncio.AbstractEventLoop) -> None:
    """What lands or fails for a caller that has left is dropped."""
    part = part_of(still_loop, "a")
    part.failed(asyncio.CancelledError())

    part.landed(0, 1, rows_of(("a",)), 1, answered(), 0.0)
    part.failed(UpstreamFailed("broken"))

    assert isinstance(part.error, asyncio.CancelledError)
