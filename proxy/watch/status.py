"""
Everything at a glance, as plain data: what every stage says of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def status(
    *, version: str, state: str, uptime_s: float, listeners: list[str], connections: int, stages: Mapping[str, Any]
) -> dict[str, Any]:
    """Put the snapshots into one object: the process first, then the stages in the order of the journey."""
    return {
        "version": version,
        "state": state,
        "uptime_s": round(uptime_s, 3),
        "listeners": listeners,
        "connections": connections,
        "stages": stages,
    }
