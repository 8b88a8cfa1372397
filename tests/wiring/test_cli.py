"""The command: what it prints, where, and with which exit code it ends."""

from __future__ import annotations

import _thread
import http.client
import json
import os
import shlex
import signal
import socket
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from proxy.wiring import config
from proxy.wiring.cli import hello, main
from proxy.wiring.server import Listener

GOOD = """
[upstreams.u]
kind = "openai"
base_url = "http://127.0.0.1:1/v1"
headers.X-Token = "s3cr3t-mark"
[models.m]
upstreams = ["u"]
"""
BAD = "[listen]\nbacklog = 0\ntpc = 'off'\n"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command reads the environment of its process; whoever runs the tests may have set things."""
    for name in list(os.environ):
        if name.startswith(("EMBEDDING_SIDECAR", "OPENAI_")):
            monkeypatch.delenv(name)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: a socket's path is bounded."""
    with tempfile.TemporaryDirectory(prefix="es-") as name:
        yield Path(name)


def written(folder: Path, toml: str) -> str:
    path = folder / "settings.toml"
    path.write_text(toml, encoding="utf-8")
    return str(path)


# --- check ---


def test_check_of_a_good_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Good settings end with 0 and a line that counts what was found."""
    code = main(["check", written(folder, GOOD)])
    told = capsys.readouterr()

    assert code == 0
    assert told.out == "all good: 1 model(s) on 1 upstream(s)\n"
    assert told.err == ""


def test_check_without_a_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a file the settings in force are checked: the environment alone."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")

    assert main(["check"]) == 0
    assert capsys.readouterr().out == "all good: 4 model(s) on 2 upstream(s)\n"


def test_check_of_a_bad_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad settings end with 2 and all problems on standard error, one a line."""
    path = written(folder, BAD)
    code = main(["check", path])
    told = capsys.readouterr()

    assert code == 2
    assert told.out == ""
    assert told.err.splitlines() == [
        f"{path}: 2 problems",
        "  - listen.backlog = 0: has to be from 1 to 65535 connections",
        "  - listen.tpc: no such setting; did you mean 'tcp'?",
    ]


def test_check_of_a_file_named_by_variable(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`$EMBEDDING_SIDECAR_CONFIG` is checked where no file is given."""
    monkeypatch.setenv("EMBEDDING_SIDECAR_CONFIG", written(folder, BAD))

    assert main(["check"]) == 2
    assert "listen.tpc" in capsys.readouterr().err


# --- show ---


def test_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The settings in force are printed as a settings file: the file's, and every default."""
    code = main(["show", written(folder, GOOD)])
    printed = capsys.readouterr().out

    table = tomllib.loads(printed)
    assert code == 0
    assert table["upstreams"]["u"]["base_url"] == "http://127.0.0.1:1/v1"
    assert table["listen"]["tcp"] == "127.0.0.1:8484"
    assert table["listen"]["socket"].endswith("/embedding-sidecar.sock")
    assert table["upstreams"]["u"]["headers"] == {"X-Token": "(hidden)"}
    assert "s3cr3t-mark" not in printed
    assert main(["check", written(folder, printed)]) == 0


def test_show_without_a_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a file the settings of the environment are shown, without its key."""
    monkeypatch.setenv("OPENAI_API_KEY", "s3cr3t-mark")

    assert main(["show"]) == 0
    printed = capsys.readouterr().out
    assert list(tomllib.loads(printed)["models"])[:2] == ["wordllama", "text-embedding-3-small"]
    assert "s3cr3t-mark" not in printed


def test_show_of_a_bad_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings with mistakes are not shown; the mistakes are."""
    assert main(["show", written(folder, BAD)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "2 problems" in told.err


def test_show_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    """`--reference` prints every setting as Markdown, whatever the settings are."""
    assert main(["show", "--reference"]) == 0
    assert capsys.readouterr().out == config.reference()


# --- other ways to call it ---


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The version is the package's."""
    with pytest.raises(SystemExit) as caught:
        main(["--version"])

    assert caught.value.code == 0
    assert capsys.readouterr().out == version("embedding-sidecar") + "\n"


@pytest.mark.parametrize("arguments", [[], ["serve"], ["run", "--port", "1"]], ids=["none", "unknown", "odd option"])
def test_command_that_does_not_exist(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A command line that makes no sense ends with 2 and the usage."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 2
    assert "usage: embedding-sidecar" in capsys.readouterr().err


# --- run ---


def test_run_with_a_bad_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad settings keep it from starting: 2, with all problems and nothing else on standard error."""
    path = written(folder, BAD)

    assert main(["run", "--config", path]) == 2
    assert capsys.readouterr().err.startswith(f"{path}: 2 problems\n  - ")


def test_run_with_a_missing_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not there is a matter of settings: 2."""
    assert main(["run", "--config", str(folder / "none.toml")]) == 2
    assert capsys.readouterr().err.endswith("  - cannot be read: No such file or directory\n")


def test_run_with_a_taken_port(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A taken port keeps it from starting: 1, with a last line that says what to do, and no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        toml = f'{GOOD}\n[listen]\nsocket = "{folder}/s"\ntcp = "{address}"\n'
        code = main(["run", "--config", written(folder, toml)])
    told = capsys.readouterr().err

    assert code == 1
    assert "Traceback" not in told
    last = told.splitlines()[-1]
    assert last.startswith(f"cannot listen on {address}: Address already in use; stop ")
    assert "to port 0 for any free one" in last
    assert not os.path.exists(folder / "s")


class Visitor(threading.Thread):
    """Waits until a proxy in this process tells on its Unix socket that it has started, and sends a signal."""

    def __init__(self, path: Path, number: int) -> None:
        super().__init__(daemon=True)
        self._path = path
        self._number = number
        self.state = ""

    def run(self) -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end and self.state not in ("ready", "unready"):
            try:
                self.state = self._ask()
            except OSError:
                time.sleep(0.01)
        if self.state:  # it answers, so its signal handlers are in place
            os.kill(os.getpid(), self._number)
        else:
            _thread.interrupt_main()

    def _ask(self) -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(self._path))
            connection = http.client.HTTPConnection("localhost")
            connection.sock = sock
            connection.request("GET", "/status", headers={"Connection": "close"})
            state = json.load(connection.getresponse())["state"]
            connection.close()
            return str(state)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_until_a_signal(number: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It serves until a signal says stop, ends with 0, leaves no socket, and prints nothing unasked."""
    visitor = Visitor(folder / "s", number)
    visitor.start()
    toml = f'{GOOD}\n[listen]\nsocket = "{folder}/s"\ntcp = "off"\n'
    code = main(["run", "--config", written(folder, toml)])
    visitor.join()
    told = capsys.readouterr()

    assert code == 0
    assert visitor.state == "unready"
    assert told.out == ""
    assert '"event":"stopped"' in told.err
    assert sorted(os.listdir(folder)) == ["settings.toml"]


def test_run_with_a_greeting(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--hello` prints what is served once the first canaries are back, also when it is not ready."""
    visitor = Visitor(folder / "s", signal.SIGTERM)
    toml = f'{GOOD}\n[listen]\nsocket = "{folder}/s"\ntcp = "off"\n[attempt]\nmax_attempts = 1\n'
    visitor.start()
    code = main(["run", "--hello", "--config", written(folder, toml)])
    visitor.join()
    printed = capsys.readouterr().out

    assert code == 0
    assert printed.startswith(
        f"embedding-sidecar {version('embedding-sidecar')} is not ready\n  model m (default): u: "
    )
    assert "\n  model m (default): u: " in printed
    assert f"curl -s --unix-socket {folder}/s " in printed


# --- the greeting ---


@pytest.fixture
def listeners() -> Iterator[list[Listener]]:
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as tcp:
        yield [Listener("unix", "/run/s.sock", unix), Listener("tcp", "127.0.0.1:8484", tcp)]


def test_greeting_when_ready(listeners: list[Listener]) -> None:
    """The greeting names each model and has a command to paste for each listener."""
    lines = hello(listeners, {"a": "", "b": ""}, "b").splitlines()

    assert lines[:3] == [
        f"embedding-sidecar {version('embedding-sidecar')} is ready",
        "  model a: ok",
        "  model b (default): ok",
    ]
    commands = [shlex.split(line) for line in lines if "curl" in line]
    body = ["--json", '{"input": "hello world"}']
    assert commands == [
        ["curl", "-s", "--unix-socket", "/run/s.sock", "http://localhost/v1/embeddings", *body],
        ["curl", "-s", "http://127.0.0.1:8484/v1/embeddings", *body],
    ]


def test_greeting_when_one_model_is_not_served(listeners: list[Listener]) -> None:
    """One model that cannot be served makes it not ready, and its line says why."""
    text = hello(listeners, {"a": "", "b": "u: no connection"}, "a")

    assert " is not ready\n" in text
    assert "  model a (default): ok\n  model b: u: no connection\n" in text


def test_greeting_with_a_blank_in_the_path(listeners: list[Listener]) -> None:
    """A command can be pasted whatever the path is called."""
    listeners[0].address = "/run/my app/s.sock"
    commands = [shlex.split(line) for line in hello(listeners, {}, "").splitlines() if "curl" in line]

    assert commands[0][2:4] == ["--unix-socket", "/run/my app/s.sock"]
