"""
The right to start a proxy: of several workers of an app, one has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

from rag_adapter import fork
from rag_adapter.errors import SidecarUnavailable


class Lock:
    """An exclusive lock on a file that stays; the kernel lets go of it when its holder dies, however that comes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd: int | None = None
        # A fork gets a copy of the descriptor, and with it a share in the lock: it would hold it beyond our death.
        fork.in_child(self.release)

    def take(self) -> bool:
        """
        Take it, if nobody has it; returns whether it is ours now.

        Raises:
            SidecarUnavailable: the folder is not there or not ours to write to.
        """
        if self._fd is not None:
            return True
        folder = os.path.dirname(self._path) or "."
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)  # the proxy insists on such a folder where it makes one itself
            # Not through a link: the default folder lies below /tmp, where somebody else may have been first.
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SidecarUnavailable(
                f"cannot make {self._path}: {error.strerror}; the folder {folder} has to be writable for "
                f"uid {os.getuid()}, or set EMBEDDING_SIDECAR_SOCKET to another place",
                code="sidecar_not_started",
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def release(self) -> None:
        """Let go of it, if it is ours."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
