"""The two dialects of text-embeddings-inference: the calls, the answers, and whose fault an error is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.base import errors
from proxy.base.messages import Batch, RateHints, Spec
from proxy.upstream.translate import HttpCall, RawAnswer
from proxy.upstream.translate.tei import PROFILES, Tei, TeiOpenAI
from tests.fakes.stage import make_batch

WALL_NOW = 1_760_000_000.0
ROUTES = {"native": Tei, "openai": TeiOpenAI}
URLS = {"native": "http://u.test/embed", "openai": "http://u.test/embeddings"}

both = pytest.mark.parametrize("route", ROUTES)


def dialect(route: str = "native", **changes: Any) -> Tei | TeiOpenAI:
    values: dict[str, Any] = {"base_url": "http://u.test", "api_key": "", "headers": {}}
    return ROUTES[route]("u", PROFILES[route], **(values | changes))


def spelled(batch: Batch, route: str = "native", **changes: Any) -> tuple[HttpCall, dict[str, Any]]:
    call = dialect(route, **changes).call(batch)
    return call, json.loads(call.body)


def answered(
    body: Any, status: int = 200, headers: dict[str, str] | None = None, *, route: str = "native", batch: Any = None
) -> RawAnswer:
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    return dialect(route).answer(batch or make_batch(["one"]), status, headers or {}, given, wall_now=WALL_NOW)


def refused(
    body: Any, status: int, headers: dict[str, str] | None = None, *, route: str = "native", batch: Any = None
) -> errors.EmbeddingError:
    with pytest.raises(errors.EmbeddingError) as caught:
        answered(body, status, headers, route=route, batch=batch)
    return caught.value


def said(route: str, kind: str, message: str, status: int) -> dict[str, Any]:
    """Return an error in the shape of a route."""
    if route == "native":
        return {"error": message, "error_type": kind}
    return {"message": message, "code": status, "type": kind}


# --- the call ---


def test_plain_call() -> None:
    """A call says the inputs, and that long ones are not to be cut; a server has one model, so none is named."""
    call, body = spelled(make_batch(["one", "two"], user="u-7"))

    assert call.url == "http://u.test/embed"
    assert call.headers == {"Content-Type": "application/json", "Accept": "application/json"}
    assert body == {"inputs": ["one", "two"], "normalize": True, "truncate": False}


def test_call_of_the_openai_route() -> None:
    """The other route is spoken to as OpenAI's is, and asked for base64."""
    call, body = spelled(make_batch(["one"], user="u-7"), "openai")

    assert call.url == "http://u.test/embeddings"
    assert body == {"model": "m", "input": ["one"], "encoding_format": "base64"}


@both
def test_where_it_is_asked(route: str) -> None:
    """The routes are appended to the same base_url; without one, the binary's own port is asked."""
    own, _ = spelled(make_batch(), route, base_url="")
    slash, _ = spelled(make_batch(), route, base_url="http://u.test/")

    assert own.url == URLS[route].replace("u.test", "127.0.0.1:3000")
    assert slash.url == URLS[route]


@both
def test_key_trace_and_width(route: str) -> None:
    """Key and trace go out as headers, a width as `dimensions`, on either route."""
    batch = make_batch(spec=Spec("m", dimensions=4), traceparent="00-ab-cd-01")
    call, body = spelled(batch, route, api_key="k-1", headers={"X-Team": "a"})

    assert call.headers["Authorization"] == "Bearer k-1"
    assert call.headers["X-Team"] == "a"
    assert call.traceparent == "00-ab-cd-01"
    assert body["dimensions"] == 4


def test_parameters_of_the_caller() -> None:
    """Prompt, truncation and normalisation are the caller's to choose: they are part of its vectors' identity."""
    params = b'{"prompt_name":"query","truncate":true,"normalize":false,"truncation_direction":"Left"}'
    _, body = spelled(make_batch(spec=Spec("m", params=params)))

    assert body == {"inputs": ["a text"], **json.loads(params)}


def test_parameters_cannot_displace_ours() -> None:
    """No parameter gets the better of what the proxy itself says."""
    _, body = spelled(make_batch(spec=Spec("m", dimensions=4, params=b'{"inputs":["x"],"dimensions":7}')))

    assert body == {"inputs": ["a text"], "dimensions": 4, "normalize": True, "truncate": False}


# --- the answer ---


def test_answer_by_position() -> None:
    """The answer is the bare list of vectors; the tokens stand in a header."""
    assert answered([[1.0], [2.0]], headers={"x-compute-tokens": "5"}) == RawAnswer([[1.0], [2.0]], 5)


def test_answer_of_the_openai_route() -> None:
    """The other route's answer is read as OpenAI's is."""
    data = [{"index": 1, "embedding": "BBBB"}, {"index": 0, "embedding": "AAAA"}]
    answer = answered({"data": data, "usage": {"prompt_tokens": 5}}, route="openai")

    assert answer == RawAnswer(["AAAA", "BBBB"], 5)


@pytest.mark.parametrize(
    ("text", "tokens"), [("0", 0), ("7", 7), ("-1", 0), ("7.0", 0), ("", 0), ("many", 0), ("²", 0), ("9" * 5000, 0)]
)
def test_tokens(text: str, tokens: int) -> None:
    """A count that is none counts nothing."""
    assert answered([[1.0]], headers={"x-compute-tokens": text}).tokens == tokens


def test_no_tokens() -> None:
    """A gateway may have dropped the header."""
    assert answered([[1.0]]).tokens == 0


@pytest.mark.parametrize("body", [b"", b"<html>", b"null", b'"text"', b"{}", b'{"data":{}}', b'{"embeddings":[]}'])
@both
def test_answer_that_is_none(body: bytes, route: str) -> None:
    """A 200 without a list of vectors is a bad answer, and the message says where it came from."""
    error = refused(body, 200, route=route)

    assert type(error) is errors.BadVectors
    assert URLS[route] in error.message


@both
def test_limits_of_a_gateway(route: str) -> None:
    """A gateway's limits go with the vectors, and with its refusal."""
    headers = {"x-ratelimit-limit-requests": "60"}
    good = [[1.0]] if route == "native" else {"data": [{"index": 0, "embedding": [1.0]}]}

    assert answered(good, headers=headers, route=route).hints == RateHints(requests_per_minute=60)
    assert refused(b"", 429, headers, route=route).hints == RateHints(requests_per_minute=60)


# --- whose fault ---

R, F, D, X = errors.RateLimited, errors.UpstreamFailed, errors.UpstreamDenied, errors.UpstreamRefused
LONG = "Input validation error: `inputs` must have less than 512 tokens. Given: 600"
MANY = "batch size 33 > maximum allowed batch size 32"


@pytest.mark.parametrize(
    ("status", "kind", "message", "error_class", "code"),
    [
        (429, "Overloaded", "Model is overloaded", R, "upstream_busy"),
        (424, "Backend", "Backend error: DriverError", F, "upstream_failed"),
        (424, "Backend", "Model is not an embedding model", F, "upstream_failed"),
        (503, "Unhealthy", "unhealthy", F, "upstream_failed"),
        (422, "Validation", LONG, X, "input_too_long"),
        (413, "Validation", LONG, X, "input_too_long"),
        (422, "Validation", MANY, X, "batch_too_large"),
        (413, "Validation", MANY, X, "batch_too_large"),
        (422, "Validation", "`dimensions` should be positive", X, "upstream_refused"),
        (413, "Validation", "`dimensions` should be positive", X, "upstream_refused"),
        (400, "Empty", "`inputs` cannot be empty", X, "upstream_refused"),
        (422, "Tokenizer", "tokenizer error x", X, "upstream_refused"),
    ],
)
@pytest.mark.parametrize("spell", [str, str.lower], ids=["as answered", "as documented"])
@both
def test_classification(
    route: str, spell: Any, status: int, kind: str, message: str, error_class: type[errors.EmbeddingError], code: str
) -> None:
    """Both routes fail alike, in shapes of their own; types begin with a capital in answers and not in the docs."""
    error = refused(said(route, spell(kind), message, status), status, route=route)

    assert type(error) is error_class
    assert error.code == code
    assert f"'u' answered HTTP {status} ({spell(kind)})" in error.message


@pytest.mark.parametrize(
    ("status", "body", "error_class", "code"),
    [
        (401, b"", D, "upstream_denied"),
        (403, b"<html>", D, "upstream_denied"),
        (402, {"error": "pay"}, D, "upstream_quota"),
        (429, b"", R, "upstream_busy"),
        (413, b"Failed to buffer the request body: length limit exceeded", X, "batch_too_large"),
        (422, b"Failed to deserialize the JSON body into the target type: ...", X, "upstream_refused"),
        (400, b"Failed to parse the request body as JSON: ...", X, "upstream_refused"),
        (415, b"Expected request with `Content-Type: application/json`", X, "upstream_refused"),
        (404, b"", F, "upstream_not_found"),
        (405, b"", F, "upstream_not_found"),
        (500, b"", F, "upstream_failed"),
        (502, b"<html>bad gateway</html>", F, "upstream_failed"),
        (503, b"", F, "upstream_failed"),
        (504, b"", F, "upstream_failed"),
        (408, b"", F, "upstream_failed"),
        (424, b"", F, "upstream_failed"),
        (204, b"", F, "upstream_failed"),
        (307, b"", F, "upstream_failed"),
        (200, {"error": "boom"}, F, "upstream_failed"),
    ],
)
@both
def test_classification_without_a_type(
    route: str, status: int, body: Any, error_class: type[errors.EmbeddingError], code: str
) -> None:
    """The framework and whoever stands in front answer in plain text, HTML, or not at all; then the status decides."""
    error = refused(body, status, route=route)

    assert type(error) is error_class
    assert error.code == code
    assert f"'u' answered HTTP {status}" in error.message


@pytest.mark.parametrize(
    ("status", "kind", "expected"),
    [(424, "Backend", True), (500, "", True), (503, "Unhealthy", False), (502, "", False), (504, "", False)],
)
@both
def test_failure_that_one_input_may_have_brought_about(route: str, status: int, kind: str, expected: bool) -> None:
    """A failed inference may be the fault of one input; a server that is unhealthy or gone is not."""
    error = refused(said(route, kind, "x", status), status, route=route)

    assert isinstance(error, errors.UpstreamFailed)
    assert error.may_be_poison is expected


@pytest.mark.parametrize(
    ("body", "setting"),
    [({"error": MANY, "error_type": "Validation"}, "batch.max_inputs"), (b"length limit exceeded", "batch.max_bytes")],
)
def test_call_that_is_too_large(body: Any, setting: str) -> None:
    """Whoever runs a server with smaller bounds is told which setting to lower."""
    error = refused(body, 413)

    assert isinstance(error, errors.UpstreamRefused)
    assert error.status == 413
    assert setting in error.message


@pytest.mark.parametrize("status", [413, 422])
@both
def test_refusal_keeps_its_status_and_words(route: str, status: int) -> None:
    """The caller gets the upstream's own 4xx, and its words where they quote nobody."""
    error = refused(said(route, "Validation", LONG, status), status, route=route)

    assert isinstance(error, errors.UpstreamRefused)
    assert error.status == status
    assert error.message.endswith(f"HTTP {status} (Validation): {LONG}")


@both
def test_wrong_base_url_is_named(route: str) -> None:
    """Whoever mistyped the base_url is told what was asked."""
    assert URLS[route] in refused(b"", 404, route=route).message


@pytest.mark.parametrize("status", [400, 401, 413, 422, 424, 429, 500])
@both
def test_words_that_quote_a_text(route: str, status: int) -> None:
    """No word of a caller's text gets out, whoever is at fault."""
    batch = make_batch(["the secret of a caller"])
    body = said(route, "Tokenizer", "tokenizer error: the secret of a caller", status)

    assert "secret" not in refused(body, status, route=route, batch=batch).message


@pytest.mark.parametrize("status", [429, 503])
@both
def test_upstream_says_when(route: str, status: int) -> None:
    """TEI says nothing about waiting; what a gateway says is read."""
    assert refused(b"", status, {"retry-after": "7"}, route=route).retry_after_s == 7.0
    assert refused(b"", status, route=route).retry_after_s is None
