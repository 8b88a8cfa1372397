"""What accept does beside the journeys of tests/route: defects of ours, and who the caller is."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from proxy.base.clock import MonotonicClock
from proxy.base.events import Event, RequestFinished
from proxy.base.messages import Request, Response
from proxy.base.settings import CallerSettings, Catalogue, ListenSettings, ModelSettings, RequestSettings
from proxy.edge.accept import Accept, Page


class Service:
    """In place of the pipeline: answers, or raises, as the test says."""

    catalogue = Catalogue({"m": ModelSettings(upstreams=("u",), dimensions=2)}, "m")
    listen = ListenSettings()
    request = RequestSettings()

    def __init__(self) -> None:
        self.callers: dict[str, CallerSettings] = {}
        self.outcome: Response | BaseException = Response((b"\0\0\x80?\0\0\0\0",), tokens=1)

    async def __call__(self, request: Request) -> Response:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


class Served:
    accept: Accept
    service: Service
    url: str
    facts: list[Event]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    it = Served()
    it.service, it.facts = Service(), []

    async def page() -> Page:
        return Page(200, "text/plain", b"hello")

    accept = Accept(
        service=lambda: it.service,
        pages={"/page": page},
        open_pages=frozenset(),
        clock=MonotonicClock(),
        observe=it.facts.append,
    )

    it.accept = accept

    async def handle(http: web.BaseRequest) -> web.StreamResponse:
        return await accept(http, listener="tcp")

    runner = web.ServerRunner(web.Server(handle, handler_cancellation=True))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    it.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield it
    await runner.cleanup()


async def test_defect_of_ours_tells_its_place_and_no_text(served: Served) -> None:
    """An unforeseen exception is a 500 that names the line, never its message: that may quote a caller."""
    served.service.outcome = ValueError("a marked text")
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{served.url}/v1/embeddings", json={"input": "x"}) as answer:
            document = await answer.json()

    (fact,) = served.facts
    assert isinstance(fact, RequestFinished)
    assert (answer.status, document["error"]["code"], fact.code) == (500, "internal_error", "internal_error")
    assert "internal error ValueError at test_accept.py:" in document["error"]["message"]
    assert "marked" not in str(document) + str(fact)


async def test_page_without_its_body(served: Served) -> None:
    """HEAD is GET without the body."""
    async with aiohttp.ClientSession() as session, session.head(f"{served.url}/page") as answer:
        body = await answer.read()

    assert (answer.status, answer.headers["Content-Length"], body) == (200, "5", b"")


async def test_method_that_is_not_taken_names_those_that_are(served: Served) -> None:
    """A 405 says in `Allow` what the path takes."""
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{served.url}/page") as page, session.put(f"{served.url}/v1/embeddings") as embed:
            statuses = page.status, embed.status

    assert statuses == (405, 405)
    assert page.headers["Allow"] == "GET, HEAD"
    assert embed.headers["Allow"] == "POST"


async def test_answer_hides_what_serves_it(served: Served) -> None:
    """No answer tells versions of Python or aiohttp."""
    async with aiohttp.ClientSession() as session, session.get(f"{served.url}/nowhere") as answer:
        server = answer.headers["Server"]

    assert server == "embedding-sidecar"


async def test_each_request_has_an_id_of_its_own(served: Served) -> None:
    """Ids made here never repeat; one that makes no sense in a header is replaced."""
    async with aiohttp.ClientSession() as session:
        ids = []
        for sent in ({}, {}, {"X-Request-Id": "x" * 129}, {"X-Request-Id": "two words"}, {"X-Request-Id": "mine"}):
            async with session.get(f"{served.url}/page", headers=sent) as answer:
                ids.append(answer.headers["X-Request-Id"])

    assert len(set(ids)) == 5
    assert ids[-1] == "mine"
    assert all(" " not in name and len(name) < 64 for name in ids)


async def test_requests_inside_are_counted(served: Served) -> None:
    """The drain waits for what is inside: the count goes up and comes down again, also for a caller that leaves."""
    inside = asyncio.Event()

    class Slow(Service):
        async def __call__(self, request: Request) -> Response:
            inside.set()
            await asyncio.Event().wait()
            raise AssertionError

    served.service = Slow()
    async with aiohttp.ClientSession() as session:
        caller = asyncio.create_task(session.post(f"{served.url}/v1/embeddings", json={"input": "x"}))
        await inside.wait()
        during = served.accept.requests_inside
        caller.cancel()
    async with asyncio.timeout(5):
        while not served.facts:
            await asyncio.sleep(0.01)

    assert during == 1
    assert served.accept.requests_inside == 0
    assert [fact.status for fact in served.facts if isinstance(fact, RequestFinished)] == [499]


async def test_token_ids_by_the_thousand(served: Served) -> None:
    """While a large body of token ids is read, others have their turn, and what it asks for is all there."""
    served.service.catalogue = Catalogue({"m": ModelSettings(dimensions=2, token_ids=True)}, "m")
    served.service.outcome = Response((b"\0\0\x80?\0\0\0\0",) * 1000, tokens=1)
    body = json.dumps({"input": [[n] * 250 for n in range(1000)]}).encode()
    headers, turns = {"Content-Type": "application/json"}, 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += bool(served.accept.requests_inside)

    counting = asyncio.create_task(others())
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{served.url}/v1/embeddings", data=io.BytesIO(body), headers=headers) as answer:
            document = await answer.json()
    counting.cancel()

    assert len(document["data"]) == 1000
    assert turns >= 10
    (fact,) = served.facts
    assert isinstance(fact, RequestFinished)
    assert (fact.inputs, fact.body_bytes) == (1000, len(body))
