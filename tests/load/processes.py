"""
Mock, yardstick, proxy and generator as processes: started on the cores that are theirs, watched, and ended.

The proxy has the first core for itself; mock and generator share the second. With one core they all share it, and
the figures say little.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 10.0
ASK_TIMEOUT_S = 10.0
MAX_LIFE = "20m"
"""A mock whose harness was killed ends by itself."""
GENERATOR_GRACE_S = 60.0
"""A generator that has not ended this long after it should have is ended."""
BEHIND = 10
"""Niceness of callers that must not delay what is measured beside them."""
MODEL = "text-embedding-3-small"
WIDTH = 1536


@dataclass(frozen=True, slots=True)
class Cores:
    """Who runs where."""

    proxy: frozenset[int]
    others: frozenset[int]

    @classmethod
    def found(cls) -> Cores:
        """Return the first two cores that this process may use."""
        cores = sorted(os.sched_getaffinity(0))
        return cls(frozenset(cores[:1]), frozenset(cores[1:2] or cores[:1]))


# --- what is asked of processes ---


def ask(address: str, path: str) -> tuple[int, bytes]:
    """Ask for a page, at `host:port` or the path of a Unix socket; returns status and body."""
    is_path = address.startswith("/")
    with socket.socket(socket.AF_UNIX if is_path else socket.AF_INET) as connection:
        connection.settimeout(ASK_TIMEOUT_S)
        host, _, port = address.rpartition(":")
        connection.connect(address if is_path else (host, int(port)))
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while piece := connection.recv(65_536):
            answer += piece
            head, blank, body = answer.partition(b"\r\n\r\n")
            # The mock does not close; it says how long its answer is.
            length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
            if blank and length and len(body) >= int(length):
                break
    return int(answer[9:12]), answer.partition(b"\r\n\r\n")[2]


def resident_bytes(pid: int, *, peak: bool = False) -> int:
    """Return the resident memory of a process, now or at its highest."""
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used, user and system."""
    # The name, in parentheses, may contain blanks; utime and stime are the 14th and 15th field.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def others_s(cores: Cores) -> float:
    """Return the CPU time that these cores have spent on others than this process and those it has ended."""
    busy = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if name in {f"cpu{core}" for core in cores.proxy | cores.others}:
            # user, nice, system, idle, iowait, irq, softirq, steal; user includes guest
            user, nice, system, _, _, irq, softirq, steal = map(int, rest.split()[:8])
            busy += user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


# --- one process ---


class Process:
    """A process of ours; `with` ends exactly this one."""

    def __init__(
        self,
        command: Sequence[str],
        cores: frozenset[int],
        *,
        niceness: int = 0,
        environ: Mapping[str, str] | None = None,
        end_signal: int = signal.SIGTERM,
        folder: Path = ROOT,
    ) -> None:
        self.command = command
        self._end_signal = end_signal
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        # A child inherits the cores of the thread that starts it.
        ours = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)
        try:
            self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._errors, cwd=folder, env=environ)
        finally:
            os.sched_setaffinity(0, ours)
        if niceness:
            os.setpriority(os.PRIO_PROCESS, self.popen.pid, niceness)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def errors(self) -> str:
        """Return what it has written to its standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-4000:]

    def listening(self) -> str:
        """Wait for the line that says where it listens; returns the address."""
        assert self.popen.stdout
        readable, _, _ = select.select([self.popen.stdout], [], [], START_TIMEOUT_S)
        line = self.popen.stdout.readline().decode() if readable else ""
        if not line.startswith("listening "):
            raise RuntimeError(f"{' '.join(self.command)} does not listen: {line}{self.errors()}")
        return line.split()[1]

    def output(self, timeout_s: float) -> bytes:
        """Wait for its end; returns what it has written."""
        try:
            output, _ = self.popen.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise RuntimeError(f"{' '.join(self.command)} did not end within {timeout_s:.0f} s") from None
        if self.popen.returncode:
            raise RuntimeError(f"{' '.join(self.command)} ended with {self.popen.returncode}: {self.errors()}")
        return output

    def end(self) -> None:
        """End it, politely at first."""
        if self.popen.poll() is None:
            self.popen.send_signal(self._end_signal)
            try:
                self.popen.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()
        if self.popen.stdout:
            self.popen.stdout.close()
        self._errors.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


@dataclass(frozen=True, slots=True)
class Contestant:
    """A proxy that answers: where, and as which process."""

    name: str
    address: str
    pid: int
    socket_path: str = ""

    @property
    def target(self) -> str:
        return f"http://{self.address}/v1/embeddings"


# --- all of them ---


class Rig:
    """Starts what a scenario needs."""

    def __init__(self, tools: str = "", source: str = "") -> None:
        """
        Args:
            tools: folder with `mock` and `loadgen`, the Go tools; empty: ours.
            source: folder of the checkout whose proxy is measured; empty: this one.
        """
        self._source = Path(source).resolve() if source else ROOT
        self.cores = Cores.found()
        os.sched_setaffinity(0, self.cores.others)
        self._seed = 0
        own = [sys.executable, "-m"]
        self._mock = [str(Path(tools, "mock").resolve())] if tools else [*own, "tests.load.mock"]
        self._generator = [str(Path(tools, "loadgen").resolve())] if tools else [*own, "tests.load.generator"]

    @contextlib.contextmanager
    def mock(self, **config: float | str) -> Iterator[str]:
        """Run an upstream; gives its address."""
        options = ["--listen", "127.0.0.1:0", "--dims", str(WIDTH), "--max-life", MAX_LIFE]
        with Process([*self._mock, *options, "--config", json.dumps(config)], self.cores.others) as process:
            yield process.listening()

    @staticmethod
    def stats(mock: str) -> dict[str, int]:
        """Return the counts of a mock."""
        counts: dict[str, int] = json.loads(ask(mock, "/stats")[1])
        return counts

    @contextlib.contextmanager
    def bare(self, mock: str) -> Iterator[Contestant]:
        """Run the yardstick in front of a mock."""
        command = [sys.executable, "-m", "tests.load.bare", f"http://{mock}/v1/embeddings", "0"]
        with Process(command, self.cores.proxy) as process:
            yield Contestant("bare", process.listening(), process.pid)

    @contextlib.contextmanager
    def sidecar(
        self, mock: str, upstream: str = "", *, launcher: Sequence[str] = ("-m", "proxy")
    ) -> Iterator[Contestant]:
        """
        Run the proxy in front of a mock, until it is ready.

        Args:
            mock: the upstream's address.
            upstream: further lines of its settings.
            launcher: what Python runs.
        """
        with tempfile.TemporaryDirectory(prefix="es-bench-") as folder:
            socket_path = f"{folder}/s.sock"
            Path(folder, "settings.toml").write_text(settings(mock, socket_path, upstream), encoding="utf-8")
            command = [sys.executable, *launcher, "run", "--config", f"{folder}/settings.toml"]
            environ = {
                name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "EMBEDDING_"))
            }
            with Process(
                command, self.cores.proxy, environ=environ, end_signal=signal.SIGINT, folder=self._source
            ) as process:
                _wait_until_ready(process, socket_path)
                listeners = json.loads(ask(socket_path, "/status")[1])["listeners"]
                addresses = dict(listener.split(":", 1) for listener in listeners)
                yield Contestant("sidecar", addresses["tcp"], process.pid, socket_path)

    def generate(self, target: str, *, niceness: int = 0, **options: float | str) -> Process:
        """Start a load; options are those of the generator, durations in seconds. Each load has texts of its own."""
        self._seed += 1
        command = [*self._generator, "--target", target, "--seed", str(self._seed), "--dims", str(WIDTH)]
        for name, value in {"timeout": 30.0, "model": MODEL, **options}.items():
            text = f"{value:g}s" if name in ("duration", "timeout", "max_run") else str(value)
            command += [f"--{name.replace('_', '-')}", text]
        return Process(command, self.cores.others, niceness=niceness)

    def load(self, target: str, **options: Any) -> dict[str, Any]:
        """Run a load to its end; returns what the generator says."""
        with self.generate(target, **options) as process:
            return finished(process, float(options.get("duration") or options.get("max_run", 300.0)))


def finished(process: Process, lasts_s: float) -> dict[str, Any]:
    """Wait for a generator's end; returns what it says."""
    said: dict[str, Any] = json.loads(process.output(lasts_s + GENERATOR_GRACE_S))
    return said


def settings(mock: str, socket_path: str, upstream: str) -> str:
    """Return the proxy's settings, TOML: everything else is as it comes."""
    return f"""
[upstreams.mock]
kind = "openai"
profile = "openai"
base_url = "http://{mock}/v1"
{upstream}
[models.{MODEL}]
upstreams = ["mock"]
dimensions = {WIDTH}
[listen]
tcp = "127.0.0.1:0"
socket = "{socket_path}"
[log]
level = "warning"
"""


def _wait_until_ready(process: Process, socket_path: str) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        if process.popen.poll() is not None:
            raise RuntimeError(f"the proxy ended with {process.popen.returncode}: {process.errors()}")
        with contextlib.suppress(OSError):
            if ask(socket_path, "/readyz")[0] == 200:
                return
        time.sleep(0.02)
    raise RuntimeError(f"the proxy was not ready after {START_TIMEOUT_S:.0f} s: {process.errors()}")
