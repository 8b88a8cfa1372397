"""Who asks: what has been found out about a connection is remembered, and never stands for something else."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from multidict import CIMultiDict

from proxy.base.errors import Forbidden, Unauthorized
from proxy.base.settings import CallerSettings, ListenSettings
from proxy.edge.accept.peer import Peer

LISTEN = ListenSettings()
NOBODY: Mapping[str, CallerSettings] = {}


class Transport:
    """As much of a transport as is asked."""

    def __init__(self, sock: socket.socket | None) -> None:
        self.sock = sock
        self.asked = 0

    def get_extra_info(self, name: str) -> Any:
        assert name == "socket"
        self.asked += 1
        return self.sock


@pytest.fixture
def near() -> Iterator[socket.socket]:
    """One end of a connection on which this process speaks to itself."""
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        yield one


def tcp() -> Peer:
    return Peer("tcp", None)


def unix(sock: socket.socket | None) -> Peer:
    return Peer("unix", Transport(sock))  # type: ignore[arg-type]


def callers(**keys: str) -> dict[str, CallerSettings]:
    """Name callers, each with its key."""
    return {name: CallerSettings(key_sha256=hashlib.sha256(key.encode()).hexdigest()) for name, key in keys.items()}


def shows(key: str, header: str = "Authorization") -> Mapping[str, str]:
    return CIMultiDict({"Host": "evil.example", header: f"Bearer {key}" if header == "Authorization" else key})


# --- hosts ---


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:80", "localhost.", "127.0.0.1", "127.1.2.3:8484", "[::1]", "[::1]:8484", "localhost:", ""],
)
def test_host_that_is_this_machine(host: str) -> None:
    """Names and addresses of this machine are anybody on it."""
    assert tcp().admit({"Host": host}, LISTEN, NOBODY) == "loopback"


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "::1", "10.0.0.1", "[::2]:80"]
)
@pytest.mark.parametrize("is_open", [True, False])
def test_host_that_is_another_one(host: str, *, is_open: bool) -> None:
    """Whatever is asked for, another machine's name is refused."""
    with pytest.raises(Forbidden) as caught:
        tcp().admit({"Host": host}, LISTEN, NOBODY, is_open=is_open)

    assert caught.value.code == "host_not_allowed"


def test_another_host_on_the_same_connection() -> None:
    """A good host opens the door for itself, not for what comes behind it."""
    peer = tcp()
    first = peer.admit({"Host": "localhost"}, LISTEN, NOBODY)
    with pytest.raises(Forbidden):
        peer.admit({"Host": "evil.example"}, LISTEN, NOBODY)
    again = peer.admit({"Host": "localhost"}, LISTEN, NOBODY)

    assert first == again == "loopback"


# --- keys ---


def test_keys_on_one_connection() -> None:
    """Each request counts by the key that it shows; a gateway's connection carries many callers."""
    both = callers(app="one", other="two")
    peer = tcp()
    found = [peer.admit(shows(key), LISTEN, both) for key in ("one", "one", "two", "one")]
    with pytest.raises(Unauthorized):
        peer.admit(shows("three"), LISTEN, both)
    with pytest.raises(Unauthorized):
        peer.admit({}, LISTEN, both)
    found.append(peer.admit(shows("two", "api-key"), LISTEN, both))

    assert found == ["app", "app", "other", "app", "other"]


def test_keys_that_a_reload_has_changed() -> None:
    """A key that was good counts for nothing when the settings say another one."""
    peer = tcp()
    before = peer.admit(shows("one"), LISTEN, callers(app="one"))
    renamed = peer.admit(shows("one"), LISTEN, callers(new="one"))
    with pytest.raises(Unauthorized):
        peer.admit(shows("one"), LISTEN, callers(app="two"))

    assert (before, renamed) == ("app", "new")


def test_key_beside_a_host() -> None:
    """A key says more than a host; without keys the host is asked for again."""
    peer = tcp()
    with_key = peer.admit(shows("one"), LISTEN, callers(app="one"))
    with pytest.raises(Forbidden):
        peer.admit(shows("one"), LISTEN, NOBODY)

    assert with_key == "app"


def test_no_key_is_kept(near: socket.socket) -> None:
    """A connection remembers digests, not keys."""
    peer = unix(near)
    peer.admit(shows("one"), LISTEN, callers(app="one"))

    assert not any(getattr(peer, name) in ("one", b"one") for name in peer.__slots__)


@pytest.mark.parametrize("key", ["sk-made-up", ""])
def test_key_that_nobody_knows_on_the_unix_socket(key: str, near: socket.socket) -> None:
    """The file's mode guards that door: what SDKs make up is no matter."""
    assert unix(near).admit(shows(key), LISTEN, callers(app="one")) == f"uid:{os.getuid()}"


# --- users ---


def test_user_is_asked_for_once(near: socket.socket) -> None:
    """A peer's uid stays what it was when it connected."""
    transport = Transport(near)
    peer = Peer("unix", transport)  # type: ignore[arg-type]
    found = {peer.admit({"Host": "evil.example"}, LISTEN, NOBODY) for _ in range(3)}

    assert found == {f"uid:{os.getuid()}"}
    assert transport.asked == 1


def test_users_that_are_allowed(near: socket.socket) -> None:
    """Where users are named, others are refused, whatever key they show; but not where everybody may look."""
    peer = unix(near)
    mine, others = ListenSettings(allowed_uids=(os.getuid(),)), ListenSettings(allowed_uids=(54_321,))
    found = peer.admit({}, mine, NOBODY), peer.admit({}, others, NOBODY, is_open=True)
    with pytest.raises(Forbidden) as caught:
        peer.admit(shows("one"), others, callers(app="one"))

    assert found == (f"uid:{os.getuid()}", "")
    assert caught.value.code == "peer_not_allowed"


def test_connection_without_a_socket() -> None:
    """Who has no socket to be asked has no uid, and is none of those allowed."""
    peer = unix(None)
    with pytest.raises(Forbidden):
        peer.admit({}, ListenSettings(allowed_uids=(0,)), NOBODY)

    assert peer.admit({}, LISTEN, NOBODY) == "uid:None"
