"""How many calls at a time: one more while it costs nothing, fewer when it does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.balance.limit import CALM, INFLATED, Limit

LONG_AGO = 0.0


def ramped(limit: Limit) -> Limit:
    """End the ramp by one decrease, whose effect on calls that leave from now on is over."""
    limit.overloaded(1.0, LONG_AGO)
    return limit


def succeeds(limit: Limit, *, now: float = 2.0, left_at: float = 1.5, inflation: float = 1.0, busy: int = 1000) -> int:
    """Let a call end well; returns the slots after it."""
    limit.succeeded(now, left_at, inflation=inflation, busy=busy)
    return limit.slots


def test_start() -> None:
    """It begins where it is told to, and takes an upstream for as fast as usual."""
    limit = Limit(1, 4, 16)

    assert (limit.slots, limit.inflation) == (4, 1.0)


# --- more ---


def test_ramp() -> None:
    """Before the first decrease each call that found all slots in use adds one, up to the most."""
    limit = Limit(1, 2, 5)

    assert [succeeds(limit, busy=limit.slots) for _ in range(5)] == [3, 4, 5, 5, 5]


def test_increase_after_the_ramp() -> None:
    """After the first decrease it takes a whole round of calls to add one."""
    limit = ramped(Limit(1, 10, 16))
    slots = [succeeds(limit, busy=limit.slots) for _ in range(14)]

    assert slots == [6] * 6 + [7] * 7 + [8]


@pytest.mark.parametrize(("busy", "expected"), [(3, 4), (4, 5), (5, 5)])
def test_increase_needs_all_slots_in_use(busy: int, expected: int) -> None:
    """Where slots were idle nobody knows what one more would do."""
    assert succeeds(Limit(1, 4, 16), busy=busy) == expected


@pytest.mark.parametrize("inflation", [CALM - 0.01, CALM + 0.01, INFLATED - 0.01])
def test_increase_needs_calm(inflation: float) -> None:
    """Between calm and inflated the number stays as it is."""
    limit = Limit(1, 4, 1000)
    for _ in range(200):
        limit.succeeded(2.0, 1.5, inflation=inflation, busy=0)
    before = limit.slots
    after = succeeds(limit, inflation=inflation)

    assert before == 4
    assert after == (5 if inflation < CALM else 4)
    assert limit.inflation == pytest.approx(inflation)


# --- fewer ---


@pytest.mark.parametrize(("start", "expected"), [(16, 9), (10, 6), (2, 1), (1, 1)])
def test_overload(start: int, expected: int) -> None:
    """An upstream that says "too many" gets six tenths, and never less than one."""
    limit = Limit(1, start, 16)
    limit.overloaded(1.0, LONG_AGO)

    assert limit.slots == expected


@pytest.mark.parametrize("least", [1, 3, 8])
def test_overload_at_the_least(least: int) -> None:
    """However often it is overloaded, the least is allowed."""
    limit = Limit(least, 8, 16)
    for now in range(1, 50):
        limit.overloaded(float(now), float(now))

    assert limit.slots == least


def test_inflated_calls() -> None:
    """When calls take much longer than usual on the average, there is a tenth fewer."""
    limit = Limit(1, 10, 16)
    slots = [succeeds(limit, inflation=4.0, busy=0) for _ in range(7)]

    assert slots == [10] * 6 + [9]  # the average: 1.3, 1.57, 1.81, 2.03, 2.23, 2.41, 2.57
    assert limit.inflation <= CALM


def test_one_call_that_took_for_ever() -> None:
    """One call of a hundred times the usual length counts as ten, so alone it is no reason for fewer."""
    limit = Limit(1, 10, 10)

    assert succeeds(limit, inflation=100.0) == 10
    assert limit.inflation == pytest.approx(1.9)


def test_herd_that_is_turned_away() -> None:
    """Sixteen calls that left together and were all refused are one sign of overload, not sixteen."""
    limit = Limit(1, 16, 16)
    for n in range(16):
        limit.overloaded(10.0 + n / 100, left_at=9.9)

    assert limit.slots == 9


def test_calls_of_the_time_before_a_decrease() -> None:
    """What left before the decrease says nothing about the number after it: no growth, and no average."""
    limit = Limit(1, 16, 16)
    limit.overloaded(10.0, 9.0)
    for _ in range(20):
        limit.succeeded(11.0, 9.5, inflation=9.0, busy=16)
    quiet = (limit.slots, limit.inflation)
    limit.succeeded(11.0, 10.0, inflation=1.0, busy=16)

    assert quiet == (9, 1.0)
    assert limit.slots == 9
    limit.overloaded(12.0, 10.0)
    assert limit.slots == 5


def test_value_between_one_and_two() -> None:
    """Fractions are kept, so one slot becomes two after a round or two, and back at the next overload."""
    limit = Limit(1, 2, 16)
    limit.overloaded(1.0, LONG_AGO)  # 1.2
    slots = [limit.slots, succeeds(limit, busy=1)]  # 1.2 + 1 / 1.2
    limit.overloaded(3.0, 2.5)

    assert slots == [1, 2]
    assert limit.slots == 1


def test_recovery() -> None:
    """After an outage it begins with the least, and ramps up to the most again."""
    limit = ramped(Limit(2, 10, 16))
    for _ in range(30):
        limit.succeeded(2.0, 1.5, inflation=2.0, busy=0)
    limit.recovered()
    at_once = (limit.slots, limit.inflation)

    assert at_once == (2, 1.0)
    assert [succeeds(limit, busy=limit.slots) for _ in range(3)] == [3, 4, 5]


@given(
    st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8)).map(sorted),
    st.lists(
        st.tuples(
            st.sampled_from(["ok", "over", "recovered"]), st.floats(0, 10), st.floats(0, 100), st.integers(0, 20)
        ),
        max_size=60,
    ),
)
def test_bounds_whatever_happens(bounds: list[int], ends: list[tuple[str, float, float, int]]) -> None:
    """It stays between least and most."""
    least, start, most = bounds
    limit = Limit(least, start, most)
    now = 0.0
    for kind, took_s, inflation, busy in ends:
        now += took_s / 2
        if kind == "ok":
            limit.succeeded(now, now - took_s, inflation=inflation, busy=busy)
        elif kind == "over":
            limit.overloaded(now, now - took_s)
        else:
            limit.recovered()
        assert least <= limit.slots <= most
