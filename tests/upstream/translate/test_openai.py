"""OpenAI's dialect: the call, the answer, whose fault an error is, and what a message may show."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.base import errors
from proxy.base.messages import Batch, RateHints, Spec
from proxy.upstream.translate import HttpCall, RawAnswer
from proxy.upstream.translate.openai import PROFILES, OpenAI
from tests.fakes.stage import make_batch

WALL_NOW = 1_760_000_000.0
URL = "http://u.test/v1"


def dialect(profile: str = "openai", **changes: Any) -> OpenAI:
    values: dict[str, Any] = {"base_url": URL, "api_key": "", "headers": {}}
    return OpenAI("u", PROFILES[profile], **(values | changes))


def spelled(batch: Batch, profile: str = "openai", **changes: Any) -> tuple[HttpCall, dict[str, Any]]:
    call = dialect(profile, **changes).call(batch)
    return call, json.loads(call.body)


def answered(body: Any, status: int = 200, headers: dict[str, str] | None = None, *, batch: Any = None) -> RawAnswer:
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    return dialect(api_key="k-1").answer(batch or make_batch(["one"]), status, headers or {}, given, wall_now=WALL_NOW)


def refused(
    body: Any, status: int, headers: dict[str, str] | None = None, *, batch: Any = None
) -> errors.EmbeddingError:
    with pytest.raises(errors.EmbeddingError) as caught:
        answered(body, status, headers, batch=batch)
    return caught.value


def openai_error(message: str = "", *, kind: Any = None, code: Any = None, param: Any = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def list_of(*items: dict[str, Any], usage: Any = None) -> dict[str, Any]:
    return {"object": "list", "data": list(items), "model": "m"} | ({} if usage is None else {"usage": usage})


def item(vector: Any, index: Any = None) -> dict[str, Any]:
    return {"object": "embedding", "embedding": vector} | ({} if index is None else {"index": index})


# --- the call ---


def test_plain_call() -> None:
    """A call says model and inputs, and asks for base64 where the server has it."""
    call, body = spelled(make_batch(["one", "two"], model="text-embedding-3-small"), api_key="k-1")

    assert call.url == "http://u.test/v1/embeddings"
    assert call.headers == {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Authorization": "Bearer k-1",
    }
    assert body == {"model": "text-embedding-3-small", "input": ["one", "two"], "encoding_format": "base64"}


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile(profile: str) -> None:
    """Only what the server knows is sent; `dimensions` always is, so that a server that lacks it refuses."""
    batch = make_batch(spec=Spec("m", dimensions=4), user="u-7")
    call, body = spelled(batch, profile, api_key="k-1")

    assert (body.get("encoding_format") == "base64") == (profile not in ("localai", "lmstudio", "generic"))
    assert ("user" in body) == (profile in ("openai", "azure"))
    assert body["dimensions"] == 4
    assert call.headers.get("api-key") == ("k-1" if profile == "azure" else None)
    assert call.headers.get("Authorization") == (None if profile == "azure" else "Bearer k-1")
    assert set(body) <= {"model", "input", "encoding_format", "dimensions", "user"}


@pytest.mark.parametrize(
    ("profile", "url"),
    [
        ("openai", "https://api.openai.com/v1/embeddings"),
        ("llamacpp", "http://127.0.0.1:8080/v1/embeddings"),
        ("localai", "http://127.0.0.1:8080/v1/embeddings"),
        ("lmstudio", "http://127.0.0.1:1234/v1/embeddings"),
        ("infinity", "http://127.0.0.1:7997/embeddings"),
    ],
)
def test_profile_knows_where(profile: str, url: str) -> None:
    """Without a `base_url` the profile's own is asked; Infinity's has no prefix."""
    call, _ = spelled(make_batch(), profile, base_url="")

    assert call.url == url


@pytest.mark.parametrize("base_url", ["http://u.test/v1", "http://u.test/v1/", "http://u.test/v1//"])
def test_slash_at_the_end(base_url: str) -> None:
    """A slash at the end of the `base_url` makes no difference."""
    call, _ = spelled(make_batch(), base_url=base_url)

    assert call.url == "http://u.test/v1/embeddings"


def test_no_key() -> None:
    """Without a key nothing of the sort is sent."""
    call, _ = spelled(make_batch())

    assert not {"Authorization", "api-key"} & set(call.headers)


def test_headers_of_the_settings() -> None:
    """Further headers are added; the key stands above them."""
    call, _ = spelled(make_batch(), api_key="k-1", headers={"OpenAI-Project": "p", "Authorization": "other"})

    assert call.headers["OpenAI-Project"] == "p"
    assert call.headers["Authorization"] == "Bearer k-1"


def test_token_ids() -> None:
    """Token ids go out as lists of integers."""
    _, body = spelled(make_batch([(1, 2, 3), (4,)], spec=Spec("m", is_tokens=True)))

    assert body["input"] == [[1, 2, 3], [4]]


def test_texts_of_all_sorts() -> None:
    """Texts arrive as they are."""
    texts = ["é\u2028\0", '"quoted"\\', "\U0001f600", "</script>", " "]
    _, body = spelled(make_batch(texts))

    assert body["input"] == texts


def test_further_parameters() -> None:
    """Parameters of the caller are forwarded beside ours."""
    _, body = spelled(make_batch(spec=Spec("m", params=b'{"input_type":"query","truncate":"END"}')))

    assert body["input_type"] == "query"
    assert body["truncate"] == "END"
    assert body["input"] == ["a text"]


def test_parameters_cannot_displace_ours() -> None:
    """No parameter gets the better of what the proxy itself says."""
    params = b'{"model":"x","input":["x"],"encoding_format":"float","dimensions":7,"user":"x"}'
    _, body = spelled(make_batch(spec=Spec("m", dimensions=4, params=params), user="u-7"))

    assert body == {"model": "m", "input": ["a text"], "encoding_format": "base64", "dimensions": 4, "user": "u-7"}


def test_trace_goes_on() -> None:
    """`traceparent` is forwarded with its own batch only."""
    talk = dialect()
    traced = talk.call(make_batch(traceparent="00-ab-cd-01"))
    plain = talk.call(make_batch())

    assert (traced.traceparent, plain.traceparent) == ("00-ab-cd-01", None)
    assert traced.headers is plain.headers


# --- the answer ---


def test_answer_in_order() -> None:
    """Vectors come out in the order of the inputs, spelled as they came."""
    answer = answered(list_of(item("AAAA", 0), item([1.0], 1), item(None, 2), usage={"prompt_tokens": 5}))

    assert answer == RawAnswer(["AAAA", [1.0], None], 5)


def test_answer_out_of_order() -> None:
    """The index counts, not the position."""
    answer = answered(list_of(item([2.0], 2), item([0.0], 0), item([1.0], 1)))

    assert answer.vectors == [[0.0], [1.0], [2.0]]


def test_answer_without_indexes() -> None:
    """Where no item has an index, position counts."""
    assert answered(list_of(item([0.0]), item([1.0]))).vectors == [[0.0], [1.0]]


@pytest.mark.parametrize(
    "indexes",
    [(0, 0), (0, 2), (-1, 0), (1, 2), (0, None), (None, 1), (1.0, 0), ("1", "0"), (True, 0)],
    ids=str,
)
def test_indexes_that_are_wrong(indexes: tuple[Any, Any]) -> None:
    """Repeats, gaps, strangers and half-missing indexes are no order."""
    error = refused(list_of(*(item([1.0], index) for index in indexes)), 200)

    assert type(error) is errors.BadVectors
    assert "indexes of 2 vectors" in error.message


@pytest.mark.parametrize("index", [[0], {"at": 0}], ids=str)
def test_index_that_is_a_structure(index: Any) -> None:
    """An index that is a list or an object is a bad answer like any other, not a crash."""
    assert type(refused(list_of(item([1.0], index), item([1.0], 1)), 200)) is errors.BadVectors


@pytest.mark.parametrize(
    "data", [["AAAA"], [[1.0]], [None], [1], [item("AAAA", 0), "AAAA"], [item([1.0]), None]], ids=str
)
def test_items_that_are_no_objects(data: list[Any]) -> None:
    """Each item is an object."""
    assert type(refused({"data": data}, 200)) is errors.BadVectors


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"{", b"[]", b"null", b'"text"', b"{}", b'{"data":null}', b'{"data":{}}', b"\xff\xfe"]
)
def test_answer_that_is_none(body: bytes) -> None:
    """A 200 without a list of embeddings is a bad answer, and the message says where it came from."""
    error = refused(body, 200)

    assert type(error) is errors.BadVectors
    assert "http://u.test/v1/embeddings" in error.message


def test_item_without_embedding() -> None:
    """A missing embedding counts as null, which the gate refuses."""
    assert answered({"data": [{"index": 0}]}).vectors == [None]
    assert answered(list_of(item([0.0], 0), {"index": 1}, item([2.0], 2))).vectors == [[0.0], None, [2.0]]
    assert answered(list_of({"index": 1}, item([0.0], 0))).vectors == [[0.0], None]
    assert answered(list_of(item([0.0]), {})).vectors == [[0.0], None]


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 5, "total_tokens": 9}, 5),
        ({"total_tokens": 9}, 9),
        ({"prompt_tokens": 0, "total_tokens": 9}, 9),
        ({"prompt_tokens": None, "total_tokens": 9}, 9),
        ({"prompt_tokens": "5"}, 0),
        ({"prompt_tokens": 5.0}, 0),
        ({"prompt_tokens": True}, 0),
        ({"prompt_tokens": -3}, 0),
        ({}, 0),
        ([], 0),
        (None, 0),
    ],
    ids=str,
)
def test_usage(usage: Any, tokens: int) -> None:
    """`prompt_tokens` counts, else `total_tokens` (Voyage has no other), else nothing (LocalAI)."""
    assert answered(list_of(item([1.0], 0), usage=usage)).tokens == tokens


def test_error_of_null_beside_data() -> None:
    """A good answer may carry an empty `error`."""
    assert answered(list_of(item([1.0], 0)) | {"error": None}).vectors == [[1.0]]


# --- whose fault ---

R, F, D, X = errors.RateLimited, errors.UpstreamFailed, errors.UpstreamDenied, errors.UpstreamRefused


@pytest.mark.parametrize(
    ("status", "body", "error_class", "code"),
    [
        (401, openai_error("Incorrect API key"), D, "upstream_denied"),
        (401, b"", D, "upstream_denied"),
        (403, openai_error("no access"), D, "upstream_denied"),
        (402, openai_error("pay"), D, "upstream_quota"),
        (429, openai_error("x", code="insufficient_quota"), D, "upstream_quota"),
        (429, openai_error("x", kind="insufficient_quota"), D, "upstream_quota"),
        (429, openai_error("x", code="credit_balance_exhausted"), D, "upstream_quota"),
        (429, openai_error("x", code="organization_spend_limit_exceeded"), D, "upstream_quota"),
        (429, openai_error("x", code="project_spend_limit_exceeded"), D, "upstream_quota"),
        (429, openai_error("x", code="organization_usage_limit_exceeded"), D, "upstream_quota"),
        (429, openai_error("x", code="billing_hard_limit_reached"), D, "upstream_quota"),
        (429, openai_error("x", code="rate_limit_exceeded", kind="tokens"), R, "rate_limit_exceeded"),
        (429, openai_error("x", code="429"), R, "rate_limit_exceeded"),
        (429, b"", R, "rate_limit_exceeded"),
        (429, openai_error("Request too large for m on tokens per min: Limit 1, Requested 2"), X, "input_too_long"),
        (429, {"error": "too many", "error_type": "Overloaded"}, R, "rate_limit_exceeded"),
        (500, openai_error("input is too large to process. increase the physical batch size"), X, "input_too_long"),
        (500, openai_error("boom"), F, "upstream_failed"),
        (502, b"<html>bad gateway</html>", F, "upstream_failed"),
        (503, openai_error("Loading model", kind="unavailable_error"), F, "upstream_failed"),
        (503, openai_error("x", code="slow_down"), F, "upstream_failed"),
        (504, b"", F, "upstream_failed"),
        (501, openai_error("started without --embeddings"), F, "upstream_failed"),
        (599, b"", F, "upstream_failed"),
        (408, b"", F, "upstream_failed"),
        (409, openai_error("CONFLICT_RESOURCE_BUSY"), F, "upstream_failed"),
        (425, b"", F, "upstream_failed"),
        (204, b"", F, "upstream_failed"),
        (201, list_of(item([1.0], 0)), F, "upstream_failed"),
        (301, b"", F, "upstream_failed"),
        (307, b"", F, "upstream_failed"),
        (200, openai_error("no provider", code=502), F, "upstream_failed"),
        (200, {"error": "boom"}, F, "upstream_failed"),
        (200, openai_error("x", code="insufficient_quota"), D, "upstream_quota"),
        (404, b"404 page not found", F, "upstream_not_found"),
        (404, b"", F, "upstream_not_found"),
        (405, b"", F, "upstream_not_found"),
        (404, openai_error("no such model", code="model_not_found"), X, "model_not_found"),
        (405, openai_error("not here"), X, "upstream_refused"),
        (400, openai_error("bad", code="context_length_exceeded"), X, "context_length_exceeded"),
        (400, b"", X, "upstream_refused"),
        (413, b"length limit exceeded", X, "upstream_refused"),
        (422, {"message": "batch too large", "code": 422, "type": "Validation"}, X, "upstream_refused"),
        (422, {"detail": [{"loc": ["body", "input"], "msg": "wrong"}]}, X, "upstream_refused"),
    ],
)
def test_classification(status: int, body: Any, error_class: type[errors.EmbeddingError], code: str) -> None:
    """Status, code and type together tell whose fault it is: neither does alone."""
    error = refused(body, status)

    assert type(error) is error_class
    assert error.code == code
    assert f"HTTP {status}" in error.message
    assert "'u'" in error.message


def test_inference_failed() -> None:
    """TEI's 424 says that its backend failed, not that the caller was wrong."""
    error = refused({"message": "inference failed", "code": 424, "type": "Backend"}, 424)

    assert type(error) is errors.UpstreamFailed


def test_route_that_fastapi_does_not_know() -> None:
    """FastAPI's own 404 (vLLM, Infinity) speaks of the path, so the base_url is wrong, not the caller."""
    error = refused({"detail": "Not Found"}, 404)

    assert error.code == "upstream_not_found"
    assert "base_url" in error.message


def test_wrong_base_url_is_named() -> None:
    """Whoever mistyped the base_url is told what was asked."""
    assert "http://u.test/v1/embeddings" in refused(b"", 404).message


@pytest.mark.parametrize("status", [400, 404, 413, 422, 415])
def test_refusal_keeps_its_status(status: int) -> None:
    """The caller gets the upstream's own 4xx, its words and the parameter that it names."""
    error = refused(openai_error("too long", code="c-1", kind="invalid_request_error", param="input[3]"), status)

    assert isinstance(error, errors.UpstreamRefused)
    assert (error.status, error.code, error.param) == (status, "c-1", "input[3]")
    assert error.message.endswith("(c-1, invalid_request_error): too long")


def test_over_length_in_a_500() -> None:
    """llama.cpp's 500 for a long input becomes the 400 that it is."""
    error = refused(openai_error("input is too large to process"), 500)

    assert isinstance(error, errors.UpstreamRefused)
    assert error.status == 400


@pytest.mark.parametrize(
    ("headers", "message", "wait"),
    [
        ({"retry-after-ms": "250"}, "", 0.25),
        ({"retry-after": "20"}, "", 20.0),
        ({"retry-after": "0.5"}, "", 0.5),
        ({"retry-after": "Thu, 09 Oct 2025 08:54:20 GMT"}, "", 60.0),
        ({"retry-after": "1m30s"}, "", 90.0),
        ({}, "Please try again in 41.724s.", 41.724),
        ({}, "Please retry after 55 seconds", 55.0),
        ({}, "", None),
        ({"retry-after": "86400"}, "", 86_400.0),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_upstream_says_when(status: int, headers: dict[str, str], message: str, wait: float | None) -> None:
    """How long to wait is read from wherever it stands; its cap is somebody else's business."""
    error = refused(openai_error(message, code="rate_limit_exceeded"), status, headers)

    assert error.retry_after_s == (None if wait is None else pytest.approx(wait))


@pytest.mark.parametrize(
    ("status", "expected"),
    [(500, True), (424, True), (501, False), (502, False), (503, False), (504, False), (408, False), (200, False)],
)
def test_failure_that_one_input_may_have_brought_about(status: int, expected: bool) -> None:
    """A failed inference may be the fault of one input of the batch; a gateway's word or a restart is not."""
    error = refused(openai_error("boom"), status)

    assert isinstance(error, errors.UpstreamFailed)
    assert error.may_be_poison is expected


LIMITED = {"x-ratelimit-limit-requests": "3000", "x-ratelimit-remaining-requests": "0"}


def test_limits_beside_an_answer() -> None:
    """What the headers say about limits goes with the vectors."""
    answer = answered(list_of(item([1.0], 0)), headers=LIMITED)

    assert answer.hints == RateHints(requests_per_minute=3000, remaining_requests=0)


def test_limits_beside_an_error() -> None:
    """A 429 carries what the headers say about limits; another error has nothing to do with them."""
    limited = refused(openai_error("slow", code="rate_limit_exceeded"), 429, LIMITED)
    failed = refused(openai_error("boom"), 500, LIMITED)

    assert limited.hints == RateHints(requests_per_minute=3000, remaining_requests=0)
    assert failed.hints is None


# --- what a message may show ---


def test_message_holds_our_own_key() -> None:
    """Our key is cut out whatever it looks like."""
    talk = dialect(api_key="open.sesame!")
    with pytest.raises(errors.UpstreamRefused) as caught:
        talk.answer(make_batch(), 400, {}, b'{"error":"bad key open.sesame! sent"}', wall_now=WALL_NOW)

    assert "open.sesame!" not in caught.value.message


@pytest.mark.parametrize("status", [401, 402, 403, 408, 429, 500, 503])
def test_errors_of_ours_and_of_the_upstream(status: int) -> None:
    """Where the caller is not at fault the upstream's words stay inside altogether."""
    error = refused(openai_error("Incorrect API key provided: hunter2"), status)

    assert "hunter2" not in error.message
