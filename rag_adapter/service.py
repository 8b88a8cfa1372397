"""
Embedding as a service of the app: started, watched and shut down by a service manager, or by a lifespan.

For a manager that registers (name, service_type, dependencies, health_check, init_func, shutdown_func), awaits
`init_func()`, reads `health_check(instance)` as a bool and awaits `shutdown_func(instance)`, one line does:

    manager.register_service(*EmbeddingService.registration(dependencies=["database"]))

Nothing is inherited from anybody. docs/service.md has a whole manager, and FastAPI.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rag_adapter.address import find
from rag_adapter.client import EmbeddingClient, Progress
from rag_adapter.errors import EmbeddingError, InvalidInput, SidecarUnavailable
from rag_adapter.supervise import State, SupervisedSidecar, SupervisionSnapshot
from rag_adapter.tally import Snapshot
from rag_adapter.wire import Priority

LOGGER = logging.getLogger("rag_adapter.service")

_UNWELL_S = 0.25
"""While something is wrong, and between any two checks: a restart of the sidecar takes 0.5 to 2 s."""

_UP = frozenset({State.READY, State.ATTACHED})


class Registration(NamedTuple):
    """The six things that a service manager asks for, in its order."""

    name: str
    service_type: Any
    dependencies: list[str]
    health_check: Callable[[EmbeddingService], Any]
    init_func: Callable[[], Awaitable[EmbeddingService]]
    shutdown_func: Callable[[EmbeddingService], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ServiceSnapshot:
    """The service as of now."""

    is_healthy: bool
    supervision: SupervisionSnapshot | None
    """None where the sidecar is somebody else's."""
    client: Snapshot


class EmbeddingService:
    """
    A client, the state of its sidecar, and the sidecar itself where the app runs it.

    Healthy means: texts can be embedded now, by the freshest evidence. That is the last embedding that went through
    this object, and where there has been none for a while, `/readyz`. Belongs to the loop that started it.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        client: EmbeddingClient | None = None,
        sidecar: SupervisedSidecar | None = None,
        supervise: bool | Literal["auto"] = False,
        ready_timeout_s: float = 30.0,
        check_interval_s: float = 2.0,
    ) -> None:
        """
        Args:
            address: where the sidecar is; None: found by the clients' rule.
            client: one of the app's own, with its model or name; closed by `stop()`.
            sidecar: a supervisor of the app's own, with the proxy's settings.
            supervise: start the proxy where nobody serves the socket. `auto`: if the address is a Unix socket, else
                leave it to others.
            ready_timeout_s: `start()` waits this long for a sidecar that is ready.
            check_interval_s: `/readyz` is asked this often while nothing is embedded.

        Raises:
            ValueError: the address is none, or supervision is wanted and it is no Unix socket.
        """
        if sidecar is None and (supervise is True or (supervise == "auto" and find(address).path)):
            sidecar = SupervisedSidecar(address, ready_timeout_s=ready_timeout_s)
        if client is None:
            client = EmbeddingClient(sidecar.socket if sidecar and address is None else address)
        self.client = client
        """Takes everything that a client takes. What goes this way is no evidence of health."""
        self.sidecar = sidecar
        """The supervisor; None where the sidecar is somebody else's."""
        self._ready_timeout_s = ready_timeout_s
        self._check_interval_s = check_interval_s
        self._is_healthy = False
        self._heard_at = -float("inf")
        self._doubted = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    @classmethod
    def registration(
        cls,
        name: str = "embedding",
        service_type: Any = "embedding",
        dependencies: Sequence[str] = (),
        *,
        is_health_awaited: bool = False,
        **options: Any,
    ) -> Registration:
        """
        Return what a service manager asks for: `manager.register_service(*EmbeddingService.registration(...))`.

        Args:
            name: under which others depend on it.
            service_type: the manager's own word for its kind.
            dependencies: names of services that have to be there first.
            is_health_awaited: the manager awaits `health_check(instance)`; otherwise it reads the bool at once.
            options: those of `EmbeddingService`.
        """

        async def init() -> EmbeddingService:
            service = cls(**options)
            await service.start()
            return service

        return Registration(
            name=name,
            service_type=service_type,
            dependencies=list(dependencies),
            health_check=cls.check_health if is_health_awaited else cls.is_healthy,
            init_func=init,
            shutdown_func=cls.stop,
        )

    async def start(self) -> None:
        """
        Return when texts can be embedded.

        Raises:
            SidecarUnavailable, Unavailable, EmbeddingFailed: they cannot, and why; nothing is left behind.
        """
        if self._watcher is not None:
            return
        try:
            if self.sidecar is not None:
                await self.sidecar.start()
            await self.client.wait_until_ready(self._ready_timeout_s)
        except BaseException:
            await self.stop()
            raise
        self._is_healthy = True
        self._watcher = asyncio.create_task(self._watch(), name="embedding health")

    async def stop(self) -> None:
        """Close the client, then end the sidecar, if it is ours: without callers its drain takes no time."""
        self._is_healthy = False
        watcher, self._watcher = self._watcher, None
        try:
            if watcher is not None:
                watcher.cancel()
                await asyncio.gather(watcher, return_exceptions=True)
            await self.client.aclose()
        finally:
            if self.sidecar is not None:
                await self.sidecar.stop()

    async def __aenter__(self) -> EmbeddingService:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # --- health ---

    def is_healthy(self) -> bool:
        """Say whether texts can be embedded, as far as is known; costs a microsecond, from any thread."""
        # The supervisor hears of its child's end at once, before anybody has asked it anything.
        return self._is_healthy and (self.sidecar is None or self.sidecar.snapshot().state in _UP)

    async def check_health(self) -> bool:
        """Ask the sidecar whether it is ready, now; takes a millisecond, two seconds at the most."""
        is_ready = await self.client.is_ready()
        self._hear(is_healthy=is_ready)
        return is_ready

    def snapshot(self) -> ServiceSnapshot:
        """Say how it is, for the app's status page."""
        return ServiceSnapshot(
            is_healthy=self.is_healthy(),
            supervision=None if self.sidecar is None else self.sidecar.snapshot(),
            client=self.client.snapshot(),
        )

    def _hear(self, *, is_healthy: bool) -> None:
        if self._watcher is None:
            return  # not started, or stopped: whatever is still on its way says nothing of now
        if is_healthy != self._is_healthy:
            LOGGER.log(*(logging.INFO, "embedding works again") if is_healthy else (logging.WARNING, "embedding fails"))
        self._is_healthy = is_healthy
        self._heard_at = asyncio.get_running_loop().time()

    async def _watch(self) -> None:
        """Look where no embedding has told anything for a while, and at once where one has failed."""
        now = asyncio.get_running_loop().time
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._check_interval_s if self._is_healthy else _UNWELL_S):
                    await self._doubted.wait()
            is_fresh = self._is_healthy and now() - self._heard_at < self._check_interval_s
            if self._doubted.is_set() or not is_fresh:
                self._doubted.clear()
                await self.check_health()
                await asyncio.sleep(_UNWELL_S)  # failures come by the hundred

    # --- embedding ---

    async def embed(
        self,
        text: str,
        *,
        model: str | None = None,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        priority: Priority | None = None,
    ) -> list[float]:
        """Return the vector of a text, as the client does."""
        with self._listening():
            return await self.client.embed(
                text, model=model, dimensions=dimensions, timeout_s=timeout_s, priority=priority
            )

    async def embed_many(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        priority: Priority | None = None,
        on_progress: Progress | None = None,
    ) -> list[list[float]]:
        """Return the vectors of any number of texts, in their order, as the client does."""
        with self._listening():
            return await self.client.embed_many(
                texts,
                model=model,
                dimensions=dimensions,
                timeout_s=timeout_s,
                priority=priority,
                on_progress=on_progress,
            )

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """
        Take a call for evidence.

        The cases: (1) nobody is there; (2) the text was wrong, which says nothing; (3) unclear: ask; (4) it went well.
        """
        try:
            yield
        except SidecarUnavailable:
            self._hear(is_healthy=False)
            self._doubted.set()
            raise
        except InvalidInput:
            raise
        except EmbeddingError:
            self._doubted.set()
            raise
        self._hear(is_healthy=True)
