"""
Frozen facts.

Stages state what happened to the observer that they were handed; `watch/` counts and writes. A stage that tells a
fact does not know who listens. Texts, vectors and keys are no facts.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.base.messages import message


@message
class RequestFinished:
    """A request has been answered, or its caller has left."""

    request_id: str
    listener: str
    """`unix` or `tcp`."""
    method: str
    path: str
    """Path as the routes know it; others count as one."""
    status: int
    """HTTP status of the answer; 499 when the caller left before it."""
    total_s: float
    code: str = ""
    """Error code; empty when all went well."""
    message: str = ""
    """The error's message, which names no text."""
    caller: str = ""
    model: str = ""
    priority: str = ""
    inputs: int = 0
    hits: int = 0
    tokens: int = 0
    upstream: str = ""
    attempts: int = 0
    queue_s: float = 0.0
    upstream_s: float = 0.0
    trace_id: str = ""
    body_bytes: int = 0
    answer_bytes: int = 0


@message
class CacheLookedUp:
    """A request has asked the cache for its inputs."""

    model: str
    hits: int
    misses: int


@message
class InputsJoined:
    """Inputs needed no call of their own, since an equal one was already under way."""

    model: str
    inputs: int


@message
class BatchFinished:
    """A call is over, with all its attempts."""

    model: str
    upstream: str
    inputs: int
    queue_s: float
    upstream_s: float


@message
class BatchSplit:
    """A batch failed in a way that one of its inputs may be to blame for, and is cut to find it."""

    model: str
    inputs: int


@message
class AttemptFinished:
    """One exchange with an upstream is over."""

    upstream: str
    code: str
    """Empty for success, `ignored` when the caller left, else the error's code."""
    seconds: float
    inputs: int
    tokens: int = 0


@message
class ConnectionStale:
    """A pooled connection turned out to be closed by the upstream; the attempt went out once more, for free."""

    upstream: str


@message
class BreakerMoved:
    """The breaker of an upstream has changed its state."""

    upstream: str
    old: str
    new: str


@message
class CanaryFinished:
    """A canary input has been sent to an upstream of a model."""

    model: str
    upstream: str
    seconds: float
    problem: str = ""
    """Empty when the vector was right."""
    changed: bool = False
    """Whether this differs from the canary before."""


@message
class ListenersOpened:
    """Callers can connect from now on."""

    listeners: tuple[str, ...]
    """`unix:<path>` and `tcp:<host>:<port>`."""


@message
class LifecycleMoved:
    """The process has entered another state."""

    state: str
    """starting, ready, unready, draining or stopped."""
    detail: str = ""


@message
class ReloadFinished:
    """The settings have been read again."""

    problem: str = ""
    """Why nothing changed; empty when the new settings are in force."""
    needs_restart: tuple[str, ...] = ()
    """Keys that have changed in the file and take effect at the next start only."""


Event = (
    RequestFinished
    | CacheLookedUp
    | InputsJoined
    | BatchFinished
    | BatchSplit
    | AttemptFinished
    | ConnectionStale
    | BreakerMoved
    | CanaryFinished
    | ListenersOpened
    | LifecycleMoved
    | ReloadFinished
)

Observer = Callable[[Event], None]
