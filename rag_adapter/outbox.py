"""
Which of the waiting texts leave together, and when: the rule, without any waiting.

Requests are composed when they can leave. With a connection free, what waits goes at once; with all of them busy it
gathers, and the next one that comes back takes its share: what waits and what is under way, divided by the connections.
Taking all of it would send one large request and then leave the other connections with what trickles in; the sidecar,
whose batches are made of our requests, would do with uneven ones.

Queries go before bulk; while bulk waits it has one connection at least (every other one, where there is a single one).
It has `bulk_connections` at the most, so a query does not find all of them busy with ingestion.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from rag_adapter.wire import MAX_REQUEST_BYTES, Spec

if TYPE_CHECKING:
    from asyncio import Future, Task

LEAST_SHARE = 16
"""Texts that are not worth a second request: one costs the app 0.2 ms, a text in it 0.03 ms."""


class Entry:
    """What one call hands in: a text, or the texts of one request of `embed_many`."""

    __slots__ = (
        "as_floats", "bodies", "deadline", "first", "future", "has_left", "lane", "number", "parcel", "rows",
        "size_bytes", "space", "spec", "traceparent",
    )  # fmt: skip

    def __init__(
        self,
        bodies: list[bytes],
        spec: Spec,
        *,
        now: float,
        deadline: float,
        future: Future[None],
        as_floats: bool,
        first: int | None = None,
        traceparent: str | None = None,
    ) -> None:
        """
        Args:
            bodies: the texts, spelled.
            spec: how they are to be embedded.
            now: the instant.
            deadline: the instant until which somebody waits for them.
            future: done when `rows` has one for each text, or with the error.
            as_floats: whether rows are lists of numbers; else bytes of float32.
            first: position of the first text in the app's list; None where the app gave no list.
            traceparent: the caller's trace context.
        """
        self.bodies = bodies
        self.size_bytes = sum(map(len, bodies))
        self.spec = spec
        self.deadline = deadline
        self.future = future
        self.as_floats = as_floats
        self.first = first
        self.traceparent = traceparent
        self.rows: list[Any] = []
        self.space: str | None = None
        """Fingerprint of the vector space, as the sidecar gives it."""
        self.number = 0
        """By order of arrival."""
        self.has_left = False
        """Nobody waits for it any more, and that has been counted."""
        self.parcel: Parcel | None = None
        """The request it travels in; None while it waits."""
        # Who waits for half a second does not travel with who waits for a minute: the request has the longest patience
        # among its texts, so the sidecar could not tell the impatient one in time.
        self.lane = (spec, math.frexp(deadline - now)[1])

    @property
    def place(self) -> range:
        """Positions of its texts in the app's list."""
        first = self.first or 0
        return range(first, first + len(self.bodies))


class Parcel:
    """A request and the calls whose texts it carries."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.left = 0
        """How many of them have left before their rows came."""
        self.task: Task[None] | None = None
        for entry in entries:
            entry.parcel = self

    def present(self) -> list[Entry]:
        """Return the entries that somebody still waits for."""
        return [entry for entry in self.entries if not entry.future.done()]


class Outbox:
    """Entries that wait, by what may travel together, and how many requests are under way."""

    def __init__(self, *, connections: int, bulk_connections: int, request_texts: int) -> None:
        self._connections = connections
        self._bulk_connections = bulk_connections
        self._request_texts = request_texts
        self._lanes: dict[tuple[Spec, int], OrderedDict[Entry, None]] = {}
        self._numbers = itertools.count(1)
        self._was_bulk = False
        self.waiting = {"interactive": 0, "bulk": 0}
        """Texts that wait."""
        self.under_way = {"interactive": 0, "bulk": 0}
        """Texts that travel."""
        self.requests = {"interactive": 0, "bulk": 0}
        """Requests that travel."""

    def put(self, entry: Entry) -> None:
        """Let an entry wait."""
        entry.number = next(self._numbers)
        self._lanes.setdefault(entry.lane, OrderedDict())[entry] = None
        self.waiting[entry.spec.priority] += len(entry.bodies)

    def put_back(self, entries: list[Entry]) -> None:
        """Let entries that have been on their way wait again, before all others."""
        for entry in reversed(entries):
            entry.parcel = None
            lane = self._lanes.setdefault(entry.lane, OrderedDict())
            lane[entry] = None
            lane.move_to_end(entry, last=False)
            self.waiting[entry.spec.priority] += len(entry.bodies)

    def remove(self, entry: Entry) -> None:
        """Forget an entry that waits; one that does not is none of our business."""
        lane = self._lanes.get(entry.lane)
        if lane is None or entry not in lane:
            return
        del lane[entry]
        self.waiting[entry.spec.priority] -= len(entry.bodies)
        if not lane:
            del self._lanes[entry.lane]

    def take(self) -> list[Entry]:
        """Return the entries of the next request, which then is under way; none if nothing may leave now."""
        lane = self._next_lane()
        if lane is None:
            return []
        spec = next(iter(lane)).spec
        bound = self._share(spec)
        taken: list[Entry] = []
        texts = size_bytes = 0
        for entry in lane:
            texts += len(entry.bodies)
            size_bytes += entry.size_bytes
            if taken and (texts > bound or size_bytes > MAX_REQUEST_BYTES):
                break
            taken.append(entry)
        for entry in taken:
            self.remove(entry)
        self._count(taken, 1)
        self._was_bulk = spec.priority == "bulk"
        return taken

    def came_back(self, taken: list[Entry]) -> None:
        """A request is over."""
        self._count(taken, -1)

    def lower(self, texts: int) -> None:
        """The sidecar takes smaller requests than we thought."""
        self._request_texts = max(1, min(self._request_texts, texts))

    def drain(self) -> list[Entry]:
        """Take all entries out."""
        entries = [entry for lane in self._lanes.values() for entry in lane]
        for entry in entries:
            self.remove(entry)
        return entries

    def _count(self, entries: list[Entry], sign: int) -> None:
        priority = entries[0].spec.priority
        self.requests[priority] += sign
        self.under_way[priority] += sign * sum(len(entry.bodies) for entry in entries)

    def _share(self, spec: Spec) -> int:
        """Bulk comes in pieces that have the right size."""
        if spec.priority == "bulk":
            return self._request_texts
        outstanding = self.waiting["interactive"] + self.under_way["interactive"]
        return min(self._request_texts, max(LEAST_SHARE, -(-outstanding // self._connections)))

    def _next_lane(self) -> OrderedDict[Entry, None] | None:
        """
        Choose whose turn it is; within a class, whose first entry has come first.

        The cases: (1) no connection is free; (2) bulk waits, has nothing under way, and did not go last; (3) queries;
        (4) bulk, up to its bound.
        """
        if sum(self.requests.values()) >= self._connections:
            return None
        queries = self._oldest("interactive")
        bulk = self._oldest("bulk") if self.requests["bulk"] < self._bulk_connections else None
        if bulk is not None and not self.requests["bulk"] and not self._was_bulk:
            return bulk
        return queries or bulk

    def _oldest(self, priority: str) -> OrderedDict[Entry, None] | None:
        lanes = [lane for (spec, _), lane in self._lanes.items() if spec.priority == priority]
        return min(lanes, key=lambda lane: next(iter(lane)).number, default=None)
