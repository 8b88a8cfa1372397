"""
CPU per request: `python -m tests.load.profile_cpu [--only NAME] [--seconds N] [--top N]`.

First the whole processes, yardstick and proxy, as the system counts their time. Then the proxy once more under
cProfile, its own time added up by stage. A profiler makes everything slower, and small Python functions most of all:
its shares are scaled to the time without it, and are good for comparing stages and changes, not to the microsecond.
"""

from __future__ import annotations

import argparse
import os
import pstats
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.load.bench import TOOLS_VARIABLE
from tests.load.processes import ROOT, Contestant, Rig, cpu_s
from tests.load.results import lines
from tests.load.scenarios import WARM_S, Callers
from tests.load.stages import Cost, Function, by_stage

LOADS = {
    "single-1": Callers(1),
    "single-64": Callers(64),
    "float-8": Callers(8, encoding="float"),
    "bulk-base64": Callers(8, inputs=64),
    "bulk-float": Callers(8, inputs=64, encoding="float"),
    "cached": Callers(64, texts="zipf"),
}
SECONDS = 2.0
DUMP_TIMEOUT_S = 20.0
SMALLEST_SHARE = 0.005
"""Stages below it are one row."""


@dataclass(frozen=True, slots=True)
class Used:
    """What a load has cost a process."""

    cpu_s: float
    requests: int
    wall_s: float

    @property
    def us(self) -> float:
        """Microseconds of CPU per request."""
        return self.cpu_s / self.requests * 1e6 if self.requests else 0.0


def used(rig: Rig, contestant: Contestant, callers: Callers, seconds: float) -> Used:
    """Run a load, and read what it costs."""
    before = cpu_s(contestant.pid)
    run = rig.load(contestant.target, duration=seconds, **callers.options)
    return Used(cpu_s(contestant.pid) - before, run["requests"], run["wall_s"])


def warm(rig: Rig, contestant: Contestant, callers: Callers) -> None:
    """Open the connections, and fill the cache where texts are repeated."""
    if callers.texts != "unique":
        rig.load(contestant.target, texts="seq", requests=1000, c=32)
    rig.load(contestant.target, duration=WARM_S, **callers.options)


def whole(rig: Rig, callers: Callers, seconds: float) -> tuple[Used, Used]:
    """Return what yardstick and proxy use."""
    with rig.mock() as mock, rig.bare(mock) as bare, rig.sidecar(mock) as sidecar:
        warm(rig, bare, callers)
        warm(rig, sidecar, callers)
        return used(rig, bare, callers, seconds), used(rig, sidecar, callers, seconds)


def profiled(rig: Rig, callers: Callers, seconds: float) -> tuple[Used, dict[Function, Any]]:
    """Return what the proxy uses under the profiler, and the profile."""
    with tempfile.TemporaryDirectory(prefix="es-profile-") as folder:
        output = Path(folder, "profile")
        launcher = (str(ROOT / "tests/load/profiled.py"), str(output))
        with rig.mock() as mock, rig.sidecar(mock, launcher=launcher) as sidecar:
            warm(rig, sidecar, callers)
            os.kill(sidecar.pid, signal.SIGUSR1)
            its = used(rig, sidecar, callers, seconds)
            os.kill(sidecar.pid, signal.SIGUSR2)
            end = time.monotonic() + DUMP_TIMEOUT_S
            while not output.exists():
                if time.monotonic() > end:
                    raise RuntimeError("the proxy has not written its profile")
                time.sleep(0.05)
            stats: dict[Function, Any] = pstats.Stats(str(output)).stats  # type: ignore[attr-defined]
    return its, stats


def stage_rows(plain: Used, under: Used, stats: dict[Function, Any]) -> list[tuple[str, ...]]:
    """Return the stages, dearest first: µs per request as without the profiler, share, calls per request."""
    costs = by_stage(stats)
    # A profile counts by the clock on the wall. When others have had the core meanwhile, there is nothing left over.
    unseen_s = under.cpu_s - sum(cost.seconds for cost in costs.values())
    costs["event loop, sockets, other threads"] = Cost(max(0.0, unseen_s))
    total_s = sum(cost.seconds for cost in costs.values())
    small = [stage for stage, cost in costs.items() if cost.seconds < SMALLEST_SHARE * total_s]
    for stage in small:
        cost = costs.pop(stage)
        rest = costs.setdefault(f"each below {SMALLEST_SHARE:.1%}", Cost())
        rest.seconds += cost.seconds
        rest.calls += cost.calls
    return [
        (
            stage,
            f"{cost.seconds / total_s * plain.us:.1f}",
            f"{cost.seconds / total_s:.1%}",
            f"{cost.calls / under.requests:.1f}" if cost.calls else "",
        )
        for stage, cost in sorted(costs.items(), key=lambda item: -item[1].seconds)
    ]


def top_rows(plain: Used, under: Used, stats: dict[Function, Any], count: int) -> list[tuple[str, ...]]:
    """Return the functions that use most time of their own."""
    ordered = sorted(stats.items(), key=lambda item: -item[1][2])[:count]
    total_s = max(under.cpu_s, sum(own_s for _, _, own_s, _, _ in stats.values()))
    return [
        (
            name if file == "~" else f"{'/'.join(Path(file).parts[-3:])}:{line} {name}",
            f"{own_s / total_s * plain.us:.1f}",
            f"{calls / under.requests:.1f}",
        )
        for (file, line, name), (_, calls, own_s, _, _) in ordered
    ]


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="profile_cpu", description="CPU per request.", allow_abbrev=False)
    parser.add_argument("--only", action="append", choices=list(LOADS))
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--top", type=int, default=0, metavar="N", help="also the N functions that use most")
    parser.add_argument("--tools", metavar="DIR", default=os.environ.get(TOOLS_VARIABLE, ""))
    parser.add_argument("--source", metavar="DIR", default="", help="another checkout, whose proxy is measured")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rig = Rig(options.tools, options.source)
    summary: list[tuple[str, ...]] = [("scenario", "bare", "sidecar", "sidecar, per input", "under the profiler")]
    for name, callers in LOADS.items():
        if options.only and name not in options.only:
            continue
        bare, plain = whole(rig, callers, options.seconds)
        under, stats = profiled(rig, callers, options.seconds)
        print(f"{name}: {callers.words}\n")
        print(lines([("stage", "µs per request", "share", "calls per request"), *stage_rows(plain, under, stats)]))
        if options.top:
            rows = top_rows(plain, under, stats, options.top)
            print("\n" + lines([("function", "µs per request", "calls per request"), *rows]))
        print(flush=True)
        summary.append((name, *(f"{us:.0f}" for us in (bare.us, plain.us, plain.us / callers.inputs, under.us))))
    print("CPU per request, µs\n\n" + lines(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
