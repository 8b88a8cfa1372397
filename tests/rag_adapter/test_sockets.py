"""HTTP/1.1 on plain sockets: what a sidecar, a gateway, and somebody who speaks no HTTP may say."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rag_adapter.address import Address
from rag_adapter.errors import EmbeddingFailed, SidecarUnavailable
from rag_adapter.sockets import IDLE_S, Connection, Pool
from rag_adapter.tally import Tally
from rag_adapter.wire import MAX_ANSWER_BYTES, Answer
from tests.rag_adapter.conftest import socket_folder

FAR_S = 20.0


@contextlib.contextmanager
def peer(say: Callable[[socket.socket], None], connections: int = 1) -> Iterator[Address]:
    """Somebody who listens, takes connections one after the other, and says something on each."""
    with socket_folder() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/s.sock")
        server.listen()

        def serve() -> None:
            for _ in range(connections):
                with server.accept()[0] as taken, contextlib.suppress(OSError):
                    say(taken)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Address(path=f"{folder}/s.sock")
        finally:
            thread.join(FAR_S)


def told(*pieces: bytes, is_reusable: bool | None = None) -> Answer:
    """Return what is read when somebody sends these pieces and hangs up."""

    def say(taken: socket.socket) -> None:
        taken.recv(100)
        for piece in pieces:
            taken.sendall(piece)

    with peer(say) as address:
        deadline = time.monotonic() + FAR_S
        connection = Connection(address, deadline)
        try:
            connection.send(b"GET / HTTP/1.1\r\n\r\n", deadline)
            answer = connection.receive(deadline)
        finally:
            connection.close()
    assert is_reusable is None or connection.is_reusable == is_reusable
    return answer


@pytest.mark.parametrize("size", [1, 7, 1000], ids="pieces of {}".format)
@pytest.mark.parametrize(
    ("whole", "body", "is_reusable"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello", True),
        (b"HTTP/1.1 200\r\ncontent-length:5\r\n\r\nhello", b"hello", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello", b"hello", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello", False),
        (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 5\r\n\r\nhello", b"hello", True),
        (b"HTTP/1.1 200 OK\r\n\r\nhello until the end", b"hello until the end", False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", True),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nA: b\r\n\r\n",
            b"hello",
            True,
        ),
    ],
    ids=["length", "bare", "empty", "close", "1.0", "1.0 kept", "end", "none", "interim", "chunks"],
)
def test_answer_in_pieces(whole: bytes, body: bytes, is_reusable: bool, size: int) -> None:
    """However it is cut on the way, and in each form that HTTP/1.1 has."""
    pieces = [whole[first : first + size] for first in range(0, len(whole), size)]

    answer = told(*pieces, is_reusable=is_reusable)

    assert answer.body == body


def test_headers_of_an_answer() -> None:
    """Names in lower case, values without the blanks around them."""
    answer = told(b"HTTP/1.1 503 Busy\r\nRetry-After:  3 \r\nX-Request-Id: a:b\r\nContent-Length: 2\r\n\r\n{}")

    assert answer.status == 503
    assert answer.headers == {"retry-after": "3", "x-request-id": "a:b", "content-length": "2"}


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfive\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 70_000,
    ],
    ids=lambda said: said[:40].decode(),
)
def test_what_is_no_http(said: bytes) -> None:
    """One clear error, whatever it is; nothing of it is quoted."""
    with pytest.raises(EmbeddingFailed, match="no HTTP") as caught:
        told(said)

    assert caught.value.code == "not_a_sidecar"
    assert "SSH" not in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    ],
    ids=["at once", "in the head", "in the body", "between chunks"],
)
def test_answer_that_is_cut_off(said: bytes) -> None:
    """Wherever it breaks off, it is no answer."""
    with pytest.raises(SidecarUnavailable) as caught:
        told(said)

    assert caught.value.code == "cut_off"


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: %d\r\n\r\n" % (MAX_ANSWER_BYTES + 1),
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (MAX_ANSWER_BYTES + 1),
        b"\r\n" + bytes(MAX_ANSWER_BYTES + 1),
    ],
    ids=["length", "chunk", "end"],
)
def test_answer_over_the_bound(head: bytes) -> None:
    """A length that is stated is believed before it is read; what is not stated is counted."""
    with pytest.raises(EmbeddingFailed, match="the bound"):
        told(b"HTTP/1.1 200 OK\r\n" + head)


@pytest.mark.parametrize("drip", [b"x", b""], ids=["drips", "is silent"])
def test_answer_that_has_no_end(drip: bytes) -> None:
    """The deadline is one instant for all of it, however often a byte comes."""
    is_over = threading.Event()

    def say(taken: socket.socket) -> None:
        taken.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not is_over.wait(0.01):
            taken.sendall(drip)

    with peer(say) as address:
        deadline = time.monotonic() + 0.2
        connection = Connection(address, deadline)
        with pytest.raises(TimeoutError):
            connection.receive(deadline)
        is_over.set()
        connection.close()


def test_peer_that_does_not_read() -> None:
    """Sending has the same deadline."""
    is_over = threading.Event()
    with peer(lambda taken: is_over.wait(FAR_S) and None) as address:
        deadline = time.monotonic() + 0.2
        connection = Connection(address, deadline)
        with pytest.raises(TimeoutError):
            connection.send(bytes(50_000_000), deadline)
        is_over.set()
        connection.close()


def test_deadline_that_has_passed(tmp_path: Path) -> None:
    """Nobody is asked any more."""
    with pytest.raises(TimeoutError):
        Connection(Address(path="/nowhere/s.sock"), time.monotonic() - 1.0)


# --- the pool ---


@contextlib.contextmanager
def pool_of(connections: int, bulk: int = 1) -> Iterator[Pool]:
    """A pool, and somebody who takes its connections and keeps them."""
    with socket_folder() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/s.sock")
        server.listen()
        pool = Pool(Address(path=f"{folder}/s.sock"), Tally(), connections=connections, bulk_connections=bulk)
        yield pool
        pool.close()


def take(pool: Pool, *, is_bulk: bool = False, wait_s: float = FAR_S, can_wait: bool = True) -> Connection | None:
    return pool.take(time.monotonic() + wait_s, is_bulk=is_bulk, can_wait=can_wait)


def lent(pool: Pool, *, is_bulk: bool = False) -> Connection:
    connection = take(pool, is_bulk=is_bulk)
    assert connection is not None
    return connection


def test_last_one_used_is_used_first() -> None:
    """A few connections suffice for a few threads."""
    with pool_of(4) as pool:
        first, second = lent(pool), lent(pool)
        pool.release(first, is_bulk=False, is_whole=True)
        pool.release(second, is_bulk=False, is_whole=True)
        again = lent(pool)
        pool.release(again, is_bulk=False, is_whole=True)

    assert first is not second
    assert again is second


def test_connection_whose_answer_was_not_read() -> None:
    """What comes next on it belongs to nobody, so it is closed."""
    with pool_of(4) as pool:
        first = lent(pool)
        pool.release(first, is_bulk=False, is_whole=False)
        second = lent(pool)
        pool.release(second, is_bulk=False, is_whole=True)

    assert second is not first
    assert first.fileno() == -1


def test_connection_that_has_been_idle_for_long() -> None:
    """The sidecar may close it at any moment, so we do before."""
    with pool_of(4) as pool:
        first = lent(pool)
        pool.release(first, is_bulk=False, is_whole=True)
        first.idle_since -= IDLE_S
        second = lent(pool)
        pool.release(second, is_bulk=False, is_whole=True)

    assert second is not first
    assert first.fileno() == -1


@pytest.mark.parametrize("is_read", [True, False], ids=["read with the answer", "still in the socket"])
def test_connection_with_a_second_answer(is_read: bool) -> None:
    """What nobody has asked for would pass for the answer to the next request: the connection is closed."""
    one = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1"
    gone = threading.Event()

    def say(taken: socket.socket) -> None:
        taken.recv(100)
        taken.sendall(one + one if is_read else one)
        if not is_read:
            taken.recv(1, socket.MSG_PEEK)  # the first one has been read by now
            taken.sendall(one)
        gone.wait(FAR_S)

    with peer(say) as address:
        deadline = time.monotonic() + FAR_S
        connection = Connection(address, deadline)
        connection.send(b"GET / HTTP/1.1\r\n\r\n", deadline)
        answer = connection.receive(deadline)
        was_quiet = connection.is_quiet()
        if not is_read:
            connection.send(b"x", deadline)
            select.select([connection], [], [], FAR_S)
        is_quiet = connection.is_quiet()
        gone.set()
        connection.close()

    assert answer.body == b"1"
    assert (was_quiet, is_quiet) == (not is_read, False)


def test_connection_that_was_closed_over_there() -> None:
    """An idle connection that has ended is not lent again."""
    with peer(lambda taken: None, connections=2) as address:
        pool = Pool(address, Tally(), connections=1, bulk_connections=1)
        first = lent(pool)
        select.select([first], [], [], FAR_S)
        pool.release(first, is_bulk=False, is_whole=True)
        second = lent(pool)
        pool.release(second, is_bulk=False, is_whole=False)

    assert second is not first
    assert first.fileno() == -1


def test_answer_that_is_there_when_its_reader_comes_late() -> None:
    """It came in time, so it counts; what is still to come does not."""
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    for said, is_there in ((whole, True), (whole[:-1], False)):
        gone = threading.Event()

        def say(taken: socket.socket, said: bytes = said, gone: threading.Event = gone) -> None:
            taken.sendall(said)
            gone.wait(FAR_S)

        with peer(say) as address:
            connection = Connection(address, time.monotonic() + FAR_S)
            select.select([connection], [], [], FAR_S)
            with contextlib.nullcontext() if is_there else pytest.raises(TimeoutError):
                assert connection.receive(time.monotonic() - 1).body == b"ok"
            gone.set()
            connection.close()


def test_permit_of_bulk_when_the_wait_is_broken_off() -> None:
    """A job's time limit, raised by a signal's handler, takes no permit with it."""

    class TimeLimit(Exception):
        pass

    def ring(*_: object) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with pool_of(1, bulk=1) as pool:
            held = lent(pool)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(TimeLimit):
                take(pool, is_bulk=True)
            pool.release(held, is_bulk=False, is_whole=True)
            bulk = take(pool, is_bulk=True, can_wait=False)
            assert bulk is not None
            pool.release(bulk, is_bulk=True, is_whole=True)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_bound_of_connections() -> None:
    """Who comes when all are lent waits until its deadline, or is told at once if it cannot wait."""
    with pool_of(2) as pool:
        held = [lent(pool), lent(pool)]
        assert pool.in_use == 2
        assert take(pool, can_wait=False) is None
        with pytest.raises(TimeoutError):
            take(pool, wait_s=0.05)
        for connection in held:
            pool.release(connection, is_bulk=False, is_whole=True)
        assert pool.in_use == 0


def test_bulk_leaves_connections_to_others() -> None:
    """It has a bound of its own, and what it could not get it gives back."""
    with pool_of(2, bulk=1) as pool:
        bulk = lent(pool, is_bulk=True)
        assert take(pool, is_bulk=True, can_wait=False) is None
        query = lent(pool)
        pool.release(bulk, is_bulk=True, is_whole=True)
        other = lent(pool)
        assert take(pool, is_bulk=True, can_wait=False) is None
        pool.release(other, is_bulk=False, is_whole=True)
        pool.release(query, is_bulk=False, is_whole=True)
        bulk = lent(pool, is_bulk=True)
        pool.release(bulk, is_bulk=True, is_whole=True)
        assert pool.in_use == 0


def test_nobody_there_gives_the_permit_back() -> None:
    """A failure to connect does not use the pool up."""
    pool = Pool(Address(path="/nowhere/s.sock"), Tally(), connections=1, bulk_connections=1)
    for _ in range(3):
        with pytest.raises(SidecarUnavailable):
            take(pool, is_bulk=True)

    assert pool.in_use == 0


def test_closed_while_one_is_lent() -> None:
    """It is closed when it comes back; afterwards the pool works as before."""
    with pool_of(2) as pool:
        idle, busy = lent(pool), lent(pool)
        pool.release(idle, is_bulk=False, is_whole=True)
        pool.close()
        assert (idle.fileno(), busy.fileno() >= 0) == (-1, True)
        pool.release(busy, is_bulk=False, is_whole=True)
        assert busy.fileno() == -1
        again = lent(pool)
        pool.release(again, is_bulk=False, is_whole=True)
        assert again.fileno() >= 0


def test_backlog_that_is_full() -> None:
    """A Unix socket says so at once, instead of letting one wait."""
    with socket_folder() as folder, socket.socket(socket.AF_UNIX) as server, contextlib.ExitStack() as stack:
        server.bind(f"{folder}/s.sock")
        server.listen(0)
        with pytest.raises(SidecarUnavailable) as caught:
            for _ in range(9):
                connection = Connection(Address(path=f"{folder}/s.sock"), time.monotonic() + FAR_S)
                stack.callback(connection.close)

    assert caught.value.code == "busy"
