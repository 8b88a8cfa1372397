"""Sockets are opened so that nobody is hurt, and closed so that nothing is lost."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import gc
import gzip
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from aiohttp import web

from proxy.base.clock import Clock, MonotonicClock
from proxy.base.settings import Catalogue, ListenSettings, RequestSettings
from proxy.edge.accept import Accept, Page
from proxy.wiring.config import default_socket
from proxy.wiring.server import (
    Listener,
    ListenError,
    Server,
    _own_folder,
    close_listeners,
    open_listeners,
    refuse_strangers,
)
from tests.fakes.clock import HandClock
from tests.fakes.sidecar import ROOT

STRANGER = 54_321
"""A user that nobody is."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: a socket's path is bounded, and pytest's folders have long ones."""
    with tempfile.TemporaryDirectory(prefix="es-") as name:
        yield Path(name)


@contextlib.contextmanager
def opened(settings: ListenSettings, environ: dict[str, str] | None = None) -> Iterator[list[Listener]]:
    listeners = open_listeners(settings, environ or {}, has_keys=False)
    try:
        yield listeners
    finally:
        close_listeners(listeners)


def unix_only(path: Path | str, **changes: Any) -> ListenSettings:
    return ListenSettings(socket=str(path), tcp="off", **changes)


def tcp_only(address: str = "127.0.0.1:0", **changes: Any) -> ListenSettings:
    return ListenSettings(socket="off", tcp=address, **changes)


def refusal(settings: ListenSettings) -> str:
    """Return the sentence with which the listeners are refused."""
    with pytest.raises(ListenError) as caught:
        open_listeners(settings, {}, has_keys=False)
    return str(caught.value)


def connected(path: Path | str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def script(text: str, *arguments: object) -> str:
    """Run a piece of Python that knows the server's functions; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{PREAMBLE}\n{text}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PREAMBLE = """
import os, stat, sys
from proxy.base.settings import ListenSettings
from proxy.wiring.server import ListenError, close_listeners, open_listeners
from proxy.wiring.config import default_socket

def become(uid):
    # After the imports: the interpreter may lie where that user cannot read. Without root, rights bind anyway.
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
"""


# --- the Unix socket ---


@pytest.mark.parametrize("mode", ["0600", "660", "0666"])
def test_mode_of_the_socket(mode: str, folder: Path) -> None:
    """The socket has the mode that the settings say, whatever the umask."""
    with opened(unix_only(folder / "s", socket_mode=mode)):
        found = stat.S_IMODE(os.stat(folder / "s").st_mode)

    assert found == int(mode, 8)


def test_socket_in_the_present_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path without a folder is a name in the present one."""
    monkeypatch.chdir(folder)
    with opened(unix_only("s")) as listeners:
        connected("s").close()

        assert [(x.name, x.address) for x in listeners] == [("unix", "s")]


def test_nothing_is_left_beside_the_socket(folder: Path) -> None:
    """The name that the socket was bound to first is gone; after closing, so is the path."""
    with opened(unix_only(folder / "s")):
        during = os.listdir(folder)

    assert during == ["s"]
    assert os.listdir(folder) == []


def test_files_beside_the_path(folder: Path) -> None:
    """What lies beside the path is somebody else's and stays; nothing of ours is left there."""
    (folder / "s.new").write_bytes(b"somebody's")
    with opened(unix_only(folder / "s")):
        connected(folder / "s").close()

        assert sorted(os.listdir(folder)) == ["s", "s.new"]
    assert (folder / "s.new").read_bytes() == b"somebody's"


def test_two_starts_at_once(folder: Path) -> None:
    """Of two that start on one path, one has it and the other one is refused; neither loses its socket unawares."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        starts = [pool.submit(open_listeners, unix_only(folder / "s"), {}, has_keys=False) for _ in range(2)]
    errors = [start.exception() for start in starts]
    opened_ones = [start.result() for start, error in zip(starts, errors, strict=True) if error is None]
    connected(folder / "s").close()
    for listeners in opened_ones:
        close_listeners(listeners)

    assert len(opened_ones) == 1
    assert "is in use" in str(next(error for error in errors if error))


def test_name_that_the_socket_has_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket is bound to the path with a point and six hexadecimal digits, and listens before it is renamed."""
    renamed = []
    rename = os.rename

    def noted(before: str, after: str) -> None:
        connected(before).close()
        renamed.append((before, after))
        rename(before, after)

    monkeypatch.setattr(os, "rename", noted)
    for _ in range(2):
        with opened(unix_only(folder / "s")):
            pass

    assert [after for _, after in renamed] == [f"{folder}/s"] * 2
    assert all(re.fullmatch(rf"{re.escape(str(folder))}/s\.[0-9a-f]{{6}}", before) for before, _ in renamed)
    assert renamed[0] != renamed[1]


def test_socket_that_cannot_be_renamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that fails in the middle leaves nothing beside the path, and lets the next one in."""

    def fails(*_: str) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        told = refusal(unix_only(folder / "s"))

    assert told.startswith(f"cannot make the socket {folder}/s: Permission denied; ")
    assert os.listdir(folder) == []
    with opened(unix_only(folder / "s")):
        connected(folder / "s").close()


def test_start_beside_a_start(folder: Path) -> None:
    """While another process makes its socket in the folder, nothing is looked at or bound there."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            start = pool.submit(open_listeners, unix_only(folder / "s"), {}, has_keys=False)
            with pytest.raises(TimeoutError):
                start.result(timeout=0.1)
            during = os.listdir(folder)
        finally:
            os.close(fd)
        listeners = start.result(timeout=5)
    connected(folder / "s").close()
    close_listeners(listeners)

    assert during == []


def test_socket_left_by_a_crash(folder: Path) -> None:
    """A path on which nobody answers was left behind by a crash, and is replaced."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "s"))
        dead.listen()

    with opened(unix_only(folder / "s")):
        connected(folder / "s").close()


def test_path_always_leads_somewhere_while_it_is_replaced(folder: Path) -> None:
    """The path is replaced by renaming: at no moment is there none."""
    missed = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            if not os.path.lexists(folder / "s"):
                missed.append(1)

    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "s"))
    watcher = threading.Thread(target=look)
    watcher.start()
    listeners = []
    for _ in range(200):
        listeners += open_listeners(unix_only(folder / "s"), {}, has_keys=False)
        listeners[-1].sock.close()  # as a crash would
    is_over.set()
    watcher.join()

    assert missed == []
    close_listeners(listeners)
    assert os.listdir(folder) == []


def test_socket_that_somebody_answers_on(folder: Path) -> None:
    """A live socket is refused, with what to do, and goes on to serve its owner."""
    with opened(unix_only(folder / "s")):
        told = refusal(unix_only(folder / "s"))
        connected(folder / "s").close()

    assert told.startswith(f"{folder}/s is in use: a process answers there; stop it, or set listen.socket")
    assert "$EMBEDDING_SIDECAR_SOCKET" in told


def test_live_socket_with_a_full_queue(folder: Path) -> None:
    """A live socket that cannot take one more connection is not taken for a dead one."""
    with opened(unix_only(folder / "s", backlog=1)), contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(connected(folder / "s"))
        told = refusal(unix_only(folder / "s"))
        found = stat.S_ISSOCK(os.lstat(folder / "s").st_mode)

    assert f"{folder}/s" in told
    assert "set listen.socket" in told
    assert found


def test_socket_that_we_may_not_open(folder: Path) -> None:
    """A live socket of somebody who does not let us in is refused with what to do, not replaced."""
    told = script(
        """
folder = sys.argv[1]
os.chmod(folder, 0o777)
listeners = open_listeners(ListenSettings(socket=folder + "/s", socket_mode="0000", tcp="off"), {}, has_keys=False)
become(54321)
try:
    open_listeners(ListenSettings(socket=folder + "/s", tcp="off"), {}, has_keys=False)
except ListenError as error:
    print(error)
        """,
        folder,
    )

    assert told.startswith(f"cannot tell whether {folder}/s is in use: Permission denied")
    assert "listen.socket" in told


@pytest.mark.parametrize("kind", ["file", "folder", "symlink to a file", "symlink to a socket", "symlink to nothing"])
def test_path_that_is_something_else(kind: str, folder: Path) -> None:
    """A path that is no socket of its own is refused, and stays as it was."""
    path, target = folder / "s", folder / "target"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("precious", encoding="utf-8")
    else:
        path.symlink_to(target)
    if kind == "symlink to a file":
        target.write_text("precious", encoding="utf-8")
    elif kind == "symlink to a socket":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(target))
    before = (os.lstat(path), sorted(os.listdir(folder)))

    told = refusal(unix_only(path))
    assert told == f"{path} exists and is no socket; remove it or set listen.socket to another place"
    assert (os.lstat(path), sorted(os.listdir(folder))) == before
    assert kind not in ("file", "symlink to a file") or path.read_text(encoding="utf-8") == "precious"


def test_socket_in_a_missing_folder(folder: Path) -> None:
    """A folder that is not there is named, with what it needs; it is not made."""
    told = refusal(unix_only(folder / "none" / "s"))

    assert told.startswith(
        f"cannot make the socket {folder}/none/s: No such file or directory; the folder {folder}/none"
    )
    assert f"has to exist and be writable for uid {os.getuid()}, or set listen.socket" in told
    assert os.listdir(folder) == []


def test_socket_in_a_folder_without_rights(folder: Path) -> None:
    """A folder that this user may not write to is named, with the user."""
    told = script(
        """
folder = sys.argv[1]
os.chmod(folder, 0o555)
become(54321)
try:
    open_listeners(ListenSettings(socket=folder + "/s", tcp="off"), {}, has_keys=False)
except ListenError as error:
    print(error, os.getuid())
        """,
        folder,
    )

    sentence, _, uid = told.rpartition(" ")
    assert sentence.startswith(
        f"cannot make the socket {folder}/s: Permission denied; the folder {folder} has to exist"
    )
    assert f"writable for uid {uid}," in sentence


def test_path_at_the_bound(folder: Path) -> None:
    """A path of 100 bytes, the most that the settings take, can be bound and connected to."""
    path = f"{folder}/{'a' * (100 - len(str(folder)) - 1)}"
    with opened(unix_only(path)):
        connected(path).close()

    assert len(path) == 100


# --- the default folder ---


def test_default_folder_is_made_for_this_user_only() -> None:
    """Without a runtime folder the socket lies in a folder below /tmp that nobody else may enter."""
    told = script(
        """
become(54321)
folder = os.path.dirname(default_socket({}))
was_there = os.path.exists(folder)
os.umask(0)
listeners = open_listeners(ListenSettings(socket=default_socket({}), tcp="off"), {}, has_keys=False)
found = os.stat(folder)
print(folder, oct(stat.S_IMODE(found.st_mode)), found.st_uid == os.getuid())
close_listeners(listeners)
if not was_there:
    os.rmdir(folder)
        """
    )

    uid = STRANGER if os.getuid() == 0 else os.getuid()
    assert told == f"/tmp/embedding-sidecar-{uid} 0o700 True"


def test_default_folder_of_somebody_else() -> None:
    """A default folder that another user has laid out is refused: whoever owns it could swap the socket."""
    if os.getuid() != 0:  # nobody but root can make a folder that is another's; /usr is
        with pytest.raises(ListenError, match="/usr is not a folder of this user"):
            _own_folder("/usr", {})
        return
    told = script(
        """
path = "/tmp/embedding-sidecar-54322/embedding-sidecar.sock"
os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
pid = os.fork()
if pid == 0:
    become(54322)
    assert path == default_socket({})
    try:
        open_listeners(ListenSettings(socket=path, tcp="off"), {}, has_keys=False)
    except ListenError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
assert os.listdir(os.path.dirname(path)) == []
os.rmdir(os.path.dirname(path))
        """
    )

    assert told == (
        "/tmp/embedding-sidecar-54322 is not a folder of this user that nobody else can write to; "
        "remove it or set listen.socket to another place"
    )


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_default_folder_that_others_can_write_to(mode: int, folder: Path) -> None:
    """Our own folder is refused too while its group or others can write to it."""
    (folder / "d").mkdir()
    (folder / "d").chmod(mode)

    with pytest.raises(ListenError, match="is not a folder of this user that nobody else can write to; remove it or"):
        _own_folder(str(folder / "d"), {})


@pytest.mark.parametrize("kind", ["file", "symlink"])
def test_default_folder_that_is_none(kind: str, folder: Path) -> None:
    """A file or a symlink, even to a folder of ours, is no folder of ours."""
    (folder / "own").mkdir(0o700)
    if kind == "file":
        (folder / "d").write_bytes(b"")
    else:
        (folder / "d").symlink_to(folder / "own")

    with pytest.raises(ListenError, match="is not a folder of this user"):
        _own_folder(str(folder / "d"), {})


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_default_folder_from_the_last_time(mode: int, folder: Path) -> None:
    """A folder of ours that only we can write to is taken as it is."""
    (folder / "d").mkdir()
    (folder / "d").chmod(mode)

    _own_folder(str(folder / "d"), {})
    assert stat.S_IMODE(os.stat(folder / "d").st_mode) == mode


def test_default_folder_that_cannot_be_made(folder: Path) -> None:
    """Where not even /tmp is there, the sentence names what to set."""
    with pytest.raises(
        ListenError, match=r"cannot make the folder .*/none/d: No such file or directory; set listen.soc"
    ):
        _own_folder(str(folder / "none" / "d"), {})


def test_runtime_folder(folder: Path) -> None:
    """A runtime folder is the service manager's: it is used, whatever its mode, and not made."""
    folder.chmod(0o777)
    environ = {"XDG_RUNTIME_DIR": str(folder)}
    with opened(unix_only(default_socket(environ)), environ) as listeners:
        address = listeners[0].address

    assert address == f"{folder}/embedding-sidecar.sock"
    assert refusal_in_missing_runtime_folder(folder).startswith("cannot make the socket")


def refusal_in_missing_runtime_folder(folder: Path) -> str:
    environ = {"XDG_RUNTIME_DIR": f"{folder}/none"}
    with pytest.raises(ListenError) as caught:
        open_listeners(unix_only(default_socket(environ)), environ, has_keys=False)
    return str(caught.value)


# --- TCP ---


def test_any_free_port() -> None:
    """Port 0 takes a free one, and the address tells which."""
    with opened(tcp_only("127.0.0.1:0")) as listeners:
        host, _, port = listeners[0].address.rpartition(":")
        socket.create_connection((host, int(port))).close()

        assert (listeners[0].name, host) == ("tcp", "127.0.0.1")


def test_loopback_of_ipv6() -> None:
    """`[::1]` is listened on, and spelled with its brackets."""
    with opened(tcp_only("[::1]:0")) as listeners:
        host, _, port = listeners[0].address.rpartition(":")
        socket.create_connection(("::1", int(port))).close()

    assert host == "[::1]"


def test_port_in_use(folder: Path) -> None:
    """A taken port is told with every way out, and the socket that was open already is closed and removed."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        told = refusal(ListenSettings(socket=str(folder / "s"), tcp=address))

    assert told.startswith(f"cannot listen on {address}: Address already in use; ")
    for word in ("stop", "listen.tcp", "$EMBEDDING_SIDECAR__LISTEN__TCP", "port 0", "'off'"):
        assert word in told
    assert os.listdir(folder) == []


def test_port_of_a_connection_that_lingers() -> None:
    """A port whose last connections are in TIME_WAIT can be taken again at once."""
    with opened(tcp_only()) as listeners:
        host, port = listeners[0].sock.getsockname()
        caller = socket.create_connection((host, port))
        listeners[0].sock.setblocking(True)
        ours, _ = listeners[0].sock.accept()
        ours.close()  # who closes first keeps TIME_WAIT
        caller.close()

    with opened(tcp_only(f"127.0.0.1:{port}")) as again:
        assert again[0].address == f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("name.invalid:80", "cannot listen on name.invalid:80: "),
        (f"{'a' * 64}.invalid:80", f"cannot listen on {'a' * 64}.invalid:80: "),
        ("192.0.2.1:0", "cannot listen on 192.0.2.1:0: Cannot assign requested address; "),
    ],
    ids=["unknown name", "name too long", "address of another machine"],
)
def test_address_that_is_not_ours(address: str, expected: str) -> None:
    """A name or an address that this machine does not have is told with the setting to change."""
    told = refusal(tcp_only(address))

    assert told.startswith(expected)
    assert "listen.tcp" in told


def test_both_listeners(folder: Path) -> None:
    """Both are opened, the Unix socket first, and neither holds up the loop."""
    with opened(ListenSettings(socket=str(folder / "s"), tcp="127.0.0.1:0")) as listeners:
        assert [listener.name for listener in listeners] == ["unix", "tcp"]
        assert [listener.sock.getblocking() for listener in listeners] == [False, False]


# --- handed over ---


@contextlib.contextmanager
def handed_over(*socks: socket.socket) -> Iterator[dict[str, str]]:
    """Put sockets at the numbers from 3 on, as a service manager does, and what was there back again."""
    held = [fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 100) for sock in socks]
    before: list[tuple[int, bool] | None] = []
    for at in range(3, 3 + len(socks)):
        try:
            before.append((fcntl.fcntl(at, fcntl.F_DUPFD_CLOEXEC, 100), os.get_inheritable(at)))
        except OSError:
            before.append(None)
    for at, fd in enumerate(held, 3):
        os.dup2(fd, at, inheritable=True)
        os.close(fd)
    try:
        yield {"LISTEN_FDS": str(len(socks)), "LISTEN_PID": str(os.getpid())}
    finally:
        for at, saved in enumerate(before, 3):
            if saved is None:
                with contextlib.suppress(OSError):
                    os.close(at)
            else:
                os.dup2(saved[0], at, inheritable=saved[1])
                os.close(saved[0])


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_sockets_handed_over(folder: Path) -> None:
    """Sockets that a service manager holds are served in place of the settings' own, and kept from children."""
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(str(folder / "theirs"))
        unix.listen()
        with handed_over(unix, tcp) as environ:
            with opened(ListenSettings(socket=str(folder / "ours"), tcp="127.0.0.1:0"), environ) as listeners:
                found = [(x.name, x.address, x.sock.fileno(), x.sock.getblocking()) for x in listeners]
                inheritable = [x.sock.get_inheritable() for x in listeners]
            left = [is_open(3), is_open(4)]
        port = tcp.getsockname()[1]

    assert found == [("unix", str(folder / "theirs"), 3, False), ("tcp", f"127.0.0.1:{port}", 4, False)]
    assert inheritable == [False, False]
    assert left == [False, False]
    assert os.listdir(folder) == ["theirs"]  # not ours to remove


@pytest.mark.parametrize(
    "environ",
    [
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "1"},
        {"LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "0", "LISTEN_PID": str(os.getpid())},
    ],
)
def test_sockets_handed_to_somebody_else(environ: dict[str, str], folder: Path) -> None:
    """Variables that name another process, or no socket, hand nothing over: the settings count."""
    with opened(unix_only(folder / "s"), environ) as listeners:
        assert [listener.address for listener in listeners] == [str(folder / "s")]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the test tells whether the socket was closed
def test_open_socket_handed_over_without_keys() -> None:
    """A socket that others can reach is refused without client keys, wherever it came from, and is not kept."""
    with socket.create_server(("0.0.0.0", 0)) as tcp:
        with handed_over(tcp) as environ:
            try:
                open_listeners(ListenSettings(), environ, has_keys=False)
            except ListenError as error:
                told = str(error)
                was_kept = is_open(3)
            gc.collect()
        address = f"0.0.0.0:{tcp.getsockname()[1]}"

    assert told.startswith(f"the open socket {address} is reachable from outside")
    assert told.endswith("add [callers.<name>] with key_sha256")
    assert not was_kept


def test_open_socket_handed_over_with_keys() -> None:
    """With client keys a socket that others can reach is served."""
    with socket.create_server(("0.0.0.0", 0)) as tcp, handed_over(tcp) as environ:
        listeners = open_listeners(ListenSettings(), environ, has_keys=True)
        names = [listener.name for listener in listeners]
        close_listeners(listeners)

    assert names == ["tcp"]


@pytest.mark.parametrize(
    ("family", "host", "is_refused"),
    [
        (socket.AF_INET, "127.0.0.1", False),
        (socket.AF_INET, "127.0.0.2", False),
        (socket.AF_INET6, "::1", False),
        (socket.AF_INET, "0.0.0.0", True),
        (socket.AF_INET6, "::", True),
    ],
)
def test_strangers(family: socket.AddressFamily, host: str, is_refused: bool, folder: Path) -> None:
    """Among open sockets, one that others can reach is refused by its address, but not where client keys are asked."""
    with opened(unix_only(folder / "s")) as listeners, socket.create_server((host, 0), family=family) as tcp:
        port = tcp.getsockname()[1]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        listeners = [*listeners, Listener("tcp", address, tcp)]
        refuse_strangers(listeners, has_keys=True)
        told = ""
        try:
            refuse_strangers(listeners, has_keys=False)
        except ListenError as error:
            told = str(error)
        was_kept = tcp.fileno() != -1

    assert told == (
        f"the open socket {address} is reachable from outside, and no client keys are configured; "
        "add [callers.<name>] with key_sha256"
        if is_refused
        else ""
    )
    assert was_kept  # it may be one that serves


@pytest.mark.parametrize("environ", [{"LISTEN_FDS": "many"}, {"LISTEN_FDS": "3"}], ids=["no number", "not there"])
def test_hand_over_that_is_broken(environ: dict[str, str]) -> None:
    """Variables that promise what is not there end in a sentence, not in a traceback."""
    told = script(
        """
os.environ.update(dict(zip(sys.argv[1::2], sys.argv[2::2])), LISTEN_PID=str(os.getpid()))
try:
    open_listeners(ListenSettings(), os.environ, has_keys=False)
except ListenError as error:
    print(error)
        """,
        *next(iter(environ.items())),
    )

    assert "LISTEN_FDS" in told


# --- closing ---


def test_path_of_a_successor(folder: Path) -> None:
    """Only a path that is still ours is removed: a successor has put its own socket there."""
    ours = open_listeners(unix_only(folder / "s"), {}, has_keys=False)
    theirs = open_listeners(unix_only(folder / "t"), {}, has_keys=False)
    os.rename(folder / "t", folder / "s")

    close_listeners(ours)
    connected(folder / "s").close()
    theirs[0].address = str(folder / "s")
    close_listeners(theirs)
    assert os.listdir(folder) == []


def test_path_that_is_gone_already(folder: Path) -> None:
    """Who has removed the path before us has spared us the work."""
    listeners = open_listeners(unix_only(folder / "s"), {}, has_keys=False)
    os.unlink(folder / "s")

    close_listeners(listeners)
    assert listeners[0].sock.fileno() == -1


def test_closing_twice(folder: Path) -> None:
    """Listeners are closed at the drain and once more at the end; a socket put there meanwhile is a successor's."""
    listeners = open_listeners(unix_only(folder / "s"), {}, has_keys=False)
    # File systems give a number to the next file when its file is gone; a second name brings that about for certain.
    os.link(folder / "s", folder / "successor")
    close_listeners(listeners)
    os.rename(folder / "successor", folder / "s")

    close_listeners(listeners)
    assert os.listdir(folder) == ["s"]


# --- serving ---


class Caller:
    """A connection on which a test speaks HTTP by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, path: str, host: str = "localhost") -> None:
        self.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    async def answer(self) -> tuple[str, bytes]:
        """Return head and body of the next answer; an empty head when the connection was closed instead."""
        async with asyncio.timeout(5):
            try:
                head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
            except (asyncio.IncompleteReadError, ConnectionResetError):
                return "", b""
            length = int(head.lower().partition("content-length: ")[2].split()[0])
            return head, await self._reader.readexactly(length)

    async def ask(self, path: str) -> str:
        """Return the first line of the answer."""
        self.send(path)
        return (await self.answer())[0].partition("\r\n")[0]

    def is_at_end(self) -> bool:
        return self._reader.at_eof()

    async def end(self) -> bytes:
        """Wait until the other side has closed; returns what came before."""
        async with asyncio.timeout(5):
            try:
                return await self._reader.read()
            except ConnectionResetError:
                return b""

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


class House:
    """A server with real sockets, a few pages, and nothing behind them."""

    def __init__(self, folder: Path, clock: Clock, **listen: Any) -> None:
        self.settings = ListenSettings(socket=str(folder / "s"), tcp="127.0.0.1:0", **listen)
        self.release = asyncio.Event()
        self.facts: list[Any] = []
        service: Any = SimpleNamespace(
            catalogue=Catalogue({}, ""), listen=self.settings, request=RequestSettings(), callers={}
        )
        pages: dict[str, Callable[[], Awaitable[Page]]] = {
            "/quick": self._quick,
            "/slow": self._slow,
            "/large": self._large,
        }
        self.accept = Accept(
            service=lambda: service, pages=pages, open_pages=frozenset(pages), clock=clock, observe=self.facts.append
        )
        self.listeners = open_listeners(self.settings, {}, has_keys=False)
        self.server = Server(self.accept, self.listeners, self.settings, clock)
        self.port = self.listeners[1].sock.getsockname()[1]
        self._callers: list[Caller] = []

    async def _quick(self) -> Page:
        return Page(200, "text/plain", b"quick")

    async def _large(self) -> Page:
        return Page(200, "text/plain", b"x" * 32 * 1024**2)

    async def _slow(self) -> Page:
        await self.release.wait()
        return Page(200, "text/plain", b"slow")

    async def caller(self, *, is_unix: bool = False) -> Caller:
        if is_unix:
            streams = await asyncio.open_unix_connection(self.settings.socket)
        else:
            streams = await asyncio.open_connection("127.0.0.1", self.port)
        self._callers.append(Caller(*streams))
        return self._callers[-1]

    async def inside(self, count: int) -> None:
        """Wait until so many requests are inside."""
        await self._until(lambda: self.accept.requests_inside == count)

    async def connections(self, count: int) -> None:
        """Wait until so many connections are open."""
        await self._until(lambda: self.server.connections == count)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not is_so():
                await asyncio.sleep(0.001)

    async def aclose(self) -> None:
        for caller in self._callers:
            await caller.close()


@contextlib.asynccontextmanager
async def house(folder: Path, clock: Clock, **listen: Any) -> Any:
    it = House(folder, clock, **listen)
    await it.server.start()
    try:
        yield it
    finally:
        it.release.set()
        await it.aclose()
        drain = asyncio.create_task(it.server.drain(timeout_s=0, linger_s=0))
        if isinstance(clock, HandClock):
            await clock.advance(1)
        await drain


@pytest.mark.parametrize(("is_unix", "name"), [(True, "unix"), (False, "tcp")])
async def test_request_on_each_listener(is_unix: bool, name: str, folder: Path) -> None:
    """Both listeners are served, and each request knows where it came in."""
    async with house(folder, MonotonicClock()) as it:
        caller = await it.caller(is_unix=is_unix)
        first, second = await caller.ask("/quick"), await caller.ask("/quick")
        snapshot = it.server.snapshot()

    assert (first, second) == ("HTTP/1.1 200 OK",) * 2
    assert {fact.listener for fact in it.facts} == {name}
    assert snapshot == {
        "connections": 1,
        "listeners": [f"unix:{it.settings.socket}", f"tcp:127.0.0.1:{it.port}"],
    }


async def test_request_that_is_no_http(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is no HTTP is refused in our own shape and quoted nowhere: it may be anybody's text."""
    async with house(folder, MonotonicClock()) as it:
        caller = await it.caller()
        caller.write(b"my secret diary\r\n\r\n")
        head, body = await caller.answer()

    assert head.split()[1] == "400"
    assert "application/json" in head
    assert b"diary" not in body
    assert "diary" not in caplog.text


@pytest.mark.parametrize(("is_unix", "expected"), [(True, ("200", "")), (False, ("403", "host_not_allowed"))])
async def test_host_that_is_not_this_machine(is_unix: bool, expected: tuple[str, str], folder: Path) -> None:
    """Over TCP without client keys a page that has pointed its name to us is refused; the Unix socket asks nobody."""
    async with house(folder, MonotonicClock()) as it:
        caller = await it.caller(is_unix=is_unix)
        caller.send("/v1/models", host="evil.example")
        head, body = await caller.answer()

    assert (head.split()[1], orjson.loads(body).get("error", {}).get("code", "")) == expected


class Echo:
    """In place of the edge: answers with the body as it came."""

    is_draining = False
    requests_inside = 0

    async def __call__(self, request: web.BaseRequest, *, listener: str) -> web.Response:
        return web.Response(body=await request.read())

    def malformed(self, listener: str) -> web.Response:
        return web.Response(status=400)


async def test_body_that_is_compressed(folder: Path) -> None:
    """Nothing is unpacked on the way in: a small body may unpack to gigabytes, before anybody has refused it."""
    packed = gzip.compress(bytes(1_000_000))
    settings = unix_only(folder / "s")
    with opened(settings) as listeners:
        server = Server(Echo(), listeners, settings, MonotonicClock())  # type: ignore[arg-type]
        await server.start()
        caller = Caller(*await asyncio.open_unix_connection(settings.socket))
        caller.write(
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\n"
            + f"Content-Length: {len(packed)}\r\n\r\n".encode()
            + packed
        )
        _, body = await caller.answer()
        await caller.close()
        await server.drain(timeout_s=0, linger_s=0)

    assert body == packed


@pytest.mark.parametrize("is_unix", [True, False])
async def test_answer_counts_as_written_when_it_is_gone(is_unix: bool, folder: Path) -> None:
    """No answer is small enough to be left in our own buffer: who does not read it is noticed while it is written."""
    async with house(folder, MonotonicClock()) as it:
        await (await it.caller(is_unix=is_unix)).ask("/quick")
        transports = [each.transport for server in it.server._servers for each in server.connections]
        limits = [transport.get_write_buffer_limits() for transport in transports]

    assert limits == [(0, 0)]


async def test_caller_that_leaves_in_the_middle(folder: Path) -> None:
    """A caller that leaves takes its request with it, and the fact says so."""
    async with house(folder, MonotonicClock()) as it:
        caller = await it.caller()
        caller.send("/slow")
        await it.inside(1)
        await caller.close()
        await it.inside(0)
        await it.connections(0)

    assert [(fact.status, fact.code) for fact in it.facts] == [(499, "client_left")]


async def test_caller_that_does_not_take_its_answer(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A caller that leaves its answer lying is cut off after the settings' time, and nobody is alarmed."""
    clock = HandClock()
    async with house(folder, clock, write_timeout_s=3.0) as it:
        caller = await it.caller()
        caller.send("/large")
        await it.inside(1)
        await clock.advance(2.9)
        before = it.accept.requests_inside
        await clock.advance(0.2)
        await it.connections(0)

    assert before == 1
    assert [(fact.status, fact.code) for fact in it.facts] == [(499, "write_timeout")]
    assert caplog.records == []


async def test_connection_above_the_bound(folder: Path) -> None:
    """As many connections as the bound are served, over both listeners together; the next is closed at once."""
    async with house(folder, MonotonicClock(), max_connections=2) as it:
        tcp, unix = await it.caller(), await it.caller(is_unix=True)
        served = [await tcp.ask("/quick"), await unix.ask("/quick")]
        refused = [await (await it.caller(is_unix=is_unix)).end() for is_unix in (False, True)]
        still = await tcp.ask("/quick")
        await unix.close()
        await it.connections(1)
        after = await (await it.caller()).ask("/quick")

    assert served == ["HTTP/1.1 200 OK"] * 2
    assert refused == [b"", b""]
    assert still == after == "HTTP/1.1 200 OK"


async def test_connections_that_come_all_at_once(folder: Path) -> None:
    """The bound holds for connections that are accepted in one turn of the loop too."""
    answers = []
    async with house(folder, MonotonicClock(), max_connections=2) as it:
        with contextlib.ExitStack() as stack:
            # They wait in the queue: none of this lets the loop turn.
            socks = [stack.enter_context(socket.create_connection(("127.0.0.1", it.port))) for _ in range(6)]
            for sock in socks:
                sock.sendall(b"GET /quick HTTP/1.1\r\nHost: localhost\r\n\r\n")
                sock.setblocking(False)
            for sock in socks:
                async with asyncio.timeout(5):
                    try:
                        answers.append(await asyncio.get_running_loop().sock_recv(sock, 15))
                    except ConnectionResetError:
                        answers.append(b"")
        await it.connections(0)

    assert answers == [b"HTTP/1.1 200 OK"] * 2 + [b""] * 4


async def test_idle_connection(folder: Path) -> None:
    """An idle connection is closed after the time that the settings say."""
    async with house(folder, MonotonicClock(), keepalive_timeout_s=0.05) as it:
        caller = await it.caller()
        answer = await caller.ask("/quick")

        assert answer == "HTTP/1.1 200 OK"
        assert await caller.end() == b""


# --- the drain ---


async def test_request_inside_at_the_drain(folder: Path) -> None:
    """A request inside is finished, however long idle ones would have been kept, and told to close."""
    clock = HandClock()
    async with house(folder, clock) as it:
        caller = await it.caller()
        caller.send("/slow")
        await it.inside(1)
        drain = asyncio.create_task(it.server.drain(timeout_s=30, linger_s=1))
        await clock.advance(29)
        await asyncio.sleep(0.05)  # time for a cut that should not come
        was_done = drain.done()
        it.release.set()
        head, body = await caller.answer()
        await it.connections(0)
        await clock.advance(0.1)
        await drain

    assert not was_done
    assert body == b"slow"
    assert "connection: close" in head.lower()


async def test_request_that_arrives_during_the_drain(folder: Path) -> None:
    """A request on a connection that is kept alive is answered during the linger, and told to close."""
    clock = HandClock()
    async with house(folder, clock) as it:
        caller = await it.caller()
        caller.send("/quick")
        before, _ = await caller.answer()
        drain = asyncio.create_task(it.server.drain(timeout_s=30, linger_s=5))
        await clock.advance(4.9)
        caller.send("/quick")
        head, body = await caller.answer()
        rest = await caller.end()
        await it.connections(0)
        await clock.advance(0.1)
        await drain

    assert "connection: close" not in before.lower()
    assert head.startswith("HTTP/1.1 200 ")
    assert "connection: close" in head.lower()
    assert (body, rest) == (b"quick", b"")


async def test_idle_connections_at_the_drain(folder: Path) -> None:
    """Idle connections are kept for the linger, no longer and no shorter."""
    clock = HandClock()
    async with house(folder, clock) as it:
        used, fresh = await it.caller(), await it.caller(is_unix=True)
        await used.ask("/quick")
        await it.connections(2)
        drain = asyncio.create_task(it.server.drain(timeout_s=30, linger_s=5))
        await clock.advance(4.9)
        during = (it.server.connections, used.is_at_end(), fresh.is_at_end(), drain.done())
        await clock.advance(0.2)
        await drain
        ends = [await used.end(), await fresh.end()]

    assert during == (2, False, False, False)
    assert ends == [b"", b""]
    assert it.server.connections == 0


async def test_idle_connections_at_a_hasty_drain(folder: Path) -> None:
    """Without a linger idle connections are closed at once."""
    async with house(folder, HandClock()) as it:
        caller = await it.caller()
        await caller.ask("/quick")
        async with asyncio.timeout(5):
            await it.server.drain(timeout_s=30, linger_s=0)

        assert await caller.end() == b""


async def test_request_that_hangs_at_the_drain(folder: Path) -> None:
    """What has not finished at the time-out is cut off, and not a moment before."""
    clock = HandClock()
    async with house(folder, clock) as it:
        caller = await it.caller()
        caller.send("/slow")
        await it.inside(1)
        drain = asyncio.create_task(it.server.drain(timeout_s=2, linger_s=1))
        await clock.advance(1.9)
        await asyncio.sleep(0.05)  # time for a cut that should not come
        was_done = drain.done()
        await clock.advance(0.2)
        async with asyncio.timeout(5):
            await drain
        rest = await caller.end()

    assert not was_done
    assert rest == b""
    assert it.accept.requests_inside == 0


async def test_linger_longer_than_the_time_out(folder: Path) -> None:
    """The time-out bounds the linger too."""
    clock = HandClock()
    async with house(folder, clock) as it:
        caller = await it.caller()
        await caller.ask("/quick")
        drain = asyncio.create_task(it.server.drain(timeout_s=1, linger_s=10))
        await clock.advance(1.1)
        async with asyncio.timeout(5):
            await drain

        assert await caller.end() == b""


async def test_drain_of_an_empty_house(folder: Path) -> None:
    """Where nobody is connected nothing is waited for."""
    async with house(folder, HandClock()) as it:
        async with asyncio.timeout(5):
            await it.server.drain(timeout_s=30, linger_s=5)

        assert it.server.snapshot()["connections"] == 0


async def test_connection_after_the_drain_has_begun(folder: Path) -> None:
    """Once the drain has begun nobody can connect: the path is gone, the port refuses."""
    clock = HandClock()
    async with house(folder, clock) as it:
        caller = await it.caller()
        await caller.ask("/quick")
        drain = asyncio.create_task(it.server.drain(timeout_s=30, linger_s=5))
        await clock.advance(0.1)
        with pytest.raises(FileNotFoundError):
            connected(folder / "s")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", it.port))
        await clock.advance(5)
        await drain


async def test_connections_in_the_queue_at_the_drain(folder: Path) -> None:
    """Callers whose connection waits to be accepted when the drain begins are answered, not reset."""
    async with house(folder, MonotonicClock()) as it:
        with contextlib.ExitStack() as stack:
            waiting = [
                stack.enter_context(socket.create_connection(("127.0.0.1", it.port))),
                stack.enter_context(connected(folder / "s")),
            ]
            for sock in waiting:
                sock.sendall(b"GET /quick HTTP/1.1\r\nHost: localhost\r\n\r\n")
            async with asyncio.timeout(5):
                await it.server.drain(timeout_s=2, linger_s=1)
            answers = []
            for sock in waiting:
                sock.settimeout(1)
                try:
                    answers.append(sock.recv(15))
                except OSError as error:
                    answers.append(type(error).__name__.encode())

    assert answers == [b"HTTP/1.1 200 OK"] * 2


async def test_acceptors_share_nothing_with_a_successor(folder: Path) -> None:
    """A successor's socket at our path survives our drain."""
    async with house(folder, HandClock()) as it:
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(folder / "t"))
            successor.listen()
            os.rename(folder / "t", folder / "s")
            async with asyncio.timeout(5):
                await it.server.drain(timeout_s=30, linger_s=5)
            connected(folder / "s").close()

        assert os.listdir(folder) == ["s"]
