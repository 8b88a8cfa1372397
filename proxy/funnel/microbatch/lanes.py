"""
Whose turn it is: the inputs of one model that wait, by class and by caller.

Two lanes. Interactive goes first; bulk has a share of the turns all the same, so neither starves. Inside a lane the
callers take turns, counted in tokens: next is who has had the least, and a turn gives so many tokens' worth. Who comes
new starts level with the others, a turn behind; so a flood from one of them only lengthens its own queue. What travels
together has the same spec, since an upstream takes one set of parameters a call.

Why not a round robin with deficits: an input may be a hundred quanta, a batch a single input, and specs take turns of
their own. Then rounds end in the middle of a batch, and what is fair depends on where. A count of what each has had
does not care.

Pure: nothing waits in here.

Source: Goyal, Vin and Cheng, "Start-time fair queueing", 1996; its tags are what `_Caller` counts.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from proxy.base.messages import Limits, Priority, Spec
from proxy.funnel.microbatch.part import Part, Piece, Span

QUANTUM_TOKENS = 64.0
"""What a turn gives: a few queries. Less than a batch, so that several callers share one."""

_COMPACT_AT = 64
"""Inputs whose caller has left are passed over when their turn comes; so many more of them than of others, and they
are cleared away."""

_ALMOST_ONE = 1 - 1e-9
"""A bulk share of 0.1 adds up to a turn after nine others, whatever binary fractions say."""


class Lanes:
    """What waits for one model."""

    def __init__(self, bulk_share: float) -> None:
        self._queries, self._bulk = Lane(), Lane()
        self._lanes = {Priority.INTERACTIVE: self._queries, Priority.BULK: self._bulk}
        self._bulk_share = bulk_share
        self._bulk_due = 0.0

    def __getitem__(self, priority: Priority) -> Lane:
        return self._lanes[priority]

    @property
    def waiting(self) -> int:
        return self._queries.waiting + self._bulk.waiting

    def turn(self) -> tuple[Priority, Piece] | None:
        """Say whose turn it is, and what leaves then, or some of it; None when nobody waits."""
        bulk, query = self._bulk.head(), self._queries.head()
        if query is None or (bulk is not None and self._bulk_due >= _ALMOST_ONE):
            return (Priority.BULK, bulk) if bulk is not None else None
        return Priority.INTERACTIVE, query

    def served(self, priority: Priority) -> None:
        """Note that a batch of this class has left while others may have waited: bulk's claim grows or is met."""
        if priority is Priority.BULK:
            self._bulk_due = max(0.0, self._bulk_due - 1)
        elif self._bulk.waiting:
            self._bulk_due += self._bulk_share / (1 - self._bulk_share)
        else:
            self._bulk_due = 0.0


class _Caller:
    """The pieces of one caller, by spec, in the order of their arrival; the specs take turns."""

    __slots__ = ("name", "queues")

    def __init__(self, name: str) -> None:
        self.name = name
        self.queues: OrderedDict[Spec, deque[Piece]] = OrderedDict()


class _Load:
    """What a caller has waiting."""

    __slots__ = ("inputs", "tokens")

    def __init__(self) -> None:
        self.inputs = 0
        self.tokens = 0.0


class Lane:
    """One class."""

    def __init__(self) -> None:
        self.waiting = 0
        """Inputs."""
        self.waiting_tokens = 0.0
        self._front: deque[Piece] = deque()
        """Pieces that have waited before: they belong to several callers, and leave before all others."""
        self._callers: dict[str, _Caller] = {}
        self._order: list[tuple[float, int, _Caller]] = []
        """A heap with one entry for each caller: tokens that it has had, and who came first among equals."""
        self._entries = itertools.count()
        self._loads: dict[str, _Load] = {}
        self._gone = 0
        """Inputs that nobody waits for and that may still lie in a queue."""

    def add(self, piece: Piece, *, in_front: bool = False) -> None:
        """Let a piece wait; in front where it has waited before."""
        if in_front:
            self._front.appendleft(piece)
        else:
            caller = self._callers.get(piece.caller) or self._come(piece)
            caller.queues.setdefault(piece.spec, deque()).append(piece)
        for span in piece.spans:
            self._count(span.part, len(span), span.tokens)

    def _come(self, piece: Piece) -> _Caller:
        """Let a caller take part: level with who has had the least, and behind them by an input."""
        level = self._order[0][0] if self._order else 0.0
        head = piece.spans[0]
        tokens = level + min(QUANTUM_TOKENS, head.part.costs[head.first])
        caller = self._callers[piece.caller] = _Caller(piece.caller)
        heapq.heappush(self._order, (tokens, next(self._entries), caller))
        return caller

    def _count(self, part: Part, inputs: int, tokens: float) -> None:
        name = part.request.caller
        load = self._loads.get(name) or self._loads.setdefault(name, _Load())
        load.inputs += inputs
        load.tokens += tokens
        if not load.inputs:
            del self._loads[name]
        self.waiting += inputs
        self.waiting_tokens = self.waiting_tokens + tokens if self.waiting else 0.0
        part.unsent += inputs
        part.unsent_tokens = part.unsent_tokens + tokens if part.unsent else 0.0

    # --- leaving without having been sent ---

    def forget(self, part: Part) -> None:
        """Count a part no more that is over; its pieces are passed over when their turn comes."""
        self._discount(part)
        if self._gone > _COMPACT_AT + self.waiting:
            self._compact()

    def _discount(self, part: Part) -> None:
        if part.unsent:
            self._gone += part.unsent
            self._count(part, -part.unsent, -part.unsent_tokens)

    def _compact(self) -> None:
        """Clear away what nobody waits for, wherever it lies."""
        self._gone = 0
        self._front = deque(_living(self._front))
        for caller in self._callers.values():
            for spec, queue in list(caller.queues.items()):
                left = deque(_living(queue))
                if left:
                    caller.queues[spec] = left
                else:
                    del caller.queues[spec]
        self._callers = {name: caller for name, caller in self._callers.items() if caller.queues}
        self._order = [entry for entry in self._order if entry[-1].queues]
        heapq.heapify(self._order)

    def clear(self) -> list[Part]:
        """Let nothing wait any more; returns the parts that did."""
        parts = list(dict.fromkeys(span.part for piece in self._pieces() for span in piece.spans))
        for part in parts:
            part.unsent, part.unsent_tokens = 0, 0.0
        self._empty()
        return [part for part in parts if not part.is_over]

    def _empty(self) -> None:
        for held in (self._front, self._callers, self._order, self._loads):
            held.clear()
        self._gone = self.waiting = 0
        self.waiting_tokens = 0.0

    # --- looking ---

    def head(self) -> Piece | None:
        """Return the piece that leaves next, or some of it; None when nobody waits."""
        if not self.waiting:
            return None
        self._pass_over(self._front)
        if self._front:
            return self._front[0]
        while self._order:
            caller = self._order[0][-1]
            queue = next(iter(caller.queues.values()), None)
            if queue and not queue[0].is_over:
                return queue[0]  # the usual case, and asked for several times a batch
            for spec, queue in list(caller.queues.items()):
                self._pass_over(queue)
                if queue:
                    return queue[0]
                del caller.queues[spec]
            heapq.heappop(self._order)
            del self._callers[caller.name]
        return None

    def _pass_over(self, queue: deque[Piece]) -> None:
        """Remove pieces at the head that nobody waits for."""
        while queue and queue[0].is_over:
            for span in queue.popleft().spans:
                self._discount(span.part)

    def weight(self, piece: Piece) -> tuple[float, float]:
        """Return the tokens of what leaves at the least, where this piece leaves next, and of all that waits."""
        if piece.is_sealed:
            return (tokens := sum(span.tokens for span in piece.spans)), tokens
        span = piece.spans[0]
        return span.part.costs[span.first], self.waiting_tokens

    def ahead_of(self, caller: str, tokens: float) -> float:
        """
        Return how many tokens leave before so many more of a caller have left, these included.

        Callers take turns: whoever floods the lane is ahead of the others only as far as a fair share goes.
        """
        known = self._loads.get(caller)
        own = (known.tokens if known else 0.0) + tokens
        return min(self.waiting_tokens + tokens, own * (len(self._loads) + (known is None)))

    def parts(self) -> Iterator[Part]:
        """Go through all that waits; a part with several pieces comes several times."""
        return (span.part for piece in self._pieces() for span in piece.spans if not span.part.is_over)

    def _pieces(self) -> Iterator[Piece]:
        yield from self._front
        for caller in self._callers.values():
            for queue in caller.queues.values():
                yield from queue

    def snapshot(self) -> dict[str, float]:
        return {
            "inputs": self.waiting,
            "tokens": round(self.waiting_tokens),
            "callers": len(self._loads),
        }

    # --- taking ---

    def take(self, piece: Piece, limits: Limits, most: int) -> list[Span]:
        """
        Take what leaves next: inputs of one spec, callers in turn, as much as the limits allow and at least one.

        A sealed piece shares its batch with nobody; what of it the limits do not allow stays sealed.

        Args:
            piece: what `head()` says.
            limits: of the call.
            most: inputs, if they are to be fewer than the limits allow.

        Returns:
            Spans in the order of the batch.
        """
        if (spans := self._only(piece, limits, most)) is not None:
            return spans
        room = _Room(limits, most)
        if not piece.is_sealed:
            self._fill(piece.spec, room)
        elif self._front:
            self._move(piece, room)
            if not piece.spans:
                self._front.popleft()
        else:
            tokens, _, caller = self._order[0]
            self._served(caller, piece.spec, tokens + self._move(piece, room))
        return room.spans

    def _only(self, piece: Piece, limits: Limits, most: int) -> list[Span] | None:
        """Take the piece at the head if it is one whole request, all that waits, and fits: the usual case by far."""
        spans = piece.spans
        part = spans[0].part
        inputs = self.waiting
        if (
            len(spans) > 1
            or len(spans[0]) != inputs
            or len(part.costs) != inputs
            or inputs > most
            or inputs > limits.max_inputs
            or part.request.size_bytes > limits.max_bytes
            or self.waiting_tokens > limits.max_tokens
        ):
            return None
        part.unsent, part.unsent_tokens = 0, 0.0
        self._empty()
        return spans

    def top_up(self, spans: list[Span], limits: Limits, most: int) -> list[Span]:
        """Fill what is left of the limits with further inputs of the same spec; returns those."""
        room = _Room(limits, most, spans)
        self._fill(spans[0].part.request.spec, room)
        return room.spans

    def _fill(self, spec: Spec, room: _Room) -> None:
        """Let the callers that have something of this spec take turns until the batch is full."""
        others = []
        while self._order and not room.is_full:
            tokens, _, caller = self._order[0]
            queue = caller.queues.get(spec)
            if queue is not None:
                self._pass_over(queue)
            if not queue or queue[0].is_sealed:
                others.append(heapq.heappop(self._order))
                continue
            # Alone, it need not stop: nobody is wronged.
            turn = QUANTUM_TOKENS if len(self._order) > 1 else math.inf
            taken = 0.0
            while queue and not queue[0].is_sealed and taken < turn and not room.is_full:
                taken += self._move(queue[0], room, turn - taken)
                if not queue[0].spans:
                    queue.popleft()
            if taken:
                self._served(caller, spec, tokens + taken)
        for entry in others:
            heapq.heappush(self._order, entry)

    def _move(self, piece: Piece, room: _Room, tokens: float = math.inf) -> float:
        """Move inputs of a piece into the batch until so many tokens are spent or it is full; returns what it took."""
        spent = 0.0
        while piece.spans and spent < tokens and not room.is_full:
            span = piece.spans[0]
            if span.part.is_over:
                self._discount(span.part)
                del piece.spans[0]
                continue
            count, cost = room.put(span, tokens - spent)
            self._count(span.part, -count, -cost)
            spent += cost
            if count == len(span):
                del piece.spans[0]
            else:
                piece.spans[0] = Span(span.part, span.first + count, span.last)
        return spent

    def _served(self, caller: _Caller, spec: Spec, tokens: float) -> None:
        """Give the caller at the head of the order its new place, and its other specs their turn; or let it go."""
        queue = caller.queues[spec]
        while queue and not queue[0].spans:
            queue.popleft()
        caller.queues.move_to_end(spec)
        if not queue:
            del caller.queues[spec]
        if caller.queues:
            heapq.heapreplace(self._order, (tokens, next(self._entries), caller))
        else:
            heapq.heappop(self._order)
            del self._callers[caller.name]


def _living(pieces: deque[Piece]) -> Iterator[Piece]:
    return (piece for piece in pieces if not piece.is_over)


class _Room:
    """What a batch can still take."""

    __slots__ = ("_bytes", "_inputs", "_is_begun", "_tokens", "is_full", "spans")

    def __init__(self, limits: Limits, most: int, begun: Sequence[Span] = ()) -> None:
        """
        Args:
            limits: of the whole batch.
            most: inputs of the whole batch, if they are to be fewer.
            begun: what it has already.
        """
        self._is_begun = bool(begun)
        """Else its first input may pass any bound."""
        self._inputs = min(limits.max_inputs, most) - sum(map(len, begun))
        self._bytes = limits.max_bytes - sum(sum(s.part.request.sizes[s.first : s.last]) for s in begun)
        self._tokens = limits.max_tokens - sum(span.tokens for span in begun)
        self.spans: list[Span] = []
        self.is_full = self._inputs < 1

    def put(self, span: Span, tokens: float) -> tuple[int, float]:
        """
        Take the next inputs of a span.

        Args:
            tokens: what their caller may spend; the last input may pass it.

        Returns:
            How many inputs, and their tokens. The batch is full when the next one does not fit.
        """
        sizes, costs = span.part.request.sizes, span.part.costs
        if (whole := len(span)) > 1 and whole <= self._inputs:
            cost, size = span.tokens, sum(sizes[span.first : span.last])
            if cost <= min(tokens, self._tokens) and size <= self._bytes:
                self._is_begun = True
                self._inputs -= whole
                self._bytes -= size
                self._tokens -= cost
                self.is_full = self._inputs < 1
                self._append(span)
                return whole, cost
        index, spent = span.first, 0.0
        while index < span.last and spent < tokens and not self.is_full:
            size, cost = sizes[index], costs[index]
            if (size > self._bytes or cost > self._tokens) and self._is_begun:
                self.is_full = True
                break
            self._is_begun = True
            self._inputs -= 1
            self._bytes -= size
            self._tokens -= cost
            spent += cost
            index += 1
            self.is_full = self._inputs < 1
        if index > span.first:
            self._append(Span(span.part, span.first, index))
        return index - span.first, spent

    def _append(self, span: Span) -> None:
        last = self.spans[-1] if self.spans else None
        if last is not None and last.part is span.part and last.last == span.first:
            self.spans[-1] = Span(span.part, last.first, span.last)
        else:
            self.spans.append(span)
