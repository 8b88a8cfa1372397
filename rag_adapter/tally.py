"""What a client has done so far: counts, for an app's status page or its metrics."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Frozen numbers of one client, since it was made; in a forked child, since the fork."""

    texts: int
    """Texts handed in."""
    requests: int
    """Requests sent to the sidecar, repeated ones included."""
    reconnects: int
    """Requests sent again, since the sidecar was away or did not answer."""
    connections_opened: int
    requests_in_flight: int
    texts_waiting: int
    """Texts that wait for a connection at present."""
    errors: Mapping[str, int]
    """Calls that ended with an error, by code."""


class Tally:
    """Counts from all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # `+=` from several threads would lose some
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        """Count `texts`, `requests`, `reconnects` or `connections_opened`."""
        with self._lock:
            self._counts[name] += count

    def failed(self, code: str) -> None:
        """Count a call that ended with an error."""
        with self._lock:
            self._errors[code] += 1

    def snapshot(self, *, requests_in_flight: int, texts_waiting: int) -> Snapshot:
        """Freeze the counts, beside what is under way."""
        with self._lock:
            counts, errors = self._counts.copy(), dict(self._errors)
        return Snapshot(
            texts=counts["texts"],
            requests=counts["requests"],
            reconnects=counts["reconnects"],
            connections_opened=counts["connections_opened"],
            requests_in_flight=requests_in_flight,
            texts_waiting=texts_waiting,
            errors=errors,
        )
