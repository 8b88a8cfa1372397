"""
The embedded model: an upstream like any other, that ends the journey without a network.

WordLlama: static token embeddings of 256 dimensions, pooled; its weights come with the package. It is there so that
the first `curl` after the installation gets a real vector, and for tests; its vectors are good for trying out.
Computing happens in a thread of its own, in small portions: the event loop goes on.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import numpy

from proxy.base.clock import Clock
from proxy.base.errors import DeadlineExceeded, EmbeddingError, UpstreamRefused
from proxy.base.events import AttemptFinished, Observer
from proxy.base.messages import Answer, Batch, Row
from proxy.base.stage import Snapshot
from proxy.upstream.vectors import check_numbers

if TYPE_CHECKING:
    from wordllama import WordLlamaInference

MODEL = "wordllama"
WIDTH = 256
WIDTHS = (64, 128, 256)
"""Widths that it was trained for (matryoshka); the shorter ones are cut and normalised again."""

MAX_INPUT_BYTES = 32_768
"""A text of that size takes 10 to 20 ms, during which no other text is computed."""

_PORTION_BYTES = 8192
"""Texts computed at a time. The library pads them all to the longest: a portion's memory is at most this many tokens
of 1 kB each, and Python's other threads wait a few milliseconds at the most."""


class Builtin:
    """Runs the embedded model in one thread."""

    def __init__(self, name: str, *, clock: Clock, observe: Observer) -> None:
        self._name = name
        self._clock = clock
        self._observe = observe
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="builtin-model")
        self._model: WordLlamaInference | None = None

    async def __call__(self, batch: Batch) -> Answer:
        """
        Raises:
            DeadlineExceeded: no time was left.
            UpstreamRefused: an input has nothing that the model knows.
        """
        start = self._clock.now()
        code = "ignored"
        try:
            if start >= batch.deadline:
                raise DeadlineExceeded("no time was left to ask the embedded model")
            rows, tokens = await asyncio.get_running_loop().run_in_executor(self._thread, self._embedded, batch)
            code = ""
        except EmbeddingError as error:
            code = error.label
            raise
        finally:
            seconds = self._clock.now() - start
            self._observe(AttemptFinished(self._name, code, seconds, len(batch.inputs)))
        return Answer(rows, tokens, self._name, upstream_s=seconds)

    def _embedded(self, batch: Batch) -> tuple[tuple[Row, ...], int]:
        """Compute a batch; runs in the thread, the only one that touches the model."""
        model = self._model = self._model or _loaded()
        texts = cast(tuple[str, ...], batch.inputs)
        width = batch.spec.dimensions or WIDTH
        rows: list[Row] = []
        for first, last in _portions(texts):
            with numpy.errstate(invalid="ignore"):  # a text without tokens gives 0/0; told below
                matrix = numpy.asarray(model.embed(list(texts[first:last])), dtype="<f4")[:, :width]
                matrix = matrix / numpy.linalg.norm(matrix, axis=1, keepdims=True)
            unknown = numpy.flatnonzero(~numpy.isfinite(matrix).all(axis=1))
            if unknown.size:
                raise UpstreamRefused(
                    "an input has nothing in it that the embedded model knows",
                    status=400,
                    code="nothing_to_embed",
                    index=first + int(unknown[0]),
                )
            check_numbers(matrix)
            rows.extend(row.tobytes() for row in matrix)
        tokens = sum(len(encoding.ids) for encoding in model.tokenizer.encode_batch(list(texts)))
        return tuple(rows), tokens

    def snapshot(self) -> Snapshot:
        return {"is_loaded": self._model is not None}

    async def aclose(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _portions(texts: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Cut the texts so that count × longest stays within a portion; a longer text goes alone."""
    first = longest = 0
    for index, text in enumerate(texts):
        size = len(text.encode())
        if index > first and (index - first + 1) * max(longest, size) > _PORTION_BYTES:
            yield first, index
            first, longest = index, 0
        longest = max(longest, size)
    yield first, len(texts)


@functools.cache
def _loaded() -> WordLlamaInference:
    """Load the weights that lie in the package, once per process; nothing is fetched."""
    import wordllama

    folder = os.path.dirname(wordllama.__file__)
    return wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
