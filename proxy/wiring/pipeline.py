"""
The journey, put together.

ROUTE states the order once, with a line of reason per stage; `build()` nests the stages in that order. A pipeline is
made of one set of settings and never changes: a reload builds another one, proves it and swaps.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from proxy.base.clock import Clock
from proxy.base.events import Observer
from proxy.base.messages import Answer, Batch, Limits, Request, Response
from proxy.base.settings import (
    BatchSettings,
    CallerSettings,
    Catalogue,
    ListenSettings,
    ModelSettings,
    RequestSettings,
    Settings,
    UpstreamSettings,
)
from proxy.base.stage import Snapshot, Stage
from proxy.funnel.admission import Admission
from proxy.funnel.cache import Cache, CacheStore
from proxy.funnel.coalesce import Coalesce
from proxy.funnel.microbatch import MicroBatch
from proxy.upstream.attempt import Attempt
from proxy.upstream.balance import Balance
from proxy.upstream.balance.canary import flaw
from proxy.upstream.balance.limit import Limit
from proxy.upstream.balance.model import Model
from proxy.upstream.balance.upstream import Upstream
from proxy.upstream.bucket import Bucket
from proxy.upstream.builtin import Builtin
from proxy.upstream.circuit import Circuit
from proxy.upstream.translate import Profile
from proxy.upstream.transport import Transport, tls_context
from proxy.wiring.config.profiles import dialect_of, profile_of

ROUTE: Final = {
    "edge.accept": "the only one who sees HTTP; refuses strangers and oversized bodies before anything is parsed",
    "edge.decode": "nothing behind it meets a malformed request",
    "funnel.admission": "first of all stages, so that a refusal costs nothing; holds the deadline over all others",
    "funnel.cache": "before coalesce: a hit needs nobody",
    "funnel.coalesce": "before microbatch: equal inputs should take one place in a batch",
    "funnel.microbatch": "where requests become batches, when a lease lets one leave; the last who knows callers",
    "upstream.attempt": "before the choice of an upstream: each attempt chooses anew, breaker and bucket hear each",
    "upstream.balance": "chooses among upstreams of one space, owns their slots, hands out the leases",
    "upstream.bucket": "before the breaker: what it hears of limits and pauses counts whatever the breaker thinks",
    "upstream.circuit": "around the exchange alone: waiting in our own queues is no failure of the upstream",
    "upstream.translate": "pure: how this upstream is spoken to",
    "upstream.transport": "the wire",
    "upstream.vectors": "the gate: nothing wrong may be answered, or cached, or counted as a success",
    "edge.encode": "the way back: rows or an error, as the caller asked",
}

BUILTIN = Profile(slots=2, start_slots=2, max_inputs=64, max_bytes=65_536)
"""The embedded model. One batch is computed at a time; a second one waits at the thread, so that it never idles. Some
milliseconds a batch: requests of several callers take turns."""


class Pipeline:
    """One set of stages, from admission to the upstreams, with the settings they were built with."""

    def __init__(
        self,
        settings: Settings,
        door: Stage[Request, Response],
        balance: Balance,
        stages: Mapping[str, Any],
        built: Mapping[str, Built],
        clock: Clock,
        models: Mapping[str, Model],
    ) -> None:
        """Put the pieces in; see `build()`."""
        self.settings = settings
        self.catalogue = Catalogue(settings.models, settings.request.default_model, balance.widths)
        self.listen: ListenSettings = settings.listen
        self.request: RequestSettings = settings.request
        self.callers: Mapping[str, CallerSettings] = settings.callers
        self.built = built
        self.proven = models
        self._door = door
        self._balance = balance
        self._stages = stages
        self._cache: Cache = stages["cache"]
        self._clock = clock
        self._proving: asyncio.Task[None] | None = None
        self._inside = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def known(self, request: Request) -> Response | None:
        """Answer from the cache alone, without waiting for anything; None when that cannot be."""
        return self._cache.known(request)

    async def __call__(self, request: Request) -> Response:
        self._inside += 1
        self._idle.clear()
        try:
            return await self._door(request)
        finally:
            self._inside -= 1
            if not self._inside:
                self._idle.set()

    async def prove(self) -> dict[str, str]:
        """
        Send a canary to every upstream of every model.

        Returns:
            By model, why it cannot be served; empty where it can.
        """
        async with asyncio.TaskGroup() as group:
            for model in self.catalogue.models:
                group.create_task(self._balance.sing(model, self.settings.lifecycle.canary_timeout_s))
        return self.problems()

    def keep_proving(self) -> None:
        """Go on sending canaries until the pipeline is closed."""
        self._proving = asyncio.create_task(self._prove_all())

    async def _prove_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for model in self.catalogue.models:
                group.create_task(self._prove_on(model))

    async def _prove_on(self, model: str) -> None:
        settings = self.settings.lifecycle
        retry_s, sung_at = settings.canary_retry_s, self._clock.now()
        while True:
            # In steps: something may go wrong meanwhile, and then the next canary is due earlier.
            await self._clock.sleep(min(settings.canary_retry_s, settings.canary_interval_s))
            is_whole = self._balance.is_whole(model)
            if is_whole:
                retry_s = settings.canary_retry_s
            # An open breaker is probed when it lets a probe pass, not before.
            is_soon = not is_whole and self._balance.rest_s(model) <= 0
            due_s = min(retry_s, settings.canary_interval_s) if is_soon else settings.canary_interval_s
            if self._clock.now() - sung_at < due_s:
                continue
            if not is_whole:
                retry_s *= 2
            await self._balance.sing(model, settings.canary_timeout_s)
            sung_at = self._clock.now()

    def has_moved(self, old: Pipeline) -> bool:
        """Whether a space that both pipelines name may mean other vectors here than there: unknown counts as other."""
        before, now = old._balance.canaries(), self._balance.canaries()
        for name, model in self.settings.models.items():
            for old_name, old_model in old.settings.models.items():
                was = before.get(old_name) if old_model.space == model.space else None
                if was is not None and (name not in now or flaw(now[name], was, 0)):
                    return True
        return False

    def problems(self) -> dict[str, str]:
        """Say by model why it cannot be served; empty where it can."""
        return self._balance.problems()

    def models(self) -> Snapshot:
        """Return the snapshot of each model."""
        return self._balance.snapshot()

    def snapshot(self) -> Snapshot:
        return {name: _snapshots(stage) for name, stage in self._stages.items()}

    def stop_storing(self) -> None:
        """Keep the answers that are still on their way out of the cache."""
        self._stages["cache"].detach()

    async def retire(self) -> None:
        """Wait until the last request inside is answered, which its deadline bounds, and close."""
        self._stop_proving()
        try:
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout_at(self._clock.now() + self.request.max_timeout_s):
                    await self._idle.wait()
        finally:
            await self.aclose()

    def _stop_proving(self) -> None:
        if self._proving:
            self._proving.cancel()

    async def aclose(self) -> None:
        """End the canaries and close every stage, the door first."""
        self._stop_proving()
        if self._proving:
            await asyncio.gather(self._proving, return_exceptions=True)
        await self._door.aclose()


def _snapshots(stage: Any) -> Any:
    return {name: part.snapshot() for name, part in stage.items()} if isinstance(stage, dict) else stage.snapshot()


def build(
    settings: Settings,
    api_keys: Mapping[str, str],
    *,
    clock: Clock,
    rng: random.Random,
    observe: Observer,
    store: CacheStore,
    old: Pipeline | None = None,
) -> Pipeline:
    """
    Nest the stages in the order of ROUTE, from the end to the door.

    Args:
        settings: checked ones.
        api_keys: by upstream, where it has one.
        clock, rng, observe: time, chance, and who is told of facts.
        store: cached vectors, which outlive a pipeline.
        old: the pipeline in force, at a reload: upstreams whose settings have not changed are taken over from it.
    """
    built = {
        name: _kept(name, upstream, api_keys.get(name, ""), old)
        or _built(name, upstream, api_keys.get(name, ""), clock=clock, observe=observe)
        for name, upstream in settings.upstreams.items()
    }
    # Only those that a model names are ever called, and closed by balance.
    named = {upstream for model in settings.models.values() for upstream in model.upstreams}
    upstreams = {name: built[name].upstream.join() for name in named}
    models = {
        name: _kept_model(name, model, built, old)
        or Model(name, model, [upstreams[u] for u in model.upstreams], clock=clock, rng=rng, observe=observe)
        for name, model in settings.models.items()
    }
    balance = Balance(models)
    attempt = Attempt(settings.attempt, balance, lease=balance.lease, clock=clock, rng=rng)
    microbatch = MicroBatch(
        settings.microbatch, attempt, leases=balance, may_retry=attempt.may_retry, clock=clock, observe=observe
    )
    coalesce = Coalesce(microbatch, observe=observe)
    cache = Cache(settings.cache, coalesce, store=store, observe=observe)
    admission = Admission(settings.admission, cache, drain_s=microbatch.expected_s, clock=clock)
    stages: dict[str, Any] = {
        "admission": admission,
        "cache": cache,
        "coalesce": coalesce,
        "microbatch": microbatch,
        "attempt": attempt,
        "balance": balance,
        "bucket": {name: one.bucket for name, one in built.items()},
        "circuit": {name: one.circuit for name, one in built.items()},
        "transport": {name: one.end for name, one in built.items()},
    }
    return Pipeline(settings, admission, balance, stages, built, clock, models)


@dataclass(frozen=True, slots=True)
class Built:
    """An upstream with its stages, and what it was built of."""

    settings: UpstreamSettings
    api_key: str = field(repr=False)
    upstream: Upstream
    bucket: Bucket
    circuit: Circuit
    end: Stage[Batch, Answer]


def _kept(name: str, settings: UpstreamSettings, api_key: str, old: Pipeline | None) -> Built | None:
    """Return the old pipeline's upstream where it is still what the settings say."""
    found = old.built.get(name) if old else None
    return found if found and (found.settings, found.api_key) == (settings, api_key) else None


def _kept_model(name: str, settings: ModelSettings, built: Mapping[str, Built], old: Pipeline | None) -> Model | None:
    """
    Return the old pipeline's model, with what its canaries have shown, where neither it nor its upstreams have changed.

    One that is served by nobody is made anew: a reload is how an exchanged model is accepted.
    """
    found = old.proven.get(name) if old else None
    if old is None or found is None or found.problem() or old.settings.models[name] != settings:
        return None
    return found if all(built[u] is old.built.get(u) for u in settings.upstreams) else None


def _built(name: str, settings: UpstreamSettings, api_key: str, *, clock: Clock, observe: Observer) -> Built:
    own = BUILTIN if settings.kind == "builtin" else profile_of(settings)
    asked = settings.balance
    slots = asked.slots or own.slots
    start = min(asked.start_slots or (own.start_slots if not asked.slots else slots), slots)
    least = min(asked.min_slots, start)
    end = _end(name, settings, api_key, slots, clock=clock, observe=observe)
    circuit = Circuit(name, settings.circuit, end, clock=clock, observe=observe)
    bucket = Bucket(name, settings.bucket, circuit, clock=clock)
    upstream = Upstream(
        name,
        bucket,
        limits=_limits(settings.batch, own),
        limit=Limit(least, start, slots),
        pace=bucket,
        guard=circuit,
        abandoned_s=own.abandoned_s if asked.abandoned_s < 0 else asked.abandoned_s,
        first_answer_s=own.first_answer_s,
        clock=clock,
    )
    return Built(settings, api_key, upstream, bucket, circuit, end)


def _end(
    name: str, settings: UpstreamSettings, api_key: str, slots: int, *, clock: Clock, observe: Observer
) -> Stage[Batch, Answer]:
    if settings.kind == "builtin":
        return Builtin(name, clock=clock, observe=observe)
    return Transport(
        name,
        dialect_of(name, settings, api_key),
        settings.transport,
        slots=slots,
        keepalive_s=settings.transport.keepalive_s or profile_of(settings).keepalive_s,
        first_answer_s=profile_of(settings).first_answer_s,
        tls=tls_context(settings.transport),
        clock=clock,
        observe=observe,
    )


def _limits(asked: BatchSettings, own: Profile) -> Limits:
    return Limits(
        asked.max_inputs or own.max_inputs,
        asked.max_bytes or own.max_bytes,
        asked.max_tokens or own.max_tokens or math.inf,
    )
