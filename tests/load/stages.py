"""
Where the time of a profile goes, by stage of the journey. Pure.

A profile knows functions; here each one is given to a room of the house (`edge.accept`, `funnel.cache`) or to a library
(`aiohttp`, `asyncio`). What is written in C and small, like `dict.get` or `bytes.join`, is its caller's cost; what is
large has a name of its own (`orjson`, `numpy`, `uvloop`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Function = tuple[str, int, str]
"""File, line, name, as pstats has it."""

OF_ITS_CALLER = ""
NAMED = ("orjson", "uvloop", "numpy", "aiohttp", "frozenlist", "multidict", "yarl")
"""Libraries in C whose calls are a row of their own."""

_HOUSE = re.compile(r".*/proxy/(\w+)(?:/(\w+))?[/.]")
_PACKAGE = re.compile(r"/(?:site|dist)-packages/(\w+)")
_STANDARD = re.compile(r"/lib/python[\d.]+/(\w+)")


@dataclass(slots=True)
class Cost:
    """What a stage has used."""

    seconds: float = 0.0
    calls: int = 0


def stage_of(function: Function) -> str:
    """Return the row a function belongs to; OF_ITS_CALLER when it is its caller's cost."""
    file, _, name = function
    if file == "~":
        return next((f"{library} (C)" for library in NAMED if library in name), OF_ITS_CALLER)
    if file.startswith("<"):
        return OF_ITS_CALLER
    if package := _PACKAGE.search(file):
        return package[1]
    if standard := _STANDARD.search(file):
        return "asyncio" if standard[1] == "asyncio" else "standard library"
    if house := _HOUSE.search(file):
        return ".".join(part for part in house.groups() if part and part != "__init__")
    return "other"


def by_stage(stats: Mapping[Function, tuple[int, int, float, float, Mapping[Function, Any]]]) -> dict[str, Cost]:
    """Add up the functions' own time by stage."""
    costs: defaultdict[str, Cost] = defaultdict(Cost)
    for function, (_, calls, own_s, _, callers) in stats.items():
        stage = stage_of(function)
        if stage:
            costs[stage].seconds += own_s
            costs[stage].calls += calls
            continue
        left_s = own_s
        for caller, (_, caller_calls, caller_own_s, _) in callers.items():
            left_s -= caller_own_s
            cost = costs[stage_of(caller) or "other"]
            cost.seconds += caller_own_s
            cost.calls += caller_calls
        # Called from where the profile did not look, such as the event loop.
        costs["other"].seconds += max(0.0, left_s)
    return dict(costs)
