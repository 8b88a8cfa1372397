"""
The benchmark: `make bench`, or `python -m tests.load.bench [--only NAME] [--seconds N] [--repeat N] [--json FILE]`.

Prints one table with a verdict per target, and exits with 1 when one is missed. See docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import signal
import sys
import time
from pathlib import Path

import orjson

from tests.load.processes import Rig, others_s
from tests.load.results import Row, table
from tests.load.scenarios import SCENARIOS, Bench

SECONDS, REPEAT = 3.0, 3
"""Everything within five minutes."""
QUIET_CORES = 0.1
"""A machine on which others use more than this is not quiet; the kernel's own work is about a third of it."""
TOOLS_VARIABLE = "BENCH_TOOLS"

EXIT_MISSED = 1
EXIT_ABORTED = 130


def read(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(prog="bench", description="The benchmark of the proxy.", allow_abbrev=False)
    parser.add_argument("--only", metavar="NAME", action="append", choices=names, help=f"one of {', '.join(names)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each repetition (default %(default)g)")
    parser.add_argument("--repeat", type=int, default=REPEAT, help="repetitions (default %(default)d)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write rows and runs into this file")
    parser.add_argument(
        "--tools",
        metavar="DIR",
        default=os.environ.get(TOOLS_VARIABLE, ""),
        help=f"folder with other tools, `mock` and `loadgen` (default ${TOOLS_VARIABLE}; empty: ours)",
    )
    parser.add_argument("--source", metavar="DIR", default="", help="another checkout, whose proxy is measured")
    parser.add_argument("--list", action="store_true", help="say what the scenarios are, and end")
    options = parser.parse_args(arguments)
    if not 0.2 <= options.seconds <= 60 or not 1 <= options.repeat <= 20:
        parser.error("--seconds is 0.2 to 60, --repeat 1 to 20")
    return options


def measured(options: argparse.Namespace) -> tuple[list[Row], dict[str, object]]:
    """Run the scenarios; returns the rows, and everything for the file."""
    rig = Rig(options.tools, options.source)
    if rig.cores.proxy == rig.cores.others:
        print("only one core: proxy, mock and generator share it, and the figures say little", file=sys.stderr)
    bench = Bench(rig, options.seconds, options.repeat)
    start, others_before_s = time.monotonic(), others_s(rig.cores)
    chosen = [scenario for scenario in SCENARIOS if not options.only or scenario.name in options.only]
    rows = [row for scenario in chosen for row in scenario.rows(bench)]
    others_cores = (others_s(rig.cores) - others_before_s) / (time.monotonic() - start)
    if others_cores > QUIET_CORES:
        print(
            f"others have used {others_cores:.2f} of these cores meanwhile: repeat it on a quiet machine",
            file=sys.stderr,
        )
    return rows, {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "tools": "others" if options.tools else "ours",
        "seconds": options.seconds,
        "repeat": options.repeat,
        "others_cores": others_cores,
        "rows": [{**dataclasses.asdict(row), "is_met": row.is_met} for row in rows],
        "runs": bench.runs,
    }


def main() -> int:
    """Run the command; returns its exit code: 0, 1 when a target is missed."""
    options = read()
    if options.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name}: {scenario.words}")
        return 0
    # As an exception it passes every `with`, which end what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_ABORTED))
    start = time.monotonic()
    rows, everything = measured(options)
    if options.json:
        options.json.write_bytes(orjson.dumps(everything, option=orjson.OPT_INDENT_2))
    targets = [row for row in rows if row.is_target]
    met = sum(row.is_met for row in targets)
    print(table(rows))
    print(f"{met} of {len(targets)} targets met, {time.monotonic() - start:.0f} s")
    return 0 if met == len(targets) else EXIT_MISSED


if __name__ == "__main__":
    sys.exit(main())
