"""
The upstream as a process that can be changed, killed and brought back while it is used; its counts survive its death.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.load.processes import ASK_TIMEOUT_S, MAX_LIFE, WIDTH, Process

HIGHEST = frozenset({"ExecMax", "InflightMax", "BatchMax", "ConnsPeak"})
"""Counts that are no sums."""
NOW = frozenset({"Inflight", "ConnsOpen"})


class Upstream:
    """`with Upstream(…) as upstream:` runs it, at one address all the time."""

    def __init__(self, tools: str, cores: frozenset[int], config: Mapping[str, float | str]) -> None:
        """
        Args:
            tools: folder with the Go tool `mock`; empty: ours.
            cores: where it runs.
            config: of the mock.
        """
        program = [str(Path(tools, "mock").resolve())] if tools else [sys.executable, "-m", "tests.load.mock"]
        self.address = f"127.0.0.1:{free_port()}"
        self._command = [
            *program, "--listen", self.address, "--dims", str(WIDTH), "--max-life", MAX_LIFE, "--config"
        ]  # fmt: skip
        self._cores = cores
        self._config = config
        self._before: Counter[str] = Counter()
        self._process: Process | None = None

    def start(self) -> None:
        """Run it."""
        self._process = Process([*self._command, json.dumps(dict(self._config))], self._cores)
        self._process.listening()
        # One connection for all that is asked here, so that it is known how many of those counted are ours.
        self._ours = http.client.HTTPConnection(self.address, timeout=ASK_TIMEOUT_S)
        self._before["ConnsNew"] -= 1

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process:
            self._before = added(self._before, self._own_counts())
            self._ours.close()
            self._process.popen.send_signal(signal.SIGKILL)
            self._process.popen.wait()
            self._process.end()
            self._process = None

    def configure(self, change: Mapping[str, float | str]) -> None:
        """Be other than before in this; empty: be as at the beginning."""
        self._asked("POST", "/admin/config", json.dumps({**self._config, **change}))

    def counts(self) -> dict[str, int]:
        """Return its counts since the first start, without our own connections."""
        return dict(added(self._before, self._own_counts() if self._process else {}))

    def _own_counts(self) -> dict[str, int]:
        found = self._asked("GET", "/stats", None)
        return {name: value for name, value in found.items() if isinstance(value, int)}

    def _asked(self, method: str, path: str, body: str | None) -> dict[str, Any]:
        self._ours.request(method, path, body)
        answer = self._ours.getresponse()
        said: dict[str, Any] = json.loads(answer.read())
        if answer.status != 200:
            raise RuntimeError(f"the upstream does not take {body}: {said}")
        return said

    def __enter__(self) -> Upstream:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._ours.close()
            self._process.end()


def added(before: Mapping[str, int], counts: Mapping[str, int]) -> Counter[str]:
    """Add the counts of one life to those of the lives before."""
    total = Counter(before)
    for name, value in counts.items():
        if name in HIGHEST:
            total[name] = max(total[name], value)
        elif name in NOW:
            total[name] = value
        else:
            total[name] += value
    return total


def free_port() -> int:
    """Return a port of loopback that nobody has; the kernel does not give it to others at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
