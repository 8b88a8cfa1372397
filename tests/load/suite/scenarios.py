"""
What is loaded, how, and for what one learns from it. Data; what it should be stands in promises.

The upstream answers like a hosted API: 200 ms, and a millisecond more for each text. It is the same for all three
contestants; what it is asked, and how often at a time, is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tests.load.suite.arrivals import Closed, Ingest, Load, Open

HOSTED: Mapping[str, float | str] = {"base_ms": 200.0, "per_item_ms": 1.0}
ALL = ("legacy", "first repair", "adapter")
LADDER = (1, 3, 5, 10, 25, 100, 500)

PATIENCE_S = 5.0
"""What is under way at the end of the load has this long, or is counted as unanswered."""
INCIDENT_S = 60.0
"""For the old method: two joins of 25 s, and more: the minute that users saw."""
DEADLINE_S = 2.0
"""Of a query while the upstream is in trouble: a person waits."""
OPEN_S = 1.0
"""The breaker stays open that long, so that a scenario of seconds sees it close again; by default it is 10 s."""

RPM = 600
"""Ten requests per second, half of what is asked."""

INGESTION_SLOTS = 8

SLOTS, SMALL_BATCH, SLOT_BASE_MS, SLOT_ITEM_MS = 4, 8, 100.0, 5.0
CAPACITY = SLOTS * SMALL_BATCH / ((SLOT_BASE_MS + SLOT_ITEM_MS * SMALL_BATCH) / 1e3)
"""Texts per second that the upstream of the overload gives at best: 229."""
OVERLOAD = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the upstream, and from when to when, in seconds since the start."""

    words: str
    from_s: float
    until_s: float
    config: Mapping[str, float | str] = field(default_factory=dict)
    """Of the mock; empty: it is killed, and comes back at the end."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One situation."""

    name: str
    shows: str
    """What one learns from it."""
    load: Load
    upstream: Mapping[str, float | str] = field(default_factory=lambda: HOSTED)
    proxy: str = ""
    """Lines of the proxy's settings of this upstream."""
    fault: Fault | None = None
    deadline_s: float = 10.0
    """Of the adapter's calls; the others have none to set, and wait as long as their package does."""
    contestants: tuple[str, ...] = ALL
    patience_s: float = PATIENCE_S
    limits_s: Mapping[str, float] = field(default_factory=dict)
    """Contestants that are given more time than the others, to show how long they take."""
    apps: int = 1
    """Worker processes of the app, each under the whole load; they share one proxy."""
    group: str = "concurrency"
    quick: tuple[str, ...] = ()
    """Contestants of the quick run."""

    @property
    def words(self) -> str:
        """The load in words."""
        workers = f"{self.apps} worker processes, each with " if self.apps > 1 else ""
        trouble = f"; {self.fault.words}" if self.fault else ""
        return f"{workers}{self.load.words}{trouble}"

    def limit_s(self, contestant: str) -> float:
        """Return how long after the start everything is over."""
        return self.limits_s.get(contestant, self.load.lasts_s + self.patience_s)


def _callers(count: int) -> Scenario:
    return Scenario(
        f"callers-{count}",
        {
            1: "What one call costs with nobody else about.",
            10: "Where users saw it hang: the old method serves one at a time and holds the app meanwhile.",
            500: "A burst, as of a page that starts a search per row.",
        }.get(count, "Calls at the same time, and the app's event loop beside them."),
        Closed(count, 3.0),
        # So much at once takes its time also where it gets through.
        patience_s=PATIENCE_S if count < 500 else 12.0,
        quick={5: ALL, 10: ("legacy", "adapter"), 100: ("adapter",)}.get(count, ("adapter",) if count == 1 else ()),
    )


def _trouble(
    name: str, shows: str, words: str, contestants: tuple[str, ...] = ("first repair", "adapter"),
    quick: tuple[str, ...] = (), **config: float | str,
) -> Scenario:  # fmt: skip
    return Scenario(
        name,
        shows,
        Open(20.0, 7.0),
        {**HOSTED, "base_ms": 100.0},
        f"circuit.open_s = {OPEN_S}",
        Fault(words, 2.0, 4.5, config),
        DEADLINE_S,
        contestants,
        patience_s=3.0,
        group="trouble",
        quick=quick,
    )


SCENARIOS: tuple[Scenario, ...] = (
    *map(_callers, LADDER),
    Scenario(
        "workers",
        "Memory, counted fairly: what all processes of a service with four workers hold, the proxy included.",
        Closed(5, 3.0),
        contestants=("legacy", "adapter"),
        apps=4,
        group="concurrency",
        quick=("legacy", "adapter"),
    ),
    Scenario(
        "incident",
        "What users met: of ten callers' calls, every fifth is lost in the network and never answered.",
        Closed(10, 4.0),
        {**HOSTED, "hang_p": 0.2},
        deadline_s=DEADLINE_S,
        limits_s={"legacy": INCIDENT_S},
        group="trouble",
        quick=("adapter",),
    ),
    Scenario(
        "ingestion",
        "Searches while documents are ingested, at an upstream with eight slots.",
        Ingest(2, 64, 10.0, 5.0),
        {"base_ms": 100.0, "per_item_ms": 2.0, "max_concurrent": INGESTION_SLOTS, "overflow": "queue"},
        f"balance.slots = {INGESTION_SLOTS}",
        group="limits",
        quick=("adapter",),
    ),
    Scenario(
        "limited",
        f"An upstream that allows {RPM} requests per minute is asked twice as much.",
        Open(2 * RPM / 60, 5.0),
        {**HOSTED, "rpm": RPM, "burst_s": 0.5},
        f"bucket.requests_per_minute = {RPM}",
        group="limits",
        quick=("adapter",),
    ),
    Scenario(
        "overload",
        f"{OVERLOAD} times what the upstream can give, whoever is to be served.",
        Open(round(OVERLOAD * CAPACITY), 4.0),
        {
            "base_ms": SLOT_BASE_MS,
            "per_item_ms": SLOT_ITEM_MS,
            "max_batch": SMALL_BATCH,
            "max_concurrent": SLOTS,
            "overflow": "queue",
        },
        # As for any server that goes on computing what was given up: its slot counts until it has ended.
        f"balance.slots = {SLOTS}\nbalance.abandoned_s = 30\nbatch.max_inputs = {SMALL_BATCH}",
        deadline_s=DEADLINE_S,
        contestants=("first repair", "adapter"),
        patience_s=3.0,
        group="limits",
        quick=("adapter",),
    ),
    _trouble(
        "hangs",
        "The upstream takes requests and says nothing more.",
        "from 2 to 4.5 s every call hangs",
        ALL,
        ("adapter",),
        hang_p=1.0,
    ),
    _trouble(
        "errors",
        "The upstream answers with errors only, then recovers.",
        "from 2 to 4.5 s every call ends with 500",
        quick=("adapter",),
        err500_p=1.0,
    ),
    _trouble(
        "resets",
        "Connections are cut off, one in three: what can be done again is done again.",
        "from 2 to 4.5 s a third of the calls is reset",
        reset_p=0.33,
    ),
    replace(
        _trouble("slow", "The upstream is twenty times slower.", "from 2 to 4.5 s a call takes 2 s", base_ms=2000.0),
        deadline_s=5.0,
        contestants=ALL,
        patience_s=6.0,
    ),
    _trouble(
        "dies",
        "The upstream's process is killed, and comes back.",
        "dead from 2 to 4.5 s",
        ALL,
        ("adapter",),
    ),
)

NAMES = tuple(scenario.name for scenario in SCENARIOS)


def quickened(scenario: Scenario) -> Scenario:
    """Return the scenario as the quick run has it: its contestants, and loads of two seconds where time is free."""
    load = replace(scenario.load, lasts_s=2.0) if not scenario.fault else scenario.load
    return replace(
        scenario, load=load, contestants=scenario.quick, limits_s={}, patience_s=min(scenario.patience_s, 3.0)
    )
