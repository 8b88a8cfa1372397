"""
OpenAI's dialect, and everybody who speaks it.

Servers that differ only in defaults and habits are rows of PROFILES. Vectors are asked for as base64 where the server
has it: a quarter of the bytes, and no numbers to parse.

Source: OpenAI API reference; the servers' own sources and documentation as noted at each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from proxy.base.errors import (
    BadVectors,
    EmbeddingError,
    UpstreamDenied,
    UpstreamFailed,
    UpstreamRefused,
)
from proxy.base.messages import Batch
from proxy.upstream.translate import (
    HttpCall,
    Profile,
    RawAnswer,
    call_headers,
    rate_hints,
    rate_limited,
    wait_s,
)
from proxy.upstream.translate.told import MAY_BE_POISON, Told, told

PATH = "/embeddings"

PROFILES: Mapping[str, Profile] = {
    "openai": Profile(base_url="https://api.openai.com/v1", has_user=True, speaks_cl100k=True, max_tokens=300_000),
    # Azure's v1 route; `model` is the deployment's name.
    "azure": Profile(key_header="api-key", has_user=True, speaks_cl100k=True, max_tokens=300_000),
    # uvicorn closes after 5 s; no admission control of its own, so few calls at a time; a call whose caller has left is
    # aborted (its `with_cancellation`), so it takes up nothing.
    "vllm": Profile(keepalive_s=4.0, slots=8, start_slots=2),
    # cpp-httplib closes after 5 s; every input has to fit one physical batch; `dimensions` is ignored.
    "llamacpp": Profile(
        base_url="http://127.0.0.1:8080/v1",
        has_dimensions=False,
        max_inputs=32,
        slots=2,
        start_slots=1,
        keepalive_s=4.0,
        abandoned_s=30.0,
        first_answer_s=120.0,
    ),
    # Inputs are processed one by one; base64 only in recent builds, usage absent; the first call loads the model.
    "localai": Profile(
        base_url="http://127.0.0.1:8080/v1",
        has_base64=False,
        has_dimensions=False,
        max_inputs=32,
        slots=2,
        start_slots=1,
        abandoned_s=30.0,
        first_answer_s=120.0,
    ),
    # Concurrent requests have hung it (lmstudio-bug-tracker#7); the first call loads the model.
    "lmstudio": Profile(
        base_url="http://127.0.0.1:1234/v1",
        has_base64=False,
        has_dimensions=False,
        max_inputs=32,
        slots=1,
        start_slots=1,
        keepalive_s=4.0,
        abandoned_s=30.0,
        first_answer_s=120.0,
    ),
    # uvicorn closes after 5 s; the prefix is empty by default; reduced widths are not normalised again; what is in its
    # queue is computed, whoever has left.
    "infinity": Profile(
        base_url="http://127.0.0.1:7997",
        has_dimensions=False,
        slots=8,
        start_slots=2,
        keepalive_s=4.0,
        abandoned_s=30.0,
    ),
    # Whoever else: the least that the dialect promises. Many are hosted, so nothing is held for those who have left.
    "generic": Profile(has_base64=False, max_inputs=128, slots=4, start_slots=2, keepalive_s=4.0),
}


class OpenAI:
    """The dialect, for one upstream."""

    def __init__(self, name: str, profile: Profile, *, base_url: str, api_key: str, headers: Mapping[str, str]) -> None:
        self._name = name
        self._profile = profile
        self._url = (base_url or profile.base_url).rstrip("/") + PATH
        self._headers = call_headers(profile, api_key, headers)

    def call(self, batch: Batch) -> HttpCall:
        body: dict[str, Any] = {"model": batch.model, "input": batch.inputs}
        if self._profile.has_base64:
            body["encoding_format"] = "base64"
        if batch.spec.dimensions is not None:
            body["dimensions"] = batch.spec.dimensions
        if batch.user is not None and self._profile.has_user:
            body["user"] = batch.user
        if batch.spec.params != b"{}":
            body = orjson.loads(batch.spec.params) | body
        return HttpCall(self._url, self._headers, orjson.dumps(body), batch.traceparent)

    def answer(
        self, batch: Batch, status: int, headers: Mapping[str, str], body: bytes, *, wall_now: float
    ) -> RawAnswer:
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            document = None
        if status != 200 or (isinstance(document, dict) and "error" in document and "data" not in document):
            raise self._error(status, told(document), headers, batch, wall_now)
        if not isinstance(document, dict) or not isinstance(document.get("data"), list):
            raise BadVectors(f"upstream {self._name!r} answered 200 without a list of embeddings at {self._url}")
        return RawAnswer(_in_order(document["data"]), _tokens(document.get("usage")), rate_hints(headers))

    def _error(
        self, status: int, error: Told, headers: Mapping[str, str], batch: Batch, wall_now: float
    ) -> EmbeddingError:
        """
        Tell whose fault an error is.

        The cases: (1) our key or account; (2) money, which comes as 429 too; (3) a call that no waiting makes smaller,
        as 429; (4) rate; (5) a caller's fault in a 500 (llama.cpp, input over its batch); (6) an upstream's fault,
        also where it was answered with 200; (7) a wrong base_url; (8) the caller's fault.
        """
        what = error.heading(self._name, status)
        if status in (401, 403):
            return UpstreamDenied(f"{what}: check its API key")
        if status == 402 or error.is_quota():
            return UpstreamDenied(f"{what}: its quota or credit is used up", code="upstream_quota")
        if status == 429 and error.message.startswith("Request too large"):
            why = "one call is larger than its limit per minute; set batch.max_tokens below that"
            return UpstreamRefused(f"{what}: {why}", status=400, code="input_too_long")
        if status == 429:
            return rate_limited(what, headers, error.message, wall_now=wall_now)
        if status == 500 and "too large to process" in error.message:
            return UpstreamRefused(f"{what}: the input is longer than it can take", status=400, code="input_too_long")
        if status < 400 or status >= 500 or status in _FAULTS:
            wait = wait_s(headers, error.message, wall_now=wall_now)
            return UpstreamFailed(what, retry_after_s=wait, may_be_poison=status in MAY_BE_POISON)
        if status in (404, 405) and not error.labels() and error.message in ("", "Not Found", "Method Not Allowed"):
            return UpstreamFailed(f"{what}: is its base_url right? Asked was {self._url}", code="upstream_not_found")
        what += error.words(batch)
        return UpstreamRefused(what, status=status, code=error.code or None, param=error.param or None)


# --- answers ---


def _in_order(data: list[Any]) -> list[Any]:
    """
    Put the items into the order of the inputs.

    The cases: (1) the usual one, looked at in one go; (2) no `index` at all: they are taken as they come; (3) out of
    order, as vLLM has answered.
    """
    try:
        if [item["index"] for item in data] == list(range(len(data))):
            return [item["embedding"] for item in data]
    except (TypeError, KeyError):
        pass  # not all of them are objects, or have both
    if not all(isinstance(item, dict) for item in data):
        raise BadVectors("an item of 'data' is no object")
    indexes = [item.get("index") for item in data]
    if all(index is None for index in indexes):
        return [item.get("embedding") for item in data]
    if not all(type(index) is int for index in indexes) or sorted(indexes) != list(range(len(data))):
        raise BadVectors(f"the indexes of {len(data)} vectors have gaps, repeats or strangers among them")
    return [item.get("embedding") for item in sorted(data, key=lambda item: int(item["index"]))]


def _tokens(usage: Any) -> int:
    usage = usage if isinstance(usage, dict) else {}
    for name in ("prompt_tokens", "total_tokens"):
        if type(usage.get(name)) is int and usage[name] > 0:
            return int(usage[name])
    return 0


# --- errors ---

_FAULTS = frozenset({408, 409, 424, 425})
"""4xx that speak of the server's state: time-out, conflict, failed inference (TEI), too early."""
