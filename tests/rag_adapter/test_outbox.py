"""Which of the waiting texts leave together, and when."""

from __future__ import annotations

from typing import Any, cast

import pytest

from rag_adapter.outbox import LEAST_SHARE, Entry, Outbox
from rag_adapter.wire import MAX_REQUEST_BYTES, Priority, Spec


def entry(
    texts: int = 1, priority: Priority = "interactive", *, model: str = "m", patience_s: float = 10.0, size: int = 1
) -> Entry:
    future = cast("Any", None)  # the rule never looks at it
    bodies = [bytes(size)] * texts
    return Entry(
        bodies, Spec(model, None, priority), now=100.0, deadline=100.0 + patience_s, future=future, as_floats=True
    )


def outbox(connections: int = 4, *, bulk_connections: int = 2, request_texts: int = 100) -> Outbox:
    return Outbox(connections=connections, bulk_connections=bulk_connections, request_texts=request_texts)


def sizes(box: Outbox) -> list[int]:
    """Take all that may leave now."""
    taken = []
    while entries := box.take():
        taken.append(sum(len(each.bodies) for each in entries))
    return taken


def test_lone_text_leaves_at_once() -> None:
    """With a connection free nothing waits for company."""
    box = outbox()
    box.put(entry())

    assert sizes(box) == [1]


def test_each_connection_takes_its_share() -> None:
    """What waits and what is under way, divided by the connections: four of even size, not one large one."""
    box = outbox()
    for _ in range(200):
        box.put(entry())

    assert sizes(box) == [50, 50, 50, 50]


def test_few_texts_share_one_request() -> None:
    """Up to LEAST_SHARE a second request costs more than it brings."""
    box = outbox()
    for _ in range(LEAST_SHARE + 1):
        box.put(entry())

    assert sizes(box) == [LEAST_SHARE, 1]


def test_what_waits_is_composed_when_a_connection_comes_back() -> None:
    """With all of them busy texts gather; the one that returns takes its share of all that is outstanding."""
    box = outbox(connections=2)
    for _ in range(60):
        box.put(entry())
    first = box.take()
    box.take()
    for _ in range(60):
        box.put(entry())

    assert box.take() == []
    box.came_back(first)
    assert [len(first), len(box.take())] == [30, 45]  # (60 waiting + 30 under way) / 2
    assert box.waiting["interactive"] == 15


def test_request_is_bounded_in_texts_and_bytes() -> None:
    """However much waits; a text that is larger than the bound goes alone."""
    box = outbox(connections=1, request_texts=20)
    for _ in range(50):
        box.put(entry())
    assert len(box.take()) == 20

    box = outbox(connections=1)
    for size in (MAX_REQUEST_BYTES // 2, MAX_REQUEST_BYTES // 2, 1, MAX_REQUEST_BYTES + 1, 1):
        box.put(entry(size=size))
    found = []
    while entries := box.take():
        found.append(len(entries))
        box.came_back(entries)
    assert found == [2, 1, 1, 1]


@pytest.mark.parametrize(
    "other", [entry(model="n"), entry(patience_s=0.4), entry(priority="bulk")], ids=["model", "patience", "priority"]
)
def test_what_does_not_travel_together(other: Entry) -> None:
    """Another model, another priority, another order of patience: the request could not do justice to both."""
    box = outbox()
    box.put(entry())
    box.put(other)
    box.put(entry())

    assert sorted(sizes(box)) == [1, 2]


def test_who_came_first_goes_first() -> None:
    """Between models, the oldest text decides."""
    box = outbox(connections=1)
    entries = [entry(model=model) for model in "abacb"]
    for each in entries:
        box.put(each)
    order = []
    while taken := box.take():
        order.append(taken[0].spec.model)
        box.came_back(taken)

    assert order == ["a", "b", "c"]


def test_queries_before_bulk() -> None:
    """While queries wait bulk has one connection, and no more."""
    box = outbox(connections=4, bulk_connections=2)
    for _ in range(4):
        box.put(entry(100, "bulk"))
    for model in "abcdef":
        box.put(entry(model=model))
    taken = [box.take() for _ in range(4)]

    assert [each[0].spec.priority for each in taken] == ["bulk", "interactive", "interactive", "interactive"]
    assert box.take() == []
    box.came_back(taken[0])
    assert box.take()[0].spec.priority == "bulk"
    box.came_back(taken[1])
    assert box.take()[0].spec.priority == "interactive"


def test_bulk_alone_leaves_a_connection_free() -> None:
    """A query that comes now finds one."""
    box = outbox(connections=3, bulk_connections=2)
    for _ in range(5):
        box.put(entry(100, "bulk"))

    assert sizes(box) == [100, 100]
    box.put(entry())
    assert sizes(box) == [1]


def test_single_connection_alternates() -> None:
    """With one connection neither class starves."""
    box = outbox(connections=1, bulk_connections=1)
    for _ in range(3):
        box.put(entry(100, "bulk"))
    for model in "abc":
        box.put(entry(model=model))
    order = []
    while taken := box.take():
        order.append(taken[0].spec.priority)
        box.came_back(taken)

    assert order == ["bulk", "interactive"] * 3


def test_entry_that_leaves_while_it_waits() -> None:
    """It is forgotten at once, and asking twice does no harm."""
    box = outbox()
    kept, left = entry(), entry()
    box.put(kept)
    box.put(left)
    box.remove(left)
    box.remove(left)

    assert box.waiting["interactive"] == 1
    assert box.take() == [kept]
    box.remove(kept)
    assert box.waiting["interactive"] == 0


def test_entries_that_are_asked_again_come_first() -> None:
    """They have waited longer than all others, and keep their order."""
    box = outbox(connections=1, request_texts=3)
    entries = [entry() for _ in range(6)]
    for each in entries:
        box.put(each)
    taken = box.take()
    box.put_back(taken[:2])
    box.came_back(taken)

    assert box.take() == [entries[0], entries[1], entries[3]]


def test_sidecar_that_takes_smaller_requests() -> None:
    """Once told, requests stay that small; one text always may go."""
    box = outbox(connections=1)
    for _ in range(10):
        box.put(entry())
    found = []
    for told in (4, 50, 0):
        box.lower(told)
        taken = box.take()
        found.append(len(taken))
        box.came_back(taken)

    assert found == [4, 4, 1]


def test_drained_outbox_is_empty() -> None:
    """Everything comes out, once."""
    box = outbox()
    entries = [entry(), entry(model="n"), entry(5, "bulk")]
    for each in entries:
        box.put(each)

    assert set(box.drain()) == set(entries)
    assert (box.drain(), box.take(), box.waiting) == ([], [], {"interactive": 0, "bulk": 0})
