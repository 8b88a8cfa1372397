"""The whole funnel over an upstream that the test plays: whatever comes, everybody gets what is theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base.errors import (
    BadVectors,
    CircuitOpen,
    DeadlineExceeded,
    EmbeddingError,
    Overloaded,
    RateLimited,
    UpstreamFailed,
    UpstreamRefused,
    UpstreamTimeout,
)
from proxy.base.lease import Outlook, Wait
from proxy.base.messages import Answer, Batch, Limits, Priority, Request, Response
from proxy.base.settings import AdmissionSettings, CacheSettings, MicroBatchSettings
from proxy.funnel.admission import Admission
from proxy.funnel.cache import Cache, CacheStore
from proxy.funnel.coalesce import Coalesce
from proxy.funnel.microbatch import MicroBatch
from tests.fakes.clock import HandClock, settle
from tests.fakes.leases import ScriptedLeases
from tests.fakes.stage import Call, ScriptedStage, make_request, rows_of

INNOCENT, GUILTY = "abcdefgh", "PQ"


def refused(index: int) -> EmbeddingError:
    return UpstreamRefused("bad text", status=400)


def refused_by_index(index: int) -> EmbeddingError:
    return UpstreamRefused("bad text", status=422, index=index)


def bad_row(index: int) -> EmbeddingError:
    return BadVectors("not a number", index=index)


def broken(index: int) -> EmbeddingError:
    return UpstreamFailed("HTTP 500", may_be_poison=True)


WORDS: dict[str, Callable[[float], Wait | EmbeddingError | None]] = {
    "lease": lambda now: None,
    "wait": lambda now: Wait(),
    "wait until": lambda now: Wait(now + 0.7),
    "hold": lambda now: Wait(now + 3, RateLimited("later")),
    "open": lambda now: CircuitOpen("open"),
}
TROUBLES = [UpstreamFailed, UpstreamTimeout, RateLimited, DeadlineExceeded]
PLACE = st.integers(0, 9)
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("asks"), st.lists(st.sampled_from(INNOCENT + GUILTY), min_size=1, max_size=7), st.integers(0, 7)
        ),
        st.tuples(st.just("asks"), st.lists(st.sampled_from(INNOCENT), min_size=1, max_size=4), st.integers(0, 7)),
        st.tuples(st.sampled_from(["answers", "answers", "leaves", "turns", "settles"]), PLACE, st.just(0)),
        st.tuples(st.just("troubles"), PLACE, st.integers(0, len(TROUBLES) - 1)),
        st.tuples(st.just("says"), st.sampled_from(list(WORDS)), st.just(0)),
        st.tuples(st.just("slots"), PLACE, st.just(0)),
        st.tuples(st.just("advances"), st.integers(1, 20), st.just(0)),
    ),
    min_size=3,
    max_size=40,
)
CALM = st.lists(
    st.one_of(
        st.tuples(
            st.just("asks"), st.lists(st.sampled_from(INNOCENT + GUILTY), min_size=1, max_size=7), st.integers(0, 7)
        ),
        st.tuples(st.sampled_from(["answers", "answers", "leaves", "turns", "settles", "slots"]), PLACE, st.just(0)),
    ),
    min_size=3,
    max_size=40,
)


class History:
    """Requests that come, leave and are answered in any order, by an upstream that fails on the guilty."""

    def __init__(self, way: Callable[[int], EmbeddingError], slots: int, view: Outlook) -> None:
        self.clock = HandClock()
        self.upstream = ScriptedStage()
        self.leases = ScriptedLeases(slots, Limits(4, 1000), view)
        self.store = CacheStore(1_000_000)
        self.asked: list[tuple[Request, asyncio.Task[Response]]] = []
        self.left: set[asyncio.Task[Response]] = set()
        self.way = way
        microbatch = MicroBatch(
            MicroBatchSettings(),
            self.upstream,
            leases=self.leases,
            may_retry=lambda: True,
            clock=self.clock,
            observe=lambda _: None,
        )
        coalesce = Coalesce(microbatch, observe=lambda _: None)
        cache = Cache(CacheSettings(), coalesce, store=self.store, observe=lambda _: None)
        self.door = Admission(AdmissionSettings(max_inputs=60), cache, drain_s=microbatch.expected_s, clock=self.clock)
        self.stages = {"admission": self.door, "coalesce": coalesce, "microbatch": microbatch}

    @property
    def pending(self) -> list[Call]:
        return [call for call in self.upstream.calls if not call.future.done()]

    @property
    def waiting(self) -> list[asyncio.Task[Response]]:
        return [task for _, task in self.asked if not task.done()]

    async def step(self, verb: str, what: Any, how: int) -> None:
        if verb == "asks":
            self.asks(what, how)
        elif verb == "answers":
            for call in self.pending[what : what + 1]:
                self.answers(call)
        elif verb == "troubles":
            for call in self.pending[what : what + 1]:
                call.fail(TROUBLES[how]("trouble"))
        elif verb == "leaves":
            for task in self.waiting[what : what + 1]:
                task.cancel()
                self.left.add(task)
        elif verb == "turns":
            await settle(what)
        elif verb == "settles":
            await settle()
            self.check()
        elif verb == "slots":
            self.leases.slots = 1 + what % 4
            self.leases.ready()
        elif verb == "says":
            self.leases.say(WORDS[what](self.clock.now()))
        else:
            await self.clock.advance(what / 4)

    def asks(self, texts: list[str], how: int) -> None:
        request = make_request(
            texts,
            now=self.clock.now(),
            caller=str(how % 2),
            priority=Priority.BULK if how & 2 else Priority.INTERACTIVE,
            no_cache=bool(how & 4),
        )
        self.asked.append((request, asyncio.create_task(self.door(request))))

    def answers(self, call: Call) -> None:
        batch: Batch = call.message
        guilty = [index for index, text in enumerate(batch.inputs) if text in GUILTY]
        if guilty:
            call.fail(self.way(guilty[0]))
        else:
            call.answer(Answer(rows_of(batch.inputs), len(batch.inputs), "u"))

    def check(self) -> None:
        """At any time: no more calls than leases, within their limits, and nobody computes what nobody waits for."""
        wanted = {text for request, task in self.asked if not task.done() for text in request.inputs}

        assert len(self.pending) <= self.leases.busy
        assert all(len(call.message.inputs) <= 4 for call in self.pending)
        assert all(wanted.intersection(call.message.inputs) for call in self.pending)

    async def end(self) -> None:
        """Answer whatever still comes, and see that everybody has what is theirs and nothing is left."""
        self.leases.say(None)
        await settle()
        for _ in range(1000):
            if not self.waiting:
                break
            for call in self.pending[:1]:
                self.answers(call)
            await self.clock.advance(0.01)
        await settle()

        assert self.waiting == []
        for request, task in self.asked:
            if task.cancelled():
                assert task in self.left
            elif (error := task.exception()) is not None:
                assert isinstance(error, EmbeddingError)
            else:
                assert task.result().rows == rows_of(request.inputs)
        for text in INNOCENT + GUILTY:
            row = self.store.get(make_request((text,)).keys[0])
            assert row in ((None,) if text in GUILTY else (None, rows_of((text,))[0]))
        self.check()
        self.check_empty()

    def check_empty(self) -> None:
        empty = {"inputs": 0, "tokens": 0, "callers": 0}
        admission = self.door.snapshot()
        assert (admission["inputs"], admission["bytes"]) == (0, 0)
        assert self.stages["coalesce"].snapshot() == {"inputs_in_flight": 0}
        for sender in self.stages["microbatch"].snapshot().values():
            assert sender["lanes"] == {"interactive": empty, "bulk": empty}
            assert sender["inputs_in_flight"] == {"interactive": 0, "bulk": 0}
            assert sender["batches_in_flight"] == 0
        self.leases.check()


WAYS = [refused, refused_by_index, bad_row, broken]
VIEWS = [Outlook(0, 0), Outlook(0, 0, 0.030, 0.001), Outlook(0, 0, is_paced=True)]


@settings(deadline=None, derandomize=True, max_examples=500)
@given(steps=STEPS, way=st.sampled_from(WAYS), slots=st.integers(1, 3), view=st.sampled_from(VIEWS))
async def test_any_history_of_requests(
    steps: list[tuple[str, Any, int]], way: Callable[[int], EmbeddingError], slots: int, view: Outlook
) -> None:
    """Each caller gets exactly its vectors or a clear error, nothing wrong is kept, and nothing is left inside."""
    history = History(way, slots, view)
    for step in steps:
        await history.step(*step)

    await history.end()


@settings(deadline=None, derandomize=True, max_examples=300)
@given(steps=CALM, way=st.sampled_from([refused, refused_by_index]), slots=st.integers(1, 3))
async def test_any_history_with_bad_texts_only(
    steps: list[tuple[str, Any, int]], way: Callable[[int], EmbeddingError], slots: int
) -> None:
    """Where nothing is wrong but some texts, exactly the requests that have one fail, and their error names it."""
    history = History(way, slots, VIEWS[0])
    for step in steps:
        await history.step(*step)
    await history.end()

    for request, task in history.asked:
        if task.cancelled() or isinstance(task.exception(), Overloaded):
            continue
        guilty = set(GUILTY).intersection(request.inputs)
        assert (task.exception() is not None) == bool(guilty)
        if guilty:
            assert task.exception().key in make_request(tuple(guilty)).keys


@pytest.mark.parametrize("turns", range(16))
@pytest.mark.parametrize("leaving", ["leader", "follower", "both"])
async def test_callers_of_one_text_leave_after_any_number_of_turns(leaving: str, turns: int) -> None:
    """Through all stages: whoever leaves, the other one has its rows; when both have left, the call is cancelled."""
    history = History(refused, 1, VIEWS[0])
    for texts in (["a", "b"], ["b", "c"]):
        history.asks(texts, 0)
    tasks = dict(zip(("leader", "follower"), history.waiting, strict=True))
    await settle(turns)
    for name in ("leader", "follower"):
        if leaving in (name, "both"):
            tasks[name].cancel()
            history.left.add(tasks[name])
    await settle()
    pending = len(history.pending)
    await history.end()

    assert leaving != "both" or pending == 0
    for name, task in tasks.items():
        assert task.cancelled() is (leaving in (name, "both"))
