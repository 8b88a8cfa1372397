"""
Single-flight: equal inputs that are asked for at the same time are computed once.

Equal means equal keys, also within one request. The first to ask for a key leads, the others follow. A flight belongs
to all who wait for it: when one of them leaves, leader or not, the others keep it; when the last one leaves, it is
cancelled. A leader's own trouble (its request was refused, its deadline came) is its own: the followers ask again for
themselves. An upstream's trouble is everybody's.

Source: golang.org/x/sync/singleflight for the term; async-lru counts its waiters in the same way.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from proxy.base.errors import DeadlineExceeded, EmbeddingError, Fault
from proxy.base.events import InputsJoined, Observer
from proxy.base.messages import Request, Response, Row
from proxy.base.stage import Snapshot, Stage


class _Flight:
    """One call of the next stage, for some keys, and how many requests wait for it."""

    __slots__ = ("deadline", "progress", "rows", "task", "waiters")

    def __init__(self, task: asyncio.Task[Response], request: Request) -> None:
        self.task = task
        self.deadline = request.deadline
        self.progress = request.progress
        self.rows = {key: index for index, key in enumerate(request.keys)}
        self.waiters = 0

    def row(self, key: bytes) -> Row:
        return self.task.result().rows[self.rows[key]]


def is_leaders_own(error: BaseException, *, is_more_patient: bool) -> bool:
    """
    Whether a flight failed for a reason that a follower does not share.

    Args:
        error: what befell the flight.
        is_more_patient: whether the follower's deadline is later than the flight's: then more attempts, or a longer
            wait, may succeed for it.
    """
    if isinstance(error, EmbeddingError):
        return (
            error.fault is Fault.CALLER or isinstance(error, DeadlineExceeded) or (error.can_retry and is_more_patient)
        )
    return isinstance(error, asyncio.CancelledError)


class Coalesce:
    """Knows what is in flight, and lets equal inputs share it."""

    def __init__(self, inner: Stage[Request, Response], *, observe: Observer) -> None:
        self._inner = inner
        self._observe = observe
        self._flights: dict[bytes, _Flight] = {}

    async def __call__(self, request: Request) -> Response:
        if self._flights.keys().isdisjoint(request.keys) and len(set(request.keys)) == len(request.keys):
            # The usual case: nobody else is after any of it.
            own = self._started(request)
            await self._landed(own, set())
            return own.task.result()
        return await self._shared(request)

    async def _shared(self, request: Request) -> Response:
        """Put the rows together from flights of others, and from own ones for what nobody is after."""
        rows: dict[bytes, Row] = {}
        response = Response((), tokens=0)
        is_first = True
        while missing := [key for key in dict.fromkeys(request.keys) if key not in rows]:
            own, joined = self._board(request, missing, is_first=is_first)
            is_first = False
            try:
                await self._landed(own, set(joined.values()))
            finally:
                if request.progress.left_at is None:  # what it followed may have left for an upstream
                    left = [f.progress.left_at for f in joined.values() if f.progress.left_at is not None]
                    request.progress.left_at = min(left, default=None)
            if own:
                part = own.task.result()  # raises what befell our own call
                response = _added(response, part)
                rows.update(zip(own.rows, part.rows, strict=True))
            for key, flight in joined.items():
                error = _failure(flight.task)
                if error is None:
                    rows[key] = flight.row(key)
                elif (culprit := getattr(error, "key", None)) == key:
                    raise error  # this very input was refused: it would only be refused again
                elif culprit is None and not is_leaders_own(error, is_more_patient=request.deadline > flight.deadline):
                    raise error
        return replace(response, rows=tuple(rows[key] for key in request.keys))

    def _board(
        self, request: Request, keys: list[bytes], *, is_first: bool
    ) -> tuple[_Flight | None, dict[bytes, _Flight]]:
        """Join the flights that are under way, and start one for the other keys. Nothing waits in here."""
        joined = {key: flight for key in keys if (flight := self._flights.get(key)) and not flight.task.done()}
        own_keys = [key for key in keys if key not in joined]
        if is_first and len(own_keys) < len(request.keys):
            self._observe(InputsJoined(request.spec.model, len(request.keys) - len(own_keys)))
        if not own_keys:
            return None, joined
        if len(own_keys) < len(request.keys):
            place = {key: index for index, key in reversed(list(enumerate(request.keys)))}
            request = request.part([place[key] for key in own_keys])
        return self._started(request), joined

    def _started(self, request: Request) -> _Flight:
        """Start a flight for all keys of a request, each there once; others may join from now on."""
        flight = _Flight(asyncio.create_task(self._fly(request)), request)
        self._flights.update(dict.fromkeys(request.keys, flight))
        flight.task.add_done_callback(lambda _: self._landed_at_last(flight))
        return flight

    async def _fly(self, request: Request) -> Response:
        return await self._inner(request)

    def _forget(self, flight: _Flight) -> None:
        """Let nobody join any more."""
        for key in flight.rows:
            if self._flights.get(key) is flight:
                del self._flights[key]

    def _landed_at_last(self, flight: _Flight) -> None:
        self._forget(flight)
        _failure(flight.task)  # looked at: asyncio reports errors that nobody saw, and all waiters may have left

    async def _landed(self, own: _Flight | None, joined: set[_Flight]) -> None:
        """Wait for all of them, or until our own has failed; who leaves earlier takes back its interest."""
        flights = joined | ({own} if own else set())
        for flight in flights:
            flight.waiters += 1
        try:
            if len(flights) == 1:
                await _over(next(iter(flights)).task)
                return
            pending = {flight.task for flight in flights}
            while pending and not (own and own.task.done() and _failure(own.task)):
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for flight in flights:
                flight.waiters -= 1
                if not flight.waiters and not flight.task.done():
                    flight.task.cancel()
                    self._forget(flight)

    def snapshot(self) -> Snapshot:
        return {"inputs_in_flight": len(self._flights)}

    async def aclose(self) -> None:
        """End what is still in flight; there is nothing when all requests have been answered."""
        tasks = {flight.task for flight in self._flights.values()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._inner.aclose()


async def _over(task: asyncio.Task[Response]) -> None:
    """Wait until a task is over, one way or the other; who is cancelled here leaves the task alone."""
    waiter = asyncio.get_running_loop().create_future()

    def wake(_: asyncio.Task[Response]) -> None:
        if not waiter.done():
            waiter.set_result(None)

    task.add_done_callback(wake)
    try:
        await waiter
    finally:
        task.remove_done_callback(wake)


def _failure(task: asyncio.Task[Response]) -> BaseException | None:
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def _added(response: Response, part: Response) -> Response:
    """Put what a further call cost to what was spent before; rows are put together elsewhere."""
    return replace(
        part,
        tokens=response.tokens + part.tokens,
        queue_s=max(response.queue_s, part.queue_s),
        upstream_s=max(response.upstream_s, part.upstream_s),
        attempts=response.attempts + part.attempts,
    )
