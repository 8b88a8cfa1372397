"""Which failures point to one input, and for how long it travels alone."""

from __future__ import annotations

import pytest

from proxy.base.errors import (
    BadVectors,
    CircuitOpen,
    DeadlineExceeded,
    EmbeddingError,
    NoUpstream,
    RateLimited,
    UpstreamDenied,
    UpstreamFailed,
    UpstreamRefused,
    UpstreamTimeout,
)
from proxy.funnel.microbatch.suspect import Quarantine, is_of_one, is_refusal


@pytest.mark.parametrize(
    ("error", "of_one", "refusal"),
    [
        (UpstreamRefused("no", status=400), True, True),
        (UpstreamRefused("no", status=413), True, True),
        (UpstreamRefused("no", status=422), True, True),
        (UpstreamRefused("no", status=404), False, True),
        (UpstreamRefused("no", status=405), False, True),
        (UpstreamRefused("no", status=400, param="input"), True, True),
        (UpstreamRefused("no", status=400, param="input[3]"), True, True),
        (UpstreamRefused("no", status=400, param="$.input"), True, True),
        (UpstreamRefused("no", status=400, param="dimensions"), False, True),
        (UpstreamRefused("no", status=400, param="model"), False, True),
        (UpstreamRefused("no", status=400, param="dimensions", index=2), True, True),
        (UpstreamRefused("no", status=404, index=2), False, True),
        (BadVectors("odd", index=0), True, True),
        (BadVectors("odd", index=3), True, True),
        (BadVectors("odd"), False, True),
        (UpstreamFailed("broken", may_be_poison=True), True, False),
        (UpstreamFailed("broken"), False, False),
        (UpstreamTimeout("slow"), False, False),
        (RateLimited("later"), False, False),
        (UpstreamDenied("key"), False, False),
        (CircuitOpen("open"), False, False),
        (NoUpstream("none"), False, False),
        (DeadlineExceeded("late"), False, False),
        (EmbeddingError("bug"), False, False),
    ],
    ids=lambda value: f"{type(value).__name__} {vars(value)}" if isinstance(value, EmbeddingError) else None,
)
def test_failures(error: EmbeddingError, of_one: bool, refusal: bool) -> None:
    """A refusal of the input, a bad row, or a break in the middle may be one input's doing; all else is everybody's."""
    assert is_of_one(error) is of_one
    assert is_refusal(error) is refusal


@pytest.mark.parametrize(("later_s", "is_held"), [(0, True), (9.999, True), (10, False), (10.001, False)])
def test_time_in_quarantine(later_s: float, is_held: bool) -> None:
    """A guilty key is held for its time, and then forgotten."""
    quarantine = Quarantine(10)
    quarantine.add(b"guilty", 100.0)

    assert quarantine.holds(b"guilty", 100.0 + later_s) is is_held
    assert quarantine.holds(b"innocent", 100.0 + later_s) is False
    assert len(quarantine) == is_held


def test_key_that_is_found_guilty_again() -> None:
    """With each time its quarantine begins anew."""
    quarantine = Quarantine(10)
    for key, now in ((b"again", 100.0), (b"other", 101.0), (b"again", 108.0)):
        quarantine.add(key, now)

    assert quarantine.holds(b"again", 117.9)
    assert not quarantine.holds(b"other", 117.9)
    assert len(quarantine) == 1


def test_keys_that_nobody_asks_for_again() -> None:
    """Whose time is over goes, also when it never comes again."""
    quarantine = Quarantine(10)
    for index in range(100):
        quarantine.add(b"%d" % index, 100.0)

    quarantine.add(b"late", 110.0)

    assert len(quarantine) == 1


@pytest.mark.parametrize(
    ("keys", "kept", "has_first"), [(9_999, 9_999, True), (10_000, 10_000, True), (10_001, 10_000, False)]
)
def test_most_keys(keys: int, kept: int, has_first: bool) -> None:
    """Quarantine holds so many and no more: the oldest goes."""
    quarantine = Quarantine(10)
    for index in range(keys):
        quarantine.add(b"%d" % index, 100.0)

    assert len(quarantine) == kept
    assert quarantine.holds(b"0", 100.0) is has_first
    assert quarantine.holds(b"%d" % (keys - 1), 100.0)


def test_quarantine_that_is_off() -> None:
    """With a time of zero nobody is held."""
    quarantine = Quarantine(0)

    quarantine.add(b"guilty", 100.0)

    assert not quarantine
    assert not quarantine.holds(b"guilty", 100.0)
