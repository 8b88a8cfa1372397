"""The proxy as a child: exactly one, ready, restarted, ended with the app, and heard when something is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rag_adapter.errors import SidecarUnavailable
from rag_adapter.supervise import COMMAND, State, SupervisedSidecar, backoff_s, failures

ROOT = Path(__file__).resolve().parents[2]

FAKE = """
import os, signal, socket, sys
mode, path = sys.argv[1], os.environ["EMBEDDING_SIDECAR_SOCKET"]
print('{"level": "info", "event": "started"}', os.environ.get("NOTIFY_SOCKET", ""), file=sys.stderr, flush=True)
if mode == "broken" or mode == "once" and os.path.exists(path + ".was"):
    sys.exit("settings: 1 problem")
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
listener = socket.socket(socket.AF_UNIX)
if os.path.exists(path):
    os.unlink(path)
listener.bind(path)
listener.listen(16)
open(path + ".was", "w").close()
print('{"level": "info", "event": "listening"}', file=sys.stderr, flush=True)
while True:
    caller, _ = listener.accept()
    caller.recv(4096)
    if mode == "unready":
        caller.sendall(b'HTTP/1.1 503 x\\r\\n\\r\\n{"reasons": ["model m: no such host"]}')
    elif mode == "other":
        caller.sendall(b'HTTP/1.0 404 x\\r\\n\\r\\n<html>')
    elif mode != "silent":
        caller.sendall(b'HTTP/1.1 200 OK\\r\\n\\r\\n{}')
    caller.close()
"""
"""Listens and answers as the proxy does, or not, 20 ms after its start."""

APP = """
import asyncio, json, sys
from rag_adapter.supervise import SupervisedSidecar

async def main():
    sidecar = SupervisedSidecar(sys.argv[1], command=sys.argv[2:])
    await sidecar.start()
    print(json.dumps([sidecar.snapshot().state, sidecar.snapshot().pid]), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await sidecar.stop()

asyncio.run(main())
"""
"""One worker of an app: says what it has, and ends when it is told to."""


def fake(mode: str = "ready") -> list[str]:
    return [sys.executable, "-I", "-S", "-c", FAKE, mode]


@pytest.fixture
def path() -> Iterator[str]:
    """A socket's path is bounded, so its folder has a short name."""
    with tempfile.TemporaryDirectory(prefix="es-") as folder:
        yield f"{folder}/s.sock"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child gets the environment of its app; whoever runs the tests may have set things."""
    for name in list(os.environ):
        if name.startswith(("EMBEDDING_", "OPENAI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.005)


def is_running(pid: int | None) -> bool:
    """A zombie counts as running: it has not been reaped."""
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def stranger(path: str, mode: str = "ready") -> Iterator[subprocess.Popen[bytes]]:
    """A proxy that somebody else runs."""
    process = subprocess.Popen(fake(mode), env={"EMBEDDING_SIDECAR_SOCKET": path}, stderr=subprocess.PIPE)
    assert process.stderr is not None
    with process:
        while b"listening" not in process.stderr.readline():
            pass
        try:
            yield process
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def app(path: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, State, int | None]]:
    """A worker in a process of its own; yields it with the state and the child it told of."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", APP, path, *fake()), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        state, pid = json.loads(await process.stdout.readline())
        yield process, State(state), pid
        await process.communicate(b"\n")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# --- with the real proxy ---


async def test_nobody_serves(path: str) -> None:
    """The proxy is started, is ready when `start()` returns, and leaves neither process nor socket behind."""
    sidecar = SupervisedSidecar(path)
    before = sidecar.snapshot()
    async with sidecar:
        during = sidecar.snapshot()
        answered = await asks(path, "/readyz")

    assert (before.state, before.pid) == (State.STOPPED, None)
    assert (during.state, during.restarts, during.last_exit) == (State.READY, 0, None)
    assert answered.startswith(b"HTTP/1.1 200")
    assert (sidecar.snapshot().state, sidecar.snapshot().pid, sidecar.snapshot().last_exit) == (State.STOPPED, None, 0)
    assert not is_running(during.pid)
    assert not os.path.exists(path)


async def asks(path: str, page: str) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(f"GET {page} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_bad_settings(path: str) -> None:
    """What is wrong with them is in the error, and nothing is tried again."""
    config = Path(path).with_name("settings.toml")
    config.write_text("[listen]\nbacklog = 0\n")
    sidecar = SupervisedSidecar(path, config=str(config))
    with pytest.raises(SidecarUnavailable, match=r"exit code 2 before.*\n.*\n.*listen\.backlog = 0") as caught:
        await sidecar.start()

    assert caught.value.code == "sidecar_not_started"
    assert sidecar.snapshot().state == State.STOPPED
    assert sidecar.snapshot().restarts == 0


async def test_proxy_s_packages_are_missing(path: str) -> None:
    """The app may have installed the adapter alone: the error says what to install."""
    sidecar = SupervisedSidecar(path, command=[COMMAND[0], "-S", *COMMAND[1:]])
    with pytest.raises(SidecarUnavailable, match=r"pip install 'embedding-sidecar\[proxy\]'"):
        await sidecar.start()


async def test_path_is_no_socket(path: str) -> None:
    """The proxy's own refusal is in the error."""
    Path(path).write_text("important")
    with pytest.raises(SidecarUnavailable, match="exists and is no socket"):
        await SupervisedSidecar(path).start()

    assert Path(path).read_text() == "important"


# --- the gate ---


async def test_not_ready_in_time(path: str) -> None:
    """The error has the proxy's reasons and its last lines; the child is gone."""
    sidecar = SupervisedSidecar(path, command=fake("unready"), ready_timeout_s=0.5)
    with pytest.raises(SidecarUnavailable) as caught:
        await sidecar.start()

    assert "not ready within 0.5 s; it says: model m: no such host; its last lines:" in str(caught.value)
    assert "listening" in str(caught.value)
    assert sidecar.snapshot() == type(sidecar.snapshot())(State.STOPPED, None, 0, -signal.SIGTERM)


@pytest.mark.parametrize("where", ["http://127.0.0.1:8484", None])
def test_address_is_no_unix_socket(where: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP may lead to another machine, where we start nothing; whoever says so is told at once."""
    monkeypatch.setenv("EMBEDDING_SIDECAR_URL", "http://127.0.0.1:8484")
    with pytest.raises(ValueError, match=r"needs a Unix socket, and 127.0.0.1:8484 is none"):
        SupervisedSidecar(where)


async def test_socket_without_rights(path: str) -> None:
    """A socket that this user may not open is no reason to start another proxy: the error says what to do."""
    with stranger(path):
        os.chmod(path, 0)
        os.chmod(Path(path).parent, 0o755)
        user = os.geteuid()
        if user == 0:  # who may open everything, so it asks as somebody else
            os.seteuid(65534)
        try:
            with pytest.raises(SidecarUnavailable, match=f"no right to connect to {path}: add user"):
                await SupervisedSidecar(path, command=fake()).start()
        finally:
            os.seteuid(user)


async def test_folder_that_cannot_be_made(path: str) -> None:
    """A folder whose parent is missing is not ours to make; the error says what to do."""
    with pytest.raises(SidecarUnavailable, match=r"No such file or directory.*set EMBEDDING_SIDECAR_SOCKET"):
        await SupervisedSidecar(f"{path}/no/s.sock").start()


async def test_start_that_is_cancelled(path: str) -> None:
    """Whoever gives up waiting leaves no child behind."""
    sidecar = SupervisedSidecar(path, command=fake("unready"))
    start = asyncio.create_task(sidecar.start())
    await until(lambda: os.path.exists(path))
    pid = sidecar.snapshot().pid
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start

    assert not is_running(pid)
    assert sidecar.snapshot().state == State.STOPPED


async def test_started_by_two(path: str) -> None:
    """Both wait for the same child; when it is none, both hear of it."""
    sidecar = SupervisedSidecar(path, command=fake())
    await asyncio.gather(sidecar.start(), sidecar.start())
    state = sidecar.snapshot().state
    await sidecar.stop()
    broken = SupervisedSidecar(path, command=fake("broken"))
    errors = await asyncio.gather(broken.start(), broken.start(), return_exceptions=True)

    assert state == State.READY
    assert [type(error) for error in errors] == [SidecarUnavailable] * 2


async def test_started_twice_and_again(path: str) -> None:
    """A second start changes nothing; after a stop it begins anew."""
    sidecar = SupervisedSidecar(path, command=fake())
    await sidecar.start()
    first = sidecar.snapshot().pid
    await sidecar.start()
    again = sidecar.snapshot().pid
    await sidecar.stop()
    await sidecar.stop()
    async with sidecar:
        anew = sidecar.snapshot()

    assert first == again
    assert anew.state == State.READY
    assert anew.pid != first


# --- restart ---


async def test_child_that_is_killed(path: str) -> None:
    """Another one takes its place, and the snapshot tells of it."""
    async with SupervisedSidecar(path, command=fake()) as sidecar:
        first = sidecar.snapshot().pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: sidecar.snapshot().state == State.RESTARTING)
        await until(lambda: sidecar.snapshot().state == State.READY)
        second = sidecar.snapshot()

    assert second.pid != first
    assert (second.restarts, second.last_exit) == (1, -signal.SIGKILL)
    assert not is_running(first)
    assert not is_running(second.pid)


async def test_child_that_hangs(path: str) -> None:
    """One that runs and does not answer any more is killed and replaced."""
    async with SupervisedSidecar(path, command=fake(), silence_timeout_s=0.4) as sidecar:
        first = sidecar.snapshot().pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        await until(lambda: sidecar.snapshot().restarts == 1 and sidecar.snapshot().state == State.READY)

    assert not is_running(first)


async def test_child_that_cannot_start_again(path: str) -> None:
    """A restart that fails is tried again and again; a stop ends that too."""
    async with SupervisedSidecar(path, command=fake("once")) as sidecar:
        pid = sidecar.snapshot().pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: sidecar.snapshot().restarts == 2 and sidecar.snapshot().pid is None)
        during = sidecar.snapshot()

    assert (during.state, during.last_exit) == (State.RESTARTING, 1)
    assert sidecar.snapshot().state == State.STOPPED


async def test_system_has_no_room(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system says when no process can be started is in the error; later it is a reason to wait."""
    async with SupervisedSidecar(path, command=fake()) as sidecar:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/no/such/python")
            with pytest.raises(SidecarUnavailable, match="cannot be started: No such file or directory"):
                await SupervisedSidecar(f"{path}2").start()
            pid = sidecar.snapshot().pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda: sidecar._failures >= 2)
        await until(lambda: sidecar.snapshot().state == State.READY)

    assert sidecar.snapshot().restarts == 1


async def test_folder_is_gone_for_a_while(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Trouble that somebody will mend ends no supervision."""
    folder = Path(path).with_name("inner")
    folder.mkdir()
    with stranger(f"{folder}/s.sock"):
        sidecar = SupervisedSidecar(f"{folder}/s.sock", command=fake(), takeover_after_s=0.0)
        await sidecar.start()
    shutil.rmtree(folder)
    folder.write_text("in its place")
    await until(lambda: "Not a directory" in caplog.text)
    folder.unlink()
    await until(lambda: sidecar.snapshot().state == State.READY)
    await sidecar.stop()


@pytest.mark.parametrize(("before", "ready_s", "after"), [(0, 0.0, 1), (3, 59.9, 4), (3, 60.0, 1)])
def test_children_that_end_too_soon(before: int, ready_s: float, after: int) -> None:
    """One that served for a minute was a good one, and the count begins anew."""
    assert failures(before, ready_s) == after


@pytest.mark.parametrize(("count", "bound_s"), [(1, 0.2), (2, 0.4), (5, 3.2), (8, 25.6), (9, 30.0), (10_000, 30.0)])
def test_wait_before_a_restart(count: int, bound_s: float) -> None:
    """It doubles up to half a minute, and is drawn from its upper half."""
    waits = [backoff_s(count, random.Random(seed)) for seed in range(50)]

    assert all(bound_s / 2 <= wait_s <= bound_s for wait_s in waits)
    assert len(set(waits)) == 50


# --- stop ---


async def test_child_that_does_not_end(path: str) -> None:
    """SIGTERM is meant kindly; after its time comes SIGKILL."""
    async with SupervisedSidecar(path, command=fake("deaf"), stop_timeout_s=0.1) as sidecar:
        pid = sidecar.snapshot().pid

    assert sidecar.snapshot().last_exit == -signal.SIGKILL
    assert not is_running(pid)


async def test_stop_that_is_cancelled(path: str) -> None:
    """Who cannot wait for the end of the child still leaves none."""
    sidecar = SupervisedSidecar(path, command=fake("deaf"))
    await sidecar.start()
    pid = sidecar.snapshot().pid
    stop = asyncio.create_task(sidecar.stop())
    await asyncio.sleep(0)
    stop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stop
    await until(lambda: not is_running(pid))

    assert sidecar.snapshot().pid is None


async def test_app_dies(path: str) -> None:
    """The kernel ends the child of an app that was killed."""
    async with app(path) as (process, state, pid):
        assert pid is not None
        watch = os.pidfd_open(pid)
        process.kill()
        await process.wait()
        ended, _, _ = await asyncio.to_thread(select.select, [watch], [], [], 30)
        os.close(watch)

    assert state == State.READY
    assert ended


# --- others ---


async def test_somebody_else_serves(path: str) -> None:
    """We attach, start nothing, and leave it running."""
    with stranger(path) as other:
        async with SupervisedSidecar(path, command=fake("broken")) as sidecar:
            during = sidecar.snapshot()
        is_left = other.poll() is None

    assert (during.state, during.pid, during.restarts) == (State.ATTACHED, None, 0)
    assert is_left


@pytest.mark.parametrize(
    ("mode", "said"), [("unready", "model m: no such host"), ("silent", "no answer"), ("other", "HTTP 404")]
)
async def test_somebody_else_serves_and_is_not_ready(path: str, mode: str, said: str) -> None:
    """The gate holds for a proxy that is not ours, too, and for what is none."""
    with stranger(path, mode):
        with pytest.raises(SidecarUnavailable, match=rf"was not ready within 0\.2 s; it says: {said}$"):
            await SupervisedSidecar(path, command=fake("broken"), ready_timeout_s=0.2).start()


async def test_stranger_goes_away_for_good(path: str) -> None:
    """When its time to come back is over, we start our own."""
    async with contextlib.AsyncExitStack() as stack:
        with stranger(path):
            sidecar = SupervisedSidecar(path, command=fake(), takeover_after_s=0.1)
            await stack.enter_async_context(sidecar)
        await until(lambda: sidecar.snapshot().state == State.READY)
        pid = sidecar.snapshot().pid

    assert pid is not None
    assert not is_running(pid)


async def test_stranger_is_restarted_by_its_manager(path: str) -> None:
    """Meanwhile we wait, and start nothing in its place."""
    async with contextlib.AsyncExitStack() as stack:
        with stranger(path):
            sidecar = SupervisedSidecar(path, command=fake("broken"), takeover_after_s=3600)
            await stack.enter_async_context(sidecar)
        await until(lambda: sidecar.snapshot().state == State.RESTARTING)
        with stranger(path):
            await until(lambda: sidecar.snapshot().state == State.ATTACHED)

    assert sidecar.snapshot().last_exit is None


async def test_stranger_is_faster(path: str) -> None:
    """Of two that start at the same time the second one makes way; its supervisor attaches."""
    with stranger(path) as other:
        command = ["sh", "-c", f'mv {path}.away {path}; echo "in use" >&2; exit 1']
        os.rename(path, f"{path}.away")
        async with SupervisedSidecar(path, command=command) as sidecar:
            during = sidecar.snapshot()
        is_left = other.poll() is None

    assert (during.state, during.last_exit) == (State.ATTACHED, 1)
    assert is_left


async def test_four_workers_start_one(path: str) -> None:
    """Of several workers of an app, in processes of their own, one has a child and the others attach."""
    async with contextlib.AsyncExitStack() as stack:
        workers = [stack.enter_async_context(app(path)) for _ in range(4)]
        # An AsyncExitStack is no thing for several tasks, but here each only begins.
        told = await asyncio.gather(*workers)
        states = sorted(state for _, state, _ in told)

    assert states == [State.ATTACHED, State.ATTACHED, State.ATTACHED, State.READY]
    assert sum(pid is not None for _, _, pid in told) == 1


async def test_worker_with_the_child_stops(path: str) -> None:
    """Another worker takes over at once, without waiting for the first one's drain."""
    first = SupervisedSidecar(path, command=fake("deaf"), stop_timeout_s=3600)
    await first.start()
    old = first.snapshot().pid
    async with SupervisedSidecar(path, command=fake()) as second:
        attached = second.snapshot().state
        stop = asyncio.create_task(first.stop())
        await until(lambda: first._lock._fd is None)
        os.unlink(path)  # what the proxy does first when it drains
        await until(lambda: second.snapshot().state == State.READY)
        is_draining = is_running(old)
        assert old is not None
        os.kill(old, signal.SIGKILL)
        await stop

    assert attached == State.ATTACHED
    assert is_draining


async def test_worker_with_the_child_dies(path: str) -> None:
    """The kernel ends the child and lets go of the lock; another worker takes over."""
    async with app(path) as (process, _, _):
        async with SupervisedSidecar(path, command=fake()) as sidecar:
            attached = sidecar.snapshot().state
            process.kill()
            await until(lambda: sidecar.snapshot().state == State.READY)

    assert attached == State.ATTACHED


def test_fork_has_no_share_in_the_lock(path: str) -> None:
    """A process that the app forks, and that outlives it, does not keep others from starting a proxy."""
    script = """
import os, sys
from rag_adapter.supervise.lock import Lock
lock = Lock(sys.argv[1])
assert lock.take()
read, write = os.pipe()
if (pid := os.fork()) == 0:
    os.close(write)
    os.read(read, 1)
    os._exit(0)
os.close(read)
other = Lock(sys.argv[1])
assert not other.take()
lock.release()
while not other.take():  # the fork may not have come to it yet
    pass
os.close(write)
os.waitpid(pid, 0)
"""
    ended = subprocess.run([sys.executable, "-c", script, path], timeout=30)

    assert ended.returncode == 0


# --- what the child hears and says ---


async def test_lines_of_the_child(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each goes to the app's logger at its own level; what is not a line of the proxy's is a warning."""
    caplog.set_level(logging.INFO, "rag_adapter.sidecar")
    with pytest.raises(SidecarUnavailable):
        await SupervisedSidecar(path, command=fake("broken")).start()
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if r.threadName == "embedding-sidecar output"]

    assert lines == [("INFO", '{"level": "info", "event": "started"}'), ("WARNING", "settings: 1 problem")]


@pytest.mark.parametrize(
    ("level", "told"), [(5, "debug"), (logging.INFO, "info"), (logging.WARNING, "warning"), (logging.CRITICAL, "error")]
)
async def test_lines_that_nobody_would_see(path: str, level: int, told: str, caplog: pytest.LogCaptureFixture) -> None:
    """The child is told how much the app's logger takes, and does not write the rest."""
    caplog.set_level(level, "rag_adapter.sidecar")
    assert SupervisedSidecar(path)._variables()["EMBEDDING_SIDECAR__LOG__LEVEL"] == told


def test_variables_of_the_child(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the app's, but not what a service manager told the app, and then what the caller says."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("OPENAI_API_KEY", "kept")
    monkeypatch.setenv("EMBEDDING_SIDECAR__LISTEN__SOCKET", "/run/other.sock")
    given: dict[str, Any] = {"environ": {"EMBEDDING_SIDECAR__LOG__LEVEL": "error"}}
    variables = SupervisedSidecar(path, **given)._variables()
    as_settings_say = SupervisedSidecar(path, tcp=None)._variables()

    assert variables["OPENAI_API_KEY"] == "kept"
    assert variables["EMBEDDING_SIDECAR_SOCKET"] == path
    assert variables["EMBEDDING_SIDECAR__LISTEN__TCP"] == "off"
    assert variables["EMBEDDING_SIDECAR__LOG__LEVEL"] == "error"
    assert not {"NOTIFY_SOCKET", "EMBEDDING_SIDECAR__LISTEN__SOCKET"} & set(variables)
    assert "EMBEDDING_SIDECAR__LISTEN__TCP" not in as_settings_say


def test_socket_by_the_adapter_s_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a path it is where the clients look."""
    monkeypatch.setenv("EMBEDDING_SIDECAR_SOCKET", "/run/x.sock")
    sidecar = SupervisedSidecar()

    assert sidecar.socket == "/run/x.sock"
    assert repr(sidecar) == "<SupervisedSidecar /run/x.sock: stopped>"
