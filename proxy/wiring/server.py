"""
Listening sockets and connections.

Opens the Unix socket and the TCP port, or takes them over from whoever holds them (`LISTEN_FDS`), serves both with
aiohttp's low-level server, and drains in the order that loses nothing.

Source: sd_listen_fds(3); unix(7); for the order of the drain the measurements in docs/operations.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import os
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from proxy.base.clock import Clock
from proxy.base.settings import ListenSettings
from proxy.edge.accept import Accept
from proxy.wiring.config import OFF, default_socket, host_port, is_loopback
from proxy.wiring.connection import Connection

LISTEN_FDS_START = 3
"""File descriptors before it are standard input, output and error: sd_listen_fds(3)."""

_LINGERING_S = 2.0
"""What is still coming of a refused body is read this long, so that the caller sees the answer, not a reset."""

_POLL_S = 0.02

_PAUSE_S = 1.0
"""How long nothing is accepted when file descriptors have run out; asyncio's own pause."""

_CUT_OFF_S = 0.01
"""What is left after the drain ends now. Not zero: aiohttp takes that for no bound at all."""


class ListenError(Exception):
    """A listener cannot be opened; says why and what to do."""


@dataclass(slots=True)
class Listener:
    """One listening socket."""

    name: str
    """`unix` or `tcp`."""
    address: str
    """Path, or host:port as bound."""
    sock: socket.socket
    owned_inode: int = 0
    """Inode of the path that we have made and shall remove; zero where the socket was handed to us."""


# --- opening ---


def open_listeners(settings: ListenSettings, environ: Mapping[str, str], *, has_keys: bool) -> list[Listener]:
    """
    Open what the settings say, or take over what was handed to this process.

    Args:
        settings: addresses.
        environ: for `LISTEN_FDS` and `LISTEN_PID`, and the rule of the socket's default path.
        has_keys: whether client keys are configured.

    Raises:
        ListenError: names the address and the remedy; nothing stays open.
    """
    listeners = _inherited(environ)
    if listeners:
        try:
            refuse_strangers(listeners, has_keys=has_keys)
        except ListenError:
            close_listeners(listeners)
            raise
        return listeners
    try:
        if settings.socket != OFF:
            if settings.socket == default_socket(environ):
                _own_folder(os.path.dirname(settings.socket), environ)
            listeners.append(_unix(settings.socket, int(settings.socket_mode, 8), settings.backlog))
        if settings.tcp != OFF:
            listeners.append(_tcp(settings.tcp, settings.backlog))
    except ListenError:
        close_listeners(listeners)
        raise
    return listeners


def refuse_strangers(listeners: list[Listener], *, has_keys: bool) -> None:
    """
    Insist on client keys where an open socket is reachable from outside: one handed over, or one of before a reload.

    Raises:
        ListenError: names the socket.
    """
    for listener in listeners:
        if listener.name == "tcp" and not has_keys and not is_loopback(listener.sock.getsockname()[0]):
            raise ListenError(
                f"the open socket {listener.address} is reachable from outside, and no client keys are configured; "
                "add [callers.<name>] with key_sha256"
            )


def _inherited(environ: Mapping[str, str]) -> list[Listener]:
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = environ.get("LISTEN_FDS", "0")
    listeners: list[Listener] = []
    for fd in range(LISTEN_FDS_START, LISTEN_FDS_START + (int(count) if count.isdecimal() else 1)):
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
        except OSError as error:
            close_listeners(listeners)
            raise ListenError(
                f"$LISTEN_FDS = {count!r}: file descriptor {fd} is no socket ({error.strerror}); "
                "whoever starts this process has to hand over as many as it says"
            ) from error
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:
            listeners.append(Listener("unix", str(sock.getsockname()), sock))
        else:
            listeners.append(Listener("tcp", _spelled(sock), sock))
    return listeners


def _own_folder(folder: str, environ: Mapping[str, str]) -> None:
    """Make the default folder below /tmp, for this user only, and insist that it is ours: /tmp is everybody's."""
    if environ.get("XDG_RUNTIME_DIR"):
        return
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise ListenError(
                f"{folder} is not a folder of this user that nobody else can write to; "
                "remove it or set listen.socket to another place"
            ) from None
    except OSError as error:
        raise ListenError(f"cannot make the folder {folder}: {error.strerror}; set listen.socket") from error


def _unix(path: str, mode: int, backlog: int) -> Listener:
    """
    Bind to a name beside the path, then rename: there is no moment at which the path leads nowhere, and no moment at
    which others may open it.
    """
    folder = os.path.dirname(path) or "."
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    beside = f"{path}.{os.urandom(3).hex()}"
    try:
        with _locked(folder):
            _refuse_taken(path)
            sock.bind(beside)
            os.chmod(beside, mode)
            sock.listen(backlog)
            inode = os.lstat(beside).st_ino
            os.rename(beside, path)
    except ListenError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise ListenError(
            f"cannot make the socket {path}: {error.strerror}; the folder {folder} has to exist and be writable for "
            f"uid {os.getuid()}, or set listen.socket to another place"
        ) from error
    return Listener("unix", path, sock, owned_inode=inode)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Hold a lock on a folder: of two processes that start on one path, the second one has to see the first."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _refuse_taken(path: str) -> None:
    """A socket that somebody answers on is in use; one where nobody does was left behind by a crash."""
    try:
        found = os.lstat(path)
    except OSError:
        return  # nothing there, or binding will tell why not
    if not stat.S_ISSOCK(found.st_mode):
        raise ListenError(f"{path} exists and is no socket; remove it or set listen.socket to another place")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return
        except BlockingIOError:
            pass  # somebody listens, and is too busy to accept
        except OSError as error:
            raise ListenError(
                f"cannot tell whether {path} is in use: {error.strerror or error}; it may belong to another user: "
                "remove it, or set listen.socket to another place"
            ) from error
    raise ListenError(
        f"{path} is in use: a process answers there; stop it, or set listen.socket (or $EMBEDDING_SIDECAR_SOCKET) "
        "to another place"
    )


def _tcp(address: str, backlog: int) -> Listener:
    host, port = host_port(address)
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is no host name"
        raise ListenError(f"cannot listen on {address}: {reason}; set listen.tcp") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise ListenError(
            f"cannot listen on {address}: {error.strerror}; stop who uses it, or set listen.tcp "
            "(or $EMBEDDING_SIDECAR__LISTEN__TCP) to another port, to port 0 for any free one, or to 'off'"
        ) from error
    return Listener("tcp", _spelled(sock), sock)


def _spelled(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def close_listeners(listeners: list[Listener]) -> None:
    """Close the sockets and remove the paths that are still ours; a successor's stay."""
    for listener in listeners:
        listener.sock.close()
        if listener.owned_inode:
            try:
                if os.lstat(listener.address).st_ino == listener.owned_inode:
                    os.unlink(listener.address)
            except OSError:
                pass  # somebody has removed it already
            listener.owned_inode = 0  # the file system may give the number to the next file


# --- serving ---


class Server:
    """Serves the listeners until it is drained."""

    def __init__(self, accept: Accept, listeners: list[Listener], settings: ListenSettings, clock: Clock) -> None:
        self._accept = accept
        self._listeners = listeners
        self._settings = settings
        self._clock = clock
        self._servers: list[_Server] = []
        self._acceptors: list[_Acceptor] = []
        self.connections = 0
        """How many are open; one that has just come in is in no list of aiohttp's yet, but counts here."""

    async def start(self) -> None:
        """Begin to accept."""
        for listener in self._listeners:
            server = _Server(
                self._accept,
                listener.name,
                closed=self._closed,
                keepalive_timeout=self._settings.keepalive_timeout_s,
                lingering_time=_LINGERING_S,
                auto_decompress=False,  # 4 MB may unpack to 4 GB; decode.py refuses what is compressed
                access_log=None,
            )
            self._servers.append(server)
            acceptor = _Acceptor(listener.sock, functools.partial(self._protocol, server))
            acceptor.start()
            self._acceptors.append(acceptor)

    def _protocol(self, server: _Server) -> asyncio.Protocol | None:
        """Make the protocol of a new connection; None when there are enough of them."""
        if self.connections >= self._settings.max_connections:
            return None
        self.connections += 1
        return server()

    def _closed(self) -> None:
        self.connections -= 1

    async def drain(self, *, timeout_s: float, linger_s: float) -> None:
        """
        Finish, in the order that loses nothing.

        (1) Accept no more; the queue of a listening socket that somebody else holds too is theirs now. (2) Answer
        everything that still arrives on open connections, each answer telling its caller to close. (3) Wait until no
        connection is left, for idle ones at least as long as callers may take to use them again. (4) Only then close
        what is left. aiohttp's own order closes idle connections first, and with them requests on their way.

        Args:
            timeout_s: what is inside gets this long.
            linger_s: idle connections get this long.
        """
        self._accept.is_draining = True
        while self._acceptors:
            await self._acceptors.pop().stop()
        close_listeners(self._listeners)
        start = self._clock.now()
        while self.connections:
            waited_s = self._clock.now() - start
            if waited_s >= timeout_s or (not self._accept.requests_inside and waited_s >= linger_s):
                break
            await self._clock.sleep(_POLL_S)
        for server in self._servers:
            server.pre_shutdown()
            await server.shutdown(timeout=_CUT_OFF_S)

    def snapshot(self) -> Mapping[str, Any]:
        return {"connections": self.connections, "listeners": [f"{x.name}:{x.address}" for x in self._listeners]}


class _Server(web.Server):
    """aiohttp's low-level server, whose connections spell errors as we do."""

    def __init__(self, accept: Accept, listener: str, *, closed: Callable[[], None], **options: Any) -> None:
        super().__init__(functools.partial(accept, listener=listener), handler_cancellation=True, **options)
        self._accept = accept
        self._listener = listener
        self._closed = closed

    def __call__(self) -> web.RequestHandler:
        loop = asyncio.get_running_loop()
        return Connection(self, self._accept, self._listener, closed=self._closed, loop=loop, **self._kwargs)


class _Acceptor:
    """
    Accepts the connections of one listening socket.

    asyncio's own servers lose some when they are closed: those that wait in the queue are reset, and one that is being
    accepted at that moment is left open and never served. Here it is all one synchronous stretch.
    """

    def __init__(self, sock: socket.socket, protocol: Callable[[], asyncio.Protocol | None]) -> None:
        self._sock = sock
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[Any]] = set()
        self._pause: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Accept what comes."""
        self._pause = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    async def stop(self) -> None:
        """Take what waits in the queue, then no more; each connection taken has its protocol when this returns."""
        self._loop.remove_reader(self._sock.fileno())
        self._accept()
        if self._pause is not None:
            self._pause.cancel()
        if self._connecting:
            await asyncio.wait(self._connecting)

    def _accept(self) -> None:
        while True:
            try:
                waiting, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                # No file descriptor or memory is left. The socket stays readable: looking again at once would spin.
                self._loop.remove_reader(self._sock.fileno())
                self._pause = self._loop.call_later(_PAUSE_S, self.start)
                return
            waiting.setblocking(False)
            protocol = self._protocol()
            if protocol is None:
                waiting.close()
                continue
            task = self._loop.create_task(self._connected(protocol, waiting))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connected(self, protocol: asyncio.Protocol, waiting: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, waiting)
        except OSError as error:  # it was gone already
            waiting.close()
            protocol.connection_lost(error)
