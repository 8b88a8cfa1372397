"""
The upstreams of one model: which of them have shown the right vectors, and which one takes the next call.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from proxy.base.clock import Clock
from proxy.base.errors import BadVectors, CircuitOpen, DeadlineExceeded, EmbeddingError, NoUpstream, UpstreamDenied
from proxy.base.events import CanaryFinished, Observer
from proxy.base.lease import Outlook, Wait
from proxy.base.messages import FLOAT32_BYTES, Answer, Batch, Row, Spec, size_bytes
from proxy.base.settings import ModelSettings
from proxy.base.stage import Snapshot
from proxy.upstream.balance.canary import CANARIES, CANARY_GRACE_S, flaw
from proxy.upstream.balance.line import Line
from proxy.upstream.balance.upstream import Permit, Upstream


@dataclass(slots=True)
class Member:
    """An upstream's standing within one model."""

    upstream: Upstream
    is_verified: bool = False
    problem: str = "its first canary has not come back yet"
    """Why it was refused, or why the last canary failed; empty when all is well."""
    good_at: float | None = None
    """Instant of its last right vector, canary or not."""
    has_answered: bool = False
    """Whether its model is loaded, as far as we know."""


class Model:
    """The upstreams of one model."""

    def __init__(
        self,
        name: str,
        settings: ModelSettings,
        upstreams: Sequence[Upstream],
        *,
        clock: Clock,
        rng: random.Random,
        observe: Observer,
    ) -> None:
        self._name = name
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._observe = observe
        self._members = [Member(upstream) for upstream in upstreams]
        self._is_judged = False
        """Whether an upstream has been verified, or all have been asked."""
        self._listeners: list[Callable[[], None]] = []
        self._retries = Line(self._call, clock=clock)
        self._pipelines = 0
        self.canary: tuple[Row, ...] | None = None
        """The first right vectors of the canary texts, which all later ones are held against: a server whose vectors
        change while it runs serves another space."""

    # --- leases ---

    def take(self, least: float, wish: float) -> Permit | Wait:
        """
        Give a slot of one of the upstreams for a new batch, or say when to ask again.

        Args:
            least, wish: tokens of the smallest batch that makes sense, and of all that waits.

        Raises:
            NoUpstream: none has shown a right vector.
            CircuitOpen, UpstreamDenied: all that have are left alone for now.
        """
        found = self._found(least, wish, frozenset())
        if isinstance(found, Wait):
            return found
        return Wait() if self._retries else self._taken(found)

    def _taken(self, upstream: Upstream) -> Permit:
        upstream.served(self._call)
        return upstream.take(self._clock.now())

    def _found(self, least: float, wish: float, avoid: frozenset[str]) -> Upstream | Wait:
        """Choose an upstream that can take a call now; those to avoid have failed it already, others go first."""
        verified = [member.upstream for member in self._members if member.is_verified]
        if not verified:
            if not self._is_judged:
                return Wait()
            raise NoUpstream(f"no upstream of model {self._name!r} is ready ({self.problem()})", retry_after_s=1.0)
        now = self._clock.now()
        # Asked once: a wait that is over a microsecond later would look like a lack of slots, and nobody would call.
        paces = {upstream: upstream.pace.wait_s(least, wish) for upstream in verified}
        ready = [
            upstream
            for upstream in verified
            if upstream.is_free and upstream.guard.wait_s(now) <= 0 and paces[upstream] <= 0
        ]
        if not ready:
            return self._wait(verified, now, paces)
        return self._least_loaded([u for u in ready if u.name not in avoid] or ready)

    def _least_loaded(self, ready: list[Upstream]) -> Upstream:
        """
        Choose the less loaded of two random ones.

        Source: Mitzenmacher, "The power of two choices in randomized load balancing", 2001.
        """
        two = ready if len(ready) <= 2 else self._rng.sample(ready, 2)
        return min(two, key=lambda upstream: upstream.load)

    def _wait(self, verified: list[Upstream], now: float, paces: dict[Upstream, float]) -> Wait:
        """
        Say when to ask again.

        The cases: (1) all are left alone by their breakers, or do not accept our key: nothing to wait for; (2) one that
        is not lacks nothing but a slot: its owner will call, if no other one is ready earlier; (3) limits or the
        upstreams' own word say when.
        """
        guarded = {u: wait_s for u in verified if (wait_s := u.guard.wait_s(now)) > 0}
        denied = {u: error for u in verified if isinstance(error := u.pace.hold_error, UpstreamDenied)}
        passing = [u for u in verified if u not in guarded and u not in denied]
        if not passing:
            raise _left_alone(guarded, denied)
        paced = {u: paces[u] for u in passing if paces[u] > 0}
        until = now + min((*guarded.values(), *paced.values()), default=math.inf)
        if len(paced) < len(passing):
            return Wait(until if until < math.inf else None)
        soonest = min(paced, key=paced.__getitem__)
        error = soonest.pace.hold_error
        return Wait(until, _later(error, paced[soonest]) if error is not None else None)

    async def lease(self, batch: Batch) -> Permit:
        """
        Wait for a slot: for a further attempt, whose batch is composed already.

        Raises:
            EmbeddingError: nobody can serve the model, or not before the batch's deadline.
        """
        return await self._retries.wait(lambda: self._asked(batch))

    def _asked(self, batch: Batch) -> Permit | Wait:
        if self._clock.now() >= batch.deadline:
            raise DeadlineExceeded("no upstream was free for another attempt before the deadline")
        found = self._found(batch.tokens, batch.tokens, batch.avoid)
        if isinstance(found, Wait):
            until = batch.deadline if found.until is None else min(found.until, batch.deadline)
            if found.error is not None and until == batch.deadline:
                raise found.error
            return Wait(until)
        permit = self._taken(found)
        permit.charge(batch.tokens)
        return permit

    def _call(self) -> None:
        """Something may have changed: who has a call to try again asks first, then who would compose a new one."""
        self._retries.call()
        for ready in tuple(self._listeners):
            ready()

    def listen(self, ready: Callable[[], None]) -> None:
        """Call `ready` whenever asking may have become worth while."""
        self._listeners.append(ready)

    def unlisten(self, ready: Callable[[], None]) -> None:
        """Do not call it any more."""
        if ready in self._listeners:
            self._listeners.remove(ready)

    def open(self) -> None:
        """Serve one more pipeline; with the first one it hears of free slots."""
        self._pipelines += 1
        if self._pipelines == 1:
            for member in self._members:
                member.upstream.listen(self._call)

    def close(self) -> None:
        """Serve one pipeline less; with the last one it hears of nothing any more."""
        self._pipelines -= 1
        if not self._pipelines:
            for member in self._members:
                member.upstream.unlisten(self._call)

    def outlook(self) -> Outlook:
        """Sum up the upstreams that take calls."""
        now = self._clock.now()
        slots = busy = 0
        fixed_s = per_input_s = interval_s = 0.0
        for member in self._members:
            upstream = member.upstream
            if not member.is_verified or upstream.guard.wait_s(now) > 0:
                continue
            slots += upstream.limit.slots
            busy += min(upstream.in_use, upstream.limit.slots)
            interval_s = max(interval_s, upstream.pace.interval_s)
            latency = upstream.latency(self._name)
            fixed_s = max(fixed_s, latency.fixed_s)
            per_input_s = max(per_input_s, latency.per_input_s)
        # Paced: so few calls are allowed that slots are no bottleneck.
        is_paced = interval_s * max(1, slots) > fixed_s > 0 or (interval_s > 0 and not fixed_s)
        return Outlook(slots, busy, fixed_s, per_input_s, is_paced)

    # --- the call ---

    async def __call__(self, batch: Batch) -> Answer:
        """Ask the upstream whose slot the batch has."""
        permit = cast(Permit, batch.lease)
        upstream = permit.owner
        addressed = batch.addressed(
            lease=permit,
            model=self._settings.upstream_model or self._name,
            width=batch.spec.dimensions or self.width,
        )
        try:
            answer = await upstream.call(permit, addressed)
        except EmbeddingError as error:
            error.upstream = upstream.name
            raise
        member = next(member for member in self._members if member.upstream is upstream)
        member.good_at = self._clock.now()
        return answer

    @property
    def width(self) -> int | None:
        """Width of the model's own vectors: what the settings say, else what the first right canary had."""
        return self._settings.dimensions or (len(self.canary[0]) // FLOAT32_BYTES if self.canary else None)

    # --- canaries ---

    @property
    def is_whole(self) -> bool:
        return not any(member.problem for member in self._members)

    def rest_s(self) -> float:
        """Return when the next breaker lets a probe pass; zero where none waits."""
        now = self._clock.now()
        return min((wait_s for m in self._members if (wait_s := m.upstream.guard.wait_s(now)) > 0), default=0.0)

    @property
    def is_guarded(self) -> bool:
        """Whether a breaker waits for a probe, or will."""
        return any(not member.upstream.guard.is_closed for member in self._members)

    async def sing(self, timeout_s: float) -> None:
        """Ask each upstream for the canary texts' vectors, and judge them."""
        songs = {asyncio.create_task(self._sung(member, timeout_s)): member for member in self._members}
        late = list(songs)
        try:
            for song in songs:
                # In their order: the first right one is the reference for the others. One that hangs is not waited for.
                if await self._is_back(song):
                    late.remove(song)
                    self._judge(songs[song], *song.result())
            while late:
                await asyncio.wait(late, return_when=asyncio.FIRST_COMPLETED)
                for song in [song for song in late if song.done()]:
                    late.remove(song)
                    self._judge(songs[song], *song.result())
        finally:
            for song in songs:
                song.cancel()
            await asyncio.gather(*songs, return_exceptions=True)
        self._judged()

    def _judged(self) -> None:
        if not self._is_judged:
            self._is_judged = True
            self._call()

    async def _is_back(self, song: asyncio.Task[tuple[tuple[Row, ...], str, float]]) -> bool:
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout_at(self._clock.now() + CANARY_GRACE_S):
                await asyncio.wait({song})
        return song.done()

    async def _sung(self, member: Member, timeout_s: float) -> tuple[tuple[Row, ...], str, float]:
        """Return an upstream's vectors of the canary texts, or why there are none, and how long it took."""
        start = self._clock.now()
        if not member.has_answered:
            timeout_s = max(timeout_s, member.upstream.first_answer_s)
        rows: tuple[Row, ...] = ()
        problem = ""
        try:
            async with self._clock.timeout_at(start + timeout_s):
                rows = await self._canary_of(member.upstream, start + timeout_s)
        except TimeoutError:
            problem = f"its canary took longer than {timeout_s:.3g} s"
        except EmbeddingError as error:
            problem = error.message
        except Exception as error:  # a defect of ours, but no reason to stop asking
            problem = f"internal error {type(error).__name__}"
        return rows, problem, self._clock.now() - start

    async def _canary_of(self, upstream: Upstream, deadline: float) -> tuple[Row, ...]:
        """Ask for all of them in one call, if it takes so many."""
        rows: tuple[Row, ...] = ()
        step = upstream.limits.max_inputs
        for first in range(0, len(CANARIES), step):
            texts = CANARIES[first : first + step]
            size = sum(map(size_bytes, texts))
            batch = Batch(
                spec=Spec(self._name),
                inputs=texts,
                size_bytes=size,
                deadline=deadline,
                model=self._settings.upstream_model or self._name,
                tokens=size / 4,
            )
            permit = await upstream.lease(batch.tokens, deadline)
            rows += (await upstream.call(permit, replace(batch, lease=permit))).rows
        if len(rows) != len(CANARIES):
            raise BadVectors(f"{len(rows)} vectors came for {len(CANARIES)} canary texts")
        return rows

    def _judge(self, member: Member, rows: tuple[Row, ...], problem: str, seconds: float) -> None:
        before = (member.is_verified, member.problem)
        member.problem = problem
        if rows:
            member.has_answered = True
            member.problem = flaw(rows, self.canary, self._settings.dimensions)
            member.is_verified = not member.problem
            if member.is_verified:
                self.canary, member.good_at = self.canary or rows, self._clock.now()
                self._judged()
        is_change = before != (member.is_verified, member.problem)
        self._observe(CanaryFinished(self._name, member.upstream.name, seconds, member.problem, changed=is_change))
        if is_change:
            self._call()

    # --- looking ---

    def upstreams(self) -> list[Upstream]:
        return [member.upstream for member in self._members]

    def problem(self) -> str:
        """Say why nobody serves it; empty where somebody does."""
        if any(member.is_verified for member in self._members):
            return ""
        return "; ".join(f"{member.upstream.name}: {member.problem}" for member in self._members)

    def snapshot(self) -> Snapshot:
        now = self._clock.now()
        return {
            "dimensions": self.width,
            "waiting_attempts": len(self._retries),
            "upstreams": {
                member.upstream.name: {
                    "is_verified": member.is_verified,
                    "problem": member.problem,
                    "right_vector_age_s": None if member.good_at is None else round(now - member.good_at, 3),
                    **member.upstream.snapshot(),
                }
                for member in self._members
            },
        }


def _left_alone(guarded: dict[Upstream, float], denied: dict[Upstream, UpstreamDenied]) -> EmbeddingError:
    """Say why nobody can be asked: a breaker closes by itself, a key has to be mended."""
    if not guarded:
        return next(iter(denied.values())).own()
    names = ", ".join(upstream.name for upstream in guarded)
    wait_s = min(guarded.values())
    return CircuitOpen(
        f"upstream {names} failed repeatedly and is left alone for another {max(0.1, wait_s):.1f} s",
        retry_after_s=wait_s,
    )


def _later(error: EmbeddingError, wait_s: float) -> EmbeddingError:
    """Return the same error with the wait that is still left."""
    later = error.own()
    later.retry_after_s = wait_s
    return later
