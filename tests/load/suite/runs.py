"""
What one contestant did in one scenario, and the figures that follow from it. Pure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tests.load.results import percentile
from tests.load.suite.ledger import OK, UNANSWERED, Answer, digest
from tests.load.suite.ledger import texts as texts_of
from tests.load.suite.probes import Sample
from tests.load.vectors import Table, key

WRONG = "wrong_vector"
"""The outcome of an answer whose vectors are not those of its texts."""


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that was seen."""

    scenario: str
    contestant: str
    deadline_s: float
    lasted_s: float
    is_over: bool
    """Everything was answered before the limit."""
    answers: Sequence[Answer]
    holds: Sequence[tuple[float, float]]
    """Of the app's event loop: when and how long, seconds."""
    rest: Sample
    """At rest, before the start."""
    samples: Sequence[Sample]
    upstream: Mapping[str, int]
    """The mock's counts."""
    counts: Mapping[str, int]
    """The adapter's own, of requests and connections to the proxy."""
    breaker: Sequence[tuple[float, str]]
    """State of the proxy's breaker, when it was another than before."""
    fault: tuple[float, float] | None = None

    # --- answers ---

    def having(self, accepts: Callable[[Answer], bool]) -> list[Answer]:
        """Return the answers of which something holds."""
        return [answer for answer in self.answers if accepts(answer)]

    @property
    def outcomes(self) -> Counter[str]:
        """Requests by outcome."""
        return Counter(answer.outcome for answer in self.answers)

    @property
    def error_share(self) -> float:
        """Share of the requests that did not get their vectors, for whatever reason."""
        return 1 - self.outcomes[OK] / len(self.answers) if self.answers else math.nan

    @property
    def unanswered(self) -> int:
        return self.outcomes[UNANSWERED]

    def waits_s(self, kind: str = "", outcome: str = "") -> list[float]:
        """Return in order how long requests waited, from the intended start; those without an answer until the end."""
        return sorted(
            answer.waited_s
            for answer in self.answers
            if (not kind or answer.kind == kind) and (not outcome or answer.outcome == outcome)
        )

    def wait_s(self, share: float, kind: str = "", outcome: str = "") -> float:
        """Return a percentile of these waits; not a number when there are none."""
        waits = self.waits_s(kind, outcome)
        return percentile(waits, share) if waits else math.nan

    @property
    def lateness_s(self) -> float:
        """By how much the last one to be answered was later than its deadline; infinite if one never was."""
        return max(
            (
                math.inf if answer.outcome == UNANSWERED else answer.waited_s - self.deadline_s
                for answer in self.answers
            ),
            default=math.nan,
        )

    @property
    def refusals_s(self) -> list[float]:
        """In order, how long it took to tell those that were refused."""
        return sorted(answer.waited_s for answer in self.answers if answer.is_refusal)

    @property
    def texts_per_s(self) -> float:
        """Texts that got their vectors, per second of the whole run."""
        return sum(answer.count for answer in self.answers if answer.outcome == OK) / self.lasted_s

    @property
    def recovery_s(self) -> float:
        """From the end of the fault to the first right answer that came after it; infinite if none did."""
        assert self.fault
        ends = [answer.intended_s + answer.waited_s for answer in self.answers if answer.outcome == OK]
        return min((end - self.fault[1] for end in ends if end >= self.fault[1]), default=math.inf)

    # --- the app and the proxy ---

    @property
    def longest_hold_s(self) -> float:
        """The longest time that the app's event loop was held."""
        return max((held_s for _, held_s in self.holds), default=0.0)

    @property
    def held_share(self) -> float:
        """Share of the time in which it was."""
        return min(1.0, sum(held_s for _, held_s in self.holds) / self.lasted_s)

    @property
    def more_threads(self) -> int:
        """By how many threads app and proxy together had grown at the highest."""
        apps = self.highest(lambda sample: sample.app_threads + sample.proxy_threads)
        return int(apps) - (self.rest.app_threads + self.rest.proxy_threads)

    def highest(self, figure: Callable[[Sample], float]) -> float:
        """Return the highest of a figure over time."""
        return max(map(figure, self.samples), default=0.0)

    @property
    def memory_bytes(self) -> float:
        """What app and proxy together held at their highest."""
        return self.highest(lambda sample: sample.app_bytes + sample.proxy_bytes)

    @property
    def cpu_s(self) -> tuple[float, float]:
        """CPU time of app and proxy since rest."""
        if not self.samples:
            return 0.0, 0.0
        last = self.samples[-1]
        return last.app_cpu_s - self.rest.app_cpu_s, last.proxy_cpu_s - self.rest.proxy_cpu_s

    @property
    def proxy_growth(self) -> float:
        """Highest memory of the proxy in the last third of the run, against the second third; 1 is flat."""

        def highest(third: int) -> int:
            its = [s.proxy_bytes for s in self.samples if third <= 3 * s.at_s / self.lasted_s < third + 1]
            return max(its, default=0)

        return highest(2) / highest(1) if highest(1) and highest(2) else math.nan

    # --- connections and upstream ---

    @property
    def upstream_connections(self) -> int:
        return self.upstream.get("ConnsNew", 0)

    @property
    def upstream_reuse(self) -> float:
        """Share of the texts that reached the upstream without a connection being opened for them."""
        return reuse(self.upstream.get("Items", 0), self.upstream_connections)

    @property
    def proxy_reuse(self) -> float:
        """The same between app and proxy."""
        return reuse(self.counts.get("texts", 0), self.counts.get("connections", 0))

    @property
    def upstream_concurrency(self) -> int:
        """Calls at a time that the upstream has seen at the highest."""
        return self.upstream.get("InflightMax", 0)

    @property
    def breaker_openings(self) -> int:
        return sum(state == "open" for _, state in self.breaker)

    def written(self) -> dict[str, Any]:
        """Return it for JSON, the figures first."""
        p50, p95, p99, longest = (self.wait_s(share) for share in (0.5, 0.95, 0.99, 1.0))
        app_cpu_s, proxy_cpu_s = self.cpu_s
        return {
            "scenario": self.scenario,
            "contestant": self.contestant,
            "requests": len(self.answers),
            "outcomes": dict(self.outcomes),
            "error_share": self.error_share,
            "texts_per_s": self.texts_per_s,
            "p50_s": p50,
            "p95_s": p95,
            "p99_s": p99,
            "max_s": longest,
            "longest_hold_s": self.longest_hold_s,
            "held_share": self.held_share,
            "more_threads": self.more_threads,
            "memory_bytes": self.memory_bytes,
            "app_cpu_s": app_cpu_s,
            "proxy_cpu_s": proxy_cpu_s,
            "upstream_reuse": self.upstream_reuse,
            "proxy_reuse": self.proxy_reuse,
            "upstream_concurrency": self.upstream_concurrency,
            **{name: value for name, value in asdict(self).items() if name not in ("scenario", "contestant")},
        }


def reuse(texts: int, connections: int) -> float:
    """
    Return the share of texts for which no connection was opened.

    Of texts, not of calls: who sends twenty texts in one call has reused a connection better than who sends twenty.
    """
    return max(0.0, 1 - connections / texts) if texts else math.nan


def judged(run: str, answers: Iterable[Answer], table: Table) -> list[Answer]:
    """Compare the digests of all vectors with what they should be; what differs has the outcome WRONG."""
    return [
        replace(answer, outcome=WRONG)
        if answer.outcome == OK and answer.digest != expected(run, answer, table)
        else answer
        for answer in answers
    ]


def expected(run: str, answer: Answer, table: Table) -> str:
    """Return the digest of the right vectors."""
    return digest(table.vector(key(text.encode())).tolist() for text in texts_of(run, answer))
