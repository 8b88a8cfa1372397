"""
The one verb of every hop.

A stage is called with a message, returns the answer, tells its present numbers in `snapshot()` and ends with
`aclose()`. It meets the next stage as `inner`, a value it was handed. Learn one, know them all.
"""

from __future__ import annotations

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
