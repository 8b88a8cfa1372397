"""
The W3C trace context of what the app is doing right now, for the request's `traceparent`.

OpenTelemetry is looked up among the modules that are loaded, never imported: an app that traces has loaded it long
before its first embedding, and any other app should not pay for it.

Source: W3C Trace Context, §3.2 "traceparent header".
"""

from __future__ import annotations

import sys


def traceparent() -> str | None:
    """Return the context of the current span; None without OpenTelemetry, or outside of any span."""
    trace = sys.modules.get("opentelemetry.trace")
    # Another thread may be in the middle of importing it; then it has no such function yet.
    if trace is None or not hasattr(trace, "get_current_span"):
        return None
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
