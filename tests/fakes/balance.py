"""Upstreams whose pace, breaker and answers the test sets by hand."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

from proxy.base.errors import EmbeddingError
from proxy.base.events import CanaryFinished, Event
from proxy.base.lease import Wait
from proxy.base.messages import Answer, Batch, Limits, Row
from proxy.base.settings import ModelSettings
from proxy.upstream.balance import Balance
from proxy.upstream.balance.canary import CANARIES
from proxy.upstream.balance.limit import Limit
from proxy.upstream.balance.model import Model
from proxy.upstream.balance.upstream import Permit, Upstream
from tests.fakes.clock import HandClock, settle
from tests.fakes.stage import Call, ScriptedStage, make_batch, rows_of

RIGHT: Row = rows_of(CANARIES)[0]
ROOMY = Limits(256, 600_000)
ELSEWHERE: Row = rows_of(["another space"])[0]


class HandPace:
    """In place of a bucket: lets calls go from `until` on."""

    def __init__(self, clock: HandClock) -> None:
        self._clock = clock
        self.until = -math.inf
        self.error: EmbeddingError | None = None
        self.room_tokens = math.inf
        self.interval_s = 0.0
        self.needs: dict[float, float] = {}
        """Seconds that an amount of tokens waits, where it differs."""
        self.charged: list[float] = []

    def wait_s(self, least: float, wish: float) -> float:
        return max(0.0, self.until - self._clock.now(), self.needs.get(least, 0.0))

    @property
    def hold_error(self) -> EmbeddingError | None:
        return self.error if self.until > self._clock.now() else None

    def charge(self, tokens: float) -> None:
        self.charged.append(tokens)


class HandGuard:
    """In place of a breaker: lets calls pass from `until` on."""

    def __init__(self, clock: HandClock) -> None:
        self._clock = clock
        self.until = -math.inf
        self.is_closed = True
        self.generation = 0
        self.given_back: list[int] = []

    def open(self, seconds: float) -> None:
        self.until, self.is_closed = self._clock.now() + seconds, False

    def wait_s(self, now: float) -> float:
        return max(0.0, self.until - now)

    def enter(self, now: float) -> tuple[int, bool]:
        if not self.is_closed:
            self.generation += 1
        return self.generation, not self.is_closed

    def give_back(self, generation: int) -> None:
        self.given_back.append(generation)


class CountedStage(ScriptedStage):
    """Counts how often it is closed."""

    closings = 0

    async def aclose(self) -> None:
        self.closings += 1


class HandUpstream(Upstream):
    """An upstream all of whose surroundings the test plays."""

    def __init__(
        self,
        name: str,
        clock: HandClock,
        *,
        slots: int = 4,
        most: int = 0,
        limits: Limits = ROOMY,
        abandoned_s: float = 0.0,
        first_answer_s: float = 0.0,
        inner: Any = None,
    ) -> None:
        self.scripted = inner or CountedStage()
        self.hand_pace = HandPace(clock)
        self.hand_guard = HandGuard(clock)
        super().__init__(
            name,
            self.scripted,
            limits=limits,
            limit=Limit(1, slots, most or slots),
            pace=self.hand_pace,
            guard=self.hand_guard,
            abandoned_s=abandoned_s,
            first_answer_s=first_answer_s,
            clock=clock,
        )

    @property
    def calls(self) -> list[Call]:
        """Calls under way, without canaries."""
        return [call for call in self.scripted.calls if not call.future.done() and call.message.inputs != CANARIES]


class Play:
    """Upstreams that the test plays, and the model that they serve."""

    def __init__(self, *names: str, slots: int = 4, seed: int = 1, options: Any = None, **settings: Any) -> None:
        self.clock = HandClock()
        self.events: list[Event] = []
        self.upstreams = {name: HandUpstream(name, self.clock, slots=slots, **(options or {})) for name in names}
        self.settings = ModelSettings(upstreams=names, **settings)
        self.rng = random.Random(seed)
        self.model = self.another("m")
        self.balance = Balance({"m": self.model})

    def __getitem__(self, name: str) -> HandUpstream:
        return self.upstreams[name]

    def another(self, name: str, *, upstreams: tuple[str, ...] = ()) -> Model:
        chosen = [self.upstreams[u] for u in upstreams or self.upstreams]
        return Model(name, self.settings, chosen, clock=self.clock, rng=self.rng, observe=self.events.append)

    # --- canaries ---

    async def sing(self, *ends: Row | BaseException, model: str = "m") -> bool:
        """Send a round of canaries and let each upstream answer so; all of them rightly without any."""
        round_ = asyncio.create_task(self.balance.sing(model, 20.0))
        await settle()
        for upstream, end in zip(self.upstreams.values(), ends or [RIGHT] * len(self.upstreams), strict=True):
            self.answer_canary(upstream, end)
        async with asyncio.timeout(5):
            await round_
        return self.balance.is_whole(model)

    def answer_canary(self, upstream: HandUpstream, end: Row | BaseException = RIGHT) -> None:
        (call,) = [
            call for call in upstream.scripted.calls if not call.future.done() and call.message.inputs == CANARIES
        ]
        if isinstance(end, bytes):
            call.answer(Answer(rows_of(CANARIES) if end == RIGHT else (end,) * len(CANARIES), 9, ""))
        else:
            call.fail(end)

    @property
    def last(self) -> CanaryFinished:
        event = self.events[-1]
        assert isinstance(event, CanaryFinished)
        return event

    # --- calls ---

    def take(self, tokens: float = 1.0, wish: float = 1.0) -> Permit:
        """Take a lease for a new batch."""
        permit = self.model.take(tokens, wish)
        assert isinstance(permit, Permit), permit
        return permit

    def refused(self, tokens: float = 1.0, wish: float = 1.0) -> Wait:
        """Ask for a lease in vain."""
        wait = self.model.take(tokens, wish)
        assert isinstance(wait, Wait), wait
        return wait

    def called(self, permit: Permit, text: str = "a text", **changes: Any) -> asyncio.Task[Answer]:
        """Send a batch with a lease."""
        return asyncio.create_task(self.balance(self.batch(text, lease=permit, **changes)))

    def batch(self, *texts: str, **changes: Any) -> Batch:
        return make_batch(texts or ("a text",), now=self.clock.now(), **changes)

    def retry(self, text: str = "a text", *, tokens: float = 1.0, **changes: Any) -> asyncio.Task[Permit]:
        """Wait for the lease of a further attempt."""
        return asyncio.create_task(self.model.lease(self.batch(text, tokens=tokens, **changes)))

    @property
    def shown(self) -> dict[str, Any]:
        return dict(self.balance.snapshot()["m"]["upstreams"])


def answer(text: str = "a text", **more: Any) -> Answer:
    return Answer(rows_of([text]), 1, "", **more)
