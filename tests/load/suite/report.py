"""
The page: one HTML file for people, with everything in it. Before and after first, then promises, then scenarios.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.load.bench import QUIET_CORES
from tests.load.suite import plots
from tests.load.suite.arrivals import Closed
from tests.load.suite.ledger import OK
from tests.load.suite.promises import JUDGED, Runs, Verdict, bound, kept_of, shown
from tests.load.suite.runs import Run
from tests.load.suite.scenarios import ALL, SCENARIOS, Scenario
from tests.load.suite.summary import word

MB = 1e6
CSS = Path(__file__).with_name("report.css")
WHO = {
    "legacy": "the old method: a thread and a fresh client per call, joined inside the async method",
    "first repair": "a fresh async client per call",
    "adapter": "rag_adapter, and the proxy behind it",
}
GROUPS = {
    "concurrency": ("Callers at the same time", "The upstream answers in 200 ms, and a millisecond more per text."),
    "limits": ("Limits", "The upstream allows only so much; the callers want more."),
    "trouble": ("Trouble", "The upstream fails, and recovers. The shaded time is the fault."),
}


@dataclass(frozen=True, slots=True)
class Card:
    """One thing that everybody understands, before and after."""

    title: str
    figure: str
    scenario: str
    value: Callable[[Run], str]


CARDS: tuple[Card, ...] = (
    Card("10 people search at once", "longest wait", "callers-10", lambda run: _wait(run, 1.0)),
    Card("100 at once", "answered, of those who asked", "callers-100", lambda run: _answered(run)),
    Card("One call in five hangs", "the whole app stood still for up to", "incident", lambda run: _held(run)),
    Card("Searches while documents are ingested", "wait of a search, p99", "ingestion",
         lambda run: _wait(run, 0.99, "query")),
    Card("The upstream dies for 2.5 s", "longest wait for a vector, or for a clear error", "dies",
         lambda run: _wait(run, 1.0)),
    Card("Memory of a service with 4 workers", "all of its processes, the proxy included", "workers",
         lambda run: f"{run.memory_bytes / MB:.0f} MB"),
)  # fmt: skip


def page(runs: Runs, judged: Sequence[Verdict], facts: Mapping[str, Any]) -> str:
    """Write the page."""
    scenarios = [each for each in SCENARIOS if any((each.name, contestant) in runs for contestant in ALL)]
    parts = [
        _head(judged, facts),
        _legend(),
        _cards(runs),
        "<h2>Promises</h2>",
        "<p class='soft'>Judged is the adapter with its proxy. A promise over several scenarios shows the worst of "
        "them; beside it, what the others did in that same scenario.</p>",
        _promises(judged),
        _ladder(runs),
    ]
    for group, (title, words) in GROUPS.items():
        its = [scenario for scenario in scenarios if scenario.group == group]
        if its:
            links = "".join(f"<a href='#{each.name}'>{each.name}</a>" for each in its)
            parts += [f"<h2>{title}</h2><p class='soft'>{words}</p><nav>{links}</nav>"]
            parts += [_scenario(scenario, runs) for scenario in its]
    parts.append(_notes(facts))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>Load report</title>"
        f"<style>{CSS.read_text(encoding='utf-8')}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


# --- the first screen ---


def _head(judged: Sequence[Verdict], facts: Mapping[str, Any]) -> str:
    kept, of = kept_of(judged)
    is_good = kept == of and not facts["failures"]
    small = "the exit code was 0" if is_good else "the exit code was 1"
    warnings = [f"Could not be run: {failure}" for failure in facts["failures"]]
    if facts["others_cores"] > QUIET_CORES:
        warnings.append(
            f"Others used {facts['others_cores']:.2f} of these cores meanwhile: a quiet machine gives other figures."
        )
    told = "".join(f"<div class='warning'>{_text(warning)}</div>" for warning in warnings)
    return (
        "<header><div><h1>Embedding that never hangs: before and after</h1>"
        f"<p class='meta'>{_text(facts['at'])} · {'quick run' if facts['is_quick'] else 'full run'}, "
        f"{facts['took_s']:.0f} s · {facts['cores']} shared cores, {_text(facts['machine'])}, "
        f"Python {_text(facts['python'])}</p><p>The same app under the same load, with three ways to embed.</p></div>"
        f"<div class='verdict {'kept' if is_good else 'broken'}'>{kept} of {of} promises kept"
        f"<small>{small}</small></div></header>{told}"
    )


def _cards(runs: Runs) -> str:
    cards = []
    for card in CARDS:
        lines = [
            f"<dt class='{_class(contestant)}'>{contestant}</dt>"
            f"<dd class='{_class(contestant)}'>{card.value(runs[card.scenario, contestant])}</dd>"
            for contestant in ALL
            if (card.scenario, contestant) in runs
        ]
        if lines:
            cards.append(
                f"<div class='card'><h3>{card.title}</h3><p>{card.figure} · <a href='#{card.scenario}'>"
                f"{card.scenario}</a></p><dl>{''.join(lines)}</dl></div>"
            )
    return f"<div class='cards'>{''.join(cards)}</div>"


def _legend() -> str:
    entries = (f"<span class='{_class(name)}'><b>{name}</b> — {words}</span>" for name, words in WHO.items())
    return f"<div class='legend'>{''.join(entries)}</div>"


def _promises(judged: Sequence[Verdict]) -> str:
    rows = []
    # What is broken is what one has to look at; what is not judged can wait.
    for verdict in sorted(judged, key=lambda verdict: 2 - verdict.row.is_target - (not verdict.row.is_met)):
        row, unit = verdict.row, verdict.row.unit
        said = word(verdict)
        mark = (
            f"<span class='mark {said.lower()}'>{said}</span>" if said else "<span class='soft'>for information</span>"
        )
        others = f", worst of {verdict.of}" if verdict.of > 1 else ""
        rows.append(
            (
                mark,
                f"{_text(verdict.promise.words)}<br><span class='soft'>{_text(row.figure)} · "
                f"<a href='#{row.scenario}'>{row.scenario}</a>{others}</span>",
                f"<b class='adapter'>{shown(row.value, unit)}</b>",
                _text(bound(row)),
                f"<span class='legacy'>{shown(verdict.before, unit)}</span>",
                f"<span class='first-repair'>{shown(verdict.between, unit)}</span>",
            )
        )
    return _sheet(("", "promise", "adapter", "bound", "legacy", "first repair"), rows, numbers_from=2)


def _ladder(runs: Runs) -> str:
    callers = {each.name: each.load.callers for each in SCENARIOS if isinstance(each.load, Closed) and each.apps == 1}
    steps = [run for run in runs.values() if run.scenario in callers and run.scenario.startswith("callers-")]
    if not steps:
        return ""
    return (
        "<h2>From one caller to many</h2><p class='soft'>A large cross: some had no answer when the scenario was over, "
        "and waited at least so long.</p>"
        f"<div class='plot'>{plots.ladder(steps, lambda run: callers[run.scenario])}</div>"
    )


# --- one scenario ---


def _scenario(scenario: Scenario, runs: Runs) -> str:
    its = [runs[scenario.name, contestant] for contestant in ALL if (scenario.name, contestant) in runs]
    head = (
        "", "vectors", "errors", "p50", "p95", "p99", "longest", "app held", "threads", "memory", "CPU, s",
        "connections", "at a time",
    )  # fmt: skip
    return (
        f"<section class='scenario' id='{scenario.name}'><h3>{scenario.name}</h3>"
        f"<p>{_text(scenario.shows)}<br><span class='soft'>{_text(scenario.words)}.</span></p>"
        f"{_table(head, [_row(run) for run in its], numbers_from=3)}"
        f"<div class='plot'>{plots.timelines(its)}</div></section>"
    )


def _row(run: Run) -> tuple[str, ...]:
    errors = ", ".join(f"{count} {_text(name)}" for name, count in run.outcomes.most_common() if name != OK) or "none"
    app_cpu_s, proxy_cpu_s = run.cpu_s
    has_proxy = run.contestant == JUDGED
    return (
        f"<b class='{_class(run.contestant)}'>{run.contestant}</b>",
        f"{run.outcomes[OK]}/{len(run.answers)}",
        errors,
        *(_wait(run, share) for share in (0.5, 0.95, 0.99, 1.0)),
        _held(run),
        f"{run.highest(lambda sample: sample.app_threads + sample.proxy_threads):.0f}",
        f"{run.memory_bytes / MB:.0f} MB",
        f"{app_cpu_s:.1f} + {proxy_cpu_s:.1f}" if has_proxy else f"{app_cpu_s:.1f}",
        f"{run.upstream_connections}, {shown(run.upstream_reuse * 100, '%')}",
        str(run.upstream_concurrency),
    )


def _notes(facts: Mapping[str, Any]) -> str:
    return (
        "<h2>How to read it</h2><ul class='soft'>"
        "<li>A wait counts from the instant a request was meant to start, also when the app had no time for it then. "
        "One without an answer has waited until the scenario was over; it would have waited longer.</li>"
        "<li><b>App held</b>: the longest time in which the app's event loop did nothing else: no other request, no "
        "health check, no timer.</li>"
        "<li><b>Memory, threads</b>: all processes of the contestant, the proxy included, at their highest. "
        "<b>CPU</b>: of the app, and of the proxy. <b>Connections</b>: opened to the upstream, and the share of texts "
        "that needed no new one; <b>at a time</b>: calls under way there at the highest.</li>"
        "<li>In the pictures: a dot is a vector, a cross an error, a triangle a request without an answer.</li>"
        "<li>App and proxy share one core, the upstream has another. Every vector was compared with the right one, "
        "whole.</li></ul>"
        f"<p class='meta'>Everything, request by request, is in results.json. Others used "
        f"{facts['others_cores']:.2f} cores meanwhile.</p>"
    )


# --- pieces ---


def _wait(run: Run, share: float, kind: str = "") -> str:
    """Write a wait; one that ended only because the scenario did is at least that long."""
    value = run.wait_s(share, kind)
    if math.isnan(value):
        return "–"
    lost = run.unanswered and value >= min(run.waits_s(kind, "unanswered"), default=math.inf)
    return f"{'> ' if lost else ''}{_duration(value)}"


def _held(run: Run) -> str:
    value = run.longest_hold_s
    is_cut = not run.is_over and run.holds and sum(run.holds[-1]) >= run.lasted_s - 0.1
    return f"{'> ' if is_cut else ''}{_duration(value)}" if value else "< 5 ms"


def _duration(value_s: float) -> str:
    return shown(value_s, "s") if value_s >= 0.1 else f"{value_s * 1e3:.0f} ms"


def _answered(run: Run) -> str:
    return f"{run.outcomes[OK]} of {len(run.answers)} in {run.lasted_s:.1f} s"


def _sheet(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int) -> str:
    return f"<div class='sheet'>{_table(head, rows, numbers_from=numbers_from)}</div>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        numbered = (
            f"<{tag} class='number'>{cell}</{tag}>" if n >= numbers_from else f"<{tag}>{cell}</{tag}>"
            for n, cell in enumerate(cells)
        )
        return f"<tr>{''.join(numbered)}</tr>"

    return f"<table><thead>{line(head, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def _class(contestant: str) -> str:
    return contestant.replace(" ", "-")


def _text(words: str) -> str:
    return html.escape(words)
