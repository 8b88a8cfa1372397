"""What a review found once and shall not come back: each test is one situation in which the proxy was wrong."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import re
import socket
import sys
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy
import pytest

from proxy.base.keys import fingerprint
from proxy.base.messages import Spec
from proxy.upstream.translate.openai import OpenAI
from proxy.wiring import config, server
from proxy.wiring.lifecycle import Lifecycle
from tests.fakes.running import Running, running
from tests.fakes.upstream import FakeUpstream, Fault, vector

SOON_S = 5.0
"""Bound of each wait for something that should come at once."""

OFTEN = "[lifecycle]\ncanary_interval_s = 0.1\ncanary_retry_s = 0.05\n"
RARELY = "[lifecycle]\ncanary_interval_s = 3600\n"

KEY = "the-key-of-alice"
ALICE = f'[callers.alice]\nkey_sha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"\n'


# --- hands ---


async def until(is_so: Callable[[], bool | Awaitable[bool]]) -> None:
    """Look again and again until something is so; fails after SOON_S."""
    async with asyncio.timeout(SOON_S):
        while True:
            found = is_so()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.005)


async def get(session: aiohttp.ClientSession, path: str) -> tuple[int, Any]:
    async with session.get(path) as answer:
        return answer.status, await (answer.json() if "json" in answer.content_type else answer.text())


async def status(proxy: Running) -> dict[str, Any]:
    return (await get(proxy.unix, "/status"))[1]


async def reloads(proxy: Running) -> tuple[int, int]:
    """Return how many reloads were done and how many refused."""
    _, page = await get(proxy.unix, "/metrics")
    found = dict(re.findall(r'^embedding_sidecar_reloads_total\{result="(\w+)"\} (\d+)', page, re.MULTILINE))
    return int(found.get("done", 0)), int(found.get("refused", 0))


async def reloaded(proxy: Running, toml: str) -> str:
    """Change the settings; returns `done` or `refused`."""
    before = await reloads(proxy)
    proxy.path.write_text(toml, encoding="utf-8")
    proxy.lifecycle.reload()

    async def is_over() -> bool:
        return await reloads(proxy) != before

    await until(is_over)
    return "done" if (await reloads(proxy))[0] > before[0] else "refused"


async def inside(proxy: Running, requests: int) -> None:
    """Wait until so many requests have been admitted and wait behind the coalescer."""

    async def is_so() -> bool:
        return (await status(proxy))["stages"]["admission"]["inputs"] == requests

    await until(is_so)


def rows(document: dict[str, Any]) -> numpy.ndarray:
    return numpy.array([item["embedding"] for item in document["data"]], dtype="<f4")


def is_right(document: dict[str, Any], *texts: str, width: int = 8) -> bool:
    found = rows(document)
    return found.shape == (len(texts), width) and bool((found == [vector(text, width) for text in texts]).all())


def mirrored(answer: dict[str, Any]) -> dict[str, Any]:
    """Change an answer into what another model of the same width might say; needs an upstream without base64."""
    data = [item | {"embedding": item["embedding"][::-1]} for item in answer["data"]]
    return answer | {"data": data}


def head(length: int, **headers: str) -> bytes:
    """Spell the head of a request for embeddings whose body has `length` bytes."""
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    return (
        "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n{''.join(lines)}\r\n"
    ).encode()


@contextlib.asynccontextmanager
async def connected(proxy: Running) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a bare connection to the Unix socket."""
    reader, writer = await asyncio.open_unix_connection(proxy.socket_path)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def two_upstreams(a: FakeUpstream, b: FakeUpstream, rest: str) -> str:
    named = [
        f'[upstreams.{name}]\nkind = "openai"\nprofile = "openai"\nbase_url = "{upstream.base_url}"\n'
        for name, upstream in (("a", a), ("b", b))
    ]
    return "".join(named) + rest


class Starting:
    """A proxy whose first canaries need not be back."""

    def __init__(self, folder: Path, toml: str) -> None:
        self.path = folder / "settings.toml"
        self.path.write_text(toml, encoding="utf-8")
        self.socket_path = folder / "s.sock"
        self.greeted = 0
        environ = {
            "EMBEDDING_SIDECAR__LISTEN__SOCKET": str(self.socket_path),
            "EMBEDDING_SIDECAR__LISTEN__TCP": "off",
        }
        self.lifecycle = Lifecycle(str(self.path), environ, greet=self._greet)

    def _greet(self, *_: object) -> None:
        self.greeted += 1

    async def __aenter__(self) -> Starting:
        self.run = asyncio.create_task(self.lifecycle.run())
        await until(lambda: self.socket_path.exists() or self.run.done())
        self.unix = aiohttp.ClientSession(
            "http://localhost",
            connector=aiohttp.UnixConnector(str(self.socket_path)),
            timeout=aiohttp.ClientTimeout(total=SOON_S),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.unix.close()
        self.lifecycle.stop(is_hasty=True)
        await asyncio.gather(self.run, return_exceptions=True)


def tasks_of_ours() -> list[str]:
    """Name the tasks of this loop that run code of the proxy."""
    codes = [getattr(task.get_coro(), "cr_code", None) for task in asyncio.all_tasks()]
    return [code.co_qualname for code in codes if code and "/proxy/" in code.co_filename]


# --- A: whose vectors ---


async def test_two_servers_that_call_their_models_alike(tmp_path: Path) -> None:
    """A1: models of different servers are different spaces, even where both servers call their model the same."""
    async with FakeUpstream(width=8) as a, FakeUpstream(width=16) as b:
        rest = (
            '[models.one]\nupstreams = ["a"]\nupstream_model = "default"\n'
            '[models.two]\nupstreams = ["b"]\nupstream_model = "default"\n'
        )
        async with running(tmp_path, two_upstreams(a, b, rest)) as proxy:
            _, one, one_headers = await proxy.embed({"model": "one", "input": ["hello"]})
            _, two, two_headers = await proxy.embed({"model": "two", "input": ["hello"]})
            _, mixed, _ = await proxy.embed({"model": "two", "input": ["hello", "new"]})

    assert is_right(one, "hello", width=8)
    assert is_right(two, "hello", width=16)
    assert is_right(mixed, "hello", "new", width=16)
    assert two_headers["X-Embedding-Cache"] == "miss"
    assert one_headers["X-Embedding-Space"] != two_headers["X-Embedding-Space"]


async def test_server_whose_model_is_exchanged_while_it_runs(tmp_path: Path) -> None:
    """A2: an upstream whose canary has moved is refused by name, even when it is the only one of its model."""
    async with FakeUpstream(has_base64=False) as upstream, running(tmp_path, OFTEN + upstream.toml()) as proxy:
        before, _, _ = await proxy.embed({"input": "old"})
        upstream.spare_canary, upstream.always = False, Fault(change=mirrored)

        async def is_refused() -> bool:
            return (await proxy.get("/readyz"))[0] == 503

        await until(is_refused)
        _, readyz = await proxy.get("/readyz")
        refused, document, _ = await proxy.embed({"input": "new"})

    assert before == 200
    assert [reason.partition(": its vectors")[0] for reason in readyz["reasons"]] == ["model m: fake"]
    assert (refused, document["error"]["code"]) == (503, "no_upstream")


async def test_server_whose_vectors_change_their_width_while_it_runs(tmp_path: Path) -> None:
    """A2: a learned width is kept: an upstream that gives another one is refused, and answers never mix widths."""
    async with FakeUpstream(width=8) as upstream, running(tmp_path, OFTEN + upstream.toml()) as proxy:
        await proxy.embed({"input": "old"})
        upstream.width = 16
        mixed, _, _ = await proxy.embed({"input": ["old", "new"]})

        async def is_refused() -> bool:
            return (await proxy.get("/readyz"))[0] == 503

        await until(is_refused)
        _, readyz = await proxy.get("/readyz")
        refused, document, _ = await proxy.embed({"input": ["old", "new"]})

    assert mixed in (502, 503)
    assert readyz["reasons"] == ["model m: fake: its vectors have 16 numbers, the model's have 8"]
    assert (refused, document["error"]["code"]) == (503, "no_upstream")


async def test_reload_after_a_server_has_exchanged_its_model(tmp_path: Path) -> None:
    """A2: a reload takes the new vectors of a server for right, and forgets the old ones that are cached."""
    async with FakeUpstream(has_base64=False) as upstream, running(tmp_path, OFTEN + upstream.toml()) as proxy:
        _, old, _ = await proxy.embed({"input": ["hello"]})
        upstream.spare_canary, upstream.always = False, Fault(change=mirrored)

        async def is_refused() -> bool:
            return (await proxy.get("/readyz"))[0] == 503

        await until(is_refused)
        outcome = await reloaded(proxy, OFTEN + upstream.toml())
        again, new, headers = await proxy.embed({"input": ["hello"]})

    assert outcome == "done"
    assert is_right(old, "hello")
    assert (again, headers["X-Embedding-Cache"]) == (200, "miss")
    assert (rows(new) == rows(old)[:, ::-1]).all()


@pytest.mark.parametrize("space", [{}, {"space": "named"}], ids=["space by address", "space named alike"])
@pytest.mark.parametrize("width", [8, 16], ids=["same width", "other width"])
async def test_reload_to_a_server_with_other_vectors(tmp_path: Path, space: dict[str, str], width: int) -> None:
    """A2: after a reload to a server with other vectors no cached vector of the old one is answered."""
    async with FakeUpstream() as a, FakeUpstream(width=width, has_base64=False) as b:
        async with running(tmp_path, RARELY + a.toml(**space)) as proxy:
            await proxy.embed({"input": ["hello"]})
            b.spare_canary, b.always = False, Fault(change=mirrored)
            outcome = await reloaded(proxy, RARELY + b.toml(**space))
            again, new, _ = await proxy.embed({"input": ["hello", "new"]})

    assert (outcome, again) == ("done", 200)
    assert is_right({"data": mirrored(new)["data"]}, "hello", "new", width=width)


async def test_old_vector_that_arrives_after_a_reload(tmp_path: Path) -> None:
    """A2: what the old pipeline still computes after a reload to other vectors is not cached for the new one."""
    async with FakeUpstream() as a, FakeUpstream(has_base64=False) as b:
        async with running(tmp_path, RARELY + a.toml(space="named")) as proxy:
            gate = asyncio.Event()
            a.script = [Fault(wait_for=gate)]
            late = asyncio.create_task(proxy.embed({"input": ["hello"]}))
            await until(lambda: a.inside == 1)
            b.spare_canary, b.always = False, Fault(change=mirrored)
            outcome = await reloaded(proxy, RARELY + b.toml(space="named"))
            gate.set()
            answered, old, _ = await late
            again, new, _ = await proxy.embed({"input": ["hello"]})

    assert (outcome, answered, again) == ("done", 200, 200)
    assert is_right(old, "hello")
    assert is_right({"data": mirrored(new)["data"]}, "hello")


# --- A, B: reloads and canaries ---


async def test_reload_that_takes_the_keys_away_from_an_open_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A3: a socket that others can reach stays open at a reload, so settings without client keys are refused."""
    # 127.0.0.2 plays the address that others can reach: nothing leaves this machine.
    monkeypatch.setattr(server, "is_loopback", lambda host: host != "127.0.0.2" and config.is_loopback(host))
    async with FakeUpstream() as upstream:
        environ = {"EMBEDDING_SIDECAR__LISTEN__TCP": "127.0.0.2:0"}
        async with running(tmp_path, upstream.toml() + ALICE, environ) as proxy:
            without, _, _ = await proxy.embed({"input": "x"})
            outcome = await reloaded(proxy, upstream.toml())
            still_without, _, _ = await proxy.embed({"input": "x"})
            with_key, _, _ = await proxy.embed({"input": "x"}, headers={"Authorization": f"Bearer {KEY}"})
            harmless = await reloaded(proxy, upstream.toml(aliases=["new"]) + ALICE)

    assert (without, outcome, still_without, with_key) == (401, "refused", 401, 200)
    assert harmless == "done"


@pytest.mark.parametrize(
    "more",
    ["", '[upstreams.fake.balance]\nslots = 1\n[models.n]\nupstreams = ["fake"]\n'],
    ids=["one model", "two models on one slot"],
)
async def test_reload_while_the_first_canaries_are_out(tmp_path: Path, more: str) -> None:
    """A4: a reload asked for during the start is done after the first canaries; nothing ends or runs twice."""
    async with FakeUpstream() as upstream:
        gate = asyncio.Event()
        upstream.spare_canary, upstream.always = False, Fault(wait_for=gate)
        async with Starting(tmp_path, OFTEN + upstream.toml() + more) as proxy:
            await until(lambda: upstream.inside == 1)
            upstream.always = Fault()  # whoever asks from now on is answered: nothing but the first round holds us up
            proxy.path.write_text(OFTEN + upstream.toml(aliases=["new"]) + more, encoding="utf-8")
            proxy.lifecycle.reload()
            proxy.lifecycle.reload()
            await asyncio.wait({proxy.run}, timeout=0.2)  # room for going wrong
            early, greeted_early = proxy.run.done(), proxy.greeted
            gate.set()

            async def is_reloaded() -> bool:
                return (await get(proxy.unix, "/v1/models/new"))[0] == 200

            await until(is_reloaded)
            served = len(upstream.seen)
            await until(lambda: len(upstream.seen) > served)  # canaries go on
            ready, _ = await get(proxy.unix, "/readyz")
            is_over = proxy.run.done()
        proxy.run.result()
        left = tasks_of_ours()

    assert (early, greeted_early) == (False, 0)
    assert (proxy.greeted, ready, is_over) == (1, 200, False)
    assert left == []


async def test_stop_while_the_first_canaries_are_out(tmp_path: Path) -> None:
    """A4: a stop during the start, with a reload wanted too, ends everything at once and leaves no task behind."""
    async with FakeUpstream() as upstream:
        upstream.spare_canary, upstream.always = False, Fault(hang=True)
        async with Starting(tmp_path, upstream.toml()) as proxy:
            await until(lambda: upstream.inside == 1)
            proxy.lifecycle.reload()
            proxy.lifecycle.stop(is_hasty=True)
            await asyncio.wait({proxy.run}, timeout=SOON_S)
            is_over = proxy.run.done()
        proxy.run.result()
        left = tasks_of_ours()

    assert is_over
    assert left == []


async def test_defect_of_ours_in_a_canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A5: an exception that nobody expected is this upstream's problem for now, and the canaries go on."""
    right, is_broken = OpenAI.answer, True

    def answer(self: OpenAI, *args: Any, **options: Any) -> Any:
        if is_broken:
            raise KeyError("a defect")
        return right(self, *args, **options)

    async with FakeUpstream() as upstream, running(tmp_path, OFTEN + upstream.toml()) as proxy:

        async def problem() -> str:
            return (await status(proxy))["stages"]["balance"]["m"]["upstreams"]["fake"]["problem"]

        async def is_told() -> bool:
            return "KeyError" in await problem()

        async def is_forgotten() -> bool:
            return not await problem()

        before = await problem()
        monkeypatch.setattr(OpenAI, "answer", answer)
        await until(is_told)
        is_broken = False
        await until(is_forgotten)
        ready, _ = await proxy.get("/readyz")
        served, _, _ = await proxy.embed({"input": "x"})

    assert before == ""
    assert (ready, served) == (200, 200)


async def test_defect_of_ours_in_the_first_canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A5: at the start, too, such an exception ends no process: it is told, and a later canary makes it ready."""
    right, is_broken = OpenAI.answer, True

    def answer(self: OpenAI, *args: Any, **options: Any) -> Any:
        if is_broken:
            raise KeyError("a defect")
        return right(self, *args, **options)

    monkeypatch.setattr(OpenAI, "answer", answer)
    async with FakeUpstream() as upstream, running(tmp_path, OFTEN + upstream.toml()) as proxy:
        down = await proxy.get("/readyz")
        is_broken = False

        async def is_ready() -> bool:
            return (await proxy.get("/readyz"))[0] == 200

        await until(is_ready)
        served, _, _ = await proxy.embed({"input": "x"})

    assert (down[0], [reason.split(" ")[:3] for reason in down[1]["reasons"]]) == (503, [["model", "m:", "fake:"]])
    assert "KeyError" in down[1]["reasons"][0]
    assert served == 200


@pytest.mark.parametrize("is_first", [True, False], ids=["the first hangs", "the second hangs"])
async def test_start_beside_an_upstream_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    """A10: one upstream that hangs at the start does not hold up a model that another one serves."""
    monkeypatch.setattr("proxy.upstream.balance.model.CANARY_GRACE_S", 0.2)  # a test need not wait for the real 2 s
    async with FakeUpstream() as good, FakeUpstream() as bad:
        bad.spare_canary, bad.always = False, Fault(hang=True)
        a, b = (bad, good) if is_first else (good, bad)
        async with Starting(tmp_path, two_upstreams(a, b, '[models.m]\nupstreams = ["a", "b"]\n')) as proxy:
            async with proxy.unix.post("/v1/embeddings", json={"input": ["x"]}) as answer:
                found = answer.status, answer.headers.get("X-Embedding-Upstream"), await answer.json()
            ready, _ = await get(proxy.unix, "/readyz")
            asked = bad.inside

    assert found[:2] == (200, "b" if is_first else "a")
    assert is_right(found[2], "x")
    assert (ready, asked) == (200, 1)


async def wanted(proxy: Running) -> int:
    """Count the calls under way, the canaries that wait for a slot and the inputs that wait to be sent."""
    stages = (await status(proxy))["stages"]
    fake = stages["balance"]["m"]["upstreams"]["fake"]
    lanes = stages["microbatch"].get("m", {"lanes": {}})["lanes"]
    return int(fake["calls"] + fake["waiting_canaries"] + sum(lane["inputs"] for lane in lanes.values()))


async def test_slots_across_reloads(tmp_path: Path) -> None:
    """B1: a reload that leaves an upstream as it is gives it no further slots."""
    async with FakeUpstream() as upstream:
        toml = RARELY + upstream.toml() + "[upstreams.fake.balance]\nslots = 1\n"
        async with running(tmp_path, toml) as proxy:
            # Its canary counts at the upstream, too.
            gate, upstream.spare_canary = asyncio.Event(), False
            upstream.always = Fault(wait_for=gate)

            async def calls() -> int:
                return max(await wanted(proxy), upstream.inside)

            async def are_there(count: int) -> bool:
                return upstream.most_inside > 1 or await calls() >= count

            asked = []
            for count in (1, 2, 3):  # before a reload, while it waits for its canary, and once more
                asked.append(asyncio.create_task(proxy.embed({"input": f"{count}"})))
                await until(lambda: are_there(len(asked) + (len(asked) > 1)))
                if count == 1:
                    proxy.lifecycle.reload()
                    await until(lambda: are_there(2))
            gate.set()
            answers = [await one for one in asked]

            async def is_reloaded() -> bool:
                return await reloads(proxy) == (1, 0)

            await until(is_reloaded)
            outcome = await reloaded(proxy, toml)
            after = await asyncio.gather(*[proxy.embed({"input": f"after {n}"}) for n in range(3)])

    assert [one[0] for one in (*answers, *after)] == [200] * 6
    assert outcome == "done"
    assert upstream.most_inside == 1


async def test_request_inside_keeps_its_slot_across_a_reload(tmp_path: Path) -> None:
    """B1: old and new pipeline share the slots: a call of the old one counts for the new one."""
    async with FakeUpstream() as upstream:
        toml = RARELY + upstream.toml(upstream="balance.slots = 2\nbatch.max_inputs = 1")
        async with running(tmp_path, toml) as proxy:
            gate = asyncio.Event()
            upstream.always = Fault(wait_for=gate)
            asked = [asyncio.create_task(proxy.embed({"input": "old"}))]
            await until(lambda: upstream.inside == 1)
            outcome = await reloaded(proxy, toml.replace("3600", "3000"))
            asked += [asyncio.create_task(proxy.embed({"input": f"new {n}"})) for n in range(3)]

            async def are_waiting() -> bool:
                return await wanted(proxy) == 4

            await until(are_waiting)
            most = upstream.most_inside
            gate.set()
            answers = [await one for one in asked]

    assert outcome == "done"
    assert [one[0] for one in answers] == [200] * 4
    assert (most, upstream.most_inside) == (2, 2)


async def test_open_breaker_across_a_reload(tmp_path: Path) -> None:
    """B1: a reload does not close a breaker: the failing upstream is left alone by the new pipeline, too."""
    async with FakeUpstream() as a, FakeUpstream() as b:
        rest = (
            "[attempt]\nmax_attempts = 1\n[upstreams.a.circuit]\nfailures = 1\nopen_s = 300\n"
            '[models.m]\nupstreams = ["a", "b"]\n'
        )
        async with running(tmp_path, RARELY + two_upstreams(a, b, rest)) as proxy:
            a.always = Fault(status=500, body={})
            failed, _, _ = await proxy.embed({"input": "0"})
            outcome = await reloaded(proxy, RARELY + two_upstreams(a, b, rest) + 'aliases = ["new"]\n')
            served = [(await proxy.embed({"input": f"{n}"}))[0] for n in range(1, 4)]
            state = (await status(proxy))["stages"]["circuit"]["a"]["state"]
            _, metrics = await proxy.get("/metrics")

    assert (failed, outcome, served) == (502, "done", [200] * 3)
    assert (state, len(a.seen)) == ("open", 1)
    assert 'embedding_sidecar_breaker_state{upstream="a"} 2.0' in metrics


async def test_refused_reload_with_a_smaller_cache(tmp_path: Path) -> None:
    """B2: a reload that is refused takes nothing out of the cache."""
    async with FakeUpstream() as upstream, FakeUpstream(width=16) as other:
        async with running(tmp_path, upstream.toml(dimensions=8)) as proxy:
            await proxy.embed({"input": ["a", "b", "c"]})
            before = (await status(proxy))["stages"]["cache"]
            outcome = await reloaded(proxy, other.toml(dimensions=8) + "[cache]\nmax_bytes = 300\n")
            after = (await status(proxy))["stages"]["cache"]
            _, _, headers = await proxy.embed({"input": ["a", "b", "c"]})

    assert outcome == "refused"
    assert before["entries"] == 3
    assert after == before
    assert headers["X-Embedding-Cache"] == "hit"


async def test_stop_while_a_reload_waits_for_its_canaries(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """B3: a stop during a reload closes the new pipeline as well as the old one."""
    async with FakeUpstream() as upstream, FakeUpstream() as other:
        other.spare_canary, other.always = False, Fault(hang=True)
        async with running(tmp_path, upstream.toml()) as proxy:
            proxy.path.write_text(other.toml(), encoding="utf-8")
            proxy.lifecycle.reload()
            await until(lambda: other.inside == 1)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            gc.collect()
        await until(lambda: not other.inside)
        left = tasks_of_ours()

    assert [str(one.message) for one in told if "Unclosed" in str(one.message)] == []
    assert "Unclosed" not in "".join(capfd.readouterr())
    assert left == []


# --- A, B: who waits for whom ---


@pytest.mark.parametrize("trouble", ["too many", "hang"])
async def test_follower_that_is_more_patient_than_its_leader(tmp_path: Path, trouble: str) -> None:
    """A6: what a leader's short deadline cuts off is no answer for a follower, who asks again for itself."""
    async with FakeUpstream() as upstream, running(tmp_path, RARELY + upstream.toml()) as proxy:
        gate = asyncio.Event()
        body = {"error": {"message": "later", "code": "rate_limit_exceeded"}}
        too_many = Fault(wait_for=gate, status=429, headers={"retry-after-ms": "900"}, body=body)
        upstream.script = [too_many if trouble == "too many" else Fault(hang=True)]
        leader = asyncio.create_task(
            proxy.embed({"input": ["x"]}, headers={"X-Request-Timeout-Ms": "500"}, is_unix=True)
        )
        await until(lambda: upstream.inside == 1)
        follower = asyncio.create_task(proxy.embed({"input": ["x"]}, headers={"X-Request-Timeout-Ms": "10000"}))
        await inside(proxy, 2)
        asked = len(upstream.seen)
        gate.set()
        led, followed = await leader, await follower

    assert asked == 1  # it did follow
    assert led[0] in ((429,) if trouble == "too many" else (503, 504))
    assert followed[0] == 200, followed[1]
    assert is_right(followed[1], "x")


async def test_refusal_of_the_own_part_beside_a_slow_flight(tmp_path: Path) -> None:
    """B4: a request whose own part is refused hears so at once, whatever it has joined besides."""
    async with FakeUpstream() as upstream, running(tmp_path, RARELY + upstream.toml()) as proxy:
        gate = asyncio.Event()
        upstream.script = [
            Fault(wait_for=gate),
            Fault(status=400, body={"error": {"message": "bad", "code": "bad_thing"}}),
        ]
        slow = asyncio.create_task(proxy.embed({"input": ["slow"]}))
        await until(lambda: upstream.inside == 1)
        async with asyncio.timeout(SOON_S):
            refused, document, _ = await proxy.embed({"input": ["slow", "bad"]})
        was_slow = not slow.done()
        gate.set()
        served, right, _ = await slow

    assert (refused, document["error"]["code"], was_slow) == (400, "bad_thing", True)
    assert served == 200
    assert is_right(right, "slow")


# --- A, B: bounds ---


async def test_large_parameters(tmp_path: Path) -> None:
    """A7: parameters beyond 64 KiB are refused before anybody is asked; below they pass."""
    async with FakeUpstream() as upstream, running(tmp_path, upstream.toml()) as proxy:
        below, _, _ = await proxy.embed({"input": "x", "extra": "a" * 60_000})
        asked = len(upstream.seen)
        one, document, _ = await proxy.embed({"input": "x", "extra": "a" * 70_000})
        many, _, _ = await proxy.embed({"input": "x", **{f"extra{n}": "a" * 1000 for n in range(70)}})

    assert (below, asked) == (200, 1)
    assert (one, document["error"]["code"], many) == (413, "request_too_large", 413)
    assert len(upstream.seen) == asked


def test_parameters_are_not_remembered() -> None:
    """A7: naming the space of a request keeps nothing of its parameters alive."""
    params = json.dumps({"extra": "a" * 60_000}).encode()
    before = sys.getrefcount(params)

    name = fingerprint("m", Spec("m", params=params))

    assert re.fullmatch(r"[0-9a-f]{16}", name)
    assert sys.getrefcount(params) == before


async def test_many_bodies_that_do_not_end(tmp_path: Path) -> None:
    """A8: bodies being read are bounded together; when those that went over the bound are gone, all is well."""
    toml = "[listen]\nmax_bodies_bytes = 100000\n"
    async with FakeUpstream() as upstream, running(tmp_path, toml + upstream.toml()) as proxy:
        async with connected(proxy) as one, connected(proxy) as two:
            for _, writer in (one, two):
                writer.write(head(200_000) + b" " * 60_000)
                await writer.drain()
            answers = {asyncio.create_task(reader.readuntil(b"\r\n\r\n")) for reader, _ in (one, two)}
            refused, waiting = await asyncio.wait(answers, timeout=SOON_S, return_when=asyncio.FIRST_COMPLETED)
            heads = [task.result().decode() for task in refused]
            small, _, _ = await proxy.embed({"input": "small"})
            are_waiting = [not task.done() for task in waiting]
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

        async def is_served() -> bool:
            return (await proxy.embed({"input": "a" * 70_000}))[0] == 200

        await until(is_served)
        snapshot = await status(proxy)

    assert [text.partition("\r\n")[0] for text in heads] == ["HTTP/1.1 503 Service Unavailable"]
    assert "Retry-After: 1" in heads[0]
    assert (small, are_waiting) == (200, [True])
    assert snapshot["stages"]["admission"]["inputs"] == 0


async def test_body_beyond_what_all_bodies_may_have(tmp_path: Path) -> None:
    """A8: the refusal is `overloaded`, and the same body passes where the bound is higher."""
    body = {"input": ["a" * 1000] * 90}
    async with FakeUpstream() as upstream:
        async with running(tmp_path, "[listen]\nmax_bodies_bytes = 50000\n" + upstream.toml()) as proxy:
            refused, document, headers = await proxy.embed(body)
            served, _, _ = await proxy.embed({"input": "x"})
            outcome = await reloaded(proxy, "[listen]\nmax_bodies_bytes = 500000\n" + upstream.toml())
            passed, _, _ = await proxy.embed(body)

    assert (refused, document["error"]["code"], headers["x-should-retry"]) == (503, "overloaded", "true")
    assert (served, outcome, passed) == (200, "done", 200)


@pytest.mark.parametrize("listener", ["unix", "tcp"])
async def test_small_answers_that_nobody_reads(tmp_path: Path, listener: str) -> None:
    """A9: a caller that takes none of its answers is cut off in time, however small each of them is."""
    body = json.dumps({"input": "q"}).encode()
    # A caller whose answers all fit into the kernel's buffers is an idle one, and gone after the keep-alive.
    toml = "[listen]\nwrite_timeout_s = 0.3\nkeepalive_timeout_s = 1\n"
    loop = asyncio.get_running_loop()
    async with FakeUpstream(width=1536) as upstream, running(tmp_path, toml + upstream.toml()) as proxy:
        _, document, _ = await proxy.embed({"input": "q"}, is_unix=True)
        host, _, port = proxy.address.rpartition(":")
        # With several lengths, whatever the kernel takes, some callers leave little behind: less than any mark of ours.
        lengths = range(10, 24) if listener == "unix" else range(100, 220, 40)
        async with contextlib.AsyncExitStack() as stack:
            sent = []
            for length in lengths:
                caller = stack.enter_context(socket.socket(socket.AF_UNIX if listener == "unix" else socket.AF_INET))
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                caller.setblocking(False)
                await loop.sock_connect(caller, proxy.socket_path if listener == "unix" else (host, int(port)))
                sent.append(asyncio.create_task(loop.sock_sendall(caller, (head(len(body)) + body) * length)))
            most = 0

            async def are_gone() -> bool:
                nonlocal most
                connections = (await status(proxy))["connections"]
                most = max(most, connections)
                return connections == 1

            await until(are_gone)
            served, _, _ = await proxy.embed({"input": "q"}, is_unix=True)
            for task in sent:
                task.cancel()
            await asyncio.gather(*sent, return_exceptions=True)

    assert len(json.dumps(document)) < 65_536
    assert most > 1
    assert served == 200


async def test_body_that_is_slower_than_its_caller_is_patient(tmp_path: Path) -> None:
    """B10: the patience that a caller states bounds the reading of its body, too."""
    async with FakeUpstream() as upstream, running(tmp_path, upstream.toml()) as proxy:
        start = time.monotonic()
        async with connected(proxy) as (reader, writer):
            writer.write(head(100, X_Request_Timeout_Ms="300") + b"{")
            async with asyncio.timeout(SOON_S):
                line = await reader.readline()
        took_s = time.monotonic() - start

    assert int(line.split()[1]) in (408, 504)
    assert 0.2 < took_s < 2.0


# --- B: who asks, and what is told ---


@pytest.mark.parametrize(
    ("lines", "is_quoted"),
    [
        ('api_key_env = "sk-secret-1234"', False),
        ('api_key_env = "sk_secret_1234"', False),
        ('api_key_env = "sk/secret-1234"', False),
        ('api_key_env = "sk-secret-1234"\napi_key_file = "/nowhere/key"', False),
        ('api_key_env = ["sk-secret-1234"]', False),
        ('api_key_env = "GIVEN_BUT_BAD"', False),
        ('api_key_file = "sk-secret-1234"', False),
        ('api_key_file = ["sk-secret-1234"]', False),
        ('api_key_file = "/nowhere/sk-secret-1234"', True),
        ('api_key_file = "./sk-secret-1234"', True),
    ],
)
def test_key_in_the_place_of_its_name(tmp_path: Path, lines: str, is_quoted: bool) -> None:
    """B9: a problem with a key's place never quotes api_key_env, and api_key_file only where it looks like a path."""
    path = tmp_path / "settings.toml"
    path.write_text(
        f'[upstreams.u]\nkind = "openai"\nprofile = "openai"\nbase_url = "http://127.0.0.1:9/v1"\n{lines}\n'
        '[models.m]\nupstreams = ["u"]\n',
        encoding="utf-8",
    )

    with pytest.raises(config.ConfigError) as caught:
        config.load(str(path), {"GIVEN_BUT_BAD": "sk-secret-1234 and more"})

    assert "upstreams.u.api_key_" in str(caught.value)
    assert bool(re.search("secret.1234", str(caught.value))) is is_quoted


def test_key_in_the_place_of_its_name_in_the_environment() -> None:
    """B9: the same holds where the environment says api_key_env."""
    environ = {
        "EMBEDDING_SIDECAR__UPSTREAMS__U__KIND": "openai",
        "EMBEDDING_SIDECAR__UPSTREAMS__U__PROFILE": "openai",
        "EMBEDDING_SIDECAR__UPSTREAMS__U__API_KEY_ENV": "sk-secret-1234",
        "EMBEDDING_SIDECAR__MODELS__M__UPSTREAMS": "u",
    }

    with pytest.raises(config.ConfigError) as caught:
        config.load(None, environ)

    assert "upstreams.u.api_key_env" in str(caught.value)
    assert "secret-1234" not in str(caught.value)


async def test_caller_that_names_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """B12: X-Embedding-Client refines the name that key or connection give a caller, and replaces it nowhere."""
    key = {"Authorization": f"Bearer {KEY}"}
    async with FakeUpstream() as upstream, running(tmp_path, upstream.toml() + ALICE) as proxy:
        await proxy.embed({"input": "x"}, headers={**key, "X-Request-Id": "r1", "X-Embedding-Client": "bob"})
        await proxy.embed({"input": "x"}, headers={**key, "X-Request-Id": "r2"})
        await proxy.embed(
            {"input": "x"}, headers={**key, "X-Request-Id": "r3", "X-Embedding-Client": "bob"}, is_unix=True
        )
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    callers = {line["request_id"]: line["caller"] for line in lines if line["event"] == "request"}

    assert callers == {"r1": "alice/bob", "r2": "alice", "r3": "alice/bob"}


HERE = ["localhost", "localhost:1", "LOCALHOST:8484", "127.0.0.1", "127.0.0.1:8484", "[::1]", "[::1]:8484"]
ELSEWHERE = [
    "evil.example",
    "evil.example:8484",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evil.example:127.0.0.1",
    "10.0.0.1:8484",
    "[::2]:8484",
]


async def test_host_of_a_page_that_points_its_name_to_us(tmp_path: Path) -> None:
    """B14: over TCP without client keys only a Host that means this machine is served; the Unix socket asks nobody."""
    async with FakeUpstream() as upstream, running(tmp_path, upstream.toml()) as proxy:
        tcp = {host: await proxy.embed({"input": "x"}, headers={"Host": host}) for host in HERE + ELSEWHERE}
        unix = {host: await proxy.embed({"input": "x"}, headers={"Host": host}, is_unix=True) for host in ELSEWHERE}
        async with proxy.tcp.get("/v1/models", headers={"Host": "evil.example"}) as answer:
            models = answer.status, (await answer.json())["error"]["code"]

    assert {host: found[0] for host, found in tcp.items()} == {
        **dict.fromkeys(HERE, 200),
        **dict.fromkeys(ELSEWHERE, 403),
    }
    assert {tcp[host][1]["error"]["code"] for host in ELSEWHERE} == {"host_not_allowed"}
    assert {found[0] for found in unix.values()} == {200}
    assert models == (403, "host_not_allowed")


async def test_any_host_with_a_client_key(tmp_path: Path) -> None:
    """B14: where client keys are configured, the key decides and Host does not matter."""
    async with FakeUpstream() as upstream, running(tmp_path, upstream.toml() + ALICE) as proxy:
        key = {"Authorization": f"Bearer {KEY}"}
        found = [(await proxy.embed({"input": "x"}, headers={**key, "Host": host}))[0] for host in HERE + ELSEWHERE]
        without, _, _ = await proxy.embed({"input": "x"}, headers={"Host": "evil.example"})

    assert set(found) == {200}
    assert without == 401


async def test_own_width_of_a_model_that_declares_none(tmp_path: Path) -> None:
    """B15: a learned width may be asked for, is listed, and shares the cache with requests that ask for none."""
    async with FakeUpstream() as upstream, running(tmp_path, upstream.toml()) as proxy:
        asked, document, headers = await proxy.embed({"input": ["x"], "dimensions": 8})
        plain, _, plain_headers = await proxy.embed({"input": ["x"]})
        other, refused, _ = await proxy.embed({"input": ["x"], "dimensions": 4})
        _, models = await proxy.get("/v1/models")

    assert asked == 200, document
    assert is_right(document, "x")
    assert (plain, plain_headers["X-Embedding-Cache"]) == (200, "hit")
    assert headers["X-Embedding-Space"] == plain_headers["X-Embedding-Space"]
    assert (other, refused["error"]["code"]) == (400, "unsupported_dimensions")
    assert [model["dimensions"] for model in models["data"]] == [[8]]


async def test_model_exchanged_while_its_upstream_is_down_at_the_reload(tmp_path: Path) -> None:
    """A2: where the new pipeline has not yet seen the vectors of a space, the cached ones of before are forgotten."""
    often = "[lifecycle]\ncanary_interval_s = 0.1\ncanary_retry_s = 0.05\n[attempt]\nmax_attempts = 1\n"
    async with FakeUpstream(has_base64=False) as upstream, running(tmp_path, often + upstream.toml()) as proxy:
        _, old, _ = await proxy.embed({"input": ["hello"]})
        upstream.spare_canary, upstream.always = False, Fault(change=mirrored)

        async def is_ready() -> bool:
            return (await proxy.get("/readyz"))[0] == 200

        async def is_refused() -> bool:
            return not await is_ready()

        await until(is_refused)
        upstream.always = Fault(status=503)
        outcome = await reloaded(proxy, often + upstream.toml())
        upstream.always = Fault(change=mirrored)
        await until(is_ready)
        status, new, headers = await proxy.embed({"input": ["hello"]})

    assert outcome == "done"
    assert (status, headers["X-Embedding-Cache"]) == (200, "miss")
    assert (rows(new) == rows(old)[:, ::-1]).all()
