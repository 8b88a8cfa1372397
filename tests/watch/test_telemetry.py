"""Facts become numbers."""

from __future__ import annotations

import concurrent.futures
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.base import events
from proxy.watch.telemetry import CONTENT_TYPE, Telemetry

REQUEST = events.RequestFinished(
    "r-1", "tcp", "POST", "/v1/embeddings", 200, 0.02, model="m", priority="bulk", inputs=3, caller="somebody"
)


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


def series(telemetry: Telemetry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Parse the exposition: our series above zero, by name and labels."""
    families = text_string_to_metric_families(telemetry.exposition().decode())
    return {
        (sample.name.removeprefix("embedding_sidecar_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        if family.name.startswith("embedding_sidecar_")
        for sample in family.samples
        if sample.value and not sample.name.endswith(("_created", "_bucket"))
    }


def row(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


def bucket(telemetry: Telemetry, name: str, le: str, **labels: str) -> float:
    value = telemetry.registry.get_sample_value(f"embedding_sidecar_{name}_bucket", labels | {"le": le})
    assert value is not None
    return value


ATTEMPT = events.AttemptFinished("u", "", 0.3, 4, tokens=9)
CANARY = events.CanaryFinished("m", "u", 0.1)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            REQUEST,
            {
                row("requests_total", path="/v1/embeddings", listener="tcp", status="200", code=""): 1,
                row("request_duration_seconds_count", path="/v1/embeddings", priority="bulk"): 1,
                row("request_duration_seconds_sum", path="/v1/embeddings", priority="bulk"): 0.02,
                row("inputs_total", model="m", priority="bulk"): 3,
            },
        ),
        (
            replace(REQUEST, status=503, code="overloaded"),
            {
                row("requests_total", path="/v1/embeddings", listener="tcp", status="503", code="overloaded"): 1,
                row("request_duration_seconds_count", path="/v1/embeddings", priority="bulk"): 1,
                row("request_duration_seconds_sum", path="/v1/embeddings", priority="bulk"): 0.02,
            },
        ),
        (
            replace(REQUEST, method="GET", path="/livez", inputs=0, model="", priority=""),
            {
                row("requests_total", path="/livez", listener="tcp", status="200", code=""): 1,
                row("request_duration_seconds_count", path="/livez", priority=""): 1,
                row("request_duration_seconds_sum", path="/livez", priority=""): 0.02,
            },
        ),
        (
            events.CacheLookedUp("m", 2, 5),
            {
                row("cache_inputs_total", model="m", result="hit"): 2,
                row("cache_inputs_total", model="m", result="miss"): 5,
            },
        ),
        (events.CacheLookedUp("m", 2, 0), {row("cache_inputs_total", model="m", result="hit"): 2}),
        (events.CacheLookedUp("m", 0, 5), {row("cache_inputs_total", model="m", result="miss"): 5}),
        (events.InputsJoined("m", 4), {row("coalesced_inputs_total", model="m"): 4}),
        (events.BatchSplit("m", 40), {row("batch_splits_total", model="m"): 1}),
        (
            events.BatchFinished("m", "u", 32, 0.25, 1.5),
            {
                row("batch_inputs_count", model="m", upstream="u"): 1,
                row("batch_inputs_sum", model="m", upstream="u"): 32,
                row("queue_duration_seconds_count", model="m"): 1,
                row("queue_duration_seconds_sum", model="m"): 0.25,
            },
        ),
        (
            ATTEMPT,
            {
                row("attempts_total", upstream="u", code="ok"): 1,
                row("attempt_duration_seconds_count", upstream="u"): 1,
                row("attempt_duration_seconds_sum", upstream="u"): 0.3,
                row("tokens_total", upstream="u"): 9,
            },
        ),
        (
            replace(ATTEMPT, code="upstream_timeout", tokens=0),
            {
                row("attempts_total", upstream="u", code="upstream_timeout"): 1,
                row("attempt_duration_seconds_count", upstream="u"): 1,
                row("attempt_duration_seconds_sum", upstream="u"): 0.3,
            },
        ),
        (events.ConnectionStale("u"), {row("stale_connections_total", upstream="u"): 1}),
        (
            events.BreakerMoved("u", "closed", "open"),
            {row("breaker_state", upstream="u"): 2, row("breaker_moves_total", upstream="u", state="open"): 1},
        ),
        (
            events.BreakerMoved("u", "open", "half-open"),
            {row("breaker_state", upstream="u"): 1, row("breaker_moves_total", upstream="u", state="half-open"): 1},
        ),
        (
            events.BreakerMoved("u", "half-open", "closed"),
            {row("breaker_moves_total", upstream="u", state="closed"): 1},
        ),
        (CANARY, {row("canaries_total", model="m", upstream="u", result="right"): 1}),
        (replace(CANARY, problem="no"), {row("canaries_total", model="m", upstream="u", result="wrong"): 1}),
        (events.ReloadFinished(), {row("reloads_total", result="done"): 1}),
        (events.ReloadFinished("bad file"), {row("reloads_total", result="refused"): 1}),
        (events.LifecycleMoved("ready"), {row("ready"): 1}),
        (events.LifecycleMoved("draining"), {}),
        (events.ListenersOpened(("tcp:127.0.0.1:1",)), {}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "",
)
def test_each_event(telemetry: Telemetry, event: events.Event, expected: dict[Any, float]) -> None:
    """An event moves its own series, by as much as it says, and no other."""
    telemetry(event)

    assert series(telemetry) == pytest.approx(expected)


def test_counting_goes_on(telemetry: Telemetry) -> None:
    """Series add up, and those of other labels stand apart."""
    for event in (ATTEMPT, ATTEMPT, replace(ATTEMPT, upstream="v")):
        telemetry(event)

    found = series(telemetry)
    assert found[row("attempts_total", upstream="u", code="ok")] == 2
    assert found[row("attempts_total", upstream="v", code="ok")] == 1
    assert found[row("tokens_total", upstream="u")] == 18


def test_requests_of_every_kind(telemetry: Telemetry) -> None:
    """Series that are bound together are counted apart wherever one label differs."""
    others: list[dict[str, Any]] = [
        {"path": "/embeddings"},
        {"listener": "unix"},
        {"status": 503, "code": "overloaded"},
        {"priority": "interactive"},
        {"model": "n"},
    ]
    for event in (REQUEST, REQUEST, *(replace(REQUEST, **other) for other in others)):
        telemetry(event)

    found = series(telemetry)
    requests = {labels: value for (name, labels), value in found.items() if name == "requests_total"}
    inputs = {labels: value for (name, labels), value in found.items() if name == "inputs_total"}
    assert sorted(requests.values()) == [1, 1, 1, 4]
    assert sorted(inputs.values()) == [3, 3, 12]
    assert sum(value for (name, _), value in found.items() if name == "request_duration_seconds_count") == 7


def test_series_say_since_when(telemetry: Telemetry) -> None:
    """Each series tells when its counting began."""
    telemetry(REQUEST)
    text = telemetry.exposition().decode()

    assert 'embedding_sidecar_inputs_created{model="m",priority="bulk"}' in text
    assert 'embedding_sidecar_request_duration_seconds_created{path="/v1/embeddings",priority="bulk"}' in text


def test_exposition_while_it_counts(telemetry: Telemetry) -> None:
    """Series are spelled in a thread, while the loop goes on and adds further ones."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        spelling = pool.submit(lambda: [telemetry.exposition() for _ in range(20)])
        number = 0
        while not spelling.done():
            telemetry(events.AttemptFinished(f"u{number % 500}", "", 0.1, 1))
            number += 1

    assert all(text.startswith(b"# HELP") for text in spelling.result())


def test_breaker_closes_again(telemetry: Telemetry) -> None:
    """The gauge of a breaker falls back to zero, and its moves stay counted."""
    for old, new in (("closed", "open"), ("open", "half-open"), ("half-open", "closed")):
        telemetry(events.BreakerMoved("u", old, new))

    assert telemetry.registry.get_sample_value("embedding_sidecar_breaker_state", {"upstream": "u"}) == 0
    assert series(telemetry)[row("breaker_moves_total", upstream="u", state="open")] == 1


def test_ready_and_no_longer(telemetry: Telemetry) -> None:
    """The gauge of readiness follows the state."""
    values = []
    for state in ("starting", "ready", "unready", "ready", "draining", "stopped"):
        telemetry(events.LifecycleMoved(state))
        values.append(telemetry.registry.get_sample_value("embedding_sidecar_ready"))

    assert values == [0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize(("total_s", "le", "is_within"), [(0.05, "0.05", 1), (0.0501, "0.05", 0), (0.0501, "0.1", 1)])
def test_buckets_of_seconds(telemetry: Telemetry, total_s: float, le: str, is_within: int) -> None:
    """A time counts in the buckets at or above it."""
    telemetry(replace(REQUEST, total_s=total_s))

    assert bucket(telemetry, "request_duration_seconds", le, path="/v1/embeddings", priority="bulk") == is_within


@pytest.mark.parametrize(("inputs", "le", "is_within"), [(32, "32.0", 1), (33, "32.0", 0), (3000, "2048.0", 0)])
def test_buckets_of_inputs(telemetry: Telemetry, inputs: int, le: str, is_within: int) -> None:
    """A batch counts in the buckets at or above its size."""
    telemetry(events.BatchFinished("m", "u", inputs, 0, 0))

    assert bucket(telemetry, "batch_inputs", le, model="m", upstream="u") == is_within


def test_event_that_nobody_counts(telemetry: Telemetry) -> None:
    """What is not known is passed over."""
    before = series(telemetry)
    telemetry(object())  # type: ignore[arg-type]

    assert series(telemetry) == before == {}


def test_callers_stay_out_of_labels(telemetry: Telemetry) -> None:
    """Neither who asked nor what went wrong in words becomes a series."""
    telemetry(replace(REQUEST, message="a long story", trace_id="abc", request_id="r-77"))

    text = telemetry.exposition().decode()
    assert not any(word in text for word in ("somebody", "a long story", "abc", "r-77"))


def test_two_processes_in_one(telemetry: Telemetry) -> None:
    """Each Telemetry has its own registry."""
    other = Telemetry()
    telemetry(ATTEMPT)

    assert series(other) == {}


def test_process_metrics(telemetry: Telemetry) -> None:
    """Memory and CPU of the process are served beside ours, in the format that the header says."""
    assert b"process_resident_memory_bytes" in telemetry.exposition()
    assert CONTENT_TYPE.startswith("text/plain")
