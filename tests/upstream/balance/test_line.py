"""First come, first served, and nobody is forgotten."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base.lease import Wait
from proxy.upstream.balance.line import Line
from tests.fakes.clock import HandClock, settle


class Play:
    """A line before a counter with so many pieces."""

    def __init__(self, pieces: int = 0) -> None:
        self.clock = HandClock()
        self.line = Line(self._moved, clock=self.clock)
        self.pieces = pieces
        self.until: float | None = None
        self.asked: list[str] = []
        self.moves = 0

    def _moved(self) -> None:
        self.moves += 1
        self.line.call()

    def ask(self, name: str) -> str | Wait:
        self.asked.append(name)
        if self.pieces:
            self.pieces -= 1
            return name
        return Wait(self.until)

    def stands(self, name: str) -> asyncio.Task[str]:
        return asyncio.create_task(self.line.wait(lambda: self.ask(name)))

    async def brought(self, pieces: int = 1) -> None:
        """Bring further pieces, and say so once."""
        self.pieces += pieces
        self.line.call()
        await settle()


async def test_nobody_before_it() -> None:
    """Where nobody stands and there is something, it is given at once."""
    play = Play(1)

    assert await play.line.wait(lambda: play.ask("a")) == "a"
    assert len(play.line) == 0
    assert play.moves == 1


async def test_order() -> None:
    """They are served in the order in which they came, however many pieces one call stands for."""
    play = Play()
    tasks = [play.stands(name) for name in "abcd"]
    await settle()
    waiting = len(play.line)
    await play.brought(3)

    assert waiting == 4
    assert [task.done() for task in tasks] == [True, True, True, False]
    assert play.asked == ["a", "a", "b", "c", "d"]
    tasks[3].cancel()


async def test_call_in_vain() -> None:
    """Whoever asks in vain keeps its place."""
    play = Play()
    tasks = [play.stands(name) for name in "ab"]
    await settle()
    await play.brought(0)
    await play.brought(0)
    await play.brought(1)

    assert [task.done() for task in tasks] == [True, False]
    tasks[1].cancel()


async def test_instant_to_ask_again() -> None:
    """The first one asks again at the instant it was told, without being called, and as often as it takes."""
    play = Play()
    play.until = 1005.0
    first, second = play.stands("a"), play.stands("b")
    await play.clock.advance(4.9)
    before = list(play.asked)
    play.until = 1007.0
    await play.clock.advance(0.1)
    again = list(play.asked)
    play.pieces = 1
    await play.clock.advance(2)

    assert before == ["a"]
    assert again == ["a", "a"]
    assert first.done()
    assert not second.done()
    second.cancel()


async def test_call_before_the_instant() -> None:
    """Whoever waits for an instant hears a call all the same."""
    play = Play()
    play.until = 2000.0
    first = play.stands("a")
    await settle()
    await play.brought()

    assert await first == "a"


async def test_asking_fails() -> None:
    """An error ends the wait of whom it meets, and the next one asks for itself."""
    play = Play()
    is_broken = True

    def ask() -> str | Wait:
        if is_broken:
            raise ZeroDivisionError
        return play.ask("a")

    play.pieces = 1
    with pytest.raises(ZeroDivisionError):
        await play.line.wait(ask)
    blocked = Play()
    tasks = [blocked.stands("a"), asyncio.create_task(blocked.line.wait(ask)), blocked.stands("c")]
    await settle()
    await blocked.brought(2)

    assert len(play.line) == 0
    assert [task.done() for task in tasks] == [True, True, True]
    assert isinstance(tasks[1].exception(), ZeroDivisionError)


async def test_first_one_leaves() -> None:
    """When the first one leaves, the next one asks at once: what the first was told may not be true for it."""
    play = Play()
    first, second = play.stands("a"), play.stands("b")
    await settle()
    play.pieces = 1
    first.cancel()
    await settle()

    assert await second == "b"


async def test_another_one_leaves() -> None:
    """Whoever leaves from the middle takes nobody's place, and nobody has to look."""
    play = Play()
    tasks = [play.stands(name) for name in "abc"]
    await settle()
    tasks[1].cancel()
    await settle()
    moves = play.moves
    await play.brought(2)

    assert moves == 0
    assert [task.done() and not task.cancelled() for task in tasks] == [True, False, True]


async def test_called_and_cancelled_at_once() -> None:
    """A call is not lost with somebody who leaves in the same turn of the loop."""
    play = Play()
    first, second = play.stands("a"), play.stands("b")
    await settle()
    play.pieces = 1
    play.line.call()
    first.cancel()
    await settle()

    assert first.cancelled()
    assert await second == "b"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["stand", "stand", "bring", "leave", "call", "wait"]), max_size=40), st.integers(0, 99))
def test_any_order_of_events(steps: list[str], seed: int) -> None:
    """Whatever happens, no piece lies about while somebody stands in line, and those who stay are served in order."""

    async def run() -> None:
        play, rng = Play(), random.Random(seed)
        tasks: list[asyncio.Task[Any]] = []
        for step in steps:
            if step == "stand":
                tasks.append(play.stands(str(len(tasks))))
            elif step == "bring":
                play.pieces += 1
                play.line.call()
            elif step == "leave" and tasks:
                rng.choice(tasks).cancel()
            elif step == "call":
                play.line.call()
            play.until = play.clock.now() + 1 if rng.random() < 0.5 else None
            if step == "wait" or rng.random() < 0.3:
                await play.clock.advance(rng.choice([0.0, 1.0]))
                assert not (play.pieces and len(play.line))
                served = [task.done() and not task.cancelled() for task in tasks if not task.cancelled()]
                assert served == sorted(served, reverse=True)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(play.line) == 0

    asyncio.run(run())
