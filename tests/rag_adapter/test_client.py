"""
The client for asyncio: every call gets its own vector or its own error, whoever it has travelled with.

The peer plays the sidecar; what needs the real one is in test_contract.py and test_restart.py.
"""

from __future__ import annotations

import asyncio
import base64
import math
import time
from array import array
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy
import pytest
from opentelemetry.sdk.trace import TracerProvider

from rag_adapter.client import EmbeddingClient
from rag_adapter.errors import (
    DeadlineExceeded,
    EmbeddingError,
    EmbeddingFailed,
    InvalidInput,
    SidecarUnavailable,
    Unavailable,
)
from rag_adapter.wire import MAX_ANSWER_BYTES
from tests.fakes.upstream import OK, FakeUpstream, Fault, vector

SOON_S = 5.0
"""Bound of each wait for something that should come at once."""
PATIENT_S = 30.0

BREAKS = [Fault(reset=True), Fault(cut_body=True), Fault(raw=b"")]
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


# --- hands ---


@pytest.fixture
async def client(peer: FakeUpstream) -> AsyncIterator[EmbeddingClient]:
    async with EmbeddingClient(peer.root_url, model="m", timeout_s=PATIENT_S) as client:
        yield client


def right(text: str, width: int = 8) -> list[float]:
    return [float(x) for x in vector(text, width)]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not is_so():
            await asyncio.sleep(0.002)


def refusal(place: str, code: str = "bad_thing", status: int = 400) -> Fault:
    message = f"'{place}' is not what it should be"
    return Fault(status=status, body={"error": {"message": message, "param": place, "code": code}})


def busy(seconds: str, *, should_retry: str = "true") -> Fault:
    headers = {"Retry-After": seconds, "x-should-retry": should_retry}
    return Fault(status=503, headers=headers, body={"error": {"message": "full", "code": "overloaded"}})


async def outcomes(*calls: Any) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


# --- one text, many texts ---


async def test_vector_of_a_text(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """A list of floats, or an array of one's own, to the bit."""
    floats = await client.embed("hello")
    array_ = await client.embed("hello", as_numpy=True)

    assert floats == right("hello")
    assert array_.dtype == numpy.float32
    assert (array_ == vector("hello", 8)).all()
    array_ += 1
    assert peer.seen[0].body == {"input": "hello", "encoding_format": "base64", "model": "m"}


async def test_what_a_call_asks_for(peer: FakeUpstream) -> None:
    """The call's wish is stronger than the client's, and all of it reaches the sidecar."""
    async with EmbeddingClient(
        peer.root_url, model="m", dimensions=4, client_name="app/search", api_key="sk-1", timeout_s=20.0
    ) as client:
        four = await client.embed("a")
        two = await client.embed("a", model="n", dimensions=2, priority="bulk", timeout_s=10.0, traceparent=TRACE)

    assert (four, two) == (right("a", 4), right("a", 2))
    first, second = peer.seen
    assert (first.body["model"], first.body["dimensions"]) == ("m", 4)
    assert (second.body["model"], second.body["dimensions"]) == ("n", 2)
    assert first.headers["X-Embedding-Priority"] == "interactive"
    assert second.headers["X-Embedding-Priority"] == "bulk"
    assert 15_000 < int(first.headers["X-Request-Timeout-Ms"]) < 20_000
    assert 5_000 < int(second.headers["X-Request-Timeout-Ms"]) < 10_000
    assert first.headers["X-Embedding-Client"] == "app/search"
    assert first.headers["Authorization"] == "Bearer sk-1"
    assert second.headers["traceparent"] == TRACE
    assert "traceparent" not in first.headers


async def test_trace_of_the_app_s_span(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """Where OpenTelemetry is there, the request belongs to the current span by itself."""
    with TracerProvider().get_tracer("app").start_as_current_span("search") as span:
        await client.embed("a")
        await client.embed_many(["b"])

    trace_id = f"{span.get_span_context().trace_id:032x}"
    assert [trace_id in seen.headers["traceparent"] for seen in peer.seen] == [True, True]


@pytest.mark.parametrize("as_numpy", [False, True])
async def test_many_texts_whose_requests_come_back_in_any_order(peer: FakeUpstream, as_numpy: bool) -> None:
    """Each text has its own vector in its own place; they go as bulk, so many at a time and no more."""
    first, rest = asyncio.Event(), asyncio.Event()
    texts = [f"text {n}" for n in range(25)]
    told: list[tuple[int, int]] = []
    async with EmbeddingClient(peer.root_url, model="m", request_texts=4, concurrency=3) as client:
        peer.script = [Fault(wait_for=first), Fault(wait_for=rest), Fault(wait_for=rest)]
        work = asyncio.create_task(
            client.embed_many(texts, as_numpy=as_numpy, on_progress=lambda done, total: told.append((done, total)))
        )
        await until(lambda: peer.inside == 3)
        rest.set()
        await until(lambda: len(told) == 6)
        first.set()
        found = await work

    assert numpy.array(found, "<f4").tolist() == [right(text) for text in texts]
    assert [total for _, total in told] == [25] * 7
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (25, 25)
    assert peer.most_inside == 3
    assert {seen.headers["X-Embedding-Priority"] for seen in peer.seen} == {"bulk"}
    assert sorted(len(seen.inputs) for seen in peer.seen) == [1] + [4] * 6


async def test_no_texts(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """Nobody is asked."""
    assert await client.embed_many([]) == []
    assert (await client.embed_many(iter(()), as_numpy=True)).shape == (0, 0)
    assert peer.seen == []


@pytest.mark.parametrize("text", ["", None, "\udc00"])
async def test_text_that_makes_no_sense(client: EmbeddingClient, peer: FakeUpstream, text: Any) -> None:
    """A ValueError before anything is sent; in a list with its place."""
    with pytest.raises(InvalidInput) as lone:
        await client.embed(text)
    with pytest.raises(InvalidInput) as listed:
        await client.embed_many(["fine", "fine", text])

    assert (lone.value.index, listed.value.index) == (None, 2)
    assert peer.seen == []
    assert sum(client.snapshot().errors.values()) == 2


async def test_error_names_the_place_in_the_whole_list(peer: FakeUpstream) -> None:
    """Whatever request the text has travelled in; the others of the list are given up."""
    peer.poison = {"text 13": refusal("input[1]")}
    async with EmbeddingClient(peer.root_url, model="m", request_texts=4, concurrency=2) as client:
        with pytest.raises(InvalidInput) as caught:
            await client.embed_many([f"text {n}" for n in range(400)])

    assert (caught.value.index, caught.value.code, caught.value.status) == (13, "bad_thing", 400)
    assert str(caught.value) == "'texts[13]' is not what it should be (HTTP 400)"
    assert len(peer.seen) < 10


async def test_progress_that_raises(client: EmbeddingClient) -> None:
    """It is the app's own exception, and ends the work."""

    def progress(done: int, total: int) -> None:
        raise KeyError(done)

    with pytest.raises(KeyError):
        await client.embed_many(["a", "b"], on_progress=progress)


# --- travelling together ---


async def test_gather_becomes_few_requests(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """A thousand calls of one turn are eight requests of even size, and each call has its own vector."""
    texts = [f"text {n}" for n in range(1000)]

    found = await asyncio.gather(*map(client.embed, texts))

    assert found == [right(text) for text in texts]
    assert [len(seen.inputs) for seen in peer.seen] == [125] * 8
    assert {seen.headers["X-Embedding-Priority"] for seen in peer.seen} == {"interactive"}


async def test_what_waits_leaves_with_the_connection_that_returns(peer: FakeUpstream) -> None:
    """With all connections busy texts gather; nothing waits while one is free."""
    gate = asyncio.Event()
    async with EmbeddingClient(peer.root_url, model="m", max_connections=1, timeout_s=PATIENT_S) as client:
        peer.script = [Fault(wait_for=gate)]
        first = asyncio.create_task(client.embed("first"))
        await until(lambda: peer.inside == 1)
        others = [asyncio.create_task(client.embed(f"text {n}")) for n in range(30)]
        await until(lambda: client.snapshot().texts_waiting == 30)
        gate.set()
        found = await asyncio.gather(first, *others)

    assert found == [right(text) for text in ["first", *(f"text {n}" for n in range(30))]]
    assert [len(seen.inputs) for seen in peer.seen] == [1, 30]
    assert len(peer.connections) == 1


async def test_large_answer_is_read_in_pieces() -> None:
    """Others get their turn in between: callers of one request wake a few at a time, not all in one turn."""
    turns: list[int] = []
    async with FakeUpstream(width=4096) as peer, EmbeddingClient(peer.root_url, model="m", max_connections=1) as client:

        async def caller(text: str) -> None:
            await client.embed(text)
            turns.append(ticks)

        ticks = 0
        async with asyncio.TaskGroup() as group:
            callers = [group.create_task(caller(f"text {n}")) for n in range(96)]
            while not all(each.done() for each in callers):
                ticks += 1
                await asyncio.sleep(0)

    assert len(peer.seen) == 1
    assert len(set(turns)) >= 96 // 8  # a piece of 128 KiB has eight of them


async def test_ingestion_leaves_a_connection_to_queries(peer: FakeUpstream) -> None:
    """A query is answered while all of bulk's requests are still waiting."""
    gate = asyncio.Event()
    peer.poison = {f"chunk {n}": Fault(wait_for=gate) for n in range(6)}
    async with EmbeddingClient(
        peer.root_url, model="m", max_connections=3, request_texts=1, concurrency=8, timeout_s=PATIENT_S
    ) as client:
        work = asyncio.create_task(client.embed_many([f"chunk {n}" for n in range(6)]))
        await until(lambda: peer.inside == 2)
        found = await client.embed("query")
        assert peer.inside == 2
        gate.set()
        await work

    assert found == right("query")
    assert peer.most_inside == 3


async def test_impatient_caller_among_patient_ones(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """Each stops waiting by its own deadline; the request lives as long as the most patient one."""
    gate = asyncio.Event()
    peer.script = [Fault(wait_for=gate)]
    impatient = asyncio.create_task(client.embed("a", timeout_s=0.51))
    patient = asyncio.create_task(client.embed("b", timeout_s=0.99))
    with pytest.raises(DeadlineExceeded):
        await impatient
    gate.set()

    assert await patient == right("b")
    assert len(peer.seen) == 1
    assert 700 < int(peer.seen[0].headers["X-Request-Timeout-Ms"]) < 990


async def test_cancelled_caller_leaves_its_mates_alone(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """Whoever leaves takes nothing away from the others."""
    gate = asyncio.Event()
    peer.script = [Fault(wait_for=gate)]
    calls = [asyncio.create_task(client.embed(f"text {n}")) for n in range(3)]
    await until(lambda: peer.inside == 1)
    calls[1].cancel()
    gate.set()
    found = await outcomes(*calls)

    assert (found[0], found[2]) == (right("text 0"), right("text 2"))
    assert isinstance(found[1], asyncio.CancelledError)


async def test_caller_who_is_cancelled_as_its_deadline_comes(peer: FakeUpstream) -> None:
    """Both in one turn of the loop are one who leaves: its mates keep their request."""
    gate = asyncio.Event()
    peer.script = [Fault(wait_for=gate)]
    loop = asyncio.get_running_loop()
    async with EmbeddingClient(peer.root_url, model="m", max_connections=1, timeout_s=PATIENT_S) as client:
        hasty = asyncio.create_task(client.embed("hasty", timeout_s=PATIENT_S * 0.7))
        patient = asyncio.create_task(client.embed("patient", timeout_s=PATIENT_S * 0.9))
        await until(lambda: peer.inside == 1)
        (desk,) = client._desks.values()
        (entry, _) = next(iter(desk._tasks)).get_coro().cr_frame.f_locals["parcel"].entries
        loop.call_soon(desk._expire, entry)
        loop.call_soon(hasty.cancel)
        await asyncio.wait({hasty})
        gate.set()
        found = await patient

    assert hasty.cancelled()
    assert found == right("patient")
    assert [seen.inputs for seen in peer.seen] == [["hasty", "patient"]]


@pytest.mark.parametrize("by_deadline", [False, True])
async def test_last_one_out_cancels_the_request(peer: FakeUpstream, by_deadline: bool) -> None:
    """When nobody waits any more the sidecar is told so, by the end of the connection."""
    peer.always = Fault(hang=True)
    async with EmbeddingClient(peer.root_url, model="m", timeout_s=0.3 if by_deadline else PATIENT_S) as client:
        calls = [asyncio.create_task(client.embed(f"text {n}")) for n in range(3)]
        await until(lambda: peer.inside == 1)
        if not by_deadline:
            for call in calls:
                call.cancel()
        found = await outcomes(*calls)
        await until(lambda: peer.inside == 0)
        await until(lambda: client.snapshot().requests_in_flight == 0)

    assert {type(each) for each in found} == {DeadlineExceeded if by_deadline else asyncio.CancelledError}
    assert len(peer.seen) == 1


async def test_caller_who_leaves_while_waiting_for_a_connection(peer: FakeUpstream) -> None:
    """Its text is not sent at all."""
    gate = asyncio.Event()
    peer.script = [Fault(wait_for=gate)]
    async with EmbeddingClient(peer.root_url, model="m", max_connections=1, timeout_s=PATIENT_S) as client:
        first = asyncio.create_task(client.embed("first"))
        await until(lambda: peer.inside == 1)
        cancelled = asyncio.create_task(client.embed("cancelled"))
        with pytest.raises(DeadlineExceeded, match="waited for a connection"):
            await client.embed("late", timeout_s=0.05)
        cancelled.cancel()
        await outcomes(cancelled)
        gate.set()
        await first

    assert [seen.inputs for seen in peer.seen] == [["first"]]


async def test_request_that_is_given_up_before_it_begins(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """The last caller leaves in the very turn in which the request is composed; its connection is free again."""
    await client.embed("before")
    for _ in range(5):
        await asyncio.sleep(0)  # whatever that has begun is over
    call = asyncio.create_task(client.embed("a", timeout_s=0.01))
    await asyncio.sleep(0)
    time.sleep(0.02)  # its timer is due in the next turn, right after the flush
    found = await outcomes(call)
    await until(lambda: client.snapshot().requests_in_flight == 0)

    assert isinstance(found[0], DeadlineExceeded)
    assert [seen.inputs for seen in peer.seen] == [["before"]]


async def test_deadline_while_the_sidecar_is_away(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """Who is late says why: whoever looks into it finds the true reason."""
    await client.embed("before")
    peer.script = [Fault(reset=True), Fault(hang=True)]
    with pytest.raises(DeadlineExceeded, match="asked again") as caught:
        await client.embed("a", timeout_s=0.3)

    assert isinstance(caught.value.__cause__, SidecarUnavailable)


async def test_deadline_that_has_passed(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """Nobody is asked for what would be late anyway."""
    with pytest.raises(DeadlineExceeded):
        await client.embed("a", deadline=time.monotonic() - 1.0)
    with pytest.raises(DeadlineExceeded):
        await client.embed_many(["a"], deadline=time.monotonic() - 1.0)

    assert peer.seen == []


async def test_deadline_of_all_texts_together(peer: FakeUpstream) -> None:
    """A timeout of `embed_many` is for all of it, however many requests that takes."""
    peer.always = Fault(hang=True)
    async with EmbeddingClient(peer.root_url, model="m", request_texts=1, concurrency=1) as client:
        with pytest.raises(DeadlineExceeded):
            await client.embed_many(["a", "b", "c"], timeout_s=0.2)

    assert len(peer.seen) == 1


# --- one text's trouble ---


async def test_culprit_among_others(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """The error of one text is its caller's alone; the others are asked again without it."""
    peer.script = [refusal("input[1]"), refusal("input[2]")]

    found = await outcomes(*(client.embed(f"text {n}") for n in range(5)))

    assert [type(each) for each in found] == [list, InvalidInput, list, InvalidInput, list]
    assert (found[1].index, str(found[1])) == (None, "'the text' is not what it should be (HTTP 400)")
    assert [len(seen.inputs) for seen in peer.seen] == [5, 4, 3]
    assert client.snapshot().errors == {"bad_thing": 2}


async def test_place_that_is_in_no_request(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """An error about a text that was not sent concerns them all, rather than nobody."""
    peer.script = [refusal("input[7]")]

    found = await outcomes(client.embed("a"), client.embed("b"))

    assert [type(each) for each in found] == [InvalidInput, InvalidInput]


async def test_error_that_concerns_all(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """Each caller raises an error of its own, with everything the sidecar has said."""
    peer.script = [busy("3")]

    found = await outcomes(client.embed("a"), client.embed("b"))

    assert [type(each) for each in found] == [Unavailable, Unavailable]
    assert found[0] is not found[1]
    assert (found[0].code, found[0].retryable, found[0].retry_after_s, found[0].status) == (
        "overloaded",
        True,
        3.0,
        503,
    )
    assert len(peer.seen) == 1


async def test_sidecar_that_takes_smaller_requests(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """Too many together is nobody's fault: they go in smaller requests, from then on too."""
    peer.script = [refusal("input", "too_many_inputs")] * 2
    texts = [f"text {n}" for n in range(16)]

    first = await asyncio.gather(*map(client.embed, texts))
    sizes = [len(seen.inputs) for seen in peer.seen]
    second = await asyncio.gather(*map(client.embed, texts))

    assert first == second == [right(text) for text in texts]
    assert sizes == [16, 8, 8, 4, 4]
    assert max(len(seen.inputs) for seen in peer.seen[len(sizes) :]) == 4


async def test_request_that_is_too_large_by_itself(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """A list of the app's own is not cut any further; it is told which argument to change."""
    peer.always = refusal("input", "too_many_inputs")

    with pytest.raises(InvalidInput) as caught:
        await client.embed_many(["a", "b"])

    assert caught.value.code == "too_many_inputs"
    assert len(peer.seen) == 1


async def test_bulk_comes_back_when_it_is_told_to(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """Hours of ingestion do not end with one full moment, unless the sidecar says that it is no use."""
    peer.script = [busy("0.01")]
    assert await client.embed_many(["a"]) == [right("a")]

    peer.script = [busy("0.01", should_retry="false")]
    with pytest.raises(Unavailable):
        await client.embed_many(["a"])


# --- garbage ---


def changed(change: Callable[[list[float]], Any]) -> Fault:
    """Put something else in the place of the second vector."""

    def whole(answer: Any) -> Any:
        item = answer["data"][min(1, len(answer["data"]) - 1)]
        numbers = array("f", base64.b64decode(item["embedding"])).tolist()
        new = change(numbers)
        item["embedding"] = base64.b64encode(array("f", new).tobytes()).decode() if isinstance(new, list) else new
        return answer

    return Fault(change=whole)


@pytest.mark.parametrize("as_numpy", [False, True])
@pytest.mark.parametrize(
    "change",
    [lambda row: row[:-1], lambda row: [math.nan, *row[1:]], lambda row: [*row[:-1], -math.inf], lambda row: "!"],
    ids=["narrow", "NaN", "infinite", "not base64"],
)
async def test_wrong_vector_among_right_ones(
    client: EmbeddingClient, peer: FakeUpstream, change: Callable[[list[float]], Any], as_numpy: bool
) -> None:
    """It is its caller's trouble alone; in a list it is named by its place."""
    peer.always = changed(change)
    calls = [client.embed(f"text {n}", dimensions=8, as_numpy=as_numpy) for n in range(3)]  # type: ignore[call-overload]
    found = await outcomes(*calls)

    assert [isinstance(each, EmbeddingFailed) for each in found] == [False, True, False]
    assert (found[1].code, found[1].index) == ("bad_answer", None)
    with pytest.raises(EmbeddingFailed) as caught:
        await client.embed_many(["a", "b", "c"], dimensions=8, as_numpy=as_numpy)  # type: ignore[call-overload]
    assert (caught.value.code, caught.value.index) == ("bad_answer", 1)


async def test_model_that_is_changed_between_two_requests(peer: FakeUpstream) -> None:
    """Vectors of two spaces do not end up in one index."""
    peer.script = [Fault(headers={"X-Embedding-Space": "old"}), Fault(headers={"X-Embedding-Space": "new"})]
    async with EmbeddingClient(peer.root_url, model="m", request_texts=1, concurrency=1) as client:
        with pytest.raises(EmbeddingFailed) as caught:
            await client.embed_many(["a", "b"])

    assert caught.value.code == "space_changed"


async def test_answer_without_end(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """It is read up to the bound, and no further."""
    peer.always = Fault(body=bytes(MAX_ANSWER_BYTES + 1))

    with pytest.raises(EmbeddingFailed, match="the bound"):
        await client.embed("a")


async def test_redirect(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """It is not followed: texts and key would go to whomever it names."""
    peer.always = Fault(status=307, headers={"Location": f"{peer.root_url}/elsewhere"}, body=b"")

    with pytest.raises(EmbeddingFailed) as caught:
        await client.embed("a")

    assert (caught.value.code, len(peer.seen)) == ("not_a_sidecar", 1)


# --- the connection ---


@pytest.mark.parametrize("fault", BREAKS, ids=["reset", "cut", "shut"])
async def test_connection_that_breaks(client: EmbeddingClient, peer: FakeUpstream, fault: Fault) -> None:
    """The request goes out again at once, for whoever still waits."""
    await client.embed("before")
    peer.script = [fault]

    found = await asyncio.gather(client.embed("a"), client.embed("b"))

    assert found == [right("a"), right("b")]
    assert client.snapshot().reconnects == 1
    assert client.snapshot().errors == {}


async def test_idle_connections_that_were_closed(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """Between two calls the sidecar may close them all; nobody notices."""
    await asyncio.gather(*(client.embed(f"text {n}") for n in range(100)))
    peer.hang_up()

    assert await client.embed("a") == right("a")


async def test_sidecar_that_never_was_there(peer: FakeUpstream) -> None:
    """One attempt tells: nobody waits for what may never come."""
    async with EmbeddingClient("/nowhere/s.sock", timeout_s=PATIENT_S) as client:
        with pytest.raises(SidecarUnavailable, match="embedding-sidecar run") as caught:
            await client.embed("a")
        snapshot = client.snapshot()

    assert isinstance(caught.value, ConnectionError)
    assert caught.value.code == "socket_missing"
    assert (snapshot.requests, snapshot.reconnects, snapshot.errors) == (1, 0, {"socket_missing": 1})


async def test_name_that_nobody_knows() -> None:
    """No connection, and the message says that it is the name."""
    async with EmbeddingClient("http://nowhere.invalid") as client:
        with pytest.raises(SidecarUnavailable) as caught:
            await client.embed("a")

    assert caught.value.code in ("unknown_host", "unreachable")


async def test_upstream_that_knows_no_base64() -> None:
    """Asked directly, as in the mode `direct`, it answers with numbers, and that is as good."""
    async with FakeUpstream(has_base64=False) as upstream, EmbeddingClient(upstream.base_url, model="m") as client:
        assert await client.embed("a") == right("a")


# --- the end ---


async def test_client_that_is_closed_meanwhile(peer: FakeUpstream) -> None:
    """Who travels and who waits gets an error at once; afterwards the client can be used again."""
    peer.script = [Fault(hang=True)]
    client = EmbeddingClient(peer.root_url, model="m", max_connections=1, timeout_s=PATIENT_S)
    travelling = asyncio.create_task(client.embed("a"))
    await until(lambda: peer.inside == 1)
    waiting = asyncio.create_task(client.embed("b"))
    await until(lambda: client.snapshot().texts_waiting == 1)
    await client.aclose()
    await client.aclose()
    found = await outcomes(travelling, waiting)

    assert [(type(each), each.code) for each in found] == [(EmbeddingFailed, "client_closed")] * 2
    assert await client.embed("c") == right("c")
    await client.aclose()
    await until(lambda: all(connection.is_closing() for connection in peer.connections))


async def test_defect_of_ours(client: EmbeddingClient, peer: FakeUpstream) -> None:
    """Whatever goes wrong inside, nobody waits for nothing, and the next call is not concerned."""
    await client.embed("a")
    desk = next(iter(client._desks.values()))
    exchange = desk.exchange

    class Broken:
        async def post(self, *_: object) -> None:
            raise ZeroDivisionError

    desk.exchange = Broken()  # type: ignore[assignment]
    with pytest.raises(EmbeddingFailed) as caught:
        await client.embed("a")
    desk.exchange = exchange

    assert caught.value.code == "internal_error"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert await client.embed("a") == right("a")


async def test_nothing_secret_is_shown(peer: FakeUpstream) -> None:
    """Neither the client nor any of its errors shows a text or a key."""
    peer.script = [refusal("input[0]"), Fault(status=500, body=b"secret"), Fault(raw=b"secret\r\n\r\n"), OK]
    async with EmbeddingClient(peer.root_url, model="m", api_key="sk-secret") as client:
        errors = [(await outcomes(client.embed("secret text")))[0] for _ in range(3)]
        shown = [repr(client), repr(client.snapshot()), *map(repr, errors), *map(str, errors)]

    assert all(isinstance(error, EmbeddingError) for error in errors)
    assert not any("secret" in each for each in shown)
