"""
What waits: the part of a request that has to be computed, and pieces of it.

A request comes in whole, leaves in as many batches as it takes, and is put together here by position. Spans are
half-open ranges of its inputs, so a batch of several callers is a list of spans, and its answer is cut along them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from proxy.base.messages import Answer, Request, Response, Row, Spec, message

if TYPE_CHECKING:
    from proxy.funnel.microbatch.sender import Flight


class Part:
    """A request on this side of the cache, until all its rows are there."""

    __slots__ = (
        "_forget",
        "_response",
        "_waiters",
        "attempts",
        "costs",
        "error",
        "flights",
        "is_over",
        "missing",
        "queue_s",
        "request",
        "rows",
        "tokens",
        "unsent",
        "unsent_tokens",
        "upstream",
        "upstream_s",
    )

    def __init__(self, request: Request, costs: Sequence[float], forget: Callable[[Part], None]) -> None:
        """
        Args:
            request: all its inputs have to be computed.
            costs: estimated tokens of each input.
            forget: told when nobody waits for it any more, and something of it is still missing.
        """
        self.request = request
        self.costs = costs
        self.rows: list[Row | None] = [None] * len(request.inputs)
        self.missing = len(request.inputs)
        self.is_over = False
        """Whether nobody waits for it any more: its rows are there, it has failed, or all have left."""
        self.error: BaseException | None = None
        self.unsent = 0
        """Inputs that wait in a lane."""
        self.unsent_tokens = 0.0
        """What they are estimated at."""
        self.flights: set[Flight] = set()
        """Batches under way that carry something of it."""
        self.tokens = self.attempts = 0
        self.queue_s = self.upstream_s = 0.0
        self.upstream = ""
        self._response: Response | None = None
        self._forget = forget
        self._waiters: list[asyncio.Future[None]] = []

    # --- who waits ---

    def join(self) -> asyncio.Future[None]:
        """See `base/stage.py`."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        if self.is_over:
            waiter.set_result(None)
        return waiter

    def leave(self, waiter: asyncio.Future[None]) -> None:
        """See `base/stage.py`."""
        self._waiters.remove(waiter)
        if self.missing and not self._waiters:
            self.failed(asyncio.CancelledError())
            self._forget(self)

    def result(self) -> Response:
        """See `base/stage.py`."""
        if self.error is not None:
            raise self.error
        assert self._response is not None
        return self._response

    # --- what comes of it ---

    def landed(self, first: int, last: int, rows: Sequence[Row], tokens: int, answer: Answer, queue_s: float) -> None:
        """Take the rows of a span; with the last of them the response is complete."""
        self.rows[first:last] = rows
        self.missing -= last - first
        self.tokens += tokens
        self.attempts += answer.attempts
        self.upstream = self.upstream or answer.upstream
        self.queue_s = max(self.queue_s, queue_s)
        self.upstream_s = max(self.upstream_s, answer.upstream_s)
        if not self.missing and not self.is_over:
            self._response = self._put_together()
            self._end()

    def failed(self, error: BaseException) -> None:
        """End it with an error; what it still has in other batches interests nobody any more."""
        if not self.is_over:
            self.error = error
            self._end()

    def _end(self) -> None:
        self.is_over = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _put_together(self) -> Response:
        rows: Any = tuple(self.rows)  # none is missing
        return Response(
            rows,
            tokens=self.tokens,
            upstream=self.upstream,
            queue_s=self.queue_s,
            upstream_s=self.upstream_s,
            attempts=self.attempts,
        )


@message
class Span:
    """A half-open range of a part's inputs."""

    part: Part
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def tokens(self) -> float:
        if self.last - self.first == 1:
            return self.part.costs[self.first]
        return sum(self.part.costs[self.first : self.last])


@dataclass(slots=True)
class Trial:
    """The pieces of a batch that failed, and whether any of them has gone well: then the upstream is not to blame."""

    has_success: bool = False
    suspects: list[bytes] = field(default_factory=list)
    """Keys of inputs that failed alone before anything had gone well."""


@dataclass(slots=True, eq=False)
class Piece:
    """Something that waits in a lane."""

    spans: list[Span]
    is_sealed: bool = False
    """It leaves as it is, alone: it is suspected to hold an input that fails whatever travels with it."""
    trial: Trial | None = None

    @property
    def spec(self) -> Spec:
        return self.spans[0].part.request.spec

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for any of it."""
        if len(self.spans) == 1:
            return self.spans[0].part.is_over
        return all(span.part.is_over for span in self.spans)

    @property
    def caller(self) -> str:
        return self.spans[0].part.request.caller


def cut(spans: Sequence[Span], first: int, last: int) -> list[Span]:
    """Return what lies between two positions of the batch that the spans make up."""
    found = []
    at = 0
    for span in spans:
        start, end = max(first - at, 0), min(last - at, len(span))
        if start < end:
            found.append(Span(span.part, span.first + start, span.first + end))
        at += len(span)
    return found


def halves(spans: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    """
    Cut a batch of at least two inputs in two.

    Between two requests where possible, near the middle: then each half has as few callers as can be.
    """
    size = sum(map(len, spans))
    edges = list(_edges(spans))
    middle = min(edges, key=lambda edge: abs(edge - size / 2)) if edges else size // 2
    return cut(spans, 0, middle), cut(spans, middle, size)


def _edges(spans: Sequence[Span]) -> Iterator[int]:
    at = 0
    for span in spans[:-1]:
        at += len(span)
        yield at


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """
    Share out a whole number in proportion to weights, so that the shares add up to it exactly.

    Largest remainder: everybody gets the whole part of their due, and what is left goes, one each, to those who lost
    most by the rounding; among equals to the first.
    """
    weight = sum(weights)
    if weight <= 0:
        weights, weight = [1.0] * len(weights), float(len(weights))
    dues = [total * each / weight for each in weights]
    given = [int(due) for due in dues]
    order = sorted(range(len(dues)), key=lambda index: given[index] - dues[index])
    for index in order[: total - sum(given)]:
        given[index] += 1
    return given
