"""Embedding as a service: initialised, watched and shut down by a manager that knows nothing of it."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from rag_adapter.client import EmbeddingClient
from rag_adapter.errors import DeadlineExceeded, EmbeddingError, InvalidInput, SidecarUnavailable, Unavailable
from rag_adapter.service import EmbeddingService
from rag_adapter.supervise import State, SupervisedSidecar
from tests.fakes.sidecar import ROOT, Sidecar

# --- a manager as apps have one ---


@dataclass
class Registered:
    service_type: str
    dependencies: list[str]
    health_check: Callable[[Any], bool]
    init_func: Callable[[], Awaitable[Any]]
    shutdown_func: Callable[[Any], Awaitable[None]]


class ServiceManager:
    """Initialises in the order of dependencies, checks health, shuts down in reverse."""

    def __init__(self) -> None:
        self._registered: dict[str, Registered] = {}
        self.instances: dict[str, Any] = {}

    def register_service(
        self,
        name: str,
        service_type: str,
        dependencies: list[str],
        health_check: Callable[[Any], bool],
        init_func: Callable[[], Awaitable[Any]],
        shutdown_func: Callable[[Any], Awaitable[None]],
    ) -> None:
        self._registered[name] = Registered(service_type, dependencies, health_check, init_func, shutdown_func)

    async def initialize(self) -> None:
        order = TopologicalSorter({name: each.dependencies for name, each in self._registered.items()})
        try:
            for name in order.static_order():
                self.instances[name] = await self._registered[name].init_func()
        except BaseException:
            await self.shutdown()
            raise

    def health(self) -> dict[str, bool]:
        return {name: self._registered[name].health_check(instance) for name, instance in self.instances.items()}

    async def shutdown(self) -> None:
        while self.instances:
            name, instance = self.instances.popitem()
            await self._registered[name].shutdown_func(instance)


class Database:
    """Another service, which notes what is done to it."""

    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name
        self.is_open = True
        log.append(f"{name} opened")

    async def close(self) -> None:
        self.is_open = False
        self._log.append(f"{self._name} closed")

    @classmethod
    def register(cls, manager: ServiceManager, log: list[str], name: str, dependencies: list[str]) -> None:
        async def init() -> Database:
            return cls(log, name)

        manager.register_service(name, "storage", dependencies, lambda it: it.is_open, init, cls.close)


# --- the rest of the world ---


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: a socket's path is bounded."""
    with tempfile.TemporaryDirectory(prefix="es-") as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nobody serves where the adapter looks, unless the test starts somebody."""
    for name in list(os.environ):
        if name.startswith(("EMBEDDING_", "OPENAI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("EMBEDDING_SIDECAR_SOCKET", str(folder / "s.sock"))


class ScriptedClient(EmbeddingClient):
    """A client whose sidecar is played by the test."""

    def __init__(self) -> None:
        super().__init__("/nobody.sock")
        self.is_well = True
        self.asked = 0
        self.error: EmbeddingError | None = None

    async def wait_until_ready(self, timeout_s: float) -> None:
        pass

    async def is_ready(self) -> bool:
        self.asked += 1
        return self.is_well

    async def embed(self, text: str, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        return [1.0]

    embed_many = embed  # type: ignore[assignment]


@pytest.fixture
async def scripted() -> AsyncIterator[tuple[EmbeddingService, ScriptedClient]]:
    """A service that asks by itself hardly ever."""
    client = ScriptedClient()
    async with EmbeddingService(client=client, check_interval_s=3600) as service:
        yield service, client


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.005)


# --- with a manager and the real proxy ---


async def test_life_under_a_manager(folder: Path) -> None:
    """One line registers it; initialised after what it needs, healthy, killed, healthy again, shut down in reverse."""
    log: list[str] = []
    manager = ServiceManager()
    Database.register(manager, log, "index", ["embedding"])
    manager.register_service(*EmbeddingService.registration(dependencies=["database"], supervise=True))
    Database.register(manager, log, "database", [])

    await manager.initialize()
    service: EmbeddingService = manager.instances["embedding"]
    order = list(manager.instances)
    healthy = manager.health()
    vectors = await service.embed_many(["one", "two"])
    first = await service.embed("one")
    before = service.snapshot()
    assert before.supervision is not None
    assert before.supervision.pid is not None

    os.kill(before.supervision.pid, signal.SIGKILL)
    await until(lambda: not manager.health()["embedding"])
    unhealthy = manager.health()
    during = await service.embed("two")  # waits for the restart
    await until(lambda: manager.health()["embedding"])
    after = service.snapshot()
    assert after.supervision is not None
    await manager.shutdown()

    assert order == ["database", "embedding", "index"]
    assert healthy == {"database": True, "embedding": True, "index": True}
    assert unhealthy == {"database": True, "embedding": False, "index": True}
    assert len(vectors) == 2
    assert first == pytest.approx(vectors[0])
    assert during == pytest.approx(vectors[1])
    assert (before.supervision.state, before.supervision.restarts) == (State.READY, 0)
    assert (after.supervision.restarts, after.supervision.last_exit) == (1, -signal.SIGKILL)
    assert after.is_healthy
    assert after.client.texts == 4
    assert log == ["database opened", "index opened", "index closed", "database closed"]
    assert not service.is_healthy()
    assert not (folder / "s.sock").exists()


async def test_init_fails(folder: Path) -> None:
    """The error says why the proxy cannot start, and what was there already is shut down."""
    (folder / "settings.toml").write_text("[listen]\nbacklog = 0\n")
    log: list[str] = []
    manager = ServiceManager()
    Database.register(manager, log, "database", [])
    Database.register(manager, log, "index", ["embedding"])
    sidecar = SupervisedSidecar(config=str(folder / "settings.toml"))
    manager.register_service(*EmbeddingService.registration(dependencies=["database"], sidecar=sidecar))
    with pytest.raises(SidecarUnavailable, match=r"listen\.backlog = 0"):
        await manager.initialize()

    assert log == ["database opened", "database closed"]
    assert manager.instances == {}
    assert sidecar.snapshot().state == State.STOPPED


async def test_sidecar_of_somebody_else() -> None:
    """Where it runs already, it is used and left alone, over TCP too; asked for or not, nothing is started."""
    with Sidecar() as running:
        found = []
        for supervise in (False, True, "auto"):
            async with EmbeddingService(running.socket_path, supervise=supervise) as service:
                snapshot = service.snapshot()
                found.append((await service.check_health(), snapshot.supervision and snapshot.supervision.state))
        async with EmbeddingService(f"http://{running.address}", supervise="auto") as service:
            found.append((await service.check_health(), service.sidecar))
        is_left = running.get("/livez")[0]

    assert found == [(True, None), (True, State.ATTACHED), (True, State.ATTACHED), (True, None)]
    assert is_left == 200


async def test_nobody_serves() -> None:
    """Without supervision a sidecar that is not there is told when the patience is over."""
    service = EmbeddingService(ready_timeout_s=0.1)
    with pytest.raises(SidecarUnavailable, match=r"no sidecar at .*: start it with `embedding-sidecar run`"):
        await service.start()

    assert not service.is_healthy()


def test_supervision_over_tcp() -> None:
    """TCP may lead to another machine: there nothing can be started, and whoever wants it is told at once."""
    with pytest.raises(ValueError, match="needs a Unix socket"):
        EmbeddingService("http://127.0.0.1:8484", supervise=True)


# --- registration ---


async def test_registration_by_name() -> None:
    """The six fields have the names that managers use; the words are the app's."""
    kind = object()
    fields = EmbeddingService.registration("vectors", kind, ("a", "b"))._asdict()
    manager = ServiceManager()
    manager.register_service(**fields)

    assert list(fields) == ["name", "service_type", "dependencies", "health_check", "init_func", "shutdown_func"]
    assert fields["service_type"] is kind
    assert fields["dependencies"] == ["a", "b"]


async def test_registration_for_a_manager_that_awaits() -> None:
    """Health can be awaited as well, and then it is asked, not remembered."""
    client = ScriptedClient()
    registered = EmbeddingService.registration(is_health_awaited=True, client=client)
    instance = await registered.init_func()
    client.is_well = False
    is_healthy = await registered.health_check(instance)
    await registered.shutdown_func(instance)

    assert is_healthy is False
    assert client.asked == 1


# --- health ---


Scripted = tuple[EmbeddingService, ScriptedClient]


async def test_health_while_nothing_is_embedded() -> None:
    """The sidecar is asked now and then."""
    client = ScriptedClient()
    async with EmbeddingService(client=client, check_interval_s=0.01) as service:
        seen = [service.is_healthy()]
        client.is_well = False
        await until(lambda: not service.is_healthy())
        client.is_well = True
        await until(service.is_healthy)
        seen.append(service.is_healthy())

    assert seen == [True, True]


async def test_embedding_finds_nobody(scripted: Scripted) -> None:
    """Traffic tells at once; what is wrong is looked at again soon, however seldom it is looked at otherwise."""
    service, client = scripted
    client.error, client.is_well = SidecarUnavailable("gone"), False
    with pytest.raises(SidecarUnavailable):
        await service.embed("a text")
    at_once = service.is_healthy()
    client.is_well = True
    await until(service.is_healthy)

    assert not at_once


async def test_embedding_works_again(scripted: Scripted) -> None:
    """One that went well is the best evidence: better than a /readyz that wants every model."""
    service, client = scripted
    client.is_well = False
    await service.check_health()
    before = service.is_healthy()
    await service.embed("a text")

    assert not before
    assert service.is_healthy()


@pytest.mark.parametrize("error", [Unavailable("busy"), DeadlineExceeded("late")])
@pytest.mark.parametrize("is_well", [True, False])
async def test_embedding_fails_for_unclear_reasons(scripted: Scripted, error: EmbeddingError, is_well: bool) -> None:
    """It may be the load, or the one model: the sidecar is asked at once."""
    service, client = scripted
    client.error, client.is_well = error, is_well
    with pytest.raises(type(error)):
        await service.embed_many(["a text"])
    at_once = service.is_healthy()
    await until(lambda: client.asked > 0)

    assert at_once
    assert service.is_healthy() == is_well


async def test_text_is_wrong(scripted: Scripted) -> None:
    """That says nothing about the service."""
    service, client = scripted
    client.error = InvalidInput("empty")
    with pytest.raises(InvalidInput):
        await service.embed("")

    assert service.is_healthy()
    assert not service._doubted.is_set()


async def test_storm_of_failures(scripted: Scripted) -> None:
    """A thousand failures are a question or two, not a thousand."""
    service, client = scripted
    client.error = Unavailable("busy")
    for _ in range(1000):
        with pytest.raises(Unavailable):
            await service.embed("a text")
        await asyncio.sleep(0)

    assert client.asked < 100


async def test_started_twice_and_stopped_twice(scripted: Scripted) -> None:
    """Neither does harm; a call that comes back after the end does not make it healthy."""
    service, _ = scripted
    await service.start()
    await service.stop()
    await service.stop()
    await service.embed("a text")

    assert not service.is_healthy()
