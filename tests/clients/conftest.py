"""
The proxy under test, in its two set-ups, with an environment in which every client is offline and unconfigured.

`sidecar` stands before an upstream that speaks cl100k (see fake_openai.py), so the expected vector of any input is
known. `embedded` has no configuration and serves the embedded model; there the expected vector is what the same proxy
answers to plain HTTP that asks for floats. `guarded` is the same behind a key, and at `nowhere` there is none.
"""

import hashlib
import importlib.util
import ipaddress
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# --- before a framework is imported: they read the environment at import ---

for _name in list(os.environ):
    if _name.startswith(("OPENAI_", "LANGCHAIN_", "LANGSMITH_", "EMBEDDING_")) or _name.lower().endswith("_proxy"):
        del os.environ[_name]
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
os.environ["ANONYMIZED_TELEMETRY"] = "False"  # Chroma's
# tiktoken downloads its vocabulary unless it finds it here; llama-index-core ships it for cl100k.
_llama_index_core = Path(importlib.util.find_spec("llama_index.core").origin).parent
os.environ["TIKTOKEN_CACHE_DIR"] = str(_llama_index_core / "_static" / "tiktoken_cache")


def _stay_on_loopback(event: str, args: tuple) -> None:
    """Refuse any look-up or connection that would leave this machine, whichever library asks for it."""
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (None, "localhost") and not _is_loopback(host):
        raise PermissionError(f"a client test wanted to reach {host!r}, which is not on this machine")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


sys.addaudithook(_stay_on_loopback)

from tests.clients.fake_openai import MODEL, WIDTH, WIDTHS_ALLOWED, FakeOpenAI  # noqa: E402
from tests.fakes.sidecar import Sidecar  # noqa: E402

# --- the proxy ---


@pytest.fixture(scope="session")
def upstream() -> Iterator[FakeOpenAI]:
    """The fake OpenAI behind `sidecar`."""
    with FakeOpenAI() as fake:
        yield fake


@pytest.fixture(scope="session")
def sidecar(upstream: FakeOpenAI) -> Iterator[Sidecar]:
    """A proxy before an upstream that takes texts and cl100k token ids."""
    settings = f"""
        [upstreams.fake]
        kind = "openai"
        profile = "openai"
        base_url = "{upstream.base_url}"

        [models."{MODEL}"]
        upstreams = ["fake"]
        dimensions = {WIDTH}
        token_ids = true
        dimensions_allowed = {list(WIDTHS_ALLOWED)}
    """
    with Sidecar(settings) as started:
        yield started


@pytest.fixture(scope="session")
def embedded() -> Iterator[Sidecar]:
    """A proxy without configuration: it serves "wordllama", from text only."""
    with Sidecar("") as started:
        yield started


@pytest.fixture(scope="session")
def wordllama(embedded: Sidecar) -> Callable[..., list[float]]:
    """The vector of one text by the embedded model, asked for without any client library."""

    def vector(text: str, **fields: object) -> list[float]:
        body = {"model": "wordllama", "input": text, "encoding_format": "float", **fields}
        request = urllib.request.Request(
            f"{embedded.base_url}/embeddings", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"][0]["embedding"]

    return vector


# --- for the adapter's classes ---

KEY = "s3cret-key"


@pytest.fixture(scope="session")
def guarded() -> Iterator[Sidecar]:
    """A proxy that wants KEY over TCP, and serves the embedded model."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    with Sidecar(f'[callers.app]\nkey_sha256 = "{digest}"\n') as started:
        yield started


@pytest.fixture
def nowhere(tmp_path: Path) -> str:
    """An address at which there is no sidecar."""
    return f"{tmp_path}/no.sock"


@pytest.fixture(scope="session")
def requests(embedded: Sidecar) -> Callable[..., list[tuple[str, int]]]:
    """Priority and number of inputs of each request of one client, from the proxy's log, once it has so many inputs."""

    def found(client_name: str, inputs: int) -> list[tuple[str, int]]:
        end = time.monotonic() + 10
        while True:
            mine = [line for line in embedded.lines() if str(line.get("caller")).endswith(f"/{client_name}")]
            if sum(line["inputs"] for line in mine) >= inputs or time.monotonic() > end:
                return [(line["priority"], line["inputs"]) for line in mine]
            time.sleep(0.01)  # a line is written just after its answer

    return found
