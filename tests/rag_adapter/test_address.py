"""The adapter looks for the sidecar where the proxy listens."""

from __future__ import annotations

import itertools
import os

import pytest

from proxy.wiring.config import default_socket, load
from rag_adapter import socket_path

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
