"""Tokens are estimated from bytes, and the time until work is done from how fast it has left lately."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.funnel.microbatch.estimate import Drain, Tokens

SAME_EACH_TIME = settings(deadline=None, derandomize=True, max_examples=200)


# --- tokens ---


def test_first_estimate() -> None:
    """Before anything was learned, an input has rather too many tokens: a third of its bytes, and one of its own."""
    assert Tokens().costs([0, 100, 3000], is_tokens=False) == pytest.approx([1.0, 34.0, 991.0])


def test_token_ids_are_counted() -> None:
    """Token ids need no estimate, whatever texts have taught."""
    tokens = Tokens()
    tokens.learn(1_000_000, 10, 900_000)

    assert tokens.costs([4, 40], is_tokens=True) == [1.0, 10.0]


@pytest.mark.parametrize("per_byte", [0.1, 0.25, 0.6, 1.0])
def test_ratio_that_is_learned(per_byte: float) -> None:
    """The usage that comes back teaches the ratio, whichever language it is of."""
    tokens = Tokens()
    for _ in range(20):
        tokens.learn(10_000, 4, round(10_000 * per_byte) + 4)

    assert tokens.ratio == pytest.approx(per_byte, rel=0.03)
    assert tokens.costs([1000], is_tokens=False) == pytest.approx([1000 * per_byte + 1], rel=0.03)


def test_ratio_after_one_small_answer() -> None:
    """One short text does not overthrow the first guess."""
    tokens = Tokens()

    tokens.learn(20, 1, 20)

    assert tokens.ratio == pytest.approx(0.33, abs=0.01)


def test_callers_that_turn_from_prose_to_code() -> None:
    """Older texts fade: after some megabytes of another kind the ratio is theirs."""
    tokens = Tokens()
    for _ in range(1000):
        tokens.learn(10_000, 1, 2_500)
    before = tokens.ratio
    for _ in range(1000):
        tokens.learn(10_000, 1, 6_000)

    assert before == pytest.approx(0.25, abs=0.01)
    assert tokens.ratio == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(("size_bytes", "tokens"), [(1000, 0), (1000, -1), (0, 10)])
def test_usage_that_says_nothing(size_bytes: int, tokens: int) -> None:
    """An upstream that does not count, or counts nothing, teaches nothing."""
    estimate = Tokens()

    estimate.learn(size_bytes, 1, tokens)

    assert estimate.ratio == pytest.approx(0.33)


@SAME_EACH_TIME
@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 2048), st.integers(0, 10**12)), max_size=20))
def test_any_usage(answers: list[tuple[int, int, int]]) -> None:
    """Whatever upstreams say, no text has more tokens than bytes, but for its own, and none has less than nothing."""
    tokens = Tokens()
    for answer in answers:
        tokens.learn(*answer)

    assert 0 <= tokens.ratio <= 1
    assert all(cost >= 1 for cost in tokens.costs([0, 1, 10**6], is_tokens=False))


# --- drain ---


def test_drain_that_nobody_knows() -> None:
    """As long as nothing had to wait there is no telling how long work takes."""
    drain = Drain()
    drain.done(1.0, 500, is_more=False)
    drain.began(2.0)

    assert drain.needs_s(100) is None


def test_drain_while_work_waits() -> None:
    """What came back in the time since work had to wait says how fast more of it will."""
    drain = Drain()
    drain.began(10.0)
    drain.began(10.9)
    drain.done(11.0, 200, is_more=True)

    assert drain.needs_s(100) == pytest.approx(0.5)
    assert drain.needs_s(0) == 0


def test_drain_that_changes() -> None:
    """Later measurements outweigh earlier ones: after some seconds at another pace it is known."""
    drain = Drain()
    drain.began(0.0)
    for second in range(1, 20):
        drain.done(second, 100, is_more=True)
    slow = drain.needs_s(100)
    for second in range(20, 30):
        drain.done(second, 1000, is_more=True)

    assert slow == pytest.approx(1.0)
    assert drain.needs_s(100) == pytest.approx(0.1, rel=0.1)


def test_work_that_came_back_while_nothing_waited() -> None:
    """A quiet hour teaches nothing: calls that had a slot to spare are not how fast a queue drains."""
    drain = Drain()
    for second in range(1000):
        drain.done(second, 1000, is_more=False)
    drain.began(1000.0)
    drain.done(1001.0, 100, is_more=True)

    assert drain.needs_s(100) == pytest.approx(1.0)


def test_work_that_starts_to_wait_while_another_comes_back() -> None:
    """When more is waiting at a landing, time counts from there."""
    drain = Drain()
    drain.done(5.0, 100, is_more=True)
    drain.done(6.0, 50, is_more=True)

    assert drain.needs_s(100) == pytest.approx(2.0)


def test_first_of_a_round() -> None:
    """Of calls that left together the first one back says nothing yet: it looks as if there were no others."""
    drain = Drain()
    drain.began(0.0)
    known = []
    for late_s in (0.0, 0.1, 0.2, 0.3):
        drain.done(5.0 + late_s, 100, is_more=True)
        known.append(drain.needs_s(100, calls=4))
    drain.done(5.5, 0, is_more=True)

    assert known == [None, None, None, pytest.approx(1.235, rel=0.01)]
    assert drain.needs_s(100, calls=5) is None
    drain.rested(9.0)
    assert drain.needs_s(100, calls=0) is None


def test_rest_is_no_slow_work() -> None:
    """When everybody who waited has left, the time until the next one comes is not held against the upstream."""
    drain = Drain()
    drain.began(0.0)
    drain.done(1.0, 100, is_more=True)
    drain.rested(2.5)
    drain.done(2.6, 10, is_more=False)

    assert drain.needs_s(100) == pytest.approx(1.0)


@pytest.mark.parametrize(("rest_s", "is_known"), [(1.9, True), (2.0, True), (2.1, False)])
def test_drain_after_a_rest(rest_s: float, is_known: bool) -> None:
    """What was measured before a rest counts for a moment; an hour later the upstream may be another."""
    drain = Drain()
    drain.began(0.0)
    drain.done(1.0, 100, is_more=False)

    drain.rested(1.0 + rest_s)

    assert (drain.needs_s(100) is not None) is is_known
