"""
The app: one process, one event loop, one contestant in it, and the requests of a scenario.

    python -m tests.load.suite.app '{"contestant": …, "load": …, …}'

Prints `ready` when it is, `start` with the instant at which the load began, `progress` twice a second, and `report`
with everything at the end, one JSON document per line. A loop that is held for good cannot end anything, so a thread
beside it keeps the time: it tells how far things are, and at the limit it reports what there is.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import threading
import time
from dataclasses import asdict, astuple, dataclass

from tests.load.suite import arrivals
from tests.load.suite.contestants import CONTESTANTS, Contestant, Surroundings
from tests.load.suite.ledger import OK, Ledger, Request, digest, texts
from tests.load.suite.probes import LoopProbe

PROGRESS_EVERY_S = 0.5
QUIET_S = 0.4
"""Between ready and start: memory and threads at rest are read then."""
LAST_LOOK_S = 0.3
"""A process that has reported stays this long, to be looked at once more."""


@dataclass(frozen=True, slots=True)
class Task:
    """What an app does; goes to it as JSON."""

    contestant: str
    surroundings: Surroundings
    load: arrivals.Load
    limit_s: float
    """Everything is over this long after the start."""
    seed: int
    run: str
    """Tells its texts from those of other runs."""

    def text(self) -> str:
        """Write it."""
        return json.dumps({**asdict(self), "load": arrivals.written(self.load)})

    @classmethod
    def read(cls, text: str) -> Task:
        """Read what was written."""
        given = json.loads(text)
        surroundings, load = Surroundings(**given.pop("surroundings")), arrivals.read(given.pop("load"))
        return cls(surroundings=surroundings, load=load, **given)


class App:
    """A contestant under a load, its ledger, and the probe of its loop."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._ledger = Ledger()
        self._probe = LoopProbe()
        self._has_begun = threading.Event()
        self._is_over = threading.Event()
        self._contestant: Contestant = CONTESTANTS[task.contestant](task.surroundings)

    async def run(self) -> None:
        """Say ready, be at rest for a moment, and let the requests come."""
        # Before rest is looked at, so that it counts there too.
        threading.Thread(target=self._keep_time, daemon=True).start()
        say("ready")
        await asyncio.sleep(QUIET_S)
        self._probe.begin()
        start = self._ledger.start = time.monotonic()
        say("start", at=start)
        self._has_begun.set()
        await self._task.load.run(start, self._ledger.intend, self._ask, random.Random(self._task.seed))
        self._is_over.set()
        # The loop stays, since the process is looked at once more; the keeper of the time ends it.
        await asyncio.Event().wait()

    async def _ask(self, request: Request) -> None:
        given = texts(self._task.run, request)
        try:
            if request.kind == "query":
                vectors = [await self._contestant.embed(given[0])]
            else:
                vectors = list(await self._contestant.embed_many(given))
        except Exception as error:  # whatever a contestant raises is its result
            failure = self._contestant.failure(error)
            self._ledger.settle(request, time.monotonic(), failure.name, is_refusal=failure.is_refusal)
        else:
            now = time.monotonic()
            self._ledger.settle(request, now, OK, told=digest(vectors))

    def _keep_time(self) -> None:
        self._has_begun.wait()
        limit = self._ledger.start + self._task.limit_s
        while not self._is_over.wait(PROGRESS_EVERY_S) and time.monotonic() < limit:
            say("progress", settled=self._ledger.settled, outstanding=self._ledger.outstanding(time.monotonic()))
        self._report()
        time.sleep(LAST_LOOK_S)
        # Neither a held loop nor threads that hang in a call can keep the process.
        os._exit(0)

    def _report(self) -> None:
        now = time.monotonic()
        start = self._ledger.start
        say(
            "report",
            is_over=self._is_over.is_set(),
            lasted_s=now - start,
            answers=[astuple(answer) for answer in self._ledger.answers(now)],
            holds=[(at - start, held_s) for at, held_s in self._probe.all_holds(now)],
            counts=self._contestant.counts(),
        )


def say(what: str, **more: object) -> None:
    """Write a line for the parent."""
    sys.stdout.write(json.dumps({"say": what, **more}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(App(Task.read(sys.argv[1])).run())
