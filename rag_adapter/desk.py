"""
One event loop's part of a client: texts of many calls come in, travel together, and each call gets its own rows.

Every request is a task of its own, since it belongs to all whose texts it carries: a call that is cancelled, or whose
deadline has come, leaves the others alone, and the last one to leave cancels the request. What one text has brought
about concerns its own call; the others are asked again without it.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from rag_adapter import wire
from rag_adapter.errors import (
    DeadlineExceeded,
    EmbeddingError,
    EmbeddingFailed,
    SidecarUnavailable,
    Unavailable,
)
from rag_adapter.exchange import Exchange
from rag_adapter.outbox import Entry, Outbox, Parcel
from rag_adapter.reach import Reach, Tries
from rag_adapter.settings import ClientSettings
from rag_adapter.tally import Tally

PIECE_BYTES = 128 * 1024
"""So much of the vectors is read before others get their turn: 21 of 1536 numbers, 0.5 ms; as many callers wake."""

CLOSED = EmbeddingFailed("the client was closed meanwhile", code="client_closed")

_TOO_MANY = frozenset({"too_many_inputs", "request_too_large"})
"""Codes that say that a request has too many texts, however good each of them is."""


class Desk:
    """Takes entries, sends them in requests, hands out rows. Belongs to the loop that runs when it is made."""

    def __init__(self, settings: ClientSettings, tally: Tally, reach: Reach) -> None:
        self.loop = asyncio.get_running_loop()
        self.exchange = Exchange(settings, tally)
        self.guard: AsyncGenerator[None] | None = None
        """Closes this when the loop ends; see `EmbeddingClient`."""
        self._settings = settings
        self._tally = tally
        self._reach = reach
        self._rng = random.Random()
        self._usual_headers = wire.usual_headers(settings.client_name, settings.api_key)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_flushing = False
        self._is_closed = False
        self._trouble: SidecarUnavailable | Unavailable | None = None
        """Why requests have to be sent again at present."""
        self.outbox = Outbox(
            connections=settings.max_connections,
            bulk_connections=settings.bulk_connections,
            request_texts=settings.request_texts,
        )

    async def ask(self, entry: Entry) -> list[Any]:
        """
        Return a row for each text of an entry.

        Raises:
            EmbeddingError: why there are none.
        """
        if self._is_closed:
            raise CLOSED.own()
        left_s = entry.deadline - time.monotonic()
        if left_s <= 0:
            raise self._late(entry)
        self.outbox.put(entry)
        self._flush_soon()
        timer = self.loop.call_later(left_s, self._expire, entry)
        try:
            await entry.future
        except asyncio.CancelledError:
            self._leave(entry)
            raise
        finally:
            timer.cancel()
        # Taken out: the request holds its entries until the last of them has its rows, and 1000 lists of 1536 floats
        # are 49 MB.
        rows, entry.rows = entry.rows, []
        return rows

    def _expire(self, entry: Entry) -> None:
        if not entry.future.done():
            entry.future.set_exception(self._late(entry))
            self._leave(entry)

    def _late(self, entry: Entry) -> DeadlineExceeded:
        where = "while the text waited for a connection" if entry.parcel is None else "before the sidecar's answer"
        if self._trouble is None:
            return DeadlineExceeded(f"the deadline came {where}")
        error = DeadlineExceeded(f"the deadline came {where}; it was being asked again: {self._trouble}")
        error.__cause__ = self._trouble
        return error

    def _leave(self, entry: Entry) -> None:
        """Nobody waits for this entry any more; the last one out cancels the request."""
        if entry.has_left:
            return  # its deadline came, and its caller is cancelled before it has heard of that
        entry.has_left = True
        parcel = entry.parcel
        if parcel is None:
            self.outbox.remove(entry)
            return
        parcel.left += 1
        if parcel.left == len(parcel.entries) and parcel.task is not None:
            parcel.task.cancel()

    # --- requests ---

    def _flush_soon(self) -> None:
        """
        Send what waits at the end of this turn of the loop.

        Not now: those who call in the same turn would miss it, and a gather of a thousand become a thousand requests.
        """
        if not self._is_flushing:
            self._is_flushing = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flushing = False
        while entries := self.outbox.take():
            parcel = Parcel(entries)
            task = parcel.task = self.loop.create_task(self._carry(parcel))
            self._tasks.add(task)
            # Not at the end of the task itself: one that is cancelled before its first step has no end of its own.
            task.add_done_callback(functools.partial(self._over, parcel))

    def _over(self, parcel: Parcel, task: asyncio.Task[None]) -> None:
        """A request is over, one way or another; whoever has neither rows nor an error by now gets the task's."""
        self._tasks.discard(task)
        error = _error_of(task)
        for entry in parcel.entries:
            if entry.parcel is parcel:
                _fail(entry, error)
                entry.parcel = None  # or each of them is garbage that only the collector finds
        parcel.task = None
        self.outbox.came_back(parcel.entries)
        # The callers who were just answered come first: their turn is before that one.
        self._flush_soon()

    async def _carry(self, parcel: Parcel) -> None:
        """Ask until there is an answer, or no sense in asking once more."""
        spec = parcel.entries[0].spec
        tries = Tries(self._reach, spec.priority == "bulk", self._rng)
        while entries := parcel.present():
            deadline = max(entry.deadline for entry in entries)
            try:
                rows, headers = await self._asked(entries, spec, deadline)
            except (SidecarUnavailable, Unavailable) as error:
                wait_s = tries.wait_s(error, time.monotonic(), deadline)
                if wait_s is None:
                    raise
                self._trouble = error
                self._tally.add("reconnects")
                await asyncio.sleep(wait_s)
            except EmbeddingError as error:
                self._set_apart(entries, error)
                return
            else:
                await self._hand_out(entries, rows, headers.get("x-embedding-space"))
                return

    async def _asked(
        self, entries: list[Entry], spec: wire.Spec, deadline: float
    ) -> tuple[list[Any], Mapping[str, str]]:
        """Make one attempt; returns what came for each text."""
        bodies = [body for entry in entries for body in entry.bodies]
        left_s = deadline - time.monotonic()
        # There can be one trace only: that of the call that has waited longest.
        headers = wire.headers(self._usual_headers, spec.priority, left_s, entries[0].traceparent)
        answer = await self.exchange.post(wire.body(bodies, spec), headers)
        self._reach.found()
        self._trouble = None
        if answer.status != 200:
            raise wire.failure(answer, str(self._settings.address))
        return wire.vectors(answer, len(bodies)), answer.headers

    async def _hand_out(self, entries: list[Entry], rows: list[Any], space: str | None) -> None:
        """Read the rows and give each call its own, with turns for others in between."""
        width = entries[0].spec.dimensions
        position = size_bytes = 0
        for entry in entries:
            for index in entry.place:
                if not entry.future.done():
                    try:
                        row = wire.row(rows[position], width)
                        entry.rows.append(wire.floats(row) if entry.as_floats else row)
                    except EmbeddingFailed as error:
                        entry.future.set_exception(error.own(None if entry.first is None else index))
                    else:
                        width = len(row) // 4
                        size_bytes += len(row)
                position += 1
                if size_bytes >= PIECE_BYTES:
                    size_bytes = 0
                    await asyncio.sleep(0)
            if not entry.future.done():
                entry.space = space
                entry.future.set_result(None)

    # --- errors ---

    def _set_apart(self, entries: list[Entry], error: EmbeddingError) -> None:
        """
        Give the error to whom it belongs; the others wait for another request, with the same deadlines.

        The cases: (1) one text is to blame; (2) there were too many, and less of them may pass; (3) it concerns them
        all.
        """
        if error.index is not None:
            position = error.index
            for entry in entries:
                if 0 <= position < len(entry.bodies):
                    index = None if entry.first is None else entry.first + position
                    _fail(entry, wire.placed(error, index))
                    break
                position -= len(entry.bodies)
            else:
                raise error
        elif error.code in _TOO_MANY and len(entries) > 1:
            self.outbox.lower(sum(len(entry.bodies) for entry in entries) // 2)
        else:
            raise error
        self.outbox.put_back([entry for entry in entries if not entry.future.done()])

    # --- the end ---

    async def aclose(self) -> None:
        """Close the connections; whoever still waits gets an error."""
        self._is_closed = True
        for entry in self.outbox.drain():
            _fail(entry, CLOSED)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.exchange.aclose()


def _fail(entry: Entry, error: EmbeddingError) -> None:
    """Give a call an error of its own, unless it has an outcome already."""
    if not entry.future.done():
        entry.future.set_exception(error.own(error.index))


def _error_of(task: asyncio.Task[None]) -> EmbeddingError:
    """Say how a request ended for those who are still without an outcome."""
    if task.cancelled():  # by `aclose()`, or by `asyncio.run` at its end
        return CLOSED
    error = task.exception()
    if isinstance(error, EmbeddingError):
        return error.own()
    defect = EmbeddingFailed(f"a defect of the adapter: {type(error).__name__}", code="internal_error")
    defect.__cause__ = error
    return defect
