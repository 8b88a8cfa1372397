"""The sidecar is killed and comes back, is missing, silent or forbidden: what the app sees of it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from rag_adapter.blocking import SyncEmbeddingClient
from rag_adapter.client import EmbeddingClient
from rag_adapter.errors import EmbeddingError, EmbeddingFailed, SidecarUnavailable, Unavailable
from tests.fakes.sidecar import Sidecar
from tests.fakes.upstream import FakeUpstream, Fault, vector


async def asked(kind: str, address: str, *, timeout_s: float = 30.0) -> Any:
    """Ask once, by either client; returns the vector or the error."""
    try:
        if kind == "async":
            async with EmbeddingClient(address, timeout_s=timeout_s) as client:
                return await client.embed("hello")
        with SyncEmbeddingClient(address, timeout_s=timeout_s) as blocking:
            return await asyncio.to_thread(blocking.embed, "hello")
    except EmbeddingError as error:
        return error


# --- restart ---


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_restart_in_the_middle_of_everything(number: int) -> None:
    """Queries, ingestion and threads under way while the sidecar goes and comes back: none of them fails."""
    with Sidecar("[lifecycle]\ndrain_linger_s = 0.1") as sidecar, SyncEmbeddingClient(sidecar.socket_path) as blocking:
        async with EmbeddingClient(sidecar.socket_path) as client:
            expected = await client.embed("hello")
            stop = threading.Event()
            counts = [0, 0, 0]

            async def queries() -> None:
                while not stop.is_set():
                    assert await client.embed("hello") == expected
                    counts[0] += 1

            async def ingestion() -> None:
                while not stop.is_set():
                    texts = [f"text {n} of {counts[1]}" for n in range(600)]
                    assert len(await client.embed_many(texts, as_numpy=True)) == 600
                    counts[1] += 1

            def thread() -> None:
                while not stop.is_set():
                    assert blocking.embed("hello") == expected
                    counts[2] += 1

            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(queries())
                    group.create_task(asyncio.to_thread(thread))
                group.create_task(ingestion())
                for _ in range(2):
                    seen = list(counts)
                    async with asyncio.timeout(20):
                        while not all(now > before for now, before in zip(counts, seen, strict=True)):
                            await asyncio.sleep(0.01)
                    sidecar.signal(number)
                    await asyncio.to_thread(sidecar.wait)
                    await asyncio.to_thread(sidecar.restart)
                seen = list(counts)
                async with asyncio.timeout(20):
                    while not all(now > before for now, before in zip(counts, seen, strict=True)):
                        await asyncio.sleep(0.01)
                stop.set()
            reconnects = client.snapshot().reconnects + blocking.snapshot().reconnects
            errors = {**client.snapshot().errors, **blocking.snapshot().errors}

    assert errors == {}
    assert reconnects > 0


# --- nobody there ---


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_no_socket(kind: str, folder: Path) -> None:
    """At once, with the place and what to do."""
    error = await asked(kind, f"{folder}/s.sock")

    assert (type(error), error.code) == (SidecarUnavailable, "socket_missing")
    assert str(error) == (
        f"no sidecar at {folder}/s.sock: start it with `embedding-sidecar run`, "
        "or set EMBEDDING_SIDECAR_SOCKET to where it listens"
    )


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_socket_that_nobody_listens_on(kind: str, folder: Path) -> None:
    """It was left behind by a crash."""
    path = f"{folder}/s.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)

    error = await asked(kind, path)

    assert (type(error), error.code) == (SidecarUnavailable, "refused")
    assert "embedding-sidecar run" in str(error)


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_port_that_nobody_listens_on(kind: str) -> None:
    """The same over TCP."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    error = await asked(kind, f"http://127.0.0.1:{port}")

    assert (type(error), error.code) == (SidecarUnavailable, "refused")
    assert f"127.0.0.1:{port}" in str(error)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("kind", ["async", "sync"])
def test_socket_without_rights(kind: str, folder: Path) -> None:
    """Another user's socket. Root may open any, so as root the question is asked by a child that is nobody."""
    path = folder / "s.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        path.chmod(0)
        folder.chmod(stat.S_IRWXU | stat.S_IXOTH)
        asyncio.run(asked(kind, f"{folder}/nowhere"))  # all is imported by now: nobody could not read it
        pid = os.fork()
        if pid == 0:
            code = 2
            try:
                if os.getuid() == 0:
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                error = asyncio.run(asked(kind, str(path)))
                is_told = f"user {os.geteuid()}" in str(error) and not error.retryable
                code = 0 if error.code == "socket_denied" and is_told else 1
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)

    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_folder_of_somebody_else(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder below /tmp that another user was first with gets no text, whoever listens in it."""
    monkeypatch.setattr("rag_adapter.address._last_folder", lambda _: str(folder))
    folder.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "embedding-sidecar.sock"))
        server.listen()
        server.setblocking(False)
        error = await asked(kind, str(folder / "embedding-sidecar.sock"))
        with pytest.raises(BlockingIOError):
            server.accept()

    assert (type(error), error.code) == (SidecarUnavailable, "socket_not_ours")


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_many_texts_and_nobody_there(kind: str, folder: Path) -> None:
    """The same error, however many requests it would have been."""
    texts = [f"text {n}" for n in range(1000)]
    with pytest.raises(SidecarUnavailable) as caught:
        if kind == "async":
            async with EmbeddingClient(f"{folder}/s.sock") as client:
                await client.embed_many(texts)
        else:
            with SyncEmbeddingClient(f"{folder}/s.sock") as blocking:
                blocking.embed_many(texts)

    assert caught.value.code == "socket_missing"


# --- TLS, for an upstream that is asked directly ---

CERTIFICATE = Path(__file__).resolve().parents[1] / "upstream" / "transport" / "localhost.pem"


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_certificate_that_is_not_trusted(kind: str) -> None:
    """Nothing is sent, and the message says why."""
    async with FakeUpstream(tls=server_tls()) as upstream:
        error = await asked(kind, f"https://localhost:{upstream.port}")

    assert (type(error), error.code, upstream.seen) == (SidecarUnavailable, "tls_failed", [])


async def test_certificate_that_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's store decides, or $SSL_CERT_FILE; then it is as any other connection."""
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    async with FakeUpstream(tls=server_tls()) as upstream:
        with SyncEmbeddingClient(f"https://localhost:{upstream.port}", model="m") as blocking:
            found = [await asyncio.to_thread(blocking.embed, "hello") for _ in range(2)]

    assert found == [[float(x) for x in vector("hello", 8)]] * 2


def server_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    return context


# --- somebody else there ---


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.parametrize(
    "said", [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"HTTP/1.1 200 OK\r\nno header\r\n\r\n", b"\x00" * 9 + b"\r\n\r\n"]
)
async def test_no_http_on_the_other_side(kind: str, said: bytes, folder: Path) -> None:
    """The message says that this may not be a sidecar."""
    path = f"{folder}/s.sock"

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(said)
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(talk, path):
        error = await asked(kind, path)

    assert (type(error), error.code) == (EmbeddingFailed, "not_a_sidecar")
    assert "is it a sidecar?" in str(error)
    assert "SSH" not in str(error)


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_some_other_web_server(kind: str, peer: FakeUpstream) -> None:
    """Its page is not quoted, but its place is named."""
    peer.always = Fault(status=404, body=b"<html>not here</html>")

    error = await asked(kind, peer.root_url)

    assert (error.code, error.status) == ("not_a_sidecar", 404)
    assert str(error).startswith(f"HTTP 404 from 127.0.0.1:{peer.port}")


# --- ready or not ---


async def test_ready(sidecar: Sidecar) -> None:
    """Both clients say so, and waiting for it takes no time."""
    async with EmbeddingClient(sidecar.socket_path) as client:
        await client.wait_until_ready(0.0)
        assert await client.is_ready()
    with SyncEmbeddingClient(f"http://{sidecar.address}") as blocking:
        blocking.wait_until_ready(0.0)
        assert blocking.is_ready()


UNREADY = """
[upstreams.nobody]
kind = "openai"
base_url = "http://127.0.0.1:9"
[models.m]
upstreams = ["nobody"]
dimensions = 8
"""


async def test_sidecar_that_is_not_ready() -> None:
    """It answers, and says why."""
    with Sidecar(UNREADY) as sidecar:
        async with EmbeddingClient(sidecar.socket_path) as client:
            assert not await client.is_ready()
            with pytest.raises(Unavailable, match="model m") as caught:
                await client.wait_until_ready(0.1)
        with SyncEmbeddingClient(sidecar.socket_path) as blocking:
            assert not blocking.is_ready()
            with pytest.raises(Unavailable, match="model m"):
                blocking.wait_until_ready(0.1)

    assert caught.value.code == "not_ready"


async def test_app_that_is_started_before_its_sidecar(folder: Path) -> None:
    """It waits until the sidecar is there; from then on a restart is waited for, too."""
    with Sidecar() as sidecar:
        sidecar.kill()
        os.unlink(sidecar.socket_path)
        async with EmbeddingClient(sidecar.socket_path) as client:
            with pytest.raises(SidecarUnavailable):
                await client.wait_until_ready(0.1)
            starting = asyncio.create_task(asyncio.to_thread(sidecar.restart))
            await client.wait_until_ready(30.0)
            assert len(await client.embed("hello")) == 256
            await starting


async def test_sidecar_that_does_not_answer(folder: Path) -> None:
    """One that takes connections and is silent is not ready; the clients say so by themselves."""
    path = f"{folder}/s.sock"
    with socket.socket(socket.AF_UNIX) as server, SyncEmbeddingClient(path) as blocking:
        server.bind(path)
        server.listen()
        async with EmbeddingClient(path) as client:
            found = await asyncio.gather(client.is_ready(), asyncio.to_thread(blocking._trouble))

    assert found[0] is False
    assert found[1] is not None
    assert found[1].code == "silent"
