"""
What can go wrong, one class per thing that an app handles differently.

The classes are kinds of Python's own as well: bad input is a ValueError, a deadline a TimeoutError, no sidecar a
ConnectionError; so code that never heard of us catches them rightly. `code` is stable and for machines; the message is
for people, says what to do, and never holds a text or a key.
"""

from __future__ import annotations

from typing import Self


class EmbeddingError(Exception):
    """Anything that keeps a text from its vector."""

    code: str = "embedding_failed"
    """A stable word; docs/errors.md lists the sidecar's, docs/adapter.md the adapter's own."""
    retryable: bool = False
    """Whether asking again later makes sense. False also where the sidecar has tried again already."""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retryable: bool | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
        index: int | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = type(self).code if code is None else code
        self.retryable = type(self).retryable if retryable is None else retryable
        self.retry_after_s = retry_after_s
        """How long to wait before asking again, where the sidecar says it."""
        self.request_id = request_id
        """The id under which the sidecar's log knows the request."""
        self.index = index
        """Position of the text that is to blame, in the list as the app gave it."""
        self.status = status
        """The HTTP status of the answer; None when there was none."""

    def own(self, index: int | None = None) -> Self:
        """Return one like it: each of several callers raises its own, with its own traceback and index."""
        copy = type(self)(
            self.message,
            code=self.code,
            retryable=self.retryable,
            retry_after_s=self.retry_after_s,
            request_id=self.request_id,
            index=index,
            status=self.status,
        )
        copy.__cause__ = self.__cause__
        return copy


class InvalidInput(EmbeddingError, ValueError):
    """The text or the wish makes no sense; it fails the same way each time."""

    code = "invalid_input"


class DeadlineExceeded(EmbeddingError, TimeoutError):
    """The caller's patience ended before the vectors were there."""

    code = "deadline_exceeded"


class SidecarUnavailable(EmbeddingError, ConnectionError):
    """No answer from the sidecar: no socket, no rights, nobody there, or cut off."""

    code = "sidecar_unavailable"
    retryable = True


class Unavailable(EmbeddingError, RuntimeError):
    """The sidecar answered that it cannot do it at present."""

    code = "unavailable"
    retryable = True


class EmbeddingFailed(EmbeddingError, RuntimeError):
    """The sidecar or the upstream failed, refused, or answered with something that is no vectors."""
