"""A stage that the test plays: expect a message, answer it, fail it, or see it cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from proxy.base.keys import fingerprint, keys
from proxy.base.messages import Batch, Input, Priority, Request, Row, Spec, size_bytes
from proxy.base.stage import Beginning


@dataclass
class Call:
    """One message that has arrived and waits for its answer."""

    message: Any
    future: asyncio.Future[Any]

    def answer(self, value: Any) -> None:
        self.future.set_result(value)

    def fail(self, error: BaseException) -> None:
        self.future.set_exception(error)

    @property
    def was_cancelled(self) -> bool:
        return self.future.cancelled()


class ScriptedStage:
    """Obeys base/stage.py; each call waits until the test says what becomes of it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.is_closed = False
        self._arrived: asyncio.Queue[Call] = asyncio.Queue()

    async def __call__(self, message: Any, /) -> Any:
        call = Call(message, asyncio.get_running_loop().create_future())
        self.calls.append(call)
        self._arrived.put_nowait(call)
        return await call.future

    async def next(self) -> Call:
        """Return the next message that arrives; fails the test when none does within five seconds."""
        async with asyncio.timeout(5):
            return await self._arrived.get()

    def snapshot(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}

    async def aclose(self) -> None:
        self.is_closed = True


class AnsweringStage:
    """Obeys base/stage.py; answers at once by a function, or raises what the function returns."""

    def __init__(self, respond: Any) -> None:
        self.messages: list[Any] = []
        self._respond = respond

    async def __call__(self, message: Any, /) -> Any:
        self.messages.append(message)
        result = self._respond(message)
        if isinstance(result, BaseException):
            raise result
        return result

    def snapshot(self) -> dict[str, Any]:
        return {}

    async def aclose(self) -> None:
        pass


class Begun:
    """Obeys `Pending`: a call of a stage, in a task of its own, for all who wait for it."""

    def __init__(self, stage: Any, message: Any) -> None:
        self._task = asyncio.ensure_future(stage(message))
        self._task.add_done_callback(lambda _: self._ended())
        self._waiters: list[asyncio.Future[None]] = []
        self._is_left = False

    @property
    def is_over(self) -> bool:
        return self._is_left or self._task.done()

    @property
    def error(self) -> BaseException | None:
        if not self.is_over:
            return None
        return asyncio.CancelledError() if self._is_left or self._task.cancelled() else self._task.exception()

    def result(self) -> Any:
        return self._task.result()

    def join(self) -> asyncio.Future[None]:
        self._waiters.append(asyncio.get_running_loop().create_future())
        return self._waiters[-1]

    def leave(self, waiter: asyncio.Future[None]) -> None:
        self._waiters.remove(waiter)
        if not self._waiters and not self._task.done():
            self._is_left = True
            self._task.cancel()

    def _ended(self) -> None:
        _ = self._task.cancelled() or self._task.exception()  # looked at
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def cancel(self) -> None:
        self._task.cancel()


class Begins:
    """Obeys `Beginning`, in front of a stage that is called."""

    def __init__(self, stage: Any) -> None:
        self._stage = stage
        self._begun: list[Begun] = []

    def begin(self, message: Any, /) -> Begun:
        self._begun.append(Begun(self._stage, message))
        return self._begun[-1]

    def snapshot(self) -> Any:
        return self._stage.snapshot()

    async def aclose(self) -> None:
        for begun in self._begun:
            begun.cancel()
        await self._stage.aclose()


async def asked(stage: Beginning[Any, Any], message: Any) -> Any:
    """Let a stage begin, and wait for what comes of it: as one who shares it with nobody."""
    pending = stage.begin(message)
    waiter = pending.join()
    try:
        await waiter
    finally:
        pending.leave(waiter)
    return pending.result()


def make_request(
    inputs: Sequence[Input] = ("a text",), *, model: str = "m", now: float = 1000.0, **changes: Any
) -> Request:
    """Make a valid request of the given inputs."""
    spec = changes.pop("spec", Spec(model))
    space = fingerprint(model, spec)
    values: dict[str, Any] = {
        "id": "r-1",
        "spec": spec,
        "inputs": tuple(inputs),
        "keys": keys(space, inputs),
        "space": space,
        "sizes": tuple(map(size_bytes, inputs)),
        "size_bytes": sum(map(size_bytes, inputs)),
        "priority": Priority.INTERACTIVE,
        "caller": "test",
        "arrived": now,
        "deadline": now + 10,
    }
    return Request(**(values | changes))


def make_batch(
    inputs: Sequence[Input] = ("a text",), *, model: str = "m", now: float = 1000.0, **changes: Any
) -> Batch:
    """Make a batch of the given inputs."""
    values: dict[str, Any] = {
        "spec": Spec(model),
        "inputs": tuple(inputs),
        "size_bytes": sum(map(size_bytes, inputs)),
        "deadline": now + 10,
        "model": model,
    }
    return Batch(**(values | changes))


def rows_of(inputs: Sequence[Input]) -> tuple[Row, ...]:
    """Make up a row for each input that belongs to this input only: 8 float32."""
    from tests.fakes.upstream import vector

    return tuple(vector(item, 8).tobytes() for item in inputs)
