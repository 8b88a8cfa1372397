"""
OpenAI's dialect, and everybody who speaks it.

Servers that differ only in defaults and habits are rows of PROFILES. Vectors are asked for as base64 where the server
has it: a quarter of the bytes, and no numbers to parse.

Source: OpenAI API reference; the servers' own sources and documentation as noted at each row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from proxy.base.errors import (
    BadVectors,
    EmbeddingError,
    RateLimited,
    UpstreamDenied,
    UpstreamFailed,
    UpstreamRefused,
)
from proxy.base.messages import Batch
from proxy.upstream.translate import HttpCall, RawAnswer, wait_s


@dataclass(frozen=True, slots=True)
class Profile:
    """Defaults and habits of one server that speaks OpenAI's dialect."""

    base_url: str = ""
    key_header: str = "Authorization"
    """Where the API key goes; `Authorization` means `Bearer <key>`."""
    has_base64: bool = True
    """Whether it honours `encoding_format: base64`."""
    has_dimensions: bool = True
    """Whether it honours `dimensions`, or at least refuses it; a server that ignores it fails the gate."""
    has_user: bool = False
    """Whether it knows `user`."""
    speaks_cl100k: bool = False
    """Whether token ids mean the same to it as to the caller."""
    max_inputs: int = 256
    """Inputs of one call. Servers take more (OpenAI 2048), but an answer should be read within milliseconds: 256 × 1536
    numbers are 2 MB as base64."""
    max_bytes: int = 600_000
    """UTF-8 bytes of one call: OpenAI's bound of 300 000 tokens, counted as a quarter token per byte, halved."""
    slots: int = 16
    """Concurrent calls."""
    keepalive_s: float = 30.0
    """An idle connection is reused this long; shorter than the server keeps it."""


PROFILES: Mapping[str, Profile] = {
    "openai": Profile(base_url="https://api.openai.com/v1", has_user=True, speaks_cl100k=True),
    # Azure's v1 route; `model` is the deployment's name.
    "azure": Profile(key_header="api-key", has_user=True, speaks_cl100k=True),
    # uvicorn closes after 5 s; no admission control of its own, so few calls at a time.
    "vllm": Profile(keepalive_s=4.0, slots=8),
    # cpp-httplib closes after 5 s; every input has to fit one physical batch; `dimensions` is ignored.
    "llamacpp": Profile(
        base_url="http://127.0.0.1:8080/v1", has_dimensions=False, max_inputs=32, slots=2, keepalive_s=4.0
    ),
    # Inputs are processed one by one; base64 only in recent builds, usage absent.
    "localai": Profile(
        base_url="http://127.0.0.1:8080/v1", has_base64=False, has_dimensions=False, max_inputs=32, slots=2
    ),
    # Concurrent requests have hung it (lmstudio-bug-tracker#7).
    "lmstudio": Profile(
        base_url="http://127.0.0.1:1234/v1",
        has_base64=False,
        has_dimensions=False,
        max_inputs=32,
        slots=1,
        keepalive_s=4.0,
    ),
    # uvicorn closes after 5 s; the prefix is empty by default; reduced widths are not normalised again.
    "infinity": Profile(base_url="http://127.0.0.1:7997", has_dimensions=False, slots=8, keepalive_s=4.0),
    # Whoever else: the least that the dialect promises.
    "generic": Profile(has_base64=False, max_inputs=128, slots=4, keepalive_s=4.0),
}


class OpenAI:
    """The dialect, for one upstream."""

    def __init__(self, name: str, profile: Profile, *, base_url: str, api_key: str, headers: Mapping[str, str]) -> None:
        self._name = name
        self._profile = profile
        self._url = (base_url or profile.base_url).rstrip("/") + "/embeddings"
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **headers}
        if api_key:
            value = f"Bearer {api_key}" if profile.key_header == "Authorization" else api_key
            self._headers[profile.key_header] = value

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
        headers = self._headers
        if batch.traceparent:
            headers = {**headers, "traceparent": batch.traceparent}
        return HttpCall(self._url, headers, orjson.dumps(body))

    def answer(
        self, batch: Batch, status: int, headers: Mapping[str, str], body: bytes, *, wall_now: float
    ) -> RawAnswer:
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            document = None
        if status != 200 or (isinstance(document, dict) and "error" in document and "data" not in document):
            raise self._error(status, _told(document), headers, batch, wall_now)
        if not isinstance(document, dict) or not isinstance(document.get("data"), list):
            raise BadVectors(f"upstream {self._name!r} answered 200 without a list of embeddings at {self._url}")
        return RawAnswer(_in_order(document["data"]), _tokens(document.get("usage")))

    def _error(
        self, status: int, told: Told, headers: Mapping[str, str], batch: Batch, wall_now: float
    ) -> EmbeddingError:
        """
        Tell whose fault an error is.

        The cases: (1) our key or account; (2) money, which comes as 429 too; (3) a call that no waiting makes smaller,
        as 429; (4) rate; (5) a caller's fault in a 500 (llama.cpp, input over its batch); (6) an upstream's fault,
        also where it was answered with 200; (7) a wrong base_url; (8) the caller's fault.
        """
        what = f"upstream {self._name!r} answered HTTP {status}" + (f" {told.label()}" if told.label() else "")
        if status in (401, 403):
            return UpstreamDenied(f"{what}: check its API key")
        if status == 402 or told.is_quota():
            return UpstreamDenied(f"{what}: its quota or credit is used up", code="upstream_quota")
        if status == 429 and told.message.startswith("Request too large"):
            why = "one call is larger than its limit per minute; set batch.max_bytes below that"
            return UpstreamRefused(f"{what}: {why}", status=400, code="input_too_long")
        if status == 429:
            wait = wait_s(headers, told.message, wall_now=wall_now)
            return RateLimited(what, retry_after_s=wait)
        if status == 500 and "too large to process" in told.message:
            return UpstreamRefused(f"{what}: the input is longer than it can take", status=400, code="input_too_long")
        if status < 400 or status >= 500 or status in _FAULTS:
            return UpstreamFailed(what, retry_after_s=wait_s(headers, told.message, wall_now=wall_now))
        if status in (404, 405) and not told.label() and told.message in ("", "Not Found", "Method Not Allowed"):
            return UpstreamFailed(f"{what}: is its base_url right? Asked was {self._url}", code="upstream_not_found")
        if message := told.safe_message(batch):
            what = f"{what}: {message}"
        elif told.message:
            what = f"{what}; its words are left out, as they may quote a text"
        return UpstreamRefused(what, status=status, code=told.code or None, param=told.param or None)


# --- answers ---


def _in_order(data: list[Any]) -> list[Any]:
    """
    Put the items into the order of the inputs.

    Servers answer out of order (vLLM has); those without any `index` are taken as they come.
    """
    if not all(isinstance(item, dict) for item in data):
        raise BadVectors("an item of 'data' is no object")
    indexes = [item.get("index") for item in data]
    if indexes == list(range(len(data))) or all(index is None for index in indexes):
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

_QUOTA = frozenset(
    {
        "insufficient_quota",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "billing_hard_limit_reached",
    }
)
_IDENTIFIER = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")
_MAX_MESSAGE_CHARS = 400
_PLAIN = re.compile(r"[A-Za-z0-9 .,:;()'\"`/<>=$_-]*")
_WORD = re.compile(r"[a-z]+|[0-9]+")
_WORDS = frozenset(
    (
        "a above all allowed an and any are array as at bad batch batches be been below between bound but bytes can "
        "cannot change changing characters check client completion contain contains context could data decrease "
        "dimension dimensionality dimensions do does doesn each element elements embed embedding embeddings empty "
        "encoding equal error exceed exceeded exceeds expected expects failed field fit float for format found from "
        "generate given got greater had has have however if image in increase input inputs instead int integer into "
        "invalid is isn it item items its json key kind large lead least length less like limit limits list long "
        "longer lower many matryoshka max maximum may memory message min minimum missing model models more most must "
        "name native negative no non not null number numbers object of on one only or out output parameter parameters "
        "parse per physical please pooling poor positive process processing prompt property provide provided range "
        "reached received reduce representation request requested requests required results s server set shorter "
        "should single size sizes smaller some split string strings support supported supports t text texts than that "
        "the there this to token tokenizer tokens too total truncate truncation try type types ubatch unable "
        "unexpected unknown unsupported up use user valid value values vector vectors was were when which will with "
        "within you your zero "
    ).split()
)
"""What API errors are made of. A message of other words is not passed on: they may be a caller's, or our key."""


@dataclass(frozen=True, slots=True)
class Told:
    """What an error body says, whichever of the usual shapes it has."""

    message: str = ""
    kind: str = ""
    code: str = ""
    param: str = ""

    def label(self) -> str:
        return (
            f"({', '.join(dict.fromkeys(word for word in (self.code, self.kind) if word))})"
            if self.code or self.kind
            else ""
        )

    def is_quota(self) -> bool:
        return self.code in _QUOTA or self.kind == "insufficient_quota"

    def safe_message(self, batch: Batch) -> str:
        """
        Return the message if it cannot hold a text or a key, else nothing.

        Upstreams quote what they were sent, whole or cut, trimmed or escaped, and a batch may carry several callers'
        texts. So a message passes only if it consists of the words that API errors are made of, and neither a whole
        input nor one of its numbers stands in it.
        """
        message = " ".join(self.message.split())
        if len(message) > _MAX_MESSAGE_CHARS or not _PLAIN.fullmatch(message):
            return ""
        words = set(_WORD.findall(message.lower()))
        numbers = {word for word in words if word.isdigit()}
        if not words - numbers <= _WORDS:
            return ""
        for item in batch.inputs:
            text = " ".join(item.split()) if isinstance(item, str) else ""
            if (len(text) > 3 and text in message) or any(number in text for number in numbers):
                return ""
        return message


def _told(document: Any) -> Told:
    """Read OpenAI's shape, TEI's and vLLM's unwrapped one, Ollama's plain text, FastAPI's `detail`."""
    if not isinstance(document, dict):
        return Told()
    error = document.get("error", document)
    if isinstance(error, str):
        return Told(message=error)
    if not isinstance(error, dict):
        return Told()
    message = error.get("message", error.get("detail"))
    return Told(
        message=message if isinstance(message, str) else "",
        kind=_identifier(error.get("type")),
        code=_identifier(error.get("code")),
        param=_identifier(error.get("param")),
    )


def _identifier(value: Any) -> str:
    """A word that machines compare; anything longer could be a text."""
    return value if isinstance(value, str) and _IDENTIFIER.fullmatch(value) else ""
