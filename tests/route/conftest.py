"""A whole proxy in front of a scripted upstream, for each test anew."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.running import Running, running
from tests.fakes.upstream import FakeUpstream

FAST = """
[attempt]
backoff_base_s = 0.001
[listen]
body_timeout_s = 0.3
write_timeout_s = 0.5
max_body_bytes = 100000
[admission]
max_bytes = 100000
"""


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture
async def proxy(tmp_path: Path, upstream: FakeUpstream) -> AsyncIterator[Running]:
    """Model `m`, 8 wide, on the scripted upstream; bounds and times small enough to reach."""
    async with running(tmp_path, FAST + upstream.toml(dimensions=8, dimensions_allowed=[4])) as proxy:
        yield proxy
