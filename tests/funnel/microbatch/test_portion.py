"""How much a free slot takes, and how long it waits for more."""

from __future__ import annotations

import pytest

from proxy.base.lease import Outlook
from proxy.funnel.microbatch.portion import Portion, affordable, least, spread

EIGHT = Outlook(slots=8, busy=0, fixed_s=0.030, per_input_s=0.001)
NOW = 1000.0


# --- the share ---


@pytest.mark.parametrize(
    ("outstanding", "target"), [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3), (64, 8), (65, 9), (256, 32)]
)
def test_share_of_a_slot(outstanding: int, target: int) -> None:
    """A slot takes its share of all that waits and is under way, rounded up, so that all of them are busy."""
    assert Portion(0.005).target(NOW, outstanding, EIGHT) == target


@pytest.mark.parametrize("slots", [0, 1])
def test_share_of_the_only_slot(slots: int) -> None:
    """One slot takes all; none at all is as one, which will take it when it comes."""
    assert Portion(0.005).target(NOW, 12, Outlook(slots, 0)) == 12


@pytest.mark.parametrize(
    ("later_s", "target"), [(0.0, 8), (0.030, 8), (0.0615, 8), (0.080, 7), (0.124, 4), (0.310, 1), (0.620, 1)]
)
def test_share_after_the_rush(later_s: float, target: int) -> None:
    """The most that was outstanding counts for about two calls, since its callers come back, and then fades."""
    portion = Portion(0.005)
    portion.target(NOW, 64, EIGHT)

    assert portion.target(NOW + later_s, 6, EIGHT) == target


def test_share_of_a_new_rush() -> None:
    """More than was ever outstanding counts at once."""
    portion = Portion(0.005)
    portion.target(NOW, 64, EIGHT)

    assert portion.target(NOW, 80, EIGHT) == 10
    assert portion.target(NOW + 0.070, 6, EIGHT) == 10


def test_share_before_anything_was_learned() -> None:
    """Where nobody knows what a call takes, only the present counts."""
    portion, unknown = Portion(0.005), Outlook(8, 0)
    portion.target(NOW, 64, unknown)

    assert portion.target(NOW, 6, unknown) == 1


# --- the wait ---


def test_slot_whose_share_is_there() -> None:
    """With its share, or more, a slot leaves at once."""
    portion = Portion(0.005)
    portion.arrived(NOW)

    assert [portion.hold_s(NOW, waiting, 8, EIGHT) for waiting in (8, 9)] == [0, 0]
    assert portion.hold_s(NOW, 7, 8, EIGHT) > 0


def test_input_with_slots_to_spare() -> None:
    """Where there are as many slots as inputs, the share is one: nobody waits for anybody."""
    portion = Portion(0.005)
    portion.arrived(NOW)

    assert portion.hold_s(NOW, 1, portion.target(NOW, 8, EIGHT), EIGHT) == 0


def test_no_patience() -> None:
    """A patience of zero turns waiting off."""
    assert Portion(0).hold_s(NOW, 1, 8, EIGHT) == 0


@pytest.mark.parametrize(
    ("waiting", "hold_s"), [(1, 0.005), (6, 0.005), (7, 0.030 / 7), (15, 0.002), (20, 0.0015), (28, 0.0015), (29, 0)]
)
def test_wait_for_the_next_input(waiting: int, hold_s: float) -> None:
    """One more is worth a / n of waiting after n have come, within the patience; nine tenths of a share are enough."""
    portion = Portion(0.005)
    portion.arrived(NOW)

    assert portion.hold_s(NOW, waiting, 32, EIGHT) == pytest.approx(hold_s)


def test_wait_that_ends_by_a_gap() -> None:
    """Who comes prolongs the wait; when nobody comes for so long, the slot leaves."""
    portion = Portion(0.005)
    portion.arrived(NOW)
    first = portion.hold_s(NOW, 10, 32, EIGHT)
    portion.arrived(NOW + 0.002)
    second = portion.hold_s(NOW + 0.002, 11, 32, EIGHT)
    just_before = portion.hold_s(NOW + 0.002 + 0.0027, 11, 32, EIGHT)

    assert first == pytest.approx(0.003)
    assert second == pytest.approx(0.030 / 11)
    assert just_before == pytest.approx(0.030 / 11 - 0.0027)
    assert portion.hold_s(NOW + 0.002 + 0.0028, 11, 32, EIGHT) <= 0


def test_wait_that_ends_by_patience() -> None:
    """However many keep coming, a slot waits twice its patience at the most."""
    portion = Portion(0.005)
    waits = []
    for step in range(12):
        now = NOW + step * 0.001
        portion.arrived(now)
        waits.append(portion.hold_s(now, 1 + step, 32, EIGHT))

    assert all(wait > 0 for wait in waits[:10])
    assert [wait for wait in waits[10:] if wait > 1e-9] == []


def test_wait_for_inputs_that_came_long_ago() -> None:
    """The wait begins when a slot is free, not when its inputs came."""
    portion = Portion(0.005)
    portion.arrived(NOW - 1)

    assert portion.hold_s(NOW, 1, 8, EIGHT) == pytest.approx(0.005)


def test_wait_after_a_batch_has_left() -> None:
    """Whoever waits next waits anew."""
    portion = Portion(0.005)
    portion.arrived(NOW)
    portion.hold_s(NOW, 1, 8, EIGHT)
    is_over = portion.hold_s(NOW + 0.020, 1, 8, EIGHT) <= 0
    portion.left()

    assert is_over
    assert portion.hold_s(NOW + 0.020, 1, 8, EIGHT) == pytest.approx(0.005)


# --- several at a time ---


@pytest.mark.parametrize(
    ("target", "batches", "sizes"),
    [
        (8, 1, [8]),
        (8, 2, [8, 8]),
        (8, 4, [9, 8, 8, 7]),
        (8, 8, [11, 10, 9, 8, 8, 7, 6, 5]),
        (32, 4, [38, 34, 30, 26]),
        (2, 4, [2, 2, 2, 2]),
        (1, 8, [1] * 8),
    ],
)
def test_batches_that_leave_together(target: int, batches: int, sizes: list[int]) -> None:
    """They differ by what our own part of one takes, so that they come back one after the other; none is lost."""
    found = [spread(target, place, batches, EIGHT) for place in range(batches)]

    assert found == sizes
    assert sum(found) == target * batches


def test_batches_of_an_upstream_that_takes_all_at_once() -> None:
    """Where an input adds nothing to a call, sizes would not tell them apart: they are equal."""
    assert [spread(8, place, 4, Outlook(8, 0, 0.030, 0.0)) for place in range(4)] == [8] * 4


# --- the least and the most ---


@pytest.mark.parametrize(
    ("fixed_s", "per_input_s", "inputs"),
    [
        (0.0, 0.0, 4),
        (0.030, 0.0, 4),
        (0.030, 0.001, 3),
        (0.030, 0.004, 1),
        (0.005, 0.001, 1),
        (0.005, 0.0005, 2),
        (0.100, 0.0001, 100),
    ],
)
def test_least_that_is_worth_a_call(fixed_s: float, per_input_s: float, inputs: int) -> None:
    """A call of its own has to save a tenth of the call, and a millisecond; before it is known, four go together."""
    assert least(Outlook(8, 0, fixed_s, per_input_s)) == pytest.approx(inputs, abs=1 if inputs > 4 else 0)


@pytest.mark.parametrize(
    ("call_s", "inputs"), [(0.0, 1), (0.03, 1), (0.0311, 1), (0.0319, 1), (0.0321, 2), (0.1301, 100), (2.0301, 2000)]
)
def test_most_that_a_call_may_take(call_s: float, inputs: int) -> None:
    """A call carries what it can in its time, and at least one input."""
    assert affordable(EIGHT, call_s) == inputs


def test_most_before_anything_was_learned() -> None:
    """Where nobody knows what an input adds, only the upstream's limits count."""
    assert affordable(Outlook(8, 0, 5.0), 2.0) >= 1_000_000
