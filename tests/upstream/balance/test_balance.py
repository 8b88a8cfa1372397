"""The models side by side, what pipelines share, and all of the upstream room under a random load."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base import errors
from proxy.base.lease import Wait
from proxy.base.messages import Answer, Batch, Spec
from proxy.base.settings import AttemptSettings, BucketSettings, CircuitSettings, ModelSettings
from proxy.upstream.attempt import Attempt
from proxy.upstream.balance import Balance
from proxy.upstream.balance.canary import CANARIES
from proxy.upstream.balance.limit import Limit
from proxy.upstream.balance.model import Model
from proxy.upstream.balance.upstream import Permit, Upstream
from proxy.upstream.bucket import Bucket
from proxy.upstream.circuit import Circuit
from tests.fakes.balance import ROOMY, Play, answer
from tests.fakes.clock import HandClock, settle
from tests.fakes.stage import make_batch, rows_of

# --- what it passes on ---


async def test_leases_of_a_model() -> None:
    """Leases, for new batches and for further attempts, are those of the batch's model."""
    play = Play("a", slots=2)
    await play.sing()
    first = play.balance.take("m", least=1.0, wish=2.0)
    second = await play.balance.lease(play.batch())
    outlook = play.balance.outlook("m")

    assert isinstance(first, Permit)
    assert (first.upstream, second.upstream) == ("a", "a")
    assert (outlook.slots, outlook.busy) == (2, 2)
    assert play.balance.take("m", least=1.0, wish=1.0) == Wait()


async def test_call() -> None:
    """A batch goes to the upstream whose lease it has."""
    play = Play("a", "b")
    await play.sing()
    task = play.called(play["b"].take(play.clock.now()))
    await settle()
    play["b"].calls[0].answer(answer())

    assert (await task).rows == rows_of(["a text"])


async def test_what_canaries_have_shown() -> None:
    """By model: what is wrong, which vector stands for it, how wide it is, and when a breaker wants a probe."""
    play = Play("a", "b")
    before = (play.balance.problems(), play.balance.canaries(), play.balance.widths(), play.balance.is_whole("m"))
    await play.sing()
    after = (play.balance.problems(), play.balance.canaries(), play.balance.widths(), play.balance.is_whole("m"))
    play["b"].hand_guard.open(5.0)

    assert before == ({"m": "; ".join(f"{n}: its first canary has not come back yet" for n in "ab")}, {}, {}, False)
    assert after == ({"m": ""}, {"m": rows_of(CANARIES)}, {"m": 8}, True)
    assert not play.balance.is_whole("m")
    assert play.balance.rest_s("m") == 5.0


# --- several models ---


async def test_each_model_has_its_own_proof() -> None:
    """An upstream that serves one model rightly is unproven for another."""
    play = Play("a")
    play.balance = Balance({"m": play.model, "n": play.another("n")})
    await play.sing()

    assert play.balance.problems() == {"m": "", "n": "a: its first canary has not come back yet"}
    assert play.balance.snapshot().keys() == {"m", "n"}


async def test_models_take_turns_at_a_slot() -> None:
    """Two models that both have always something waiting share the one slot of their upstream evenly."""
    play = Play("a", slots=1)
    play.balance = balance = Balance({"m": play.model, "n": play.another("n")})
    await play.sing()
    await play.sing(model="n")
    served: list[str] = []

    def ready(model: str) -> Any:
        def look() -> None:
            if isinstance(permit := balance.take(model, least=1.0, wish=1.0), Permit):
                served.append(model)
                permits.append(permit)

        return lambda: asyncio.get_running_loop().call_soon(look)

    permits = [play.take()]
    for model in "mn":
        balance.listen(model, ready(model))
    for _ in range(20):
        permits.pop().release()
        await settle()

    assert Counter(served) == {"m": 10, "n": 10}


# --- pipelines ---


async def test_close() -> None:
    """Closing closes each upstream once, however many models share it, and leaves no listeners."""
    play = Play("a", "b")
    balance = Balance({"m": play.another("m"), "n": play.another("n")})
    balance.listen("m", lambda: None)
    for upstream in play.upstreams.values():
        upstream.join()
    await balance.aclose()

    assert [upstream.scripted.closings for upstream in play.upstreams.values()] == [1, 1]
    assert all(upstream._listeners == [play.model._call] for upstream in play.upstreams.values())


async def test_reload() -> None:
    """A model and its upstream that two pipelines share go on with the later one, whose sender is still told."""
    play = Play("a")
    told: list[str] = []
    old = Balance({"m": (model := play.another("m"))})
    play["a"].join()
    old.listen("m", lambda: told.append("old"))
    following = Balance({"m": model})
    play["a"].join()
    following.listen("m", lambda: told.append("new"))
    await old.aclose()
    play["a"].tell()
    closed_by_the_first = play["a"].scripted.closings
    await following.aclose()
    play["a"].tell()

    assert told == ["new"]
    assert closed_by_the_first == 0
    assert play["a"].scripted.closings == 1
    assert model._listeners == []
    assert play["a"]._listeners == [play.model._call]


async def test_reload_that_was_refused() -> None:
    """A pipeline that never came into force takes nothing with it."""
    play = Play("a")
    told: list[str] = []
    play["a"].join()
    play.balance.listen("m", lambda: told.append("old"))
    refused = Balance({"m": play.model})
    play["a"].join()
    refused.listen("m", lambda: told.append("refused"))
    await refused.aclose()
    play["a"].tell()

    assert told == ["old"]
    assert play["a"].scripted.closings == 0


# --- a random load ---


class Server:
    """Answers when the test says so; counts who is inside, and notes by how many it was exceeded."""

    def __init__(self) -> None:
        self.inside: list[tuple[Batch, asyncio.Future[Answer]]] = []
        self.most = 0
        self.is_well = False

    async def __call__(self, batch: Batch) -> Answer:
        if self.is_well:
            return self.answer(batch)
        one = (batch, asyncio.get_running_loop().create_future())
        self.inside.append(one)
        self.most = max(self.most, len(self.inside))
        try:
            return await one[1]
        finally:
            self.inside.remove(one)

    @staticmethod
    def answer(batch: Batch) -> Answer:
        return Answer(rows_of(batch.inputs), len(batch.inputs), "")

    def snapshot(self) -> dict[str, Any]:
        return {}

    async def aclose(self) -> None: ...


class Counted(Upstream):
    """Sees that nobody gets a slot that is not there."""

    def take(self, now: float) -> Permit:
        assert self.in_use < self.limit.slots
        assert self.guard.wait_s(now) <= 0
        return super().take(now)


SLOTS = {"a": 3, "b": 1}


class Load:
    """The whole room, two models on two upstreams, and senders that behave as the funnel's do."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = HandClock()
        self.servers = {name: Server() for name in SLOTS}
        self.upstreams = {name: self._made(name) for name in SLOTS}
        self.balance = Balance(
            {
                "m": self._model("m", "ab"),
                "n": self._model("n", "a"),
            }
        )
        self.attempt = Attempt(
            AttemptSettings(max_attempts=4, backoff_base_s=0.2, retry_ratio=1.0),
            self.balance,
            lease=self.balance.lease,
            clock=self.clock,
            rng=self.rng,
        )
        self.ready = {model: asyncio.Event() for model in "mn"}
        for model, event in self.ready.items():
            self.balance.listen(model, event.set)
        self.tasks: list[asyncio.Task[Any]] = []

    def _made(self, name: str) -> Upstream:
        circuit = Circuit(
            name, CircuitSettings(3, 5.0, 20.0), self.servers[name], clock=self.clock, observe=lambda _: None
        )
        bucket = Bucket(name, BucketSettings(600 if name == "a" else 0, 5000), circuit, clock=self.clock)
        return Counted(
            name,
            bucket,
            limits=ROOMY,
            limit=Limit(1, SLOTS[name], SLOTS[name]),
            pace=bucket,
            guard=circuit,
            abandoned_s=3.0 if name == "b" else 0.0,
            first_answer_s=0.0,
            clock=self.clock,
        ).join()

    def _model(self, name: str, upstreams: str) -> Model:
        chosen = [self.upstreams[u] for u in upstreams]
        model_settings = ModelSettings(upstreams=tuple(upstreams))
        return Model(name, model_settings, chosen, clock=self.clock, rng=self.rng, observe=lambda _: None)

    async def sent(self, model: str, text: str, tokens: float, deadline: float) -> Answer:
        """Wait for a lease and send a batch with it, until its deadline."""
        async with self.clock.timeout_at(deadline):
            while isinstance(lease := self.balance.take(model, least=tokens, wish=tokens), Wait):
                event = self.ready[model]
                event.clear()
                try:
                    async with self.clock.timeout_at(min(deadline, lease.until or deadline)):
                        await event.wait()
                except TimeoutError:
                    if self.clock.now() >= deadline:
                        raise
            try:
                lease.charge(tokens)
                batch = make_batch(
                    [text], lease=lease, tokens=tokens, deadline=deadline, spec=Spec(model), now=self.clock.now()
                )
                return await self.attempt(batch)
            finally:
                lease.release()

    async def proven(self) -> None:
        """Let the canaries of all models come back."""
        songs = [asyncio.create_task(self.balance.sing(model, 20.0)) for model in "mn"]
        await self.clock.advance(20.0)
        await asyncio.gather(*songs)

    def start(self, *, patience_s: float) -> None:
        text = f"text {len(self.tasks)}"
        tokens = self.rng.choice([1.0, 10.0, 400.0, 2000.0])
        deadline = self.clock.now() + patience_s
        self.tasks.append(asyncio.create_task(self.sent(self.rng.choice("mmn"), text, tokens, deadline)))

    async def step(self) -> None:
        """Let something happen."""
        rng = self.rng
        kind = rng.choice(["send"] * 5 + ["end"] * 6 + ["leave", "sing", "time", "time"])
        inside = [(server, one) for server in self.servers.values() for one in server.inside if not one[1].done()]
        if kind == "send":
            for _ in range(rng.randint(1, 4)):
                self.start(patience_s=rng.choice([2.0, 10.0, 60.0]))
        elif kind == "end" and inside:
            server, (batch, future) = rng.choice(inside)
            end = self._end(server, batch)
            future.set_result(end) if isinstance(end, Answer) else future.set_exception(end)
        elif kind == "leave" and self.tasks:
            rng.choice(self.tasks).cancel()
        elif kind == "sing":
            self.tasks.append(asyncio.create_task(self.balance.sing(rng.choice("mn"), rng.choice([1.0, 20.0]))))
        elif kind == "time":
            await self.clock.advance(rng.choice([0.1, 1.0, 6.0]))
        await settle(rng.choice([0, 1, 3, 20]))
        self.check()

    def _end(self, server: Server, batch: Batch) -> Answer | errors.EmbeddingError:
        rng = self.rng
        if batch.inputs == CANARIES and rng.random() < 0.8:
            return Server.answer(batch)
        ends: list[Any] = [Server.answer(batch)] * 8
        ends += [errors.UpstreamFailed("it broke"), errors.UpstreamTimeout("slow"), errors.BadVectors("nonsense")] * 2
        ends += [errors.RateLimited("later"), errors.RateLimited("later", retry_after_s=rng.choice([0.5, 8.0]))]
        ends += [errors.UpstreamDenied("no"), errors.UpstreamRefused("no", status=400)]
        ends += [errors.DeadlineExceeded("late")]
        return rng.choice(ends)  # type: ignore[no-any-return]

    def check(self) -> None:
        for name, server in self.servers.items():
            upstream = self.upstreams[name]
            assert server.most <= SLOTS[name]
            assert len(server.inside) + upstream.haunted <= upstream.in_use
            assert 1 <= upstream.limit.slots <= SLOTS[name]

    async def end(self) -> None:
        """From now on all is well: everybody is answered or told why not, and all slots are free."""
        for server in self.servers.values():
            server.is_well = True
            for batch, future in server.inside:
                if not future.done():
                    future.set_result(Server.answer(batch))
        for _ in range(30):
            await self.clock.advance(5.0)
        assert all(task.done() for task in self.tasks)
        for task in self.tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                assert isinstance(error, errors.EmbeddingError | TimeoutError), error
        await self.proven()
        self.check()
        assert {u.name: (u.in_use, u.haunted) for u in self.upstreams.values()} == {"a": (0, 0), "b": (0, 0)}
        assert self.balance.problems() == {"m": "", "n": ""}
        waiting = [self.balance.snapshot()[model]["waiting_attempts"] for model in "mn"]
        assert waiting == [0, 0]
        for _ in range(2):
            self.start(patience_s=60.0)
        await self.clock.advance(30.0)
        assert [type(task.result()) for task in self.tasks[-2:]] == [Answer, Answer]


async def loaded(seed: int, steps: int) -> None:
    load = Load(seed)
    for server in load.servers.values():
        server.is_well = True
    await load.proven()
    for server in load.servers.values():
        server.is_well = False
    for _ in range(steps):
        await load.step()
    await load.end()
    await load.balance.aclose()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 80))
def test_slots_under_any_load(seed: int, steps: int) -> None:
    """
    Whatever mix of batches, retries, canaries, errors and cancellations: no upstream has more calls than slots.

    And when all is well again, nobody is stuck, no slot is lost, and calls are answered.
    """
    asyncio.run(loaded(seed, steps))


@pytest.mark.parametrize("seed", range(5))
async def test_slots_under_a_long_load(seed: int) -> None:
    """The same for longer."""
    await loaded(seed, 400)
