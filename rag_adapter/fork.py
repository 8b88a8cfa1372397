"""
After a fork the child has copies of its parent's connections, and must not touch what is spoken on them.

Python calls back in the child before anything else runs there, while it has a single thread; so nobody has to compare
process numbers on each call, and no lock is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

_watchers: dict[int, WeakMethod[Callable[[], Any]]] = {}
"""By number of the object; an entry goes when its object goes."""


def in_child(method: Callable[[], Any]) -> None:
    """Call this bound method in each child that is forked, as long as its object lives."""
    number = id(method.__self__)  # type: ignore[attr-defined]
    _watchers[number] = WeakMethod(method, lambda _: _watchers.pop(number, None))


def _forked() -> None:
    for watcher in tuple(_watchers.values()):
        if method := watcher():
            method()


os.register_at_fork(after_in_child=_forked)
