"""
The client for threads: plain blocking calls, no event loop and no threads of its own.

Safe from any thread, also from one whose event loop is running (which then stands still for so long, as in any blocking
call), and across a fork. A call has one connection and one deadline for everything: waiting for a connection,
connecting, sending, reading.
"""

from __future__ import annotations

import random
import select
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from rag_adapter import fork, wire
from rag_adapter.address import silent
from rag_adapter.errors import DeadlineExceeded, EmbeddingError, SidecarUnavailable, Unavailable
from rag_adapter.many import Job, Progress
from rag_adapter.reach import READY_PAUSE_S, READY_TIMEOUT_S, Reach, Tries
from rag_adapter.settings import ClientSettings, client_settings, deadline_of
from rag_adapter.sockets import Connection, Pool
from rag_adapter.tally import Snapshot, Tally
from rag_adapter.trace import traceparent as current_traceparent

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray


class SyncEmbeddingClient:
    """Asks the sidecar for vectors, from any thread. The same names, arguments and errors as `EmbeddingClient`."""

    def __init__(
        self,
        address: str | None = None,
        *,
        model: str | None = None,
        dimensions: int | None = None,
        timeout_s: float = 10.0,
        bulk_timeout_s: float = 60.0,
        priority: wire.Priority | None = None,
        client_name: str | None = None,
        api_key: str | None = None,
        max_connections: int = 8,
        request_texts: int = 256,
        concurrency: int = 4,
    ) -> None:
        """Take the arguments of `EmbeddingClient`; connections are bounded for all threads together."""
        self._settings = client_settings(
            address,
            model=model,
            dimensions=dimensions,
            timeout_s=timeout_s,
            bulk_timeout_s=bulk_timeout_s,
            priority=priority,
            client_name=client_name,
            api_key=api_key,
            max_connections=max_connections,
            request_texts=request_texts,
            concurrency=concurrency,
        )
        self._line = _Line(self._settings)
        fork.in_child(self._forked)

    def __repr__(self) -> str:
        return f"<SyncEmbeddingClient at {self._settings.address}>"

    @overload
    def embed(
        self,
        text: str,
        *,
        model: str | None = None,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        deadline: float | None = None,
        priority: wire.Priority | None = None,
        traceparent: str | None = None,
        as_numpy: Literal[False] = False,
    ) -> list[float]: ...

    @overload
    def embed(
        self,
        text: str,
        *,
        model: str | None = None,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        deadline: float | None = None,
        priority: wire.Priority | None = None,
        traceparent: str | None = None,
        as_numpy: Literal[True],
    ) -> NDArray[float32]: ...

    def embed(
        self,
        text: str,
        *,
        model: str | None = None,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        deadline: float | None = None,
        priority: wire.Priority | None = None,
        traceparent: str | None = None,
        as_numpy: bool = False,
    ) -> list[float] | NDArray[float32]:
        """Return the vector of a text; see `EmbeddingClient.embed`."""
        line = self._line
        try:
            body = wire.spelled(text)
            spec = self._settings.spec(model, dimensions, priority, usual="interactive")
            line.tally.add("texts")
            end = deadline_of(time.monotonic(), timeout_s, deadline, usual_s=self._settings.timeout_s)
            flight = _Flight(line, [body], spec, deadline=end, traceparent=traceparent or current_traceparent())
            items, _ = flight.answer()
            row = wire.row(items[0], spec.dimensions)
            found: list[float] | NDArray[float32] = wire.numpy_row(row) if as_numpy else wire.floats(row)
            return found
        except EmbeddingError as error:
            line.tally.failed(error.code)
            raise

    @overload
    def embed_many(
        self,
        texts: Iterable[str],
        *,
        model: str | None = None,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        deadline: float | None = None,
        priority: wire.Priority | None = None,
        traceparent: str | None = None,
        on_progress: Progress | None = None,
        as_numpy: Literal[False] = False,
    ) -> list[list[float]]: ...

    @overload
    def embed_many(
        self,
        texts: Iterable[str],
        *,
        model: str | None = None,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        deadline: float | None = None,
        priority: wire.Priority | None = None,
        traceparent: str | None = None,
        on_progress: Progress | None = None,
        as_numpy: Literal[True],
    ) -> NDArray[float32]: ...

    def embed_many(
        self,
        texts: Iterable[str],
        *,
        model: str | None = None,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        deadline: float | None = None,
        priority: wire.Priority | None = None,
        traceparent: str | None = None,
        on_progress: Progress | None = None,
        as_numpy: bool = False,
    ) -> list[list[float]] | NDArray[float32]:
        """Return the vectors of any number of texts, in their order; see `EmbeddingClient.embed_many`."""
        line = self._line
        try:
            spec = self._settings.spec(model, dimensions, priority, usual="bulk")
            if timeout_s is not None or deadline is not None:
                deadline = deadline_of(time.monotonic(), timeout_s, deadline, usual_s=0.0)
            given = wire.listed(texts)
            wire.check(given)
            line.tally.add("texts", len(given))
            job = Job(
                given,
                request_texts=self._settings.request_texts,
                width=spec.dimensions,
                as_numpy=as_numpy,
                on_progress=on_progress,
            )
            self._work_off(job, spec, deadline, traceparent or current_traceparent())
            found: list[list[float]] | NDArray[float32] = job.result()
            return found
        except EmbeddingError as error:
            line.tally.failed(error.code)
            raise

    def _work_off(self, job: Job, spec: wire.Spec, deadline: float | None, traceparent: str | None) -> None:
        """
        Keep up to `concurrency` requests under way, each on a connection of its own, and read whichever comes first.

        One request waits for a connection if it has to; the others take one only if it is free at once. Two threads
        that wait for each other's connections would wait forever.
        """
        flights: list[_Flight] = []
        waiting: _Flight | None = None
        try:
            while True:
                while len(flights) < self._settings.concurrency:
                    if waiting is None:
                        first, bodies = next(job.parts, (0, []))
                        if not bodies:
                            break
                        end = time.monotonic() + self._settings.bulk_timeout_s if deadline is None else deadline
                        waiting = _Flight(self._line, bodies, spec, deadline=end, traceparent=traceparent, first=first)
                    if not waiting.begin(can_wait=not flights):
                        break
                    flights.append(waiting)
                    waiting = None
                if not flights:
                    return
                flight = _first_readable(flights)
                items, headers = flight.answer()
                flights.remove(flight)
                job.put(flight.first or 0, flight.rows(items, job), headers.get("x-embedding-space"))
        finally:
            for flight in flights:
                flight.abandon()

    def is_ready(self) -> bool:
        """Whether the sidecar can serve every model of its; false also when nobody answers. Never raises."""
        return self._trouble() is None

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the sidecar is ready; see `EmbeddingClient.wait_until_ready`."""
        end = time.monotonic() + timeout_s
        while (error := self._trouble()) is not None:
            if time.monotonic() + READY_PAUSE_S >= end:
                raise error
            time.sleep(READY_PAUSE_S)

    def _trouble(self) -> EmbeddingError | None:
        """Ask on a connection of its own: all others may be busy for long, and that is no sign of trouble."""
        address, deadline = self._settings.address, time.monotonic() + READY_TIMEOUT_S
        try:
            connection = Connection(address, deadline)
            try:
                request = f"GET /readyz HTTP/1.1\r\nHost: {address.authority}\r\nConnection: close\r\n\r\n"
                connection.send(request.encode(), deadline)
                answer = connection.receive(deadline)
            finally:
                connection.close()
        except EmbeddingError as error:
            return error
        except TimeoutError:
            return silent(address, READY_TIMEOUT_S)
        self._line.reach.found()
        return wire.unready(answer, str(address))

    def snapshot(self) -> Snapshot:
        """Return counts, over all threads."""
        line = self._line
        return line.tally.snapshot(requests_in_flight=line.pool.in_use, texts_waiting=0)

    def close(self) -> None:
        """Close the connections; those in use, when they have their answer. A later call opens new ones."""
        self._line.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forked(self) -> None:
        """Begin anew in a forked child: connections, counts, locks."""
        self._line.pool.abandon()
        reach, self._line = self._line.reach, _Line(self._settings)
        self._line.reach = reach


class _Line:
    """What all requests of a client share."""

    def __init__(self, settings: ClientSettings) -> None:
        address = settings.address
        self.address = address
        self.tally = Tally()
        self.reach = Reach()
        self.rng = random.Random()
        self.pool = Pool(
            address,
            self.tally,
            connections=settings.max_connections,
            bulk_connections=settings.bulk_connections,
        )
        self._usual_headers = wire.usual_headers(settings.client_name, settings.api_key)
        self._opening = f"POST {address.prefix}/embeddings HTTP/1.1\r\nHost: {address.authority}\r\n"

    def request(self, bodies: list[bytes], spec: wire.Spec, left_s: float, traceparent: str | None) -> bytes:
        """Spell a request as it goes over the wire."""
        body = wire.body(bodies, spec)
        headers = wire.headers(self._usual_headers, spec.priority, left_s, traceparent)
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        return f"{self._opening}{lines}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body


class _Flight:
    """One request, until its answer is there: on one connection after the other, if it has to be."""

    def __init__(
        self,
        line: _Line,
        bodies: list[bytes],
        spec: wire.Spec,
        *,
        deadline: float,
        traceparent: str | None,
        first: int | None = None,
    ) -> None:
        """
        Args:
            line: of the client.
            bodies: the texts, spelled.
            spec: how they are to be embedded.
            deadline: the instant until which somebody waits for them.
            traceparent: the caller's trace context.
            first: position of the first text in the app's list; None where the app gave no list.
        """
        self.first = first
        self._line = line
        self._bodies = bodies
        self._spec = spec
        self._is_bulk = spec.priority == "bulk"
        self.deadline = deadline
        self._traceparent = traceparent
        self._tries = Tries(line.reach, self._is_bulk, line.rng)
        self._connection: Connection | None = None
        self._failed: SidecarUnavailable | TimeoutError | None = None
        """How `begin()` ended, until `answer()` deals with it."""
        self._trouble: SidecarUnavailable | Unavailable | None = None
        """Why it has to be asked again."""

    def fileno(self) -> int:
        """For poll(); -1 if it has no connection, and so nothing to wait for."""
        return -1 if self._connection is None else self._connection.fileno()

    def begin(self, *, can_wait: bool) -> bool:
        """Send the request, so that only the answer is to be waited for; false if no connection was free."""
        try:
            return self._sent(can_wait=can_wait)
        except (SidecarUnavailable, TimeoutError) as error:
            self._failed = error
            return True

    def answer(self) -> tuple[list[Any], Mapping[str, str]]:
        """
        Return what came for each text, and the headers.

        Raises:
            EmbeddingError: why there is nothing.
        """
        while True:
            try:
                return self._attempt()
            except (SidecarUnavailable, Unavailable) as error:
                self._wait_for_next(error)
            except EmbeddingError as error:
                if error.index is None:
                    raise
                raise wire.placed(error, None if self.first is None else self.first + error.index) from None
            except TimeoutError:
                raise self._late() from self._trouble

    def _attempt(self) -> tuple[list[Any], Mapping[str, str]]:
        """Make the next attempt, or go on with the one that has begun."""
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        if self._connection is None:
            self._sent(can_wait=True)
        answer = self._received()
        self._line.reach.found()
        if answer.status != 200:
            raise wire.failure(answer, str(self._line.address))
        return wire.vectors(answer, len(self._bodies)), answer.headers

    def rows(self, items: list[Any], job: Job) -> list[Any]:
        """Return the rows of an answer, as the job wants them."""
        first, width = self.first or 0, self._spec.dimensions
        found: list[Any] = []
        for index, item in enumerate(items, first):
            try:
                row = wire.row(item, width)
                found.append(row if job.as_numpy else wire.floats(row))
            except EmbeddingError as error:
                raise error.own(index) from None
            width = len(row) // 4
        return found

    def abandon(self) -> None:
        """Nobody waits for it any more: the sidecar learns it by the end of the connection."""
        if self._connection is not None:
            self._release(is_whole=False)

    def _sent(self, *, can_wait: bool) -> bool:
        connection = self._line.pool.take(self.deadline, is_bulk=self._is_bulk, can_wait=can_wait)
        if connection is None:
            return False
        self._connection = connection
        try:
            left_s = self.deadline - time.monotonic()
            self._line.tally.add("requests")
            connection.send(self._line.request(self._bodies, self._spec, left_s, self._traceparent), self.deadline)
        except BaseException:
            self._release(is_whole=False)
            raise
        return True

    def _received(self) -> wire.Answer:
        assert self._connection is not None
        is_whole = False
        try:
            answer = self._connection.receive(self.deadline)
            is_whole = True
            return answer
        finally:
            self._release(is_whole=is_whole)

    def _release(self, *, is_whole: bool) -> None:
        connection, self._connection = self._connection, None
        assert connection is not None
        self._line.pool.release(connection, is_bulk=self._is_bulk, is_whole=is_whole)

    def _wait_for_next(self, error: SidecarUnavailable | Unavailable) -> None:
        if isinstance(error, SidecarUnavailable):
            self._line.pool.close_idle()
        wait_s = self._tries.wait_s(error, time.monotonic(), self.deadline)
        if wait_s is None:
            raise error
        self._trouble = error
        self._line.tally.add("reconnects")
        time.sleep(wait_s)

    def _late(self) -> DeadlineExceeded:
        if self._trouble is None:
            return DeadlineExceeded("the deadline came before the sidecar's answer")
        return DeadlineExceeded(
            f"the deadline came before the sidecar's answer; it was being asked again: {self._trouble}"
        )


def _first_readable(flights: list[_Flight]) -> _Flight:
    """Return a request whose answer begins; one whose deadline is near if none does by then."""
    by_fd = {flight.fileno(): flight for flight in flights}
    if -1 in by_fd:
        return by_fd[-1]
    poll = select.poll()
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    earliest = min(flights, key=lambda flight: flight.deadline)
    left_ms = max(0.0, earliest.deadline - time.monotonic()) * 1000
    ready = poll.poll(left_ms)
    return by_fd[ready[0][0]] if ready else earliest
