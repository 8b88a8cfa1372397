"""Everything at a glance."""

from __future__ import annotations

from proxy.watch.status import status


def test_status() -> None:
    """The process comes first, then the stages in the order in which they were given."""
    found = status(
        version="0.1.0",
        state="ready",
        uptime_s=12.34567,
        listeners=["unix:/run/s.sock"],
        connections=3,
        stages={"admission": {"inputs": 0}, "cache": {"entries": 1}},
    )

    assert found == {
        "version": "0.1.0",
        "state": "ready",
        "uptime_s": 12.346,
        "listeners": ["unix:/run/s.sock"],
        "connections": 3,
        "stages": {"admission": {"inputs": 0}, "cache": {"entries": 1}},
    }
    assert list(found) == ["version", "state", "uptime_s", "listeners", "connections", "stages"]
    assert list(found["stages"]) == ["admission", "cache"]
