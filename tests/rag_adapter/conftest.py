"""What the adapter talks to: a peer that plays the sidecar and misbehaves on command, and the real process."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.fakes.sidecar import Sidecar
from tests.fakes.upstream import FakeUpstream


@contextlib.contextmanager
def socket_folder() -> Iterator[Path]:
    """A socket's path is bounded, so its folder has a short name."""
    with tempfile.TemporaryDirectory(prefix="es-") as name:
        yield Path(name)


@pytest.fixture
def folder() -> Iterator[Path]:
    with socket_folder() as folder:
        yield folder


@pytest.fixture
async def peer() -> AsyncIterator[FakeUpstream]:
    """The sidecar's wire is OpenAI's, so the fake upstream plays it, too; vectors are 8 wide."""
    async with FakeUpstream() as peer:
        peer.spare_canary = False
        yield peer


@pytest.fixture(scope="module")
def sidecar() -> Iterator[Sidecar]:
    """The real thing, as a process of its own, with the embedded model."""
    with Sidecar() as sidecar:
        yield sidecar
