"""Ollama's own dialect: the call, the answer, and whose fault an error is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.base import errors
from proxy.base.messages import Batch, RateHints, Spec
from proxy.upstream.translate import HttpCall, RawAnswer
from proxy.upstream.translate.ollama import PROFILE, Ollama
from tests.fakes.stage import make_batch

WALL_NOW = 1_760_000_000.0
URL = "http://u.test/api/embed"


def dialect(**changes: Any) -> Ollama:
    values: dict[str, Any] = {"base_url": "http://u.test", "api_key": "", "headers": {}, "keep_alive": "30m"}
    return Ollama("u", PROFILE, **(values | changes))


def spelled(batch: Batch, **changes: Any) -> tuple[HttpCall, dict[str, Any]]:
    call = dialect(**changes).call(batch)
    return call, json.loads(call.body)


def answered(body: Any, status: int = 200, headers: dict[str, str] | None = None, *, batch: Any = None) -> RawAnswer:
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    return dialect().answer(batch or make_batch(["one"]), status, headers or {}, given, wall_now=WALL_NOW)


def refused(
    body: Any, status: int, headers: dict[str, str] | None = None, *, batch: Any = None
) -> errors.EmbeddingError:
    with pytest.raises(errors.EmbeddingError) as caught:
        answered(body, status, headers, batch=batch)
    return caught.value


def said(message: str) -> dict[str, str]:
    """Return an error in Ollama's shape."""
    return {"error": message}


# --- the call ---


def test_plain_call() -> None:
    """A call says model and inputs, that long inputs are not to be cut, and how long the model stays."""
    call, body = spelled(make_batch(["one", "two"], model="nomic-embed-text"))

    assert call.url == URL
    assert call.headers == {"Content-Type": "application/json", "Accept": "application/json"}
    assert body == {"model": "nomic-embed-text", "input": ["one", "two"], "truncate": False, "keep_alive": "30m"}


@pytest.mark.parametrize(
    ("base_url", "url"),
    [
        ("", "http://127.0.0.1:11434/api/embed"),
        ("http://u.test/", URL),
        ("http://u.test/ollama", "http://u.test/ollama/api/embed"),
    ],
)
def test_where_it_is_asked(base_url: str, url: str) -> None:
    """Its route is appended to the base_url; without one, Ollama's own port is asked."""
    call, _ = spelled(make_batch(), base_url=base_url)

    assert call.url == url


def test_key_and_headers_of_a_gateway() -> None:
    """Ollama has no keys, a gateway in front of it may; and it is told of the trace."""
    call, _ = spelled(make_batch(traceparent="00-ab-cd-01"), api_key="k-1", headers={"X-Team": "a"})

    assert call.headers["Authorization"] == "Bearer k-1"
    assert call.headers["X-Team"] == "a"
    assert call.traceparent == "00-ab-cd-01"


@pytest.mark.parametrize(
    ("keep_alive", "expected"),
    [("24h", "24h"), ("1h30m", "1h30m"), ("-1", -1), ("0", 0), ("300", 300), ("-1m", "-1m"), ("", None)],
)
def test_how_long_the_model_stays(keep_alive: str, expected: Any) -> None:
    """A duration goes out as a text, a number as a number, as Go wants it; without one the server decides."""
    _, body = spelled(make_batch(), keep_alive=keep_alive)

    assert body.get("keep_alive") == expected
    assert ("keep_alive" in body) == (expected is not None)


def test_width_that_is_asked_for() -> None:
    """`dimensions` is sent where a caller asks for a width; `user` is not known there."""
    _, body = spelled(make_batch(spec=Spec("m", dimensions=4), user="u-7"))

    assert body["dimensions"] == 4
    assert "user" not in body


def test_options_of_the_caller() -> None:
    """Options of the model, and `truncate`, are the caller's to choose: they are part of its vectors' identity."""
    _, body = spelled(make_batch(spec=Spec("m", params=b'{"options":{"num_ctx":8192},"truncate":true}')))

    assert body["options"] == {"num_ctx": 8192}
    assert body["truncate"] is True


def test_parameters_cannot_displace_ours() -> None:
    """No parameter gets the better of what the proxy itself says: nobody unloads the model for the others."""
    params = b'{"model":"x","input":["x"],"dimensions":7,"keep_alive":0}'
    _, body = spelled(make_batch(spec=Spec("m", dimensions=4, params=params)))

    assert body == {"model": "m", "input": ["a text"], "dimensions": 4, "truncate": False, "keep_alive": "30m"}


# --- the answer ---


def test_answer_by_position() -> None:
    """Vectors come in the order of the inputs, and the tokens are counted."""
    answer = answered({"model": "m", "embeddings": [[1.0], [2.0]], "total_duration": 9, "prompt_eval_count": 5})

    assert answer == RawAnswer([[1.0], [2.0]], 5)


@pytest.mark.parametrize(
    ("count", "tokens"), [({}, 0), (0, 0), (1, 1), (-1, 0), (True, 0), (2.0, 0), ("2", 0), (None, 0)], ids=str
)
def test_tokens(count: Any, tokens: int) -> None:
    """A count that is none counts nothing."""
    assert answered({"embeddings": [[1.0]], "prompt_eval_count": count}).tokens == tokens


def test_tokens_left_out() -> None:
    """Ollama leaves the count out where it is 0."""
    assert answered({"embeddings": [[1.0]]}).tokens == 0


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"[[1.0]]", b"null", b"{}", b'{"embeddings":null}', b'{"embeddings":{}}', b'{"data":[]}'],
)
def test_answer_that_is_none(body: bytes) -> None:
    """A 200 without a list of embeddings is a bad answer, and the message says where it came from."""
    error = refused(body, 200)

    assert type(error) is errors.BadVectors
    assert URL in error.message


def test_limits_of_a_gateway() -> None:
    """A gateway's limits go with the vectors, and with its refusal."""
    headers = {"x-ratelimit-limit-requests": "60"}

    assert answered({"embeddings": [[1.0]]}, headers=headers).hints == RateHints(requests_per_minute=60)
    assert refused(said("slow"), 429, headers).hints == RateHints(requests_per_minute=60)


# --- whose fault ---

R, F, D, X = errors.RateLimited, errors.UpstreamFailed, errors.UpstreamDenied, errors.UpstreamRefused
LONG = "the input length exceeds the context length"
NAN = "embedding contains NaN or Inf values"


@pytest.mark.parametrize(
    ("status", "body", "error_class", "code"),
    [
        # A gateway's key, or Ollama's cloud.
        (401, said("unauthorized"), D, "upstream_denied"),
        (401, b"", D, "upstream_denied"),
        (403, b"<html>", D, "upstream_denied"),
        (402, said("pay"), D, "upstream_quota"),
        (429, {"error": {"message": "x", "code": "insufficient_quota"}}, D, "upstream_quota"),
        # A model that nobody has pulled, in two spellings; a wrong base_url.
        (404, said("model 'm' not found"), F, "upstream_not_found"),
        (404, said('model "m" not found, try pulling it first'), F, "upstream_not_found"),
        (404, b"404 page not found", F, "upstream_not_found"),
        (405, b"405 method not allowed", F, "upstream_not_found"),
        # Too long, in words of several versions, whatever the status.
        (400, said(LONG), X, "input_too_long"),
        (500, said(LONG), X, "input_too_long"),
        (400, said("input exceeds maximum context length and cannot be truncated further"), X, "input_too_long"),
        (400, said("input after truncation exceeds maximum context length"), X, "input_too_long"),
        # No numbers.
        (400, said(NAN), F, "upstream_failed"),
        (500, said("json: unsupported value: NaN"), F, "upstream_failed"),
        (500, said("failed to encode response: json: unsupported value: +Inf"), F, "upstream_failed"),
        # Too many, or still loading.
        (503, said("server busy, please try again.  maximum pending requests exceeded"), R, "upstream_busy"),
        (503, said("Loading model"), R, "upstream_busy"),
        (429, said("too many"), R, "rate_limit_exceeded"),
        # The runner's fault in a 400.
        (400, said('do embedding request: Post "http://127.0.0.1:39331/v1/embeddings": EOF'), F, "upstream_failed"),
        (400, said('Post "http://127.0.0.1:39331/tokenize": context canceled'), F, "upstream_failed"),
        (400, said("unexpected server status: llm server loading model"), F, "upstream_failed"),
        (400, said("error reading embed response: unexpected EOF"), F, "upstream_failed"),
        (400, said("empty embedding response"), F, "upstream_failed"),
        (400, said("unmarshal embedding values: json: cannot unmarshal null"), F, "upstream_failed"),
        (400, said("llama-server process no longer running: -1 "), F, "upstream_failed"),
        (400, said("server not responding"), F, "upstream_failed"),
        (400, said("connection refused"), F, "upstream_failed"),
        (400, said("no slots available after 10 retries"), F, "upstream_failed"),
        # The server's.
        (500, said("llama runner process has terminated: exit status 2"), F, "upstream_failed"),
        (500, said("model requires more system memory than is available"), F, "upstream_failed"),
        (501, said("This server does not support embeddings. Start it with `--embeddings`"), F, "upstream_failed"),
        (502, b"<html>bad gateway</html>", F, "upstream_failed"),
        (503, b"<html>", F, "upstream_failed"),
        (504, b"", F, "upstream_failed"),
        (408, b"", F, "upstream_failed"),
        (499, said("request canceled"), F, "upstream_failed"),
        (204, b"", F, "upstream_failed"),
        (307, b"", F, "upstream_failed"),
        (200, said("boom"), F, "upstream_failed"),
        # The caller's.
        (400, said("invalid input type"), X, "upstream_refused"),
        (400, said('option "num_ctx" must be of type integer'), X, "upstream_refused"),
        (400, said("tokenize error: some text"), X, "upstream_refused"),
        (400, b"", X, "upstream_refused"),
        (413, b"<html>", X, "upstream_refused"),
    ],
)
def test_classification(status: int, body: Any, error_class: type[errors.EmbeddingError], code: str) -> None:
    """A 400 may be anybody's fault, so its words decide."""
    error = refused(body, status)

    assert type(error) is error_class
    assert error.code == code
    assert f"'u' answered HTTP {status}" in error.message


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, said(NAN), True),
        (200, said(NAN), True),
        (500, said("json: unsupported value: NaN"), True),
        (500, said("boom"), True),
        (400, said("do embedding request: EOF"), False),
        (404, said("model 'm' not found"), False),
        (502, said(NAN), False),
        (503, b"", False),
        (504, b"", False),
        (408, b"", False),
    ],
)
def test_failure_that_one_input_may_have_brought_about(status: int, body: Any, expected: bool) -> None:
    """A vector without numbers is one input's, and a 500 may be; what says so of the server is not."""
    error = refused(body, status)

    assert isinstance(error, errors.UpstreamFailed)
    assert error.may_be_poison is expected


def test_model_that_nobody_has_pulled() -> None:
    """Whoever has forgotten to pull the model is told how, by the name that the settings have for it."""
    error = refused(said("model 'bge-m3' not found"), 404, batch=make_batch(model="bge-m3"))

    assert error.message.endswith("ollama pull bge-m3")


def test_wrong_base_url_is_named() -> None:
    """Whoever mistyped the base_url, or runs a version without this route, is told what was asked."""
    assert URL in refused(b"404 page not found", 404).message


def test_long_input_is_the_callers() -> None:
    """However an old version spells it, the caller gets a 400 for a long input."""
    error = refused(said(LONG), 500)

    assert isinstance(error, errors.UpstreamRefused)
    assert error.status == 400


@pytest.mark.parametrize("status", [400, 413, 422])
def test_refusal_keeps_its_status_and_words(status: int) -> None:
    """The caller gets the upstream's own 4xx, and its words where they quote nobody."""
    error = refused(said("invalid input type"), status)

    assert isinstance(error, errors.UpstreamRefused)
    assert error.status == status
    assert error.message.endswith(f"HTTP {status}: invalid input type")


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_words_that_quote_a_text(status: int) -> None:
    """No word of a caller's text gets out, whoever is at fault."""
    batch = make_batch(["the secret of a caller"])
    error = refused(said("model server busy tokenize error: the secret of a caller"), status, batch=batch)

    assert "secret" not in error.message


@pytest.mark.parametrize(
    ("status", "body"),
    [(429, said("slow")), (503, said("server busy")), (503, b""), (500, said("boom"))],
)
def test_upstream_says_when(status: int, body: Any) -> None:
    """What a gateway says about waiting is read."""
    assert refused(body, status, {"retry-after": "7"}).retry_after_s == 7.0
    assert refused(body, status).retry_after_s is None
