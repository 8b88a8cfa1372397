"""
What travels: a request on the caller's side, a batch on the upstream's.

Nobody changes them. Rows stay what they were on the wire, little-endian float32 bytes, from the upstream's answer to
the caller's; nobody in between builds Python floats.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar, dataclass_transform

if TYPE_CHECKING:
    from proxy.base.lease import Lease

_Class = TypeVar("_Class")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def message(cls: type[_Class]) -> type[_Class]:
    """
    Make a dataclass that the type checker takes for frozen.

    At run time it is not: freezing costs a call per field at each construction, 4 µs of some 80 per request.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


FLOAT32_BYTES = 4
TOKEN_ID_BYTES = 4
"""A token id counts like a short text: cl100k averages four bytes of English a token."""

Input = str | tuple[int, ...]
"""One text, or the token ids of one text."""

Row = bytes
"""One vector: dim × little-endian float32."""

Raw = str | Sequence[float] | None
"""One vector as an upstream spelled it: base64 of a Row, a list of numbers, or null. Or a Row that was read already."""


def size_bytes(item: Input) -> int:
    """Return what an input counts: the UTF-8 bytes of a text, TOKEN_ID_BYTES for each token id."""
    if isinstance(item, tuple):
        return len(item) * TOKEN_ID_BYTES
    return len(item) if item.isascii() else len(item.encode())


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call to an upstream may carry. An input over `max_bytes` or `max_tokens` goes alone; whether it is too
    large is the upstream's to say."""

    max_inputs: int
    max_bytes: int
    """UTF-8 bytes of all inputs together."""
    max_tokens: float = math.inf
    """Estimated tokens of all inputs together."""


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
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # A spec is looked up a dozen times on the way, and never changes.
        object.__setattr__(self, "_hash", hash((self.model, self.dimensions, self.params, self.is_tokens)))

    def __hash__(self) -> int:
        return self._hash


class Progress:
    """How far a request has come; the one thing of it that changes."""

    __slots__ = ("left_at",)

    def __init__(self) -> None:
        self.left_at: float | None = None
        """Instant at which the first of its inputs left for an upstream; None while all of them wait."""


@message
class Request:
    """One caller's set of inputs, decoded and found valid."""

    id: str
    spec: Spec
    inputs: tuple[Input, ...]
    keys: tuple[bytes, ...]
    """What makes each input the same as another one; see base/keys.py."""
    space: str
    """Fingerprint of the vector space that the vectors are to be of."""
    sizes: tuple[int, ...]
    """`size_bytes()` of each input."""
    size_bytes: int
    """Their sum: what admission counts."""
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
    progress: Progress = field(default_factory=Progress, compare=False, repr=False)

    def part(self, indexes: Sequence[int]) -> Request:
        """Return the same request with only the inputs at `indexes`, in that order."""
        sizes = tuple([self.sizes[index] for index in indexes])
        return replace(
            self,
            inputs=tuple([self.inputs[index] for index in indexes]),
            keys=tuple([self.keys[index] for index in indexes]),
            sizes=sizes,
            size_bytes=sum(sizes),
        )


@message
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


@message
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
    tokens: float = 0.0
    """Estimated tokens of all inputs: what is reserved of the upstream's limit per minute."""
    lease: Lease | None = None
    """Permission for the first attempt; further ones get their own."""
    avoid: frozenset[str] = frozenset()
    """Upstreams that have failed this call already: others go first."""
    user: str | None = None
    traceparent: str | None = None
    is_suspect: bool = False
    """It is part of a batch that failed, and sent to find out which of its inputs is to blame."""

    def addressed(self, *, lease: Lease, model: str, width: int | None) -> Batch:
        """Return the same batch on its way to one upstream. Spelled out: `replace` takes three times as long."""
        return Batch(
            self.spec,
            self.inputs,
            self.size_bytes,
            self.deadline,
            model,
            width,
            self.tokens,
            lease,
            self.avoid,
            self.user,
            self.traceparent,
            self.is_suspect,
        )


@dataclass(frozen=True, slots=True)
class RateHints:
    """What an upstream says beside an answer about its limits per minute; None where it says nothing that counts."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    remaining_requests: int | None = None
    remaining_tokens: int | None = None
    reset_requests_s: float | None = None
    """Time until all requests of a minute are there again: an upper bound, not the instant of the next one."""
    reset_tokens_s: float | None = None
    """Likewise for tokens."""


@message
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
    hints: RateHints | None = None
    """What its upstream says about its limits, where it does."""
