"""
What is watched while a scenario runs: the app's event loop from inside, processes and the proxy's breaker from outside.

Standard library only: the app imports this too, and its memory is measured.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.load.processes import ask, cpu_s, resident_bytes

BEAT_S = 0.005
"""Often enough to see a hold of 20 ms, and a load of less than a hundredth of a core."""
NOTED_S = 0.005
"""Beats are a millisecond or two late on an idle machine; shorter holds say nothing."""


# --- inside the app ---


class LoopProbe:
    """A timer of the app's event loop: how much later than due it fires is how long the loop was held."""

    def __init__(self) -> None:
        self.holds: list[tuple[float, float]] = []
        """When, of the monotonic clock, and for how long, in seconds."""
        self._due = 0.0

    def begin(self) -> None:
        """Beat from now on, until the loop ends."""
        self._loop = asyncio.get_running_loop()
        self._next(time.monotonic())

    def _next(self, now: float) -> None:
        self._due = now + BEAT_S
        self._loop.call_at(self._due, self._beat)

    def _beat(self) -> None:
        now = time.monotonic()
        self._note(now)
        self._next(now)

    def _note(self, now: float) -> None:
        if now - self._due >= NOTED_S:
            self.holds.append((self._due, now - self._due))

    def all_holds(self, now: float) -> list[tuple[float, float]]:
        """Return all of them, and the one that still lasts."""
        return self.holds + ([(self._due, now - self._due)] if now - self._due >= NOTED_S else [])


# --- outside ---


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at processes: of the app (all its workers together) and of the proxy, zeros where there is none."""

    at_s: float
    """Since the start of the scenario; 0 at rest."""
    app_bytes: int = 0
    app_threads: int = 0
    app_cpu_s: float = 0.0
    proxy_bytes: int = 0
    proxy_threads: int = 0
    proxy_cpu_s: float = 0.0
    upstream_calls: int = 0
    """Calls under way at the upstream."""


def threads(pid: int) -> int:
    """Return how many threads a process has."""
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("Threads:"))
    return int(line.split()[1])


def sampled(at_s: float, apps: Sequence[int], proxy: int | None, upstream_calls: int) -> Sample:
    """Look at the processes; raises OSError or StopIteration when one of them has just ended."""
    return Sample(
        at_s,
        sum(map(resident_bytes, apps)),
        sum(map(threads, apps)),
        sum(map(cpu_s, apps)),
        resident_bytes(proxy) if proxy else 0,
        threads(proxy) if proxy else 0,
        cpu_s(proxy) if proxy else 0.0,
        upstream_calls,
    )


def breaker(socket_path: str) -> str:
    """Ask the proxy for the state of its upstream's breaker."""
    status: dict[str, Any] = json.loads(ask(socket_path, "/status")[1])
    (circuit,) = status["stages"]["circuit"].values()
    return str(circuit["state"])
