"""States, pages and observers of one process; whole journeys are in tests/route."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from proxy.base.events import Event, LifecycleMoved
from proxy.wiring.config import ConfigError
from proxy.wiring.lifecycle import Lifecycle, observers
from proxy.wiring.server import ListenError
from tests.fakes.running import Running, running
from tests.fakes.upstream import FakeUpstream, Fault

FACT = LifecycleMoved("ready")


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something is so; whether it ever is, is the test."""
    async with asyncio.timeout(10):
        while not await is_so():
            await asyncio.sleep(0.01)


async def is_gone(path: str) -> bool:
    """Whether the drain has begun: it removes the path first."""
    return not os.path.exists(path)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


# --- observers ---


class Deaf:
    """An observer that raises."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, event: Event) -> None:
        self.calls += 1
        raise ZeroDivisionError("a text of a caller")


def test_all_observers_are_told() -> None:
    """Each observer hears each fact, in order."""
    first: list[Event] = []
    second: list[Event] = []
    observe = observers(first.append, second.append)
    observe(FACT)
    observe(LifecycleMoved("draining"))

    assert first == second == [FACT, LifecycleMoved("draining")]


def test_observer_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """An observer that raises is dropped after one line that names it, and the others go on to hear."""
    deaf, before, after = Deaf(), list[Event](), list[Event]()
    observe = observers(before.append, deaf, after.append)
    with caplog.at_level("INFO", "embedding_sidecar"):
        observe(FACT)
        observe(FACT)

    assert deaf.calls == 1
    assert before == after == [FACT, FACT]
    assert [record.message for record in caplog.records] == ["an observer failed and is dropped"]
    assert caplog.records[0].levelname == "ERROR"
    assert caplog.records[0].fields == {  # type: ignore[attr-defined]
        "observer": "Deaf",
        "fact": "LifecycleMoved",
        "error": "ZeroDivisionError",
    }


def test_all_observers_fail() -> None:
    """Where nobody is left to listen, facts are told to nobody."""
    deaf = [Deaf(), Deaf()]
    observe = observers(*deaf)
    observe(FACT)
    observe(FACT)

    assert [each.calls for each in deaf] == [1, 1]


# --- pages ---


async def test_pages_when_ready(tmp_path: Path) -> None:
    """Every page answers: alive, ready with the models, metrics, status with all stages, and the document."""
    async with FakeUpstream() as fake, running(tmp_path, fake.toml()) as proxy:
        alive, ready = await proxy.get("/livez"), await proxy.get("/readyz")
        metrics, status = await proxy.get("/metrics"), await proxy.get("/status")
        document = await proxy.get("/openapi.json")

    assert alive == (200, {"status": "alive"})
    assert (ready[0], ready[1]["status"], ready[1]["reasons"]) == (200, "ready", [])
    assert ready[1]["models"]["m"]["dimensions"] == 8
    assert metrics[0] == 200
    assert "embedding_sidecar_ready 1.0" in metrics[1]
    assert status[0] == 200
    assert status[1]["version"] == version("embedding-sidecar")
    assert status[1]["state"] == "ready"
    assert status[1]["uptime_s"] >= 0
    assert status[1]["connections"] == 1
    assert status[1]["listeners"] == [f"unix:{proxy.socket_path}", f"tcp:{proxy.address}"]
    assert next(iter(status[1]["stages"])) == "admission"
    assert document[0] == 200


async def test_pages_and_client_keys(tmp_path: Path) -> None:
    """With client keys only the pages that tell nothing worth hiding are open."""
    async with FakeUpstream() as fake:
        toml = f'{fake.toml()}[callers.app]\nkey_sha256 = "{"0" * 64}"\n'
        async with running(tmp_path, toml) as proxy:
            statuses = {
                path: (await proxy.get(path))[0]
                for path in ("/livez", "/readyz", "/openapi.json", "/metrics", "/status")
            }

    assert statuses == {"/livez": 200, "/readyz": 200, "/openapi.json": 200, "/metrics": 401, "/status": 401}


# --- states ---


async def test_from_unready_to_ready(tmp_path: Path) -> None:
    """While no canary is right it is alive and not ready, and says why; a right one makes it ready."""
    async with FakeUpstream() as fake:
        fake.spare_canary = False
        fake.always = Fault(status=503)
        toml = fake.toml() + "[lifecycle]\ncanary_retry_s = 0.05\ncanary_interval_s = 0.1\n"
        async with running(tmp_path, toml) as proxy:
            alive, ready = await proxy.get("/livez"), await proxy.get("/readyz")
            state = (await proxy.get("/status"))[1]["state"]
            status, body, _ = await proxy.embed({"model": "m", "input": "a"})
            fake.always = Fault()
            await until(lambda: is_in_state(proxy, "ready"))
            after = await proxy.get("/readyz")

    assert alive[0] == 200
    assert ready[0] == 503
    assert ready[1]["reasons"] == ["model m: fake: upstream 'fake' answered HTTP 503"]
    assert state == "unready"
    assert (status, body["error"]["code"]) == (503, "no_upstream")
    assert after[0] == 200


async def is_in_state(proxy: Running, state: str) -> bool:
    return (await proxy.get("/status"))[1]["state"] == state


async def test_from_ready_to_unready(tmp_path: Path) -> None:
    """An upstream that starts to give other vectors makes it unready: a wrong vector is worse than none."""
    async with FakeUpstream(width=8) as fake:
        toml = fake.toml(dimensions=8) + "[lifecycle]\ncanary_interval_s = 0.1\n"
        async with running(tmp_path, toml) as proxy:
            before = await proxy.get("/readyz")
            fake.width = 6
            await until(lambda: is_in_state(proxy, "unready"))
            after = await proxy.get("/readyz")

    assert before[0] == 200
    assert after[0] == 503
    assert after[1]["reasons"] == ["model m: fake: its vectors have 6 numbers, the model's have 8"]


async def test_readiness_while_draining(tmp_path: Path) -> None:
    """While it drains it is alive and not ready, on connections that are still open; then the process is over."""
    async with FakeUpstream() as fake:
        async with running(tmp_path, fake.toml() + "[lifecycle]\ndrain_linger_s = 10\n") as proxy:
            await proxy.get("/livez")
            async with proxy.unix.get("/livez"):
                pass
            proxy.lifecycle.stop()
            await until(lambda: is_gone(proxy.socket_path))
            status, body = await proxy.get("/readyz")
            async with proxy.unix.get("/status") as answer:
                state = (await answer.json())["state"]
                close = answer.headers["Connection"]

    assert status == 503
    assert body["status"] == "not ready"
    assert body["reasons"] == ["draining"]
    assert (state, close) == ("draining", "close")


async def test_states_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each state is one line, in order, and the listeners are told with their addresses."""
    async with FakeUpstream() as fake, running(tmp_path, fake.toml()) as proxy:
        address, path = proxy.address, proxy.socket_path
    told = lines(capsys.readouterr().err)

    moves = ("starting", "listening", "ready", "unready", "draining", "stopped")
    assert [line["event"] for line in told if line["event"] in moves] == [
        "starting",
        "listening",
        "ready",
        "draining",
        "stopped",
    ]
    assert told[0]["detail"] == version("embedding-sidecar")
    assert [line["listeners"] for line in told if line["event"] == "listening"] == [[f"unix:{path}", f"tcp:{address}"]]


# --- the cache's bound ---


async def test_bound_of_the_cache(tmp_path: Path) -> None:
    """The cache has the bound of the settings in force: from the start, and another one after a reload."""

    async def cache() -> dict[str, Any]:
        return (await proxy.get("/status"))[1]["stages"]["cache"]

    async with FakeUpstream() as fake:
        async with running(tmp_path, fake.toml() + "[cache]\nmax_bytes = 5000\n") as proxy:
            await proxy.embed({"model": "m", "input": "a"})
            before = await cache()
            proxy.path.write_text(fake.toml() + "[cache]\nmax_bytes = 100\n", encoding="utf-8")
            proxy.lifecycle.reload()

            async def is_smaller() -> bool:
                return (await cache())["max_bytes"] == 100

            await until(is_smaller)
            after = await cache()

    assert (before["max_bytes"], before["entries"]) == (5000, 1)
    assert after["entries"] == 0


# --- starts that fail ---


def lifecycle(path: Path | None, environ: dict[str, str]) -> Lifecycle:
    def greet(*_: object) -> None:
        raise AssertionError("nobody is greeted before the start")

    return Lifecycle(str(path) if path else None, environ, greet=greet)


async def test_start_with_bad_settings(tmp_path: Path) -> None:
    """Bad settings end the start before anything is opened or said."""
    variables = {
        "EMBEDDING_SIDECAR__LISTEN__SOCKET": str(tmp_path / "s"),
        "EMBEDDING_SIDECAR__LISTEN__BACKLOG": "none",
    }
    with pytest.raises(ConfigError):
        await lifecycle(None, variables).run()

    assert os.listdir(tmp_path) == []


async def test_start_on_a_taken_port(tmp_path: Path) -> None:
    """A listener that cannot be opened ends the start, and leaves nothing behind."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        variables = {
            "EMBEDDING_SIDECAR__LISTEN__SOCKET": str(tmp_path / "s"),
            "EMBEDDING_SIDECAR__LISTEN__TCP": f"127.0.0.1:{taken.getsockname()[1]}",
        }
        with pytest.raises(ListenError):
            await lifecycle(None, variables).run()

    assert os.listdir(tmp_path) == []


async def test_stop_before_the_first_canary_is_back(tmp_path: Path) -> None:
    """Whoever stops it while it starts does not wait for an upstream that does not answer."""
    async with FakeUpstream() as fake:
        fake.spare_canary = False
        fake.always = Fault(hang=True)
        path = tmp_path / "settings.toml"
        path.write_text(fake.toml(), encoding="utf-8")
        variables = {"EMBEDDING_SIDECAR__LISTEN__SOCKET": str(tmp_path / "s"), "EMBEDDING_SIDECAR__LISTEN__TCP": "off"}
        it = lifecycle(path, variables)
        run = asyncio.create_task(it.run())
        async with asyncio.timeout(10):
            while not fake.seen:
                await asyncio.sleep(0.01)
            it.stop(is_hasty=True)
            await run

    assert sorted(os.listdir(tmp_path)) == ["settings.toml"]


# --- signals ---


async def test_signals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGHUP reads the settings again; SIGTERM drains and lets idle connections linger; both are heard by the loop."""
    loop = asyncio.get_running_loop()
    async with FakeUpstream() as fake:
        async with running(tmp_path, fake.toml() + "[lifecycle]\ndrain_linger_s = 0.2\n") as proxy:
            proxy.lifecycle.handle_signals()
            try:
                os.kill(os.getpid(), signal.SIGHUP)

                async def is_reloaded() -> bool:
                    return 'reloads_total{result="done"} 1.0' in (await proxy.get("/metrics"))[1]

                await until(is_reloaded)
                os.kill(os.getpid(), signal.SIGTERM)
                await until(lambda: is_gone(proxy.socket_path))
                status, _ = await proxy.get("/readyz")
            finally:
                for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                    loop.remove_signal_handler(number)

    assert status == 503
    assert "reloaded" in [line["event"] for line in lines(capsys.readouterr().err)]
