"""The client for threads: one deadline for everything, no loop, and the same vectors and errors as the other one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest

from rag_adapter.blocking import SyncEmbeddingClient
from rag_adapter.errors import DeadlineExceeded, EmbeddingFailed, InvalidInput, SidecarUnavailable, Unavailable
from rag_adapter.wire import MAX_ANSWER_BYTES
from tests.fakes.upstream import FakeUpstream, Fault, vector

SOON_S = 5.0
BREAKS = [Fault(reset=True), Fault(cut_body=True), Fault(raw=b"")]
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def client(peer: FakeUpstream) -> Iterator[SyncEmbeddingClient]:
    """Its calls run in threads: the peer lives in the test's own loop."""
    with SyncEmbeddingClient(peer.root_url, model="m", timeout_s=30.0) as client:
        yield client


def right(text: str, width: int = 8) -> list[float]:
    return [float(x) for x in vector(text, width)]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not is_so():
            await asyncio.sleep(0.002)


def refusal(place: str, code: str = "bad_thing") -> Fault:
    message = f"'{place}' is not what it should be"
    return Fault(status=400, body={"error": {"message": message, "param": place, "code": code}})


def busy(seconds: str) -> Fault:
    return Fault(
        status=503, headers={"Retry-After": seconds}, body={"error": {"message": "full", "code": "overloaded"}}
    )


async def test_vector_of_a_text(client: SyncEmbeddingClient, peer: FakeUpstream) -> None:
    """A list of floats, or an array of one's own, to the bit; on one connection."""
    floats = await asyncio.to_thread(client.embed, "hello")
    found: Any = await asyncio.to_thread(lambda: client.embed("hello", as_numpy=True))

    assert floats == right("hello")
    assert (found.dtype, found.tolist()) == (numpy.float32, right("hello"))
    assert peer.seen[0].body == {"input": "hello", "encoding_format": "base64", "model": "m"}
    assert len(peer.connections) == 1


async def test_what_a_call_asks_for(peer: FakeUpstream) -> None:
    """The same headers and fields as by the other client."""
    with SyncEmbeddingClient(peer.root_url, model="m", client_name="app", api_key="sk-1") as client:
        await asyncio.to_thread(
            lambda: client.embed("a", dimensions=2, priority="bulk", timeout_s=7.0, traceparent=TRACE)
        )
    (seen,) = peer.seen

    assert (seen.body["model"], seen.body["dimensions"]) == ("m", 2)
    assert seen.headers["X-Embedding-Priority"] == "bulk"
    assert 4000 < int(seen.headers["X-Request-Timeout-Ms"]) < 7000
    assert (seen.headers["X-Embedding-Client"], seen.headers["Authorization"]) == ("app", "Bearer sk-1")
    assert seen.headers["traceparent"] == TRACE
    assert seen.headers["Host"] == f"127.0.0.1:{peer.port}"


@pytest.mark.parametrize("as_numpy", [False, True])
async def test_many_texts_at_a_time(peer: FakeUpstream, as_numpy: bool) -> None:
    """Several requests are under way without any thread, whichever is answered first; the order is kept."""
    first, rest = asyncio.Event(), asyncio.Event()
    texts = [f"text {n}" for n in range(25)]
    told: list[tuple[int, int]] = []
    with SyncEmbeddingClient(peer.root_url, model="m", request_texts=4, concurrency=3) as client:
        peer.script = [Fault(wait_for=first), Fault(wait_for=rest), Fault(wait_for=rest)]
        work = asyncio.create_task(
            asyncio.to_thread(
                lambda: client.embed_many(
                    texts,
                    as_numpy=as_numpy,  # type: ignore[call-overload]
                    on_progress=lambda done, total: told.append((done, total)),
                )
            )
        )
        await until(lambda: peer.inside == 3)
        threads = threading.active_count()
        rest.set()
        await until(lambda: len(told) == 6)
        first.set()
        found = await work

    assert numpy.array(found, "<f4").tolist() == [right(text) for text in texts]
    assert told[-1] == (25, 25)
    assert peer.most_inside == 3
    assert len(peer.connections) == 3
    assert threads == threading.active_count()
    assert {seen.headers["X-Embedding-Priority"] for seen in peer.seen} == {"bulk"}


async def test_threads_that_ingest_at_the_same_time(peer: FakeUpstream) -> None:
    """They share the connections that bulk may have, and none waits for another forever."""
    with SyncEmbeddingClient(peer.root_url, model="m", max_connections=3, request_texts=1) as client:
        texts = [[f"text {n} of {k}" for n in range(20)] for k in range(6)]
        async with asyncio.timeout(20):
            found = await asyncio.gather(*(asyncio.to_thread(client.embed_many, each) for each in texts))

    assert found == [[right(text) for text in each] for each in texts]
    assert peer.most_inside <= 2


async def test_no_texts(client: SyncEmbeddingClient, peer: FakeUpstream) -> None:
    """Nobody is asked."""
    assert client.embed_many([]) == []
    assert client.embed_many([], as_numpy=True).shape == (0, 0)
    assert peer.seen == []


async def test_text_that_makes_no_sense(client: SyncEmbeddingClient, peer: FakeUpstream) -> None:
    """A ValueError before anything is sent; in a list with its place."""
    with pytest.raises(InvalidInput):
        client.embed("")
    with pytest.raises(InvalidInput) as caught:
        client.embed_many(["a", "b", ""])

    assert caught.value.index == 2
    assert peer.seen == []
    assert client.snapshot().errors == {"empty_input": 2}


async def test_error_names_the_place_in_the_whole_list(peer: FakeUpstream) -> None:
    """The others are given up, and their connections closed."""
    hanging = Fault(hang=True)
    peer.poison = {"text 4": refusal("input[1]"), "text 0": hanging, "text 6": hanging}
    with SyncEmbeddingClient(peer.root_url, model="m", request_texts=3, concurrency=3) as client:
        with pytest.raises(InvalidInput) as caught:
            await asyncio.to_thread(client.embed_many, [f"text {n}" for n in range(90)])
        await until(lambda: peer.inside == 0)
        in_use = client.snapshot().requests_in_flight

    assert (caught.value.index, str(caught.value)) == (4, "'texts[4]' is not what it should be (HTTP 400)")
    assert in_use == 0


async def test_wrong_vector_is_placed(client: SyncEmbeddingClient, peer: FakeUpstream) -> None:
    """The gate is the same; a lone text has no place."""

    def broken(answer: Any) -> Any:
        answer["data"][-1]["embedding"] = "!"
        return answer

    peer.always = Fault(change=broken)
    with pytest.raises(EmbeddingFailed) as lone:
        await asyncio.to_thread(client.embed, "a")
    with pytest.raises(EmbeddingFailed) as listed:
        await asyncio.to_thread(client.embed_many, ["a", "b"])

    assert (lone.value.code, lone.value.index) == ("bad_answer", None)
    assert (listed.value.code, listed.value.index) == ("bad_answer", 1)


# --- deadlines ---


async def test_sidecar_that_does_not_answer(client: SyncEmbeddingClient, peer: FakeUpstream) -> None:
    """The caller's patience ends, and the sidecar learns that nobody waits."""
    peer.always = Fault(hang=True)
    with pytest.raises(DeadlineExceeded):
        await asyncio.to_thread(lambda: client.embed("a", timeout_s=0.2))
    with pytest.raises(DeadlineExceeded):
        await asyncio.to_thread(lambda: client.embed_many(["a", "b"], timeout_s=0.2))
    await until(lambda: peer.inside == 0)

    assert client.snapshot().errors == {"deadline_exceeded": 2}
    assert client.snapshot().requests_in_flight == 0


async def test_deadline_that_has_passed(client: SyncEmbeddingClient, peer: FakeUpstream) -> None:
    """Nobody is asked for what would be late anyway."""
    with pytest.raises(DeadlineExceeded):
        client.embed("a", deadline=time.monotonic() - 1.0)
    with pytest.raises(DeadlineExceeded):
        client.embed_many(["a"], deadline=time.monotonic() - 1.0)

    assert peer.seen == []


async def test_threads_that_wait_for_a_connection(peer: FakeUpstream) -> None:
    """Waiting for one is part of the call's patience."""
    peer.always = Fault(hang=True)
    with SyncEmbeddingClient(peer.root_url, model="m", max_connections=1) as client:
        first = asyncio.create_task(asyncio.to_thread(lambda: client.embed("a", timeout_s=1.0)))
        await until(lambda: peer.inside == 1)
        with pytest.raises(DeadlineExceeded):
            await asyncio.to_thread(lambda: client.embed("b", timeout_s=0.1))
        assert not first.done()
        with pytest.raises(DeadlineExceeded):
            await first

    assert [seen.inputs for seen in peer.seen] == [["a"]]


async def test_deadline_while_the_sidecar_is_away(client: SyncEmbeddingClient, peer: FakeUpstream) -> None:
    """What is asked again until the end says why."""
    await asyncio.to_thread(client.embed, "before")
    peer.script = [Fault(reset=True), Fault(hang=True)]
    with pytest.raises(DeadlineExceeded, match="asked again") as caught:
        await asyncio.to_thread(lambda: client.embed("a", timeout_s=0.3))

    assert isinstance(caught.value.__cause__, SidecarUnavailable)


# --- the connection ---


@pytest.mark.parametrize("fault", BREAKS, ids=["reset", "cut", "shut"])
async def test_connection_that_breaks(client: SyncEmbeddingClient, peer: FakeUpstream, fault: Fault) -> None:
    """The request goes out again at once, also one of many."""
    await asyncio.to_thread(client.embed, "before")
    peer.script = [fault]
    assert await asyncio.to_thread(client.embed, "a") == right("a")
    peer.script = [fault]
    assert await asyncio.to_thread(client.embed_many, ["a", "b"]) == [right("a"), right("b")]

    assert client.snapshot().reconnects == 2
    assert client.snapshot().errors == {}


async def test_idle_connections_that_were_closed(client: SyncEmbeddingClient, peer: FakeUpstream) -> None:
    """All of them are stale after a restart; who has seen it opens a new one, who has not tries once more."""
    gate = asyncio.Event()
    peer.always = Fault(wait_for=gate)
    calls = [asyncio.create_task(asyncio.to_thread(client.embed, f"text {n}")) for n in range(4)]
    await until(lambda: peer.inside == 4)
    gate.set()
    await asyncio.gather(*calls)
    peer.hang_up()
    await asyncio.sleep(0)

    assert await asyncio.to_thread(client.embed, "a") == right("a")
    assert client.snapshot().reconnects <= 1
    assert client.snapshot().connections_opened == 5


async def test_bulk_comes_back_when_it_is_told_to(client: SyncEmbeddingClient, peer: FakeUpstream) -> None:
    """A query is told at once, ingestion waits."""
    peer.script = [busy("0.01"), busy("0.01")]
    with pytest.raises(Unavailable):
        await asyncio.to_thread(client.embed, "a")

    assert await asyncio.to_thread(client.embed_many, ["a"]) == [right("a")]


async def test_answer_without_end(client: SyncEmbeddingClient, peer: FakeUpstream) -> None:
    """It is refused by the length it states, and the connection is not used again."""
    peer.script = [Fault(body=bytes(MAX_ANSWER_BYTES + 1))]
    with pytest.raises(EmbeddingFailed, match="the bound"):
        await asyncio.to_thread(client.embed, "a")

    assert await asyncio.to_thread(client.embed, "b") == right("b")
    assert len(peer.connections) == 2


async def test_redirect(client: SyncEmbeddingClient, peer: FakeUpstream) -> None:
    """It is not followed."""
    peer.always = Fault(status=307, headers={"Location": f"{peer.root_url}/elsewhere"}, body=b"")
    with pytest.raises(EmbeddingFailed) as caught:
        await asyncio.to_thread(client.embed, "a")

    assert (caught.value.code, len(peer.seen)) == ("not_a_sidecar", 1)


def test_nothing_heavy_is_loaded() -> None:
    """Threads need no event loop, and whoever wants no arrays needs no numpy."""
    code = (
        "import sys, rag_adapter; rag_adapter.SyncEmbeddingClient('/s');"
        "print(sorted({'aiohttp', 'asyncio', 'numpy'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)

    assert done.stdout.strip() == "[]"
