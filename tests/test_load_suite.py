"""The load suite judges rightly: arrivals, waits, figures, promises, page, exit code; and it ends what hangs."""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from proxy.wiring.config import load as load_settings
from tests.load.mock import Config
from tests.load.processes import Rig, settings
from tests.load.suite import arrivals
from tests.load.suite.__main__ import chosen, concluded, read
from tests.load.suite.app import Task
from tests.load.suite.arrivals import Closed, Ingest, Open, instants
from tests.load.suite.contestants import CONTESTANTS, Surroundings, openai_failure
from tests.load.suite.ledger import OK, UNANSWERED, Answer, Ledger, Request, digest, texts
from tests.load.suite.perform import Progress, perform
from tests.load.suite.probes import LoopProbe, Sample
from tests.load.suite.promises import PROMISES, Promise, is_kept, kept_of, shown, verdicts, worst
from tests.load.suite.runs import WRONG, Run, judged, reuse
from tests.load.suite.scenarios import ALL, NAMES, SCENARIOS, Fault, Scenario
from tests.load.suite.summary import Screen, table
from tests.load.suite.upstream import added
from tests.load.vectors import Table, key

TABLE = Table()
MB = 1_000_000


def answer(outcome: str = OK, *, at_s: float = 0.0, waited_s: float = 0.1, **more: Any) -> Answer:
    return Answer(1, "query", 1, at_s, waited_s, outcome, **more)


def sample(at_s: float, *, app_mb: int = 40, proxy_mb: int = 60, threads: int = 3) -> Sample:
    return Sample(at_s, app_mb * MB, threads, at_s / 10, proxy_mb * MB, 4, at_s / 20, 1)


def run(scenario: str = "callers-10", contestant: str = "adapter", **more: Any) -> Run:
    """A run in which nothing went wrong."""
    given: dict[str, Any] = {
        "deadline_s": 10.0,
        "lasted_s": 3.0,
        "is_over": True,
        "answers": [answer(at_s=n / 10) for n in range(20)],
        "holds": [(0.5, 0.006)],
        "rest": sample(-0.1),
        "samples": [sample(n / 10) for n in range(30)],
        "upstream": {"Items": 20, "ConnsNew": 1, "InflightMax": 4},
        "counts": {"texts": 20, "requests": 20, "connections": 1},
        "breaker": [(0.0, "closed"), (2.2, "open"), (4.6, "closed")],
        "fault": (0.5, 1.0),
    }
    return Run(scenario, contestant, **{**given, **more})


# --- arrivals ---


def test_arrivals_come_at_their_rate() -> None:
    """A Poisson process: so many per second on average, in order, and none after the end."""
    drawn = list(instants(50.0, 200.0, random.Random(1)))

    assert drawn == sorted(drawn)
    assert 0 < drawn[0] < drawn[-1] < 200
    assert len(drawn) == pytest.approx(10_000, rel=0.05)


def test_arrivals_are_the_same_for_each_contestant() -> None:
    """The same seed gives the same instants."""
    one, other = (list(instants(20.0, 5.0, random.Random(7))) for _ in range(2))

    assert one == other


@pytest.mark.parametrize("load", [Closed(3, 1.0), Open(20.0, 2.0), Ingest(2, 64, 10.0, 5.0)])
def test_app_gets_the_load_that_it_is_given(load: arrivals.Load) -> None:
    """A task survives its way through JSON."""
    task = Task("legacy", Surroundings("127.0.0.1:1", "", 2.0), load, 8.0, 20, "r")

    assert Task.read(task.text()) == task


async def test_waits_count_from_the_intended_start_also_when_the_loop_is_held() -> None:
    """Callers that a held loop gets to one by one were all meant to start at once."""
    ledger, start = Ledger(), time.monotonic()

    async def ask(request: Request) -> None:
        time.sleep(0.002)  # as a join inside an async method does
        ledger.settle(request, time.monotonic(), OK)

    await Closed(4, 0.0).run(start, ledger.intend, ask, random.Random(1))

    answers = ledger.answers(time.monotonic())
    assert [each.intended_s for each in answers] == [start] * 4
    assert sorted(each.waited_s for each in answers)[-1] >= 4 * 0.002


async def test_open_loop_asks_whatever_becomes_of_it() -> None:
    """All of its requests are under way though none is answered."""
    ledger, release = Ledger(), asyncio.Event()
    under_way = 0

    async def ask(request: Request) -> None:
        nonlocal under_way
        under_way += 1
        if under_way == len(list(instants(1000.0, 0.02, random.Random(3)))):
            release.set()
        await release.wait()
        ledger.settle(request, time.monotonic(), OK)

    await Open(1000.0, 0.02).run(time.monotonic(), ledger.intend, ask, random.Random(3))

    assert ledger.settled == under_way > 1


async def test_ingestion_has_documents_and_queries() -> None:
    """Workers embed documents of many chunks; queries come beside them."""
    ledger = Ledger()

    async def ask(request: Request) -> None:
        ledger.settle(request, time.monotonic(), OK)
        await asyncio.sleep(0)

    await Ingest(2, 64, 500.0, 0.02).run(time.monotonic(), ledger.intend, ask, random.Random(3))

    kinds = {each.kind: each.count for each in ledger.answers(time.monotonic())}
    assert kinds == {"document": 64, "query": 1}


# --- the ledger ---


def test_requests_without_an_answer_are_counted() -> None:
    """Those that should have started by the end are unanswered; those of later are nobody's."""
    ledger = Ledger(start=100.0)
    settled, _waiting, _later = (ledger.intend("query", 1, 100.0 + at_s) for at_s in (0.0, 1.0, 9.0))
    ledger.settle(settled, 100.5, "http_500")

    answers = ledger.answers(104.0)

    assert [(each.outcome, each.intended_s, each.waited_s) for each in answers] == [
        ("http_500", 0.0, 0.5),
        (UNANSWERED, 1.0, 3.0),
    ]
    assert (ledger.settled, ledger.outstanding(104.0)) == (1, 1)


def test_no_two_requests_share_a_text() -> None:
    """A cache must not help one of the contestants."""
    requests = [Request(n, kind, 3, 0.0) for n in (1, 11) for kind in ("query", "document")]
    found = [text for name in ("a adapter 0", "a adapter 1") for request in requests for text in texts(name, request)]

    assert len(set(found)) == len(found)


def test_wrong_vectors_are_seen_whatever_number_differs() -> None:
    """The digest is of all numbers; the right ones pass, in float32, as they came."""
    request = Request(1, "document", 2, 0.0)
    right = [TABLE.vector(key(text.encode())).tolist() for text in texts("r", request)]
    wrong = [right[0], [*right[1][:-1], right[1][-1] + 0.01]]
    swapped = right[::-1]

    answers = [
        Answer(1, "document", 2, 0.0, 0.1, OK, digest=digest(vectors)) for vectors in (right, wrong, swapped, right[:1])
    ]

    assert [each.outcome for each in judged("r", answers, TABLE)] == [OK, WRONG, WRONG, WRONG]


# --- figures ---


def test_waits_without_an_answer_are_part_of_the_percentiles() -> None:
    """Whoever has waited until the end is the slowest, not left out."""
    its = run(answers=[answer(waited_s=0.1), answer(waited_s=0.2), answer(UNANSWERED, waited_s=8.0)])

    assert (its.wait_s(0.5), its.wait_s(0.99), its.unanswered) == (0.2, 8.0, 1)
    assert its.error_share == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("answers", "lateness_s"),
    [
        ([answer(waited_s=2.0)], -8.0),
        ([answer(waited_s=2.0), answer("deadline_exceeded", waited_s=10.1)], 0.1),
        ([answer(waited_s=2.0), answer(UNANSWERED, waited_s=3.0)], math.inf),
    ],
)
def test_lateness_is_that_of_the_last(answers: list[Answer], lateness_s: float) -> None:
    """An error counts like a vector; what never came is later than anything."""
    assert run(answers=answers).lateness_s == pytest.approx(lateness_s)


def test_recovery_is_the_first_vector_after_the_fault() -> None:
    """Errors do not count, nor what came before."""
    answers = [
        answer(at_s=0.3, waited_s=0.1),
        answer("circuit_open", at_s=1.1, waited_s=0.0),
        answer(at_s=1.2, waited_s=0.3),
    ]

    assert run(answers=answers).recovery_s == pytest.approx(0.5)
    assert run(answers=answers[:2]).recovery_s == math.inf


def test_memory_is_that_of_app_and_proxy_at_the_same_moment() -> None:
    """Two peaks at different times are not added up."""
    its = run(samples=[sample(0.0, app_mb=90, proxy_mb=10), sample(1.0, app_mb=10, proxy_mb=60)])

    assert its.memory_bytes == 100 * MB


def test_growth_compares_the_last_third_with_the_second() -> None:
    """What grows at the start and stays there is flat."""
    grown = run(samples=[sample(n / 10, proxy_mb=60 + 2 * n) for n in range(30)])
    flat = run(samples=[sample(n / 10, proxy_mb=60 if n < 10 else 80) for n in range(30)])

    assert (grown.proxy_growth > 1.1, flat.proxy_growth) == (True, 1.0)


@pytest.mark.parametrize(("carried", "connections", "share"), [(100, 3, 0.97), (14, 14, 0.0), (5, 9, 0.0)])
def test_reuse_is_of_texts(carried: int, connections: int, share: float) -> None:
    """A connection per text is no reuse; retries on fresh ones cannot make it less than none."""
    assert reuse(carried, connections) == pytest.approx(share)
    assert math.isnan(reuse(0, connections))


def test_threads_are_counted_from_rest() -> None:
    """The suite's own thread is there before."""
    assert run(samples=[sample(0.0, threads=3), sample(1.0, threads=5)]).more_threads == 2


async def test_probe_sees_how_long_the_loop_was_held() -> None:
    """One hold is one entry, also one that still lasts."""
    probe = LoopProbe()
    probe.begin()
    await asyncio.sleep(0.02)
    time.sleep(0.03)
    lasting = probe.all_holds(time.monotonic())
    await asyncio.sleep(0.02)

    assert lasting[-1][1] >= 0.02
    assert max(held_s for _, held_s in probe.holds) >= 0.02


# --- promises ---


def broken(**more: Any) -> Promise:
    """A promise that cannot be kept."""
    return Promise("w", "f", ("callers-10",), lambda run, _: run.wait_s(1.0), "s", **more)


@pytest.mark.parametrize(
    ("bounds", "is_met"),
    [({"at_most": 0.1}, True), ({"below": 0.1}, False), ({"at_least": 0.11}, False), ({"at_least": 0.1}, True)],
)
def test_promise_is_judged_at_its_bound(bounds: dict[str, float], is_met: bool) -> None:
    """At it, just below, just above."""
    runs = {("callers-10", "adapter"): run()}

    assert is_kept(verdicts(runs, [broken(**bounds)])) is is_met


def test_promise_that_could_not_be_measured_is_broken() -> None:
    """A gate must not pass because nothing was seen."""
    runs = {("callers-10", "adapter"): run(answers=[])}

    assert not is_kept(verdicts(runs, [broken(at_most=5.0)]))


def test_figure_without_a_bound_is_not_judged() -> None:
    """It stands beside the others, and breaks nothing."""
    runs = {("callers-10", "adapter"): run(answers=[])}

    assert kept_of(verdicts(runs, [broken()])) == (0, 0)


def test_worst_scenario_is_shown() -> None:
    """The furthest from the bound; the hardest of equal ones; before all, one that could not be measured."""
    most, least = broken(at_most=1), broken(at_least=1)

    assert worst(most, [("a", 1.0), ("b", 3.0), ("c", 2.0)]) == ("b", 3.0)
    assert worst(least, [("a", 2.0), ("b", 1.0), ("c", 3.0)]) == ("b", 1.0)
    assert worst(most, [("a", 0.0), ("b", 0.0)]) == ("b", 0.0)
    assert worst(most, [("a", 5.0), ("b", math.nan), ("c", math.inf)])[0] == "b"


def test_others_are_shown_in_the_same_scenario() -> None:
    """Before and after are of one load."""
    runs = {
        ("callers-10", "adapter"): run(),
        ("callers-10", "legacy"): run(contestant="legacy", answers=[answer(waited_s=2.0)]),
    }

    (verdict,) = verdicts(runs, [broken(at_most=1.0)])

    assert (verdict.row.value, verdict.before, math.isnan(verdict.between)) == (0.1, 2.0, True)


def test_memory_is_compared_with_all_that_the_old_method_holds() -> None:
    """App and proxy together against the old app: 100 MB against 150 is a third less."""
    promise = next(promise for promise in PROMISES if "memory at least" in promise.words)
    runs = {
        ("workers", "adapter"): run("workers"),
        ("workers", "legacy"): run("workers", "legacy", samples=[sample(1.0, app_mb=150, proxy_mb=0)]),
    }

    (verdict,) = verdicts(runs, [promise])

    assert verdict.row.value == pytest.approx(100 / 3)


def test_each_promise_has_its_scenarios() -> None:
    """No promise is about a scenario that is not there, or in which the adapter does not run."""
    with_adapter = {scenario.name for scenario in SCENARIOS if "adapter" in scenario.contestants}

    assert len(set(NAMES)) == len(NAMES)
    for promise in PROMISES:
        assert promise.scenarios
        assert set(promise.scenarios) <= with_adapter, promise.words


def test_quick_run_judges_every_promise() -> None:
    """Less of it, but nothing is left out."""
    quick = {
        (scenario.name, contestant): run(scenario.name, contestant)
        for scenario in chosen(is_quick=True, only=None)
        for contestant in scenario.contestants
    }

    assert [verdict.promise for verdict in verdicts(quick)] == list(PROMISES)


@pytest.mark.parametrize(
    ("value", "text"), [(math.nan, "–"), (math.inf, "never"), (0.214, "0.21 s"), (12.34, "12.3 s"), (4.0, "4 s")]
)
def test_figures_are_written_for_people(value: float, text: str) -> None:
    """Two or three digits, and words where there is no number."""
    assert shown(value, "s") == text


# --- scenarios, command, documentation ---


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_scenario_can_be_had(scenario: Scenario, tmp_path: Path) -> None:
    """Mock and proxy take what it says of them, its contestants are known, and it ends."""
    Config.read(json.dumps(dict(scenario.upstream)))
    if scenario.fault:
        Config.read(json.dumps({**scenario.upstream, **scenario.fault.config}))
    file = tmp_path / "settings.toml"
    file.write_text(settings("127.0.0.1:9", "/tmp/s.sock", scenario.proxy))
    load_settings(str(file), {})

    assert set(scenario.contestants) <= set(ALL) == set(CONTESTANTS)
    assert all(scenario.limit_s(contestant) <= 60 for contestant in scenario.contestants)
    assert scenario.words and scenario.shows


def test_command_line_chooses() -> None:
    """One scenario, all, or fewer contestants for the gate."""
    options = read(["--quick", "--only", "dies", "--only", "callers-1"])
    quick = chosen(is_quick=options.quick, only=options.only)

    assert [(scenario.name, scenario.contestants) for scenario in quick] == [
        ("callers-1", ("adapter",)),
        ("dies", ("adapter",)),
    ]
    assert [scenario.name for scenario in chosen(is_quick=False, only=None)] == list(NAMES)
    with pytest.raises(SystemExit):
        read(["--only", "nothing"])


def test_page_of_the_documentation_has_each_scenario() -> None:
    """docs/load-testing.md explains each, in their order, and no other."""
    page = Path(__file__).parents[1] / "docs" / "load-testing.md"
    rows = [line.split("|")[1].strip() for line in page.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]

    assert rows == [f"`{scenario.name}`" for scenario in SCENARIOS]


@pytest.mark.parametrize(
    ("status", "name", "is_refusal"), [(429, "http_429", True), (503, "http_503", True), (500, "http_500", False)]
)
def test_errors_of_the_openai_package_have_names(status: int, name: str, is_refusal: bool) -> None:
    """By status; what says not now is a refusal."""
    error = RuntimeError()
    error.status_code = status  # type: ignore[attr-defined]

    failure = openai_failure(error)

    assert (failure.name, failure.is_refusal) == (name, is_refusal)


def test_counts_of_an_upstream_survive_its_death() -> None:
    """Sums add up, the highest stays the highest, and what is now is now."""
    before = {"Requests": 10, "InflightMax": 7, "Inflight": 3, "ConnsNew": -1}

    assert added(before, {"Requests": 5, "InflightMax": 2, "Inflight": 0, "ConnsNew": 4}) == {
        "Requests": 15,
        "InflightMax": 7,
        "Inflight": 0,
        "ConnsNew": 3,
    }


# --- the terminal ---


def test_screen_without_a_terminal_has_a_line_per_run() -> None:
    """A log of CI has no bars in it."""
    stream = io.StringIO()
    screen = Screen(2, stream)
    screen.scenario("callers-10", "10 callers at once")
    screen.begin("adapter")
    screen.progress(Progress(1.0, 8.0, 5, 1, 100 * MB))
    screen.done(run(answers=[answer(), answer("circuit_open")]))
    screen.begin("legacy")
    screen.failed(OSError("no"))

    said = stream.getvalue().splitlines()

    assert [line.split("]")[-1].split()[0] for line in said] == ["callers-10:", "adapter", "legacy"]
    assert "1 of    2 answered" in said[1]
    assert "1 circuit_open" in said[1]
    assert "could not be run: no" in said[2]


def test_screen_of_a_terminal_moves() -> None:
    """The line of a run under way is written over, and gone when it has ended."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    screen = Screen(1, stream)
    screen.begin("adapter")
    screen.progress(Progress(4.0, 8.0, 5, 1, 100 * MB))
    screen.done(run())

    assert "██████████░░░░░░░░░░ 4.0/8 s, 5 answered" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_table_says_what_is_broken() -> None:
    """One row per promise, the judgement in a word."""
    laid = table(verdicts({("callers-10", "adapter"): run()}, [broken(at_most=1.0), broken(below=0.1), broken()]))

    assert [re.split(r" *\| *", line)[6] for line in laid.splitlines()[2:]] == ["kept", "BROKEN", ""]


# --- the page and the exit code ---

FACTS: dict[str, Any] = {
    "at": "2026-01-01 00:00:00 +0000",
    "is_quick": False,
    "only": [],
    "took_s": 300.0,
    "python": "3.11",
    "machine": "x",
    "cores": 2,
    "others_cores": 0.0,
    "failures": [],
}


def everything() -> dict[tuple[str, str], Run]:
    """A run of each contestant in each scenario, the old method's slow and large."""
    slow = [answer(waited_s=2.0), answer(UNANSWERED, at_s=1.0, waited_s=7.0), answer("join_timeout", waited_s=25.0)]
    refused = [answer(at_s=n / 10) for n in range(700)] + [answer("would_be_late", waited_s=0.01, is_refusal=True)]
    found = {}
    for scenario in SCENARIOS:
        for name in scenario.contestants:
            is_before = name == "legacy"
            more: dict[str, Any] = {"answers": slow, "samples": [sample(1.0, app_mb=400)]} if is_before else {}
            if not is_before and scenario.name in ("overload", "errors", "dies"):
                more = {"answers": refused}
            found[scenario.name, name] = run(scenario.name, name, **more)
    return found


class Tags(HTMLParser):
    """What a page asks for from outside, and whether its elements are closed."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: set[str] = set()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            elif name in ("href", "src", "xlink:href") and value:
                (self.links.add(value[1:]) if value.startswith("#") else self.loaded.append(value[:10]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    """One file: every element is closed, every link leads somewhere in it, and nothing is fetched."""
    runs = everything()

    concluded(runs, FACTS, tmp_path)

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert len(set(tags.ids)) == len(tags.ids)
    assert tags.links <= set(tags.ids)
    assert set(tags.loaded) <= {"data:image"}
    assert "<script" not in page
    assert set(NAMES) <= set(tags.ids)


def test_exit_code_tells_whether_all_promises_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 when they are; 1 when one is broken, or a scenario could not be run."""
    runs = {name: its for name, its in everything().items() if name[0] == "callers-10"}
    late = {**runs, ("callers-10", "adapter"): run(answers=[answer(waited_s=10.3)])}

    codes = [
        concluded(runs, FACTS, tmp_path),
        concluded(late, FACTS, tmp_path),
        concluded(runs, {**FACTS, "failures": ["dies, adapter: the app has ended"]}, tmp_path),
    ]

    assert codes == [0, 1, 1]
    assert "could not be run: dies, adapter" in capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert {each["contestant"] for each in written["runs"]} == set(ALL)
    assert written["runs"][0]["answers"]


# --- for real ---


@pytest.fixture
def rig() -> Iterator[Rig]:
    """The harness puts itself on a core; the other tests have both."""
    ours = os.sched_getaffinity(0)
    yield Rig()
    os.sched_setaffinity(0, ours)


def short(**more: Any) -> Scenario:
    return replace(Scenario("callers-3", "", Closed(3, 0.2), {"base_ms": 5.0}), **more)


def test_app_that_hangs_is_ended_and_tells_what_there_was(rig: Rig) -> None:
    """A loop that is held for good cannot report; the thread beside it does."""
    scenario = short(upstream={"hang_p": 1.0}, patience_s=1.0)

    its = perform(scenario, "legacy", rig, "", TABLE, lambda _: None)

    assert (its.is_over, its.outcomes) == (False, {UNANSWERED: 3})
    assert its.longest_hold_s >= 0.3
    assert (its.upstream["Hang"], its.upstream_concurrency) == (1, 1)


def test_adapter_survives_the_death_of_its_upstream(rig: Rig) -> None:
    """The whole way with real processes: right vectors before and after, errors between, the breaker seen open."""
    scenario = short(
        name="dies",
        load=Open(60.0, 2.0),
        proxy="circuit.open_s = 0.3\ncircuit.failures = 2",
        fault=Fault("dead", 0.5, 1.0),
        deadline_s=2.0,
    )
    told: list[Progress] = []

    its = perform(scenario, "adapter", rig, "", TABLE, told.append)

    assert its.is_over
    assert its.outcomes[WRONG] == its.unanswered == 0
    assert its.outcomes[OK] > 0
    assert its.breaker_openings >= 1
    assert math.isfinite(its.recovery_s)
    assert min(its.rest.app_bytes, its.rest.proxy_bytes, its.memory_bytes) > MB
    assert its.counts["texts"] == len(its.answers)
    assert told
