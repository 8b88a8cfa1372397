"""The wire, against a real server on loopback that misbehaves on command."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from multidict import CIMultiDict

from proxy.base import errors
from proxy.base.clock import Clock, MonotonicClock
from proxy.base.events import AttemptFinished, ConnectionStale, Event
from proxy.base.messages import Answer, Batch, RateHints
from proxy.base.settings import TransportSettings
from proxy.upstream.translate.openai import PROFILES, OpenAI
from proxy.upstream.transport import TURN_BYTES, Transport, thinned, tls_context
from tests.fakes.clock import HandClock
from tests.fakes.stage import make_batch
from tests.fakes.upstream import FakeUpstream, Fault, vector

KEY = "the-key-of-this-test"
PEM = str(Path(__file__).with_name("localhost.pem"))
"""A certificate of 127.0.0.1 that signs itself, with its key; for server and client alike, until 2126."""


class HastyClock(HandClock):
    """Its time-outs fire a millisecond early, as those of an event loop with whole milliseconds may."""

    def timeout_at(self, deadline: float) -> Any:
        return super().timeout_at(deadline - 0.001)


class Play:
    """A transport and the upstream at its other end."""

    def __init__(self, upstream: FakeUpstream) -> None:
        self.upstream = upstream
        self.events: list[Event] = []
        self._opened: list[Transport] = []
        self.transport = self.to(upstream.base_url)

    def to(
        self,
        base_url: str,
        *,
        profile: str = "openai",
        clock: Clock | None = None,
        slots: int = 4,
        tls: ssl.SSLContext | bool = True,
        headers: dict[str, str] | None = None,
        first_answer_s: float = 0.0,
        **settings: Any,
    ) -> Transport:
        """Make a transport to somewhere, closed with the play."""
        transport = Transport(
            "u",
            OpenAI("u", PROFILES[profile], base_url=base_url, api_key=KEY, headers=headers or {}),
            TransportSettings(**settings),
            slots=slots,
            keepalive_s=30.0,
            first_answer_s=first_answer_s,
            tls=tls,
            clock=clock or MonotonicClock(),
            observe=self.events.append,
        )
        self._opened.append(transport)
        return transport

    async def fails(self, transport: Transport | None = None, batch: Batch | None = None) -> errors.EmbeddingError:
        """See a call fail; returns the error, which shows nothing secret and is told of by its code."""
        with pytest.raises(errors.EmbeddingError) as caught:
            async with asyncio.timeout(20):
                await (transport or self.transport)(batch or soon())
        assert KEY not in str(caught.value)
        assert self.codes[-1] == caught.value.label
        return caught.value

    async def seen(self, count: int = 1) -> None:
        """Wait until the upstream has so many requests."""
        await until(lambda: len(self.upstream.seen) >= count)

    @property
    def request_ids(self) -> list[str]:
        """The X-Request-Id of each request that the upstream has seen."""
        return [CIMultiDict(seen.headers)["X-Request-Id"] for seen in self.upstream.seen]

    @property
    def codes(self) -> list[str]:
        return [event.code for event in self.events if isinstance(event, AttemptFinished)]

    @property
    def stale(self) -> int:
        return sum(isinstance(event, ConnectionStale) for event in self.events)

    async def aclose(self) -> None:
        for transport in self._opened:
            await transport.aclose()


@pytest.fixture
async def play() -> AsyncIterator[Play]:
    async with FakeUpstream() as upstream:
        play = Play(upstream)
        yield play
        await play.aclose()


async def until(condition: Callable[[], bool]) -> None:
    """Turn the loop until something is so; fails the test when it is not within ten seconds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


def soon(inputs: tuple[str, ...] = ("one", "two"), **changes: Any) -> Batch:
    """Make a batch with plenty of time by the real clock."""
    return make_batch(inputs, now=MonotonicClock().now() + 50, **changes)


def rows(*inputs: str, width: int = 8) -> tuple[bytes, ...]:
    return tuple(vector(item, width).tobytes() for item in inputs)


def with_vectors(*vectors: Any) -> Fault:
    """Answer with these in place of the right ones, in order."""
    data = [{"object": "embedding", "index": index, "embedding": v} for index, v in enumerate(vectors)]
    return Fault(body={"object": "list", "data": data})


# --- answers ---


@pytest.mark.parametrize(("profile", "encoding"), [("openai", "base64"), ("generic", None)])
async def test_answer_in_either_encoding(play: Play, profile: str, encoding: str | None) -> None:
    """Base64 and numbers come out as the same rows."""
    transport = play.to(play.upstream.base_url, profile=profile)
    answer = await transport(soon())

    assert answer.rows == rows("one", "two")
    assert (answer.tokens, answer.upstream, answer.attempts) == (6, "u", 1)
    assert answer.upstream_s > 0
    assert play.upstream.seen[0].body.get("encoding_format") == encoding


async def test_server_ignores_the_encoding(play: Play) -> None:
    """A server that answers numbers where base64 was asked for is understood."""
    async with FakeUpstream(has_base64=False) as upstream:
        answer = await play.to(upstream.base_url)(soon())

    assert answer.rows == rows("one", "two")


async def test_answer_out_of_order(play: Play) -> None:
    """Each input gets the vector of its index."""
    play.upstream.script = [Fault(change=lambda answer: answer | {"data": answer["data"][::-1]})]
    answer = await play.transport(soon(("one", "two", "three")))

    assert answer.rows == rows("one", "two", "three")


async def test_limits_beside_an_answer(play: Play) -> None:
    """What the upstream says about its limits goes with the rows."""
    play.upstream.script = [Fault(headers={"X-RateLimit-Limit-Requests": "60"})]
    stated, silent = await play.transport(soon()), await play.transport(soon())

    assert stated.hints == RateHints(requests_per_minute=60)
    assert silent.hints is None


async def test_success_is_told(play: Play) -> None:
    """The end of an exchange is told once, with its inputs and tokens, and nothing else is."""
    await play.transport(soon())
    event = play.events[0]

    assert isinstance(event, AttemptFinished)
    assert (event.upstream, event.code, event.inputs, event.tokens) == ("u", "", 2, 6)
    assert event.seconds > 0
    assert len(play.events) == 1


async def test_what_the_upstream_sees(play: Play) -> None:
    """The request carries the key, says that it is JSON, and goes to /embeddings; one batch is one request."""
    await play.transport(soon(traceparent="00-ab-cd-01"))
    (seen,) = play.upstream.seen

    assert seen.path == "/v1/embeddings"
    assert seen.headers["Authorization"] == f"Bearer {KEY}"
    assert seen.headers["Content-Type"] == "application/json"
    assert seen.headers["traceparent"] == "00-ab-cd-01"
    assert seen.inputs == ["one", "two"]


async def test_request_ids(play: Play) -> None:
    """No two attempts have the same X-Request-Id, not even those of two transports."""
    other = play.to(play.upstream.base_url)
    await asyncio.gather(*(t(soon()) for t in (play.transport, other) for _ in range(5)))

    assert len(set(play.request_ids)) == len(play.request_ids) == 10


# --- wrong answers ---


def repeated(answer: dict[str, Any]) -> dict[str, Any]:
    answer["data"][1]["index"] = 0
    return answer


def base64_of(*numbers: float) -> str:
    return base64.b64encode(numpy.array(numbers, dtype="<f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(change=repeated), "indexes of 2 vectors"),
        (Fault(change=lambda answer: answer | {"data": answer["data"][:1]}), "1 vectors for 2 inputs"),
        (Fault(change=lambda answer: answer | {"data": answer["data"][1:]}), "indexes of 1 vectors"),
        (with_vectors([1.0] * 8, [1.0] * 8, [1.0] * 8), "3 vectors for 2 inputs"),
        (with_vectors([1.0] * 8, [1.0] * 7), "vector 1 has 7 numbers instead of 8"),
        (with_vectors([1.0] * 8, None), "vector 1 is null"),
        (with_vectors([1.0] * 8, [None] * 8), "vector 1 holds something that is no number"),
        (with_vectors([1.0] * 8, [0.0] * 8), "vector 1 is all zero"),
        (with_vectors([1.0] * 8, [1e39] * 8), "vector 1 holds NaN or infinity"),
        (with_vectors([1.0] * 8, base64_of(*[float("nan")] * 8)), "vector 1 holds NaN or infinity"),
        (with_vectors([1.0] * 8, "not base64!"), "vector 1 is not valid base64"),
        (with_vectors([1.0] * 8, ["x"] * 8), "vector 1 holds something that is no number"),
        (Fault(body=b"<html>welcome</html>"), "200 without a list of embeddings"),
        (Fault(body=b'{"data": [{"index": 0, "embedding": [NaN]}]}'), "200 without a list of embeddings"),
        (Fault(body=b""), "200 without a list of embeddings"),
        (Fault(body=[]), "200 without a list of embeddings"),
    ],
)
async def test_wrong_answer(play: Play, fault: Fault, words: str) -> None:
    """A 200 is looked through: nothing wrong gets past the gate."""
    play.upstream.script = [fault]
    error = await play.fails(batch=soon(width=8))

    assert type(error) is errors.BadVectors
    assert words in error.message
    assert play.codes == ["bad_vectors"]


@pytest.mark.parametrize(
    ("fault", "index"),
    [
        (with_vectors([1.0] * 8, None), 1),
        (with_vectors(base64_of(*[0.0] * 8), [1.0] * 8), 0),
        (with_vectors([1.0] * 7, [1.0] * 7), None),
        (with_vectors([1.0] * 8), None),
    ],
)
async def test_row_that_is_to_blame(play: Play, fault: Fault, index: int | None) -> None:
    """Which row is bad is told, where it is a single one, beside the upstream's name."""
    play.upstream.script = [fault]
    error = await play.fails(batch=soon(width=8))

    assert isinstance(error, errors.BadVectors)
    assert error.index == index
    assert error.message.startswith("upstream 'u': ")


@pytest.mark.parametrize(
    ("fault", "error_class", "code"),
    [
        (Fault(body={"error": {"message": "no provider"}}), errors.UpstreamFailed, "upstream_failed"),
        (Fault(status=500, body={}), errors.UpstreamFailed, "upstream_failed"),
        (Fault(status=429, body={}, headers={"Retry-After": "7"}), errors.RateLimited, "rate_limit_exceeded"),
        (Fault(status=401, body={"error": f"bad key {KEY}"}), errors.UpstreamDenied, "upstream_denied"),
        (Fault(status=400, body={"error": {"message": "no", "code": "c-1"}}), errors.UpstreamRefused, "c-1"),
    ],
)
async def test_upstream_says_no(play: Play, fault: Fault, error_class: type[errors.EmbeddingError], code: str) -> None:
    """An answer that is an error comes out as the error that it is, told of by a label of ours."""
    play.upstream.script = [fault]
    error = await play.fails()

    assert type(error) is error_class
    assert error.code == code
    assert play.codes == [error_class.code]
    assert error.retry_after_s == (7.0 if code == "rate_limit_exceeded" else None)


async def test_healthy_again(play: Play) -> None:
    """After whatever answer the next call is served, over the same connection."""
    play.upstream.script = [Fault(status=500, body={}), Fault(body=b"nonsense"), Fault(status=429, body={})]
    for _ in range(3):
        await play.fails()
    answer = await play.transport(soon())

    assert answer.rows == rows("one", "two")
    assert len(play.upstream.connections) == 1


# --- large answers ---

COUNT, WIDTH = 40, 1536
"""Of which the numbers are 1.3 MB of JSON."""


@pytest.mark.parametrize("has_base64", [False, True], ids=["numbers", "base64"])
@pytest.mark.parametrize("order", [1, -1], ids=["in order", "backwards"])
async def test_large_answer(play: Play, has_base64: bool, order: int) -> None:
    """What is read in several turns comes out like what is read in one."""
    texts = tuple(f"text {n}" for n in range(COUNT))
    async with FakeUpstream(width=WIDTH, has_base64=has_base64) as upstream:
        upstream.script = [Fault(change=lambda answer: answer | {"data": answer["data"][::order]})]
        answer = await play.to(upstream.base_url)(soon(texts))

    assert answer.rows == rows(*texts, width=WIDTH)
    assert answer.tokens == sum(map(len, texts))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (None, "is null"),
        ([], "is no list of numbers"),
        ([0.0] * WIDTH, "is all zero"),
        ([1e39] * WIDTH, "holds NaN or infinity"),
        ([1.0] * (WIDTH - 1), f"has {WIDTH - 1} numbers instead of {WIDTH}"),
        ([1.0], f"has 1 numbers instead of {WIDTH}"),
        ([True] * WIDTH, "holds something that is no number"),
        ([[1.0] * WIDTH], "holds something that is no number"),
        ([[7]], "holds something that is no number"),
        ("not base64!", "is not valid base64"),
    ],
    ids=lambda value: str(value)[:24],
)
@pytest.mark.parametrize("at", [0, COUNT - 1])
async def test_large_answer_with_a_bad_row(play: Play, bad: Any, words: str, at: int) -> None:
    """A flaw is told alike however large the answer is in which it stands."""
    vectors: list[Any] = [[1.0 + n / 7] * WIDTH for n in range(COUNT)]
    vectors[at] = bad
    play.upstream.script = [with_vectors(*vectors)]
    error = await play.fails(batch=soon(tuple("x" * COUNT), width=WIDTH))

    assert isinstance(error, errors.BadVectors)
    assert (error.index, error.message) == (at, f"upstream 'u': vector {at} {words}")


async def test_large_answer_that_is_none(play: Play) -> None:
    """An answer that is cut off in its numbers, however many there are, is no answer."""
    play.upstream.script = [Fault(body=b'{"data":[{"index":0,"embedding":[' + b"1.5," * TURN_BYTES)]
    error = await play.fails()

    assert type(error) is errors.BadVectors
    assert "200 without a list of embeddings" in error.message


@pytest.mark.parametrize("indent", [None, 2])
async def test_others_get_their_turn(indent: int | None) -> None:
    """While the vectors are taken out of a large answer, others have the loop after each half megabyte."""
    vectors = [[n + k / WIDTH for k in range(WIDTH)] for n in range(1, 100)]
    body = json.dumps({"embeddings": vectors, "model": "m"}, indent=indent).encode()
    turns = 0
    reading = asyncio.create_task(thinned(body))
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    left, found = await reading

    assert turns > len(body) / TURN_BYTES * 0.9 > 4
    assert json.loads(left) == {"embeddings": [[n] for n in range(99)], "model": "m"}
    assert found == [numpy.array(vector, dtype="<f4").tobytes() for vector in vectors]


@pytest.mark.parametrize("body", [b"", b"{}", b'{"data":["AAAA"]}', b'{"shape":[[1],[2]],"data":[[1,2]]}', b"[[1,2"])
async def test_nothing_is_taken_out(body: bytes) -> None:
    """Where there are no arrays of numbers, or others beside them, an answer is left as it is."""
    assert await thinned(body) == (body, [])


# --- broken connections ---


async def test_connection_is_reset(play: Play) -> None:
    """A reset on a fresh connection is a failure of the upstream, and the request is not sent again."""
    play.upstream.script = [Fault(reset=True)]
    error = await play.fails()

    assert type(error) is errors.UpstreamFailed
    assert error.message == "upstream 'u': it closed the connection before it answered"
    assert len(play.upstream.seen) == 1
    assert play.stale == 0


async def test_body_is_cut(play: Play) -> None:
    """An answer that breaks off is a failure, also on a reused connection, where it had begun."""
    await play.transport(soon())
    play.upstream.script = [Fault(cut_body=True)]
    error = await play.fails()

    assert type(error) is errors.UpstreamFailed
    assert error.message == "upstream 'u': its answer broke off"
    assert len(play.upstream.seen) == 2
    assert play.stale == 0


async def test_body_in_an_encoding_that_it_is_not(play: Play) -> None:
    """A body that cannot be unpacked has broken off."""
    play.upstream.script = [Fault(body=b"plain", headers={"Content-Encoding": "gzip"})]
    error = await play.fails()

    assert type(error) is errors.UpstreamFailed
    assert error.message == "upstream 'u': its answer broke off"


async def test_answer_is_no_http(play: Play) -> None:
    """What is no HTTP is a failure, told without a word of what was sent."""
    play.upstream.script = [Fault(raw=b"SSH-2.0-OpenSSH_9.9\r\n\r\n")]
    error = await play.fails()

    assert type(error) is errors.UpstreamFailed
    assert "SSH" not in error.message
    assert error.message.startswith("upstream 'u': ")


async def test_nobody_listens(play: Play) -> None:
    """A refused connection names the address and the system's reason."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        error = await play.fails(play.to(f"http://127.0.0.1:{port}/v1"))

    assert type(error) is errors.UpstreamFailed
    assert error.message == f"upstream 'u': no connection to 127.0.0.1:{port}: Connection refused"


async def test_name_that_nobody_knows(play: Play) -> None:
    """An unknown host name is named; this one is too long to be looked up anywhere."""
    host = ".".join(["a" * 60] * 5) + ".invalid"
    error = await play.fails(play.to(f"http://{host}/v1"))

    assert type(error) is errors.UpstreamFailed
    assert error.message == f"upstream 'u': its name '{host}' is not known"


async def test_nobody_accepts(play: Play) -> None:
    """Where no connection comes about in `connect_timeout_s`, the attempt ends, however long it might take."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        transport = play.to(f"http://127.0.0.1:{full.getsockname()[1]}/v1", connect_timeout_s=0.05)
        error = await play.fails(transport)

    assert type(error) is errors.UpstreamTimeout
    assert "no connection within 0.05 s" in error.message


async def test_answer_at_its_bound(play: Play) -> None:
    """An answer as large as allowed is read; one byte more is refused, whatever length it claims to have."""
    bound = 4096
    transport = play.to(play.upstream.base_url, max_answer_bytes=bound)
    spelled = json.dumps(play.upstream.answer({"input": ["one", "two"], "model": "m"})).encode()
    play.upstream.script = [
        Fault(body=spelled + b" " * (bound - len(spelled))),
        Fault(body=spelled + b" " * (bound + 1 - len(spelled))),
    ]
    answer = await transport(soon())
    error = await play.fails(transport)

    assert answer.rows == rows("one", "two")
    assert type(error) is errors.BadVectors
    assert f"more than {bound} bytes" in error.message


async def test_answer_too_large_by_far(play: Play) -> None:
    """A huge answer is not read to its end, and the next call is served."""
    transport = play.to(play.upstream.base_url, max_answer_bytes=1024)
    play.upstream.script = [Fault(body=b" " * 8_000_000)]
    await play.fails(transport)
    answer = await transport(soon())

    assert answer.rows == rows("one", "two")


async def test_redirect_is_not_followed(play: Play) -> None:
    """A redirect would carry the key to whoever it names; nobody is asked there."""
    async with FakeUpstream() as other:
        for status in (301, 302, 307, 308):
            play.upstream.script = [Fault(status=status, body={}, headers={"Location": other.base_url + "/embeddings"})]
            error = await play.fails()
            assert type(error) is errors.UpstreamFailed
            assert f"HTTP {status}" in error.message

        assert other.seen == []
        assert len(play.upstream.seen) == 4


# --- stale connections ---


async def test_upstream_closes_an_idle_connection(play: Play) -> None:
    """A pooled connection that the upstream has just closed costs a second sending, not a failure."""
    async with FakeUpstream(keepalive_s=0.01) as upstream:
        transport = play.to(upstream.base_url)
        await transport(soon())
        (connection,) = upstream.connections
        await until(connection.is_closing)
        answer = await transport(soon())

    assert answer.rows == rows("one", "two")
    assert play.stale == 1
    assert play.codes == ["", ""]
    assert len(upstream.seen) == 2


async def test_connection_breaks_when_it_is_used_again(play: Play) -> None:
    """A reset instead of an answer on a reused connection counts as stale, and the second sending has its own id."""
    await play.transport(soon())
    play.upstream.script = [Fault(reset=True)]
    answer = await play.transport(soon())

    assert answer.rows == rows("one", "two")
    assert play.stale == 1
    assert len(set(play.request_ids)) == len(play.upstream.seen) == 3


async def test_request_id_of_the_settings(play: Play) -> None:
    """Which connections are fresh is known even where a header of the settings looks like our request id."""
    transport = play.to(play.upstream.base_url, headers={"x-request-id": "always the same"})
    play.upstream.script = [Fault(reset=True), Fault(), Fault(reset=True)]
    error = await play.fails(transport)
    await transport(soon())
    answer = await transport(soon())

    assert type(error) is errors.UpstreamFailed
    assert answer.rows == rows("one", "two")
    assert play.stale == 1
    assert len(play.upstream.seen) == 4


async def test_stale_connection_beside_one_that_opens(play: Play) -> None:
    """Of two calls at a time, one on a reused and one on a fresh connection, only the reused one's is sent again."""
    await play.transport(soon())
    gate = asyncio.Event()
    play.upstream.script = [Fault(wait_for=gate, reset=True), Fault(wait_for=gate, reset=True)]
    calls = [asyncio.create_task(play.transport(soon())) for _ in range(2)]
    await play.seen(3)
    gate.set()
    first, second = await asyncio.gather(*calls, return_exceptions=True)

    assert isinstance(first, Answer)
    assert isinstance(second, errors.UpstreamFailed)
    assert play.stale == 1
    assert len(play.upstream.seen) == 4


async def test_all_pooled_connections_are_stale(play: Play) -> None:
    """Where one pooled connection is stale, its neighbours are left alone too: the call goes out on a fresh one."""
    gate = asyncio.Event()
    play.upstream.script = [Fault(wait_for=gate)] * 3
    calls = asyncio.gather(*(play.transport(soon()) for _ in range(3)))
    await play.seen(3)
    gate.set()
    await calls
    play.upstream.script = [Fault(reset=True)]
    await play.transport(soon())
    await play.transport(soon())

    assert len(play.upstream.seen) == 6
    assert len(play.upstream.connections) == 4
    assert play.stale == 1


async def test_neighbour_of_a_stale_connection_is_not_cut_off(play: Play) -> None:
    """A call that is under way on the abandoned pool gets its answer, and the pool is closed behind it."""
    gate = asyncio.Event()
    play.upstream.script = [Fault(wait_for=gate), Fault(), Fault(reset=True)]
    slow = asyncio.create_task(play.transport(soon()))
    await play.seen(1)
    await play.transport(soon())
    await play.transport(soon())
    gate.set()
    answer = await slow

    assert answer.rows
    assert play.stale == 1


async def test_fresh_connection_after_a_stale_one_breaks(play: Play) -> None:
    """Where the second sending breaks on a fresh connection, that is the upstream's failure."""
    await play.transport(soon())
    play.upstream.script = [Fault(reset=True), Fault(reset=True)]
    error = await play.fails()

    assert error.message == "upstream 'u': it closed the connection before it answered"
    assert play.stale == 1
    assert len(play.upstream.seen) == 3


async def test_upstream_has_gone_since(play: Play) -> None:
    """Where the upstream closes its pooled connections and is gone, the refused connection is what is told."""
    async with FakeUpstream() as upstream:
        transport = play.to(upstream.base_url)
        await transport(soon())
    error = await play.fails(transport)

    assert type(error) is errors.UpstreamFailed
    assert error.message.endswith("Connection refused")


# --- time ---


async def test_upstream_hangs(play: Play) -> None:
    """An attempt ends after `attempt_timeout_s`, and that is the upstream's failure."""
    clock = HandClock()
    play.upstream.script = [Fault(hang=True)]
    transport = play.to(play.upstream.base_url, clock=clock, attempt_timeout_s=30.0)
    call = asyncio.create_task(play.fails(transport, make_batch(deadline=clock.now() + 100)))
    await play.seen()
    await clock.advance(29.9)
    was_done = call.done()
    await clock.advance(0.1)
    error = await call
    await until(lambda: play.upstream.inside == 0)

    assert not was_done
    assert type(error) is errors.UpstreamTimeout
    assert error.message == "upstream 'u' did not answer within 30 s"


async def test_upstream_that_loads_its_model(play: Play) -> None:
    """The first answer may take longer, since a model is loaded for it; after a good one no attempt may."""
    clock = HandClock()
    play.upstream.script = [Fault(hang=True), Fault(), Fault(hang=True)]
    transport = play.to(play.upstream.base_url, clock=clock, attempt_timeout_s=30.0, first_answer_s=300.0)

    waits = []
    for _ in range(2):
        start = clock.now()
        call = asyncio.create_task(play.fails(transport, make_batch(deadline=start + 1000)))
        await play.seen()
        while not call.done():
            await clock.advance(10.0)
        waits.append(clock.now() - start)
        assert type(await call) is errors.UpstreamTimeout
        if len(waits) == 1:
            await transport(make_batch(deadline=clock.now() + 100))

    assert waits == [300.0, 30.0]


@pytest.mark.parametrize("clock_class", [HandClock, HastyClock])
@pytest.mark.parametrize(
    ("deadline_s", "attempt_timeout_s", "error_class"),
    [
        (1.0, 30.0, errors.DeadlineExceeded),
        (1.99, 30.0, errors.DeadlineExceeded),
        (2.03, 30.0, errors.UpstreamTimeout),
        (20.0, 30.0, errors.UpstreamTimeout),
        (3.0, 1.0, errors.UpstreamTimeout),
        (0.9, 1.0, errors.DeadlineExceeded),
    ],
)
async def test_who_was_impatient(
    play: Play,
    clock_class: type[HandClock],
    deadline_s: float,
    attempt_timeout_s: float,
    error_class: type[errors.EmbeddingError],
) -> None:
    """A deadline that leaves the upstream no fair time is the caller's; else the upstream was slow."""
    clock = clock_class()
    play.upstream.script = [Fault(hang=True)]
    transport = play.to(play.upstream.base_url, clock=clock, attempt_timeout_s=attempt_timeout_s)
    call = asyncio.create_task(play.fails(transport, make_batch(deadline=clock.now() + deadline_s)))
    await play.seen()
    await clock.advance(min(deadline_s, attempt_timeout_s))
    error = await call

    assert type(error) is error_class
    assert clock.now() <= 1000 + deadline_s


@pytest.mark.parametrize(("deadline_s", "error_class"), [(0.4, errors.DeadlineExceeded), (0.6, errors.UpstreamTimeout)])
async def test_fair_time_of_a_fast_upstream(
    play: Play, deadline_s: float, error_class: type[errors.EmbeddingError]
) -> None:
    """An upstream that usually takes 0.1 s has had its fair time after five times that: its breaker hears of it."""
    clock = HandClock()
    gate = asyncio.Event()
    play.upstream.script = [Fault(wait_for=gate), Fault(hang=True)]
    transport = play.to(play.upstream.base_url, clock=clock)
    good = asyncio.create_task(transport(make_batch(deadline=clock.now() + 10)))
    await play.seen(1)
    await clock.advance(0.1)
    gate.set()
    await good
    call = asyncio.create_task(play.fails(transport, make_batch(deadline=clock.now() + deadline_s)))
    await play.seen(2)
    await clock.advance(deadline_s)

    assert type(await call) is error_class


async def test_attempt_ends_before_the_deadline(play: Play) -> None:
    """An attempt leaves a little of the caller's time for the answer."""
    clock = HandClock()
    play.upstream.script = [Fault(hang=True)]
    transport = play.to(play.upstream.base_url, clock=clock)
    call = asyncio.create_task(play.fails(transport, make_batch(deadline=clock.now() + 1)))
    await play.seen()
    await clock.advance(0.979)
    was_done = call.done()
    await clock.advance(0.002)
    await call

    assert not was_done
    event = play.events[-1]
    assert isinstance(event, AttemptFinished)
    assert event.seconds == pytest.approx(0.98)


@pytest.mark.parametrize(
    ("left_s", "is_sent"), [(-1.0, False), (0.0, False), (0.01, False), (0.02, False), (0.03, True)]
)
async def test_time_that_is_left(play: Play, left_s: float, is_sent: bool) -> None:
    """Nothing is sent for a caller whose time is as good as over."""
    clock = HandClock(1024.0)
    transport = play.to(play.upstream.base_url, clock=clock)
    call = asyncio.create_task(transport(make_batch(["one"], deadline=clock.now() + left_s)))
    (end,) = await asyncio.gather(call, return_exceptions=True)

    assert isinstance(end, Answer if is_sent else errors.DeadlineExceeded)
    assert len(play.upstream.seen) == is_sent
    assert play.codes == ["" if is_sent else "deadline_exceeded"]


async def test_caller_leaves(play: Play) -> None:
    """A cancelled exchange is told of as ignored, its connection is given up, and the next call is served."""
    play.upstream.script = [Fault(hang=True)]
    call = asyncio.create_task(play.transport(soon()))
    await play.seen()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: play.upstream.inside == 0)
    answer = await play.transport(soon())

    assert answer.rows == rows("one", "two")
    assert play.codes == ["ignored", ""]
    assert len(play.upstream.connections) == 2


# --- the pool ---


async def test_connections_are_reused(play: Play) -> None:
    """Calls one after the other need one connection."""
    for _ in range(5):
        await play.transport(soon())

    assert len(play.upstream.connections) == 1
    assert play.stale == 0


async def test_pool_is_bounded(play: Play) -> None:
    """There are as many connections as slots, whatever is asked."""
    gate = asyncio.Event()
    play.upstream.always = Fault(wait_for=gate)
    transport = play.to(play.upstream.base_url, slots=2)
    calls = [asyncio.create_task(transport(soon())) for _ in range(6)]
    await play.seen(2)
    for _ in range(50):
        await asyncio.sleep(0)
    inside = play.upstream.inside
    gate.set()
    await asyncio.gather(*calls)

    assert inside == play.upstream.most_inside == 2
    assert len(play.upstream.connections) == 2


async def test_close(play: Play) -> None:
    """Closing closes the pool's connections and leaves nothing to complain about."""
    transport = play.to(play.upstream.base_url)
    await transport(soon())
    (connection,) = play.upstream.connections
    await transport.aclose()
    await until(connection.is_closing)
    del transport
    gc.collect()

    assert play.codes == [""]


async def test_close_before_any_call(play: Play) -> None:
    """A transport that was never used has nothing to close; closing twice does no harm."""
    transport = play.to(play.upstream.base_url)
    await transport.aclose()
    await transport.aclose()

    assert transport.snapshot() == {"keepalive_s": 30.0, "slots": 4}
    assert play.upstream.connections == set()


# --- proxies and TLS ---


async def test_proxy_of_the_settings(play: Play) -> None:
    """With `http_proxy` the upstream is reached through it, whatever the environment says."""
    transport = play.to("http://upstream.invalid/v1", http_proxy=f"http://127.0.0.1:{play.upstream.port}")
    answer = await transport(soon())

    assert answer.rows == rows("one", "two")
    assert play.upstream.seen[0].headers["Host"] == "upstream.invalid"


async def test_proxy_of_the_environment(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is somebody else's business: a transport goes where its settings say."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://proxy.invalid:1")
    answer = await play.transport(soon())

    assert answer.rows == rows("one", "two")


def server_tls(*, wants_certificate: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    if wants_certificate:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(PEM)
    return context


async def test_certificate_that_is_trusted(play: Play) -> None:
    """With `ca_file` a private authority's certificate is accepted."""
    async with FakeUpstream(tls=server_tls()) as upstream:
        transport = play.to(upstream.base_url, tls=tls_context(TransportSettings(ca_file=PEM)))
        answer = await transport(soon())
        await transport.aclose()

    assert answer.rows == rows("one", "two")


async def test_certificate_of_a_stranger(play: Play) -> None:
    """Without it the certificate is not accepted, nothing is sent, and the message names the setting."""
    async with FakeUpstream(tls=server_tls()) as upstream:
        error = await play.fails(play.to(upstream.base_url, tls=tls_context(TransportSettings())))

    assert type(error) is errors.UpstreamFailed
    assert "TLS" in error.message and "transport.ca_file" in error.message
    assert upstream.seen == []


async def test_tls_to_a_server_without(play: Play) -> None:
    """TLS with a server that speaks none fails as TLS."""
    error = await play.fails(play.to(f"https://127.0.0.1:{play.upstream.port}/v1"))

    assert type(error) is errors.UpstreamFailed
    assert "TLS" in error.message


async def test_client_certificate(play: Play) -> None:
    """A client certificate is shown to the server that wants one."""
    shown = tls_context(TransportSettings(ca_file=PEM, client_cert_file=PEM, client_key_file=PEM))
    async with FakeUpstream(tls=server_tls(wants_certificate=True)) as upstream:
        transport = play.to(upstream.base_url, tls=shown)
        answer = await transport(soon())
        await transport.aclose()

    assert answer.rows == rows("one", "two")


async def test_client_certificate_that_is_missing(play: Play) -> None:
    """Without the certificate that it wants, the server breaks off."""
    async with FakeUpstream(tls=server_tls(wants_certificate=True)) as upstream:
        transport = play.to(upstream.base_url, tls=tls_context(TransportSettings(ca_file=PEM)))
        error = await play.fails(transport)
        await transport.aclose()

    assert type(error) is errors.UpstreamFailed
    assert upstream.seen == []


def test_tls_settings() -> None:
    """Where the settings say nothing, aiohttp's own default counts; a missing file is told at once."""
    context = tls_context(TransportSettings(client_cert_file=PEM))

    assert tls_context(TransportSettings()) is True
    assert isinstance(context, ssl.SSLContext)
    assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
    for settings in (TransportSettings(ca_file="/nowhere.pem"), TransportSettings(client_cert_file="/nowhere.pem")):
        with pytest.raises(OSError):
            tls_context(settings)
