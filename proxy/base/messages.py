"""
What travels: a request on the caller's side, a batch on the upstream's.

All frozen. Rows stay what they were on the wire, little-endian float32 bytes, from the upstream's answer to the
caller's; nobody in between builds Python floats.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

FLOAT32_BYTES = 4
TOKEN_ID_BYTES = 4
"""A token id counts like a short text: cl100k averages four bytes of English a token."""

Input = str | tuple[int, ...]
"""One text, or the token ids of one text."""

Row = bytes
"""One vector: dim × little-endian float32."""

Raw = str | Sequence[float] | None
"""One vector as an upstream spelled it: base64 of a Row, a list of numbers, or null."""


def size_bytes(item: Input) -> int:
    """Return what an input counts: the UTF-8 bytes of a text, TOKEN_ID_BYTES for each token id."""
    if isinstance(item, tuple):
        return len(item) * TOKEN_ID_BYTES
    return len(item) if item.isascii() else len(item.encode())


class Priority(enum.StrEnum):
    """Who goes first when there is a queue."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


@dataclass(frozen=True, slots=True)
class Spec:
    """How inputs are to be embedded. Inputs with equal specs may share a batch; it is part of every key."""

    model: str
    """Model name as the settings know it."""
    dimensions: int | None = None
    """Width asked for; None means the model's own."""
    params: bytes = b"{}"
    """Further parameters to forward: one canonical JSON object."""
    is_tokens: bool = False
    """The inputs are token ids, not texts."""


@dataclass(frozen=True, slots=True)
class Request:
    """One caller's set of inputs, decoded and found valid."""

    id: str
    spec: Spec
    inputs: tuple[Input, ...]
    keys: tuple[bytes, ...]
    """What makes each input the same as another one; see base/keys.py."""
    space: str
    """Fingerprint of the vector space that the vectors are to be of."""
    size_bytes: int
    """Sum of `size_bytes()` over the inputs: what admission and batches count."""
    priority: Priority
    caller: str
    """Who asks, as far as we know: key name, client header, or uid of the peer."""
    arrived: float
    """Instant at which the request was read."""
    deadline: float
    """Instant by which it is answered, one way or the other."""
    user: str | None = None
    """OpenAI's `user`; forwarded, but no part of the identity."""
    no_cache: bool = False
    """Do not answer from the cache."""
    no_store: bool = False
    """Do not put the answer into the cache."""
    traceparent: str | None = None

    def part(self, indexes: Sequence[int]) -> Request:
        """Return the same request with only the inputs at `indexes`, in that order."""
        inputs = tuple(self.inputs[index] for index in indexes)
        return replace(
            self,
            inputs=inputs,
            keys=tuple(self.keys[index] for index in indexes),
            size_bytes=sum(map(size_bytes, inputs)),
        )


@dataclass(frozen=True, slots=True)
class Response:
    """The vectors of one request, by position, and how they came about."""

    rows: tuple[Row, ...]
    tokens: int
    """Tokens the upstream billed for this request; zero for what came from the cache."""
    hits: int = 0
    """How many rows came from the cache."""
    upstream: str = ""
    """Who computed the rest; empty when nobody had to."""
    queue_s: float = 0.0
    """Longest time that a part of the request waited for its turn."""
    upstream_s: float = 0.0
    """Longest time that the upstream took for a part of it, all attempts together."""
    attempts: int = 0
    """Tries that all its calls took; zero when nothing was called."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes upstream in one call."""

    spec: Spec
    inputs: tuple[Input, ...]
    size_bytes: int
    deadline: float
    model: str = ""
    """The model's name at the upstream."""
    width: int | None = None
    """How wide the rows have to be, where it is known."""
    avoid: frozenset[str] = frozenset()
    """Upstreams that have failed this call already: others go first."""
    user: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What an upstream gave for a batch, past the gate: one row per input, in the order of the batch."""

    rows: tuple[Row, ...]
    tokens: int
    upstream: str
    queue_s: float = 0.0
    """Time spent waiting for a free slot and for the rate limit."""
    upstream_s: float = 0.0
    """Time spent in exchanges with the upstream."""
    attempts: int = 1
