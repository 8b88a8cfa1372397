"""
What makes two inputs the same.

A key is the digest of the vector space (its name, the width asked for, all further parameters) and of the exact bytes
of the text (or of the token ids). Each part has a fixed length or is preceded by it, so no two different inputs spell
the same bytes. Nothing is folded and nothing trimmed: "US" is not "us".
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterable

from proxy.base.messages import Input, Spec

KEY_BYTES = 24
"""192 bits: nobody finds two texts with one key, and a cache entry pays little for it."""


def keys(space: str, inputs: Iterable[Input]) -> tuple[bytes, ...]:
    """
    Give each input its key.

    Args:
        space: the vector space, as `fingerprint()` names it.
        inputs: texts or token ids.

    Returns:
        One digest of KEY_BYTES bytes per input, in order.
    """
    begun = hashlib.blake2b(space.encode(), digest_size=KEY_BYTES).copy
    digests = []
    for item in inputs:
        digest = begun()
        # The usual kind is spelled here: a call per input is a third of the whole.
        digest.update(b"s" + item.encode() if type(item) is str else input_bytes(item))
        digests.append(digest.digest())
    return tuple(digests)


def input_bytes(item: Input) -> bytes:
    """Spell an input unmistakably: a letter for its kind, then its bytes (or four bytes per token id)."""
    if isinstance(item, str):
        return b"s" + item.encode()
    return b"t" + struct.pack(f"<{len(item)}I", *item)


def fingerprint(space: str, spec: Spec) -> str:
    """
    Name the vector space of a spec in 16 hexadecimal digits.

    Args:
        space: what the settings call the space of the model.
        spec: how inputs are embedded in it: another width or another parameter is another space.
    """
    if spec.params == b"{}":
        return _fingerprint(space, spec.dimensions)
    return _digest(space, spec.dimensions, spec.params)


@functools.lru_cache(maxsize=1024)
def _fingerprint(space: str, dimensions: int | None) -> str:
    """The usual ones are remembered; callers' parameters are not, there is no end to them."""
    return _digest(space, dimensions, b"{}")


def _digest(space: str, dimensions: int | None, params: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in (space.encode(), str(dimensions).encode(), params):
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.hexdigest()
