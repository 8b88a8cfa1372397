"""
One server: its slots, and who may use them.

A lease is one slot, with the breaker's leave and the rate to go; it is given in one synchronous stretch or not at all.
A call that was abandoned may still be computed over there: its slot stays counted (it is haunted) for as long as that
is likely, within a bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from proxy.base.clock import Clock
from proxy.base.errors import CircuitOpen, DeadlineExceeded, EmbeddingError, RateLimited, UpstreamTimeout
from proxy.base.lease import Wait
from proxy.base.messages import Answer, Batch, Limits
from proxy.base.stage import Snapshot, Stage
from proxy.upstream.balance.latency import Latency
from proxy.upstream.balance.limit import Limit
from proxy.upstream.balance.line import Line

_UNSENT_S = 0.001
"""A call that ends so soon because its deadline has come was not sent: nobody computes it."""


class Pace(Protocol):
    """What a slot asks of the bucket."""

    def wait_s(self, least: float, wish: float) -> float: ...
    @property
    def hold_error(self) -> EmbeddingError | None: ...
    @property
    def room_tokens(self) -> float: ...
    @property
    def interval_s(self) -> float: ...
    def charge(self, tokens: float) -> None: ...


class Guard(Protocol):
    """What a slot asks of the breaker."""

    @property
    def is_closed(self) -> bool: ...
    def wait_s(self, now: float) -> float: ...
    def enter(self, now: float) -> tuple[int, bool]: ...
    def give_back(self, generation: int) -> None: ...


class Permit:
    """A lease: one slot of one upstream."""

    __slots__ = ("_is_charged", "_is_released", "abandoned_s", "generation", "is_probe", "limits", "owner", "upstream")

    def __init__(self, owner: Upstream, limits: Limits, generation: int, *, is_probe: bool) -> None:
        self.owner = owner
        self.upstream = owner.name
        self.limits = limits
        self.generation = generation
        self.is_probe = is_probe
        self.abandoned_s = 0.0
        """How long the server is probably still busy with it, when it is released."""
        self._is_charged = self._is_released = False

    def charge(self, tokens: float) -> None:
        """See `base/lease.py`."""
        if not self._is_charged:
            self._is_charged = True
            self.owner.pace.charge(tokens)

    def release(self) -> None:
        """See `base/lease.py`."""
        if not self._is_released:
            self._is_released = True
            self.owner.released(self)


class Upstream:
    """One server and its slots; models share it."""

    def __init__(
        self,
        name: str,
        inner: Stage[Batch, Answer],
        *,
        limits: Limits,
        limit: Limit,
        pace: Pace,
        guard: Guard,
        abandoned_s: float,
        first_answer_s: float,
        clock: Clock,
    ) -> None:
        """
        Args:
            name: the upstream's name.
            inner: bucket, circuit and what follows, for this upstream.
            limits: what one call may carry.
            limit: how many calls at a time.
            pace, guard: its limits per minute and its breaker, asked before a slot is given.
            abandoned_s: how long an abandoned call counts at the most.
            first_answer_s: how long the first answer may take, where a model has to be loaded for it; else 0.
            clock: where time comes from.
        """
        self.name = name
        self.inner = inner
        self.limits = limits
        self.limit = limit
        self.pace = pace
        self.guard = guard
        self.first_answer_s = first_answer_s
        self.in_use = 0
        """Slots given away, haunted ones included."""
        self.haunted = 0
        self._abandoned_s = abandoned_s
        self._clock = clock
        self._latency: dict[str, Latency] = {}
        self._listeners: list[Callable[[], None]] = []
        self._canaries = Line(self.tell, clock=clock)
        self._ghosts: set[asyncio.Future[None]] = set()
        self._pipelines = 0

    # --- leases ---

    @property
    def has_slot(self) -> bool:
        return self.in_use < self.limit.slots

    @property
    def is_free(self) -> bool:
        """Whether there is a slot for others than its canaries: these go first, there are only few of them."""
        return self.has_slot and not self._canaries

    @property
    def load(self) -> float:
        return self.in_use / max(1, self.limit.slots)

    def take(self, now: float) -> Permit:
        """Give a slot away; only asked when there is one, and the breaker and the bucket let a call pass."""
        generation, is_probe = self.guard.enter(now)
        self.in_use += 1
        room = self.pace.room_tokens
        limits = self.limits if room >= self.limits.max_tokens else replace(self.limits, max_tokens=room)
        return Permit(self, limits, generation, is_probe=is_probe)

    async def lease(self, tokens: float, deadline: float) -> Permit:
        """
        Wait for a slot of this very upstream: for its canary.

        Raises:
            CircuitOpen: the breaker does not let it pass.
            EmbeddingError: the upstream has asked to be left alone for longer than until the deadline.
        """
        return await self._canaries.wait(lambda: self._asked(tokens, deadline))

    def _asked(self, tokens: float, deadline: float) -> Permit | Wait:
        now = self._clock.now()
        if (wait_s := self.guard.wait_s(now)) > 0:
            raise CircuitOpen(f"upstream {self.name!r} has failed repeatedly and is left alone", retry_after_s=wait_s)
        if (wait_s := self.pace.wait_s(tokens, tokens)) > 0:
            error = self.pace.hold_error
            if error is not None and now + wait_s > deadline:
                raise error.own()
            return Wait(now + wait_s)
        if not self.has_slot:
            return Wait()
        permit = self.take(now)
        permit.charge(tokens)
        return permit

    def released(self, permit: Permit) -> None:
        """Take a slot back, at once or when its ghost is gone."""
        if permit.is_probe:
            self.guard.give_back(permit.generation)
        if permit.abandoned_s > 0:
            self.haunted += 1
            ghost = asyncio.ensure_future(self._clock.sleep(permit.abandoned_s))
            self._ghosts.add(ghost)
            ghost.add_done_callback(self._exorcised)
        else:
            self.in_use -= 1
        self.tell()  # also without a free slot: the breaker may have opened, which ends the wait for one

    def _exorcised(self, ghost: asyncio.Future[None]) -> None:
        self._ghosts.discard(ghost)
        self.haunted -= 1
        self.in_use -= 1
        self.tell()

    def tell(self) -> None:
        """Tell everybody who waits for a slot that something may have changed."""
        self._canaries.call()
        for ready in tuple(self._listeners):
            ready()

    def served(self, ready: Callable[[], None]) -> None:
        """Note whose turn it was: of several models, the one that was served last is told last of the next slot."""
        if len(self._listeners) > 1 and ready in self._listeners:
            self._listeners.remove(ready)
            self._listeners.append(ready)

    def listen(self, ready: Callable[[], None]) -> None:
        """Call `ready` whenever a slot may be free."""
        self._listeners.append(ready)

    def unlisten(self, ready: Callable[[], None]) -> None:
        """Do not call it any more."""
        if ready in self._listeners:
            self._listeners.remove(ready)

    # --- the call ---

    async def call(self, permit: Permit, batch: Batch) -> Answer:
        """Use a slot; it is free, or haunted, afterwards."""
        start = self._clock.now()
        try:
            answer = await self.inner(batch)
        except RateLimited:
            self.limit.overloaded(self._clock.now(), start)
            raise
        except UpstreamTimeout:
            self.limit.overloaded(self._clock.now(), start)
            permit.abandoned_s = self._abandoned_s
            raise
        except (asyncio.CancelledError, DeadlineExceeded) as error:
            spent_s = self._clock.now() - start
            if spent_s > _UNSENT_S or not isinstance(error, DeadlineExceeded):
                permit.abandoned_s = self._rest_s(batch, spent_s)
            raise
        else:
            self._learn(permit, batch, start)
            return answer
        finally:
            permit.release()

    def _rest_s(self, batch: Batch, spent_s: float) -> float:
        """Say how long the server is probably still busy with a call that nobody waits for."""
        if not self._abandoned_s:
            return 0.0
        expected_s = self.latency(batch.spec.model).expected_s(len(batch.inputs))
        return min(self._abandoned_s, max(expected_s - spent_s, 0.0)) if expected_s else self._abandoned_s

    def _learn(self, permit: Permit, batch: Batch, start: float) -> None:
        now = self._clock.now()
        if permit.is_probe:
            self.limit.recovered()
        latency = self._latency.setdefault(batch.spec.model, Latency())
        inflation = latency.took(now, len(batch.inputs), batch.size_bytes, now - start)
        self.limit.succeeded(now, start, inflation=inflation, busy=self.in_use)

    def latency(self, model: str) -> Latency:
        """Return what calls of a model take here, as far as they have shown."""
        return self._latency.get(model) or Latency()

    # --- pipelines ---

    def join(self) -> Upstream:
        """Serve one more pipeline: at a reload the old and the new one share slots, limits, breaker, connections."""
        self._pipelines += 1
        return self

    async def leave(self) -> None:
        """Serve one pipeline less; the last one closes it."""
        self._pipelines -= 1
        if self._pipelines <= 0:
            for ghost in tuple(self._ghosts):
                ghost.cancel()
            await asyncio.gather(*self._ghosts, return_exceptions=True)
            await self.inner.aclose()

    def snapshot(self) -> Snapshot:
        return {
            "calls": self.in_use - self.haunted,
            "haunted_slots": self.haunted,
            "waiting_canaries": len(self._canaries),
            "slots": self.limit.slots,
            "inflation": round(self.limit.inflation, 2),
            "latency": {
                model: {"fixed_ms": round(x.fixed_s * 1e3, 2), "per_input_ms": round(x.per_input_s * 1e3, 3)}
                for model, x in self._latency.items()
            },
        }
