"""
The errors of the house, one class per thing that somebody handles differently.

Each knows whose fault it is, whether another try may help, how long to wait and its stable `code` for the wire. HTTP
statuses are none of its business; `edge/encode.py` holds the only table. Messages name the value and the bound, never
a caller's text: they end in answers and logs.
"""

from __future__ import annotations

import enum
from typing import Any, Self

from proxy.base.messages import RateHints


class Fault(enum.StrEnum):
    """Whose trouble it is."""

    CALLER = "caller"
    PROXY = "proxy"
    UPSTREAM = "upstream"


class EmbeddingError(Exception):
    """Anything that keeps a request from its vectors."""

    fault = Fault.PROXY
    code = "internal_error"
    can_retry = False
    """Whether the same request may succeed later, here or at another upstream."""
    may_be_poison = False
    """Whether one input of its batch may have brought it about, on a server that is well: then parts of it may fare
    better."""
    index: int | None = None
    """Position of the culprit in its batch, where that is known."""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.retry_after_s = retry_after_s
        self.upstream = ""
        """Where it happened; empty when no upstream was asked."""
        self.key: bytes | None = None
        """Key of the one input that is to blame: batches are cut and requests thinned out on the way, a key stays."""
        self.hints: RateHints | None = None
        """What the upstream says about its limits, beside a RateLimited."""

    @property
    def label(self) -> str:
        """The code for metrics and logs, out of a closed set."""
        return self.code

    def own(self) -> Self:
        """Return one like it: each of several callers raises its own, with its own trace and culprit."""
        copy = type(self).__new__(type(self))
        copy.args = self.args
        copy.__dict__.update(self.__dict__)
        copy.__cause__ = self
        return copy


# --- the caller's ---


class InvalidRequest(EmbeddingError):
    """The request makes no sense; it fails the same way each time."""

    fault = Fault.CALLER
    code = "invalid_request"


class TooLarge(InvalidRequest):
    """A body, a list or a text over its bound."""

    code = "request_too_large"


class UnknownModel(InvalidRequest):
    """No such model here; the message lists the known ones."""

    code = "model_not_found"


class UnknownRoute(InvalidRequest):
    """No such path."""

    code = "unknown_url"


class WrongMethod(InvalidRequest):
    """The path exists, the method does not."""

    code = "method_not_allowed"

    def __init__(self, message: str, *, allowed: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(message, **options)
        self.allowed = allowed
        """Methods that the path takes."""


class WrongContentType(InvalidRequest):
    """The body is not declared as JSON. Browsers can post forms across sites, but not JSON, so this is a wall too."""

    code = "unsupported_media_type"


class Unauthorized(InvalidRequest):
    """Client keys are configured and this caller showed none of them."""

    code = "invalid_api_key"


class Forbidden(InvalidRequest):
    """This peer may not use this socket."""

    code = "peer_not_allowed"


class SlowBody(InvalidRequest):
    """The body did not arrive in time."""

    code = "body_timeout"


# --- ours ---


class Overloaded(EmbeddingError):
    """As much is inside as the settings allow."""

    code = "overloaded"
    can_retry = True


class WouldBeLate(Overloaded):
    """What waits ahead of this request takes longer than its deadline allows; so it is told now, not then."""

    code = "would_be_late"


class QueueTimeout(Overloaded):
    """The deadline came while the request still waited in our own queue: nobody upstream has seen it."""

    code = "queue_timeout"


class NoUpstream(EmbeddingError):
    """No upstream of the model has shown that it can serve it."""

    fault = Fault.UPSTREAM
    code = "no_upstream"
    can_retry = True


class DeadlineExceeded(EmbeddingError):
    """The caller's patience ended before the vectors were there."""

    code = "deadline_exceeded"
    can_retry = True


# --- the upstream's ---


class CircuitOpen(EmbeddingError):
    """The upstream failed again and again; it is left alone for a while."""

    fault = Fault.UPSTREAM
    code = "circuit_open"
    can_retry = True


class RateLimited(EmbeddingError):
    """The upstream says: too many, later."""

    fault = Fault.UPSTREAM
    code = "rate_limit_exceeded"
    can_retry = True


class UpstreamTimeout(EmbeddingError):
    """The upstream took longer than one attempt may."""

    fault = Fault.UPSTREAM
    code = "upstream_timeout"
    can_retry = True


class UpstreamFailed(EmbeddingError):
    """The upstream could not be reached, broke off, or answered with an error of its own."""

    fault = Fault.UPSTREAM
    code = "upstream_failed"
    can_retry = True

    def __init__(self, message: str, *, may_be_poison: bool = False, **options: Any) -> None:
        super().__init__(message, **options)
        self.may_be_poison = may_be_poison


class UpstreamDenied(EmbeddingError):
    """The upstream does not accept our key or our account; no caller can mend that."""

    fault = Fault.UPSTREAM
    code = "upstream_denied"


class BadVectors(EmbeddingError):
    """The upstream's answer did not pass the gate: wrong count, order, width, or numbers that are none."""

    fault = Fault.UPSTREAM
    code = "bad_vectors"
    can_retry = True

    def __init__(self, message: str, *, index: int | None = None, **options: Any) -> None:
        super().__init__(message, **options)
        self.index = index
        self.may_be_poison = index is not None  # else the whole answer is wrong


class UpstreamRefused(EmbeddingError):
    """The upstream found the request itself wrong, and said so with a 4xx of its own."""

    fault = Fault.CALLER
    code = "upstream_refused"

    def __init__(
        self, message: str, *, status: int, code: str | None = None, param: str | None = None, index: int | None = None
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.status = status
        self.index = index
        """Position of the culprit in its batch, where the upstream tells."""

    @property
    def label(self) -> str:
        """Always ours: `code` may be any word that the upstream has said."""
        return type(self).code
