"""
Many texts: cut into requests, and their rows put together again, whichever comes back first.

Both clients share it; how requests travel is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rag_adapter import wire
from rag_adapter.errors import EmbeddingFailed

Progress = Callable[[int, int], None]
"""Is told how many texts are done, and of how many."""


class Job:
    """One `embed_many`."""

    def __init__(
        self,
        texts: list[str],
        *,
        request_texts: int,
        width: int | None,
        as_numpy: bool,
        on_progress: Progress | None,
    ) -> None:
        """
        Args:
            texts: looked at already.
            request_texts: most texts of one request.
            width: of the vectors, if the app has asked for one.
            as_numpy: rows are bytes of float32, and one array is made of them; else they are lists of floats.
            on_progress: who wants to know.
        """
        self.count = len(texts)
        self.as_numpy = as_numpy
        self.parts = _numbered(texts, request_texts)
        """Of each request: the position of its first text, and its texts, spelled when they are asked for."""
        self._width = width
        self._on_progress = on_progress
        self._done = 0
        self._space: str | None = None
        self._rows: Any = None if as_numpy else [None] * len(texts)

    def put(self, first: int, rows: list[Any], space: str | None) -> None:
        """
        Take the rows of one request.

        Args:
            first: position of its first text.
            rows: what came back.
            space: fingerprint of their vector space, as the sidecar gives it.

        Raises:
            EmbeddingFailed: they are of another space than those before: the sidecar was given another model meanwhile.
        """
        width = len(rows[0]) // 4 if self.as_numpy else len(rows[0])
        if self._done and (space, width) != (self._space, self._width):
            message = "the sidecar was given another model meanwhile: these vectors must not be mixed"
            raise EmbeddingFailed(message, code="space_changed")
        self._space, self._width = space, width
        self._rows = self._with(first, rows, width) if self.as_numpy else self._rows
        if not self.as_numpy:
            self._rows[first : first + len(rows)] = rows
        self._done += len(rows)
        if self._on_progress is not None:
            self._on_progress(self._done, self.count)

    def _with(self, first: int, rows: list[bytes], width: int) -> Any:
        """Put rows into the one array; joining all of them at the end would hold the loop for long."""
        import numpy

        whole = numpy.empty((self.count, width), numpy.float32) if self._rows is None else self._rows
        try:
            whole[first : first + len(rows)] = wire.numpy_rows(rows)
        except EmbeddingFailed as error:
            raise error.own(None if error.index is None else first + error.index) from None
        return whole

    def result(self) -> Any:
        """Return all rows."""
        if self._rows is None:
            import numpy

            return numpy.empty((0, self._width or 0), numpy.float32)
        return self._rows


def _numbered(texts: list[str], request_texts: int) -> Iterator[tuple[int, list[bytes]]]:
    first = 0
    for part in wire.parts((wire.spelled(text, index) for index, text in enumerate(texts)), request_texts):
        yield first, part
        first += len(part)
