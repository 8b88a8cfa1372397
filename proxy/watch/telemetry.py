"""
Facts → numbers, served as Prometheus metrics.

Home of prometheus-client, which spells them. Counting is done here: its counters take a lock and look up labels,
0.4 µs a record, its histograms walk along their buckets; everything is counted in one thread here, the loop's, and a
series that is bound once takes 0.05 µs. Labels come from small closed sets; a model or path that nobody configured
counts as `other`.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from proxy.base import events

CONTENT_TYPE = CONTENT_TYPE_LATEST

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""From a cache hit to a bulk deadline."""
INPUTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

PREFIX = "embedding_sidecar"


# --- counting ---


class _Count:
    """One series of a counter."""

    __slots__ = ("created", "value")

    def __init__(self) -> None:
        self.value = 0
        self.created = time.time()


class _Spread:
    """One series of a histogram."""

    __slots__ = ("_bounds", "buckets", "created", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        """How many lay between two bounds each; the last one has no upper bound."""
        self.total = 0.0
        self.created = time.time()

    def add(self, value: float) -> None:
        self.buckets[bisect_left(self._bounds, value)] += 1
        self.total += value


class _Counter(Collector):
    """A counter, by labels."""

    def __init__(self, name: str, doc: str, labels: tuple[str, ...]) -> None:
        self._name, self._doc, self._labels = f"{PREFIX}_{name}", doc, labels
        self._series: dict[tuple[str, ...], _Count] = {}

    def at(self, *labels: str) -> _Count:
        """Return one series; a new one begins at zero."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Count()
        return series

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._doc, labels=self._labels)
        for labels, series in list(self._series.items()):  # the loop may add one meanwhile
            family.add_metric(labels, series.value, created=series.created)
        yield family


class _Histogram(Collector):
    """A histogram, by labels."""

    def __init__(self, name: str, doc: str, labels: tuple[str, ...], bounds: tuple[float, ...]) -> None:
        self._name, self._doc, self._labels = f"{PREFIX}_{name}", doc, labels
        self._bounds = bounds
        self._spelled = [*map(floatToGoString, bounds), "+Inf"]
        self._series: dict[tuple[str, ...], _Spread] = {}

    def at(self, *labels: str) -> _Spread:
        """Return one series; a new one begins at zero."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Spread(self._bounds)
        return series

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._doc, labels=self._labels)
        for labels, series in list(self._series.items()):
            buckets = list(zip(self._spelled, accumulate(series.buckets), strict=True))
            family.add_metric(labels, buckets, series.total)
            family.add_sample(f"{self._name}_created", dict(zip(self._labels, labels, strict=True)), series.created)
        yield family


# --- what is counted ---


class Telemetry:
    """An observer that counts."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, doc: str, *labels: str) -> _Counter:
            found = _Counter(name, doc, labels)
            registry.register(found)
            return found

        def histogram(name: str, doc: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> _Histogram:
            found = _Histogram(name, doc, labels, buckets)
            registry.register(found)
            return found

        self._requests = counter("requests", "Requests answered.", "path", "listener", "status", "code")
        self._request_s = histogram("request_duration_seconds", "Time from head to answer.", "path", "priority")
        self._inputs = counter("inputs", "Inputs of answered requests.", "model", "priority")
        self._queue_s = histogram("queue_duration_seconds", "Time in our own queues, per batch.", "model")
        self._tokens = counter("tokens", "Tokens as counted by the upstream.", "upstream")
        self._cache = counter("cache_inputs", "Inputs looked up in the cache.", "model", "result")
        self._joined = counter("coalesced_inputs", "Inputs that shared a call with an equal one.", "model")
        self._batch_inputs = histogram("batch_inputs", "Inputs per batch.", "model", "upstream", buckets=INPUTS)
        self._splits = counter("batch_splits", "Batches cut to find the input to blame.", "model")
        self._attempts = counter("attempts", "Exchanges with an upstream.", "upstream", "code")
        self._attempt_s = histogram("attempt_duration_seconds", "Time of one exchange.", "upstream")
        self._stale = counter("stale_connections", "Pooled connections found closed.", "upstream")
        self._breaker = Gauge(
            f"{PREFIX}_breaker_state",
            "State of the breaker: 0 closed, 1 half-open, 2 open.",
            ("upstream",),
            registry=registry,
        )
        self._breaker_moves = counter("breaker_moves", "Changes of the breaker's state.", "upstream", "state")
        self._canaries = counter("canaries", "Canaries sent.", "model", "upstream", "result")
        self._reloads = counter("reloads", "Reloads of the settings.", "result")
        self._ready = Gauge(f"{PREFIX}_ready", "1 while ready.", registry=registry)
        self._bound: dict[tuple[object, ...], tuple[_Count, _Spread, _Count]] = {}
        self._counts: dict[type, Callable[[Any], None]] = {
            events.RequestFinished: self._request_finished,
            events.CacheLookedUp: self._cache_looked_up,
            events.InputsJoined: self._inputs_joined,
            events.BatchFinished: self._batch_finished,
            events.BatchSplit: self._batch_split,
            events.AttemptFinished: self._attempt_finished,
            events.ConnectionStale: self._connection_stale,
            events.BreakerMoved: self._breaker_moved,
            events.CanaryFinished: self._canary_finished,
            events.ReloadFinished: self._reload_finished,
            events.LifecycleMoved: lambda e: self._ready.set(e.state == "ready"),
        }

    def __call__(self, event: events.Event) -> None:
        if count := self._counts.get(type(event)):
            count(event)

    def _request_finished(self, e: events.RequestFinished) -> None:
        key = (e.path, e.listener, e.status, e.code, e.priority, e.model)
        bound = self._bound.get(key)
        if bound is None:
            requests = self._requests.at(e.path, e.listener, str(e.status), e.code)
            seconds = self._request_s.at(e.path, e.priority)
            # Only a series that has been counted in is shown: this one waits in case that it will be.
            inputs = self._inputs.at(e.model, e.priority) if e.inputs and e.status == 200 else _Count()
            bound = self._bound[key] = (requests, seconds, inputs)
        requests, seconds, inputs = bound
        requests.value += 1
        seconds.add(e.total_s)
        inputs.value += e.inputs

    def _cache_looked_up(self, e: events.CacheLookedUp) -> None:
        if e.hits:
            self._cache.at(e.model, "hit").value += e.hits
        if e.misses:
            self._cache.at(e.model, "miss").value += e.misses

    def _inputs_joined(self, e: events.InputsJoined) -> None:
        self._joined.at(e.model).value += e.inputs

    def _batch_finished(self, e: events.BatchFinished) -> None:
        self._batch_inputs.at(e.model, e.upstream).add(e.inputs)
        self._queue_s.at(e.model).add(e.queue_s)

    def _batch_split(self, e: events.BatchSplit) -> None:
        self._splits.at(e.model).value += 1

    def _attempt_finished(self, e: events.AttemptFinished) -> None:
        self._attempts.at(e.upstream, e.code or "ok").value += 1
        self._attempt_s.at(e.upstream).add(e.seconds)
        if e.tokens:
            self._tokens.at(e.upstream).value += e.tokens

    def _connection_stale(self, e: events.ConnectionStale) -> None:
        self._stale.at(e.upstream).value += 1

    def _breaker_moved(self, e: events.BreakerMoved) -> None:
        self._breaker.labels(e.upstream).set({"closed": 0, "half-open": 1}.get(e.new, 2))
        self._breaker_moves.at(e.upstream, e.new).value += 1

    def _canary_finished(self, e: events.CanaryFinished) -> None:
        self._canaries.at(e.model, e.upstream, "wrong" if e.problem else "right").value += 1

    def _reload_finished(self, e: events.ReloadFinished) -> None:
        self._reloads.at("refused" if e.problem else "done").value += 1

    def exposition(self) -> bytes:
        """Spell all series. Takes milliseconds: call it in a thread."""
        return generate_latest(self.registry)
