"""
Facts → lines: one per request, one per change of state.

JSON for machines, a readable form for a terminal. No text, vector or key is in any fact, so none can get here.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

import orjson

from proxy.base import events
from proxy.base.settings import LogSettings

_LOGGER = logging.getLogger("embedding_sidecar")
_HEALTH = frozenset({"/livez", "/readyz", "/metrics", "/status", "/openapi.json"})


class Json(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0]:
            fields["error"] = record.exc_info[0].__name__
        return orjson.dumps(fields, default=str).decode()


class Console(logging.Formatter):
    """Time, level, event, and the fields as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]
        fields = "".join(f" {key}={_one_line(value)}" for key, value in getattr(record, "fields", {}).items())
        return f"{time} {record.levelname[0]} {record.getMessage()}{fields}"


def _one_line(value: Any) -> str:
    """Spell a value so that it cannot begin a line of its own."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def configure(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Send all logging of the process to one stream; called again at each reload."""
    stream = stream or sys.stderr
    is_json = settings.format == "json" or (settings.format == "auto" and not stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Json() if is_json else Console())
    root = logging.getLogger()
    # A root that has a handler keeps libraries from installing theirs (wordllama calls basicConfig).
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    _LOGGER.setLevel(settings.level.upper())
    # It would tell each attempt, with our own arguments.
    logging.getLogger("embedding_sidecar.attempt").setLevel(logging.WARNING)


def write(level: int, event: str, **fields: Any) -> None:
    """Write one line."""
    if _LOGGER.isEnabledFor(level):
        _LOGGER.log(level, event, extra={"fields": fields})


def loop_trouble(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle what asyncio found lying about. Its own handler spells exceptions out, and with them perhaps texts."""
    error = context.get("exception")
    write(logging.ERROR, "asyncio", message=context.get("message"), error=type(error).__name__ if error else None)


class Log:
    """An observer that writes."""

    def __init__(self) -> None:
        self._lines: dict[type, Callable[[Any], None]] = {
            events.RequestFinished: _request_finished,
            events.BreakerMoved: _breaker_moved,
            events.CanaryFinished: _canary_finished,
            events.ListenersOpened: lambda e: write(logging.INFO, "listening", listeners=list(e.listeners)),
            events.LifecycleMoved: lambda e: write(logging.INFO, e.state, **({"detail": e.detail} if e.detail else {})),
            events.ReloadFinished: _reload_finished,
        }

    def __call__(self, event: events.Event) -> None:
        if line := self._lines.get(type(event)):
            line(event)


def _request_finished(e: events.RequestFinished) -> None:
    level = logging.DEBUG if e.path in _HEALTH else logging.ERROR if e.status == 500 else logging.INFO
    if not _LOGGER.isEnabledFor(level):
        return
    fields: dict[str, Any] = {"request_id": e.request_id, "status": e.status, "ms": round(e.total_s * 1e3, 2)}
    optional = {
        "code": e.code,
        "message": e.message,
        "method": e.method,
        "path": e.path,
        "listener": e.listener,
        "caller": e.caller,
        "model": e.model,
        "priority": e.priority,
        "inputs": e.inputs,
        "cached": e.hits,
        "tokens": e.tokens,
        "upstream": e.upstream,
        "attempts": e.attempts,
        "queue_ms": round(e.queue_s * 1e3, 2),
        "upstream_ms": round(e.upstream_s * 1e3, 2),
        "trace_id": e.trace_id,
    }
    fields.update((key, value) for key, value in optional.items() if value)
    write(level, "request", **fields)


def _breaker_moved(e: events.BreakerMoved) -> None:
    level = logging.WARNING if e.new == "open" else logging.INFO
    write(level, "breaker", upstream=e.upstream, state=e.new, was=e.old)


def _canary_finished(e: events.CanaryFinished) -> None:
    level = logging.DEBUG if not e.changed else logging.WARNING if e.problem else logging.INFO
    fields = {"model": e.model, "upstream": e.upstream, "ms": round(e.seconds * 1e3, 2)}
    write(level, "canary", **fields, **({"problem": e.problem} if e.problem else {"result": "right"}))


def _reload_finished(e: events.ReloadFinished) -> None:
    if e.problem:
        write(logging.ERROR, "reload refused, nothing changed", problem=e.problem)
    else:
        write(logging.INFO, "reloaded")
    if e.needs_restart:
        write(logging.WARNING, "changed in the file, but takes a restart", keys=", ".join(e.needs_restart))
