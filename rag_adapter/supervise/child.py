"""
The process that runs the proxy: its start, its output, its end.

It cannot outlive the app: the kernel sends it SIGTERM when the thread that started it ends (PR_SET_PDEATHSIG, which
goes by thread). That is the thread of the loop, and a loop that is gone supervises nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence

LOGGER = logging.getLogger("rag_adapter.sidecar")
"""Where the child's lines go, each at its own level, and what the supervision itself has to say."""

_PRELUDE = """
import ctypes, os, signal, sys
app, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; survives the exec below
if os.getppid() != int(app):
    sys.exit("the app has died meanwhile")
os.execvp(command[0], command)
"""
"""Runs in the child and becomes the proxy: 20 ms. A `preexec_fn` would run between fork and exec, where another
thread's lock may be held for ever."""

_LAST_LINES = 15
_LINE_BYTES = 16_384

_SILENCE_S = 1.0
"""After its end its last lines get this long to arrive: a process that it has started may hold the pipe for ever."""


class Child:
    """One process, its output, and its end."""

    def __init__(self, process: asyncio.subprocess.Process, output: _Output) -> None:
        self._process = process
        self._output = output
        self._ended = asyncio.create_task(process.wait())
        self._was_told = False

    @classmethod
    async def started(cls, command: Sequence[str], environ: Mapping[str, str]) -> Child:
        """
        Start a process that ends when this thread does.

        In a session of its own: Ctrl-C in a terminal is for the app, which still embeds while it shuts down.

        Raises:
            OSError: the system has no room for another process.
        """
        output = _Output()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _PRELUDE, str(os.getpid()), *command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output.fd,
                stderr=output.fd,
                env=environ,
                start_new_session=True,
            )
        finally:
            os.close(output.fd)  # the child has its own
        return cls(process, output)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lines(self) -> tuple[str, ...]:
        """What it wrote last."""
        return tuple(self._output.last_lines)

    async def has_ended_within(self, timeout_s: float) -> bool:
        """Wait for its end, but not longer than this."""
        await asyncio.wait({self._ended}, timeout=timeout_s)
        return self._ended.done()

    def terminate(self) -> None:
        """Send SIGTERM, to which the proxy drains. Once only: to a second one it ends without."""
        if not self._ended.done() and not self._was_told:
            self._was_told = True
            self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        if not self._ended.done():
            self._process.kill()

    async def end(self, timeout_s: float) -> int:
        """Let it end: SIGTERM, and SIGKILL when it takes longer than this; returns its exit code."""
        try:
            self.terminate()
            if not await self.has_ended_within(timeout_s):
                LOGGER.warning("the sidecar, pid %d, did not end within %g s and is killed", self.pid, timeout_s)
        finally:
            self.kill()
            code = await self._ended  # takes milliseconds by now, so also when we are not to wait any longer
        await self._output.end(_SILENCE_S)
        return code


class _Output:
    """
    What the process writes, read by a thread of its own.

    On the loop, an app that computes for a while would let the pipe run full, and the proxy, which other workers use
    too, would stand still in its next log line.
    """

    def __init__(self) -> None:
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._loop = asyncio.get_running_loop()
        self._is_over = asyncio.Event()
        reading, self.fd = os.pipe()
        thread = threading.Thread(target=self._read, args=(reading,), name="embedding-sidecar output", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            os.close(reading)
            os.close(self.fd)
            raise OSError(errno.EAGAIN, "no further thread can be started") from error

    async def end(self, timeout_s: float) -> None:
        """Wait until all of it is read, but not longer than this."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._is_over.wait()

    def _read(self, reading: int) -> None:
        """Hand it on, line by line. Runs in the thread."""
        with open(reading, "rb") as output:
            while raw := output.readline(_LINE_BYTES):
                if line := raw.decode(errors="replace").rstrip():
                    self.last_lines.append(line)
                    LOGGER.log(_level(line), "%s", line)
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._is_over.set)


def _level(line: str) -> int:
    """Return the level of a line of the proxy's; what is not one of its lines, such as a traceback, is a warning."""
    try:
        return logging.getLevelNamesMapping()[json.loads(line)["level"].upper()]
    except (ValueError, TypeError, LookupError, AttributeError):
        return logging.WARNING
