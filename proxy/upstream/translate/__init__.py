"""
One pure file per upstream dialect: Batch → HTTP call, HTTP answer → raw vectors or a classified error.

Here stands what dialects have in common: the shape of a call and of an answer, and how servers spell "wait".
"""

from __future__ import annotations

import email.utils
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Protocol

from proxy.base.messages import Batch, Raw


@dataclass(frozen=True, slots=True)
class HttpCall:
    """A POST to an upstream, ready to be sent as often as it takes."""

    url: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """What the upstream gave: still ungated, but in the order of the batch."""

    vectors: Sequence[Raw]
    tokens: int
    """Tokens it says it has counted; zero where it says nothing."""


class Dialect(Protocol):
    """How one kind of upstream is spoken to."""

    def call(self, batch: Batch) -> HttpCall:
        """Spell the call."""
        ...

    def answer(
        self, batch: Batch, status: int, headers: Mapping[str, str], body: bytes, *, wall_now: float
    ) -> RawAnswer:
        """
        Read the answer.

        Args:
            wall_now: seconds since the epoch, for waits that are given as a date.

        Raises:
            EmbeddingError: what the upstream says is wrong, or BadVectors when the answer makes no sense.
        """
        ...


_GO_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|h|m|s)")
_UNIT_S = {"ms": 1e-3, "us": 1e-6, "µs": 1e-6, "h": 3600.0, "m": 60.0, "s": 1.0}
_WAIT_TEXT = re.compile(
    r"(?:try again|retry) (?:in|after) ([0-9][0-9.]*(?: ?(?:milliseconds?|seconds?|[a-z0-9.]+)))", re.I
)
_LONG_UNITS = (("milliseconds", "ms"), ("millisecond", "ms"), ("seconds", "s"), ("second", "s"), (" ", ""))


def wait_s(headers: Mapping[str, str], message: str, *, wall_now: float) -> float | None:
    """
    Return how long the upstream asks us to wait, in seconds; None when it does not say.

    The cases, the most exact first: (1) `retry-after-ms`; (2) `retry-after` as seconds, also with a fraction; (3) as
    an HTTP date; (4) as a Go duration; (5) words in the message.

    Source: RFC 9110 §10.2.3; openai-python `_base_client.py`; Azure's "Please retry after N seconds".
    """
    if (wait := _number(headers.get("retry-after-ms", ""))) is not None:
        return wait / 1000
    after = headers.get("retry-after", "").strip()
    if (wait := _number(after)) is not None:
        return wait
    try:
        date = email.utils.parsedate_to_datetime(after)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)  # HTTP dates are GMT, said or not
        return max(0.0, date.timestamp() - wall_now)
    except (ValueError, TypeError, OverflowError):
        pass
    if (wait := _duration(after)) is not None:
        return wait
    if match := _WAIT_TEXT.search(message):
        said = match[1].lower().rstrip(".")
        for long, short in _LONG_UNITS:
            said = said.replace(long, short)
        return _duration(said)
    return None


def _duration(text: str) -> float | None:
    parts = _GO_DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    wait = float(sum(float(number) * _UNIT_S[unit] for number, unit in parts))
    return wait if math.isfinite(wait) else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 and "_" not in text else None
