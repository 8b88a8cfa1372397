"""
Ollama's own dialect: POST /api/embed.

Its OpenAI route drops `truncate`, `options` and `keep_alive`, and so cuts long texts without a word; here over-length
is an error that can be told, and the model stays loaded for as long as the settings say.

Source: ollama/ollama `server/routes.go` (EmbedHandler, handleScheduleError), `server/sched.go`, `llm/llama_server.go`,
`api/types.go`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from proxy.base.errors import BadVectors, EmbeddingError, UpstreamDenied, UpstreamFailed, UpstreamRefused
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

PATH = "/api/embed"

PROFILE = Profile(
    base_url="http://127.0.0.1:11434",
    has_base64=False,
    # An embedding model computes one input after the other, whatever OLLAMA_NUM_PARALLEL says: larger calls gain
    # nothing, and hold the only place for so long that a query behind them waits. 16 chunks of 2 kB take seconds on a
    # CPU as it is.
    max_inputs=16,
    max_bytes=32_768,
    # One call at a time: concurrent ones have crashed older versions (ollama/ollama#6094), and gain next to nothing.
    slots=1,
    start_slots=1,
    # Go's server never closes an idle connection.
    keepalive_s=30.0,
    # Its runner finishes what nobody waits for any more (ollama/ollama#11889).
    abandoned_s=30.0,
    # OLLAMA_LOAD_TIMEOUT.
    first_answer_s=300.0,
)


class Ollama:
    """The dialect, for one upstream."""

    def __init__(
        self,
        name: str,
        profile: Profile,
        *,
        base_url: str,
        api_key: str,
        headers: Mapping[str, str],
        keep_alive: str,
    ) -> None:
        """
        Args:
            name: the upstream's name.
            profile: its defaults.
            base_url: where it is; empty means the profile's own.
            api_key: Ollama itself has none, a gateway in front of it may.
            headers: further ones.
            keep_alive: how long the model stays loaded, a Go duration or seconds; empty leaves it to the server.
        """
        self._name = name
        self._url = (base_url or profile.base_url).rstrip("/") + PATH
        self._headers = call_headers(profile, api_key, headers)
        # Go reads a text as a duration, which has to have a unit, and a number as seconds.
        self._keep_alive = int(keep_alive) if re.fullmatch(r"-?\d+", keep_alive) else keep_alive

    def call(self, batch: Batch) -> HttpCall:
        body: dict[str, Any] = {"model": batch.model, "input": batch.inputs}
        if self._keep_alive != "":
            body["keep_alive"] = self._keep_alive
        if batch.spec.dimensions is not None:
            body["dimensions"] = batch.spec.dimensions
        # A caller may ask for `truncate`, as for `options`: both are part of what its vectors are stored under.
        body = {"truncate": False} | orjson.loads(batch.spec.params) | body
        return HttpCall(self._url, self._headers, orjson.dumps(body), batch.traceparent)

    def answer(
        self, batch: Batch, status: int, headers: Mapping[str, str], body: bytes, *, wall_now: float
    ) -> RawAnswer:
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            document = None
        if status != 200 or (isinstance(document, dict) and "error" in document and "embeddings" not in document):
            raise self._error(status, told(document), headers, batch, wall_now)
        if not isinstance(document, dict) or not isinstance(document.get("embeddings"), list):
            raise BadVectors(f"upstream {self._name!r} answered 200 without a list of embeddings at {self._url}")
        count = document.get("prompt_eval_count")  # left out where it is 0
        tokens = count if type(count) is int and count > 0 else 0
        return RawAnswer(document["embeddings"], tokens, rate_hints(headers))

    def _error(
        self, status: int, error: Told, headers: Mapping[str, str], batch: Batch, wall_now: float
    ) -> EmbeddingError:
        """
        Tell whose fault an error is.

        A runner's fault comes as 400 like a caller's, and was a 500 in older versions, so words decide. The cases:
        (1) a gateway's key, or Ollama's cloud; (2) a model that nobody has pulled; (3) a wrong base_url; (4) a text
        over the model's context; (5) an input for which the model gives no numbers; (6) too many calls that wait for a
        model to be loaded, or one that is loading; (7) the runner's fault, or the server's; (8) the caller's fault.
        """
        what = error.heading(self._name, status)
        if status in (401, 403):
            return UpstreamDenied(f"{what}: check its API key")
        if status == 402 or error.is_quota():
            return UpstreamDenied(f"{what}: its quota or credit is used up", code="upstream_quota")
        if status == 404 and error.message.startswith("model "):
            remedy = f"it does not have the model, so run there: ollama pull {batch.model}"
            return UpstreamFailed(f"{what}: {remedy}", code="upstream_not_found")
        if status in (404, 405):
            return UpstreamFailed(f"{what}: is its base_url right? Asked was {self._url}", code="upstream_not_found")
        if status in _EITHER and _TOO_LONG.search(error.message):
            return UpstreamRefused(f"{what}: the input is longer than it can take", status=400, code="input_too_long")
        if status in _EITHER and _NO_NUMBERS.search(error.message):
            return UpstreamFailed(f"{what}: its vector of an input holds NaN or infinity", may_be_poison=True)
        if status == 429:
            return rate_limited(what, headers, error.message, wall_now=wall_now)
        if status == 503 and _BUSY.search(error.message):
            return rate_limited(what, headers, error.message, wall_now=wall_now, code="upstream_busy")
        is_runner = status == 400 and _RUNNER.search(error.message)
        if is_runner or status < 400 or status >= 500 or status in _FAULTS:
            wait = wait_s(headers, error.message, wall_now=wall_now)
            return UpstreamFailed(what, retry_after_s=wait, may_be_poison=status in MAY_BE_POISON)
        return UpstreamRefused(what + error.words(batch), status=status)


_EITHER = frozenset({200, 400, 500})
"""Statuses that say nothing about whose fault it is: versions differ, and gateways make a 200 of anything."""
_FAULTS = frozenset({408, 409, 425, 499})
"""4xx that speak of the server's state; 499 is Ollama's own for a call that was given up while the model loaded."""
_TOO_LONG = re.compile(r"exceeds (?:the|maximum) context length")
_NO_NUMBERS = re.compile(r"NaN or Inf|unsupported value: (?:NaN|[+-]Inf)")
_BUSY = re.compile(r"server busy|maximum pending requests|Loading model")
_RUNNER = re.compile(
    r"do embedding request|unexpected server status|embed(?:ding)? (?:request|response|values|data)|"
    r"127\.0\.0\.1:|process no longer running|server not responding|connection refused|no slots available|"
    r"runner|\bEOF\b"
)
"""How Go tells of the process that computes: ours is never the only call that it fails."""
