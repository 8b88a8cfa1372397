"""
The old way answers, the sidecar is asked beside it, and their difference is told.

In the background and bounded: an answer is never delayed, and never fails, for the sake of the comparison. Told three
times: a log line each (`rag_adapter.shadow`), a callback, and a snapshot of all. No text is in any of them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import operator
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rag_adapter.errors import EmbeddingError

LOGGER = logging.getLogger("rag_adapter.shadow")
"""One line per comparison: its numbers are in the record's attribute `shadow`, a dict."""

Way = Callable[[str], Awaitable[list[float]]]
"""From a text to its vector."""

_WINDOW = 1000
"""Percentiles are those of the last so many comparisons."""

_ALIKE_COSINE = 0.999
"""Below it a comparison is a warning. The same model gives 0.9999 and more for the same text, batches of another size
and other float formats notwithstanding; another model gives much less."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One text, both ways."""

    cosine: float | None
    """Of the two vectors; None when one is missing, or when they are of different width."""
    old_s: float
    sidecar_s: float
    old_error: str | None
    """Name of the old way's exception."""
    sidecar_error: str | None
    """Code of the sidecar's error."""
    old_width: int
    """0 when there is no vector."""
    sidecar_width: int

    @property
    def is_alike(self) -> bool:
        """Whether switching over would have made no difference to the app."""
        if self.old_error is not None:
            return self.sidecar_error is not None
        return self.cosine is not None and self.cosine >= _ALIKE_COSINE


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles of the last comparisons, in seconds."""

    p50_s: float
    p95_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class ShadowSnapshot:
    """All comparisons so far."""

    compared: int
    skipped: int
    """Texts that were not sent to the sidecar, since enough were under way."""
    under_way: int
    different: int
    """Comparisons that were not alike."""
    old_errors: Mapping[str, int]
    sidecar_errors: Mapping[str, int]
    cosine_min: float | None
    cosine_mean: float | None
    cosine_p01: float | None
    """One in a hundred of the last comparisons is lower."""
    cosine_p50: float | None
    old: Latency | None
    """Of calls that gave a vector; None before there is one."""
    sidecar: Latency | None


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How one way ended."""

    seconds: float
    vector: list[float] = field(default_factory=list)
    error: Exception | None = None


class Shadow:
    """Asks the sidecar beside the old way, and compares. Never delays an answer, and never fails one."""

    def __init__(self, *, report: Callable[[Comparison], None] | None = None, max_tasks: int = 16) -> None:
        """
        Args:
            report: is told of each comparison; one that raises is not called again.
            max_tasks: questions to the sidecar that may be under way; further texts are not compared.
        """
        self._report = report
        self._max_tasks = max_tasks
        self._tasks: set[asyncio.Task[None]] = set()
        self._compared = self._skipped = self._different = self._cosines = 0
        self._old_errors: Counter[str] = Counter()
        self._sidecar_errors: Counter[str] = Counter()
        self._cosine_sum, self._cosine_min = 0.0, math.inf
        self._last_cosines: deque[float] = deque(maxlen=_WINDOW)
        self._last_old_s: deque[float] = deque(maxlen=_WINDOW)
        self._last_sidecar_s: deque[float] = deque(maxlen=_WINDOW)

    async def answer(self, text: str, old: Way, sidecar: Way) -> list[float]:
        """Answer by the old way, whatever that gives; the sidecar is asked at the same time."""
        if len(self._tasks) >= self._max_tasks:
            self._skipped += 1
            return await old(text)
        answered: asyncio.Future[_Outcome] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._compare(text, sidecar, answered))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            outcome = await _outcome(old, text)
        except BaseException:  # the caller has left: there will be nothing to compare with
            task.cancel()
            raise
        if not answered.done():
            answered.set_result(outcome)
        if outcome.error is not None:
            raise outcome.error
        return outcome.vector

    async def aclose(self) -> None:
        """Give up what is still under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def snapshot(self) -> ShadowSnapshot:
        cosines = sorted(self._last_cosines)
        return ShadowSnapshot(
            compared=self._compared,
            skipped=self._skipped,
            under_way=len(self._tasks),
            different=self._different,
            old_errors=dict(self._old_errors),
            sidecar_errors=dict(self._sidecar_errors),
            cosine_min=self._cosine_min if cosines else None,
            cosine_mean=self._cosine_sum / self._cosines if cosines else None,
            cosine_p01=_percentile(cosines, 0.01) if cosines else None,
            cosine_p50=_percentile(cosines, 0.5) if cosines else None,
            old=_latency(self._last_old_s),
            sidecar=_latency(self._last_sidecar_s),
        )

    async def _compare(self, text: str, sidecar: Way, answered: asyncio.Future[_Outcome]) -> None:
        asked = await _outcome(sidecar, text)
        outcome = await answered
        try:
            self._take(comparison(outcome, asked))
        except (TypeError, ValueError) as error:  # the old way gave something that is no vector
            LOGGER.warning("shadow: nothing to compare with: %s", type(error).__name__)

    def _take(self, found: Comparison) -> None:
        self._compared += 1
        self._different += not found.is_alike
        if found.old_error is not None:
            self._old_errors[found.old_error] += 1
        else:
            self._last_old_s.append(found.old_s)
        if found.sidecar_error is not None:
            self._sidecar_errors[found.sidecar_error] += 1
        else:
            self._last_sidecar_s.append(found.sidecar_s)
        if found.cosine is not None:
            self._cosines += 1
            self._cosine_sum += found.cosine
            self._cosine_min = min(self._cosine_min, found.cosine)
            self._last_cosines.append(found.cosine)
        self._tell(found)

    def _tell(self, found: Comparison) -> None:
        level = logging.INFO if found.is_alike else logging.WARNING
        LOGGER.log(
            level,
            "shadow: cosine %s, old %.4f s %s, sidecar %.4f s %s",
            "–" if found.cosine is None else f"{found.cosine:.6f}",
            found.old_s,
            found.old_error or f"({found.old_width} wide)",
            found.sidecar_s,
            found.sidecar_error or f"({found.sidecar_width} wide)",
            extra={"shadow": asdict(found)},
        )
        if self._report is not None:
            try:
                self._report(found)
            except Exception:
                self._report = None
                LOGGER.exception("the report of comparisons has failed, and is not called again")


async def _outcome(way: Way, text: str) -> _Outcome:
    """Go one way and see how it ends; only a cancellation is passed on."""
    start = time.perf_counter()
    try:
        vector = await way(text)
    except Exception as error:
        return _Outcome(time.perf_counter() - start, error=error)
    return _Outcome(time.perf_counter() - start, vector)


def comparison(old: _Outcome, sidecar: _Outcome) -> Comparison:
    """Hold two outcomes against each other."""
    has_both = old.error is None and sidecar.error is None
    return Comparison(
        cosine=cosine(old.vector, sidecar.vector) if has_both else None,
        old_s=old.seconds,
        sidecar_s=sidecar.seconds,
        old_error=None if old.error is None else type(old.error).__name__,
        sidecar_error=None if sidecar.error is None else _code(sidecar.error),
        old_width=len(old.vector),
        sidecar_width=len(sidecar.vector),
    )


def cosine(a: Sequence[float], b: Sequence[float]) -> float | None:
    """
    Return the cosine of two vectors; None when they have none: other widths, or one of them is zero.

    Without numpy, which the app may not have: under 0.1 ms for 1536 numbers.
    """
    if len(a) != len(b):
        return None
    sizes = math.hypot(*a) * math.hypot(*b)
    return sum(map(operator.mul, a, b)) / sizes if sizes else None


def _code(error: Exception) -> str:
    return error.code if isinstance(error, EmbeddingError) else type(error).__name__


def _latency(seconds: deque[float]) -> Latency | None:
    ranked = sorted(seconds)
    return Latency(*(_percentile(ranked, share) for share in (0.5, 0.95, 0.99))) if ranked else None


def _percentile(ranked: Sequence[float], share: float) -> float:
    """Return the value that this share of the ranked ones lies below, by the nearest rank."""
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]
