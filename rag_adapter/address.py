"""
Where the sidecar listens, found by the same rule as the proxy's own: environment, then the user's runtime folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping


def socket_path(environ: Mapping[str, str] | None = None) -> str:
    """
    Return the path of the sidecar's Unix socket.

    The cases: (1) `$EMBEDDING_SIDECAR_SOCKET`; (2) `$XDG_RUNTIME_DIR/embedding-sidecar.sock`; (3)
    `/tmp/embedding-sidecar-<uid>/embedding-sidecar.sock`.

    Args:
        environ: the environment; None means this process's.
    """
    environ = os.environ if environ is None else environ
    if path := environ.get("EMBEDDING_SIDECAR_SOCKET"):
        return path
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return f"{runtime}/embedding-sidecar.sock"
    return f"/tmp/embedding-sidecar-{os.getuid()}/embedding-sidecar.sock"  # noqa: S108 - the proxy insists on owning it
