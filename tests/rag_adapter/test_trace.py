"""The app's trace goes along, if the app has one."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
from opentelemetry import trace as opentelemetry_trace
from opentelemetry.sdk.trace import TracerProvider

from rag_adapter.trace import traceparent


def test_current_span() -> None:
    """The header names the span that the app is in."""
    with TracerProvider().get_tracer("app").start_as_current_span("request") as span:
        found = traceparent()
        context = span.get_span_context()

    assert found == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    assert context.trace_flags.sampled


def test_outside_of_any_span() -> None:
    """There is nothing to pass on."""
    assert not opentelemetry_trace.get_current_span().get_span_context().is_valid
    assert traceparent() is None


def test_opentelemetry_that_is_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread is in the middle of it: the module is there, its functions are not yet."""
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", types.ModuleType("opentelemetry.trace"))

    assert traceparent() is None


def test_app_without_opentelemetry() -> None:
    """It is not imported for the sake of looking."""
    code = "import sys; from rag_adapter.trace import traceparent as t; print(t(), 'opentelemetry' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)

    assert done.stdout.split() == ["None", "False"]
