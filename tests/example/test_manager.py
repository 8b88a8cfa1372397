"""The service manager: order, health, and what happens when a part fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from rag_service.manager import ServiceManager


class Script:
    """Registers parts that write down what is done to them."""

    def __init__(self) -> None:
        self.manager = ServiceManager()
        self.done: list[str] = []

    def register(
        self,
        name: str,
        *needs: str,
        check: Callable[[Any], bool | Awaitable[bool]] = lambda _: True,
        fails_at: str = "",
    ) -> None:
        async def init() -> str:
            if fails_at == "init":
                raise RuntimeError(f"{name} cannot start")
            self.done.append(f"+{name}")
            return name

        async def shutdown(_: str) -> None:
            if fails_at == "shutdown":
                raise RuntimeError(f"{name} cannot stop")
            self.done.append(f"-{name}")

        self.manager.register_service(name, "part", needs, check, init, shutdown)


async def test_parts_start_after_what_they_need_and_stop_before() -> None:
    """Whatever the order in which they were registered."""
    script = Script()
    script.register("rag", "database", "embeddings")
    script.register("embeddings")
    script.register("database")

    await script.manager.start()
    await script.manager.stop()

    started, stopped = script.done[:3], script.done[3:]
    assert started[-1] == "+rag"
    assert stopped == [name.replace("+", "-") for name in reversed(started)]


async def test_part_that_cannot_start_leaves_nothing_running() -> None:
    """The error passes on, and those that ran already are stopped."""
    script = Script()
    script.register("database")
    script.register("rag", "database", fails_at="init")

    with pytest.raises(RuntimeError, match="rag cannot start"):
        await script.manager.start()

    assert script.done == ["+database", "-database"]
    assert script.manager.instances == {}


async def test_part_that_cannot_stop_does_not_keep_the_others() -> None:
    """It is logged, and the rest goes on."""
    script = Script()
    script.register("database")
    script.register("rag", "database", fails_at="shutdown")
    await script.manager.start()

    await script.manager.stop()

    assert script.done == ["+database", "+rag", "-database"]


async def test_health_says_who_waits_for_whom() -> None:
    """A check may be awaited or not; one that raises or hangs is a no; what needs an ill part waits."""

    async def well(_: Any) -> bool:
        return True

    async def hangs(_: Any) -> bool:
        await asyncio.Event().wait()
        return True

    def raises(_: Any) -> bool:
        raise ValueError

    script = Script()
    script.register("database", check=well)
    script.register("cache", check=raises)
    script.register("queue", check=hangs)
    script.register("rag", "database", "cache")
    script.register("site", "rag")
    await script.manager.start()

    health = await script.manager.health()

    assert {name: (part.state, part.waits_for) for name, part in health.items()} == {
        "database": ("healthy", ()),
        "cache": ("unhealthy", ()),
        "queue": ("unhealthy", ()),
        "rag": ("waiting", ("cache",)),
        "site": ("waiting", ("rag",)),
    }


async def test_circle_of_parts() -> None:
    """It is refused before anything starts."""
    script = Script()
    script.register("hen", "egg")
    script.register("egg", "hen")

    with pytest.raises(ValueError, match="need each other"):
        await script.manager.start()

    assert script.done == []


async def test_part_that_nobody_has_registered() -> None:
    """It is named."""
    script = Script()
    script.register("rag", "database")

    with pytest.raises(ValueError, match="rag needs database"):
        await script.manager.start()


def test_name_that_is_taken() -> None:
    """Two parts of one name would hide each other."""
    script = Script()
    script.register("rag")

    with pytest.raises(ValueError, match="'rag' already"):
        script.register("rag")
