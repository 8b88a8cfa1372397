"""
Where the sidecar listens, found by the same rule as the proxy's own, and what to do when it cannot be reached there.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from rag_adapter.errors import SidecarUnavailable

_MAX_SOCKET_PATH_BYTES = 107
"""`sun_path` of Linux has 108 bytes, the last one for the NUL. Source: unix(7)."""
_START = "start it with `embedding-sidecar run`"
_FORMS = "'/path.sock', 'unix:/path.sock' or 'http://127.0.0.1:8484'"


def socket_path(environ: Mapping[str, str] | None = None) -> str:
    """
    Return the path of the sidecar's Unix socket.

    The cases: (1) `$EMBEDDING_SIDECAR_SOCKET`; (2) `$XDG_RUNTIME_DIR/embedding-sidecar.sock`; (3)
    `/tmp/embedding-sidecar-<uid>/embedding-sidecar.sock`.

    Args:
        environ: the environment; None means this process's.
    """
    environ = os.environ if environ is None else environ
    if path := environ.get("EMBEDDING_SIDECAR_SOCKET"):
        return path
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return f"{runtime}/embedding-sidecar.sock"
    return f"{_last_folder(os.getuid())}/embedding-sidecar.sock"


def _last_folder(uid: int) -> str:
    return f"/tmp/embedding-sidecar-{uid}"  # noqa: S108 - the proxy insists on owning it, and so do we


def insist_on_ours(address: Address, uid: int | None = None) -> None:
    """
    Insist that the folder below /tmp, where nobody has named a socket, is not somebody else's.

    Anybody can make a folder of that name there before the proxy does, listen in it, and read what we send.

    Args:
        uid: whose folder it has to be; None: this process's user.

    Raises:
        SidecarUnavailable: it is somebody else's, or others may write to it.
    """
    uid = os.getuid() if uid is None else uid
    folder = os.path.dirname(address.path)
    if folder != _last_folder(uid):
        return
    try:
        found = os.lstat(folder)
    except OSError:
        return  # there is no such folder: connecting tells
    if found.st_uid != uid or not stat.S_ISDIR(found.st_mode) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _unavailable(
            "socket_not_ours",
            f"{folder} does not belong to user {uid} alone, so who listens there may be anybody: remove it, or set "
            "EMBEDDING_SIDECAR_SOCKET or XDG_RUNTIME_DIR",
            None,
            retryable=False,
        )


@dataclass(frozen=True, slots=True)
class Address:
    """One place where a sidecar may listen: a Unix socket, or a host and a port."""

    path: str = ""
    """Of the Unix socket; empty for TCP."""
    host: str = "localhost"
    port: int = 80
    is_tls: bool = False
    prefix: str = "/v1"
    """What stands before `/embeddings`."""

    @property
    def origin(self) -> str:
        """Scheme, host and port: what all URLs of this address begin with."""
        return f"{'https' if self.is_tls else 'http'}://{self.authority}"

    @property
    def authority(self) -> str:
        """The value of the `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return self.path or self.authority


def find(address: str | None = None, environ: Mapping[str, str] | None = None) -> Address:
    """
    Return where to connect.

    The cases: (1) what the app says; (2) `$EMBEDDING_SIDECAR_URL`, in the same forms; (3) `socket_path()`.

    Raises:
        ValueError: it is no address; says what would be one.
    """
    environ = os.environ if environ is None else environ
    if address is None:
        address = environ.get("EMBEDDING_SIDECAR_URL") or socket_path(environ)
    if address.startswith("/"):
        return _unix(address)
    if address.startswith("unix:"):
        return _unix(address.removeprefix("unix:").removeprefix("//"))
    return _tcp(address)


def _unix(path: str) -> Address:
    if not path.startswith("/"):
        raise ValueError(f"the path of a Unix socket has to begin with /; an address is {_FORMS}")
    size = len(os.fsencode(path))
    if size > _MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"the socket's path has {size} bytes, the system's bound is {_MAX_SOCKET_PATH_BYTES}: {path}")
    return Address(path=path)


def _tcp(url: str) -> Address:
    parts = urlsplit(url)
    # Not shown: what is no address may be a key that went astray.
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"this is no address of a sidecar; it may be {_FORMS}")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError("an address has no user, no password, no ? and no #; a key goes into api_key")
    is_tls = parts.scheme == "https"
    try:
        port = parts.port or (443 if is_tls else 80)
    except ValueError as error:
        raise ValueError(f"the port of {parts.hostname} has to be a number from 1 to 65535") from error
    return Address(host=parts.hostname, port=port, is_tls=is_tls, prefix=parts.path.rstrip("/") or "/v1")


def unreachable(address: Address, error: OSError) -> SidecarUnavailable:
    """
    Say why no connection came about, and what to do.

    The cases: (1) TLS, whose errors have numbers of their own; (2) no such socket; (3) no rights; (4) nobody listens;
    (5) too many are waiting to be accepted; (6) no such host; (7) anything else, by the system's word.
    """
    number = error.errno
    if type(error).__module__ == "ssl":  # not imported for that
        return _unavailable(
            "tls_failed", f"no TLS with {address}: its certificate is not trusted", error, retryable=False
        )
    if number == errno.ENOENT and address.path:
        elsewhere = "or set EMBEDDING_SIDECAR_SOCKET to where it listens"
        return _unavailable("socket_missing", f"no sidecar at {address}: {_START}, {elsewhere}", error)
    if number in (errno.EACCES, errno.EPERM):
        way = f"add user {os.geteuid()} to the group of the socket, or run the sidecar as this user"
        return _unavailable("socket_denied", f"no right to connect to {address}: {way}", error, retryable=False)
    if number == errno.ECONNREFUSED:
        elsewhere = "or set EMBEDDING_SIDECAR_URL or EMBEDDING_SIDECAR_SOCKET to where it listens"
        return _unavailable("refused", f"nobody listens at {address}: {_START}, {elsewhere}", error)
    if number == errno.EAGAIN:
        return _unavailable("busy", f"too many connections wait at {address} (setting listen.backlog)", error)
    if isinstance(error, socket.gaierror):
        return _unavailable("unknown_host", f"the host of {address} is not known", error, retryable=False)
    reason = os.strerror(number) if number is not None and number > 0 else type(error).__name__
    return _unavailable("unreachable", f"no connection to {address}: {reason}", error)


def cut_off(address: Address, error: BaseException | None = None) -> SidecarUnavailable:
    """Say that the sidecar hung up before its answer was whole."""
    way = "it has ended or was restarted, its log says why"
    return _unavailable("cut_off", f"the sidecar at {address} hung up before it had answered: {way}", error)


def silent(address: Address, waited_s: float) -> SidecarUnavailable:
    """Say that somebody listens, but does not answer."""
    return _unavailable("silent", f"{address} takes connections, but has not answered within {waited_s:g} s", None)


def _unavailable(code: str, message: str, cause: BaseException | None, *, retryable: bool = True) -> SidecarUnavailable:
    found = SidecarUnavailable(message, code=code, retryable=retryable)
    found.__cause__ = cause
    return found
