"""What goes wrong anywhere comes out as one clear answer, and passes by itself when its cause does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rag_service.postgres import Postgres, PostgresFailed

from tests.example.service import LIMIT_S, Answer, Service, is_running, until
from tests.fakes.sidecar import Sidecar
from tests.fakes.upstream import OK, FakeUpstream, Fault

PATIENT = {"X-Request-Timeout-Ms": str(int(LIMIT_S * 1000))}
"""A caller who waits longer than anything here takes."""


LATE = ("deadline_exceeded", "upstream_timeout")
"""Who is asked last notices first: the service, the adapter, the proxy, or its attempt at the upstream."""


def is_fine(answer: Answer) -> bool:
    return answer.status == 200


# --- the proxy ---


async def test_proxy_that_is_killed_comes_back_and_no_search_fails(service: Service) -> None:
    """The supervisor starts another one; whoever asks meanwhile waits for it."""
    proxy = await until(service.proxy, lambda proxy: proxy["state"] == "ready")
    os.kill(proxy["pid"], signal.SIGKILL)

    answers = await asyncio.gather(*(service.search(f"otters {n}", headers=PATIENT) for n in range(5)))

    assert [answer.status for answer in answers] == [200] * 5
    after = await until(service.proxy, lambda proxy: proxy["state"] == "ready" and proxy["restarts"] == 1)
    assert after["pid"] != proxy["pid"]
    assert after["last_exit"] == -signal.SIGKILL
    assert "the sidecar ended with signal 9" in service.output


@contextlib.asynccontextmanager
async def sidecar_of_somebody(toml: str) -> AsyncIterator[Sidecar]:
    """A proxy that is not the service's child. Its start waits for its canary, so it may not hold this loop."""
    sidecar = Sidecar(toml)
    await asyncio.to_thread(sidecar.__enter__)
    try:
        yield sidecar
    finally:
        await asyncio.to_thread(sidecar.__exit__)


async def test_proxy_of_somebody_else_that_is_gone(folder: str, database_url: str) -> None:
    """503 with Retry-After and what to do; the health says who misses whom; all is well when it is back."""
    async with (
        sidecar_of_somebody("") as sidecar,
        Service(
            folder, (__file__,), DATABASE_URL=database_url, EMBEDDING_SIDECAR_SOCKET=sidecar.socket_path
        ) as service,
    ):
        assert (await service.proxy())["state"] == "attached"
        sidecar.kill()

        answer = await service.search("otters", headers=PATIENT)

        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.error["code"] == "refused"
        assert "start it with `embedding-sidecar run`" in answer.error["message"]
        assert (await service.get("/health")).status == 503
        assert await service.states() == {"database": "healthy", "embeddings": "unhealthy", "rag": "waiting"}

        await asyncio.to_thread(sidecar.restart)

        await until(lambda: service.search("otters"), is_fine)
        await until(service.states, lambda states: set(states.values()) == {"healthy"})


# --- the upstream ---


async def test_upstream_that_fails_and_comes_back(service: Service, upstream: FakeUpstream) -> None:
    """
    502 while it is tried, 503 with Retry-After as soon as the breaker is open, 200 when it answers again.

    The health stays good: what is known already is still found, and no other host would fare better.
    """
    before = await service.search("otters, before")
    upstream.spare_canary = False
    upstream.always = Fault(status=500, body={"error": {"message": "out of order"}})
    numbers = iter(range(10_000))

    first = await service.search("otters, first")
    refused = await until(
        lambda: service.search(f"otters {next(numbers)}"), lambda a: a.error["code"] != "upstream_failed"
    )

    assert (first.status, first.error["code"]) == (502, "upstream_failed")
    assert first.error["request_id"]
    assert refused.status == 503
    assert refused.error["code"] in ("circuit_open", "no_upstream")
    assert int(refused.headers["Retry-After"]) >= 1
    assert (await service.search("otters, before")).document == before.document
    assert set((await service.states()).values()) == {"healthy"}

    upstream.always = OK

    await until(lambda: service.search(f"otters {next(numbers)}"), is_fine)


async def test_upstream_that_asks_to_be_left_alone(service: Service, upstream: FakeUpstream) -> None:
    """Its Retry-After reaches the service's caller."""
    error = {"error": {"message": "slow down", "type": "requests", "code": "rate_limit_exceeded"}}
    upstream.always = Fault(status=429, headers={"Retry-After": "40"}, body=error)

    answer = await service.search("otters")

    assert (answer.status, answer.error["code"]) == (503, "rate_limit_exceeded")
    assert 30 <= int(answer.headers["Retry-After"]) <= 40


async def test_upstream_that_answers_nonsense(service: Service, upstream: FakeUpstream) -> None:
    """No wrong vector reaches the index: 502, and the document is not there."""
    upstream.always = Fault(change=lambda answer: {**answer, "data": answer["data"] * 2})

    answer = await service.take_in(birds="Ravens remember faces.")

    assert (answer.status, answer.error["code"]) == (502, "bad_vectors")
    assert (await service.get("/documents")).document == {"note": 1}


async def test_text_that_cannot_be_stored(service: Service) -> None:
    """PostgreSQL takes no NUL, which texts from PDF often have: told before anything is paid for."""
    answer = await service.take_in(birds="Ravens\0 and crows.")

    assert (answer.status, answer.error["code"]) == (422, "invalid_request")
    assert "NUL" in answer.error["message"]
    assert "Ravens" not in str(answer.document)


async def test_text_that_the_upstream_refuses(service: Service, upstream: FakeUpstream) -> None:
    """422, and nothing of the document is taken in: it comes whole or not at all."""
    refusal = {"error": {"message": "too long", "type": "invalid_request_error", "code": "string_above_max_length"}}
    upstream.poison = {"# B\n\nPoison.": Fault(status=400, body=refusal)}

    answer = await service.take_in(birds="# A\n\nRavens.\n\n# B\n\nPoison.\n\n# C\n\nCrows.")

    assert (answer.status, answer.error["code"]) == (422, "string_above_max_length")
    assert (await service.get("/documents")).document == {"note": 1}


async def test_index_that_was_made_for_another_model(folder: str, database_url: str, upstream: FakeUpstream) -> None:
    """The service does not start, and says why: vectors of two models do not belong into one index."""
    config = f"{folder}/sidecar.toml"
    Path(config).write_text(upstream.toml(dimensions=256), encoding="utf-8")
    environ = {"DATABASE_URL": database_url, "EMBEDDING_SIDECAR_CONFIG": config, "RAG_MODEL": "m"}
    async with Service(folder, (__file__,), **environ):
        pass

    with pytest.raises(RuntimeError, match="the table passages has vectors of 256 numbers, RAG_DIMENSIONS is 128"):
        await Service(folder, (__file__,), RAG_DIMENSIONS="128", **environ).__aenter__()


# --- deadlines ---


async def test_deadline_comes_while_the_upstream_hangs(service: Service, upstream: FakeUpstream) -> None:
    """504 by then, and the call at the upstream is given up: nobody waits for it any more."""
    upstream.always = Fault(hang=True)

    answer = await service.search("otters", headers={"X-Request-Timeout-Ms": "1500"})

    assert answer.status == 504
    assert answer.error["code"] in LATE
    assert upstream.seen

    async def inside() -> int:
        return upstream.inside

    await until(inside, lambda inside: inside == 0)


async def test_deadline_of_an_ingestion(service: Service, upstream: FakeUpstream) -> None:
    """504, and nothing of it is taken in."""
    upstream.always = Fault(hang=True)

    answer = await service.take_in({"X-Request-Timeout-Ms": "400"}, birds="Ravens.")

    assert answer.status == 504
    assert answer.error["code"] in LATE
    assert (await service.get("/documents")).document == {"note": 1}


async def test_caller_who_hangs_up(service: Service, upstream: FakeUpstream) -> None:
    """The call at the upstream is given up long before its deadline."""
    upstream.always = Fault(hang=True)
    search = asyncio.create_task(service.search("otters", headers={"X-Request-Timeout-Ms": "600000"}))

    async def inside() -> int:
        return upstream.inside

    await until(inside, lambda inside: inside == 1)
    search.cancel()

    await until(inside, lambda inside: inside == 0)
    upstream.always = OK
    assert is_fine(await service.search("otters"))


class PlayedSidecar(FakeUpstream):
    """Plays the sidecar, to see what it is told: it speaks OpenAI's wire, and says that it is ready."""

    async def _handle(self, http: web.BaseRequest) -> web.StreamResponse:
        if http.path == "/readyz":
            return web.json_response({"status": "ready", "reasons": []})
        return await super()._handle(http)


async def test_what_is_left_of_the_deadline_goes_on(folder: str, database_url: str) -> None:
    """The sidecar is told less than the service was, and hears whose request it is and how urgent."""
    async with (
        PlayedSidecar(width=256) as peer,
        Service(
            folder, (__file__,), DATABASE_URL=database_url, EMBEDDING_SIDECAR_URL=f"http://127.0.0.1:{peer.port}"
        ) as service,
    ):
        await service.search("otters", headers={"X-Request-Timeout-Ms": "7000"})

        headers = peer.seen[-1].headers
        assert 1 <= int(headers["X-Request-Timeout-Ms"]) < 7000
        assert headers["X-Embedding-Priority"] == "interactive"
        assert headers["X-Embedding-Client"] == "rag"

        await service.take_in({"X-Request-Timeout-Ms": "30000"}, birds="Ravens.")

        headers = peer.seen[-1].headers
        assert 7000 < int(headers["X-Request-Timeout-Ms"]) < 30_000
        assert headers["X-Embedding-Priority"] == "bulk"


@pytest.mark.parametrize("patience", ["0", "-5", "soon", "600001"])
async def test_deadline_that_is_none(service: Service, patience: str) -> None:
    """422, in the form of all errors."""
    answer = await service.search("otters", headers={"X-Request-Timeout-Ms": patience})

    assert (answer.status, answer.error["code"]) == (422, "invalid_request")
    assert "X-Request-Timeout-Ms" in answer.error["message"]


# --- the caller ---


@pytest.mark.parametrize("question", ["", " ", "\x1c"])
async def test_empty_question(service: Service, question: str) -> None:
    """The drop-in's ValueError is a 422."""
    answer = await service.search(question)

    assert (answer.status, answer.error["code"]) == (422, "empty_input")


async def test_what_is_refused_is_not_quoted(service: Service) -> None:
    """A caller's text is in no error: half of a surrogate pair, which no JSON answer could hold, among them."""
    body = json.dumps({"documents": [{"name": "secret", "text": "secret \ud800"}, {"name": ""}]})

    async with service.session.post("/documents", data=body, headers={"Content-Type": "application/json"}) as http:
        answer: dict[str, Any] = await http.json()

    assert http.status == 422
    assert answer["error"]["code"] == "invalid_request"
    assert "documents.1.name" in answer["error"]["message"]
    assert "secret" not in json.dumps(answer)


# --- the database ---


async def test_database_that_is_gone_and_comes_back(folder: str, upstream: FakeUpstream) -> None:
    """503 with Retry-After; the rag waits for it; the pool finds it again by itself."""
    config = f"{folder}/sidecar.toml"
    Path(config).write_text(upstream.toml(dimensions=256), encoding="utf-8")
    postgres = await Postgres.start(f"{folder}/pg")
    try:
        async with Service(
            folder, (__file__,), DATABASE_URL=postgres.url, EMBEDDING_SIDECAR_CONFIG=config, RAG_MODEL="m"
        ) as service:
            await postgres.stop()

            for answer in [await service.search("otters"), await service.take_in(birds="Ravens.")]:
                assert (answer.status, answer.error["code"]) == (503, "database_unavailable")
                assert answer.headers["Retry-After"] == "1"
            assert await service.states() == {"database": "unhealthy", "embeddings": "healthy", "rag": "waiting"}

            postgres = await Postgres.start(f"{folder}/pg")

            assert is_fine(await service.search("otters"))
            assert (await service.get("/health")).status == 200
    finally:
        await postgres.stop()


async def test_second_server_for_the_same_data(folder: str) -> None:
    """It is refused with PostgreSQL's own words, and the first one goes on."""
    first = await Postgres.start(f"{folder}/pg")
    try:
        with pytest.raises(PostgresFailed, match=r"lock file .* already exists"):
            await Postgres.start(f"{folder}/pg")

        assert is_running(first.pid)
    finally:
        await first.stop()


async def test_folder_that_somebody_else_could_look_into(folder: str) -> None:
    """The socket has no password, so its folder is the lock."""
    os.chmod(folder, 0o755)

    with pytest.raises(PostgresFailed, match="that nobody else can look into"):
        await Postgres.start(folder)


# --- the end ---


async def children_of(service: Service, folder: str) -> list[int]:
    """Return the processes of the proxy and of PostgreSQL."""
    proxy = await until(service.proxy, lambda proxy: proxy["pid"])
    return [proxy["pid"], int(Path(f"{folder}/rag/data/postmaster.pid").read_text().split()[0])]


async def test_nothing_outlives_the_service(folder: str) -> None:
    """Killed like by the kernel, it leaves neither proxy nor PostgreSQL behind, and starts again with its data."""
    async with Service(folder, (__file__,)) as service:
        children = await children_of(service, folder)
        await service.take_in(birds="Ravens remember faces.")
        service.kill()

        async def running() -> list[bool]:
            return [is_running(pid) for pid in children]

        await until(running, lambda running: not any(running))

    async with Service(folder, (__file__,)) as service:
        assert "birds" in (await service.get("/documents")).document
        children = await children_of(service, folder)

    assert service.process.returncode == 0, service.output
    assert not any(is_running(pid) for pid in children)
