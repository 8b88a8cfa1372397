"""The measuring tools measure: their arithmetic, the vectors both ends know, and mock and generator face to face."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from proxy.wiring.config import load
from tests.load.bench import read
from tests.load.generator import Checker, Load, Plan, Tally, address, fit, plan_of, report, zipf_steps
from tests.load.mock import Bucket, Config, Connection, Upstream, seconds
from tests.load.processes import settings
from tests.load.results import Row, ideal, median, number, percentile, table
from tests.load.scenarios import SCENARIOS, Callers, failures
from tests.load.stages import by_stage, stage_of
from tests.load.vectors import Table, head_decimals, is_head, key

TABLE = Table()

# --- arithmetic ---


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.5, 5.0), (0.51, 6.0), (0.9, 9.0), (0.99, 10.0), (1.0, 10.0)]
)
def test_percentile_is_a_value_that_was_measured(share: float, expected: float) -> None:
    """It is the smallest value that this share of the values does not exceed."""
    assert percentile([float(n) for n in range(1, 11)], share) == expected


def test_percentile_of_nothing() -> None:
    """Without values it is 0, as the Go generator prints it."""
    assert percentile([], 0.99) == 0.0


@pytest.mark.parametrize(("callers", "expected"), [(64, 1684), (256, 4129), (8, 258), (4, 129)])
def test_ideal_of_an_upstream_with_slots(callers: int, expected: int) -> None:
    """The figures of the issue; with fewer callers than slots, some stay free."""
    assert round(ideal(8, callers, base_ms=30, per_input_ms=1)) == expected


@pytest.mark.parametrize(
    ("bounds", "value", "is_met"),
    [
        ({"at_least": 2.0}, 2.0, True),
        ({"at_least": 2.0}, 1.99, False),
        ({"at_most": 2.0}, 2.0, True),
        ({"at_most": 2.0}, 2.01, False),
        ({"below": 80.0}, 79.9, True),
        ({"below": 80.0}, 80.0, False),
        ({"at_least": 2.0}, math.nan, False),
        ({"at_most": 0}, math.nan, False),
    ],
)
def test_row_is_judged_at_its_bound(bounds: dict[str, float], value: float, is_met: bool) -> None:
    """A figure that could not be measured meets nothing."""
    row = Row("s", "f", value, **bounds)

    assert (row.is_met, row.is_target, row.verdict) == (is_met, True, "pass" if is_met else "MISS")


def test_row_without_a_target_has_no_verdict() -> None:
    """Figures for information are no targets."""
    row = Row("s", "f", 1.0)

    assert (row.is_target, row.target, row.verdict) == (False, "", "")


def test_table_is_markdown() -> None:
    """It can be pasted into docs/performance.md."""
    laid = table([Row("single-64", "sidecar ÷ bare", 2.345, "×", at_least=2), Row("paced", "x", math.nan, at_most=0)])

    assert laid.splitlines() == [
        "| scenario  | figure         | measured | target |      |",
        "| --------- | -------------- | -------- | ------ | ---- |",
        "| single-64 | sidecar ÷ bare | 2.35 ×   | ≥ 2    | pass |",
        "| paced     | x              | –        | ≤ 0    | MISS |",
    ]


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (0.853, "0.85"), (12.34, "12.3"), (4129.3, "4129")])
def test_numbers_have_three_digits_that_mean_something(value: float, text: str) -> None:
    """More of them would be noise."""
    assert number(value) == text


def test_median_of_nothing_meets_no_target() -> None:
    """It is not a number."""
    assert math.isnan(median([]))


# --- scenarios and settings ---


def test_scenarios_are_those_of_the_page() -> None:
    """docs/performance.md explains each scenario, and no other."""
    page = Path(__file__).parents[1] / "docs" / "performance.md"
    rows = [line.split("|")[1].strip() for line in page.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]

    assert rows == [f"`{scenario.name}`" for scenario in SCENARIOS]


def test_command_line_names_a_scenario() -> None:
    """Repetitions and names are taken, others refused."""
    options = read(["--only", "paced", "--only", "stall", "--seconds", "1", "--repeat", "2"])

    assert (options.only, options.seconds, options.repeat) == (["paced", "stall"], 1.0, 2)
    with pytest.raises(SystemExit):
        read(["--only", "nothing"])


def test_generator_takes_what_a_scenario_says() -> None:
    """Options of a scenario are options of the generator."""
    options = [part for name, value in Callers(64, inputs=8).options.items() for part in (f"--{name}", str(value))]
    plan = plan_of(["--target", "http://127.0.0.1:1/v1/embeddings", "--duration", "1.5s", *options])

    assert (plan.c, plan.batch, plan.format, plan.texts, plan.duration_s) == (64, 8, "base64", "unique", 1.5)


def test_proxy_takes_the_settings(tmp_path: Path) -> None:
    """What the harness writes is settings without mistakes."""
    file = tmp_path / "settings.toml"
    file.write_text(settings("127.0.0.1:9", "/tmp/s.sock", "balance.slots = 8\nbucket.requests_per_minute = 1200"))
    upstream = load(str(file), {}).settings.upstreams["mock"]

    assert (upstream.balance.slots, upstream.bucket.requests_per_minute) == (8, 1200)


def test_everything_that_goes_wrong_is_a_failure() -> None:
    """Errors by status, wrong and missing vectors, another format, and what was not sent."""
    run = {
        "errors": {"http_503": 2},
        "wrong_vectors": 1,
        "missing_vectors": 1,
        "format_mismatch": 1,
        "dropped_local": 1,
    }

    assert failures(run) == 6


@pytest.mark.parametrize(("text", "expected"), [("90s", 90.0), ("1.5m", 90.0), ("200ms", 0.2), ("1h", 3600.0)])
def test_durations_are_those_of_go(text: str, expected: float) -> None:
    """Both generators take them alike."""
    assert seconds(text) == expected


def test_address_of_a_target() -> None:
    """TCP on loopback, or a Unix socket; nothing else."""
    assert address("http://127.0.0.1:80/v1/embeddings") == ("tcp", "127.0.0.1:80", "127.0.0.1:80", "/v1/embeddings")
    assert address("unix:/a/b.sock:/v1/embeddings") == ("unix", "/a/b.sock", "localhost", "/v1/embeddings")
    with pytest.raises(ValueError, match="loopback"):
        address("http://192.0.2.1/v1/embeddings")


# --- vectors ---


def test_vector_is_the_one_of_the_go_tools() -> None:
    """Known numbers of `hello`, as the Go mock answers them."""
    vector = TABLE.vector(key(b"hello"))
    known = {
        0: -0.020507812,
        1: 0.027832031,
        7: -0.027832031,
        8: -0.005126953,
        9: 0.036583915,
        10: -0.02111796,
        11: -0.016739072,
        1535: 0.023793867,
    }

    assert key(b"hello").hex() == "2cf24dba5fb0a30e6b"
    assert vector.shape == (1536,)
    assert {at: float(vector[at]) for at in known} == {at: float(numpy.float32(x)) for at, x in known.items()}
    assert TABLE.base64(key(b"hello"))[0] == b"AACovAAA5DwAAEy8AABoPAAABLwAAEA8AAAMPAAA5LwAAKi7"


@pytest.mark.parametrize("text", ["hello", "", "näh?", "a" * 500])
def test_vector_is_the_same_in_every_form(text: str) -> None:
    """Base64 and decimals say what the numbers say."""
    text_key = key(text.encode())
    vector = TABLE.vector(text_key)

    unpacked = numpy.frombuffer(base64.b64decode(b"".join(TABLE.base64(text_key))), dtype="<f4")
    decimals = json.loads(b"[" + b"".join(TABLE.decimals(text_key)) + b"]")

    assert numpy.array_equal(unpacked, vector)
    assert numpy.array_equal(numpy.array(decimals, dtype="f4"), vector)
    assert TABLE.is_vector(decimals, text_key)
    assert is_head(head_decimals(text_key).split(b","), text_key)


def test_vector_of_another_text_is_seen() -> None:
    """By its head, by one number anywhere, by a number that is none, and by its width."""
    mine, other = key(b"mine"), key(b"other")
    numbers = TABLE.vector(mine).tolist()

    assert not is_head(head_decimals(other).split(b","), mine)
    assert not is_head([b"nothing"] * 9, mine)
    assert not is_head([b"0"] * 8, mine)
    assert not TABLE.is_vector([*numbers[:-1], numbers[-1] + 1e-4], mine)
    assert not TABLE.is_vector(numbers[:-1], mine)
    assert not TABLE.is_vector(["x"], mine)


def answer(texts: list[str], *, encoding: str = "base64", order: list[int] | None = None) -> bytes:
    """Write an answer another way than the mock: blanks, `index` last."""
    data = []
    for index in order or range(len(texts)):
        vector = TABLE.vector(key(texts[index].encode()))
        said: Any = base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()
        data.append({"object": "embedding", "embedding": said, "index": index})
    return json.dumps({"object": "list", "data": data, "usage": {"prompt_tokens": 7, "total_tokens": 7}}).encode()


def checked(body: bytes, texts: list[str], encoding: str) -> tuple[str, Tally]:
    tally = Tally()
    checker = Checker(Plan("", format=encoding, full_every=2))
    buffer = bytearray(b"head" + body + b"tail")
    return checker.check(buffer, 4, 4 + len(body), texts, tally), tally


@pytest.mark.parametrize("encoding", ["base64", "float"])
def test_right_answer_counts_in_any_order(encoding: str) -> None:
    """Vectors are found by their index, however the JSON is written."""
    texts = ["a", "b", "c"]
    error, tally = checked(answer(texts, encoding=encoding, order=[2, 0, 1]), texts, encoding)

    assert (error, tally.items, tally.wrong_vectors, tally.missing_vectors) == ("", 3, 0, 0)
    assert (tally.usage_tokens, tally.format_mismatch) == (7, 0)


@pytest.mark.parametrize("encoding", ["base64", "float"])
def test_wrong_and_missing_vectors_are_counted(encoding: str) -> None:
    """Another text's vector is wrong, one too few is missing, and the other encoding does not match."""
    error, tally = checked(answer(["a", "x"], encoding=encoding), ["a", "b", "c"], encoding)
    _, mismatch = checked(answer(["a"], encoding=encoding), ["a"], "float" if encoding == "base64" else "base64")

    assert (error, tally.items, tally.wrong_vectors, tally.missing_vectors) == ("wrong_vector", 1, 1, 1)
    assert mismatch.format_mismatch == 1


@pytest.mark.parametrize("body", [b"", b"{}", b'{"data":[{"embedding":"AAAA', b'{"data":[{"embedding":[1,2'])
def test_answer_without_vectors_is_an_error(body: bytes) -> None:
    """What cannot be read is not counted as anything else."""
    assert checked(body, ["a"], "base64")[0] == "bad_json"


# --- the mock's rules, the generator's texts ---


def test_bucket_fills_evenly() -> None:
    """1200 a minute are one every 50 ms; two at once when the burst is a tenth of a second."""
    bucket = Bucket(1200, 0.1)

    waits = [bucket.take(now) for now in (0.0, 0.0, 0.0, 0.05, 0.06)]

    assert waits == pytest.approx([0.0, 0.0, 0.05, 0.0, 0.04])


def test_config_that_the_mock_cannot_keep_is_refused() -> None:
    """A limit that is silently not there would spoil a measurement."""
    assert Config.read('{"base_ms": 30, "overflow": "429"}') == Config(base_ms=30, overflow="429")
    with pytest.raises(ValueError, match="drip_p"):
        Config.read('{"drip_p": 0.1}')
    with pytest.raises(ValueError, match="more than 1"):
        Config.read('{"hang_p": 0.6, "err500_p": 0.6}')
    with pytest.raises(ValueError, match="overflow"):
        Config.read('{"overflow": "drop"}')


def test_zipf_prefers_the_first() -> None:
    """The shares fall as 1, 1/2, 1/3 with an exponent of one."""
    steps = zipf_steps(3, 1.0)

    assert steps == pytest.approx([6 / 11, 9 / 11, 1.0])


def test_texts_have_their_length() -> None:
    """A text begins as it should and is as long as it should be."""
    assert (len(fit("u1-2-3", 60, 5)), fit("u1-2-3", 60, 5)[:7]) == (60, "u1-2-3 ")


# --- face to face ---


@contextlib.asynccontextmanager
async def served(config: Config) -> AsyncIterator[tuple[str, Upstream]]:
    upstream = Upstream(TABLE, config)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(upstream), "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/embeddings", upstream
    finally:
        server.close()
        await server.wait_closed()


async def ran(plan: Plan) -> dict[str, Any]:
    load = Load(plan)
    took_s = await load.run()
    await asyncio.sleep(0)
    return report(plan, load.tally, took_s)


@pytest.mark.parametrize("encoding", ["base64", "float"])
@pytest.mark.parametrize("batch", [1, 5])
async def test_generator_likes_what_the_mock_answers(encoding: str, batch: int) -> None:
    """Every request is answered with its vectors, over as many connections as there are callers."""
    async with served(Config()) as (target, upstream):
        run = await ran(Plan(target, c=3, requests=20, batch=batch, format=encoding, full_every=2))

    assert (run["requests"], run["ok"], run["items"], failures(run)) == (20, 20, 20 * batch, 0)
    assert (upstream.stats.Requests, upstream.stats.Items, upstream.stats.ConnsPeak) == (20, 20 * batch, 3)


async def test_mock_keeps_its_slots() -> None:
    """Two slots are never three, and the others wait their turn."""
    async with served(Config(base_ms=2, max_concurrent=2)) as (target, upstream):
        run = await ran(Plan(target, c=5, requests=10))

    assert (run["ok"], upstream.stats.ExecMax, upstream.stats.InflightMax) == (10, 2, 5)
    assert run["wall_s"] >= 0.01


async def test_mock_refuses_above_its_slots() -> None:
    """With overflow 429 nobody waits."""
    async with served(Config(base_ms=5, max_concurrent=1, overflow="429")) as (target, upstream):
        run = await ran(Plan(target, c=2, requests=2))

    assert (run["ok"], run["errors"], upstream.stats.OverflowRejected) == (1, {"http_429": 1}, 1)


@pytest.mark.parametrize(
    ("share", "error", "count"),
    [
        ("err500_p", "http_500", "E500"),
        ("err503_p", "http_503", "E503"),
        ("err429_p", "http_429", "E429"),
        ("reset_p", "reset", "Reset"),
        ("hang_p", "timeout", "Hang"),
    ],
)
async def test_mock_fails_as_it_is_told(share: str, error: str, count: str) -> None:
    """Each fault reaches the caller as what it is, and leaves nothing behind that counts as under way."""
    async with served(Config(**{share: 1.0})) as (target, upstream):
        run = await ran(Plan(target, c=1, requests=2, timeout_s=0.1))
        async with asyncio.timeout(10):
            while upstream.inflight:
                await asyncio.sleep(0)

    assert (run["ok"], run["errors"]) == (0, {error: 2})
    assert getattr(upstream.stats, count) >= 2


async def test_hanging_calls_hold_no_slot() -> None:
    """A call that hangs is stuck in the network; the next one gets its slot."""
    async with served(Config(hang_p=1.0, max_concurrent=1)) as (target, upstream):
        await ran(Plan(target, c=3, requests=3, timeout_s=0.1))

    assert (upstream.stats.Hang, upstream.stats.ExecMax) == (3, 1)


async def test_mock_recovers_when_it_is_told() -> None:
    """Faults and limits are those of the last word, not of the first."""
    async with served(Config(err500_p=1.0)) as (target, upstream):
        upstream.configure(Config())
        run = await ran(Plan(target, c=1, requests=3))

    assert (run["ok"], run["errors"]) == (3, {})


async def test_open_loop_sends_at_its_rate() -> None:
    """Requests leave at the rate while earlier ones are still under way."""
    async with served(Config(base_ms=20)) as (target, upstream):
        run = await ran(Plan(target, mode="open", rate=500, requests=20))

    assert (run["ok"], run["dropped_local"]) == (20, 0)
    assert upstream.stats.InflightMax > 1


async def test_nobody_at_home() -> None:
    """Refused connections are errors, and the run ends."""
    async with served(Config()) as (target, _):
        pass
    run = await ran(Plan(target, c=2, requests=4))

    assert run["errors"] == {"refused": 4}


STEPS = ("chunks", "close", "cut", "silence")


@contextlib.asynccontextmanager
async def playing() -> AsyncIterator[str]:
    """Play a server that answers its requests in turn as STEPS says, whatever connection they come on."""
    steps = iter(STEPS)
    done = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                text = json.loads(await reader.readexactly(length))["input"]
                step = next(steps)
                body = answer([text])
                if step == "silence":
                    await done.wait()
                elif step == "cut":
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:100])
                else:
                    close = b"Connection: close\r\n" if step == "close" else b""
                    writer.write(b"HTTP/1.1 200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n" % close)
                    for at in range(0, len(body), 1000):
                        piece = body[at : at + 1000]
                        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                        await writer.drain()
                    writer.write(b"0\r\n\r\n")
                if step != "chunks":
                    break
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/embeddings"
    finally:
        done.set()
        server.close()
        await server.wait_closed()


async def test_generator_knows_how_an_answer_can_fail() -> None:
    """Chunks are put together, a closed connection is opened anew, a cut answer and a late one are errors."""
    async with playing() as target:
        run = await ran(Plan(target, c=1, requests=len(STEPS), timeout_s=0.1))

    assert (run["ok"], run["errors"]) == (2, {"truncated": 1, "timeout": 1})


# --- profiles ---


@pytest.mark.parametrize(
    ("function", "stage"),
    [
        (("/x/proxy/edge/accept.py", 1, "handle"), "edge.accept"),
        (("/x/proxy/upstream/translate/openai.py", 1, "body"), "upstream.translate"),
        (("/x/proxy/funnel/microbatch/__init__.py", 1, "take"), "funnel.microbatch"),
        (("/x/proxy/edge/__init__.py", 1, "<module>"), "edge"),
        (("/proxy/of/mine/proxy/base/keys.py", 1, "key"), "base.keys"),
        (("/v/lib/python3.11/site-packages/aiohttp/web.py", 1, "run"), "aiohttp"),
        (("/usr/lib/python3.11/asyncio/tasks.py", 1, "wait"), "asyncio"),
        (("/usr/lib/python3.11/json/decoder.py", 1, "decode"), "standard library"),
        (("~", 0, "<orjson.loads>"), "orjson (C)"),
        (("~", 0, "<method 'get' of 'dict' objects>"), ""),
        (("<string>", 2, "__init__"), ""),
    ],
)
def test_functions_belong_to_stages(function: tuple[str, int, str], stage: str) -> None:
    """Files tell the room, libraries their name; small things in C are their caller's cost."""
    assert stage_of(function) == stage


def test_small_calls_are_the_callers_cost() -> None:
    """Two rooms that call `dict.get` each get their part of it; what nobody called stays visible."""
    accept, cache = ("/x/proxy/edge/accept.py", 1, "f"), ("/x/proxy/funnel/cache.py", 1, "g")
    get = ("~", 0, "<method 'get' of 'dict' objects>")
    stats = {
        accept: (1, 1, 1.0, 1.5, {}),
        cache: (2, 2, 2.0, 2.25, {accept: (2, 2, 2.0, 2.25)}),
        get: (4, 4, 1.0, 1.0, {accept: (3, 3, 0.5, 0.5), cache: (1, 1, 0.25, 0.25)}),
    }

    costs = by_stage(stats)

    assert {stage: (cost.seconds, cost.calls) for stage, cost in costs.items()} == {
        "edge.accept": (1.5, 4),
        "funnel.cache": (2.25, 3),
        "other": (0.25, 0),
    }
