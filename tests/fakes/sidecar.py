"""
The proxy as a process of its own: started from a piece of TOML, ready, and ended.

Imports the standard library only, since the suites of other virtual environments use it too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 30.0

HAND_OVER = """
import os, sys
end = sys.argv.index("--")
held = [os.dup2(int(fd), 200 + n) for n, fd in enumerate(sys.argv[1:end])]
for n, fd in enumerate(held):
    os.dup2(fd, 3 + n)
    os.close(fd)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[end + 1], sys.argv[end + 1:])
"""
"""What a service manager does between fork and exec: the numbers start at 3, and LISTEN_PID names the process."""


def python() -> str:
    """Return the Python that has the proxy's dependencies: this one, or the one of the project's own environment."""
    own = ROOT / ".venv" / "bin" / "python"
    return sys.executable if Path(sys.prefix).name == ".venv" or not own.exists() else str(own)


class Sidecar:
    """`with Sidecar(toml) as sidecar:` has `base_url`, `socket_path`, `pid`, and ends exactly this process."""

    def __init__(
        self, toml: str = "", *, environ: Mapping[str, str] | None = None, sockets: tuple[socket.socket, ...] = ()
    ) -> None:
        """
        Args:
            toml: settings; listeners may be left out.
            environ: further variables.
            sockets: listening sockets to hand over, as systemd does (LISTEN_FDS).
        """
        self._toml = toml
        self._environ = dict(environ or {})
        self._sockets = sockets

    def __enter__(self) -> Sidecar:
        self._folder = tempfile.TemporaryDirectory(prefix="es-")
        self.socket_path = f"{self._folder.name}/s.sock"
        self.config_path = Path(self._folder.name, "settings.toml")
        self.config_path.write_text(self._toml, encoding="utf-8")
        self._log = open(Path(self._folder.name, "log"), "w+b")
        self._start()
        return self

    def _start(self) -> None:
        self._process = self._started()
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise

    def kill(self) -> None:
        """End it as a crash does: nothing is answered any more, and its socket's file stays behind."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Start it again after its end, on the same Unix socket, with the settings of now; the log begins anew."""
        self._log.truncate(0)
        self._log.seek(0)
        self._start()

    def _started(self) -> subprocess.Popen[bytes]:
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "EMBEDDING_"))}
        environ["EMBEDDING_SIDECAR__LISTEN__SOCKET"] = self.socket_path
        environ["EMBEDDING_SIDECAR__LISTEN__TCP"] = "127.0.0.1:0"
        environ["PYTHONPATH"] = str(ROOT)
        environ.update(self._environ)
        command = [python(), "-m", "proxy", "run", "--config", str(self.config_path)]
        if self._sockets:
            environ["LISTEN_FDS"] = str(len(self._sockets))
            fds = [s.fileno() for s in self._sockets]
            command = [python(), "-c", HAND_OVER, *map(str, fds), "--", *command]
            return subprocess.Popen(command, env=environ, stderr=self._log, pass_fds=fds)
        return subprocess.Popen(command, env=environ, stderr=self._log)

    def _wait_until_ready(self) -> None:
        """The log tells the address and the state; it is a pipe for machines, so it may be read by one."""
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"the proxy ended with {self._process.returncode}: {self.log()}")
            states = [line["event"] for line in self.lines()]
            if "ready" in states or "unready" in states:
                self._find_address()
                return
            time.sleep(0.02)
        raise RuntimeError(f"the proxy was not ready after {START_TIMEOUT_S} s: {self.log()}")

    def _find_address(self) -> None:
        listening = [line["listeners"] for line in self.lines() if line["event"] == "listening"][-1]
        addresses = dict(item.split(":", 1) for item in listening)
        self.socket_path = addresses.get("unix", self.socket_path)
        if "tcp" in addresses:
            self.address = addresses["tcp"]
            self.base_url = f"http://{self.address}/v1"

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        """Return everything that it has written."""
        return Path(self._folder.name, "log").read_text(encoding="utf-8", errors="replace")

    def lines(self) -> list[dict[str, object]]:
        """Return its log lines."""
        lines = []
        for line in self.log().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return lines

    def get(self, path: str) -> tuple[int, bytes]:
        """Ask for a page over TCP."""
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def configure(self, toml: str) -> None:
        """Change the file; SIGHUP makes the proxy read it."""
        self.config_path.write_text(toml, encoding="utf-8")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for its end; returns the exit code."""
        return self._process.wait(timeout_s)

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()
        self._folder.cleanup()
