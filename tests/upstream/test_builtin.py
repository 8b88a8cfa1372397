"""The embedded model: the real one, with the weights that lie in its package."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy
import pytest

from proxy.base import errors
from proxy.base.events import AttemptFinished, Event
from proxy.base.messages import Row, Spec
from proxy.upstream.builtin import WIDTH, WIDTHS, Builtin
from tests.fakes.clock import HandClock, settle
from tests.fakes.stage import make_batch

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "a",
    "Ein längerer Satz mit Umlauten: äöü, und noch ein paar Wörtern mehr als der vorige.",
    "def f(x):\n    return x + 1\n",
    "weather tomorrow",
    "12345 67890",
    "word " * 700,
)


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def builtin(events: list[Event]) -> Iterator[Builtin]:
    """The model, loaded once."""
    stage = Builtin("b", clock=HandClock(), observe=events.append)
    yield stage
    asyncio.run(stage.aclose())


def numbers(rows: tuple[Row, ...]) -> numpy.ndarray:
    return numpy.array([numpy.frombuffer(row, "<f4") for row in rows])


async def test_first_call_loads_the_model() -> None:
    """The weights are loaded by the first call, not at the start."""
    stage = Builtin("b", clock=HandClock(), observe=lambda event: None)
    before = stage.snapshot()
    answer = await stage(make_batch(["hello"]))
    after = stage.snapshot()
    await stage.aclose()

    assert before == {"is_loaded": False}
    assert after == {"is_loaded": True}
    assert len(answer.rows[0]) == WIDTH * 4


async def test_answer(builtin: Builtin, events: list[Event]) -> None:
    """Each input gets a row; the answer names the upstream and counts tokens; the end of the exchange is told."""
    events.clear()
    answer = await builtin(make_batch(["one two three", "four"]))

    assert len(answer.rows) == 2
    assert answer.upstream == "b"
    assert answer.tokens >= 4
    assert answer.upstream_s == 0.0
    assert events == [AttemptFinished("b", "", 0.0, 2)]


async def test_meaning(builtin: Builtin) -> None:
    """Related texts lie closer to each other than to an unrelated one."""
    cat, kitten, tax = numbers((await builtin(make_batch(["a cat", "a small kitten", "income tax law"]))).rows)

    assert cat @ kitten > cat @ tax + 0.2


async def test_company_makes_no_difference(builtin: Builtin) -> None:
    """A text has the same vector alone, in a batch, and in another order."""
    alone = numbers(tuple([(await builtin(make_batch([text]))).rows[0] for text in TEXTS]))
    together = numbers((await builtin(make_batch(TEXTS))).rows)
    reverse = numbers((await builtin(make_batch(TEXTS[::-1]))).rows)[::-1]

    assert numpy.abs(together - alone).max() <= 1e-6
    assert numpy.abs(reverse - alone).max() <= 1e-6
    assert len({row.tobytes() for row in together}) == len(TEXTS)


async def test_batch_of_many_portions(builtin: Builtin) -> None:
    """Batches that are computed in portions come out whole and in order."""
    texts = [f"text number {n} " + "and more " * (n % 37) for n in range(300)]
    rows = numbers((await builtin(make_batch(texts))).rows)
    some = numbers((await builtin(make_batch(texts[123:126]))).rows)

    assert rows.shape == (300, WIDTH)
    assert numpy.abs(rows[123:126] - some).max() <= 1e-6


@pytest.mark.parametrize("width", [None, *WIDTHS])
async def test_widths(builtin: Builtin, width: int | None) -> None:
    """At each width vectors have unit length and begin like the whole ones."""
    whole = numbers((await builtin(make_batch(TEXTS))).rows)
    cut = numbers((await builtin(make_batch(TEXTS, spec=Spec("m", dimensions=width)))).rows)
    expected = whole[:, : width or WIDTH]
    expected = expected / numpy.linalg.norm(expected, axis=1, keepdims=True)

    assert cut.shape == (len(TEXTS), width or WIDTH)
    assert numpy.abs(numpy.linalg.norm(cut, axis=1) - 1).max() < 1e-6
    assert numpy.abs(cut - expected).max() < 1e-6


@pytest.mark.parametrize("index", [0, 1, 260])
async def test_nothing_to_embed(builtin: Builtin, events: list[Event], index: int) -> None:
    """A text without anything that the model knows is refused by its place, in whichever portion it is."""
    events.clear()
    texts = ["some words of a text that is longer than others"] * 261
    texts[index] = ""
    with pytest.raises(errors.UpstreamRefused) as caught:
        await builtin(make_batch(texts))

    assert caught.value.index == index
    assert (caught.value.status, caught.value.code) == (400, "nothing_to_embed")
    assert events == [AttemptFinished("b", "upstream_refused", 0.0, 261)]


@pytest.mark.parametrize("left_s", [0.0, -1.0])
async def test_no_time_left(builtin: Builtin, events: list[Event], left_s: float) -> None:
    """Nothing is computed for a caller whose deadline is here."""
    events.clear()
    with pytest.raises(errors.DeadlineExceeded):
        await builtin(make_batch(deadline=1000.0 + left_s))

    assert events == [AttemptFinished("b", "deadline_exceeded", 0.0, 1)]


async def test_caller_leaves(builtin: Builtin, events: list[Event]) -> None:
    """A caller that leaves is told of as ignored, and the next call is served."""
    events.clear()
    task = asyncio.create_task(builtin(make_batch(["word " * 1000] * 5)))
    await settle(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    answer = await builtin(make_batch(["next"]))

    assert [event.code for event in events if isinstance(event, AttemptFinished)] == ["ignored", ""]
    assert len(answer.rows) == 1


async def test_concurrent_calls(builtin: Builtin) -> None:
    """Calls at a time share the one thread without mixing their rows."""
    answers = await asyncio.gather(*(builtin(make_batch([text, "common"])) for text in TEXTS))
    alone = numbers((await builtin(make_batch(TEXTS))).rows)

    assert numpy.abs(numbers(tuple(answer.rows[0] for answer in answers)) - alone).max() <= 1e-6
    assert len({answer.rows[1] for answer in answers}) <= len(TEXTS)
