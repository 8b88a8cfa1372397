"""Whatever befalls an upstream, the caller has the right vectors or one clear error, in time."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.fakes.running import Running, running
from tests.fakes.upstream import FakeUpstream, Fault, vector
from tests.route.conftest import FAST


def change_first(**fields: Any):
    """Return a change of the right answer: its first item gets other fields."""

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        answer["data"][0] |= fields
        return answer

    return change


def with_data(change: Any):
    return lambda answer: answer | {"data": change(answer["data"])}


ONE_OFF = [
    pytest.param(Fault(status=500, body={}), id="500"),
    pytest.param(Fault(status=502, body=b"<html>bad gateway</html>"), id="502 html"),
    pytest.param(Fault(status=503, headers={"Retry-After": "0"}, body={}), id="503"),
    pytest.param(
        Fault(status=429, headers={"retry-after-ms": "1"}, body={"error": {"code": "rate_limit_exceeded"}}), id="429"
    ),
    pytest.param(Fault(status=408, body={}), id="408"),
    pytest.param(Fault(reset=True), id="reset"),
    pytest.param(Fault(cut_body=True), id="cut body"),
    pytest.param(Fault(body=b"not json"), id="not json"),
    pytest.param(Fault(body={"error": {"message": "in a 200"}}), id="error in a 200"),
    pytest.param(Fault(body=[]), id="a list"),
    pytest.param(Fault(change=with_data(lambda data: data[:-1])), id="one vector too few"),
    pytest.param(Fault(change=with_data(lambda data: [*data, data[0]])), id="one too many"),
    pytest.param(Fault(change=change_first(index=1)), id="an index twice"),
    pytest.param(Fault(change=change_first(index=7)), id="a strange index"),
    pytest.param(Fault(change=change_first(embedding=None)), id="null vector"),
    pytest.param(Fault(change=change_first(embedding=[])), id="empty vector"),
    pytest.param(Fault(change=change_first(embedding=[0.0] * 8)), id="zero vector"),
    pytest.param(Fault(change=change_first(embedding=[1e39] + [0.0] * 7)), id="infinity"),
    pytest.param(Fault(change=change_first(embedding=[0.1] * 7)), id="too narrow"),
    pytest.param(Fault(change=change_first(embedding=[0.1] * 9)), id="too wide"),
    pytest.param(Fault(change=change_first(embedding=["x"] * 8)), id="words for numbers"),
    pytest.param(Fault(change=change_first(embedding="@@@@")), id="bad base64"),
    pytest.param(Fault(change=change_first(embedding="AADAfwAAgD8AAIA/AACAPwAAgD8AAIA/AACAPwAAgD8=")), id="NaN"),
]


@pytest.mark.parametrize("fault", ONE_OFF)
async def test_one_off_trouble_is_tried_again(proxy: Running, upstream: FakeUpstream, fault: Fault) -> None:
    """P2: trouble or lies of one exchange never reach the caller: the next attempt gives the right vectors."""
    upstream.script = [fault]

    status, document, _ = await proxy.embed({"input": ["a", "b", "c"]})

    assert status == 200
    assert [item["embedding"] for item in document["data"]] == [
        pytest.approx([float(x) for x in vector(text, 8)]) for text in ("a", "b", "c")
    ]
    # What one of the inputs may be to blame for is not sent again as it was, but in two parts.
    assert len(upstream.seen) in ((3,) if fault.status == 500 else (2, 3))


@pytest.mark.parametrize("fault", ONE_OFF)
async def test_lasting_trouble_ends_in_one_clear_error(proxy: Running, upstream: FakeUpstream, fault: Fault) -> None:
    """P1, P4: after the attempts that the settings allow, one error; nothing wrong was cached."""
    upstream.always = fault

    status, document, headers = await proxy.embed({"input": ["a", "b", "c"]})
    tries = len(upstream.seen)
    upstream.always = Fault()
    again, _, again_headers = await proxy.embed({"input": ["a", "b", "c"]})

    assert status in (429, 502, 503)
    # circuit_open: a width that is wrong for each input alone is the upstream's fault, and opens the breaker.
    assert document["error"]["code"] in ("rate_limit_exceeded", "upstream_failed", "bad_vectors", "circuit_open")
    # A connection that was used before and is reset without an answer may have been stale: that try is free. Where one
    # of the inputs may be to blame, both parts of the batch are tried, and both for themselves.
    assert tries == (4 if fault.reset else 3) or 3 < tries <= 11
    assert headers["x-should-retry"] == ("false" if status == 502 else "true")
    assert again == 503 or (again, again_headers["X-Embedding-Cache"]) == (200, "miss")


async def test_vectors_out_of_order_are_put_right(proxy: Running, upstream: FakeUpstream) -> None:
    """P2: an upstream may answer in any order; `index` tells."""
    upstream.script = [Fault(change=with_data(lambda data: data[::-1]))]

    _, document, _ = await proxy.embed({"input": ["a", "b", "c"]})

    found = numpy.array([item["embedding"] for item in document["data"]], dtype="<f4")
    assert (found == numpy.array([vector(text, 8) for text in ("a", "b", "c")])).all()
    assert [item["index"] for item in document["data"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (
            Fault(status=400, body={"error": {"message": "nope", "code": "bad_thing", "param": "input"}}),
            400,
            "bad_thing",
        ),
        (
            Fault(status=422, body={"message": "batch size 5", "type": "Validation", "code": 422}),
            422,
            "upstream_refused",
        ),
        (Fault(status=413, body=b"length limit exceeded"), 413, "upstream_refused"),
        (
            Fault(status=404, body={"error": {"message": "no such model", "code": "model_not_found"}}),
            404,
            "model_not_found",
        ),
        (Fault(status=500, body={"error": {"message": "input is too large to process"}}), 400, "input_too_long"),
        (Fault(status=401, body={"error": {"message": "bad key sk-abcdefgh"}}), 502, "upstream_denied"),
        (Fault(status=402, body={}), 502, "upstream_quota"),
        (Fault(status=429, body={"error": {"code": "insufficient_quota"}}), 502, "upstream_quota"),
    ],
)
async def test_what_cannot_succeed_is_tried_once(
    proxy: Running, upstream: FakeUpstream, fault: Fault, status: int, code: str
) -> None:
    """P4: a refusal, a denied key and a used-up quota are final, and no SDK is told to try again."""
    upstream.always = fault

    found, document, headers = await proxy.embed({"input": "x"})

    assert (found, document["error"]["code"]) == (status, code)
    assert headers["x-should-retry"] == "false"
    assert len(upstream.seen) == 1
    assert "sk-abcdefgh" not in json.dumps(document)


async def test_hanging_upstream_costs_the_deadline_and_no_more(proxy: Running, upstream: FakeUpstream) -> None:
    """P1: a caller that gives 200 ms gets its answer by then, and the upstream is let go."""
    upstream.always = Fault(hang=True)

    status, document, _ = await proxy.embed({"input": "x"}, headers={"X-Request-Timeout-Ms": "200"})

    assert (status, document["error"]["code"]) == (504, "deadline_exceeded")
    async with asyncio.timeout(5):
        while upstream.inside:
            await asyncio.sleep(0.01)


async def test_slow_attempt_is_given_up_and_tried_again(tmp_path: Path, upstream: FakeUpstream) -> None:
    """An attempt has a bound of its own: the next one may be lucky within the same deadline."""
    toml = FAST + upstream.toml().replace("[models.m]", "transport.attempt_timeout_s = 0.2\n[models.m]")
    async with running(tmp_path, toml) as proxy:
        upstream.script = [Fault(hang=True)]
        status, _, _ = await proxy.embed({"input": "x"})

    assert status == 200


async def test_wait_beyond_the_deadline_is_not_waited_for(proxy: Running, upstream: FakeUpstream) -> None:
    """P4: Retry-After: 86400 ends the call at once; the caller is told a wait that makes sense, in whole seconds."""
    upstream.always = Fault(status=429, headers={"Retry-After": "86400"}, body={})

    status, document, headers = await proxy.embed({"input": "x"})

    assert (status, document["error"]["code"], headers["Retry-After"]) == (429, "rate_limit_exceeded", "60")
    assert len(upstream.seen) == 1


async def test_outage_is_cheap_and_recovers_by_one_probe(tmp_path: Path, upstream: FakeUpstream) -> None:
    """
    P5: after enough failures nobody asks the upstream any more, callers hear so at once with Retry-After, cached texts
    are still answered, and one probe finds the recovery.
    """
    toml = FAST + upstream.toml().replace("[models.m]", "circuit = { failures = 3, open_s = 0.2 }\n[models.m]")
    async with running(tmp_path, toml + "\n[lifecycle]\ncanary_interval_s = 1000\n") as proxy:
        await proxy.embed({"input": "cached"})
        upstream.always = Fault(status=500, body={})
        broken = await proxy.embed({"input": "x0"})
        tries = len(upstream.seen)
        refused = await asyncio.gather(*(proxy.embed({"input": f"y{n}"}) for n in range(20)))
        cached = await proxy.embed({"input": "cached"})
        unchanged = len(upstream.seen) == tries
        upstream.always = Fault()
        async with asyncio.timeout(10):
            while (await proxy.embed({"input": "probe"}))[0] != 200:
                await asyncio.sleep(0.02)
        state = (await proxy.get("/status"))[1]["stages"]["circuit"]["fake"]["state"]

    assert broken[0] == 502
    assert {(status, document["error"]["code"]) for status, document, _ in refused} == {(503, "circuit_open")}
    assert {headers["Retry-After"] for _, _, headers in refused} == {"1"}
    assert cached[0] == 200
    assert unchanged
    assert state == "closed"


def two_upstreams(first: FakeUpstream, second: FakeUpstream) -> str:
    blocks = [
        f'[upstreams.{name}]\nkind = "openai"\nprofile = "openai"\nbase_url = "{upstream.base_url}"\n'
        for name, upstream in (("first", first), ("second", second))
    ]
    return FAST + "".join(blocks) + '[models.m]\nupstreams = ["first", "second"]\n'


async def test_call_goes_on_at_another_upstream_of_the_space(tmp_path: Path) -> None:
    """Two upstreams that serve the same vectors stand in for each other, within one call."""
    async with FakeUpstream() as first, FakeUpstream() as second:
        async with running(tmp_path, two_upstreams(first, second)) as proxy:
            first.always = Fault(reset=True)
            answers = [await proxy.embed({"input": f"t{n}"}) for n in range(20)]

    assert {status for status, _, _ in answers} == {200}
    assert {headers["X-Embedding-Upstream"] for _, _, headers in answers} == {"second"}


async def test_upstream_of_another_space_never_answers(tmp_path: Path) -> None:
    """P2: a second upstream that answers to the name, but with other vectors, is refused by its canary."""
    async with FakeUpstream() as first, FakeUpstream() as second:
        flip = with_data(lambda data: [item | {"embedding": [float(n) for n in range(1, 9)]} for item in data])
        second.spare_canary = False
        second.always = Fault(change=flip)
        async with running(tmp_path, two_upstreams(first, second)) as proxy:
            first.always = Fault(status=500, body={})
            status, document, _ = await proxy.embed({"input": "x"})
            _, ready = await proxy.get("/readyz")
        asked = {text for seen in second.seen for text in seen.inputs}

    assert (status, document["error"]["code"]) == (502, "upstream_failed")
    assert "its vectors lie elsewhere: cosine" in ready["models"]["m"]["upstreams"]["second"]["problem"]
    assert "x" not in asked


async def test_one_failing_part_fails_the_request_with_its_reason(tmp_path: Path) -> None:
    """A long list whose second call is refused gets that refusal; nobody hangs on the others."""
    async with FakeUpstream() as upstream:
        toml = FAST + upstream.toml().replace("[models.m]", "batch.max_inputs = 2\n[models.m]")
        async with running(tmp_path, toml) as proxy:
            upstream.poison = {"t3": Fault(status=400, body={"error": {"code": "bad_thing"}})}
            status, document, _ = await proxy.embed({"input": [f"t{n}" for n in range(6)]})
            stages = (await proxy.get("/status"))[1]["stages"]

    assert (status, document["error"]["code"], document["error"]["param"]) == (400, "bad_thing", "input[3]")
    assert stages["admission"]["inputs"] == 0
    assert stages["coalesce"]["inputs_in_flight"] == 0


async def test_requests_per_minute_are_paced_not_refused(tmp_path: Path) -> None:
    """P4: more callers than the limit allows wait their turn; the upstream sees them evenly."""
    times: list[float] = []
    async with FakeUpstream() as upstream:
        toml = FAST + upstream.toml(upstream="bucket.requests_per_minute = 3000\nbatch.max_inputs = 1")
        async with running(tmp_path, toml) as proxy:
            loop = asyncio.get_running_loop()

            def note(answer: dict[str, Any]) -> dict[str, Any]:
                times.append(loop.time())
                return answer

            upstream.always = Fault(change=note)
            answers = await asyncio.gather(*(proxy.embed({"input": f"t{n}"}) for n in range(20)))

    assert {status for status, _, _ in answers} == {200}
    assert times[-1] - times[0] >= 18 * 0.02  # 20 calls, 20 ms apart; a busy machine only makes it longer


async def test_key_goes_upstream_and_nowhere_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """P8: the upstream's key and the callers' texts are in no log line, metric, status or error."""
    key, text = "sk-marked-key-0123456789", "a marked text of somebody"
    async with FakeUpstream() as upstream:
        toml = FAST + upstream.toml().replace("[models.m]", 'api_key_env = "K"\n[models.m]')
        async with running(tmp_path, toml, {"K": key}) as proxy:
            pages = []
            message = f"invalid input {text!r}; you sent key {key}"
            for fault in (
                Fault(),
                Fault(status=400, body={"error": {"message": message, "code": "bad"}}),
                Fault(status=500, body={"error": {"message": message}}),
                Fault(status=401, body={"error": {"message": message}}),
                Fault(body={"data": [text]}),
            ):
                upstream.always = fault
                _, document, headers = await proxy.embed({"input": text}, headers={"Cache-Control": "no-store"})
                pages.append(json.dumps({k: v for k, v in document.items() if k != "data"}) + str(dict(headers)))
            for path in ("/status", "/metrics", "/readyz", "/v1/models"):
                pages.append(str((await proxy.get(path))[1]))
        sent = {seen.headers["Authorization"] for seen in upstream.seen}
    out = "".join(pages) + "".join(capfd.readouterr())

    assert sent == {f"Bearer {key}"}
    assert '"event":"request"' in out
    assert key not in out
    assert "marked" not in out
