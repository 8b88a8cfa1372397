"""
What has to hold, as rows: the criteria of the plan, what is measured for each, its bound. Only the adapter is judged.

A promise over several scenarios shows the worst of them. One whose scenario was not run gives no row; one without
a bound is a figure that belongs beside the others, and is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.load.results import Row, percentile
from tests.load.suite.runs import WRONG, Run
from tests.load.suite.scenarios import CAPACITY, INGESTION_SLOTS, LADDER, NAMES, OPEN_S

JUDGED, BEFORE, BETWEEN = "adapter", "legacy", "first repair"

Runs = Mapping[tuple[str, str], Run]
"""By scenario and contestant."""
Measure = Callable[[Run, Runs], float]

CONCURRENT = tuple(f"callers-{count}" for count in LADDER if count >= 5)
HEALTHY = (*(f"callers-{count}" for count in LADDER), "workers", "ingestion", "limited")
OUTAGES = ("hangs", "errors", "dies")
LATE_MS = 250.0
"""P1: nothing is answered later than its deadline and this."""
TOLD_MS = 250.0
"""Nine of ten who are refused hear of it before a person notices a pause; the others had been tried before."""
TOLD_BUSY_MS = 500.0
"""A quarter of the deadline: while all connections to the proxy carry texts that will be answered, a newcomer waits for
one of them, and then is refused at once."""
HELD_MS = 100.0
"""Of the app's event loop, which shares one core with the proxy here: what a person does not notice."""


@dataclass(frozen=True, slots=True)
class Promise:
    """One criterion."""

    words: str
    figure: str
    """What is measured."""
    scenarios: Sequence[str]
    measure: Measure
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A promise, judged: its worst scenario, and what the others did there."""

    promise: Promise
    row: Row
    before: float
    """Of the old method, in the same scenario; not a number where it was not run."""
    between: float
    """Of the first repair."""
    of: int
    """Scenarios judged."""

    def written(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "promise": self.promise.words,
            "figure": self.row.figure,
            "scenario": self.row.scenario,
            "scenarios": self.of,
            "measured": self.row.value,
            "unit": self.row.unit,
            "bound": bound(self.row),
            "is_judged": self.row.is_target,
            "is_kept": self.row.is_met,
            "legacy": self.before,
            "first_repair": self.between,
        }


# --- what is measured ---


def _unanswered(run: Run, _: Runs) -> float:
    return run.unanswered


def _errors(run: Run, _: Runs) -> float:
    return run.error_share * 100


def _longest_s(run: Run, _: Runs) -> float:
    return run.wait_s(1.0)


def _late_ms(run: Run, _: Runs) -> float:
    return max(0.0, run.lateness_s * 1e3)


def _told_ms(run: Run, _: Runs) -> float:
    return percentile(run.refusals_s, 0.9) * 1e3 if run.refusals_s else math.nan


def _upstream_429(run: Run, _: Runs) -> float:
    return run.upstream.get("RateLimited", 0)


def _memory_below_legacy(run: Run, runs: Runs) -> float:
    """Everything that the machine holds for embedding: all workers, and the proxy where there is one."""
    legacy = runs.get((run.scenario, BEFORE))
    return (1 - run.memory_bytes / legacy.memory_bytes) * 100 if legacy else math.nan


PROMISES: tuple[Promise, ...] = (
    Promise("5 and more at the same time, and none hangs", "requests without an answer", CONCURRENT, _unanswered,
            at_most=0),
    Promise("a single request takes less than 5 s", "longest wait", ("callers-1",), _longest_s, "s", below=5),
    Promise("5 at the same time take less than 10 s", "longest wait", ("callers-5",), _longest_s, "s", below=10),
    Promise("errors under 1 %", "requests without their vectors", HEALTHY, _errors, "%", below=1),
    Promise("never a wrong vector", "answers with a wrong vector", NAMES, lambda run, _: run.outcomes[WRONG],
            at_most=0),
    Promise("nothing is answered later than its deadline", "latest answer, after the deadline", NAMES, _late_ms, "ms",
            at_most=LATE_MS),
    Promise("the breaker trips when the upstream fails", "times it opened", OUTAGES,
            lambda run, _: run.breaker_openings, at_least=1),
    Promise("back as soon as the upstream is", "from its return to the next vector", OUTAGES,
            lambda run, _: run.recovery_s, "s", at_most=2 * OPEN_S),
    Promise("who is refused hears of it at once", "refusals, p90", ("errors", "dies"), _told_ms, "ms",
            at_most=TOLD_MS),
    Promise("overload: who is refused hears of it soon", "refusals, p90", ("overload",), _told_ms, "ms",
            at_most=TOLD_BUSY_MS),
    Promise("connections are reused", "texts that reached the upstream on an open connection", CONCURRENT,
            lambda run, _: run.upstream_reuse * 100, "%", at_least=80),
    Promise("connections are reused", "texts that reached the proxy on an open connection", CONCURRENT,
            lambda run, _: run.proxy_reuse * 100, "%", at_least=80),
    Promise("the number of threads is stable", "more threads than at rest, app and proxy", NAMES,
            lambda run, _: run.more_threads, at_most=1),
    Promise("memory at least 30 % below the old method's", "less, 4 workers and the proxy against 4 workers",
            ("workers",), _memory_below_legacy, "%", at_least=30),
    Promise("memory of a single worker", "less, 1 worker and the proxy against 1 worker", ("callers-10",),
            _memory_below_legacy, "%"),
    Promise("the app stays responsive", "longest hold of its event loop", [name for name in NAMES if name not in
            ("callers-500", "overload")], lambda run, _: run.longest_hold_s * 1e3, "ms", at_most=HELD_MS),
    Promise("searches do not wait for an ingestion", "wait of a query, p99", ("ingestion",),
            lambda run, _: run.wait_s(0.99, "query"), "s", below=1),
    Promise("the upstream's rate limit is kept", "requests it refused (429)", ("limited",), _upstream_429, at_most=0),
    Promise("the upstream's slots are kept", "calls at a time, highest", ("ingestion",),
            lambda run, _: run.upstream_concurrency, at_most=INGESTION_SLOTS),
    Promise("overload: what can be served is", "of what the upstream can give", ("overload",),
            lambda run, _: run.texts_per_s / CAPACITY * 100, "%", at_least=80),
    Promise("overload: memory is flat", "proxy, last third against the one before", ("overload",),
            lambda run, _: run.proxy_growth, "×", at_most=1.1),
)  # fmt: skip


# --- judging ---


def verdicts(runs: Runs, promises: Iterable[Promise] = PROMISES) -> list[Verdict]:
    """Judge the promises whose scenarios were run."""
    judged = []
    for promise in promises:
        rows = [
            (scenario, promise.measure(runs[scenario, JUDGED], runs))
            for scenario in promise.scenarios
            if (scenario, JUDGED) in runs
        ]
        if rows:
            scenario, value = worst(promise, rows)
            row = Row(scenario, promise.figure, value, promise.unit, promise.at_least, promise.at_most, promise.below)
            judged.append(
                Verdict(promise, row, _other(promise, runs, scenario, BEFORE), _other(promise, runs, scenario, BETWEEN),
                        len(rows))
            )  # fmt: skip
    return judged


def worst(promise: Promise, rows: Sequence[tuple[str, float]]) -> tuple[str, float]:
    """
    Return the row that is furthest from what is promised; one that could not be measured is that.

    Of equal ones the last: scenarios are ordered from easy to hard, and what the others did is seen best there.
    """
    sign = -1 if promise.at_least is not None else 1
    return max(reversed(rows), key=lambda row: (True, 0.0) if math.isnan(row[1]) else (False, sign * row[1]))


def _other(promise: Promise, runs: Runs, scenario: str, contestant: str) -> float:
    """Measure another contestant; what is the proxy's own has no meaning there."""
    run = runs.get((scenario, contestant))
    return promise.measure(run, runs) if run and contestant != JUDGED else math.nan


def kept_of(judged: Iterable[Verdict]) -> tuple[int, int]:
    """Count the promises that are kept, and those that were judged."""
    targets = [verdict.row for verdict in judged if verdict.row.is_target]
    return sum(row.is_met for row in targets), len(targets)


def is_kept(judged: Iterable[Verdict]) -> bool:
    """Whether every promise is."""
    return all(verdict.row.is_met for verdict in judged if verdict.row.is_target)


def shown(value: float, unit: str = "") -> str:
    """Write a figure with its unit."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "never"
    if value == int(value) or abs(value) >= 100:
        digits = f"{value:.0f}"
    else:
        digits = f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{digits} {unit}".strip()


def bound(row: Row) -> str:
    """Write what a row is judged by, if it is."""
    return f"{row.target} {row.unit}".strip() if row.is_target else ""
