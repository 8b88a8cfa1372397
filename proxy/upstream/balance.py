"""
Who computes: the choice among the upstreams of a model, and the slots of each.

Only upstreams that have shown a right vector take part. Each embeds a canary text, at the start and from time to time;
its vector has to have the model's width and to lie where the first one lay, from whichever upstream of the model that
came. Two servers that merely answer to the same name are not the same space, nor is one whose model was exchanged; and
a wrong vector is worse than none.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy

from proxy.base.clock import Clock
from proxy.base.errors import CircuitOpen, EmbeddingError, NoUpstream
from proxy.base.events import CanaryFinished, Observer
from proxy.base.messages import FLOAT32_BYTES, Answer, Batch, Row, Spec
from proxy.base.settings import ModelSettings
from proxy.base.stage import Snapshot, Stage

CANARY = "The quick brown fox jumps over the lazy dog."
"""A sentence that every tokenizer knows, short enough to cost nothing."""

CANARY_GRACE_S = 2.0
"""How long the canaries of later upstreams wait for that of an earlier one."""

LEAST_COSINE = 0.999
"""Batch size and float width move a vector by 1e-4 at the most; another model moves it by tenths."""


class Upstream:
    """One server and its slots; models share it."""

    def __init__(
        self, name: str, inner: Stage[Batch, Answer], *, slots: int, refuses_s: Callable[[float], float]
    ) -> None:
        """
        Args:
            name: the upstream's name.
            inner: bucket, circuit and what follows, for this upstream.
            slots: concurrent calls.
            refuses_s: how long from an instant on its breaker will refuse calls; zero when it passes them.
        """
        self.name = name
        self.inner = inner
        self.slots = slots
        self.refuses_s = refuses_s
        self.asked = 0
        """Calls that hold a slot or wait for one."""
        self._pipelines = 0
        self._free = asyncio.Semaphore(slots)

    async def call(self, batch: Batch, clock: Clock) -> Answer:
        """Wait for a slot, first come first served, and use it."""
        start = clock.now()
        self.asked += 1
        try:
            async with self._free:
                answer = await self.inner(batch)
                return replace(answer, queue_s=clock.now() - start - answer.upstream_s)
        finally:
            self.asked -= 1

    def join(self) -> Upstream:
        """Serve one more pipeline: at a reload the old and the new one share slots, limits, breaker, connections."""
        self._pipelines += 1
        return self

    async def leave(self) -> None:
        """Serve one pipeline less; the last one closes it."""
        self._pipelines -= 1
        if self._pipelines <= 0:
            await self.inner.aclose()

    @property
    def load(self) -> float:
        return self.asked / self.slots


@dataclass(slots=True)
class Member:
    """An upstream's standing within one model."""

    upstream: Upstream
    is_verified: bool = False
    problem: str = "its first canary has not come back yet"
    """Why it was refused, or why the last canary failed; empty when all is well."""
    good_at: float | None = None
    """Instant of its last right vector, canary or not."""


def flaw(canary: Row, reference: Row | None, width: int) -> str:
    """
    Say what is wrong with a canary's vector; empty when nothing is.

    Args:
        canary: the vector that came.
        reference: the first right one, if there was any.
        width: what the settings say; 0 when they leave it open.
    """
    found = len(canary) // FLOAT32_BYTES
    wanted = width or (len(reference) // FLOAT32_BYTES if reference else found)
    if found != wanted:
        return f"its vectors have {found} numbers, the model's have {wanted}"
    if reference is not None:
        # in double precision: squares of large float32 numbers leave float32
        ours, theirs = (numpy.frombuffer(row, "<f4").astype("f8") for row in (canary, reference))
        cosine = float(ours @ theirs / (numpy.linalg.norm(ours) * numpy.linalg.norm(theirs)))
        if cosine < LEAST_COSINE:
            return f"its vectors lie elsewhere: cosine {cosine:.4f} to the model's first canary, {LEAST_COSINE} is due"
    return ""


class Balance:
    """Sends each batch to an upstream of its model."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models

    async def __call__(self, batch: Batch) -> Answer:
        """
        Raises:
            NoUpstream: none has shown a right vector.
            CircuitOpen: all that have are left alone for now.
        """
        return await self._models[batch.spec.model](batch)

    async def sing(self, model: str, deadline: float) -> None:
        """Ask each upstream of a model for the canary's vector; what comes of it is in `problems()`."""
        await self._models[model].sing(deadline)

    def is_whole(self, model: str) -> bool:
        """Whether the last canary of every upstream of a model was right."""
        return self._models[model].is_whole

    def canaries(self) -> dict[str, Row]:
        """Return by model the vector that stands for its space."""
        return {name: model.canary for name, model in self._models.items() if model.canary is not None}

    def widths(self) -> dict[str, int]:
        """Return by model the width of its vectors, where it is known."""
        return {name: model.width for name, model in self._models.items() if model.width is not None}

    def problems(self) -> dict[str, str]:
        """Say by model why it cannot be served; empty where at least one upstream can."""
        return {name: model.problem() for name, model in self._models.items()}

    def snapshot(self) -> Snapshot:
        return {name: model.snapshot() for name, model in self._models.items()}

    async def aclose(self) -> None:
        """Close the upstreams, each once, but for those that another pipeline goes on with."""
        for upstream in {u.name: u for model in self._models.values() for u in model.upstreams()}.values():
            await upstream.leave()


class Model:
    """The upstreams of one model."""

    def __init__(
        self, name: str, settings: ModelSettings, upstreams: Sequence[Upstream], *, clock: Clock, observe: Observer
    ) -> None:
        self._name = name
        self._settings = settings
        self._clock = clock
        self._observe = observe
        self._members = [Member(upstream) for upstream in upstreams]
        self._first_round = asyncio.Event()
        """Set when an upstream has been verified, or all have been asked."""
        self.canary: Row | None = None
        """The first right vector of the canary, which all later ones are held against: a server whose vectors change
        while it runs serves another space."""

    async def __call__(self, batch: Batch) -> Answer:
        if not self._first_round.is_set():
            await self._first_round.wait()
        width = batch.spec.dimensions or self.width
        addressed = replace(batch, model=self._settings.upstream_model or self._name, width=width)
        while True:
            member = self._chosen(self._clock.now(), batch.avoid)
            try:
                answer = await member.upstream.call(addressed, self._clock)
            except CircuitOpen:
                # It opened while the batch waited for a slot there. Another may pass; if none does, _chosen() says so.
                continue
            except EmbeddingError as error:
                error.upstream = member.upstream.name
                raise
            member.good_at = self._clock.now()
            return answer

    def _chosen(self, now: float, avoid: frozenset[str]) -> Member:
        verified = [member for member in self._members if member.is_verified]
        if not verified:
            problems = "; ".join(f"{m.upstream.name}: {m.problem}" for m in self._members)
            raise NoUpstream(f"no upstream of model {self._name!r} is ready ({problems})", retry_after_s=1.0)
        waits = [member.upstream.refuses_s(now) for member in verified]
        passing = [member for member, wait in zip(verified, waits, strict=True) if wait <= 0]
        if not passing:
            names = ", ".join(member.upstream.name for member in verified)
            raise CircuitOpen(
                f"upstream {names} failed repeatedly and is left alone for another {max(0.1, min(waits)):.1f} s",
                retry_after_s=min(waits),
            )
        return min(passing, key=lambda member: (member.upstream.name in avoid, member.upstream.load))

    @property
    def width(self) -> int | None:
        """Width of the model's own vectors: what the settings say, else what the first right canary had."""
        return self._settings.dimensions or (len(self.canary) // FLOAT32_BYTES if self.canary else None)

    # --- canaries ---

    @property
    def is_whole(self) -> bool:
        return not any(member.problem for member in self._members)

    async def sing(self, deadline: float) -> None:
        songs = [asyncio.create_task(self._sung(member.upstream, deadline)) for member in self._members]
        try:
            late = []
            for member, song in zip(self._members, songs, strict=True):
                # In their order: the first right one is the reference for the others. One that hangs is not waited for.
                if await self._is_back(song):
                    self._judge(member, *song.result())
                else:
                    late.append((member, song))
            for member, song in late:
                self._judge(member, *await song)
        finally:
            for song in songs:
                song.cancel()
            await asyncio.gather(*songs, return_exceptions=True)
        self._first_round.set()

    async def _is_back(self, song: asyncio.Task[tuple[Row | None, str, float]]) -> bool:
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout_at(self._clock.now() + CANARY_GRACE_S):
                await asyncio.wait({song})
        return song.done()

    async def _sung(self, upstream: Upstream, deadline: float) -> tuple[Row | None, str, float]:
        """Return an upstream's vector of the canary, or why there is none, and how long it took."""
        start = self._clock.now()
        batch = Batch(
            spec=Spec(self._name),
            inputs=(CANARY,),
            size_bytes=len(CANARY),
            deadline=deadline,
            model=self._settings.upstream_model or self._name,
        )
        row, problem = None, ""
        try:
            async with self._clock.timeout_at(deadline):
                row = (await upstream.call(batch, self._clock)).rows[0]
        except TimeoutError:
            problem = f"its canary took longer than {deadline - start:.3g} s"
        except EmbeddingError as error:
            problem = error.message
        except Exception as error:  # a defect of ours, but no reason to stop asking
            problem = f"internal error {type(error).__name__}"
        return row, problem, self._clock.now() - start

    def _judge(self, member: Member, row: Row | None, problem: str, seconds: float) -> None:
        before = (member.is_verified, member.problem)
        member.problem = problem
        if row is not None:
            member.problem = flaw(row, self.canary, self._settings.dimensions)
            member.is_verified = not member.problem
            if member.is_verified:
                self.canary, member.good_at = self.canary or row, self._clock.now()
                self._first_round.set()
        is_change = before != (member.is_verified, member.problem)
        self._observe(CanaryFinished(self._name, member.upstream.name, seconds, member.problem, changed=is_change))

    def upstreams(self) -> list[Upstream]:
        return [member.upstream for member in self._members]

    def problem(self) -> str:
        if any(member.is_verified for member in self._members):
            return ""
        return "; ".join(f"{member.upstream.name}: {member.problem}" for member in self._members)

    def snapshot(self) -> Snapshot:
        now = self._clock.now()
        return {
            "dimensions": self.width,
            "upstreams": {
                member.upstream.name: {
                    "is_verified": member.is_verified,
                    "problem": member.problem,
                    "right_vector_age_s": None if member.good_at is None else round(now - member.good_at, 3),
                    "calls": member.upstream.asked,
                    "slots": member.upstream.slots,
                }
                for member in self._members
            },
        }
