"""
A small service manager: what an app consists of, in the order of who needs whom.

Each service registers six things. The manager awaits `init_func()`, keeps the instance, asks `health_check(instance)`
for a bool (or an awaitable of one), and awaits `shutdown_func(instance)`. It knows nothing of what the services do.
"""

from __future__ import annotations

import asyncio
import graphlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

LOGGER = logging.getLogger("rag_service.manager")

HEALTH_TIMEOUT_S = 2.0
"""A service that cannot say how it is within this time is not well."""

State = Literal["healthy", "unhealthy", "waiting"]


@dataclass(frozen=True, slots=True)
class Service:
    """What was registered."""

    name: str
    service_type: str
    dependencies: tuple[str, ...]
    health_check: Callable[[Any], bool | Awaitable[bool]]
    init_func: Callable[[], Awaitable[Any]]
    shutdown_func: Callable[[Any], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Health:
    """One service as of now."""

    service_type: str
    state: State
    """`waiting`: well itself, but something that it needs is not."""
    waits_for: tuple[str, ...] = ()


class ServiceManager:
    """Starts services in the order of their dependencies, and stops them in reverse."""

    def __init__(self) -> None:
        self.instances: dict[str, Any] = {}
        """By name, in the order in which they were started."""
        self._services: dict[str, Service] = {}

    def register_service(
        self,
        name: str,
        service_type: str,
        dependencies: Sequence[str],
        health_check: Callable[[Any], bool | Awaitable[bool]],
        init_func: Callable[[], Awaitable[Any]],
        shutdown_func: Callable[[Any], Awaitable[None]],
    ) -> None:
        """Take a service in; those it depends on may come later."""
        if name in self._services:
            raise ValueError(f"there is a service {name!r} already")
        needed = tuple(dependencies)
        self._services[name] = Service(name, service_type, needed, health_check, init_func, shutdown_func)

    async def start(self) -> None:
        """
        Start everything.

        Raises:
            ValueError: a dependency is not registered, or they go round in a circle.
            Exception: what a service has raised; those that ran already are stopped again.
        """
        try:
            for name in self._order():
                self.instances[name] = await self._services[name].init_func()
                LOGGER.info("%s has started", name)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop what was started, last first; one that fails at it does not keep the others from it."""
        while self.instances:
            name, instance = self.instances.popitem()
            try:
                await self._services[name].shutdown_func(instance)
                LOGGER.info("%s has stopped", name)
            except Exception:
                LOGGER.exception("%s failed while stopping", name)

    async def health(self) -> dict[str, Health]:
        """Ask all at once how they are, by name in the order of their start; never raises."""
        names = list(self.instances)
        well = dict(zip(names, await asyncio.gather(*map(self._is_well, names)), strict=True))
        found: dict[str, Health] = {}
        for name in names:
            service = self._services[name]
            ill = tuple(needed for needed in service.dependencies if found[needed].state != "healthy")
            state: State = "unhealthy" if not well[name] else "waiting" if ill else "healthy"
            found[name] = Health(service.service_type, state, ill)
        return found

    async def _is_well(self, name: str) -> bool:
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                answer = self._services[name].health_check(self.instances[name])
                return bool(await answer) if inspect.isawaitable(answer) else bool(answer)
        except Exception as error:  # a check that fails is an answer: no
            LOGGER.warning("%s: its health check failed with %s", name, type(error).__name__)
            return False

    def _order(self) -> list[str]:
        for service in self._services.values():
            if missing := set(service.dependencies) - self._services.keys():
                raise ValueError(f"{service.name} needs {', '.join(sorted(missing))}, which nobody has registered")
        try:
            return list(
                graphlib.TopologicalSorter({name: s.dependencies for name, s in self._services.items()}).static_order()
            )
        except graphlib.CycleError as error:
            raise ValueError(f"services that need each other: {' → '.join(error.args[1])}") from error
