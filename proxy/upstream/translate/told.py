"""
What an upstream's error says, whichever shape it has, and how much of it may be passed on.

Beside the dialects, since servers borrow each other's shapes: TEI has one on each of its routes, and a gateway in front
of any of them answers in OpenAI's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from proxy.base.messages import Batch

MAY_BE_POISON = frozenset({500, 424})
"""Statuses with which servers answer a whole batch where the model failed on one of its inputs (llama.cpp, TEI). The
others speak of the server: a gateway's 502 and 504, a restart's 503."""

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
        "a above all allowed an and any are array as at bad batch batches be been below between body bound but bytes "
        "can cannot change changing characters check client completion contain contains context could data decrease "
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
        "unexpected unknown unsupported up use user valid validation value values vector vectors was were when "
        "which will with within you your zero "
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

    def heading(self, name: str, status: int) -> str:
        """Return how a message about an upstream's error begins: who, the status, its machine-readable words."""
        return f"upstream {name!r} answered HTTP {status}" + (f" ({', '.join(self.labels())})" if self.labels() else "")

    def labels(self) -> list[str]:
        """Return its machine-readable words, each once."""
        return list(dict.fromkeys(word for word in (self.code, self.kind) if word))

    def is_quota(self) -> bool:
        """Whether it is about money or a spending cap, which no waiting mends."""
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

    def words(self, batch: Batch) -> str:
        """Return what a refusal adds to our own words: the message, or that there was one, or nothing."""
        if message := self.safe_message(batch):
            return f": {message}"
        return "; its words are left out, as they may quote a text" if self.message else ""


def told(document: Any) -> Told:
    """Read OpenAI's shape, TEI's and vLLM's unwrapped one, Ollama's and TEI's plain text, FastAPI's `detail`."""
    if not isinstance(document, dict):
        return Told()
    error = document.get("error", document)
    if isinstance(error, str):
        return Told(message=error, kind=_identifier(document.get("error_type")))
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
