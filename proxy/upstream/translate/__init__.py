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
_WAIT_TEXT = re.compile(r"(?:try again|retry) (?:in|after) (\d+(?:\.\d+)?) ?(ms|s|seconds?|milliseconds?)", re.I)


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
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - wall_now)
    except (ValueError, TypeError, OverflowError):
        pass
    if (parts := _GO_DURATION.findall(after)) and "".join(n + u for n, u in parts) == after:
        return float(sum(float(number) * _UNIT_S[unit] for number, unit in parts))
    if match := _WAIT_TEXT.search(message):
        return float(match[1]) * (1e-3 if match[2].lower().startswith("m") else 1.0)
    return None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
