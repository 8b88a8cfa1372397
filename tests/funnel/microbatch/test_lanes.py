"""Whose turn it is: by class, by caller, by spec; and how much of it fits a call."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base.messages import Limits, Priority, Spec
from proxy.funnel.microbatch.lanes import QUANTUM_TOKENS, Lane, Lanes
from proxy.funnel.microbatch.part import Part, Piece, Span, cut
from tests.fakes.stage import make_request

SAME_EACH_TIME = settings(deadline=None, derandomize=True, max_examples=200)
ROOMY = Limits(max_inputs=1000, max_bytes=1_000_000)
OTHER = Spec("m", dimensions=4)
INTERACTIVE, BULK = Priority.INTERACTIVE, Priority.BULK


class Hall:
    """One lane, and the parts that wait in it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.lane = Lane()

    def part(self, costs: Sequence[float], sizes: Sequence[int] | None = None, **changes: object) -> Part:
        """Make a part of inputs that cost so much."""
        inputs = tuple(f"text {index}" for index in range(len(costs)))
        sizes = tuple(sizes) if sizes is not None else (1,) * len(costs)
        request = make_request(inputs, sizes=sizes, size_bytes=sum(sizes), **changes)
        return Part(request, list(costs), self.lane.forget)

    def comes(self, caller: str, *costs: float, is_sealed: bool = False, **changes: object) -> Part:
        """Let a request wait in one piece."""
        part = self.part(costs, caller=caller, **changes)
        self.lane.add(Piece([Span(part, 0, len(costs))], is_sealed=is_sealed))
        return part

    def leaves(self, part: Part) -> None:
        """Let its caller leave."""
        part.failed(asyncio.CancelledError())
        self.lane.forget(part)

    def spans(self, limits: Limits = ROOMY) -> list[Span]:
        """Take what leaves next."""
        piece = self.lane.head()
        return self.lane.take(piece, limits, limits.max_inputs) if piece else []

    def takes(self, limits: Limits = ROOMY) -> list[tuple[Part, int, int]]:
        return [(span.part, span.first, span.last) for span in self.spans(limits)]

    def weight(self) -> tuple[float, float]:
        piece = self.lane.head()
        return self.lane.weight(piece) if piece else (0.0, 0.0)

    @property
    def has_sealed_head(self) -> bool:
        piece = self.lane.head()
        return piece is not None and piece.is_sealed

    def numbers(self) -> tuple[int, float, int]:
        """Return the waiting inputs, their tokens, and how many callers they are of."""
        return self.lane.waiting, self.lane.waiting_tokens, self.lane.snapshot()["callers"]


@pytest.fixture
def hall(still_loop: asyncio.AbstractEventLoop) -> Hall:
    return Hall(still_loop)


# --- the classes ---


class Stairs:
    """Both lanes, and turns that are taken one input at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, bulk_share: float) -> None:
        self.lanes = Lanes(bulk_share)
        self._hall = Hall(loop)

    def comes(self, priority: Priority, inputs: int = 1) -> Part:
        part = self._hall.part([1.0] * inputs, priority=priority)
        self.lanes[priority].add(Piece([Span(part, 0, inputs)]))
        return part

    def turn(self) -> Priority | None:
        """Let one input leave; returns its class."""
        turn = self.lanes.turn()
        if turn is None:
            return None
        priority, piece = turn
        assert len(self.lanes[priority].take(piece, Limits(100, 1000), 1)) == 1
        self.lanes.served(priority)
        return priority

    @property
    def has_both(self) -> bool:
        return all(self.lanes[priority].waiting for priority in Priority)


@pytest.mark.parametrize(
    ("share", "turns"),
    [
        (0.2, "iiiibiiiibiiiib"),
        (0.5, "ibibibib"),
        (0.1, "iiiiiiiiibiiiiiiiiib"),
        (0.3, "iiibiibiib"),
        (0.9, "ibbbbbbbbbibbbbbbbbb"),
        (0.01, "i" * 99 + "b" + "i" * 99 + "b"),
    ],
)
def test_turns_while_both_wait(still_loop: asyncio.AbstractEventLoop, share: float, turns: str) -> None:
    """Interactive goes first, and bulk has its share of the turns, evenly and from whatever share."""
    stairs = Stairs(still_loop, share)
    stairs.comes(INTERACTIVE, 300)
    stairs.comes(BULK, 300)

    assert "".join((stairs.turn() or "")[0] for _ in turns) == turns


def test_turns_of_one_class(still_loop: asyncio.AbstractEventLoop) -> None:
    """Whoever waits alone has every turn, and when nobody waits it is nobody's."""
    stairs = Stairs(still_loop, 0.2)
    stairs.comes(INTERACTIVE, 2)

    first = [stairs.turn() for _ in range(3)]
    stairs.comes(BULK, 2)

    assert first == [INTERACTIVE, INTERACTIVE, None]
    assert [stairs.turn() for _ in range(3)] == [BULK, BULK, None]
    assert stairs.lanes.waiting == 0


def test_bulk_that_comes_while_interactive_is_served(still_loop: asyncio.AbstractEventLoop) -> None:
    """Turns that went by before bulk came give it no claim: it waits for its share like always."""
    stairs = Stairs(still_loop, 0.5)
    stairs.comes(INTERACTIVE, 20)
    before = [stairs.turn() for _ in range(10)]
    stairs.comes(BULK, 2)

    assert before == [INTERACTIVE] * 10
    assert [stairs.turn() for _ in range(4)] == [INTERACTIVE, BULK, INTERACTIVE, BULK]


def test_class_whose_callers_have_left(still_loop: asyncio.AbstractEventLoop) -> None:
    """A turn goes to somebody who is still there, even before the lane has heard that the others have left."""
    stairs = Stairs(still_loop, 0.2)
    stairs.comes(INTERACTIVE).failed(asyncio.CancelledError())
    bulk = stairs.comes(BULK)

    first = stairs.lanes.turn()
    assert first is not None
    bulk.failed(asyncio.CancelledError())

    assert first[0] is BULK
    assert stairs.lanes.turn() is None
    assert stairs.lanes.waiting == 0


@SAME_EACH_TIME
@given(
    share=st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 0.9]),
    steps=st.lists(st.sampled_from(["i", "b", "turn", "turn", "burst"]), max_size=150),
)
def test_any_arrivals(still_loop: asyncio.AbstractEventLoop, share: float, steps: list[str]) -> None:
    """In any run of turns that both wait for, bulk has one of each 1 / share and interactive the rest."""
    stairs = Stairs(still_loop, share)
    runs: list[list[Priority]] = [[]]
    for step in steps:
        if step == "i":
            stairs.comes(INTERACTIVE)
        elif step == "b":
            stairs.comes(BULK)
        elif step == "burst":
            stairs.comes(INTERACTIVE, 30)
            stairs.comes(BULK, 30)
        elif not stairs.has_both:
            stairs.turn()
            runs.append([])
        else:
            runs[-1].append(stairs.turn() or BULK)

    window = math.ceil(1 / share)
    for run in runs:
        for start in range(len(run) - window + 1):
            assert BULK in run[start : start + window]
        for length in range(1, len(run) + 1):
            for start in range(len(run) - length + 1):
                assert run[start : start + length].count(BULK) <= math.ceil(length * share) + 1


# --- the callers ---


def test_request_that_comes_first(hall: Hall) -> None:
    """One caller's requests leave in the order in which they came, together as far as they fit."""
    one, other = hall.comes("x", 5, 5), hall.comes("x", 5)

    assert hall.takes(Limits(2, 1000)) == [(one, 0, 2)]
    assert hall.takes() == [(other, 0, 1)]
    assert hall.takes() == []
    assert hall.numbers() == (0, 0, 0)


def test_request_that_is_too_large_for_a_call(hall: Hall) -> None:
    """A request leaves in as many batches as it takes, from its first input to its last."""
    part = hall.comes("x", *[5.0] * 5)

    assert [hall.takes(Limits(2, 1000)) for _ in range(4)] == [[(part, 0, 2)], [(part, 2, 4)], [(part, 4, 5)], []]


def test_flood_of_one_caller(hall: Hall) -> None:
    """Who floods the lane lengthens its own queue: another one's query leaves with the next batch that has room."""
    flood = hall.comes("flood", *[10.0] * 1000)
    hall.takes(Limits(20, 1000))
    query = hall.comes("query", 10)

    batches = [hall.takes(Limits(5, 1000)) for _ in range(2)]

    assert (query, 0, 1) in [*batches[0], *batches[1]]
    assert sum(last - first for part, first, last in batches[0] + batches[1] if part is flood) == 9


def test_callers_that_share_a_batch(hall: Hall) -> None:
    """A turn is some tokens' worth, so the callers that wait share a batch, each with inputs that lie together."""
    parts = [hall.comes(caller, *[32.0] * 10) for caller in "xyz"]

    assert hall.takes(Limits(6, 1000)) == [(part, 0, 2) for part in parts]


def test_caller_with_larger_inputs(hall: Hall) -> None:
    """Turns are counted in tokens: who sends ten times as much in an input has a tenth of the inputs."""
    hall.comes("small", *[10.0] * 1000)
    hall.comes("large", *[100.0] * 1000)
    inputs: Counter[str] = Counter()
    for _ in range(60):
        for part, first, last in hall.takes(Limits(7, 1000)):
            inputs[part.request.caller] += last - first

    assert inputs.total() == 420
    assert inputs["large"] == pytest.approx(38, abs=2)


def test_caller_that_comes_back(hall: Hall) -> None:
    """Who had nothing waiting starts anew, level with the others: what it had before is no debt, and no claim."""
    hall.comes("often", *[10.0] * 500)
    hall.comes("flood", *[10.0] * 1000)
    for _ in range(100):
        hall.takes(Limits(10, 1000))
    hall.comes("often", *[10.0] * 500)
    inputs: Counter[str] = Counter()
    for _ in range(10):
        for part, first, last in hall.takes(Limits(10, 1000)):
            inputs[part.request.caller] += last - first

    assert inputs.total() == 100
    assert inputs["often"] == pytest.approx(50, abs=7)


def test_strangers_that_keep_coming(hall: Hall) -> None:
    """However many new callers come, who waits is served: a new one starts behind, not in front."""
    hall.comes("patient", *[10.0] * 40)
    served = 0
    for index in range(400):
        hall.comes(f"stranger {index}", 10)
        hall.comes(f"other stranger {index}", 10)
        served += sum(part.request.caller == "patient" for part, _, _ in hall.takes(Limits(1, 1000)))

    assert served > 0


TAKEN_APART = 3 * QUANTUM_TOKENS


@SAME_EACH_TIME
@given(
    costs=st.lists(st.lists(st.floats(1, 500), min_size=1, max_size=4), min_size=2, max_size=5),
    batches=st.lists(st.integers(1, 20), min_size=1, max_size=30),
)
def test_any_callers_that_always_wait(
    still_loop: asyncio.AbstractEventLoop, costs: list[list[float]], batches: list[int]
) -> None:
    """Of callers that always wait, none is ahead of another by more than a turn or two and its largest inputs."""
    hall = Hall(still_loop)
    for index, each in enumerate(costs):
        hall.comes(str(index), *(each * 600)[:600])
    tokens: Counter[str] = Counter({str(index): 0 for index in range(len(costs))})
    largest = max(map(max, costs))

    for inputs in batches:
        for span in hall.spans(Limits(inputs, 1000_000)):
            tokens[span.part.request.caller] += span.tokens

        assert max(tokens.values()) - min(tokens.values()) <= TAKEN_APART + 2 * largest


@SAME_EACH_TIME
@given(
    costs=st.lists(st.floats(1, 500), min_size=2, max_size=5),
    batches=st.lists(st.integers(1, 20), min_size=1, max_size=30),
)
def test_any_callers_of_different_specs(
    still_loop: asyncio.AbstractEventLoop, costs: list[float], batches: list[int]
) -> None:
    """Callers whose inputs cannot travel together take turns too: then a turn is a batch."""
    hall = Hall(still_loop)
    for index, cost in enumerate(costs):
        hall.comes(str(index), *[cost] * 600, spec=Spec("m", dimensions=1 + index % 3))
    tokens: Counter[str] = Counter({str(index): 0 for index in range(len(costs))})

    for inputs in batches:
        for span in hall.spans(Limits(inputs, 1000_000)):
            tokens[span.part.request.caller] += span.tokens

        a_batch = max(batches) * max(costs)
        assert max(tokens.values()) - min(tokens.values()) <= a_batch + TAKEN_APART + 2 * max(costs)


# --- the specs ---


def test_specs_of_several_callers(hall: Hall) -> None:
    """Only equal specs travel together; whose spec it is not waits for the next batch, and then goes first."""
    one = hall.comes("x", 5, 5)
    odd = hall.comes("y", 5, spec=OTHER)
    alike = hall.comes("z", 5)

    assert hall.takes() == [(one, 0, 2), (alike, 0, 1)]
    assert hall.takes() == [(odd, 0, 1)]
    assert hall.takes() == []


def test_specs_of_one_caller(hall: Hall) -> None:
    """A caller's specs take turns, so that one of them does not starve the other."""
    one = hall.comes("x", *[5.0] * 4)
    other = hall.comes("x", *[5.0] * 4, spec=OTHER)

    assert [hall.takes(Limits(2, 1000)) for _ in range(4)] == [
        [(one, 0, 2)],
        [(other, 0, 2)],
        [(one, 2, 4)],
        [(other, 2, 4)],
    ]


def test_spec_whose_next_input_does_not_fit_what_others_have_left(hall: Hall) -> None:
    """Who was offered a place too small for it keeps its turn."""
    hall.comes("small", *[1.0] * 100)
    large = hall.comes("x", 900)
    odd = hall.comes("x", *[5.0] * 100, spec=OTHER)
    limits = Limits(50, 1000, max_tokens=100)

    batches = [hall.takes(limits) for _ in range(4)]
    leading = [batch[0][0] for batch in batches]

    assert leading.index(large) < leading.index(odd)


# --- the limits ---


@pytest.mark.parametrize(
    ("limits", "taken"),
    [
        (Limits(2, 1000), 2),
        (Limits(3, 1000), 3),
        (Limits(4, 1000), 3),
        (Limits(9, 7), 2),
        (Limits(9, 9), 3),
        (Limits(9, 8), 2),
        (Limits(9, 10), 3),
        (Limits(9, 1000, max_tokens=14.9), 2),
        (Limits(9, 1000, max_tokens=15.0), 3),
        (Limits(9, 1000, max_tokens=15.1), 3),
    ],
    ids=str,
)
def test_inputs_around_the_limits(hall: Hall, limits: Limits, taken: int) -> None:
    """A batch is filled up to each limit exactly: three inputs of three bytes and five tokens."""
    part = hall.comes("x", 5, 5, 5, sizes=(3, 3, 3))

    assert hall.takes(limits) == [(part, 0, taken)]


@pytest.mark.parametrize("limits", [Limits(9, 10), Limits(9, 1000, max_tokens=50)], ids=["bytes", "tokens"])
def test_input_over_the_limits(hall: Hall, limits: Limits) -> None:
    """An input that is too large for any call goes alone; whether it is too large is the upstream's to say."""
    part = hall.comes("x", 5, 60, 5, sizes=(5, 60, 5))
    stranger = hall.comes("y", 5, sizes=(5,))

    batches = [hall.takes(limits) for _ in range(5)]

    assert batches == [[(part, 0, 1)], [(stranger, 0, 1)], [(part, 1, 2)], [(part, 2, 3)], []]


def test_input_that_is_empty(hall: Hall) -> None:
    """Inputs without bytes and tokens fill up a batch by their number alone."""
    hall.comes("y", 0, 0, sizes=(0, 0))
    hall.comes("x", *[0.0] * 5, sizes=(0,) * 5)

    assert [sum(last - first for _, first, last in hall.takes(Limits(3, 0))) for _ in range(4)] == [3, 3, 1, 0]


@SAME_EACH_TIME
@given(
    inputs=st.lists(st.tuples(st.integers(0, 12), st.floats(1, 100)), min_size=1, max_size=40),
    limits=st.builds(Limits, st.integers(1, 6), st.integers(1, 15), st.floats(1, 150)),
)
def test_any_inputs_and_limits(
    still_loop: asyncio.AbstractEventLoop, inputs: list[tuple[int, float]], limits: Limits
) -> None:
    """Each input leaves once, in order; no batch passes a limit unless alone; none could have taken the next."""
    hall = Hall(still_loop)
    sizes, costs = zip(*inputs, strict=True)
    hall.comes("x", *costs, sizes=sizes)
    cuts = []
    while spans := hall.takes(limits):
        ((_, first, last),) = spans
        cuts.append((first, last))

    assert [index for first, last in cuts for index in range(first, last)] == list(range(len(inputs)))
    for first, last in cuts:
        assert last - first <= limits.max_inputs
        assert last - first == 1 or sum(sizes[first:last]) <= limits.max_bytes
        assert last - first == 1 or sum(costs[first:last]) <= limits.max_tokens * (1 + 1e-9)
        if last < len(inputs) and last - first < limits.max_inputs:
            is_over_bytes = sum(sizes[first : last + 1]) > limits.max_bytes
            assert is_over_bytes or sum(costs[first : last + 1]) > limits.max_tokens * (1 - 1e-9)


# --- sealed pieces ---


def test_sealed_piece(hall: Hall) -> None:
    """A suspect leaves alone: what waits before and behind it does not travel with it, nor do other callers."""
    part = hall.part([5, 5, 5], caller="x")
    hall.lane.add(Piece([Span(part, 0, 1)]))
    hall.lane.add(Piece([Span(part, 1, 2)], is_sealed=True))
    hall.lane.add(Piece([Span(part, 2, 3)]))
    other = hall.comes("y", 5)

    batches = []
    while hall.lane.waiting:
        batches.append((hall.has_sealed_head, hall.takes()))

    assert (True, [(part, 1, 2)]) in batches
    assert [spans for is_sealed, spans in batches if not is_sealed] in (
        [[(part, 0, 1), (other, 0, 1)], [(part, 2, 3)]],
        [[(part, 0, 1)], [(other, 0, 1), (part, 2, 3)]],
    )


def test_pieces_of_a_batch_that_failed(hall: Hall) -> None:
    """They have waited before: they leave as they are, before all others, the first one first."""
    parts = [hall.part([5], caller=caller) for caller in "xyz"]
    hall.comes("w", 5)
    spans = [Span(part, 0, 1) for part in parts]
    for piece in (cut(spans, 2, 3), cut(spans, 0, 2)):
        hall.lane.add(Piece(piece, is_sealed=True), in_front=True)
    numbers = hall.numbers()

    batches = [hall.takes() for _ in range(3)]

    assert numbers == (4, 20.0, 4)
    assert batches[0] == [(parts[0], 0, 1), (parts[1], 0, 1)]
    assert batches[1] == [(parts[2], 0, 1)]
    assert batches[2][0][0].request.caller == "w"
    assert hall.numbers() == (0, 0.0, 0)


def test_sealed_piece_over_the_limits(hall: Hall) -> None:
    """Another upstream may take less at a time: the rest stays sealed and goes next."""
    parts = [hall.part([5, 5], caller=caller) for caller in "xy"]
    hall.lane.add(Piece([Span(part, 0, 2) for part in parts], is_sealed=True), in_front=True)
    hall.comes("z", 5)

    first, rest = hall.takes(Limits(3, 1000)), hall.has_sealed_head
    second = hall.takes(Limits(3, 1000))

    assert first == [(parts[0], 0, 2), (parts[1], 0, 1)]
    assert rest
    assert second == [(parts[1], 1, 2)]
    assert not hall.has_sealed_head


def test_sealed_piece_that_somebody_has_left(hall: Hall) -> None:
    """Of a sealed piece only what somebody waits for leaves; when all have left it is passed over."""
    parts = [hall.part([5], caller=caller) for caller in "xyz"]
    for spans in ([Span(parts[2], 0, 1)], [Span(parts[0], 0, 1), Span(parts[1], 0, 1)]):
        hall.lane.add(Piece(spans, is_sealed=True), in_front=True)
    parts[0].failed(asyncio.CancelledError())
    parts[2].failed(asyncio.CancelledError())

    taken = [hall.takes(), hall.takes()]

    assert taken == [[(parts[1], 0, 1)], []]
    assert hall.numbers() == (0, 0.0, 0)


# --- topping up ---


@pytest.mark.parametrize(
    ("limits", "more"),
    [
        (Limits(3, 1000), 0),
        (Limits(4, 1000), 1),
        (Limits(100, 1000), 4),
        (Limits(100, 9), 0),
        (Limits(100, 11), 0),
        (Limits(100, 12), 1),
        (Limits(100, 1000, max_tokens=16.0), 0),
        (Limits(100, 1000, max_tokens=19.9), 0),
        (Limits(100, 1000, max_tokens=20.0), 1),
        (Limits(2, 1000), 0),
        (Limits(100, 8), 0),
        (Limits(100, 1000, max_tokens=10.0), 0),
    ],
    ids=str,
)
def test_batch_that_is_topped_up(hall: Hall, limits: Limits, more: int) -> None:
    """Three inputs of three bytes and five tokens leave room up to the limits for others of their kind."""
    begun = hall.part([5, 5, 5], sizes=(3, 3, 3))
    hall.comes("x", *[5.0] * 4, sizes=(3,) * 4)
    hall.comes("y", *[5.0] * 4, sizes=(3,) * 4, spec=OTHER)

    spans = hall.lane.top_up([Span(begun, 0, 3)], limits, limits.max_inputs)

    assert sum(map(len, spans)) == more
    assert hall.lane.waiting == 8 - more


def test_batch_that_is_topped_up_with_nothing_suspect(hall: Hall) -> None:
    """A suspect travels with nobody, also where a batch has room."""
    begun = hall.part([5])
    hall.comes("x", 5, is_sealed=True)
    other = hall.comes("y", 5)

    assert hall.lane.top_up([Span(begun, 0, 1)], ROOMY, 100) == [Span(other, 0, 1)]
    assert hall.lane.waiting == 1


# --- looking ---


def test_weight_of_what_leaves_next(hall: Hall) -> None:
    """Asking for a lease needs the tokens of the next input, and of all that could leave with it."""
    empty = hall.weight()
    hall.comes("x", 7, 5)
    hall.comes("y", 5)

    assert empty == (0.0, 0.0)
    assert hall.weight() == (7.0, 17.0)


def test_weight_of_a_sealed_piece(hall: Hall) -> None:
    """A sealed piece leaves as a whole and alone, so both are what it weighs."""
    hall.comes("x", 5)
    part = hall.part([7, 8])
    hall.lane.add(Piece([Span(part, 0, 2)], is_sealed=True), in_front=True)

    assert hall.weight() == (15.0, 15.0)


@pytest.mark.parametrize(
    ("caller", "tokens", "ahead"),
    [("stranger", 10.0, 30.0), ("stranger", 500.0, 1500.0), ("stranger", 5000.0, 6010.0), ("query", 10.0, 40.0)],
)
def test_work_ahead_of_a_caller(hall: Hall, caller: str, tokens: float, ahead: float) -> None:
    """A flood is ahead of another caller only as far as its fair share goes, and never more than all of it."""
    hall.comes("flood", *[10.0] * 100)
    hall.comes("query", 10)

    expected = min(ahead, 1010.0 + tokens)

    assert hall.lane.ahead_of(caller, tokens) == expected


def test_work_ahead_of_the_flood_itself(hall: Hall) -> None:
    """Who floods the lane has all of it ahead."""
    hall.comes("flood", *[10.0] * 100)
    hall.comes("query", 10)

    assert hall.lane.ahead_of("flood", 10.0) == 1020.0


def test_work_ahead_of_anybody_in_an_empty_lane(hall: Hall) -> None:
    """Without anybody else, what is ahead is one's own."""
    assert hall.lane.ahead_of("x", 10.0) == 10.0


def test_parts_that_wait(hall: Hall) -> None:
    """Looking through what waits finds each part, suspects in front too, but nobody who has left."""
    one, gone = hall.comes("x", 5, 5), hall.comes("x", 5)
    front = hall.part([5])
    hall.lane.add(Piece([Span(front, 0, 1)], is_sealed=True), in_front=True)
    gone.failed(asyncio.CancelledError())

    assert list(hall.lane.parts()) == [front, one]


def test_lane_that_is_cleared(hall: Hall) -> None:
    """Clearing returns each part once and leaves nothing; who had left before does not upset the counts later."""
    one, gone = hall.comes("x", 5, 5), hall.comes("x", 5)
    hall.takes(Limits(1, 1000))
    front = hall.part([5])
    hall.lane.add(Piece([Span(front, 0, 1)], is_sealed=True), in_front=True)
    gone.failed(asyncio.CancelledError())

    cleared = hall.lane.clear()
    for part in (one, gone, front):
        hall.leaves(part)

    assert cleared == [front, one]
    assert hall.numbers() == (0, 0.0, 0)
    assert hall.lane.head() is None


def test_snapshot(hall: Hall) -> None:
    """The numbers of the moment are whole ones."""
    hall.comes("x", 5.25, 5.25)
    hall.comes("y", 5)

    assert hall.lane.snapshot() == {"inputs": 3, "tokens": 16, "callers": 2}


# --- leaving ---


def test_caller_that_leaves(hall: Hall) -> None:
    """What nobody waits for is passed over and counts no more, from the moment it is forgotten."""
    one, other = hall.comes("x", 5, 5), hall.comes("y", 7)

    hall.leaves(one)
    numbers = hall.numbers()

    assert numbers == (1, 7.0, 1)
    assert hall.takes() == [(other, 0, 1)]
    assert hall.numbers() == (0, 0.0, 0)


def test_caller_that_leaves_when_some_of_it_has_left(hall: Hall) -> None:
    """Exactly what still waits is counted off, however unequal the inputs are."""
    part = hall.comes("x", 1, 1000)
    hall.comes("x", 7)
    hall.takes(Limits(1, 1000))

    hall.leaves(part)

    assert hall.numbers() == (1, 7.0, 1)


def test_caller_that_leaves_in_the_middle_of_a_batch(hall: Hall) -> None:
    """Between two that stay, who has left is passed over."""
    first, gone, last = hall.comes("x", 5), hall.comes("x", 5), hall.comes("x", 5)
    gone.failed(asyncio.CancelledError())

    assert hall.takes() == [(first, 0, 1), (last, 0, 1)]
    assert hall.numbers() == (0, 0.0, 0)


@pytest.mark.parametrize("callers", [1, 7, 1000], ids=lambda count: f"{count} callers")
@pytest.mark.parametrize("specs", [1, 3], ids=lambda count: f"{count} specs")
def test_memory_of_who_has_left(hall: Hall, callers: int, specs: int) -> None:
    """While nothing can leave, what has been forgotten does not pile up, whosever it was and of whichever spec."""
    hall.comes("0", 5)
    hall.comes("0", 5, spec=Spec("m", dimensions=1))
    held = []
    for index in range(1000):
        part = hall.comes(str(index % callers), 5, spec=Spec("m", dimensions=1 + index % specs))
        held.append(weakref.ref(part.flights))  # a part has slots: one of its sets stands for it
        hall.leaves(part)
    del part
    gc.collect()

    assert sum(one() is not None for one in held) <= 70
    assert hall.numbers() == (2, 10.0, 1)
    assert len(hall.takes()) + len(hall.takes()) == 2
    assert hall.takes() == []


# --- any history ---

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("comes"), st.integers(0, 3), st.lists(st.integers(0, 90), min_size=1, max_size=6)),
        st.tuples(st.just("comes odd"), st.integers(0, 3), st.lists(st.integers(1, 90), min_size=1, max_size=3)),
        st.tuples(st.just("comes suspect"), st.integers(0, 3), st.lists(st.integers(1, 90), min_size=1, max_size=3)),
        st.tuples(st.just("takes"), st.integers(1, 8), st.just(())),
        st.tuples(st.just("takes"), st.integers(1, 8), st.just((100,))),
        st.tuples(st.just("fails"), st.integers(0, 5), st.just(())),
        st.tuples(st.just("tops up"), st.integers(1, 8), st.just(())),
        st.tuples(st.just("leaves"), st.integers(0, 9), st.just(())),
        st.tuples(st.just("leaves unnoticed"), st.integers(0, 9), st.just(())),
        st.tuples(st.just("clears"), st.just(0), st.just(())),
    ),
    max_size=40,
)


class Naive:
    """The same lane as a list of inputs that wait: (part, index)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.hall = Hall(loop)
        self.parts: list[Part] = []
        self.waiting: set[tuple[Part, int]] = set()
        self.sealed: set[tuple[Part, int]] = set()
        self.taken: list[list[Span]] = []

    def step(self, verb: str, number: int, costs: Sequence[int]) -> None:
        lane = self.hall.lane
        alive = [part for part in self.parts if not part.is_over]
        if verb.startswith("comes"):
            changes = {"spec": OTHER} if verb == "comes odd" else {}
            part = self.hall.comes(str(number), *costs, is_sealed=verb == "comes suspect", **changes)
            self.parts.append(part)
            self.waiting.update((part, index) for index in range(len(costs)))
            if verb == "comes suspect":
                self.sealed.update((part, index) for index in range(len(costs)))
        elif verb == "takes":
            self.takes(Limits(number, 1000, *map(float, costs)))
        elif verb == "fails" and len(self.taken) > number:
            spans = [span for span in self.taken.pop(number) if not span.part.is_over]
            if spans:
                lane.add(Piece(spans, is_sealed=True), in_front=True)
                self.waiting |= (inputs := inputs_of(spans))
                self.sealed |= inputs
        elif verb == "tops up" and self.taken:
            spans = lane.top_up(self.taken[-1], Limits(number, 1000), number)
            self.left(spans)
            assert not inputs_of(spans) & self.sealed
            assert {span.part.request.spec for span in spans} <= {self.taken[-1][0].part.request.spec}
        elif verb.startswith("leaves") and len(alive) > number:
            alive[number].failed(asyncio.CancelledError())
            self.waiting = {(part, index) for part, index in self.waiting if part is not alive[number]}
            if verb == "leaves":
                lane.forget(alive[number])
        elif verb == "clears":
            assert set(lane.clear()) == {part for part, _ in self.waiting}
            self.waiting.clear()

    def takes(self, limits: Limits) -> None:
        had_sealed = self.hall.has_sealed_head
        least, wish = self.hall.weight()
        spans = self.hall.spans(limits)
        inputs = inputs_of(spans)
        assert bool(spans) == bool(self.waiting)
        self.left(spans)
        if not spans:
            assert (least, wish) == (0, 0)
            return
        tokens = sum(span.tokens for span in spans)
        assert tokens >= least or had_sealed
        assert tokens <= wish * (1 + 1e-9) + 1e-6
        assert len({span.part.request.spec for span in spans}) == 1
        assert len(inputs) <= limits.max_inputs
        assert len(inputs) == 1 or tokens <= limits.max_tokens
        assert had_sealed == bool(inputs & self.sealed)
        assert not had_sealed or inputs <= self.sealed
        self.taken.append(spans)

    def left(self, spans: list[Span]) -> None:
        inputs = inputs_of(spans)
        assert len(inputs) == sum(map(len, spans))
        assert inputs <= self.waiting
        self.waiting -= inputs
        for before, after in pairwise(spans):
            assert (before.part, before.last) != (after.part, after.first), "lies together, but apart"

    def check(self) -> None:
        """What the lane counts is what is there, once it has heard of all who have left."""
        for part in self.parts:
            if part.is_over:
                self.hall.lane.forget(part)
        tokens = Counter({part.request.caller: 0.0 for part, _ in self.waiting})
        for part, index in self.waiting:
            tokens[part.request.caller] += part.costs[index]
        assert self.hall.numbers() == (len(self.waiting), pytest.approx(tokens.total()), len(tokens))
        for caller, each in tokens.items():
            ahead = min(tokens.total(), each * len(tokens))
            assert self.hall.lane.ahead_of(caller, 0) == pytest.approx(ahead)
        for part in self.parts:
            own = {index for other, index in self.waiting if other is part}
            assert part.unsent == len(own)
            assert part.unsent_tokens == pytest.approx(sum(part.costs[index] for index in own))
        assert set(self.hall.lane.parts()) == {part for part, _ in self.waiting}


def inputs_of(spans: Sequence[Span]) -> set[tuple[Part, int]]:
    return {(span.part, index) for span in spans for index in range(span.first, span.last)}


@settings(SAME_EACH_TIME, max_examples=400)
@given(steps=STEPS)
def test_any_history_of_a_lane(
    still_loop: asyncio.AbstractEventLoop, steps: list[tuple[str, int, Sequence[int]]]
) -> None:
    """Whatever comes, leaves, fails and is taken: each input leaves once, and the counts are what is there."""
    naive = Naive(still_loop)
    for index, step in enumerate(steps):
        naive.step(*step)
        if index % 3 == 0:
            naive.check()
    naive.check()
    while naive.waiting:
        naive.takes(Limits(3, 1000))
    naive.check()
