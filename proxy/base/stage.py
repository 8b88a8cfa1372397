"""
The one verb of every hop.

A stage is called with a message, returns the answer, tells its present numbers in `snapshot()` and ends with
`aclose()`. It meets the next stage as `inner`, a value it was handed. Learn one, know them all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

Asked = TypeVar("Asked", contravariant=True)
Answered = TypeVar("Answered", covariant=True)

Snapshot = Mapping[str, Any]
"""Plain numbers and names of this moment, fit for JSON; asking costs the asked next to nothing."""


class Stage(Protocol[Asked, Answered]):
    """One hop of the journey."""

    async def __call__(self, message: Asked, /) -> Answered: ...

    def snapshot(self) -> Snapshot: ...

    async def aclose(self) -> None: ...


class Pending(Protocol[Answered]):
    """
    Something under way, for all who wait for it.

    Whoever leaves before it is over takes back their interest; the last one out ends it.
    """

    @property
    def is_over(self) -> bool: ...

    @property
    def error(self) -> BaseException | None:
        """How it failed; None while it is not over, or where it went well."""
        ...

    def result(self) -> Answered:
        """Return what came of it, once it is over; raises its error."""
        ...

    def join(self) -> asyncio.Future[None]:
        """Wait for it as well; the future is done when it is over."""
        ...

    def leave(self, waiter: asyncio.Future[None]) -> None:
        """Do not wait any more; everybody who has joined says so once, in the end."""
        ...


class Beginning(Protocol[Asked, Answered]):
    """A hop whose work may be shared: it begins at once, and who waits for it is the asker's affair."""

    def begin(self, message: Asked, /) -> Pending[Answered]: ...

    def snapshot(self) -> Snapshot: ...

    async def aclose(self) -> None: ...
