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
from collections.abc import Iterable
from dataclasses import replace

from proxy.base.errors import DeadlineExceeded, EmbeddingError, Fault
from proxy.base.events import InputsJoined, Observer
from proxy.base.messages import Request, Response, Row
from proxy.base.stage import Beginning, Pending, Snapshot


class _Flight:
    """What the next stage has begun, for some keys."""

    __slots__ = ("deadline", "pending", "progress", "rows")

    def __init__(self, pending: Pending[Response], request: Request) -> None:
        self.pending = pending
        self.deadline = request.deadline
        self.progress = request.progress
        self.rows = {key: index for index, key in enumerate(request.keys)}


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

    def __init__(self, inner: Beginning[Request, Response], *, observe: Observer) -> None:
        self._inner = inner
        self._observe = observe
        self._flights: dict[bytes, _Flight] = {}

    async def __call__(self, request: Request) -> Response:
        """
        Raises:
            EmbeddingError: what befell the call that one of the inputs was in.
        """
        if self._flights.keys().isdisjoint(request.keys) and len(set(request.keys)) == len(request.keys):
            # The usual case: nobody else is after any of it.
            own = self._started(request)
            await self._landed(own, ())
            return own.pending.result()
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
                await self._landed(own, dict.fromkeys(joined.values()))
            finally:
                if request.progress.left_at is None:  # what it followed may have left for an upstream
                    left = [f.progress.left_at for f in joined.values() if f.progress.left_at is not None]
                    request.progress.left_at = min(left, default=None)
            if own:
                part = own.pending.result()  # raises what befell our own call
                response = _added(response, part)
                rows.update(zip(own.rows, part.rows, strict=True))
            for key, flight in joined.items():
                error = flight.pending.error
                if error is None:
                    rows[key] = flight.pending.result().rows[flight.rows[key]]
                elif (culprit := getattr(error, "key", None)) == key:
                    raise error  # this very input was refused: it would only be refused again
                elif culprit is None and not is_leaders_own(error, is_more_patient=request.deadline > flight.deadline):
                    raise error
        return replace(response, rows=tuple(rows[key] for key in request.keys))

    def _board(
        self, request: Request, keys: list[bytes], *, is_first: bool
    ) -> tuple[_Flight | None, dict[bytes, _Flight]]:
        """Join the flights that are under way, and start one for the other keys. Nothing waits in here."""
        joined = {key: flight for key in keys if (flight := self._flights.get(key)) and not flight.pending.is_over}
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
        flight = _Flight(self._inner.begin(request), request)
        self._flights.update(dict.fromkeys(request.keys, flight))
        return flight

    async def _landed(self, own: _Flight | None, joined: Iterable[_Flight]) -> None:
        """Wait for all of them, or until our own has failed; who leaves earlier takes back its interest."""
        flights = (own, *joined) if own else tuple(joined)
        waiters = [flight.pending.join() for flight in flights]
        try:
            for flight, waiter in zip(flights, waiters, strict=True):
                await waiter
                if flight is own and flight.pending.error:
                    return
        finally:
            for flight, waiter in zip(flights, waiters, strict=True):
                flight.pending.leave(waiter)
                if flight.pending.is_over:
                    self._forget(flight)

    def _forget(self, flight: _Flight) -> None:
        """Let nobody join any more."""
        for key in flight.rows:
            if self._flights.get(key) is flight:
                del self._flights[key]

    def snapshot(self) -> Snapshot:
        return {"inputs_in_flight": len(self._flights)}

    async def aclose(self) -> None:
        """End what is still in flight; there is nothing when all requests have been answered."""
        self._flights.clear()
        await self._inner.aclose()


def _added(response: Response, part: Response) -> Response:
    """Put what a further call cost to what was spent before; rows are put together elsewhere."""
    return replace(
        part,
        tokens=response.tokens + part.tokens,
        queue_s=max(response.queue_s, part.queue_s),
        upstream_s=max(response.upstream_s, part.upstream_s),
        attempts=response.attempts + part.attempts,
    )
