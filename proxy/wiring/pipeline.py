"""
The journey, put together.

ROUTE states the order once, with a line of reason per stage; `build()` nests the stages in that order. A pipeline is
made of one set of settings and never changes: a reload builds another one, proves it and swaps.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Mapping
from typing import Any, Final

from proxy.base.clock import Clock
from proxy.base.events import Observer
from proxy.base.messages import Answer, Batch, Request, Response, Spec
from proxy.base.settings import (
    CallerSettings,
    Catalogue,
    ListenSettings,
    RequestSettings,
    Settings,
    UpstreamSettings,
)
from proxy.base.stage import Snapshot, Stage
from proxy.funnel.admission import Admission
from proxy.funnel.cache import Cache, CacheStore
from proxy.funnel.coalesce import Coalesce
from proxy.funnel.microbatch import Limits, MicroBatch
from proxy.upstream.attempt import Attempt
from proxy.upstream.balance import Balance, Model, Upstream
from proxy.upstream.bucket import Bucket
from proxy.upstream.builtin import Builtin
from proxy.upstream.circuit import Circuit
from proxy.upstream.translate.openai import PROFILES, OpenAI
from proxy.upstream.transport import Transport, tls_context

ROUTE: Final = {
    "edge.accept": "the only one who sees HTTP; refuses strangers and oversized bodies before anything is parsed",
    "edge.decode": "nothing behind it meets a malformed request",
    "funnel.admission": "first of all stages, so that a refusal costs nothing; holds the deadline over all others",
    "funnel.cache": "before coalesce: a hit needs nobody",
    "funnel.coalesce": "before microbatch: equal inputs should take one place in a batch",
    "funnel.microbatch": "where requests become batches, and the last who knows callers",
    "upstream.attempt": "before the choice of an upstream: each attempt chooses anew, breaker and bucket hear each",
    "upstream.balance": "chooses among upstreams of one space, and owns their slots",
    "upstream.bucket": "before the breaker: a call may wait here for a minute, and the breaker should judge at the end",
    "upstream.circuit": "around the exchange alone: waiting in our own queues is no failure of the upstream",
    "upstream.translate": "pure: how this upstream is spoken to",
    "upstream.transport": "the wire",
    "upstream.vectors": "the gate: nothing wrong may be answered, or cached, or counted as a success",
    "edge.encode": "the way back: rows or an error, as the caller asked",
}

BUILTIN_SLOTS = 2
"""One batch is computed at a time; a second one waits at the thread, so that it never idles."""
BUILTIN_LIMITS = Limits(max_inputs=64, max_bytes=65_536)
"""Some milliseconds a batch: requests of several callers take turns."""


class Pipeline:
    """One set of stages, from admission to the upstreams, with the settings they were built with."""

    def __init__(
        self, settings: Settings, door: Stage[Request, Response], balance: Balance, stages: Mapping[str, Any]
    ) -> None:
        """Put the pieces in; see `build()`."""
        self.settings = settings
        self.catalogue = Catalogue(settings.models, settings.request.default_model)
        self.listen: ListenSettings = settings.listen
        self.request: RequestSettings = settings.request
        self.callers: Mapping[str, CallerSettings] = settings.callers
        self._door = door
        self._balance = balance
        self._stages = stages
        self._inside = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, request: Request) -> Response:
        self._inside += 1
        self._idle.clear()
        try:
            return await self._door(request)
        finally:
            self._inside -= 1
            if not self._inside:
                self._idle.set()

    async def prove(self, clock: Clock) -> dict[str, str]:
        """
        Send a canary to every upstream of every model.

        Returns:
            By model, why it cannot be served; empty where it can.
        """
        deadline = clock.now() + self.settings.lifecycle.canary_timeout_s
        async with asyncio.TaskGroup() as group:
            for model in self.catalogue.models:
                group.create_task(self._balance.sing(model, deadline))
        return self.problems()

    async def keep_proving(self, clock: Clock) -> None:
        """Go on sending canaries, for ever; whoever starts this cancels it."""
        async with asyncio.TaskGroup() as group:
            for model in self.catalogue.models:
                group.create_task(self._keep_proving(model, clock))

    async def _keep_proving(self, model: str, clock: Clock) -> None:
        settings = self.settings.lifecycle
        retry_s = settings.canary_retry_s
        while True:
            if self._balance.is_whole(model):
                wait, retry_s = settings.canary_interval_s, settings.canary_retry_s
            else:
                wait = min(retry_s, settings.canary_interval_s)
                retry_s = wait * 2
            await clock.sleep(wait)
            await self._balance.sing(model, clock.now() + settings.canary_timeout_s)

    def problems(self) -> dict[str, str]:
        """Say by model why it cannot be served; empty where it can."""
        return self._balance.problems()

    def models(self) -> Snapshot:
        """Return the snapshot of each model."""
        return self._balance.snapshot()

    def snapshot(self) -> Snapshot:
        return {name: _snapshots(stage) for name, stage in self._stages.items()}

    async def retire(self, clock: Clock) -> None:
        """Wait until the last request inside is answered, which its deadline bounds, and close."""
        try:
            with contextlib.suppress(TimeoutError):
                async with clock.timeout_at(clock.now() + self.request.max_timeout_s):
                    await self._idle.wait()
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Close every stage, the door first."""
        await self._door.aclose()
        await self._balance.aclose()


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
) -> Pipeline:
    """
    Nest the stages in the order of ROUTE, from the end to the door.

    Args:
        settings: checked ones.
        api_keys: by upstream, where it has one.
        clock, rng, observe: time, chance, and who is told of facts.
        store: cached vectors, which outlive a pipeline.
    """
    buckets: dict[str, Bucket] = {}
    circuits: dict[str, Circuit] = {}
    ends: dict[str, Stage[Batch, Answer]] = {}
    upstreams: dict[str, Upstream] = {}
    for name, upstream in settings.upstreams.items():
        slots = upstream.balance.slots or _default_slots(upstream)
        ends[name] = _end(name, upstream, api_keys.get(name, ""), slots, clock=clock, observe=observe)
        circuits[name] = Circuit(name, upstream.circuit, ends[name], clock=clock, observe=observe)
        buckets[name] = Bucket(upstream.bucket, circuits[name])
        upstreams[name] = Upstream(name, buckets[name], slots=slots, refuses_s=circuits[name].wait_s)
    balance = Balance(
        {
            name: Model(name, model, [upstreams[u] for u in model.upstreams], clock=clock, observe=observe)
            for name, model in settings.models.items()
        }
    )
    attempt = Attempt(settings.attempt, balance, clock=clock, rng=rng)
    microbatch = MicroBatch(attempt, limits=_limits(settings), observe=observe)
    coalesce = Coalesce(microbatch, observe=observe)
    store.resize(settings.cache.max_bytes)
    cache = Cache(settings.cache, coalesce, store=store, observe=observe)
    admission = Admission(settings.admission, cache, clock=clock)
    stages: dict[str, Any] = {
        "admission": admission,
        "cache": cache,
        "coalesce": coalesce,
        "microbatch": microbatch,
        "attempt": attempt,
        "balance": balance,
        "bucket": buckets,
        "circuit": circuits,
        "transport": ends,
    }
    return Pipeline(settings, admission, balance, stages)


def _end(
    name: str, settings: UpstreamSettings, api_key: str, slots: int, *, clock: Clock, observe: Observer
) -> Stage[Batch, Answer]:
    if settings.kind == "builtin":
        return Builtin(name, clock=clock, observe=observe)
    profile = PROFILES[settings.profile]
    return Transport(
        name,
        OpenAI(name, profile, base_url=settings.base_url, api_key=api_key, headers=settings.headers),
        settings.transport,
        slots=slots,
        keepalive_s=settings.transport.keepalive_s or profile.keepalive_s,
        tls=tls_context(settings.transport),
        clock=clock,
        observe=observe,
    )


def _default_slots(settings: UpstreamSettings) -> int:
    return BUILTIN_SLOTS if settings.kind == "builtin" else PROFILES[settings.profile].slots


def _limits(settings: Settings) -> Any:
    """Return the function from a spec to what every upstream of its model takes in one call."""

    def of(upstream: UpstreamSettings) -> Limits:
        own = BUILTIN_LIMITS
        if upstream.kind != "builtin":
            profile = PROFILES[upstream.profile]
            own = Limits(profile.max_inputs, profile.max_bytes)
        return Limits(upstream.batch.max_inputs or own.max_inputs, upstream.batch.max_bytes or own.max_bytes)

    by_model = {}
    for name, model in settings.models.items():
        all_limits = [of(settings.upstreams[upstream]) for upstream in model.upstreams]
        by_model[name] = Limits(min(x.max_inputs for x in all_limits), min(x.max_bytes for x in all_limits))

    def limits(spec: Spec) -> Limits:
        return by_model[spec.model]

    return limits
