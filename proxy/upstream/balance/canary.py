"""
What a canary shows: whether an upstream's vectors are the model's.

Pure: nothing waits in here.
"""

from __future__ import annotations

import numpy

from proxy.base.messages import FLOAT32_BYTES, Row

CANARY = "The quick brown fox jumps over the lazy dog."
"""A sentence that every tokenizer knows, short enough to cost nothing."""

CANARY_GRACE_S = 2.0
"""How long the canaries of later upstreams wait for that of an earlier one."""

LEAST_COSINE = 0.999
"""Batch size and float width move a vector by 1e-4 at the most; another model moves it by tenths."""


def flaw(canary: Row, reference: Row | None, width: int) -> str:
    """
    Say what is wrong with a canary's vector; empty when nothing is.

    Args:
        canary: the vector that came.
        reference: the first right one, if there was any.
        width: what the settings say; 0 when they leave it open.
    """
    found = len(canary) // FLOAT32_BYTES
    wanted = width or (len(reference) // FLOAT32_BYTES if reference else found)
    if found != wanted:
        return f"its vectors have {found} numbers, the model's have {wanted}"
    if reference is not None:
        # in double precision: squares of large float32 numbers leave float32
        ours, theirs = (numpy.frombuffer(row, "<f4").astype("f8") for row in (canary, reference))
        cosine = float(ours @ theirs / (numpy.linalg.norm(ours) * numpy.linalg.norm(theirs)))
        if cosine < LEAST_COSINE:
            return f"its vectors lie elsewhere: cosine {cosine:.4f} to the model's first canary, {LEAST_COSINE} is due"
    return ""
