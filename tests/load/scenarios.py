"""
What is measured, and what it should be. Each scenario states its load in words, and gives rows of the table.

The targets were set with the Go tools on two cores: the proxy alone on one, mock and generator together on the other.
Contestants take turns within one run, and what counts is the median of the repetitions.
"""

from __future__ import annotations

import json
import math
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.load.processes import BEHIND, WIDTH, Contestant, Process, Rig, ask, finished, resident_bytes
from tests.load.results import Row, ideal, median

WARM_S = 0.4
"""Connections are opened and code is warm before anything counts."""
SETTLE_S = 1.0
"""Memory is read when the last answers are gone."""
MB = 1e6

SLOTS, BASE_MS, PER_INPUT_MS = 8, 30.0, 1.0
"""An upstream like a small GPU server: few calls at a time, and larger ones are cheaper per text."""

RPM = 1200
RPM_BURST_S = 0.1
"""The upstream's bucket holds two requests: the pacing has to be even, not just right on average."""
PACED_REQUESTS, PACED_CALLERS = 600, 32
PACED_MAX_S = 10.0
"""Far beyond the target; one request each would take 30 s."""

MIX_OF_HALF: tuple[Mapping[str, Any], ...] = (
    {"requests": 70_000, "c": 64, "texts": "zipf", "unique_ratio": 0.5},
    {"requests": 25_000, "c": 32, "format": "float"},
    {"requests": 5_000, "c": 8, "batch": 8},
)
"""100 000 requests: hits and misses, decimals, lists."""
MIX_MAX_S = 45.0
"""Of each part; who takes longer has not answered all of them, and misses that target."""

BULK_INPUTS = 2048
INTERACTIVE_PER_S = 100
"""Enough for a 99th percentile within seconds, and not a load."""
PROBE_EVERY_S = 0.002
BULK_START_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Callers:
    """A closed loop: each caller asks again as soon as it is answered."""

    count: int
    inputs: int = 1
    encoding: str = "base64"
    texts: str = "unique"

    @property
    def options(self) -> dict[str, Any]:
        """Return it as options of the generator."""
        return {"c": self.count, "batch": self.inputs, "format": self.encoding, "texts": self.texts}

    @property
    def words(self) -> str:
        """Return it in words."""
        inputs = "1 input" if self.inputs == 1 else f"{self.inputs} inputs"
        callers = "1 caller" if self.count == 1 else f"{self.count} callers"
        return f"{WIDTH} numbers, {inputs} per request, {self.encoding}, closed loop of {callers}, {self.texts} texts"


@dataclass(slots=True)
class Bench:
    """One run of the benchmark: how long, how often, and everything that was measured."""

    rig: Rig
    seconds: float
    repeat: int
    runs: list[dict[str, Any]] = field(default_factory=list)

    def load(self, scenario: str, contestant: Contestant, **options: Any) -> dict[str, Any]:
        """Run a load, keep what the generator says, and say a word about it."""
        return self.keep(scenario, contestant, self.rig.load(contestant.target, **options))

    def keep(self, scenario: str, contestant: Contestant, run: dict[str, Any]) -> dict[str, Any]:
        """Keep what a generator said."""
        run.pop("timeline", None)
        self.runs.append({"scenario": scenario, "contestant": contestant.name, **run})
        latency = run["lat_ms"]
        print(
            f"  {scenario:12} {contestant.name:8} {run['emb_per_s']:9.0f} embeddings/s"
            f"  p50 {latency['p50']:8.2f} ms  p99 {latency['p99']:8.2f} ms  failures {failures(run)}"
            f"{' ' + str(run['errors']) if run['errors'] else ''}",
            file=sys.stderr,
            flush=True,
        )
        return run


def failures(run: Mapping[str, Any]) -> int:
    """Count everything that went wrong in a run."""
    counted = sum(run["errors"].values()) + run["wrong_vectors"] + run["missing_vectors"] + run["format_mismatch"]
    return int(counted) + int(run["dropped_local"])


def failed(scenario: str, *runs: Mapping[str, Any]) -> Row:
    """Return the row that says that nothing went wrong."""
    return Row(scenario, "errors, wrong or missing vectors", sum(failures(run) for run in runs), at_most=0)


def rates(runs: list[dict[str, Any]]) -> float:
    """Return the median of the embeddings per second."""
    return median([run["emb_per_s"] for run in runs])


def latency(runs: list[dict[str, Any]], name: str) -> float:
    """Return the median of a percentile, in milliseconds."""
    return median([run["lat_ms"][name] for run in runs])


@dataclass(frozen=True, slots=True)
class Scenario:
    """A name, the load in words, and how it is measured."""

    name: str
    words: str
    measure: Callable[[Bench, str], list[Row]]

    def rows(self, bench: Bench) -> list[Row]:
        """Measure; one that cannot be measured has missed, and the others go on."""
        print(f"{self.name}: {self.words}", file=sys.stderr, flush=True)
        try:
            return self.measure(bench, self.name)
        except (OSError, RuntimeError) as error:
            print(f"  {self.name} ended with an error: {error}", file=sys.stderr, flush=True)
            return [Row(self.name, "ended with an error", math.nan, at_most=0)]


# --- beside the yardstick ---


def versus(
    bench: Bench,
    name: str,
    callers: Callers,
    *,
    at_least: float,
    bare_callers: Callers | None = None,
    is_warmed: bool = False,
    below_mb: float | None = None,
) -> list[Row]:
    """Compare the proxy with the yardstick in front of the same upstream, in turn."""
    with bench.rig.mock() as mock, bench.rig.bare(mock) as bare, bench.rig.sidecar(mock) as sidecar:
        turns = ((bare, bare_callers or callers), (sidecar, callers))
        if is_warmed:
            bench.rig.load(sidecar.target, texts="seq", requests=1000, c=32)
        for contestant, its in turns:
            bench.rig.load(contestant.target, duration=WARM_S, **its.options)
        runs: dict[str, list[dict[str, Any]]] = {"bare": [], "sidecar": []}
        for _ in range(bench.repeat):
            for contestant, its in turns:
                run = bench.load(name, contestant, duration=bench.seconds, **its.options)
                runs[contestant.name].append(run)
        peak_mb = resident_bytes(sidecar.pid, peak=True) / MB
    ours, yard = rates(runs["sidecar"]), rates(runs["bare"])
    rows = [
        Row(name, "bare", yard, "embeddings/s"),
        Row(name, "sidecar", ours, "embeddings/s"),
        Row(name, "sidecar, p99", latency(runs["sidecar"], "p99"), "ms"),
        Row(name, "sidecar ÷ bare", ours / yard if yard else math.nan, "×", at_least=at_least),
    ]
    if below_mb:
        rows.append(Row(name, "sidecar, highest memory", peak_mb, "MB", below=below_mb))
    return [*rows, failed(name, *runs["bare"], *runs["sidecar"])]


def _versus(name: str, callers: Callers, words: str = "", **targets: Any) -> Scenario:
    return Scenario(
        name,
        f"upstream 0 ms; {callers.words}{words}",
        lambda bench, name: versus(bench, name, callers, **targets),
    )


# --- an upstream with few slots ---


def slots(bench: Bench, name: str, callers: Callers) -> list[Row]:
    """Compare the proxy with what the upstream gives at best."""
    config = {"base_ms": BASE_MS, "per_item_ms": PER_INPUT_MS, "max_concurrent": SLOTS, "overflow": "queue"}
    with bench.rig.mock(**config) as mock, bench.rig.sidecar(mock, f"balance.slots = {SLOTS}") as sidecar:
        bench.rig.load(sidecar.target, duration=WARM_S, **callers.options)
        runs = [bench.load(name, sidecar, duration=bench.seconds, **callers.options) for _ in range(bench.repeat)]
        calls = bench.rig.stats(mock)["InflightMax"]
    best = ideal(SLOTS, callers.count, base_ms=BASE_MS, per_input_ms=PER_INPUT_MS)
    p50, p99 = latency(runs, "p50"), latency(runs, "p99")
    return [
        Row(name, "ideal", best, "embeddings/s"),
        Row(name, "sidecar", rates(runs), "embeddings/s"),
        Row(name, "sidecar ÷ ideal", rates(runs) / best, "×", at_least=0.9),
        Row(name, "p50", p50, "ms"),
        Row(name, "p99 ÷ p50", p99 / p50 if p50 else math.nan, "×", at_most=2),
        Row(name, "calls at a time, highest", calls, at_most=SLOTS),
        failed(name, *runs),
    ]


def _slots(callers: int) -> Scenario:
    its = Callers(callers)
    return Scenario(
        f"slots-{callers}",
        f"upstream of {SLOTS} slots, {BASE_MS:g} ms + {PER_INPUT_MS:g} ms per input; {its.words}",
        lambda bench, name: slots(bench, name, its),
    )


# --- a limit per minute ---


def paced(bench: Bench, name: str) -> list[Row]:
    """Push more single texts than the upstream allows requests: none may be refused."""
    with (
        bench.rig.mock(rpm=RPM, burst_s=RPM_BURST_S) as mock,
        bench.rig.sidecar(mock, f"bucket.requests_per_minute = {RPM}") as sidecar,
    ):
        runs = [
            bench.load(name, sidecar, requests=PACED_REQUESTS, c=PACED_CALLERS, max_run=PACED_MAX_S)
            for _ in range(bench.repeat)
        ]
        stats = bench.rig.stats(mock)
    return [
        Row(name, f"{PACED_REQUESTS} requests", median([run["wall_s"] for run in runs]), "s", below=3),
        Row(name, "requests to the upstream", stats["Requests"] / bench.repeat, "per run"),
        Row(name, "refused by the upstream (429)", stats["RateLimited"], at_most=0),
        failed(name, *runs),
    ]


# --- memory ---


def memory(bench: Bench, name: str) -> list[Row]:
    """Read the memory idle, after one half of the requests, and after the other."""
    runs = []
    with bench.rig.mock() as mock, bench.rig.sidecar(mock) as sidecar:
        time.sleep(SETTLE_S)
        sizes = [resident_bytes(sidecar.pid) / MB]
        for _ in range(2):
            runs += [bench.load(name, sidecar, max_run=MIX_MAX_S, **part) for part in MIX_OF_HALF]
            time.sleep(SETTLE_S)
            sizes.append(resident_bytes(sidecar.pid) / MB)
    half = sum(part["requests"] for part in MIX_OF_HALF)
    return [
        Row(name, "idle, without the embedded model", sizes[0], "MB", below=80),
        Row(name, "requests", sum(run["requests"] for run in runs), at_least=2 * half),
        Row(name, f"after {half} requests", sizes[1], "MB"),
        Row(name, f"after {2 * half} requests", sizes[2], "MB"),
        Row(name, "difference of the halves", abs(sizes[2] / sizes[1] - 1) * 100, "%", at_most=5),
        failed(name, *runs),
    ]


# --- a huge request beside small ones ---


class Probe(threading.Thread):
    """Asks for /livez every two milliseconds and keeps the worst time: how long the loop was held, from outside."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self._host, _, self._port = address.rpartition(":")
        self._is_over = threading.Event()
        self.worst_s = 0.0

    def run(self) -> None:
        request = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with socket.create_connection((self._host, int(self._port)), timeout=30) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not self._is_over.wait(PROBE_EVERY_S):
                start = time.perf_counter()
                connection.sendall(request)
                answer = connection.recv(65_536)
                while answer and b"\r\n\r\n" not in answer:
                    answer += connection.recv(65_536)
                self.worst_s = max(self.worst_s, time.perf_counter() - start)

    def __enter__(self) -> Probe:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join(30)


def stall(bench: Bench, name: str) -> list[Row]:
    """Ask small questions at a rate, without and with a caller beside them that asks for 2048 vectors as decimals."""
    interactive = {"mode": "open", "rate": INTERACTIVE_PER_S, "duration": bench.seconds}
    quiet, beside, bulk, worst_ms = [], [], [], []
    with bench.rig.mock() as mock, bench.rig.sidecar(mock) as sidecar:
        bench.rig.load(sidecar.target, **{**interactive, "duration": WARM_S})
        for _ in range(bench.repeat):
            with Probe(sidecar.address):
                quiet.append(bench.load(name, sidecar, **interactive))
            # Behind the others, since its callers' core is theirs too, and it is the proxy that is measured.
            options = {"c": 1, "batch": BULK_INPUTS, "format": "float", "duration": bench.seconds + 1, "timeout": 60}
            seen = bench.rig.stats(mock)["Items"]
            with bench.rig.generate(sidecar.target, niceness=BEHIND, **options) as process:
                _wait_for_inputs(bench.rig, mock, seen + BULK_INPUTS, process)
                with Probe(sidecar.address) as probe:
                    beside.append(bench.load(name, sidecar, **interactive))
                worst_ms.append(probe.worst_s * 1e3)
                bulk.append(bench.keep(name, sidecar, finished(process, bench.seconds + 60)))
        held_s = json.loads(ask(sidecar.socket_path, "/status")[1]).get("process", {}).get("loop_lag_max_s")
    p99, idle_p99 = latency(beside, "p99"), latency(quiet, "p99")
    rows = [
        Row(name, "small ones alone, p99", idle_p99, "ms"),
        Row(name, "beside the huge one, p99", p99, "ms"),
        Row(name, "p99 beside ÷ alone", p99 / idle_p99 if idle_p99 else math.nan, "×", at_most=3),
        Row(name, "huge requests answered", sum(run["ok"] for run in bulk), at_least=bench.repeat),
        Row(name, "huge request, p50", latency(bulk, "p50"), "ms"),
    ]
    # The proxy's own figure is the better one, as the probe also waits for its own core.
    limit = {"below": 20.0}
    own_limit, probe_limit = ({}, limit) if held_s is None else (limit, {})
    rows.append(Row(name, "worst GET /livez beside it", max(worst_ms), "ms", **probe_limit))
    if held_s is not None:
        rows.append(Row(name, "longest hold of the event loop", held_s * 1e3, "ms", **own_limit))
    return [*rows, failed(name, *quiet, *beside, *bulk)]


def _wait_for_inputs(rig: Rig, mock: str, count: int, process: Process) -> None:
    end = time.monotonic() + BULK_START_TIMEOUT_S
    while rig.stats(mock)["Items"] < count:
        if time.monotonic() > end or process.popen.poll() is not None:
            raise RuntimeError(f"the bulk caller did not get to the upstream: {process.errors()}")
        time.sleep(0.01)


# --- all of them ---


SCENARIOS: tuple[Scenario, ...] = (
    _versus("single-1", Callers(1), at_least=0.85),
    _versus("single-64", Callers(64), at_least=2.0),
    _versus("float-8", Callers(8, encoding="float"), at_least=0.7),
    _versus("bulk-base64", Callers(8, inputs=64), at_least=0.6, below_mb=250),
    _versus("bulk-float", Callers(8, inputs=64, encoding="float"), at_least=0.35),
    _versus(
        "cached",
        Callers(64, texts="zipf"),
        "; of 1000 texts, all seen before; bare has unique ones",
        at_least=2.0,
        bare_callers=Callers(64),
        is_warmed=True,
    ),
    _slots(64),
    _slots(256),
    Scenario(
        "paced",
        f"upstream of {RPM} requests per minute, {RPM_BURST_S * RPM / 60:g} at once; "
        f"{PACED_REQUESTS} single texts, {Callers(PACED_CALLERS).words}",
        paced,
    ),
    Scenario(
        "memory",
        "upstream 0 ms; 200 000 requests, mixed: single texts of which half are repeated, decimals, lists of 8",
        memory,
    ),
    Scenario(
        "stall",
        f"upstream 0 ms; one caller asks for {BULK_INPUTS} inputs as decimals again and again, beside it single texts "
        f"at {INTERACTIVE_PER_S} per second (open loop), base64, and GET /livez every {PROBE_EVERY_S * 1e3:g} ms",
        stall,
    ),
)
