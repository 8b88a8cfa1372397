"""
When requests are meant to start, and that their latency counts from then.

A request that has to wait because the app's own loop is held would start late in a naive test, and its wait would not
be seen ("coordinated omission"). So each one is entered in the ledger with the instant it was meant to start, before
anybody has time for it.

    closed   callers that each ask again as soon as they are answered
    open     queries at a rate, whatever becomes of them
    ingest   workers that embed documents of many chunks, one after the other, and queries at a rate beside them

Everything here runs inside the app's event loop, where a web framework would have its handlers.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from tests.load.suite.ledger import Request

Ask = Callable[[Request], Coroutine[Any, Any, None]]
"""Embeds what the request says, and settles it in the ledger; never raises."""
Intend = Callable[..., Request]
"""Enters a request into the ledger: kind, texts, the instant it is meant to start."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Callers that each ask again as soon as they are answered, each first at once."""

    kind: ClassVar[str] = "closed"
    callers: int
    lasts_s: float

    @property
    def words(self) -> str:
        who = "1 caller" if self.callers == 1 else f"{self.callers} callers at once"
        return f"{who}, each asking again when answered, for {self.lasts_s:g} s"

    async def run(self, start: float, intend: Intend, ask: Ask, _: random.Random) -> None:
        """Ask until the time is over, and wait for the last answers."""

        async def caller(first: Request) -> None:
            request = first
            while True:
                # A task of its own, as each request of a web framework has: the callers take turns.
                await asyncio.create_task(ask(request))
                now = time.monotonic()
                if now >= start + self.lasts_s:
                    return
                request = intend("query", 1, now)

        # All are meant to start now, also those that a held loop will not get to for seconds.
        first = [intend("query", 1, start) for _ in range(self.callers)]
        await asyncio.gather(*map(caller, first))


@dataclass(frozen=True, slots=True)
class Open:
    """Queries at a rate, as a Poisson process: people do not wait for each other."""

    kind: ClassVar[str] = "open"
    per_s: float
    lasts_s: float

    @property
    def words(self) -> str:
        return f"{self.per_s:g} queries per second, whatever becomes of them, for {self.lasts_s:g} s"

    async def run(self, start: float, intend: Intend, ask: Ask, chance: random.Random) -> None:
        """Ask at the instants drawn, and wait for all answers."""
        requests = [intend("query", 1, start + after_s) for after_s in instants(self.per_s, self.lasts_s, chance)]
        await _at_their_time(requests, ask)


@dataclass(frozen=True, slots=True)
class Ingest:
    """Workers that embed one document after the other, and queries at a rate beside them."""

    kind: ClassVar[str] = "ingest"
    workers: int
    chunks: int
    """Of a document."""
    queries_per_s: float
    lasts_s: float

    @property
    def words(self) -> str:
        return (
            f"{self.workers} workers ingest documents of {self.chunks} chunks, beside {self.queries_per_s:g} queries "
            f"per second, for {self.lasts_s:g} s"
        )

    async def run(self, start: float, intend: Intend, ask: Ask, chance: random.Random) -> None:
        """Ingest and ask until the time is over, and wait for the last answers."""

        async def worker(first: Request) -> None:
            request = first
            while True:
                await asyncio.create_task(ask(request))
                now = time.monotonic()
                if now >= start + self.lasts_s:
                    return
                request = intend("document", self.chunks, now)

        queries = [
            intend("query", 1, start + after_s) for after_s in instants(self.queries_per_s, self.lasts_s, chance)
        ]
        first = [intend("document", self.chunks, start) for _ in range(self.workers)]
        await asyncio.gather(_at_their_time(queries, ask), *map(worker, first))


Load = Closed | Open | Ingest
_KINDS: dict[str, type[Closed] | type[Open] | type[Ingest]] = {load.kind: load for load in (Closed, Open, Ingest)}


def written(load: Load) -> dict[str, Any]:
    """Return a load as JSON has it."""
    return {"kind": load.kind, **asdict(load)}


def read(given: dict[str, Any]) -> Load:
    """Return the load that was written."""
    fields = dict(given)
    return _KINDS[fields.pop("kind")](**fields)


def instants(per_s: float, lasts_s: float, chance: random.Random) -> Iterator[float]:
    """Draw instants of a Poisson process, in seconds after its start, up to its end."""
    after_s = chance.expovariate(per_s)
    while after_s < lasts_s:
        yield after_s
        after_s += chance.expovariate(per_s)


async def _at_their_time(requests: list[Request], ask: Ask) -> None:
    tasks: list[asyncio.Task[None]] = []
    for request in requests:
        wait_s = request.intended - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.create_task(ask(request)))
    await asyncio.gather(*tasks)
