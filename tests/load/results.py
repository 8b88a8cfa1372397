"""
The arithmetic: percentiles, ideals, rows of the table and their judgement. Pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that is not exceeded by this share of the values; 0 when there are none."""
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def ideal(slots: int, callers: int, *, base_ms: float, per_input_ms: float) -> float:
    """
    Return the embeddings per second that an upstream of `slots` gives at best to callers of one text each.

    All slots busy all the time, and the callers spread evenly: a batch has n = callers / slots texts (at least one,
    and then not all slots are needed) and takes base + per input × n.
    """
    inputs = max(1.0, callers / slots)
    busy = min(slots, callers)
    return busy * inputs / ((base_ms + per_input_ms * inputs) / 1e3)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a figure, and what it should be."""

    scenario: str
    figure: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    """Neither: the figure is for information."""
    below: float | None = None
    """Like `at_most`, but the bound itself misses it."""

    @property
    def is_target(self) -> bool:
        return not (self.at_least is None and self.at_most is None and self.below is None)

    @property
    def is_met(self) -> bool:
        """Whether the figure is what it should be; a number that is none meets nothing."""
        return (
            not math.isnan(self.value)
            and (self.at_least is None or self.value >= self.at_least)
            and (self.at_most is None or self.value <= self.at_most)
            and (self.below is None or self.value < self.below)
        )

    @property
    def target(self) -> str:
        """The target in signs."""
        bounds = (("≥", self.at_least), ("≤", self.at_most), ("<", self.below))
        return " ".join(f"{sign} {number(bound)}" for sign, bound in bounds if bound is not None)

    @property
    def verdict(self) -> str:
        if not self.is_target:
            return ""
        return "pass" if self.is_met else "MISS"


def number(value: float) -> str:
    """Write a number with about three digits that mean something."""
    if math.isnan(value):
        return "–"
    if value == int(value) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def table(rows: Sequence[Row]) -> str:
    """Lay rows out."""
    cells = [("scenario", "figure", "measured", "target", "")]
    for row in rows:
        measured = f"{number(row.value)} {row.unit}".strip()
        cells.append((row.scenario, row.figure, measured, row.target, row.verdict))
    return lines(cells)


def lines(cells: Sequence[tuple[str, ...]]) -> str:
    """Lay cells out as a Markdown table; the first line is its head, and each column as wide as its widest cell."""
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(cells[0]))]
    laid = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    laid.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in laid)


def median(values: Sequence[float]) -> float:
    """Return the median; not a number when there are no values, so that no target is met by them."""
    return statistics.median(values) if values else math.nan
