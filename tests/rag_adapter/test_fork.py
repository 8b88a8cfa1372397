"""Who wants to know is called in each forked child, before anything else runs there."""

from __future__ import annotations

import gc
import os

import pytest

from rag_adapter import fork


class Watcher:
    def __init__(self) -> None:
        self.processes: list[int] = []
        fork.in_child(self.forked)

    def forked(self) -> None:
        self.processes.append(os.getpid())


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_child_is_told_and_parent_is_not() -> None:
    """Exactly once, in the child."""
    watcher = Watcher()

    pid = os.fork()
    if pid == 0:
        os._exit(0 if watcher.processes == [os.getpid()] else 1)
    _, status = os.waitpid(pid, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert watcher.processes == []


def test_object_that_is_gone() -> None:
    """Nobody keeps it alive for the sake of a fork, and its entry goes with it."""
    watcher = Watcher()
    number = id(watcher)
    assert number in fork._watchers
    del watcher
    gc.collect()

    assert number not in fork._watchers
