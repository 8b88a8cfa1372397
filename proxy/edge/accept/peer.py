"""
Who asks: strangers are refused, the others get a name.

What is found out is remembered with the connection, since its further requests show the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import socket
import struct
from collections.abc import Mapping

from proxy.base.errors import Forbidden, Unauthorized
from proxy.base.settings import CallerSettings, ListenSettings, shown

_BEARER = re.compile(r"^bearer +", re.IGNORECASE)  # RFC 9110 §11.1: schemes know no case
_LOOPBACK = re.compile(r"localhost\.?|127(\.\d{1,3}){3}|\[::1\]")

_PEERCRED = struct.Struct("3i")


class Peer:
    """The other end of one connection."""

    __slots__ = ("_callers", "_digest", "_host", "_name", "_owner", "_uid", "listener")

    def __init__(self, listener: str, transport: asyncio.BaseTransport | None) -> None:
        """
        Args:
            listener: `unix` or `tcp`, where it came in.
            transport: asked for the peer's uid, which stays what it was when the connection was made: unix(7).
        """
        self.listener = listener
        self._uid = _uid(transport) if listener == "unix" else None
        self._name = f"uid:{self._uid}" if listener == "unix" else "loopback"
        self._host = ""
        self._digest = ""
        self._owner = ""
        self._callers: Mapping[str, CallerSettings] | None = None

    def admit(
        self,
        headers: Mapping[str, str],
        listen: ListenSettings,
        callers: Mapping[str, CallerSettings],
        *,
        is_open: bool = False,
    ) -> str:
        """
        Name the caller, or refuse it.

        The cases: (1) TCP without keys: this machine has to be meant; then it is loopback, anybody on it; (2) what is
        open to all asks nothing more; (3) the Unix socket: the peer's uid, which has to be an allowed one where such
        are set; (4) keys are configured and one of them was shown: its owner, on every listener; (5) TCP with keys
        configured, and none or a wrong one shown: refused. On the Unix socket the file's mode guards the door, so a
        key that nobody knows is what SDKs make up, and no matter.

        Raises:
            Forbidden, Unauthorized: says what would be right.
        """
        is_tcp = self.listener == "tcp"
        if is_tcp and not callers and (host := headers.get("Host", "")) != self._host:
            _refuse_strange_host(host)
            self._host = host
        if is_open:
            return ""
        if not is_tcp and listen.allowed_uids and self._uid not in listen.allowed_uids:
            raise Forbidden(f"uid {self._uid} is not among listen.allowed_uids")
        return self._key_owner(headers, callers) if callers else self._name

    def _key_owner(self, headers: Mapping[str, str], callers: Mapping[str, CallerSettings]) -> str:
        key = _BEARER.sub("", headers.get("Authorization", "")) or headers.get("api-key", "")
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
        # The usual case is the key of before. Compared in constant time like the others: a gateway's connection
        # carries many callers.
        if callers is not self._callers or not hmac.compare_digest(digest, self._digest):
            self._digest, self._callers, self._owner = digest, callers, _digest_owner(digest, callers)
        if self._owner:
            return self._owner
        if self.listener == "tcp":
            problem = "this client key is none of the configured ones" if key else "this listener needs a client key"
            raise Unauthorized(f"{problem}: send 'Authorization: Bearer <key>'")
        return self._name


def _uid(transport: asyncio.BaseTransport | None) -> int | None:
    peer = transport.get_extra_info("socket") if transport else None
    if peer is None:
        return None
    _, uid, _ = _PEERCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    return int(uid)


def _refuse_strange_host(host: str) -> None:
    """
    Insist that a caller without a key means this machine.

    A web page can make its own name point to 127.0.0.1 and then post to us as to itself (DNS rebinding); the name is
    still in `Host`. An HTTP/1.0 caller without the header is no browser.
    """
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    if name and not _LOOPBACK.fullmatch(name.lower()):
        raise Forbidden(
            f"host {shown(host)} is not this machine; without client keys only localhost and loopback addresses are",
            code="host_not_allowed",
        )


def _digest_owner(digest: str, callers: Mapping[str, CallerSettings]) -> str:
    owner = ""
    for name, caller in callers.items():  # all of them, so that the time taken tells nothing
        if hmac.compare_digest(digest, caller.key_sha256.lower()):
            owner = name
    return owner
