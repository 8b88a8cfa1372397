"""
Pictures of runs, as SVG to stand in a page: drawn by matplotlib, no script, nothing from outside.

Text stays text, so that it has the page's letters, can be searched, and costs next to nothing.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tests.load.suite.ledger import OK, UNANSWERED, Answer
from tests.load.suite.probes import Sample
from tests.load.suite.runs import Run

COLOURS = {"legacy": "#c2571a", "first repair": "#8a7a2f", "adapter": "#0b6bcb"}
"""Told apart with any kind of colour blindness: dark orange, olive, blue."""
INK, FAINT, FAULT = "#3b4252", "#e3e7ee", "#f6dcd6"
MANY = 600
"""More points than this are a picture inside the picture: each as a path of its own makes a page of megabytes."""
BIN_S = 0.1
MB = 1e6

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "load",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#b8c0cc",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": "#5d6778",
    "ytick.color": "#5d6778",
    "lines.linewidth": 1.5,
    "figure.dpi": 100,
    "savefig.dpi": 130,
}


def ladder(runs: Sequence[Run], callers: Callable[[Run], int]) -> str:
    """Draw what becomes of waits, the app's loop, throughput and the upstream as callers get more."""
    panels: tuple[tuple[str, Callable[[Run], float], bool], ...] = (
        ("Longest wait, s", lambda run: run.wait_s(1.0), True),
        ("App's event loop held, longest, s", lambda run: max(0.001, run.longest_hold_s), False),
        ("Vectors per second", lambda run: run.texts_per_s, False),
        ("Calls at a time at the upstream", lambda run: run.upstream_concurrency, False),
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.2, 2.7), layout="constrained")
        for axes, (title, value, has_crosses) in zip(figure.subplots(1, 4), panels, strict=True):
            for contestant in COLOURS:
                its = [run for run in runs if run.contestant == contestant]
                if its:
                    # A logarithm has no zero: nothing is drawn where there was nothing.
                    points = [(callers(run), value(run) or math.nan) for run in its]
                    axes.plot(*zip(*points, strict=True), marker="o", ms=3.5, color=COLOURS[contestant])
                    lost = [run for run in its if run.unanswered and has_crosses]
                    axes.plot([callers(run) for run in lost], list(map(value, lost)), "x", ms=9, mew=2,
                              color=COLOURS[contestant])  # fmt: skip
            axes.set(title=title, xscale="log", xlabel="callers at the same time")
            ticks = sorted({callers(run) for run in runs})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            decades(axes)
        return svg(figure, "ladder")


def timelines(runs: Sequence[Run]) -> str:
    """Draw one scenario over time: waits, the app's loop, memory, threads, CPU, and what the upstream saw."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.2, 4.6), layout="constrained")
        (waits, holds, calls), (memory, threads, cpu) = figure.subplots(2, 3)
        for run in runs:
            colour = COLOURS[run.contestant]
            _waits(waits, run, colour)
            _holds(holds, run, colour)
            _over_time(calls, run, lambda sample: sample.upstream_calls, colour)
            _over_time(memory, run, lambda sample: (sample.app_bytes + sample.proxy_bytes) / MB, colour)
            _over_time(threads, run, lambda sample: sample.app_threads + sample.proxy_threads, colour)
            _cpu(cpu, run, colour)
            if any(sample.proxy_bytes for sample in run.samples):
                _over_time(memory, run, lambda sample: sample.app_bytes / MB, colour, ":")
        waits.set(title="Wait of each request, s", xlabel="meant to start, s")
        holds.set(title="App's event loop held, ms", xlabel="s")
        decades(waits)
        decades(holds)
        calls.set(title="Calls under way at the upstream", xlabel="s", ylim=(0, None))
        memory.set(title="Memory, MB (dotted: the app alone)", xlabel="s", ylim=(0, None))
        threads.set(title="Threads", xlabel="s", ylim=(0, None))
        threads.yaxis.set_major_locator(MaxNLocator(integer=True))
        cpu.set(title="CPU, cores (app and proxy share one)", xlabel="s", ylim=(0, None))
        fault = runs[0].fault
        lasted_s = max(run.lasted_s for run in runs)
        asked_s = max((answer.intended_s for run in runs for answer in run.answers), default=lasted_s)
        for axes in figure.axes:
            axes.set_xlim(0, 1.02 * asked_s if axes is waits else lasted_s)
            if fault:
                axes.axvspan(*fault, color=FAULT, lw=0, zorder=0)
        return svg(figure, runs[0].scenario)


def _waits(axes: Axes, run: Run, colour: str) -> None:
    """A dot for each vector, a cross for each error, a triangle for what never came."""
    groups: tuple[tuple[str, Callable[[Answer], bool]], ...] = (
        ("o", lambda answer: answer.outcome == OK),
        ("x", lambda answer: answer.outcome not in (OK, UNANSWERED)),
        ("^", lambda answer: answer.outcome == UNANSWERED),
    )
    for mark, accepts in groups:
        answers = run.having(accepts)
        if answers:
            # A logarithm has no zero.
            axes.plot(
                [answer.intended_s for answer in answers], [max(1e-3, answer.waited_s) for answer in answers],
                mark, ms=3.2, color=colour, alpha=0.6, mew=0.9 if mark == "x" else 0, rasterized=len(answers) > MANY,
            )  # fmt: skip


def _holds(axes: Axes, run: Run, colour: str) -> None:
    """For how long the loop was held, by tenth of a second: what lasts is drawn over the time it lasted."""
    for at_s, held_s in _longest_each(run.holds):
        axes.plot([at_s, at_s + held_s], [held_s * 1e3] * 2, color=colour, lw=2.2, solid_capstyle="round")


def _longest_each(holds: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep the longest of each tenth of a second: others would not be seen beside it."""
    bins = itertools.groupby(holds, key=lambda hold: int(hold[0] / BIN_S))
    return [max(found, key=lambda hold: hold[1]) for _, found in bins]


def _over_time(axes: Axes, run: Run, value: Callable[[Sample], float], colour: str, style: str = "-") -> None:
    axes.plot([sample.at_s for sample in run.samples], list(map(value, run.samples)), style, color=colour, lw=1.4)


def _cpu(axes: Axes, run: Run, colour: str) -> None:
    """The clock of the kernel has steps of 10 ms, so a rate is taken over half a second."""
    looked = run.samples[::5]
    points = [
        ((a.at_s + b.at_s) / 2, (b.app_cpu_s + b.proxy_cpu_s - a.app_cpu_s - a.proxy_cpu_s) / (b.at_s - a.at_s))
        for a, b in itertools.pairwise(looked)
        if b.at_s > a.at_s
    ]
    axes.plot([at_s for at_s, _ in points], [max(0.0, cores) for _, cores in points], color=colour, lw=1.4)


def decades(axes: Axes) -> None:
    """Let a logarithmic axis begin and end at powers of ten, and name nothing else: numbers between are crowded."""
    drawn: list[Any] = [line.get_ydata() for line in axes.lines]
    values = [value for each in drawn for value in each if value > 0]
    axes.set_yscale("log")
    if values:
        lowest = math.floor(math.log10(min(values)) + 1e-9)
        axes.set_ylim(10.0**lowest * 0.8, 10.0 ** max(lowest + 1, math.ceil(math.log10(max(values)) - 1e-9)) * 1.25)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an element of a page; its ids are its own, also beside others."""
    target = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(target, format="svg", metadata=nothing, transparent=True)
    drawn = target.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    # The page decides how wide it is, and what its letters are.
    drawn = re.sub(r'<svg ([^>]*?)(?:width|height)="[^"]+" ?', r"<svg \1", drawn, count=1)
    drawn = re.sub(r'<svg ([^>]*?)(?:width|height)="[^"]+" ?', r"<svg \1", drawn, count=1)
    drawn = re.sub(r"font: ([\w ]*?)([\d.]+px) [^;\"]*", r"font: \1\2 system-ui, sans-serif", drawn)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
