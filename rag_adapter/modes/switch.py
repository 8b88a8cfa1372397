"""
Which mode is it now? Read at each call, for 3 µs.

The first word of the file that `$EMBEDDING_MODE_FILE` names, where it is there; else `$EMBEDDING_MODE`; else
`sidecar`. The file is for switching a running app, whose environment nobody can change from outside: write a word into
it, or remove it.
"""

from __future__ import annotations

import enum
import logging
import os
from collections.abc import Mapping

from rag_adapter.errors import EmbeddingFailed

LOGGER = logging.getLogger("rag_adapter.modes")

_WORD_BYTES = 64


class Mode(enum.StrEnum):
    """The way a text takes."""

    SIDECAR = "sidecar"
    DIRECT = "direct"
    SHADOW = "shadow"


class ModeSwitch:
    """
    Tells the mode of now.

    A word that is no mode is refused at the first call. Later it changes nothing and is logged: a slip of the pen in
    the file must not take a running app down.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        """
        Args:
            environ: where the variables are; None: this process's environment, as it is at each call.
        """
        self._environ = os.environ if environ is None else environ
        self._seen: tuple[int, int, int] | None = None
        self._written = ""
        self._mode: Mode | None = None
        self._refused = ""

    def now(self) -> Mode:
        """
        Return the mode.

        Raises:
            EmbeddingFailed: the first word ever read is no mode.
        """
        path = self._environ.get("EMBEDDING_MODE_FILE")
        word = (path and self._read(path)) or self._environ.get("EMBEDDING_MODE") or Mode.SIDECAR
        if word != self._mode and word != self._refused:
            self._move(word)
        return self._mode or Mode.SIDECAR

    def _read(self, path: str) -> str:
        """Return the first word of the file, empty without one; opened again only when it has changed."""
        try:
            found = os.stat(path)
            seen = (found.st_mtime_ns, found.st_ino, found.st_size)
            if seen != self._seen:
                with open(path, "rb") as file:
                    self._written = file.read(_WORD_BYTES).decode(errors="replace").strip().lower()
                self._seen = seen
        except FileNotFoundError:
            self._seen, self._written = None, ""
        except OSError as error:
            self._seen, self._written = None, f"{path}: {error.strerror}"
        return self._written

    def _move(self, word: str) -> None:
        try:
            mode = Mode(word.strip().lower())
        except ValueError:
            message = f"the embedding mode is {word!r}; it may be sidecar, direct or shadow"
            if self._mode is None:
                raise EmbeddingFailed(message, code="invalid_mode") from None
            self._refused = word
            LOGGER.error("%s: it stays %s", message, self._mode)
            return
        if self._mode not in (None, mode):
            LOGGER.warning("the embedding mode was %s, and is %s from now on", self._mode, mode)
        self._mode, self._refused = mode, ""
