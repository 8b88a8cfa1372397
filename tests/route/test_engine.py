"""
The engine's promises on the whole route: real sockets, a real upstream that misbehaves, many callers at a time.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.fakes.running import Running, running
from tests.fakes.upstream import FakeUpstream, Fault, vector

SOON_S = 5.0
"""Bound of each wait for something that should come at once."""

RARELY = "[lifecycle]\ncanary_interval_s = 3600\n[attempt]\nbackoff_base_s = 0.001\n"
REFUSED = Fault(status=400, body={"error": {"message": "invalid input", "code": "bad_thing"}})
INTERNAL = Fault(status=500, body={"error": {"message": "unsupported value: NaN"}})


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as upstream:
        yield upstream


# --- hands ---


async def until(is_so: Callable[[], bool | Awaitable[bool]]) -> None:
    """Look again and again until something is so; fails after SOON_S."""
    async with asyncio.timeout(SOON_S):
        while True:
            found = is_so()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.005)


async def stages(proxy: Running) -> dict[str, Any]:
    return (await proxy.get("/status"))[1]["stages"]  # type: ignore[no-any-return]


async def waiting(proxy: Running, count: int, lane: str = "interactive") -> None:
    """Wait until so many inputs wait in a lane."""

    async def is_so() -> bool:
        lanes = (await stages(proxy))["microbatch"].get("m", {"lanes": {lane: {"inputs": 0}}})["lanes"]
        return bool(lanes[lane]["inputs"] == count)

    await until(is_so)


async def is_empty(proxy: Running) -> bool:
    """Whether nothing is left inside: no input, batch, slot, waiter."""
    found = await stages(proxy)
    batches = found["microbatch"].get("m")
    model = found["balance"]["m"]
    return not (
        found["admission"]["inputs"]
        or found["coalesce"]["inputs_in_flight"]
        or (batches and (batches["batches_in_flight"] or any(lane["inputs"] for lane in batches["lanes"].values())))
        or model["waiting_attempts"]
        or any(one["calls"] or one["waiting_canaries"] for one in model["upstreams"].values())
    )


def is_right(document: Any, *texts: str) -> bool:
    found = [
        numpy.frombuffer(base64.b64decode(item["embedding"]), "<f4")
        if isinstance(item["embedding"], str)
        else numpy.array(item["embedding"], "<f4")
        for item in document["data"]
    ]
    return len(found) == len(texts) and all(
        (row == vector(text, 8)).all() for row, text in zip(found, texts, strict=True)
    )


def ask(proxy: Running, *texts: str, **headers: str) -> asyncio.Task[tuple[int, Any, Any]]:
    """Start a request; `x_request_timeout_ms="200"` sets a header."""
    spelled = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"input": texts[0] if len(texts) == 1 else list(texts)}
    return asyncio.create_task(proxy.embed(body, headers=spelled))


# --- many callers, few calls ---


async def test_callers_share_calls(tmp_path: Path, upstream: FakeUpstream) -> None:
    """P2: while the only slot is busy callers gather, then leave together, each with its own vectors and usage."""
    gate = asyncio.Event()
    async with running(tmp_path, RARELY + upstream.toml(upstream="balance.slots = 1")) as proxy:
        upstream.script = [Fault(wait_for=gate)]
        first = ask(proxy, "first")
        await until(lambda: upstream.inside == 1)
        texts = [f"text {n}" * (n + 1) for n in range(20)]
        others = [ask(proxy, text) for text in texts]
        await waiting(proxy, 20)
        gate.set()
        answers = await asyncio.gather(first, *others)
        empty = await is_empty(proxy)

    assert all(
        status == 200 and is_right(document, text)
        for (status, document, _), text in zip(answers, ["first", *texts], strict=True)
    )
    assert [len(seen.inputs) for seen in upstream.seen] == [1, 20]
    told = sum(document["usage"]["total_tokens"] for _, document, _ in answers)
    assert told == sum(map(len, ["first", *texts]))  # the fake counts characters
    assert empty


async def test_late_query_goes_before_early_bulk(tmp_path: Path, upstream: FakeUpstream) -> None:
    """P3: what leaves is decided when it can leave: a query that comes last goes first."""
    gate = asyncio.Event()
    settings = "balance.slots = 1\nbatch.max_inputs = 8"
    async with running(tmp_path, RARELY + upstream.toml(upstream=settings)) as proxy:
        upstream.script = [Fault(wait_for=gate)]
        bulk = ask(proxy, *(f"chunk {n}" for n in range(40)))
        await until(lambda: upstream.inside == 1)
        query = ask(proxy, "query")
        await waiting(proxy, 1)
        gate.set()
        status, document, _ = await query
        after = len(upstream.seen)
        bulk_status, bulk_document, _ = await bulk

    assert (status, bulk_status) == (200, 200)
    assert is_right(document, "query")
    assert is_right(bulk_document, *(f"chunk {n}" for n in range(40)))
    assert upstream.seen[1].inputs == ["query"]
    assert after <= 3


async def test_neither_class_starves(tmp_path: Path, upstream: FakeUpstream) -> None:
    """P3: under a stream of queries bulk goes on, and under bulk queries do."""
    settings = "balance.slots = 1\nbatch.max_inputs = 2"
    async with running(tmp_path, RARELY + upstream.toml(upstream=settings)) as proxy:
        bulk = ask(proxy, *(f"chunk {n}" for n in range(20)))
        order: list[str] = []

        async def stream(name: str) -> None:
            for n in range(200):
                if bulk.done():
                    return
                await proxy.embed({"input": f"{name} {n}"})
                order.append(name)

        async with asyncio.timeout(30):
            await asyncio.gather(*(stream(f"caller {n}") for n in range(6)), bulk)

    assert bulk.result()[0] == 200
    assert len(order) >= 20  # queries were answered while the bulk went through


async def test_flood_of_one_caller(tmp_path: Path, upstream: FakeUpstream) -> None:
    """P3: callers take turns: who comes with one text does not wait behind another's sixty."""
    gate = asyncio.Event()
    settings = "balance.slots = 1\nbatch.max_inputs = 4"
    async with running(tmp_path, RARELY + upstream.toml(upstream=settings)) as proxy:
        upstream.script = [Fault(wait_for=gate)]
        first = ask(proxy, "first")
        await until(lambda: upstream.inside == 1)
        flood = [ask(proxy, f"flood {n}", X_Embedding_Client="flood") for n in range(60)]
        await waiting(proxy, 60)
        single = ask(proxy, "single", X_Embedding_Client="single")
        await waiting(proxy, 61)
        gate.set()
        await asyncio.gather(first, single, *flood)

    place = next(n for n, seen in enumerate(upstream.seen) if "single" in seen.inputs)
    assert place <= 2


async def test_long_list_is_cut_and_put_together(tmp_path: Path, upstream: FakeUpstream) -> None:
    """P2: a list beyond the limits of inputs, bytes and tokens goes in several calls, none of them over a limit."""
    settings = "batch = { max_inputs = 7, max_bytes = 60, max_tokens = 1000 }"
    texts = [f"{n}" * (1 + n % 13) for n in range(100)]
    async with running(tmp_path, RARELY + upstream.toml(upstream=settings)) as proxy:
        status, document, _ = await ask(proxy, *texts)

    assert status == 200
    assert is_right(document, *texts)
    assert all(len(seen.inputs) <= 7 and sum(map(len, seen.inputs)) <= 60 for seen in upstream.seen)
    assert len({text for seen in upstream.seen for text in seen.inputs}) == len(set(texts))


# --- one bad input ---


@pytest.mark.parametrize("fault", [REFUSED, INTERNAL], ids=["refused", "fails"])
@pytest.mark.parametrize("place", [0, 9, 19])
async def test_poison_fails_its_own_request(tmp_path: Path, upstream: FakeUpstream, fault: Fault, place: int) -> None:
    """P3: of twenty callers in one batch only the one with the poison fails, and learns which input it was."""
    gate = asyncio.Event()
    async with running(tmp_path, RARELY + upstream.toml(upstream="balance.slots = 1")) as proxy:
        upstream.script = [Fault(wait_for=gate)]
        upstream.poison = {"poison": fault}
        first = ask(proxy, "first")
        await until(lambda: upstream.inside == 1)
        asked = [ask(proxy, f"a {n}", "poison" if n == place else f"b {n}") for n in range(20)]
        await waiting(proxy, 40, "bulk")
        gate.set()
        answers = await asyncio.gather(*asked)
        await first
        calls = len(upstream.seen)
        again = await proxy.embed({"input": ["c", "poison", "d"]})
        alone = [seen.inputs for seen in upstream.seen[calls:]]
        state = (await stages(proxy))["circuit"]["fake"]["state"]

    for n, (status, document, _) in enumerate(answers):
        if n == place:
            assert status in (400, 502), document
            assert document["error"]["param"] == "input[1]"
        else:
            assert status == 200, document
            assert is_right(document, f"a {n}", f"b {n}")
    assert again[0] in (400, 502)
    assert ["poison"] in alone  # the same text travels alone for a while
    assert all("poison" not in inputs or inputs == ["poison"] for inputs in alone)
    assert state == "closed"


async def test_one_row_that_is_no_vector(tmp_path: Path, upstream: FakeUpstream) -> None:
    """P2, P3: a row of NaN fails the text it belongs to; the rows beside it are asked for again and answered."""

    def spoil(answer: Any) -> Any:
        spoiled = base64.b64encode(numpy.full(8, numpy.nan, "<f4").tobytes()).decode()
        data = [item | {"embedding": spoiled} if item["index"] == spot else item for item in answer["data"]]
        return answer | {"data": data}

    async with running(tmp_path, RARELY + upstream.toml()) as proxy:
        spot = 2
        upstream.script = [Fault(change=spoil)]
        once = await ask(proxy, "a", "b", "c", "d")
        spot = 0
        upstream.poison = {"nan": Fault(change=spoil)}
        lasting = await ask(proxy, "nan")

    assert once[0] == 200
    assert is_right(once[1], "a", "b", "c", "d")
    assert (lasting[0], lasting[1]["error"]["code"]) == (502, "bad_vectors")


# --- limits ---


@pytest.mark.parametrize("slots", [1, 3])
async def test_never_more_calls_than_slots(tmp_path: Path, upstream: FakeUpstream, slots: int) -> None:
    """P4: whatever comes, and whoever leaves, no more calls than slots are under way."""
    settings = f"balance.slots = {slots}\nbatch.max_inputs = 3"
    async with running(tmp_path, RARELY + upstream.toml(upstream=settings)) as proxy:
        asked = [ask(proxy, *(f"{n} {m}" for m in range(n % 5 + 1))) for n in range(60)]
        for task in asked[::4]:
            await asyncio.sleep(0.001)
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await until(lambda: is_empty(proxy))

    assert upstream.most_inside <= slots


async def test_tokens_per_minute_are_paced(tmp_path: Path, upstream: FakeUpstream) -> None:
    """P4: what passes the limit of tokens waits; whoever cannot wait that long is told at once, with Retry-After."""
    async with running(
        tmp_path, RARELY + upstream.toml(upstream="bucket.tokens_per_minute = 1000\nbatch.max_inputs = 1")
    ) as proxy:
        answers = await asyncio.gather(
            *(ask(proxy, f"{n} " + "x" * 198, X_Request_Timeout_Ms="1000") for n in range(12))
        )
        spent = sum(len(seen.inputs[0]) for seen in upstream.seen)

    statuses = [status for status, _, _ in answers]
    assert statuses.count(200) >= 2
    assert set(statuses) <= {200, 429, 503}
    assert all("Retry-After" in headers for status, _, headers in answers if status != 200)
    assert spent <= 1000  # the fake counts characters: more than the estimate, so debts are kept too


async def test_limits_in_headers_are_kept(tmp_path: Path, upstream: FakeUpstream) -> None:
    """P4: an upstream that tells its limit is paced by it, without any setting."""
    headers = {"x-ratelimit-limit-requests": "600", "x-ratelimit-remaining-requests": "599"}
    async with running(tmp_path, RARELY + upstream.toml(upstream="batch.max_inputs = 1")) as proxy:
        upstream.always = Fault(headers=headers)
        await ask(proxy, "first")
        bucket = (await stages(proxy))["bucket"]["fake"]

    assert bucket["requests_per_minute"] == 600
    assert bucket["tokens_per_minute"] == 0


@pytest.mark.parametrize(
    ("body", "headers", "status", "code", "calls"),
    [
        ({"error": {"code": "rate_limit_exceeded"}}, {"Retry-After": "0.05"}, 200, "", 2),
        ({"error": {"code": "rate_limit_exceeded"}}, {"Retry-After": "3600"}, 429, "rate_limit_exceeded", 1),
        ({"error": {"code": "insufficient_quota"}}, {}, 502, "upstream_quota", 1),
        ({"error": {"message": "Request too large for x"}}, {}, 400, "input_too_long", 1),
    ],
    ids=["rate", "rate, for an hour", "quota", "too large"],
)
async def test_four_kinds_of_429(
    tmp_path: Path,
    upstream: FakeUpstream,
    body: Any,
    headers: dict[str, str],
    status: int,
    code: str,
    calls: int,
) -> None:
    """P4: a rate is waited for, a long wait told, a used-up quota and a call that is too large never repeated."""
    async with running(tmp_path, RARELY + upstream.toml()) as proxy:
        upstream.script = [Fault(status=429, body=body, headers=headers)]
        found, document, _ = await ask(proxy, "x")

    assert found == status
    assert document.get("error", {"code": ""})["code"] == code
    assert len(upstream.seen) == calls


async def test_call_that_is_too_large_is_cut(tmp_path: Path, upstream: FakeUpstream) -> None:
    """P3: a refusal for size is no refusal of the inputs: smaller calls take them."""
    too_large = Fault(status=413, body={"error": {"message": "batch too large"}})
    async with running(tmp_path, RARELY + upstream.toml()) as proxy:
        upstream.script = [too_large]
        status, document, _ = await ask(proxy, *"abcd")

    assert status == 200
    assert is_right(document, *"abcd")


# --- deadlines ---


async def test_deadline_in_the_queue_and_in_the_call(tmp_path: Path, upstream: FakeUpstream) -> None:
    """P1: who was never sent is told so, who was sent too; only that one can be the upstream's fault."""
    async with running(tmp_path, RARELY + upstream.toml(upstream="balance.slots = 1")) as proxy:
        upstream.always = Fault(hang=True)
        sent = ask(proxy, "sent", X_Request_Timeout_Ms="600")
        await until(lambda: upstream.inside == 1)
        queued = ask(proxy, "queued", X_Request_Timeout_Ms="200")
        answers = await asyncio.gather(queued, sent)
        metrics = (await proxy.get("/metrics"))[1]

    assert [(status, document["error"]["code"]) for status, document, _ in answers] == [
        (503, "queue_timeout"),
        (504, "deadline_exceeded"),
    ]
    assert answers[0][2]["Retry-After"] == "1"
    assert 'breaker_moves_total{state="open"' not in metrics


async def test_what_would_be_late_is_refused_at_once(tmp_path: Path, upstream: FakeUpstream) -> None:
    """P1: when what waits ahead takes longer than the deadline allows, the caller hears so now, and when to try."""
    settings = "balance.slots = 1\nbatch.max_inputs = 1"

    async def slowly() -> None:
        while True:  # opens the gate for one call at a time: 20 a second
            await asyncio.sleep(0.05)
            upstream.always.wait_for, old = asyncio.Event(), upstream.always.wait_for
            assert old is not None
            old.set()

    async with running(tmp_path, RARELY + upstream.toml(upstream=settings)) as proxy:
        upstream.always = Fault(wait_for=asyncio.Event())
        pace = asyncio.create_task(slowly())
        try:
            asked = [ask(proxy, f"t {n}", X_Request_Timeout_Ms="30000") for n in range(40)]
            await until(lambda: sum(task.done() for task in asked) >= 5)
            loop = asyncio.get_running_loop()
            start = loop.time()
            status, document, headers = await ask(proxy, "late", X_Request_Timeout_Ms="100")
            took_s = loop.time() - start
            cached = await ask(proxy, "t 0", X_Request_Timeout_Ms="100")
            answers = await asyncio.gather(*asked)
        finally:
            pace.cancel()

    assert (status, document["error"]["code"]) == (503, "would_be_late")
    assert int(headers["Retry-After"]) >= 1
    assert took_s < 0.1
    assert (cached[0], cached[2]["X-Embedding-Cache"]) == (200, "hit")  # what is known waits for nobody
    assert {status for status, _, _ in answers} == {200}


# --- outages ---


async def test_idle_upstream_recovers_without_traffic(tmp_path: Path, upstream: FakeUpstream) -> None:
    """P5: after the breaker has opened nobody has to ask for it to close again: a canary is the probe."""
    toml = upstream.toml(upstream="circuit = { failures = 2, open_s = 0.2 }")
    lifecycle = "[lifecycle]\ncanary_interval_s = 3600\ncanary_retry_s = 0.05\n"
    lifecycle += "[attempt]\nmax_attempts = 2\nbackoff_base_s = 0.001\n"
    async with running(tmp_path, lifecycle + toml) as proxy:
        upstream.always = Fault(status=503, body={})
        broken = await ask(proxy, "x")

        async def is_state(state: str) -> bool:
            return bool((await stages(proxy))["circuit"]["fake"]["state"] == state)

        was_open = await is_state("open")
        upstream.always = Fault()
        seen = len(upstream.seen)
        await until(lambda: is_state("closed"))
        asked = len(upstream.seen) - seen

    assert broken[0] == 502
    assert was_open
    assert asked == 0  # the canary, which the fake does not count, and nobody else


async def test_outage_with_many_waiting(tmp_path: Path, upstream: FakeUpstream) -> None:
    """P5: when the breaker opens, all who wait hear so at once, each with its own answer; retries are few."""
    settings = "balance.slots = 2\nbatch.max_inputs = 2\ncircuit = { failures = 3, open_s = 60 }"
    async with running(tmp_path, RARELY + upstream.toml(upstream=settings)) as proxy:
        upstream.always = Fault(status=502, body={})
        async with asyncio.timeout(SOON_S):
            answers = await asyncio.gather(*(ask(proxy, f"t {n}") for n in range(200)))
        empty = await is_empty(proxy)

    codes = {document["error"]["code"] for _, document, _ in answers}
    assert codes <= {"upstream_failed", "circuit_open"}
    assert len(upstream.seen) <= 6
    assert empty


# --- bounds, and nothing left behind ---


async def test_full_house(tmp_path: Path, upstream: FakeUpstream) -> None:
    """P7: what passes the bounds is refused at once with Retry-After; the others are served, and then there is room."""
    gate = asyncio.Event()
    toml = RARELY + "[admission]\nmax_inputs = 10\n[request]\nmax_inputs = 10\n" + upstream.toml()
    async with running(tmp_path, toml) as proxy:
        upstream.always = Fault(wait_for=gate)
        inside = [ask(proxy, f"t {n}") for n in range(10)]

        async def are_inside() -> bool:
            return bool((await stages(proxy))["admission"]["inputs"] == 10)

        await until(are_inside)
        status, document, headers = await ask(proxy, "one more")
        gate.set()
        answers = await asyncio.gather(*inside)
        after = await ask(proxy, "one more")

    assert (status, document["error"]["code"], headers["Retry-After"]) == (503, "overloaded", "1")
    assert {status for status, _, _ in answers} == {200}
    assert after[0] == 200


@pytest.mark.parametrize("when", ["waiting", "in flight", "half answered", "between attempts"])
async def test_callers_that_leave(tmp_path: Path, upstream: FakeUpstream, when: str) -> None:
    """P3, P7: who leaves cancels only what nobody else waits for, and leaves no slot, batch or waiter behind."""
    gate = asyncio.Event()
    settings = "balance.slots = 1\nbatch.max_inputs = 4"
    toml = RARELY.replace("0.001", "5") + upstream.toml(upstream=settings)
    async with running(tmp_path, toml) as proxy:
        last = Fault(wait_for=gate)
        upstream.script = {
            "waiting": [last],
            "in flight": [last],
            "half answered": [Fault(), last],
            "between attempts": [Fault(status=502, body={})],
        }[when]
        leaving = [ask(proxy, *(f"l {n} {m}" for m in range(4))) for n in range(3)]
        await until(lambda: not upstream.script and upstream.inside == (when != "between attempts"))
        staying = ask(proxy, "stays", "l 2 3")
        if when != "between attempts":  # then the slot is free, and the others pass by
            await waiting(proxy, 1 + 4 * (2 if when != "half answered" else 1), "bulk")
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        gate.set()
        status, document, _ = await staying
        await until(lambda: is_empty(proxy))

    assert status == 200
    assert is_right(document, "stays", "l 2 3")
