"""What a call should take, learned from those before it."""

from __future__ import annotations

import random

import pytest

from proxy.upstream.balance.latency import Latency


def learned(
    fixed_s: float, per_input_s: float, *, noise: float = 0.0, calls: int = 200, most: int = 64, seed: int = 3
) -> Latency:
    """Let calls of many sizes take fixed_s + per_input_s × inputs, give or take."""
    latency, rng = Latency(), random.Random(seed)
    for n in range(calls):
        inputs = rng.randint(1, most)
        seconds = (fixed_s + per_input_s * inputs) * (1 + rng.uniform(-noise, noise))
        latency.took(float(n), inputs, inputs * 100, seconds)
    return latency


# --- the line ---


def test_before_the_first_call() -> None:
    """Nothing is expected of an upstream that nobody has asked."""
    latency = Latency()

    assert (latency.fixed_s, latency.per_input_s, latency.expected_s(10)) == (0.0, 0.0, 0.0)


def test_first_call_loads_the_model() -> None:
    """What the first call took is no measure for others."""
    latency = Latency()
    latency.took(0.0, 1, 43, 30.0)
    at_first = latency.fixed_s
    latency.took(40.0, 1, 43, 0.02)

    assert at_first == 0.0
    assert latency.expected_s(1) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("fixed_s", "per_input_s"), [(0.03, 0.001), (0.2, 0.004), (0.001, 0.01), (0.005, 0.0001)], ids=str
)
@pytest.mark.parametrize("seed", range(5))
def test_line_through_noisy_calls(fixed_s: float, per_input_s: float, seed: int) -> None:
    """From calls of many sizes that vary by a twentieth, what an average call takes is found within a tenth."""
    latency = learned(fixed_s, per_input_s, noise=0.05, seed=seed)

    for inputs in (1, 32, 64):
        whole = fixed_s + per_input_s * inputs
        assert latency.expected_s(inputs) == pytest.approx(whole, abs=0.1 * (fixed_s + per_input_s * 32))


@pytest.mark.parametrize("seed", range(5))
def test_both_parts_of_the_line(seed: int) -> None:
    """Fixed part and part per input are each found within a tenth, where neither drowns in the other's noise."""
    latency = learned(0.03, 0.001, noise=0.03, seed=seed)

    assert latency.fixed_s == pytest.approx(0.03, rel=0.1)
    assert latency.per_input_s == pytest.approx(0.001, rel=0.1)


def test_exact_line() -> None:
    """Without noise the line is exact."""
    latency = learned(0.03, 0.001)

    assert latency.fixed_s == pytest.approx(0.03)
    assert latency.per_input_s == pytest.approx(0.001)
    assert latency.expected_s(100) == pytest.approx(0.13)


def test_calls_of_one_size_only() -> None:
    """Where all calls are alike nobody knows what an input adds: all of it is the fixed part."""
    latency = Latency()
    for n in range(50):
        latency.took(float(n), 8, 800, 0.05)

    assert (latency.fixed_s, latency.per_input_s) == (pytest.approx(0.05), 0.0)


def test_calls_become_alike() -> None:
    """What an input adds is remembered when calls have become alike, however long they stay so."""
    latency = learned(0.03, 0.001)
    for n in range(1000):
        latency.took(1000.0 + n, 32, 3200, 0.062)

    assert latency.per_input_s == pytest.approx(0.001, rel=0.01)
    assert latency.expected_s(1) == pytest.approx(0.031, rel=0.01)


def test_server_becomes_slower() -> None:
    """The last twenty calls count: a change is known after some sixty."""
    latency, rng = learned(0.03, 0.001), random.Random(5)
    for n in range(80):
        inputs = rng.randint(1, 64)
        latency.took(1000.0 + n, inputs, inputs * 100, 0.09 + 0.003 * inputs)

    assert latency.fixed_s == pytest.approx(0.09, rel=0.15)
    assert latency.per_input_s == pytest.approx(0.003, rel=0.15)


def test_larger_calls_are_faster() -> None:
    """No input takes less than no time, whatever chance says; and neither part is below zero."""
    latency = Latency()
    for n in range(100):
        inputs = 1 + n % 64
        latency.took(float(n), inputs, inputs, 0.1 - 0.001 * inputs)

    assert 0 < latency.per_input_s <= 1e-6
    assert 0 < latency.fixed_s < 0.1


def test_all_of_it_is_per_input() -> None:
    """Where nothing is fixed, what an input adds is no more than the average says."""
    latency = Latency()
    for n in range(100):
        inputs = 1 + n % 64
        latency.took(float(n), inputs, inputs, 0.0001 * inputs**2)

    assert latency.fixed_s >= 0
    assert latency.per_input_s * latency._n <= latency._t * (1 + 1e-9)


# --- the usual ---


def test_usual_time() -> None:
    """A call as fast as the fastest of its size takes its usual time; so does a faster one, the new measure."""
    latency = Latency()
    found = [latency.took(0.0, 8, 800, seconds) for seconds in (0.05, 0.05, 0.04, 0.05)]

    assert found == [1.0, 1.0, 1.0, pytest.approx(1.25)]


@pytest.mark.parametrize("times", [1.5, 3.0, 20.0])
def test_slower_than_usual(times: float) -> None:
    """A call k times as long as the fastest one of its size says k."""
    latency = Latency()
    latency.took(0.0, 8, 800, 0.05)

    assert latency.took(0.0, 9, 900, 0.05 * times) == pytest.approx(times)


def test_sizes_are_kept_apart() -> None:
    """A large call is not slow beside a small one, and long texts are not slow beside short ones."""
    latency = Latency()
    latency.took(0.0, 1, 10, 0.001)

    assert latency.took(0.0, 64, 10, 1.0) == 1.0
    assert latency.took(0.0, 1, 100_000, 1.0) == 1.0


def test_forgetting() -> None:
    """A fastest time counts twice as much after each minute: what stays slow becomes the usual."""
    latency = Latency()
    latency.took(0.0, 1, 10, 0.1)
    found = [latency.took(60.0 * minute, 1, 10, 0.8) for minute in range(1, 6)]

    assert found == [pytest.approx(4.0), pytest.approx(2.0), pytest.approx(1.0), 1.0, 1.0]


@pytest.mark.parametrize("idle_s", [3600.0, 86_400.0, 30 * 86_400.0])
def test_size_that_was_not_seen_for_long(idle_s: float) -> None:
    """After a night, or a month, without a call of its size, what comes is the usual, and nothing breaks."""
    latency = Latency()
    latency.took(0.0, 64, 10_000, 0.01)

    assert latency.took(idle_s, 64, 10_000, 5.0) == 1.0


def test_call_that_took_no_time() -> None:
    """A clock that has not moved makes nothing of it."""
    latency = Latency()

    assert [latency.took(0.0, 1, 10, 0.0) for _ in range(3)] == [1.0, 1.0, 1.0]
    assert latency.expected_s(1) == 0.0
