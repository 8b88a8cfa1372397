"""
The dialects of text-embeddings-inference, Hugging Face's server: POST /embed, and its OpenAI route.

Its own route can say `truncate: false`, so that over-length is an error; on the OpenAI route the server's setting
decides, which from 1.9.0 on cuts long texts without a word. In return that one has base64. Both serve the same vectors
at the same base_url, so they may be exchanged, and both fail in the same ways.

Source: huggingface/text-embeddings-inference `router/src/http/{server,types}.rs`, `router/src/lib.rs`,
`core/src/{infer,queue,tokenization}.rs`, 1.8.0 to 1.9.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from proxy.base.errors import BadVectors, EmbeddingError, UpstreamDenied, UpstreamFailed, UpstreamRefused
from proxy.base.messages import Batch
from proxy.upstream.translate import (
    HttpCall,
    Profile,
    RawAnswer,
    call_headers,
    openai,
    rate_hints,
    rate_limited,
    wait_s,
)
from proxy.upstream.translate.told import MAY_BE_POISON, Told, told

PATH = "/embed"

_NATIVE = Profile(
    # The port of the binary; the container listens on 80.
    base_url="http://127.0.0.1:3000",
    has_base64=False,
    # --max-client-batch-size, beyond which the whole call is refused.
    max_inputs=32,
    # --payload-limit is 2 000 000 bytes of JSON, in which a quote, a backslash or a line end takes two.
    max_bytes=900_000,
    # --max-concurrent-requests, 512, counts inputs: eight full calls are half of them.
    slots=8,
    start_slots=2,
    # hyper closes no idle connection.
    keepalive_s=30.0,
    # What waits in its queue is dropped when its caller leaves; only what is being computed goes on.
    abandoned_s=5.0,
)

PROFILES: Mapping[str, Profile] = {"native": _NATIVE, "openai": replace(_NATIVE, has_base64=True)}
"""By route. It is up only once its model is loaded, so the first answer takes no longer than others."""


class Tei:
    """The server's own dialect, for one upstream."""

    def __init__(self, name: str, profile: Profile, *, base_url: str, api_key: str, headers: Mapping[str, str]) -> None:
        self._name = name
        self._url = (base_url or profile.base_url).rstrip("/") + PATH
        self._headers = call_headers(profile, api_key, headers)

    def call(self, batch: Batch) -> HttpCall:
        # No model: a server has one.
        body: dict[str, Any] = {"inputs": batch.inputs}
        if batch.spec.dimensions is not None:
            body["dimensions"] = batch.spec.dimensions
        # A caller may ask for other than the first two: its parameters are part of what its vectors are stored under.
        body = {"normalize": True, "truncate": False} | orjson.loads(batch.spec.params) | body
        return HttpCall(self._url, self._headers, orjson.dumps(body), batch.traceparent)

    def answer(
        self, batch: Batch, status: int, headers: Mapping[str, str], body: bytes, *, wall_now: float
    ) -> RawAnswer:
        document = _parsed(body)
        if status != 200 or (isinstance(document, dict) and "error" in document):
            raise _error(self._name, self._url, status, told(document), headers, batch, wall_now)
        if not isinstance(document, list):
            raise BadVectors(f"upstream {self._name!r} answered 200 without a list of vectors at {self._url}")
        counted = headers.get("x-compute-tokens", "")
        tokens = int(counted) if counted.isascii() and counted.isdigit() and len(counted) <= 12 else 0
        return RawAnswer(document, tokens, rate_hints(headers))


class TeiOpenAI:
    """OpenAI's dialect with the server's own errors, for one upstream."""

    def __init__(self, name: str, profile: Profile, *, base_url: str, api_key: str, headers: Mapping[str, str]) -> None:
        self._name = name
        self._url = (base_url or profile.base_url).rstrip("/") + openai.PATH
        self._inner = openai.OpenAI(name, profile, base_url=base_url, api_key=api_key, headers=headers)

    def call(self, batch: Batch) -> HttpCall:
        return self._inner.call(batch)

    def answer(
        self, batch: Batch, status: int, headers: Mapping[str, str], body: bytes, *, wall_now: float
    ) -> RawAnswer:
        if status != 200:
            raise _error(self._name, self._url, status, told(_parsed(body)), headers, batch, wall_now)
        return self._inner.answer(batch, status, headers, body, wall_now=wall_now)


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


# --- errors ---

_FAULTS = frozenset({408, 409, 424, 425})
"""4xx that speak of the server's state; 424 is a failed inference."""


def _error(
    name: str, url: str, status: int, error: Told, headers: Mapping[str, str], batch: Batch, wall_now: float
) -> EmbeddingError:
    """
    Tell whose fault an error is.

    The cases: (1) the key; (2) money, at Hugging Face's hosted endpoints; (3) no free permit for one of the inputs,
    whereupon nothing of the call is computed; (4) a failed inference, a server that is unhealthy, or a gateway's word;
    (5) a wrong base_url; (6) a call with too much in it: 413 for bytes, and for inputs up to 1.8, 422 for those from
    1.9 on; (7) a text over the model's bound; (8) the caller's fault.
    """
    what = error.heading(name, status)
    kind = error.kind.lower()  # its documentation has them in small letters, its answers begin with a capital
    if status in (401, 403):
        return UpstreamDenied(f"{what}: check its API key")
    if status == 402 or error.is_quota():
        return UpstreamDenied(f"{what}: its quota or credit is used up", code="upstream_quota")
    if status == 429 or kind == "overloaded":
        return rate_limited(what, headers, error.message, wall_now=wall_now, code="upstream_busy")
    if kind in ("backend", "unhealthy") or status < 400 or status >= 500 or status in _FAULTS:
        wait = wait_s(headers, error.message, wall_now=wall_now)
        return UpstreamFailed(what, retry_after_s=wait, may_be_poison=status in MAY_BE_POISON)
    if status in (404, 405) and not kind:
        return UpstreamFailed(f"{what}: is its base_url right? Asked was {url}", code="upstream_not_found")
    is_batch = "maximum allowed batch size" in error.message
    if is_batch or (status == 413 and not kind):
        which = "max_inputs" if is_batch else "max_bytes"
        remedy = f"one call is larger than it takes; set batch.{which} below that"
        return UpstreamRefused(f"{what}: {remedy}", status=413, code="batch_too_large")
    code = "input_too_long" if "must have less than" in error.message else None
    return UpstreamRefused(what + error.words(batch), status=status, code=code)
