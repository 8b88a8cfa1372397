"""
The client for asyncio: one object for the whole app, whatever event loops it has.

Each event loop gets connections of its own at its first call, and gives them back when it ends, even where nobody has
closed the client; a forked child makes new ones. So no answer is ever waited for on a loop that is gone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, overload

from rag_adapter import fork, wire
from rag_adapter.address import silent
from rag_adapter.desk import Desk
from rag_adapter.errors import EmbeddingError
from rag_adapter.many import Job
from rag_adapter.many import Progress as Progress
from rag_adapter.outbox import Entry
from rag_adapter.reach import READY_PAUSE_S, READY_TIMEOUT_S, Reach
from rag_adapter.settings import client_settings, deadline_of
from rag_adapter.tally import Snapshot, Tally
from rag_adapter.trace import traceparent as current_traceparent

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

_TURN_TEXTS = 8192
"""So many texts are looked at before others get their turn; takes 0.1 ms."""


class EmbeddingClient:
    """
    Asks the sidecar for vectors.

    Concurrent `embed` calls of one loop share requests by themselves; `embed_many` cuts long lists. One client serves
    all loops and threads of a process. `async with` closes this loop's connections at its end; without it the end of
    the loop does.
    """

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
        """
        Args:
            address: "/path.sock", "unix:/path.sock" or "http://127.0.0.1:8484"; None: `$EMBEDDING_SIDECAR_URL`, else
                `socket_path()`.
            model: None means the sidecar's default.
            dimensions: width of the vectors; None means the model's own.
            timeout_s: how long an `embed` may take.
            bulk_timeout_s: how long each request of an `embed_many` may take, waiting for its turn included.
            priority: "interactive" or "bulk"; None: `embed` is interactive, `embed_many` bulk.
            client_name: told to the sidecar, where clients of different names take turns.
            api_key: where the sidecar wants one; None means `$EMBEDDING_SIDECAR_API_KEY`.
            max_connections: connections, and so requests at a time, of each event loop.
            request_texts: most texts of one request.
            concurrency: requests of bulk at a time, of each event loop; one connection stays for queries.

        Raises:
            ValueError: names everything that is wrong with them.
        """
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
        self._reach = Reach()
        self._tally = Tally()
        self._lock = threading.Lock()
        self._desks: dict[asyncio.AbstractEventLoop, Desk] = {}
        self._of_parent: list[Desk] = []
        """Desks from before a fork. Kept, since their end would be told to an event loop that is not ours."""
        fork.in_child(self._forked)

    def __repr__(self) -> str:
        return f"<EmbeddingClient at {self._settings.address}>"

    # --- vectors ---

    @overload
    async def embed(
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
    async def embed(
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

    async def embed(
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
        """
        Return the vector of a text.

        Args:
            text: not empty.
            model, dimensions, priority: instead of the client's own.
            timeout_s: how long it may take, instead of the client's own.
            deadline: the instant of `time.monotonic()` by which it has to be there; the earlier of both counts.
            traceparent: W3C trace context; None means that of OpenTelemetry's current span, if there is one.
            as_numpy: float32 array instead of a list of floats.

        Raises:
            InvalidInput: (a ValueError) the text or the wish makes no sense.
            DeadlineExceeded: (a TimeoutError) it took too long.
            SidecarUnavailable: (a ConnectionError) nobody answers; the message says what to do.
            Unavailable: (a RuntimeError) the sidecar cannot do it at present; see `retry_after_s`.
            EmbeddingFailed: (a RuntimeError) it failed.
        """
        try:
            desk = self._desks.get(asyncio.get_running_loop()) or await self._opened()
            body = wire.spelled(text)
            spec = self._settings.spec(model, dimensions, priority, usual="interactive")
            now = time.monotonic()
            entry = Entry(
                [body],
                spec,
                now=now,
                deadline=deadline_of(now, timeout_s, deadline, usual_s=self._settings.timeout_s),
                future=desk.loop.create_future(),
                as_floats=not as_numpy,
                traceparent=traceparent or current_traceparent(),
            )
            self._tally.add("texts")
            rows = await desk.ask(entry)
            found: list[float] | NDArray[float32] = wire.numpy_row(rows[0]) if as_numpy else rows[0]
            return found
        except EmbeddingError as error:
            self._tally.failed(error.code)
            raise

    @overload
    async def embed_many(
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
    async def embed_many(
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

    async def embed_many(
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
        """
        Return the vectors of any number of texts, in their order.

        They go in requests of `request_texts`, `concurrency` at a time. With the first error the rest is given up; its
        `index` is the position of the text to blame, where one is.

        Args:
            texts: none of them empty.
            timeout_s: how long all of it may take; None: each request has the client's `bulk_timeout_s`.
            deadline: the instant of `time.monotonic()` by which all of it has to be there.
            on_progress: called in this loop after each request.
            as_numpy: count × width float32 instead of lists of floats; a tenth of the memory.
            model, dimensions, priority, traceparent: as for `embed`.

        Raises: as `embed`.
        """
        try:
            spec = self._settings.spec(model, dimensions, priority, usual="bulk")
            if timeout_s is not None or deadline is not None:
                deadline = deadline_of(time.monotonic(), timeout_s, deadline, usual_s=0.0)
            job = Job(
                await _checked(texts),
                request_texts=self._settings.request_texts,
                width=spec.dimensions,
                as_numpy=as_numpy,
                on_progress=on_progress,
            )
            self._tally.add("texts", job.count)
            await self._work_off(job, spec, deadline, traceparent or current_traceparent())
            found: list[list[float]] | NDArray[float32] = job.result()
            return found
        except EmbeddingError as error:
            self._tally.failed(error.code)
            raise

    async def _work_off(self, job: Job, spec: wire.Spec, deadline: float | None, traceparent: str | None) -> None:
        desk = self._desks.get(asyncio.get_running_loop()) or await self._opened()

        async def work() -> None:
            for first, bodies in job.parts:
                now = time.monotonic()
                entry = Entry(
                    bodies,
                    spec,
                    now=now,
                    deadline=now + self._settings.bulk_timeout_s if deadline is None else deadline,
                    future=desk.loop.create_future(),
                    as_floats=not job.as_numpy,
                    first=first,
                    traceparent=traceparent,
                )
                rows = await desk.ask(entry)
                job.put(first, rows, entry.space)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._settings.concurrency, job.count)):
                    group.create_task(work())
        except BaseExceptionGroup as found:
            raise found.exceptions[0] from None

    # --- the sidecar's state ---

    async def is_ready(self) -> bool:
        """Whether the sidecar can serve every model of its; false also when nobody answers. Never raises."""
        return await self._trouble() is None

    async def wait_until_ready(self, timeout_s: float) -> None:
        """
        Wait until the sidecar is ready, for instance when app and sidecar are started together.

        Raises:
            SidecarUnavailable, Unavailable, EmbeddingFailed: why it is not, when the time is over.
        """
        end = time.monotonic() + timeout_s
        while (error := await self._trouble()) is not None:
            if time.monotonic() + READY_PAUSE_S >= end:
                raise error
            await asyncio.sleep(READY_PAUSE_S)

    async def _trouble(self) -> EmbeddingError | None:
        desk = self._desks.get(asyncio.get_running_loop()) or await self._opened()
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                answer = await desk.exchange.get("/readyz")
        except EmbeddingError as error:
            return error
        except TimeoutError:
            return silent(self._settings.address, READY_TIMEOUT_S)
        self._reach.found()
        return wire.unready(answer, str(self._settings.address))

    def snapshot(self) -> Snapshot:
        """Return counts, over all event loops."""
        outboxes = [desk.outbox for desk in tuple(self._desks.values())]
        return self._tally.snapshot(
            requests_in_flight=sum(sum(outbox.requests.values()) for outbox in outboxes),
            texts_waiting=sum(sum(outbox.waiting.values()) for outbox in outboxes),
        )

    # --- event loops ---

    async def _opened(self) -> Desk:
        """Make this loop's desk; there is no await between looking for it and its place in the table."""
        with self._lock:
            for loop in tuple(self._desks):  # another loop may end meanwhile, in its own thread
                if loop.is_closed() and (old := self._desks.pop(loop, None)) is not None:
                    old.exchange.abandon(is_foreign=False)
            desk = self._desks[asyncio.get_running_loop()] = Desk(self._settings, self._tally, self._reach)
        desk.guard = self._guarded(desk)
        await anext(desk.guard)
        return desk

    async def _guarded(self, desk: Desk) -> AsyncGenerator[None]:
        """
        Close a desk when its loop ends.

        Event loops know their asynchronous generators, and finish them before they are closed (`asyncio.run` does, by
        `loop.shutdown_asyncgens`). There is nothing else in asyncio by which one learns of a loop's end.
        """
        try:
            yield
        finally:
            self._desks.pop(desk.loop, None)
            await desk.aclose()

    async def aclose(self) -> None:
        """Close this loop's connections; calls that are under way end with an error. A later call opens new ones."""
        desk = self._desks.pop(asyncio.get_running_loop(), None)
        if desk is not None and desk.guard is not None:
            await desk.guard.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _forked(self) -> None:
        """Begin anew in a forked child."""
        desks = tuple(self._desks.values())
        for desk in desks:
            desk.exchange.abandon(is_foreign=True)
        self._of_parent += desks
        self._desks = {}
        self._tally = Tally()
        self._lock = threading.Lock()


async def _checked(texts: Iterable[str]) -> list[str]:
    """Look at all texts before the first is sent: the last of a million should not be found empty after an hour."""
    found = wire.listed(texts)
    for first in range(0, len(found), _TURN_TEXTS):
        wire.check(found[first : first + _TURN_TEXTS], first)
        await asyncio.sleep(0)
    return found
