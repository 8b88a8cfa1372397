"""P6: a reload, a drain and a hand-over of the listening sockets lose no request, under load on both listeners."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import aiohttp
import pytest

from tests.fakes.load import Load
from tests.fakes.running import running
from tests.fakes.sidecar import ROOT, Sidecar, python
from tests.fakes.upstream import FakeUpstream, Fault


@contextlib.asynccontextmanager
async def started(sidecar: Sidecar):
    """Start a process without holding up this loop, which serves its upstream."""
    await asyncio.to_thread(sidecar.__enter__)
    try:
        yield sidecar
    finally:
        await asyncio.to_thread(sidecar.__exit__)


async def event(sidecar: Sidecar, name: str, count: int = 1) -> dict:
    """Wait until the log has `count` lines of an event; returns the last."""
    async with asyncio.timeout(30):
        while True:
            lines = [line for line in sidecar.lines() if line["event"] == name]
            if len(lines) >= count:
                return lines[-1]
            await asyncio.sleep(0.02)


async def test_reload_under_load_loses_nothing() -> None:
    """SIGHUP swaps the pipeline; every request before, during and after it gets its vector."""
    async with FakeUpstream() as upstream, started(Sidecar(upstream.toml())) as sidecar:
        async with Load(sidecar.address, sidecar.socket_path) as load:
            for n in range(1, 6):
                await load.more(100)
                sidecar.configure(upstream.toml() + f'[models.new{n}]\nupstreams = ["fake"]\n')
                sidecar.signal(signal.SIGHUP)
                await event(sidecar, "reloaded", n)
            await load.more(100)
        _, models = await asyncio.to_thread(sidecar.get, "/v1/models")

    assert load.failures == []
    assert set(load.answered) == {f"{how} {where}" for how in ("pooled", "fresh", "bare") for where in ("tcp", "unix")}
    assert [model["id"] for model in json.loads(models)["data"]] == ["m", "new5"]


async def test_bad_file_changes_nothing() -> None:
    """A reload that cannot be done says every reason, and the old settings go on serving."""
    async with FakeUpstream() as upstream, started(Sidecar(upstream.toml())) as sidecar:
        async with Load(sidecar.address, sidecar.socket_path) as load:
            await load.more(50)
            sidecar.configure(upstream.toml().replace("kind", "knid") + "[cache]\nmax_bytes = -1\n")
            sidecar.signal(signal.SIGHUP)
            refused = await event(sidecar, "reload refused, nothing changed")
            await load.more(50)

    assert load.failures == []
    assert "upstreams.fake.knid: no such setting; did you mean 'kind'?" in refused["problem"]
    assert "cache.max_bytes = -1" in refused["problem"]


async def test_new_pipeline_that_cannot_be_proven_is_not_swapped_in() -> None:
    """Settings that are well-formed but lead nowhere are refused by the canary; nothing is lost."""
    async with FakeUpstream() as upstream, FakeUpstream(width=16) as other:
        async with started(Sidecar(upstream.toml(dimensions=8))) as sidecar:
            async with Load(sidecar.address, sidecar.socket_path) as load:
                await load.more(50)
                sidecar.configure(other.toml(dimensions=8))
                sidecar.signal(signal.SIGHUP)
                refused = await event(sidecar, "reload refused, nothing changed")
                await load.more(50)

    assert load.failures == []
    assert refused["problem"] == "model m: fake: its vectors have 16 numbers, the model's have 8"


async def test_cached_vectors_survive_a_reload(tmp_path: Path) -> None:
    """A key names its vector space, so the store may outlive the pipeline."""
    async with FakeUpstream() as upstream, running(tmp_path, upstream.toml()) as proxy:
        await proxy.embed({"input": "kept"})
        proxy.path.write_text(upstream.toml() + '[models.new]\nupstreams = ["fake"]\nspace = "other"\n')
        proxy.lifecycle.reload()
        async with asyncio.timeout(10):
            while len((await proxy.get("/v1/models"))[1]["data"]) < 2:
                await asyncio.sleep(0.01)
        kept = await proxy.embed({"input": "kept", "model": "m"})
        other = await proxy.embed({"input": "kept", "model": "new"})

    assert kept[2]["X-Embedding-Cache"] == "hit"
    assert other[2]["X-Embedding-Cache"] == "miss"


async def test_request_inside_outlives_a_reload(tmp_path: Path) -> None:
    """The old pipeline finishes what is inside it before it closes."""
    async with FakeUpstream() as upstream, running(tmp_path, upstream.toml()) as proxy:
        gate = asyncio.Event()
        upstream.script = [Fault(wait_for=gate)]
        slow = asyncio.create_task(proxy.embed({"input": "slow"}))
        while not upstream.inside:
            await asyncio.sleep(0.01)
        proxy.path.write_text(upstream.toml(aliases=["new"]))
        proxy.lifecycle.reload()
        async with asyncio.timeout(10):
            while (await proxy.get("/v1/models/new"))[0] != 200:
                await asyncio.sleep(0.01)
        gate.set()
        status, _, _ = await slow

    assert status == 200


async def test_settings_that_need_a_restart_are_named() -> None:
    """A reload takes what it can and names what waits for the next start."""
    async with FakeUpstream() as upstream, started(Sidecar(upstream.toml())) as sidecar:
        sidecar.configure(upstream.toml() + "[listen]\nbacklog = 7\nbody_timeout_s = 3\n")
        sidecar.signal(signal.SIGHUP)
        line = await event(sidecar, "changed in the file, but takes a restart")

    assert line["keys"] == "listen.backlog"


async def test_hand_over_of_the_listening_sockets_loses_nothing(tmp_path: Path) -> None:
    """
    A successor on the same sockets takes over while the old one drains: nobody notices.

    The sockets are held by this test and handed to both processes as systemd does (LISTEN_FDS).
    """
    unix, tcp = socket.socket(socket.AF_UNIX), socket.socket()
    unix.bind(str(tmp_path / "held.sock"))
    tcp.bind(("127.0.0.1", 0))
    for sock in (unix, tcp):
        sock.listen(1024)
    toml = "[lifecycle]\ndrain_linger_s = 1.0\n"
    async with FakeUpstream() as upstream, contextlib.AsyncExitStack() as stack:
        old = await stack.enter_async_context(started(Sidecar(toml + upstream.toml(), sockets=(unix, tcp))))
        async with Load(old.address, old.socket_path) as load:
            for _ in range(3):
                await load.more(200)
                new = await stack.enter_async_context(started(Sidecar(toml + upstream.toml(), sockets=(unix, tcp))))
                await load.more(100)
                old.signal(signal.SIGTERM)
                code = await asyncio.to_thread(old.wait)
                assert code == 0
                await load.more(100)
                old = new
        served = [line for line in new.lines() if line["event"] == "request"]
    for sock in (unix, tcp):
        sock.close()

    assert load.failures == []
    assert len(served) >= 100
    assert min(load.answered.values()) > 10


async def test_drain_answers_what_is_inside_and_what_still_arrives(tmp_path: Path) -> None:
    """
    After SIGTERM: readiness falls, open connections are still answered and told to close, new ones are refused, and
    the process ends when the last request is answered.
    """
    async with FakeUpstream() as upstream:
        toml = upstream.toml() + "[lifecycle]\ndrain_linger_s = 30\n"
        async with started(Sidecar(toml)) as sidecar:
            gate = asyncio.Event()
            upstream.script = [Fault(), Fault(wait_for=gate)]
            async with aiohttp.ClientSession(f"http://{sidecar.address}") as session:

                async def embed(text: str) -> tuple[int, str]:
                    async with session.post("/v1/embeddings", json={"input": text}) as answer:
                        await answer.read()
                        return answer.status, answer.headers.get("Connection", "")

                idle = aiohttp.ClientSession(f"http://{sidecar.address}")
                async with idle.post("/v1/embeddings", json={"input": "first"}) as answer:
                    first = answer.status, answer.headers.get("Connection", "")
                    await answer.read()
                inside = asyncio.create_task(embed("inside"))
                while not upstream.inside:
                    await asyncio.sleep(0.01)
                sidecar.signal(signal.SIGTERM)
                await event(sidecar, "draining")
                async with idle.get("/readyz") as answer:
                    ready = answer.status, await answer.json(), answer.headers.get("Connection", "")
                with pytest.raises(aiohttp.ClientConnectorError):
                    await embed("too late")
                gate.set()
                answered = await inside
                await idle.close()
            code = await asyncio.to_thread(sidecar.wait)

    assert first == (200, "")
    assert (ready[0], ready[1]["reasons"], ready[2]) == (503, ["draining"], "close")
    assert answered == (200, "close")
    assert code == 0


async def test_drain_ends_at_its_bound(tmp_path: Path) -> None:
    """A request that never ends does not keep the process: its caller is cut off after drain_timeout_s."""
    async with FakeUpstream() as upstream:
        upstream.always = Fault(hang=True)
        toml = upstream.toml() + "[lifecycle]\ndrain_timeout_s = 0.3\n"
        async with started(Sidecar(toml)) as sidecar, aiohttp.ClientSession() as session:
            stuck = asyncio.create_task(session.post(f"{sidecar.base_url}/embeddings", json={"input": "x"}))
            while not upstream.inside:
                await asyncio.sleep(0.01)
            sidecar.signal(signal.SIGTERM)
            code = await asyncio.to_thread(sidecar.wait)
            with pytest.raises(aiohttp.ClientError):
                await stuck

    assert code == 0


async def test_second_signal_ends_at_once() -> None:
    """Whoever asks twice does not want to wait."""
    async with FakeUpstream() as upstream:
        upstream.always = Fault(hang=True)
        async with started(Sidecar(upstream.toml())) as sidecar, aiohttp.ClientSession() as session:
            stuck = asyncio.create_task(session.post(f"{sidecar.base_url}/embeddings", json={"input": "x"}))
            while not upstream.inside:
                await asyncio.sleep(0.01)
            sidecar.signal(signal.SIGTERM)
            await event(sidecar, "draining")
            sidecar.signal(signal.SIGTERM)
            code = await asyncio.to_thread(sidecar.wait)
            await asyncio.gather(stuck, return_exceptions=True)

    assert code == 128 + signal.SIGTERM


async def test_not_ready_until_the_canary_sings(tmp_path: Path) -> None:
    """While the upstream is down the proxy lives, is not ready, and says why; it becomes ready by itself."""
    async with FakeUpstream() as upstream:
        upstream.spare_canary = False
        upstream.always = Fault(status=500, body={})
        toml = upstream.toml() + "[lifecycle]\ncanary_retry_s = 0.05\n"
        async with running(tmp_path, toml) as proxy:
            alive = await proxy.get("/livez")
            down = await proxy.get("/readyz")
            refused = await proxy.embed({"input": "x"})
            upstream.always = Fault()
            async with asyncio.timeout(20):
                while (await proxy.get("/readyz"))[0] != 200:
                    await asyncio.sleep(0.02)
            served = await proxy.embed({"input": "x"})

    assert alive == (200, {"status": "alive"})
    assert down[0] == 503
    assert down[1]["reasons"] == ["model m: fake: upstream 'fake' answered HTTP 500"]
    assert (refused[0], refused[1]["error"]["code"], refused[2]["Retry-After"]) == (503, "no_upstream", "1")
    assert served[0] == 200


async def test_crash_leaves_a_socket_that_the_next_start_replaces() -> None:
    """kill -9 leaves the path behind; a second start on it serves, and a third one beside it is refused."""
    async with FakeUpstream() as upstream, started(Sidecar(upstream.toml())) as crashed:
        crashed.signal(signal.SIGKILL)
        await asyncio.to_thread(crashed.wait)
        left_behind = os.path.exists(crashed.socket_path)
        environ = {"EMBEDDING_SIDECAR__LISTEN__SOCKET": crashed.socket_path}
        async with started(Sidecar(upstream.toml(), environ=environ)) as second:
            third = await asyncio.to_thread(
                subprocess.run,
                [python(), "-m", "proxy", "run"],
                env={"PYTHONPATH": str(ROOT), "EMBEDDING_SIDECAR_SOCKET": second.socket_path},
                capture_output=True,
                text=True,
            )
            session = aiohttp.ClientSession("http://localhost", connector=aiohttp.UnixConnector(second.socket_path))
            async with session, session.post("/v1/embeddings", json={"input": "x"}) as answer:
                status = answer.status

    assert left_behind
    assert status == 200
    assert third.returncode == 1
    assert f"{crashed.socket_path} is in use" in third.stderr
    assert "Traceback" not in third.stderr


async def test_reload_while_the_upstream_is_down(tmp_path: Path) -> None:
    """An outage of an upstream that the file does not touch is no reason to refuse the rest of the file."""
    async with FakeUpstream() as upstream:
        toml = upstream.toml().replace("[models.m]", "circuit = { failures = 1, open_s = 0.2 }\n[models.m]")
        async with running(tmp_path, toml + "[attempt]\nmax_attempts = 1\n") as proxy:
            upstream.always = Fault(status=500, body={})
            down = await proxy.embed({"input": "x"})
            proxy.path.write_text(toml + "[request]\nmax_inputs = 1\n")
            proxy.lifecycle.reload()
            async with asyncio.timeout(10):
                while (await proxy.embed({"input": ["a", "b"]}))[1]["error"]["code"] != "too_many_inputs":
                    await asyncio.sleep(0.01)
            upstream.always = Fault()
            async with asyncio.timeout(10):
                while (await proxy.embed({"input": "x"}))[0] != 200:
                    await asyncio.sleep(0.02)

    assert down[0] == 502
