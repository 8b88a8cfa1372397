"""
What a canary shows: whether an upstream's vectors are the model's.

Pure: nothing waits in here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from proxy.base.messages import FLOAT32_BYTES, Row

CANARIES = (
    "The quick brown fox jumps over the lazy dog.",
    "Zürich, 北京 und São Paulo: naïve café, 3,50 €",
    "def add(a, b):\n    return a + b  # 2 + 2 == 4",
)
"""Plain words, other scripts, code: what a tokenizer, a prefix or a normalisation that is not the model's treats in a
way of its own. Forty tokens, which cost nothing."""

CANARY_GRACE_S = 2.0
"""How long the canaries of later upstreams wait for that of an earlier one."""

LEAST_COSINE = 0.999
"""Batch size and float width move a vector by 1e-4 at the most; another model moves it by tenths."""


def flaw(rows: Sequence[Row], references: Sequence[Row] | None, width: int) -> str:
    """
    Say what is wrong with the canaries' vectors; empty when nothing is.

    Args:
        rows: the vectors that came, one for each of CANARIES.
        references: the first right ones, if there were any.
        width: what the settings say; 0 when they leave it open.
    """
    wanted = width or len((references or rows)[0]) // FLOAT32_BYTES
    for row in rows:
        if (found := len(row) // FLOAT32_BYTES) != wanted:
            return f"its vectors have {found} numbers, the model's have {wanted}"
    if references is not None:
        cosine = min(map(_cosine, rows, references))
        if cosine < LEAST_COSINE:
            return f"its vectors lie elsewhere: cosine {cosine:.4f} to the model's first canary, {LEAST_COSINE} is due"
    return ""


def _cosine(row: Row, reference: Row) -> float:
    # in double precision: squares of large float32 numbers leave float32
    ours, theirs = (numpy.frombuffer(one, "<f4").astype("f8") for one in (row, reference))
    return float(ours @ theirs / (numpy.linalg.norm(ours) * numpy.linalg.norm(theirs)))
