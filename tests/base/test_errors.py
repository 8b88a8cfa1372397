"""Each error knows its fault, its code, and whether another try may help."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxy.base import errors
from proxy.base.errors import DeadlineExceeded, EmbeddingError, Fault, InvalidRequest, Overloaded, UpstreamRefused


def classes(cls: type[EmbeddingError] = EmbeddingError) -> Iterator[type[EmbeddingError]]:
    yield cls
    for inner in cls.__subclasses__():
        yield from classes(inner)


CLASSES = sorted(classes(), key=lambda cls: cls.__name__)


def test_codes_of_all_errors() -> None:
    """A code means one error."""
    codes = [cls.code for cls in CLASSES]

    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("cls", CLASSES)
def test_caller_s_fault_and_another_try(cls: type[EmbeddingError]) -> None:
    """What is the caller's fault fails again each time: nobody tries it again."""
    is_callers = issubclass(cls, InvalidRequest | UpstreamRefused)

    assert (cls.fault is Fault.CALLER) == is_callers
    assert not (is_callers and cls.can_retry)


def test_upstream_that_denies_us() -> None:
    """A refused key is the upstream's trouble for callers, yet no try mends it."""
    assert errors.UpstreamDenied.fault is Fault.UPSTREAM
    assert not errors.UpstreamDenied.can_retry


@pytest.mark.parametrize(
    "cls",
    [
        errors.BadVectors,
        errors.CircuitOpen,
        errors.DeadlineExceeded,
        errors.NoUpstream,
        errors.Overloaded,
        errors.RateLimited,
        errors.UpstreamFailed,
        errors.UpstreamTimeout,
    ],
)
def test_trouble_that_passes(cls: type[EmbeddingError]) -> None:
    """Load, limits and upstreams in trouble may be over at the next try."""
    assert cls.can_retry


def test_error_without_details() -> None:
    """An error has its class's code, no parameter and no wait unless somebody says otherwise."""
    error = Overloaded("too many")

    assert (error.message, str(error)) == ("too many", "too many")
    assert (error.code, error.param, error.retry_after_s) == ("overloaded", None, None)


def test_error_with_details() -> None:
    """A closer code counts for this one error, not for its class."""
    error = DeadlineExceeded("late", code="write_timeout", param="p", retry_after_s=0.5)

    assert (error.code, error.param, error.retry_after_s) == ("write_timeout", "p", 0.5)
    assert DeadlineExceeded("late").code == "deadline_exceeded"


def test_refusal_of_an_upstream() -> None:
    """A refusal keeps the upstream's status and position; whose key that is, microbatch says."""
    error = UpstreamRefused("no", status=422, code="bad_text", param="input", index=3)

    assert (error.status, error.code, error.param, error.index, error.key) == (422, "bad_text", "input", 3, None)
    assert UpstreamRefused("no", status=400).code == "upstream_refused"


def test_failure_that_one_input_may_have_brought_about() -> None:
    """Only who knows better says that one input may be at fault; and no error knows of limits by itself."""
    plain, suspect = errors.UpstreamFailed("boom"), errors.UpstreamFailed("boom", may_be_poison=True, retry_after_s=1.0)

    assert (plain.may_be_poison, plain.hints) == (False, None)
    assert (suspect.may_be_poison, suspect.retry_after_s) == (True, 1.0)


def test_label_of_an_error() -> None:
    """A label is out of a closed set: our own code, even where the upstream has said another word."""
    ours = DeadlineExceeded("late", code="write_timeout")
    theirs = UpstreamRefused("no", status=422, code="any word of theirs")

    assert ours.label == "write_timeout"
    assert theirs.label == "upstream_refused"
