"""
One client for all event loops, threads and processes of an app: against the real sidecar.

Warnings are errors here, so a socket or a session that nobody closes fails the test that has left it behind.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rag_adapter.blocking import SyncEmbeddingClient
from rag_adapter.client import EmbeddingClient
from tests.fakes.sidecar import Sidecar
from tests.fakes.upstream import FakeUpstream, vector

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def in_child(work: Callable[[], Any]) -> int:
    """Run something in a forked child; returns its exit code: 0 if it returned true."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- event loops ---


def test_loop_after_loop(sidecar: Sidecar) -> None:
    """Each `asyncio.run` opens connections of its own and leaves none behind, though nobody closes the client."""
    client = EmbeddingClient(sidecar.socket_path)
    before = fds()
    found = [asyncio.run(client.embed("hello")) for _ in range(3)]

    assert found[0] == found[1] == found[2]
    assert client.snapshot().connections_opened == 3
    assert fds() == before
    assert client._desks == {}


def test_loop_that_is_opened_again_by_hand(sidecar: Sidecar) -> None:
    """Between two `run_until_complete` of one loop the connections stay."""
    client = EmbeddingClient(sidecar.socket_path)
    with asyncio.Runner() as runner:
        for _ in range(3):
            runner.run(client.embed("hello"))
        opened = client.snapshot().connections_opened

    assert opened == 1


@pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning")
def test_loop_that_is_closed_without_its_end(sidecar: Sidecar) -> None:
    """Who closes a loop rudely loses its connections, and the next loop works as if nothing had been."""
    client = EmbeddingClient(sidecar.socket_path)
    before = fds()
    for _ in range(3):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(client.embed("hello"))
        loop.close()
        del loop
        gc.collect()
    asyncio.run(client.embed("hello"))
    gc.collect()

    assert client.snapshot().connections_opened == 4
    assert fds() == before


def test_many_loops_in_many_threads(sidecar: Sidecar) -> None:
    """All of them share one client, and each call has its own vector."""
    client = EmbeddingClient(sidecar.socket_path)
    expected = asyncio.run(client.embed_many([f"text {n}" for n in range(40)]))
    before = fds()
    failures: list[BaseException] = []

    async def calls() -> None:
        assert await asyncio.gather(*(client.embed(f"text {n}") for n in range(40))) == expected

    def work() -> None:
        try:
            for _ in range(3):
                asyncio.run(calls())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert fds() == before
    assert client._desks == {}


async def test_sync_client_inside_a_running_loop(sidecar: Sidecar) -> None:
    """It blocks, as any blocking call, and works."""
    async with EmbeddingClient(sidecar.socket_path) as client:
        with SyncEmbeddingClient(sidecar.socket_path) as blocking:
            assert blocking.embed("hello") == await client.embed("hello")


# --- leaks ---


async def test_nothing_is_left_behind(sidecar: Sidecar) -> None:
    """After calls that succeed, fail, are cancelled and time out: no task, no descriptor, nothing waiting."""
    before = fds(), len(asyncio.all_tasks())
    client = EmbeddingClient(sidecar.socket_path)
    for _ in range(3):
        calls = [
            asyncio.create_task(client.embed(f"text {n}", model="nope" if n % 7 == 0 else None)) for n in range(200)
        ]
        late = asyncio.create_task(client.embed("late", timeout_s=0.0001))
        await asyncio.sleep(0)
        for call in calls[::3]:
            call.cancel()
        await asyncio.gather(*calls, late, client.embed_many(["a"] * 600), return_exceptions=True)
        async with asyncio.timeout(5):
            while client.snapshot().requests_in_flight:
                await asyncio.sleep(0.002)
    snapshot = client.snapshot()
    tasks = len(asyncio.all_tasks())
    await client.aclose()
    del calls, late

    assert (fds(), tasks) == before
    assert (snapshot.texts_waiting, snapshot.requests_in_flight) == (0, 0)
    assert snapshot.connections_opened <= 8 + 3 * 3  # a cancelled request takes its connection along


async def test_calls_leave_no_garbage(sidecar: Sidecar) -> None:
    """What a call has used is gone with it; the collector, which holds the loop, has nothing to find."""
    async with EmbeddingClient(sidecar.socket_path) as client:
        await asyncio.gather(*(client.embed(f"text {n}") for n in range(50)))
        gc.collect()
        gc.disable()
        try:
            await asyncio.gather(*(client.embed(f"text {n}") for n in range(50)))
            await asyncio.sleep(0)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            ours = [thing for thing in gc.garbage if type(thing).__module__.startswith("rag_adapter")]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    assert ours == []


async def test_ten_thousand_at_once(sidecar: Sidecar) -> None:
    """All are answered, rightly, over a handful of connections, and a shared text costs nothing twice."""
    async with EmbeddingClient(sidecar.socket_path, dimensions=64, timeout_s=60.0) as client:
        texts = [f"text {n}" for n in range(10_000)]
        found = await asyncio.gather(*(client.embed(text, as_numpy=True) for text in texts))
        again = await client.embed_many(texts, as_numpy=True)
        snapshot = client.snapshot()

    assert all((row == other).all() for row, other in zip(found, again, strict=True))
    assert snapshot.connections_opened <= 8
    assert snapshot.requests <= 10_000 / 256 * 2 + 16
    assert snapshot.errors == {}


# --- fork ---


def test_fork_of_a_sync_client(sidecar: Sidecar) -> None:
    """The child makes connections of its own, and the parent's go on."""
    with SyncEmbeddingClient(sidecar.socket_path) as client:
        expected = client.embed("hello")
        inherited = fds()

        def in_the_child() -> bool:
            # Its copy is closed: else the sidecar would not see when the parent hangs up.
            is_closed = fds() == inherited - 1
            before = client.snapshot().connections_opened
            is_right = client.embed("hello") == expected
            return is_closed and is_right and (before, client.snapshot().connections_opened) == (0, 1)

        codes = [in_child(in_the_child) for _ in range(3)]
        assert client.embed("hello") == expected
        opened = client.snapshot().connections_opened

    assert codes == [0, 0, 0]
    assert opened == 1


def test_fork_after_the_loop(sidecar: Sidecar) -> None:
    """A server that embeds before it forks its workers: each has its own loop and connections."""
    client = EmbeddingClient(sidecar.socket_path)
    expected = asyncio.run(client.embed("hello"))

    codes = [in_child(lambda: asyncio.run(client.embed("hello")) == expected) for _ in range(3)]

    assert codes == [0, 0, 0]


async def test_fork_in_a_running_loop(peer: FakeUpstream) -> None:
    """Whatever the child does with what it has inherited, the parent's connection and its loop go on."""
    async with EmbeddingClient(peer.root_url, model="m", timeout_s=30.0) as client:
        await client.embed("before")

        def in_the_child() -> bool:
            found = asyncio.run(client.embed("in the child"))
            gc.collect()
            return found == [float(x) for x in vector("in the child", 8)]

        pid = os.fork()
        if pid == 0:
            os._exit(0 if in_the_child() else 1)
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
        async with asyncio.timeout(10):
            found = [await client.embed(f"after {n}") for n in range(3)]
        snapshot = client.snapshot()

    assert os.waitstatus_to_exitcode(status) == 0
    assert found == [[float(x) for x in vector(f"after {n}", 8)] for n in range(3)]
    assert (snapshot.connections_opened, snapshot.reconnects) == (1, 0)


CHILD_AND_PARENT = """
import asyncio, os, sys
from rag_adapter import EmbeddingClient, SyncEmbeddingClient

client, blocking = EmbeddingClient(sys.argv[1]), SyncEmbeddingClient(sys.argv[1])
loop = asyncio.new_event_loop()
expected = loop.run_until_complete(client.embed("hello"))
assert blocking.embed("hello") == expected
if pid := os.fork():
    os.waitpid(pid, 0)
    assert loop.run_until_complete(client.embed("hello")) == blocking.embed("hello") == expected
    assert client.snapshot().connections_opened == blocking.snapshot().connections_opened == 1
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
else:
    assert asyncio.run(client.embed("hello")) == blocking.embed("hello") == expected
blocking.close()
"""


def test_fork_whose_child_ends_in_the_ordinary_way(sidecar: Sidecar, tmp_path: Path) -> None:
    """The child takes its interpreter down, and with it what it has inherited: no noise, no harm to the parent."""
    script = tmp_path / "script.py"
    script.write_text(CHILD_AND_PARENT)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(script), sidecar.socket_path]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
