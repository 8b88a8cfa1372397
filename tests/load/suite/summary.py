"""
The terminal: a line that moves while a run is under way, a line of figures after it, and the table of promises.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from tests.load.results import lines
from tests.load.suite.ledger import OK
from tests.load.suite.perform import Progress
from tests.load.suite.promises import Verdict, bound, shown
from tests.load.suite.runs import Run

BAR = 20
MB = 1e6


class Screen:
    """Shows how far the suite is; on something that is no terminal, one line per run."""

    def __init__(self, count: int, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._count = count
        self._number = 0
        self._width = 0

    def scenario(self, name: str, words: str) -> None:
        """Begin a scenario."""
        self._write(f"{name}: {words}\n")

    def begin(self, contestant: str) -> None:
        """Begin a run."""
        self._number += 1
        self._name = f"  [{self._number:{len(str(self._count))}}/{self._count}] {contestant:12}"
        self._move(f"{self._name} starting")

    def progress(self, progress: Progress) -> None:
        """Show how far a run is."""
        filled = min(BAR, round(BAR * progress.at_s / progress.limit_s))
        bar = "█" * filled + "░" * (BAR - filled)
        self._move(
            f"{self._name} {bar} {progress.at_s:.1f}/{progress.limit_s:g} s, {progress.settled} answered, "
            f"{progress.outstanding} waiting, {progress.bytes_now / MB:.0f} MB"
        )

    def done(self, run: Run) -> None:
        """Show what a run has given."""
        self._move("")
        self._write(f"{self._name} {line(run)}\n")

    def failed(self, error: Exception) -> None:
        """Say that a run could not be made."""
        self._move("")
        self._write(f"{self._name} could not be run: {error}\n")

    def _move(self, text: str) -> None:
        if self._stream.isatty():
            # A line that is wrapped cannot be written over.
            text = text[: shutil.get_terminal_size().columns - 1]
            self._write(f"\r{text:{self._width}}" + ("" if text else "\r"))
            self._width = len(text)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def line(run: Run) -> str:
    """Return a run in one line."""
    p50, p99, longest = (shown(run.wait_s(share), "s") for share in (0.5, 0.99, 1.0))
    others = ", ".join(f"{count} {name}" for name, count in run.outcomes.most_common() if name != OK)
    return (
        f"{run.outcomes[OK]:5} of {len(run.answers):4} answered, p50 {p50}, p99 {p99}, longest {longest}, "
        f"app held {shown(run.longest_hold_s * 1e3, 'ms')}, {run.memory_bytes / MB:.0f} MB"
        + (f"; {others}" if others else "")
    )


def table(judged: Sequence[Verdict]) -> str:
    """Lay the promises out as Markdown, the adapter's figures beside those of the others in the same scenario."""
    cells = [("promise", "figure", "worst in", "adapter", "bound", "", "legacy", "first repair")]
    for verdict in judged:
        row, unit = verdict.row, verdict.row.unit
        place = f"{row.scenario}, of {verdict.of}" if verdict.of > 1 else row.scenario
        cells.append(
            (
                verdict.promise.words,
                row.figure,
                place,
                shown(row.value, unit),
                bound(row),
                word(verdict),
                shown(verdict.before, unit),
                shown(verdict.between, unit),
            )
        )
    return lines(cells)


def word(verdict: Verdict) -> str:
    """Return the judgement in a word; empty for a figure that has no bound."""
    if not verdict.row.is_target:
        return ""
    return "kept" if verdict.row.is_met else "BROKEN"
