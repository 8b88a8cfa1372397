"""The journey is put together in its order, of the right parts, and taken apart again."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from proxy.base.clock import MonotonicClock
from proxy.base.errors import EmbeddingError, NoUpstream
from proxy.base.events import Event
from proxy.base.messages import Response, Spec
from proxy.base.settings import LifecycleSettings, ModelSettings, RequestSettings, Settings
from proxy.funnel.cache import CacheStore
from proxy.wiring import config
from proxy.wiring.pipeline import ROUTE, Pipeline, build
from tests.fakes.clock import HandClock, settle
from tests.fakes.stage import ScriptedStage, make_batch, make_request
from tests.fakes.upstream import FakeUpstream, Fault, vector

STAGES = [
    "admission",
    "cache",
    "coalesce",
    "microbatch",
    "attempt",
    "balance",
    "bucket",
    "circuit",
    "transport",
]

NO_STAGES: dict[str, Any] = {"cache": None}


class Built:
    """A pipeline of real settings, and what it was built with."""

    def __init__(self, toml: str, folder: Path, environ: dict[str, str] | None = None) -> None:
        self.path = path = folder / "settings.toml"
        path.write_text(toml, encoding="utf-8")
        loaded = config.load(str(path) if toml else None, environ or {})
        self.clock = MonotonicClock()
        self.facts: list[Event] = []
        self.store = CacheStore(loaded.settings.cache.max_bytes)
        self.pipeline = build(
            loaded.settings,
            loaded.api_keys,
            clock=self.clock,
            rng=random.Random(1),
            observe=self.facts.append,
            store=self.store,
        )

    async def embed(self, texts: list[str], model: str, **changes: Any) -> Response:
        return await self.pipeline(make_request(texts, now=self.clock.now(), spec=Spec(model), **changes))


@contextlib.asynccontextmanager
async def built(toml: str, folder: Path, environ: dict[str, str] | None = None) -> AsyncIterator[Built]:
    it = Built(toml, folder, environ)
    try:
        yield it
    finally:
        await it.pipeline.aclose()


def upstream_toml(name: str, base_url: str, **more: object) -> str:
    lines = [f"{key} = {orjson.dumps(value).decode()}" for key, value in more.items()]
    return "\n".join([f"[upstreams.{name}]", 'kind = "openai"', f'base_url = "{base_url}"', *lines, ""])


# --- what it is made of ---


async def test_embedded_model(tmp_path: Path) -> None:
    """A builtin upstream answers without a network; more inputs than its batch holds go in several."""
    async with built("", tmp_path) as it:
        problems = await it.pipeline.prove()
        response = await it.embed([f"text {n}" for n in range(65)], "wordllama")
        snapshot = it.pipeline.snapshot()

    assert problems == {"wordllama": ""}
    assert [len(row) for row in response.rows] == [256 * 4] * 65
    assert response.upstream == "builtin"
    assert snapshot["microbatch"]["wordllama"]["batches"] >= 2
    assert snapshot["transport"] == {"builtin": {"is_loaded": True}}
    assert snapshot["balance"]["wordllama"]["upstreams"]["builtin"]["slots"] == 2


async def test_server_that_speaks_openai(tmp_path: Path) -> None:
    """An openai upstream is spoken to with its key, its headers and the model's name there."""
    async with FakeUpstream() as fake:
        toml = upstream_toml("u", fake.base_url, api_key_env="MY_KEY") + (
            'headers = {X-Team = "red"}\n[models.m]\nupstreams = ["u"]\nupstream_model = "theirs"\n'
        )
        async with built(toml, tmp_path, {"MY_KEY": "k"}) as it:
            await it.pipeline.prove()
            response = await it.embed(["a"], "m")

    assert response.rows == (vector("a", 8).tobytes(),)
    assert fake.seen[0].headers["Authorization"] == "Bearer k"
    assert fake.seen[0].headers["X-Team"] == "red"
    assert fake.seen[0].body["model"] == "theirs"


@pytest.mark.parametrize(
    ("profile", "more", "expected"),
    [
        ("llamacpp", "", (2, 4.0, 1)),
        ("llamacpp", "[upstreams.u.balance]\nstart_slots = 2\n", (2, 4.0, 2)),
        ("openai", "", (16, 30.0, 16)),
        ("openai", "[upstreams.u.balance]\nslots = 3\n[upstreams.u.transport]\nkeepalive_s = 7\n", (3, 7.0, 3)),
        ("openai", "[upstreams.u.balance]\nslots = 8\nstart_slots = 2\n", (8, 30.0, 2)),
    ],
)
async def test_slots_and_keep_alive(profile: str, more: str, expected: tuple[Any, ...], tmp_path: Path) -> None:
    """Slots, to begin with and at the most, and keep-alive are the profile's unless the settings say otherwise."""
    toml = upstream_toml("u", "http://127.0.0.1:1/v1", profile=profile) + more + '[models.m]\nupstreams = ["u"]\n'
    async with built(toml, tmp_path) as it:
        transport = it.pipeline.snapshot()["transport"]["u"]
        slots = it.pipeline.models()["m"]["upstreams"]["u"]["slots"]

    assert (transport["slots"], transport["keepalive_s"], slots) == expected


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        (("max_inputs = 3", "max_inputs = 5"), (3, 5)),
        (("max_inputs = 5", "max_inputs = 3"), (5, 3)),
        (("max_inputs = 5", "max_bytes = 4"), (5, 2)),
        (("", "max_inputs = 6"), (50, 6)),
    ],
)
async def test_limits_of_several_upstreams(limits: tuple[str, str], most: tuple[int, int], tmp_path: Path) -> None:
    """A batch is composed for the upstream that takes it, so each upstream's own limits count, each on its own."""
    async with FakeUpstream() as first, FakeUpstream() as second:
        toml = "".join(
            upstream_toml(name, fake.base_url)
            + f"[upstreams.{name}.batch]\n{limit}\n[upstreams.{name}.balance]\nslots = 1\n"
            for name, fake, limit in zip("ab", (first, second), limits, strict=True)
        )
        async with built(f'{toml}[models.m]\nupstreams = ["a", "b"]\n', tmp_path) as it:
            await it.pipeline.prove()
            texts = [f"t{n}" for n in range(10, 60)]
            response = await it.embed(texts, "m")

    seen = [[len(one.inputs) for one in fake.seen] for fake in (first, second)]
    assert response.rows == tuple(vector(text, 8).tobytes() for text in texts)
    assert sum(map(sum, seen)) == 50
    assert all(sizes and max(sizes) <= bound for sizes, bound in zip(seen, most, strict=True))


async def test_limits_of_a_profile(tmp_path: Path) -> None:
    """Where the settings are silent the profile's limits count: llama.cpp takes 32 inputs."""
    async with FakeUpstream() as fake:
        toml = upstream_toml("u", fake.base_url, profile="llamacpp") + '[models.m]\nupstreams = ["u"]\n'
        async with built(toml, tmp_path) as it:
            await it.pipeline.prove()
            await it.embed([f"t{n}" for n in range(100)], "m")

    assert max(len(seen.inputs) for seen in fake.seen) == 32
    assert sum(len(seen.inputs) for seen in fake.seen) == 100


async def test_limits_of_each_model(tmp_path: Path) -> None:
    """A model's limits are those of its own upstreams."""
    async with FakeUpstream() as fake:
        toml = (
            upstream_toml("a", fake.base_url)
            + "[upstreams.a.batch]\nmax_inputs = 1\n"
            + upstream_toml("b", fake.base_url)
            + '[models.small]\nupstreams = ["a"]\n[models.large]\nupstreams = ["b"]\n'
        )
        async with built(toml, tmp_path) as it:
            await it.pipeline.prove()
            await it.embed(["t1", "t2"], "small")
            await it.embed(["t1", "t2"], "large", no_cache=True)

    assert [len(seen.inputs) for seen in fake.seen] == [1, 1, 2]


async def test_two_models_on_one_upstream(tmp_path: Path) -> None:
    """Models share an upstream, its slots and its breaker: it is built once."""
    toml = upstream_toml("u", "http://127.0.0.1:1/v1") + "".join(
        f'[models.{name}]\nupstreams = ["u"]\n' for name in "ab"
    )
    async with built(toml, tmp_path) as it:
        problems = await it.pipeline.prove()
        snapshot = it.pipeline.snapshot()

    assert list(problems) == ["a", "b"]
    assert all(problem.startswith("u: ") for problem in problems.values())
    assert list(snapshot["circuit"]) == ["u"]
    assert snapshot["circuit"]["u"]["failures"] == 2


async def test_settings_of_the_pipeline(tmp_path: Path) -> None:
    """A pipeline carries the settings that the edge needs, and the models by all their names."""
    toml = upstream_toml("u", "http://127.0.0.1:1/v1") + (
        '[models.a]\nupstreams = ["u"]\n[models.b]\nupstreams = ["u"]\naliases = ["c"]\n'
        '[request]\ndefault_model = "b"\nmax_inputs = 7\n[listen]\nallowed_uids = [5]\n'
    )
    async with built(toml, tmp_path) as it:
        pipeline = it.pipeline

    assert pipeline.catalogue.resolve(None)[0] == "b"
    assert pipeline.catalogue.resolve("c")[0] == "b"
    assert pipeline.request.max_inputs == 7
    assert pipeline.listen.allowed_uids == (5,)
    assert pipeline.callers == {}


async def test_what_a_reload_takes_over(tmp_path: Path) -> None:
    """The next pipeline has the same vectors, and the very upstreams whose settings have not changed."""
    async with FakeUpstream() as fake:
        async with built(fake.toml(), tmp_path) as it:
            await it.pipeline.prove()
            await it.embed(["a"], "m")
            (tmp_path / "settings.toml").write_text(fake.toml() + upstream_toml("other", fake.base_url))
            loaded = config.load(str(tmp_path / "settings.toml"), {})
            arguments: dict[str, Any] = {"clock": it.clock, "rng": random.Random(1), "observe": it.facts.append}
            next_one = build(loaded.settings, {}, store=it.store, old=it.pipeline, **arguments)
            changed = build(loaded.settings, {"fake": "another key"}, store=it.store, old=it.pipeline, **arguments)
            kept = next_one.built["fake"].upstream is it.pipeline.built["fake"].upstream
            renewed = changed.built["fake"].upstream is not it.pipeline.built["fake"].upstream
            await changed.aclose()
            await next_one.aclose()
            served_after = await it.embed(["b"], "m")
            entries = it.store.snapshot()["entries"]

    assert (kept, renewed) == (True, True)
    assert served_after.rows == (vector("b", 8).tobytes(),)
    assert entries == 2


async def test_upstream_that_pipelines_share(tmp_path: Path) -> None:
    """The last pipeline that has an upstream closes it; one whose settings have changed is the new pipeline's alone."""
    async with FakeUpstream() as fake:
        more = upstream_toml("u", fake.base_url) + '[models.n]\nupstreams = ["u"]\n'
        it = Built(fake.toml() + more, tmp_path)
        await it.pipeline.prove()
        following = next_of(it, fake.toml() + more + "[upstreams.u.balance]\nslots = 3\n")
        await following.prove()
        kept = {name: following.built[name].upstream is one.upstream for name, one in it.pipeline.built.items()}
        await it.pipeline.retire()
        served = [await answered(following, it.clock, model) for model in "mn"]
        after_the_first = [await answered(it.pipeline, it.clock, model) for model in "mn"]
        await following.aclose()
        after_the_last = [await answered(following, it.clock, model) for model in "mn"]

    assert kept == {"fake": True, "u": False}
    assert served == [True, True]
    assert after_the_first == [True, False]
    assert after_the_last == [False, False]


@pytest.mark.parametrize(
    ("more", "model", "expected"),
    [
        ("[request]\nmax_inputs = 7\n", {}, True),
        ("", {"aliases": ["other"]}, False),
        ("[upstreams.fake.balance]\nslots = 3\n", {}, False),
    ],
    ids=["neither has changed", "the model has", "its upstream has"],
)
async def test_what_canaries_have_shown_before(
    more: str, model: dict[str, Any], expected: bool, tmp_path: Path
) -> None:
    """A model is proven still where neither it nor an upstream of it has changed; else it has to show it anew."""
    async with FakeUpstream() as fake:
        async with built(fake.toml(), tmp_path) as it:
            await it.pipeline.prove()
            following = next_of(it, fake.toml(**model) + more)
            problems = following.problems()
            await following.aclose()

    assert (problems == {"m": ""}) is expected


async def test_model_that_is_served_by_nobody(tmp_path: Path) -> None:
    """A model that is refused is made anew, though nothing has changed: so an exchanged model is accepted."""
    async with FakeUpstream() as fake:
        async with built(fake.toml(), tmp_path) as it:
            await it.pipeline.prove()
            fake.width = 16
            refused = await it.pipeline.prove()
            following = next_of(it, fake.toml())
            accepted = await following.prove()
            has_moved = following.has_moved(it.pipeline)
            await following.aclose()

    assert refused == {"m": "fake: its vectors have 16 numbers, the model's have 8"}
    assert accepted == {"m": ""}
    assert has_moved


def next_of(it: Built, toml: str) -> Pipeline:
    """Build the pipeline that follows another one, as a reload does."""
    it.path.write_text(toml, encoding="utf-8")
    loaded = config.load(str(it.path), {})
    arguments: dict[str, Any] = {"clock": it.clock, "rng": random.Random(1), "observe": it.facts.append}
    return build(loaded.settings, loaded.api_keys, store=it.store, old=it.pipeline, **arguments)


async def answered(pipeline: Pipeline, clock: MonotonicClock, model: str) -> bool:
    """Whether a pipeline's upstream is open still."""
    try:
        await pipeline(make_request(["a"], model=model, now=clock.now(), deadline=clock.now() + 1, no_cache=True))
    except EmbeddingError:
        return False
    return True


async def test_cache_of_a_pipeline_that_is_not_in_force(tmp_path: Path) -> None:
    """Building leaves the store as it is: whether the new pipeline's bound will count is not known yet."""
    async with FakeUpstream() as fake:
        async with built(fake.toml(), tmp_path) as it:
            await it.pipeline.prove()
            await it.embed(["a"], "m")
            before = it.store.snapshot()
            following = next_of(it, fake.toml() + "[cache]\nmax_bytes = 100\n")
            after = it.store.snapshot()
            await following.aclose()

    assert before["entries"] == 1
    assert after == before


async def test_answers_of_a_space_that_has_ended(tmp_path: Path) -> None:
    """A pipeline that is told to stop storing answers as before, and leaves the store alone."""
    async with FakeUpstream() as fake:
        async with built(fake.toml(), tmp_path) as it:
            await it.pipeline.prove()
            it.pipeline.stop_storing()
            response = await it.embed(["a"], "m")
            entries = it.store.snapshot()["entries"]

    assert response.rows == (vector("a", 8).tobytes(),)
    assert entries == 0


class Canaries:
    """In place of balance: the vectors that stand for the spaces."""

    def __init__(self, canaries: dict[str, bytes]) -> None:
        self._canaries = {name: (row,) for name, row in canaries.items()}

    def canaries(self) -> dict[str, tuple[bytes, ...]]:
        return self._canaries

    def widths(self) -> dict[str, int]:
        return {}


HERE, THERE = vector("here", 8).tobytes(), vector("there", 8).tobytes()


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({"m": ("s", HERE)}, {"m": ("s", HERE)}, False),
        ({"m": ("s", HERE)}, {"m": ("s", THERE)}, True),
        ({"m": ("s", HERE)}, {"other": ("s", THERE)}, True),
        ({"m": ("s", HERE)}, {"m": ("t", THERE)}, False),
        ({"m": ("s", HERE)}, {"m": ("s", HERE[:16])}, True),
        ({"m": ("s", HERE), "n": ("t", THERE)}, {"m": ("s", HERE), "n": ("t", HERE)}, True),
        ({"m": ("s", b"")}, {"m": ("s", THERE)}, False),
    ],
    ids=["same", "elsewhere", "other name", "other space", "other width", "one of two", "never known"],
)
def test_moved_by_space(
    before: dict[str, tuple[str, bytes]], now: dict[str, tuple[str, bytes]], expected: bool
) -> None:
    """Spaces are compared by their own names, whatever the models are called, and only where both are known."""
    old, new = (
        Pipeline(
            Settings(models={name: ModelSettings(space=space) for name, (space, _) in models.items()}),
            ScriptedStage(),
            Canaries({name: row for name, (_, row) in models.items() if row}),  # type: ignore[arg-type]
            NO_STAGES,
            {},
            HandClock(),
            {},
        )
        for models in (before, now)
    )

    assert new.has_moved(old) is expected


async def test_space_that_has_moved(tmp_path: Path) -> None:
    """Where the canaries show that a space means other vectors than before, the next pipeline says so."""
    async with FakeUpstream() as fake:
        async with built(fake.toml(space="s"), tmp_path) as it:
            await it.pipeline.prove()
            same, other = Built(fake.toml(space="s"), tmp_path), Built(fake.toml(space="s"), tmp_path)
            await same.pipeline.prove()
            fake.width = 16
            await other.pipeline.prove()
            moved = [one.pipeline.has_moved(it.pipeline) for one in (same, other)]
            await same.pipeline.aclose()
            await other.pipeline.aclose()

    assert moved == [False, True]


async def test_request_through_all_stages(tmp_path: Path) -> None:
    """A request passes every stage once, in the order of the route; an equal one ends at the cache."""
    async with FakeUpstream() as fake:
        async with built(fake.toml(), tmp_path) as it:
            await it.pipeline.prove()
            it.facts.clear()
            first, second = await it.embed(["a"], "m"), await it.embed(["a"], "m")
            names = [type(fact).__name__ for fact in it.facts]
            snapshot = it.pipeline.snapshot()

    assert first.rows == second.rows == (vector("a", 8).tobytes(),)
    assert (first.hits, second.hits) == (0, 1)
    assert names == ["CacheLookedUp", "AttemptFinished", "BatchFinished", "CacheLookedUp"]
    assert (snapshot["attempt"]["calls"], snapshot["attempt"]["attempts"]) == (1, 1)
    assert snapshot["admission"]["inputs"] == 0
    assert len(fake.seen) == 1


async def test_answer_from_the_cache_alone(tmp_path: Path) -> None:
    """What is cached can be answered at once, without any stage behind the cache; all else cannot."""
    async with FakeUpstream() as fake:
        async with built(fake.toml(), tmp_path) as it:
            await it.pipeline.prove()
            request = make_request(["a"], now=it.clock.now())
            before = it.pipeline.known(request)
            response = await it.pipeline(request)
            after = it.pipeline.known(request)

    assert before is None
    assert after is not None
    assert (after.rows, after.hits) == (response.rows, 1)


# --- canaries ---


async def test_proof_of_several_models(tmp_path: Path) -> None:
    """Each model is proven on its own, all at the same time: one that fails says why and harms no other."""
    async with FakeUpstream() as good, FakeUpstream() as bad:
        bad.spare_canary = False
        bad.always = Fault(status=401)
        toml = (
            upstream_toml("g", good.base_url)
            + upstream_toml("b", bad.base_url)
            + '[models.yes]\nupstreams = ["g"]\n[models.no]\nupstreams = ["b"]\n'
            + '[models.both]\nupstreams = ["b", "g"]\n'
        )
        async with built(toml, tmp_path) as it:
            problems = await it.pipeline.prove()
            with pytest.raises(NoUpstream):
                await it.embed(["a"], "no")
            response = await it.embed(["a"], "both")

    assert problems["yes"] == ""
    assert problems["both"] == ""
    assert problems["no"].startswith("b: upstream 'b' answered HTTP 401")
    assert response.upstream == "g"


class Singers:
    """In place of balance: notes when canaries are sent, and answers as the test says."""

    def __init__(self, clock: HandClock) -> None:
        self._clock = clock
        self.sung: list[tuple[float, str, float]] = []
        self.right: dict[str, bool] = {}
        self.broken: dict[str, str] = {}
        self.whole: dict[str, bool] = {}
        self.open_until: dict[str, float] = {}
        """Instants from which on an open breaker lets a probe pass; the next canary that is right closes it."""
        self.is_closed = False

    async def sing(self, model: str, timeout_s: float) -> None:
        self.sung.append((self._clock.now() - 1000, model, timeout_s))
        self.whole[model] = self.right.get(model, True)
        if self.whole[model]:
            self.open_until.pop(model, None)

    def rest_s(self, model: str) -> float:
        return max(0.0, self.open_until.get(model, 0.0) + 1000 - self._clock.now())

    def is_whole(self, model: str) -> bool:
        return self.whole.get(model, model not in self.broken) and model not in self.open_until

    def problems(self) -> dict[str, str]:
        return {"m": "", **self.broken}

    def widths(self) -> dict[str, int]:
        return {}

    def canaries(self) -> dict[str, bytes]:
        return {}

    def snapshot(self) -> dict[str, Any]:
        return {"singers": True}

    async def aclose(self) -> None:
        self.is_closed = True

    def times(self, model: str = "m") -> list[float]:
        return [at for at, name, _ in self.sung if name == model]


@pytest.fixture
def singers() -> Singers:
    return Singers(HandClock())


def scripted(balance: Any, door: Any = None, **lifecycle: Any) -> Pipeline:
    """Return a pipeline between a scripted door and scripted canaries."""
    settings = Settings(
        lifecycle=LifecycleSettings(**lifecycle),
        request=RequestSettings(max_timeout_s=60.0),
        models={"m": ModelSettings(upstreams=("u",))},
    )
    return Pipeline(settings, door or ScriptedStage(), balance, NO_STAGES, {}, balance._clock, {})


@contextlib.asynccontextmanager
async def proving(pipeline: Pipeline, clock: HandClock) -> AsyncIterator[None]:
    pipeline.keep_proving()
    try:
        yield
    finally:
        await pipeline.aclose()


@pytest.fixture
def clock(singers: Singers) -> Iterator[HandClock]:
    return singers._clock


async def test_canaries_that_come_back(singers: Singers, clock: HandClock) -> None:
    """A right canary is followed by the next one after the interval, with its own deadline."""
    pipeline = scripted(singers, canary_interval_s=30.0, canary_timeout_s=4.0)
    async with proving(pipeline, clock):
        await clock.advance(29.9)
        before = singers.times()
        await clock.advance(60.2)

    assert before == []
    assert singers.sung == [(30.0, "m", 4.0), (60.0, "m", 4.0), (90.0, "m", 4.0)]


async def test_canaries_that_fail_from_the_start(singers: Singers, clock: HandClock) -> None:
    """After a failed canary the next comes soon, then twice as late each time."""
    singers.right["m"], singers.broken["m"] = False, "u: down"
    async with proving(scripted(singers, canary_interval_s=30.0, canary_retry_s=1.0), clock):
        await clock.advance(16)

    assert singers.times() == [1.0, 3.0, 7.0, 15.0]


async def test_canaries_that_go_on_to_fail(singers: Singers, clock: HandClock) -> None:
    """The wait grows up to the interval and stays there: a dead upstream is not asked more often again."""
    singers.right["m"], singers.broken["m"] = False, "u: down"
    async with proving(scripted(singers, canary_interval_s=10.0, canary_retry_s=2.0), clock):
        await clock.advance(60)

    assert singers.times() == [2.0, 6.0, 14.0, 24.0, 34.0, 44.0, 54.0]


async def test_canary_that_fails_once(singers: Singers, clock: HandClock) -> None:
    """The first failure after right ones is followed up soon, and a right one brings the interval back."""
    async with proving(scripted(singers, canary_interval_s=30.0, canary_retry_s=1.0), clock):
        await clock.advance(29)
        singers.right["m"] = False
        await clock.advance(2.5)  # at 30 and 31
        singers.right["m"] = True
        await clock.advance(32)  # at 33 and 63

    assert singers.times() == [30.0, 31.0, 33.0, 63.0]


async def test_retry_longer_than_the_interval(singers: Singers, clock: HandClock) -> None:
    """A failed canary is never followed later than a right one."""
    singers.right["m"], singers.broken["m"] = False, "u: down"
    async with proving(scripted(singers, canary_interval_s=5.0, canary_retry_s=60.0), clock):
        await clock.advance(16)

    assert singers.times() == [5.0, 10.0, 15.0]


async def test_canary_of_one_upstream_of_two_fails(tmp_path: Path) -> None:
    """An upstream whose first canary failed is asked again soon, also where another one serves the model."""
    clock = HandClock()
    async with FakeUpstream() as good, FakeUpstream() as bad:
        good.spare_canary = bad.spare_canary = False
        bad.always = Fault(status=500)
        toml = (
            upstream_toml("g", good.base_url)
            + upstream_toml("b", bad.base_url)
            + '[models.m]\nupstreams = ["g", "b"]\n[lifecycle]\ncanary_interval_s = 1000\ncanary_retry_s = 1\n'
        )
        (tmp_path / "settings.toml").write_text(toml, encoding="utf-8")
        loaded = config.load(str(tmp_path / "settings.toml"), {})
        pipeline = build(
            loaded.settings, {}, clock=clock, rng=random.Random(1), observe=lambda _: None, store=CacheStore(0)
        )
        await pipeline.prove()
        asked = len(bad.seen)
        async with proving(pipeline, clock):
            await clock.advance(1.1)
            async with asyncio.timeout(5):
                while len(good.seen) == 1 and clock.now() < 1900:  # the exchange itself takes real turns of the loop
                    await clock.advance(1)
                    await asyncio.sleep(0.001)
            after = clock.now()
        await pipeline.aclose()

    assert asked == 1
    assert after < 1100


async def test_breaker_opens_at_an_idle_upstream(singers: Singers, clock: HandClock) -> None:
    """An open breaker is probed by a canary as soon as it lets one pass, not before, and not only at the interval."""
    async with proving(scripted(singers, canary_interval_s=300.0, canary_retry_s=1.0), clock):
        await clock.advance(42)
        singers.open_until["m"] = 52.5
        await clock.advance(300)

    assert singers.times() == [53.0]


async def test_breaker_opens_at_every_canary(singers: Singers, clock: HandClock) -> None:
    """While it is down it is probed ever later, up to the interval; after a recovery it is found soon again."""
    async with proving(scripted(singers, canary_interval_s=30.0, canary_retry_s=1.0), clock):
        singers.right["m"] = False
        for _ in range(120):
            singers.open_until["m"] = max([0.0, *singers.times()]) + 5.0
            await clock.advance(1)
        singers.right["m"] = True
        await clock.advance(20)
        down = singers.times()
        singers.open_until["m"] = clock.now() - 1000 + 2.5
        await clock.advance(4)

    assert down == [5.0, 10.0, 15.0, 23.0, 39.0, 69.0, 99.0, 129.0]
    assert singers.times()[len(down) :] == [143.0]


async def test_breaker_that_stays_open_for_long(singers: Singers, clock: HandClock) -> None:
    """Canaries come at the interval whatever a breaker says: there may be other upstreams beside it."""
    async with proving(scripted(singers, canary_interval_s=10.0, canary_retry_s=1.0), clock):
        singers.open_until["m"], singers.right["m"] = 3600.0, False
        await clock.advance(35)

    assert singers.times() == [10.0, 20.0, 30.0]


async def test_upstream_recovers_without_traffic(tmp_path: Path) -> None:
    """An idle upstream whose breaker opened is closed again soon after `open_s`, though nobody asks for anything."""
    clock = HandClock()
    async with FakeUpstream() as fake:
        toml = (
            fake.toml(upstream="circuit.failures = 2\ncircuit.open_s = 10")
            + "[lifecycle]\ncanary_interval_s = 1000\n[attempt]\nmax_attempts = 1\n"
        )
        (tmp_path / "settings.toml").write_text(toml, encoding="utf-8")
        loaded = config.load(str(tmp_path / "settings.toml"), {})
        pipeline = build(
            loaded.settings, {}, clock=clock, rng=random.Random(1), observe=lambda _: None, store=CacheStore(0)
        )
        await pipeline.prove()
        fake.always = Fault(status=503)
        for n in range(2):
            with pytest.raises(EmbeddingError):
                await pipeline(make_request([f"text {n}"], now=clock.now()))
        fake.always = Fault()
        opened_at, states = clock.now(), [pipeline.snapshot()["circuit"]["fake"]["state"]]
        async with proving(pipeline, clock):
            await clock.advance(9.5)
            states.append(pipeline.snapshot()["circuit"]["fake"]["state"])
            async with asyncio.timeout(5):
                while pipeline.snapshot()["circuit"]["fake"]["state"] != "closed":
                    await clock.advance(0.5)
                    await asyncio.sleep(0.001)  # the exchange itself takes real turns of the loop
            took_s = clock.now() - opened_at
        await pipeline.aclose()

    assert states == ["open", "open"]
    assert 10 <= took_s < 60


async def test_models_prove_themselves_apart(clock: HandClock, singers: Singers) -> None:
    """Each model has its own schedule."""
    settings = Settings(
        lifecycle=LifecycleSettings(canary_interval_s=10.0, canary_retry_s=2.0),
        models={"m": ModelSettings(), "n": ModelSettings()},
    )
    singers.broken, singers.right = {"n": "u: down"}, {"n": False}
    async with proving(Pipeline(settings, ScriptedStage(), singers, NO_STAGES, {}, clock, {}), clock):  # type: ignore[arg-type]
        await clock.advance(10.5)

    assert singers.times("m") == [10.0]
    assert singers.times("n") == [2.0, 6.0]


async def test_proof_asks_every_model(clock: HandClock, singers: Singers) -> None:
    """The first proof sends each model's canary with a full deadline, and tells what is wrong."""
    singers.broken["m"] = "u: down"
    problems = await scripted(singers, canary_timeout_s=3.0).prove()

    assert singers.sung == [(0.0, "m", 3.0)]
    assert problems == {"m": "u: down"}


@pytest.mark.parametrize("end", ["aclose", "retire"])
async def test_canaries_of_a_pipeline_that_ends(end: str, singers: Singers, clock: HandClock) -> None:
    """The canaries go on until the pipeline ends; retiring ends them at once, though a request is still inside."""
    door = ScriptedStage()
    pipeline = scripted(singers, door, canary_interval_s=10.0)
    pipeline.keep_proving()
    await clock.advance(10.5)
    call = asyncio.create_task(pipeline(make_request()))
    inside = await door.next()
    ending = asyncio.create_task(getattr(pipeline, end)())
    await clock.advance(30)
    is_over = ending.done()
    inside.answer("one")
    async with asyncio.timeout(5):
        await asyncio.gather(call, ending)

    assert singers.times() == [10.0]
    assert is_over is (end == "aclose")
    assert pipeline._proving is not None
    assert pipeline._proving.cancelled()


async def test_end_of_a_pipeline_that_never_proved(singers: Singers) -> None:
    """A pipeline that was refused at a reload has no canaries to end; its door is closed, and through it the rest."""
    door = ScriptedStage()
    await scripted(singers, door).aclose()

    assert door.is_closed
    assert not singers.is_closed  # the last stage's business, not the pipeline's


# --- the end ---


async def test_retiring_with_requests_inside(singers: Singers, clock: HandClock) -> None:
    """A retired pipeline is closed when the last request inside has its answer, not before."""
    door = ScriptedStage()
    pipeline = scripted(singers, door)
    calls = [asyncio.create_task(pipeline(make_request([text]))) for text in "ab"]
    retiring = asyncio.create_task(pipeline.retire())
    first, second = await door.next(), await door.next()
    first.answer("one")
    await clock.advance(59)
    during = (door.is_closed, retiring.done())
    second.fail(NoUpstream("gone"))
    await retiring
    results = await asyncio.gather(*calls, return_exceptions=True)

    assert during == (False, False)
    assert results[0] == "one"
    assert isinstance(results[1], NoUpstream)
    assert door.is_closed


async def test_retiring_with_nobody_inside(singers: Singers, clock: HandClock) -> None:
    """An idle pipeline is closed at once."""
    door = ScriptedStage()
    pipeline = scripted(singers, door)
    async with asyncio.timeout(5):
        await pipeline.retire()

    assert door.is_closed


async def test_retiring_when_a_caller_leaves(singers: Singers, clock: HandClock) -> None:
    """A cancelled request is inside no more."""
    door = ScriptedStage()
    pipeline = scripted(singers, door)
    call = asyncio.create_task(pipeline(make_request()))
    await door.next()
    retiring = asyncio.create_task(pipeline.retire())
    await settle()
    call.cancel()
    async with asyncio.timeout(5):
        await retiring

    assert door.calls[0].was_cancelled
    assert door.is_closed


async def test_retiring_with_a_request_that_hangs(singers: Singers, clock: HandClock) -> None:
    """What is still inside after the longest deadline does not keep a retired pipeline open."""
    door = ScriptedStage()
    pipeline = scripted(singers, door)
    call = asyncio.create_task(pipeline(make_request()))
    await door.next()
    retiring = asyncio.create_task(pipeline.retire())
    await clock.advance(59.9)
    before = door.is_closed
    await clock.advance(0.2)
    await asyncio.wait([retiring], timeout=5)
    is_over, error = retiring.done(), retiring.exception()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)

    assert (before, is_over) == (False, True)
    assert door.is_closed
    assert error is None or isinstance(error, TimeoutError)


# --- what it tells ---


async def test_snapshots_of_all_stages(tmp_path: Path) -> None:
    """Every stage tells its numbers, in the order of the journey, fit for JSON, before and after a request."""
    async with FakeUpstream() as fake:
        toml = fake.toml() + '[upstreams.here]\nkind = "builtin"\n[models.w]\nupstreams = ["here"]\n'
        async with built(toml, tmp_path) as it:
            before = orjson.loads(orjson.dumps(it.pipeline.snapshot()))
            await it.pipeline.prove()
            await it.embed(["a"], "m")
            after = orjson.loads(orjson.dumps(it.pipeline.snapshot()))
            models = orjson.loads(orjson.dumps(it.pipeline.models()))

    assert list(before) == list(after) == STAGES
    assert list(after["circuit"]) == list(after["bucket"]) == list(after["transport"]) == ["fake", "here"]
    assert after["cache"]["entries"] == 1
    assert after["balance"].keys() == models.keys() == {"m", "w"}
    assert models["m"]["upstreams"]["fake"]["is_verified"] is True


def test_snapshot_order_is_the_route() -> None:
    """The stages of the snapshot stand in the order of the route; pure stations have none."""
    stations = [name.partition(".")[2] for name in ROUTE]

    assert [name for name in stations if name in STAGES] == STAGES
    assert set(stations) - set(STAGES) == {"accept", "decode", "translate", "vectors", "encode"}


async def test_upstream_that_no_model_names_any_more(tmp_path: Path) -> None:
    """An upstream that a reload leaves without a model is closed with the old pipeline."""
    async with FakeUpstream() as fake:
        it = Built(fake.toml(), tmp_path)
        await it.pipeline.prove()
        nameless = fake.toml().partition("[models.m]")[0]
        following = next_of(it, nameless + '[upstreams.here]\nkind = "builtin"\n[models.w]\nupstreams = ["here"]\n')
        await it.pipeline.retire()
        await following.aclose()
        end: Any = it.pipeline.built["fake"].end
        with pytest.raises(EmbeddingError, match="no longer used"):
            await end(make_batch(now=it.clock.now()))
