"""
One pure file per upstream dialect: Batch → HTTP call, HTTP answer → raw vectors or a classified error.

Here stands what dialects have in common: the shape of a call and of an answer, what differs between servers that speak
alike, and how servers spell "wait" and their limits. What their errors say is read in `told`.
"""

from __future__ import annotations

import email.utils
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Protocol

from proxy.base.errors import RateLimited
from proxy.base.messages import Batch, RateHints, Raw, message


@message
class HttpCall:
    """A POST to an upstream, ready to be sent as often as it takes."""

    url: str
    headers: Mapping[str, str]
    """The same object in each call of a dialect: what is spelled of it is spelled once."""
    body: bytes
    traceparent: str | None = None


@message
class RawAnswer:
    """What the upstream gave: still ungated, but in the order of the batch."""

    vectors: Sequence[Raw]
    tokens: int
    """Tokens it says it has counted; zero where it says nothing."""
    hints: RateHints | None = None
    """What it says about its limits, where it does."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Defaults and habits of one server. Hosted ones are the default; whoever differs says so in its row."""

    base_url: str = ""
    key_header: str = "Authorization"
    """Where the API key goes; `Authorization` means `Bearer <key>`."""
    has_base64: bool = True
    """Whether it honours `encoding_format: base64`."""
    has_dimensions: bool = True
    """Whether it honours `dimensions`, or at least refuses it; a server that ignores it fails the gate."""
    has_user: bool = False
    """Whether it knows `user`."""
    speaks_cl100k: bool = False
    """Whether token ids mean the same to it as to the caller."""
    max_inputs: int = 256
    """Inputs of one call. Servers take more (OpenAI 2048), but an answer should be read within milliseconds: 256 × 1536
    numbers are 2 MB as base64."""
    max_bytes: int = 600_000
    """UTF-8 bytes of one call: OpenAI's bound of 300 000 tokens, counted as a quarter token per byte, halved."""
    max_tokens: int = 0
    """Tokens of one call, as estimated; 0 means no bound. OpenAI sums up 300 000 and refuses the whole call above."""
    slots: int = 16
    """Concurrent calls at the most."""
    start_slots: int = 16
    """Concurrent calls to begin with. A hosted server takes all `slots` at once; a local one shares this machine with
    the app, so it starts with one or two, and what it bears beyond that is learned."""
    keepalive_s: float = 30.0
    """An idle connection is reused this long; shorter than the server keeps it."""
    abandoned_s: float = 0.0
    """How long a call that we gave up keeps its slot at the most. A local server computes on for somebody who has left,
    so the next call would queue behind it unseen; a hosted one has room, and one that stops (vLLM) is free at once."""
    first_answer_s: float = 0.0
    """How long the very first answer may take, since a model has to be loaded for it; 0 means no longer than others."""


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


# --- the call ---


def call_headers(profile: Profile, api_key: str, headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of every call to an upstream; its key stands above the settings' further headers."""
    spelled = {"Content-Type": "application/json", "Accept": "application/json", **headers}
    if api_key:
        spelled[profile.key_header] = f"Bearer {api_key}" if profile.key_header == "Authorization" else api_key
    return spelled


# --- when to come back ---

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


def rate_limited(
    what: str, headers: Mapping[str, str], message: str, *, wall_now: float, code: str | None = None
) -> RateLimited:
    """Return the error of an upstream that says "too many", with all it says about when and how many instead."""
    error = RateLimited(what, retry_after_s=wait_s(headers, message, wall_now=wall_now), code=code)
    error.hints = rate_hints(headers)
    return error


# --- limits ---

MAX_RESET_S = 900.0
"""A bucket that is said to be full only later than this is no bucket of a minute (Azure has said 86 400 s)."""
MAX_LIMIT = 10**12
"""Counts above this are placeholders for "no limit"; the highest real ones are some 10⁹ tokens a minute."""

_LIMITS = ("x-ratelimit-limit-requests", "x-ratelimit-limit-tokens")
_REMAINING = ("x-ratelimit-remaining-requests", "x-ratelimit-remaining-tokens")
_RESETS = ("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens")
_HINTS = _LIMITS + _REMAINING + _RESETS


def rate_hints(headers: Mapping[str, str]) -> RateHints | None:
    """
    Read what an answer's headers say about limits per minute; None when they say nothing that counts.

    Azure sends -1 and 0 where it does not know. So a limit is above 0, and beside one that is not nothing of its kind
    counts; that 0 remain counts only beside a limit.

    Source: OpenAI's guide to rate limits; openai/openai-dotnet#838.
    """
    for name in _HINTS:  # it runs on each answer, and most servers have none of them
        if name in headers:
            break
    else:
        return None
    requests, tokens = (_limit_hints(headers, which) for which in (0, 1))
    if requests == tokens == (None, None, None):
        return None
    return RateHints(requests[0], tokens[0], requests[1], tokens[1], requests[2], tokens[2])


def _limit_hints(headers: Mapping[str, str], which: int) -> tuple[int | None, int | None, float | None]:
    """Return limit, remaining and reset of requests (0) or tokens (1)."""
    said = headers.get(_LIMITS[which])
    limit = _count(said or "")
    if said is not None and not limit:
        return None, None, None
    remaining = _count(headers.get(_REMAINING[which], ""))
    if remaining == 0 and limit is None:
        remaining = None
    reset = headers.get(_RESETS[which], "").strip()
    reset_s = _duration(reset) if (seconds := _number(reset)) is None else seconds
    if reset_s is not None and reset_s > MAX_RESET_S:
        reset_s = None
    return limit, remaining, reset_s


def _count(text: str) -> int | None:
    value = _number(text)
    return int(value) if value is not None and value <= MAX_LIMIT else None
