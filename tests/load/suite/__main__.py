"""
The command: `make load`, or `python -m tests.load.suite [--quick] [--only NAME] [--output DIR] [--tools DIR] [--list]`.

Writes report.html and results.json, prints the promises, and exits with 1 when one is broken or a scenario could not
be run. See docs/load-testing.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

import orjson

from tests.load.bench import EXIT_ABORTED, EXIT_MISSED, QUIET_CORES, TOOLS_VARIABLE
from tests.load.processes import ROOT, Rig, others_s
from tests.load.suite.perform import perform
from tests.load.suite.promises import is_kept, kept_of, verdicts
from tests.load.suite.runs import Run
from tests.load.suite.scenarios import NAMES, SCENARIOS, Scenario, quickened
from tests.load.suite.summary import Screen, table
from tests.load.vectors import Table


def read(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="load", description="Before and after, under load.", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="the adapter mostly, in less than 90 s: a gate for CI")
    parser.add_argument("--only", metavar="NAME", action="append", choices=NAMES, help=f"one of {', '.join(NAMES)}")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=ROOT / "build" / "load", help="default build/load"
    )
    parser.add_argument(
        "--tools",
        metavar="DIR",
        default=os.environ.get(TOOLS_VARIABLE, ""),
        help=f"folder with another `mock` (default ${TOOLS_VARIABLE}; empty: ours)",
    )
    parser.add_argument("--list", action="store_true", help="say what the scenarios are, and end")
    return parser.parse_args(arguments)


def chosen(*, is_quick: bool, only: list[str] | None) -> list[Scenario]:
    """Return what is to be run."""
    scenarios = [quickened(scenario) for scenario in SCENARIOS] if is_quick else list(SCENARIOS)
    return [scenario for scenario in scenarios if scenario.contestants and (not only or scenario.name in only)]


def performed(scenarios: list[Scenario], tools: str, rig: Rig) -> tuple[dict[tuple[str, str], Run], list[str]]:
    """Run the scenarios, one contestant after the other; returns what was seen, and what could not be run."""
    screen = Screen(sum(len(scenario.contestants) for scenario in scenarios))
    runs, failures, vectors = {}, [], Table()
    for scenario in scenarios:
        screen.scenario(scenario.name, scenario.words)
        for contestant in scenario.contestants:
            screen.begin(contestant)
            try:
                run = perform(scenario, contestant, rig, tools, vectors, screen.progress)
            except (OSError, RuntimeError) as error:
                failures.append(f"{scenario.name}, {contestant}: {error}")
                screen.failed(error)
            else:
                runs[scenario.name, contestant] = run
                screen.done(run)
    return runs, failures


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 when a promise is broken."""
    options = read(arguments)
    if options.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name}: {scenario.words}. {scenario.shows}")
        return 0
    # As an exception it passes every `with`, which end what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_ABORTED))
    rig = Rig(options.tools)
    began, others_before_s = time.monotonic(), others_s(rig.cores)
    runs, failures = performed(chosen(is_quick=options.quick, only=options.only), options.tools, rig)
    took_s = time.monotonic() - began
    facts = {
        "at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "is_quick": options.quick,
        "only": options.only or [],
        "took_s": took_s,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(rig.cores.proxy | rig.cores.others),
        "others_cores": (others_s(rig.cores) - others_before_s) / took_s,
        "failures": failures,
    }
    return concluded(runs, facts, options.output)


def concluded(runs: dict[tuple[str, str], Run], facts: dict[str, Any], output: Path) -> int:
    """Judge, write both files, print the table; returns the exit code."""
    # Imported here: a plotting library takes a second, and what is measured should not wait for it.
    from tests.load.suite.report import page

    judged = verdicts(runs)
    output.mkdir(parents=True, exist_ok=True)
    everything = {
        **facts,
        "promises": [verdict.written() for verdict in judged],
        "runs": [run.written() for run in runs.values()],
    }
    (output / "results.json").write_bytes(orjson.dumps(everything))
    (output / "report.html").write_text(page(runs, judged, facts), encoding="utf-8")
    print(table(judged))
    kept, of = kept_of(judged)
    for failure in facts["failures"]:
        print(f"could not be run: {failure}")
    if facts["others_cores"] > QUIET_CORES:
        print(
            f"others have used {facts['others_cores']:.2f} of these cores meanwhile: figures of a quiet machine differ"
        )
    print(f"{kept} of {of} promises kept, {facts['took_s']:.0f} s; {output / 'report.html'}, results.json")
    return 0 if is_kept(judged) and not facts["failures"] else EXIT_MISSED


if __name__ == "__main__":
    sys.exit(main())
