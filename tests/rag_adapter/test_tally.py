"""Counts from many threads come out right."""

from __future__ import annotations

import threading

import pytest

from rag_adapter.tally import Tally


def test_counts_of_many_threads() -> None:
    """None is lost, and each error is counted under its code."""
    tally = Tally()

    def work() -> None:
        for _ in range(1000):
            tally.add("texts", 2)
            tally.add("requests")
            tally.failed("overloaded")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    found = tally.snapshot(requests_in_flight=3, texts_waiting=4)
    assert (found.texts, found.requests, found.errors) == (16_000, 8000, {"overloaded": 8000})
    assert (found.reconnects, found.connections_opened) == (0, 0)
    assert (found.requests_in_flight, found.texts_waiting) == (3, 4)


def test_snapshot_is_frozen() -> None:
    """It says what was; later counts do not change it."""
    tally = Tally()
    before = tally.snapshot(requests_in_flight=0, texts_waiting=0)
    tally.failed("overloaded")

    assert before.errors == {}
    with pytest.raises(AttributeError):
        before.texts = 1  # type: ignore[misc]
