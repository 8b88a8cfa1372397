"""
Which failures point to one input of a batch, and which inputs travel alone for a while.

Upstreams refuse a batch for one input of it, and most do not say which; some fail in the middle of computing it. Such
a batch is cut in two until the culprit stands alone (`part.halves`), and only its request sees the error. An input
that was found guilty is remembered, by its key, so that the same text does not spoil a batch each time it is sent.

Pure: nothing waits in here.
"""

from __future__ import annotations

from collections import OrderedDict

from proxy.base.errors import BadVectors, EmbeddingError, UpstreamRefused

_MOST_KEYS = 10_000
"""Remembered at a time, about 2 MB; the oldest goes."""

_OF_ONE_INPUT = frozenset({400, 413, 422})
"""Refusals that may be about one input. 404 and 405 are about the model or the address: the same for all."""


def is_of_one(error: EmbeddingError) -> bool:
    """Whether a batch may have failed for the sake of one of its inputs."""
    if isinstance(error, UpstreamRefused):
        is_about_input = error.param is None or error.param.startswith(("input", "$"))
        return error.status in _OF_ONE_INPUT and (is_about_input or error.index is not None)
    return error.may_be_poison


def is_refusal(error: EmbeddingError) -> bool:
    """Whether the upstream has answered well enough; then looking for the culprit is no retry of a failing one."""
    return isinstance(error, UpstreamRefused | BadVectors)


class Quarantine:
    """Keys of inputs that travel alone."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def add(self, key: bytes, now: float) -> None:
        if not self._seconds:
            return
        self._expire(now)
        self._until[key] = now + self._seconds
        self._until.move_to_end(key)
        if len(self._until) > _MOST_KEYS:
            self._until.popitem(last=False)

    def holds(self, key: bytes, now: float) -> bool:
        self._expire(now)
        return key in self._until

    def _expire(self, now: float) -> None:
        """Let go whose time is over: all have the same time, so the oldest stands first."""
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
