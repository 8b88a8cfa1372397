"""
What a client is told once: where the sidecar is, what to ask for by default, how patient and how busy to be.

Both clients take the same arguments; their meaning, bounds and environment variables are settled here.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from rag_adapter.address import Address, find
from rag_adapter.errors import InvalidInput
from rag_adapter.wire import PRIORITIES, Priority, Spec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,63}")
_KEY = re.compile(r"[!-~]{1,4096}")
_MAX_PATIENCE_S = 1_000_000.0
"""Eleven days; sockets count milliseconds in 31 bits."""
_MAX_REQUEST_TEXTS = 2048
"""OpenAI's bound, and the sidecar's default (`request.max_inputs`)."""


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """The arguments of a client, checked."""

    address: Address
    model: str | None
    dimensions: int | None
    timeout_s: float
    bulk_timeout_s: float
    priority: Priority | None
    client_name: str | None
    api_key: str | None = field(repr=False)
    max_connections: int
    request_texts: int
    concurrency: int

    @property
    def bulk_connections(self) -> int:
        """How many connections bulk may have at a time: one stays for queries where there are several."""
        return min(self.concurrency, max(1, self.max_connections - 1))

    def spec(
        self,
        model: str | None,
        dimensions: int | None,
        priority: Priority | None,
        *,
        usual: Priority,
    ) -> Spec:
        """
        Say what one call asks for.

        The priority: (1) the call's; (2) the client's; (3) the usual one of its kind.

        Raises:
            InvalidInput: it makes no sense.
        """
        if model is None and dimensions is None and priority is None:
            return _spec(self.model, self.dimensions, self.priority or usual)
        flaw = _flaw(model, dimensions, priority)
        if flaw:
            raise InvalidInput(flaw, code="invalid_argument")
        return _spec(
            self.model if model is None else model,
            self.dimensions if dimensions is None else dimensions,
            priority or self.priority or usual,
        )


def client_settings(
    address: str | None = None,
    *,
    model: str | None = None,
    dimensions: int | None = None,
    timeout_s: float = 10.0,
    bulk_timeout_s: float = 60.0,
    priority: Priority | None = None,
    client_name: str | None = None,
    api_key: str | None = None,
    max_connections: int = 8,
    request_texts: int = 256,
    concurrency: int = 4,
    environ: Mapping[str, str] | None = None,
) -> ClientSettings:
    """
    Check the arguments of a client and fill in what the environment says.

    Raises:
        ValueError: names everything that is wrong with them, at once.
    """
    environ = os.environ if environ is None else environ
    api_key = api_key or environ.get("EMBEDDING_SIDECAR_API_KEY") or None
    flaws = [
        _flaw(model, dimensions, priority),
        "" if is_patience(timeout_s) else f"timeout_s is {timeout_s!r}; it has to be a number of seconds above 0",
        "" if is_patience(bulk_timeout_s) else f"bulk_timeout_s is {bulk_timeout_s!r}; it has to be above 0",
        ""
        if client_name is None or _NAME.fullmatch(client_name)
        else f"client_name is {client_name!r}; it may have 1 "
        "to 64 letters, digits and . _ : @ / -, the first a letter or a digit",
        "" if api_key is None or _KEY.fullmatch(api_key) else "api_key may have visible ASCII characters only",
        _count_flaw("max_connections", max_connections, 1024),
        _count_flaw("request_texts", request_texts, _MAX_REQUEST_TEXTS),
        _count_flaw("concurrency", concurrency, 1024),
    ]
    try:
        found = find(address, environ)
    except ValueError as error:
        flaws.append(str(error))
    if any(flaws):
        raise ValueError("; ".join(filter(None, flaws)))
    return ClientSettings(
        address=found,
        model=model,
        dimensions=dimensions,
        timeout_s=timeout_s,
        bulk_timeout_s=bulk_timeout_s,
        priority=priority,
        client_name=client_name,
        api_key=api_key,
        max_connections=max_connections,
        request_texts=request_texts,
        concurrency=concurrency,
    )


def is_patience(value: object) -> bool:
    """Whether this is a number of seconds that one can wait."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MAX_PATIENCE_S


def deadline_of(now: float, timeout_s: float | None, deadline: float | None, *, usual_s: float) -> float:
    """
    Return the instant until which a call may take: the earlier one of what it says, else the usual time from now.

    Raises:
        InvalidInput: a timeout or a deadline that is none.
    """
    if timeout_s is None and deadline is None:
        return now + usual_s
    if timeout_s is not None and not is_patience(timeout_s):
        raise InvalidInput("timeout_s has to be a number of seconds above 0", code="invalid_argument")
    if deadline is not None and not math.isfinite(deadline):
        raise InvalidInput("deadline has to be an instant of time.monotonic()", code="invalid_argument")
    by_timeout = now + (_MAX_PATIENCE_S if timeout_s is None else timeout_s)
    return by_timeout if deadline is None else min(deadline, by_timeout)


@functools.lru_cache(maxsize=256)
def _spec(model: str | None, dimensions: int | None, priority: Priority) -> Spec:
    """An app has few of them, and asks for one with each text."""
    return Spec(model, dimensions, priority)


def _flaw(model: object, dimensions: object, priority: object) -> str:
    if model is not None and not (isinstance(model, str) and model):
        return "model has to be the name of a model, or None for the sidecar's default"
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        return f"dimensions is {dimensions!r}; it has to be a whole number above 0, or None for the model's own width"
    if priority is not None and priority not in PRIORITIES:
        return f"priority is {priority!r}; it may be 'interactive' or 'bulk'"
    return ""


def _count_flaw(name: str, value: object, high: int) -> str:
    is_right = type(value) is int and 1 <= value <= high
    return "" if is_right else f"{name} is {value!r}; it has to be a whole number from 1 to {high}"
