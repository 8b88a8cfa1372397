"""
What was asked, when it was meant to start, and what became of it: kept inside the app, read by a thread beside its
loop.

Imports next to nothing, since the app's memory is measured. A vector is not kept: the digest of its float32 numbers
goes to the parent, which knows what it should be.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OK = "ok"
UNANSWERED = "unanswered"
"""Nothing had come when the scenario was over."""
SENTENCE = "what does the contract say about notice periods, refunds and late delivery in the second year? "
QUERY_CHARACTERS, CHUNK_CHARACTERS = 80, 480
"""A question, and a paragraph."""


@dataclass(frozen=True, slots=True)
class Request:
    """Texts that are embedded in one call of the app."""

    number: int
    kind: str
    """`query` or `document`."""
    count: int
    """Texts in it."""
    intended: float
    """The instant it was meant to start, of the monotonic clock, which all processes of a machine share."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request."""

    number: int
    kind: str
    count: int
    intended_s: float
    """Since the start of the scenario."""
    waited_s: float
    """From then until the answer; of one without an answer, until the scenario was over."""
    outcome: str
    """`ok`, `unanswered`, or the name of the error."""
    is_refusal: bool = False
    """The error says at once: not now, come again later."""
    digest: str = ""
    """Of the vectors."""


def texts(run: str, request: Request | Answer) -> list[str]:
    """Return the texts of a request; no two requests of any run have one in common, so that no cache can help."""
    length = QUERY_CHARACTERS if request.kind == "query" else CHUNK_CHARACTERS
    filling = SENTENCE * (length // len(SENTENCE) + 1)
    return [f"{run} {request.kind} {request.number}.{index}: {filling}"[:length] for index in range(request.count)]


def digest(vectors: Iterable[Sequence[float]]) -> str:
    """Return what tells these vectors from others, whole, at the precision that they were sent with."""
    told = hashlib.sha256()
    for vector in vectors:
        told.update(array("f", vector).tobytes())
    return told.hexdigest()[:16]


class Ledger:
    """Entries in, answers out. Written by the loop, read by one thread: each step is a single operation of a dict."""

    def __init__(self, start: float = 0.0) -> None:
        self.start = start
        self._count = 0
        self._outstanding: dict[int, Request] = {}
        self._answers: dict[int, Answer] = {}

    def intend(self, kind: str, count: int, intended: float) -> Request:
        """Enter a request, before anything is done for it."""
        self._count += 1
        request = self._outstanding[self._count] = Request(self._count, kind, count, intended)
        return request

    def settle(self, request: Request, now: float, outcome: str, *, is_refusal: bool = False, told: str = "") -> None:
        """Enter what became of it."""
        self._answers[request.number] = self._answer(request, now, outcome, is_refusal=is_refusal, told=told)
        del self._outstanding[request.number]

    @property
    def settled(self) -> int:
        return len(self._answers)

    def outstanding(self, now: float) -> int:
        """Count those that should be under way by now."""
        return sum(request.intended <= now for request in list(self._outstanding.values()))

    def answers(self, now: float) -> list[Answer]:
        """Return all, those among them that should have started by now and have no answer."""
        waiting = [request for request in list(self._outstanding.values()) if request.intended <= now]
        settled = list(self._answers.values())
        known = {answer.number for answer in settled}
        return settled + [self._answer(each, now, UNANSWERED) for each in waiting if each.number not in known]

    def _answer(
        self, request: Request, now: float, outcome: str, *, is_refusal: bool = False, told: str = ""
    ) -> Answer:
        return Answer(
            request.number,
            request.kind,
            request.count,
            request.intended - self.start,
            now - request.intended,
            outcome,
            is_refusal,
            told,
        )
