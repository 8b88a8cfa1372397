"""
HTTP/1.1 on plain sockets, for threads that wait: no event loop, no helper threads.

As much of the protocol as a sidecar, and what may stand in front of one, speaks: a status line, headers, and a body by
length, in chunks, or until the end. http.client of the standard library has a timeout for each read, so that an answer
that drips has no end, and bounds nothing; and it takes 67 µs of CPU for what takes 45 here.

Source: RFC 9112, sections 4 to 7 and 9.
"""

from __future__ import annotations

import queue
import re
import select
import socket
import time

from rag_adapter.address import Address, cut_off, insist_on_ours, unreachable
from rag_adapter.errors import EmbeddingFailed
from rag_adapter.tally import Tally
from rag_adapter.wire import MAX_ANSWER_BYTES, Answer

IDLE_S = 60.0
"""An idle connection is kept this long; the sidecar keeps it 95 s, so it is us who close it."""

_READ_BYTES = 256 * 1024
_MAX_HEAD_BYTES = 64 * 1024
_STATUS = re.compile(rb"HTTP/1\.([0-9]) ([0-9]{3})(?: |\r|$)")
_SIZE = re.compile(rb"[0-9a-fA-F]{1,15}")


class Connection:
    """One connection; used by one thread at a time."""

    def __init__(self, address: Address, deadline: float) -> None:
        """
        Connect.

        Raises:
            SidecarUnavailable: says why not, and what to do.
            TimeoutError: the deadline came.
        """
        self._address = address
        self._buffer = bytearray()
        self.is_reusable = True
        """Whether a further request may be sent once the answer is read."""
        self.idle_since = 0.0
        insist_on_ours(address)
        try:
            self._socket = _connected(address, _left_s(deadline))
        except TimeoutError as error:
            if error.errno is None:
                raise
            raise unreachable(address, error) from error  # the system's own patience with a silent host
        except OSError as error:
            raise unreachable(address, error) from error

    def is_quiet(self) -> bool:
        """Whether nothing has come since the last answer: neither an end, nor what would pass for the next answer."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not self._buffer and not poll.poll(0)

    def fileno(self) -> int:
        """For poll(): readable means that the answer begins, or that there will be none."""
        return self._socket.fileno()

    def send(self, request: bytes, deadline: float) -> None:
        """
        Send a request.

        Raises:
            SidecarUnavailable: cut off.
            TimeoutError: the deadline came.
        """
        try:
            self._socket.settimeout(_left_s(deadline))
            self._socket.sendall(request)  # for all of it together, says its documentation
        except TimeoutError:
            raise
        except OSError as error:
            raise cut_off(self._address, error) from error

    def receive(self, deadline: float) -> Answer:
        """
        Read an answer, however slowly it drips, until the deadline.

        Raises:
            SidecarUnavailable: cut off.
            EmbeddingFailed: no HTTP, or too much of it.
            TimeoutError: the deadline came.
        """
        status = 100
        while status < 200:  # interim answers tell nothing here
            status, headers = self._head(deadline)
        return Answer(status, headers, self._body(status, headers, deadline))

    def _head(self, deadline: float) -> tuple[int, dict[str, str]]:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > _MAX_HEAD_BYTES:
                raise self._garbled()
            self._fill(deadline)
        head = bytes(self._buffer[:end])
        del self._buffer[: end + 4]
        first, *lines = head.split(b"\r\n")
        match = _STATUS.match(first)
        if match is None:
            raise self._garbled()
        headers = {}
        for line in lines:
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon:
                raise self._garbled()
            headers[name.lower()] = value.strip()
        options = headers.get("connection", "").lower()
        self.is_reusable = "close" not in options and (match[1] != b"0" or "keep-alive" in options)
        return int(match[2]), headers

    def _body(self, status: int, headers: dict[str, str], deadline: float) -> bytes:
        """The cases, in the order of RFC 9112 §6.3: (1) none; (2) chunks; (3) a length; (4) until the end."""
        if status in (204, 304):
            return b""
        if "transfer-encoding" in headers:
            if headers["transfer-encoding"].lower() != "chunked":
                raise self._garbled()
            return self._chunks(deadline)
        length = headers.get("content-length")
        if length is None:
            return self._rest(deadline)
        if not re.fullmatch(r"[0-9]{1,15}", length):
            raise self._garbled()
        return self._exactly(int(length), deadline)

    def _chunks(self, deadline: float) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            line = self._line(deadline).partition(b";")[0].strip()
            if not _SIZE.fullmatch(line):
                raise self._garbled()
            length = int(line, 16)
            if not length:
                break
            size += length
            self._bound(size)
            chunks.append(self._exactly(length, deadline))
            if self._line(deadline):
                raise self._garbled()
        while self._line(deadline):  # trailers
            pass
        return b"".join(chunks)

    def _line(self, deadline: float) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > _MAX_HEAD_BYTES:
                raise self._garbled()
            self._fill(deadline)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _exactly(self, length: int, deadline: float) -> bytes:
        self._bound(length)
        while len(self._buffer) < length:
            self._fill(deadline)
        found = bytes(self._buffer[:length])
        del self._buffer[:length]
        return found

    def _rest(self, deadline: float) -> bytes:
        self.is_reusable = False
        while self._received(deadline):
            self._bound(len(self._buffer))
        return bytes(self._buffer)

    def _fill(self, deadline: float) -> None:
        if not self._received(deadline):
            raise cut_off(self._address)

    def _received(self, deadline: float) -> int:
        try:
            # What is there already is read after the deadline as well: it came in time, we come late.
            self._socket.settimeout(max(0.0, deadline - time.monotonic()))
            found = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            raise TimeoutError from None
        except TimeoutError:
            raise
        except OSError as error:
            raise cut_off(self._address, error) from error
        self._buffer += found
        return len(found)

    def _bound(self, size: int) -> None:
        if size > MAX_ANSWER_BYTES:
            raise EmbeddingFailed(f"the answer has {size} bytes, the bound is {MAX_ANSWER_BYTES}", code="bad_answer")

    def _garbled(self) -> EmbeddingFailed:
        return EmbeddingFailed(f"what {self._address} answers is no HTTP: is it a sidecar?", code="not_a_sidecar")

    def close(self) -> None:
        self._socket.close()


class Pool:
    """A bounded number of connections; the one that was used last is used first, so that a few suffice for a few."""

    def __init__(self, address: Address, tally: Tally, *, connections: int, bulk_connections: int) -> None:
        self._address = address
        self._tally = tally
        self._connections = connections
        # A queue of permits is a semaphore in C: 0.1 µs; threading.Semaphore is Python: 0.8 µs.
        self._permits = _permits(connections)
        self._bulk_permits = _permits(bulk_connections)
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()

    def take(self, deadline: float, *, is_bulk: bool, can_wait: bool = True) -> Connection | None:
        """
        Return a connection for one request; None if there is none at once and the caller cannot wait.

        Raises:
            SidecarUnavailable: no connection comes about.
            TimeoutError: the deadline came, while connecting or while others had them all.
        """
        try:
            if is_bulk:
                _get(self._bulk_permits, deadline, can_wait=can_wait)
            try:
                _get(self._permits, deadline, can_wait=can_wait)
            except BaseException:  # also what a signal handler raises, such as a job's time limit
                if is_bulk:
                    self._bulk_permits.put(None)
                raise
        except queue.Empty:
            if can_wait:
                raise TimeoutError from None
            return None
        try:
            return self._reused() or self._opened(deadline)
        except BaseException:
            self._give_back(is_bulk=is_bulk)
            raise

    def release(self, connection: Connection, *, is_bulk: bool, is_whole: bool) -> None:
        """
        Take a connection back.

        Args:
            connection: from `take()`.
            is_bulk: as it was taken.
            is_whole: the answer was read to its end; otherwise what comes next belongs to nobody.
        """
        if is_whole and connection.is_reusable and connection in self._open:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            self._drop(connection)
        self._give_back(is_bulk=is_bulk)

    def close_idle(self) -> None:
        """Close what nobody uses at present. Where one connection turns out to be stale, its neighbours are, too."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was faster
                return
            self._drop(connection)

    @property
    def in_use(self) -> int:
        """How many connections are lent at present."""
        return self._connections - self._permits.qsize()

    def close(self) -> None:
        """Close all connections; those that are lent, when they come back."""
        self._open.clear()
        self.close_idle()

    def abandon(self) -> None:
        """Close this process's copies of all connections, in a forked child; the parent's stay open."""
        for connection in tuple(self._open):
            self._drop(connection)

    def _reused(self) -> Connection | None:
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if time.monotonic() - connection.idle_since < IDLE_S and connection.is_quiet():
                return connection
            self._drop(connection)
        return None

    def _opened(self, deadline: float) -> Connection:
        connection = Connection(self._address, deadline)
        self._tally.add("connections_opened")
        self._open.add(connection)
        return connection

    def _drop(self, connection: Connection) -> None:
        self._open.discard(connection)
        connection.close()

    def _give_back(self, *, is_bulk: bool) -> None:
        self._permits.put(None)
        if is_bulk:
            self._bulk_permits.put(None)


def _permits(count: int) -> queue.SimpleQueue[None]:
    permits: queue.SimpleQueue[None] = queue.SimpleQueue()
    for _ in range(count):
        permits.put(None)
    return permits


def _get(permits: queue.SimpleQueue[None], deadline: float, *, can_wait: bool) -> None:
    if can_wait:
        permits.get(timeout=_left_s(deadline))
    else:
        permits.get_nowait()


def _connected(address: Address, left_s: float) -> socket.socket:
    if address.path:
        found = socket.socket(socket.AF_UNIX)
        try:
            found.settimeout(left_s)
            found.connect(address.path)
        except BaseException:
            found.close()
            raise
        return found
    found = socket.create_connection((address.host, address.port), timeout=left_s)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _secured(found, address) if address.is_tls else found


def _secured(plain: socket.socket, address: Address) -> socket.socket:
    import ssl  # 6 ms, for the few who need it

    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=address.host)
    except BaseException:
        plain.close()
        raise


def _left_s(deadline: float) -> float:
    """Return the time left; a socket's timeout of 0 would mean not to wait at all."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s
