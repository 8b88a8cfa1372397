"""The adapter looks for the sidecar where the proxy listens, and says what to do when nobody is there."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.wiring.config import default_socket, load
from rag_adapter.address import Address, find, insist_on_ours, socket_path, unreachable
from rag_adapter.errors import SidecarUnavailable

VALUES = (None, "", "/run/user/7", "/tmp/with a space")
ENVIRONMENTS = [
    {name: value for name, value in pair.items() if value is not None}
    for pair in (
        dict(zip(("EMBEDDING_SIDECAR_SOCKET", "XDG_RUNTIME_DIR"), values, strict=True))
        for values in itertools.product(VALUES, repeat=2)
    )
]


@pytest.mark.parametrize("environ", ENVIRONMENTS, ids=str)
def test_proxy_and_adapter_in_one_environment(environ: dict[str, str]) -> None:
    """Without a word in the settings, the proxy listens where the adapter looks."""
    assert socket_path(environ) == load(None, environ).settings.listen.socket


@pytest.mark.parametrize("environ", ENVIRONMENTS, ids=str)
def test_proxy_s_rule_for_nobody_s_word(environ: dict[str, str]) -> None:
    """Where no variable names the socket, both fall back to the same folder."""
    unnamed = {name: value for name, value in environ.items() if name != "EMBEDDING_SIDECAR_SOCKET"}

    assert socket_path(unnamed) == default_socket(unnamed)


def test_socket_that_is_named() -> None:
    """The variable is stronger than the user's runtime folder."""
    environ = {"EMBEDDING_SIDECAR_SOCKET": "/run/s.sock", "XDG_RUNTIME_DIR": "/run/user/7"}

    assert socket_path(environ) == "/run/s.sock"


@pytest.mark.parametrize("named", [{}, {"EMBEDDING_SIDECAR_SOCKET": ""}])
def test_socket_in_the_runtime_folder(named: dict[str, str]) -> None:
    """Next comes the user's runtime folder; an empty variable is none."""
    environ = {**named, "XDG_RUNTIME_DIR": "/run/user/7"}

    assert socket_path(environ) == "/run/user/7/embedding-sidecar.sock"


@pytest.mark.parametrize("runtime", [{}, {"XDG_RUNTIME_DIR": ""}])
def test_socket_without_any_variable(runtime: dict[str, str]) -> None:
    """Last comes a folder in /tmp that bears the user's number, so two users do not meet."""
    assert socket_path(runtime) == f"/tmp/embedding-sidecar-{os.getuid()}/embedding-sidecar.sock"


def test_environment_of_this_process() -> None:
    """Without an argument the process's own environment counts."""
    assert socket_path() == socket_path(os.environ)


# --- what the app or $EMBEDDING_SIDECAR_URL says ---


@pytest.mark.parametrize("given", ["/run/s.sock", "unix:/run/s.sock", "unix:///run/s.sock"])
def test_address_of_a_unix_socket(given: str) -> None:
    """A path is enough; both spellings as a URL are understood."""
    address = find(given, {})

    assert address == Address(path="/run/s.sock")
    assert (address.origin, str(address)) == ("http://localhost", "/run/s.sock")


@pytest.mark.parametrize(
    ("given", "origin", "prefix", "word"),
    [
        ("http://127.0.0.1:8484", "http://127.0.0.1:8484", "/v1", "127.0.0.1:8484"),
        ("http://localhost:8484/", "http://localhost:8484", "/v1", "localhost:8484"),
        ("http://localhost:8484/v1", "http://localhost:8484", "/v1", "localhost:8484"),
        ("http://localhost", "http://localhost", "/v1", "localhost"),
        ("http://[::1]:8484", "http://[::1]:8484", "/v1", "[::1]:8484"),
        ("https://api.test/openai/v1/", "https://api.test", "/openai/v1", "api.test"),
        ("https://api.test:8443", "https://api.test:8443", "/v1", "api.test:8443"),
    ],
)
def test_address_over_tcp(given: str, origin: str, prefix: str, word: str) -> None:
    """With or without the path that OpenAI's clients want in their base URL."""
    address = find(given, {})

    assert (address.origin, address.prefix, str(address)) == (origin, prefix, word)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "s.sock",
        "unix:s.sock",
        "127.0.0.1:8484",
        "ftp://localhost",
        "http://",
        "http://localhost:99999",
        "http://user:secret@localhost",
        "http://localhost/v1?key=secret",
        "http://localhost#secret",
        "/" + "x" * 107,
    ],
)
def test_address_that_is_none(given: str) -> None:
    """Refused at once, with what would be right; a secret in it is not shown."""
    with pytest.raises(ValueError, match=r"(it may be|an address|the port|has to begin|bound is)") as caught:
        find(given, {"EMBEDDING_SIDECAR_SOCKET": "/run/s.sock"})

    assert "secret" not in str(caught.value)


def test_longest_path_of_a_socket() -> None:
    """The system's bound is 107 bytes, whatever the characters."""
    longest = "/" + "ä" * 53

    assert find(longest, {}).path == longest
    with pytest.raises(ValueError, match="108 bytes"):
        find(longest + "x", {})


def test_url_before_socket() -> None:
    """The cases: what the app says; the URL; the socket; and an empty variable is none."""
    environ = {"EMBEDDING_SIDECAR_URL": "http://127.0.0.1:1", "EMBEDDING_SIDECAR_SOCKET": "/run/s.sock"}

    assert find("/run/own.sock", environ).path == "/run/own.sock"
    assert find(None, environ).origin == "http://127.0.0.1:1"
    assert find(None, {**environ, "EMBEDDING_SIDECAR_URL": ""}).path == "/run/s.sock"


# --- when nobody is there ---


@pytest.mark.parametrize(
    ("given", "error", "code", "word", "retryable"),
    [
        ("/run/s.sock", OSError(errno.ENOENT, ""), "socket_missing", "embedding-sidecar run", True),
        ("/run/s.sock", OSError(errno.EACCES, ""), "socket_denied", "group", False),
        ("/run/s.sock", OSError(errno.ECONNREFUSED, ""), "refused", "embedding-sidecar run", True),
        ("/run/s.sock", OSError(errno.EAGAIN, ""), "busy", "listen.backlog", True),
        ("http://127.0.0.1:1", OSError(errno.ECONNREFUSED, ""), "refused", "EMBEDDING_SIDECAR_URL", True),
        ("http://127.0.0.1:1", OSError(errno.EHOSTUNREACH, ""), "unreachable", "No route to host", True),
        ("http://nowhere.test", socket.gaierror(-2, "x"), "unknown_host", "nowhere.test", False),
        ("https://api.test", ssl.SSLCertVerificationError(1, "x"), "tls_failed", "certificate", False),
        ("http://127.0.0.1:1", OSError("no number"), "unreachable", "OSError", True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_why_there_is_no_connection(given: str, error: OSError, code: str, word: str, retryable: bool) -> None:
    """The message names the place and says what to do."""
    address = find(given, {})

    found = unreachable(address, error)

    assert (found.code, found.retryable) == (code, retryable)
    assert str(address) in str(found)
    assert word in str(found)
    assert found.__cause__ is error


# --- the folder below /tmp ---

SOMEBODY = 2_000_000_011
"""A user that no machine has; so the folder that bears this number is nobody's but the test's."""


@pytest.fixture
def somebodys() -> Iterator[Path]:
    """The folder of that user, made by this one."""
    folder = Path(f"/tmp/embedding-sidecar-{SOMEBODY}")
    folder.mkdir(mode=0o700)
    yield folder
    folder.rmdir()


def test_folder_that_another_user_was_first_with(somebodys: Path) -> None:
    """Anybody may make it, so who listens there is not known: nothing is sent."""
    with pytest.raises(SidecarUnavailable) as caught:
        insist_on_ours(Address(path=f"{somebodys}/embedding-sidecar.sock"), SOMEBODY)

    assert (caught.value.code, caught.value.retryable) == ("socket_not_ours", False)
    assert str(somebodys) in str(caught.value)


def test_folder_that_is_named(somebodys: Path) -> None:
    """Where the app or a variable names a socket, its folder is theirs to judge."""
    insist_on_ours(Address(path=f"{somebodys}/embedding-sidecar.sock"), SOMEBODY + 1)
    insist_on_ours(Address(host="localhost"))


def test_folder_that_is_not_there() -> None:
    """Then there is nobody to mistake for a sidecar."""
    insist_on_ours(Address(path=f"/tmp/embedding-sidecar-{SOMEBODY}/embedding-sidecar.sock"), SOMEBODY)
