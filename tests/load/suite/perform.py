"""
One contestant in one scenario: start what it needs, let the faults happen, look, and end everything.

The app and its proxy share one core, the upstream has the other: what a contestant brings along, it pays for.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.load.processes import START_TIMEOUT_S, Contestant, Process, Rig
from tests.load.suite.app import Task
from tests.load.suite.contestants import Surroundings
from tests.load.suite.ledger import Answer
from tests.load.suite.probes import Sample, breaker, sampled
from tests.load.suite.runs import Run, judged
from tests.load.suite.scenarios import Scenario
from tests.load.suite.upstream import Upstream
from tests.load.vectors import Table

LOOK_EVERY_S = 0.1
BREAKER_EVERY_S = 0.25
OVERDUE_S = 15.0
"""An app that has not reported this long after its limit is ended."""
SEED = 20


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    at_s: float
    limit_s: float
    settled: int
    outstanding: int
    bytes_now: int


Tell = Callable[[Progress], None]


class AppProcess:
    """One worker of the app, and what it has said so far."""

    def __init__(self, task: Task, cores: frozenset[int]) -> None:
        self.process = Process([sys.executable, "-m", "tests.load.suite.app", task.text()], cores)
        self.said: dict[str, dict[str, Any]] = {}
        assert self.process.popen.stdout
        self._output = self.process.popen.stdout.fileno()
        os.set_blocking(self._output, False)
        self._read = b""

    def listen(self) -> None:
        """Take in what it has said since."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._output, 1 << 20):
                self._read += piece
        *lines, self._read = self._read.split(b"\n")
        for line in lines:
            said = json.loads(line)
            self.said[said["say"]] = said
        if self.process.popen.poll() and "report" not in self.said:
            raise RuntimeError(f"the app has ended with {self.process.popen.returncode}: {self.process.errors()}")


@dataclass(slots=True)
class Watch:
    """What is seen from outside, while it happens."""

    apps: list[AppProcess]
    proxy: Contestant | None
    upstream: Upstream
    start: float = 0.0
    rest: Sample = field(default_factory=lambda: Sample(0.0))
    samples: list[Sample] = field(default_factory=list)
    breaker: list[tuple[float, str]] = field(default_factory=list)
    _breaker_at: float = 0.0

    def look(self, now: float) -> None:
        """Look at everything once."""
        calls = self.upstream.counts().get("Inflight", 0)
        # An app that has reported may end at any moment.
        with contextlib.suppress(OSError, StopIteration):
            pids = [app.process.pid for app in self.apps]
            at_s = now - self.start if self.start else 0.0
            sample = sampled(at_s, pids, self.proxy.pid if self.proxy else None, calls)
            if self.start:
                self.samples.append(sample)
            elif not any("start" in app.said for app in self.apps):
                self.rest = sample
        if self.proxy and self.start and now >= self._breaker_at:
            self._breaker_at = now + BREAKER_EVERY_S
            with contextlib.suppress(OSError):
                state = breaker(self.proxy.socket_path)
                if not self.breaker or self.breaker[-1][1] != state:
                    self.breaker.append((now - self.start, state))

    def progress(self, now: float, limit_s: float) -> Progress:
        said = [app.said.get("progress", {}) for app in self.apps]
        last = self.samples[-1] if self.samples else self.rest
        return Progress(
            now - self.start,
            limit_s,
            sum(each.get("settled", 0) for each in said),
            sum(each.get("outstanding", 0) for each in said),
            last.app_bytes + last.proxy_bytes,
        )


def perform(scenario: Scenario, contestant: str, rig: Rig, tools: str, table: Table, tell: Tell) -> Run:
    """Run a scenario; returns everything that was seen."""
    limit_s = scenario.limit_s(contestant)
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(Upstream(tools, rig.cores.others, scenario.upstream))
        proxy = stack.enter_context(rig.sidecar(upstream.address, scenario.proxy)) if contestant == "adapter" else None
        surroundings = Surroundings(upstream.address, proxy.socket_path if proxy else "", scenario.deadline_s)
        names = [f"{scenario.name} {contestant} {worker}" for worker in range(scenario.apps)]
        apps = [
            AppProcess(Task(contestant, surroundings, scenario.load, limit_s, SEED + n, name), rig.cores.proxy)
            for n, name in enumerate(names)
        ]
        for app in apps:
            stack.enter_context(app.process)
        watch = Watch(apps, proxy, upstream)
        _watch(watch, scenario, limit_s, tell)
        counts = upstream.counts()
    reports = [app.said["report"] for app in apps]
    answers: list[Answer] = []
    for name, report in zip(names, reports, strict=True):
        answers += judged(name, (Answer(*values) for values in report["answers"]), table)
    return Run(
        scenario.name,
        contestant,
        scenario.deadline_s,
        max(report["lasted_s"] for report in reports),
        all(report["is_over"] for report in reports),
        sorted(answers, key=lambda answer: answer.intended_s),
        # The loops of several workers are held each for itself; the worst is shown.
        max((report["holds"] for report in reports), key=lambda holds: max((held for _, held in holds), default=0.0)),
        watch.rest,
        watch.samples,
        counts,
        {key: sum(report["counts"].get(key, 0) for report in reports) for key in reports[0]["counts"]},
        watch.breaker,
        (scenario.fault.from_s, scenario.fault.until_s) if scenario.fault else None,
    )


def _watch(watch: Watch, scenario: Scenario, limit_s: float, tell: Tell) -> None:
    """Look until all apps have reported, and let happen what happens to the upstream."""
    steps = _steps(scenario, watch.upstream)
    step = next(steps, None)
    began = time.monotonic()
    while not all("report" in app.said for app in watch.apps):
        now = time.monotonic()
        for app in watch.apps:
            app.listen()
        if not watch.start and all("start" in app.said for app in watch.apps):
            watch.start = min(app.said["start"]["at"] for app in watch.apps)
        watch.look(now)
        if watch.start:
            tell(watch.progress(now, limit_s))
            while step and now - watch.start >= step[0]:
                step[1]()
                step = next(steps, None)
        if now - (watch.start or began) > (limit_s + OVERDUE_S if watch.start else START_TIMEOUT_S):
            raise RuntimeError(f"the app has not reported: {watch.apps[0].process.errors()}")
        next_s = LOOK_EVERY_S if not step or not watch.start else step[0] - (time.monotonic() - watch.start)
        time.sleep(max(0.0, min(LOOK_EVERY_S, next_s)))
    watch.look(time.monotonic())


def _steps(scenario: Scenario, upstream: Upstream) -> Iterator[tuple[float, Callable[[], None]]]:
    """Give what happens to the upstream, and when."""
    if fault := scenario.fault:
        if fault.config:
            yield fault.from_s, lambda: upstream.configure(fault.config)
            yield fault.until_s, lambda: upstream.configure({})
        else:
            yield fault.from_s, upstream.kill
            yield fault.until_s, upstream.start
