"""One trace leads from the caller through the service, the adapter and the proxy to the upstream."""

from __future__ import annotations

import secrets

from tests.example.service import Service
from tests.fakes.upstream import FakeUpstream, Fault


def traced() -> tuple[str, dict[str, str]]:
    """Return a trace id of a caller's, and the header that carries it."""
    trace_id = secrets.token_hex(16)
    return trace_id, {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}


def arrived(upstream: FakeUpstream) -> tuple[str, str]:
    """Return trace id and parent span of what the upstream saw last."""
    headers = {name.lower(): value for name, value in upstream.seen[-1].headers.items()}
    _, trace_id, span_id, _ = headers["traceparent"].split("-")
    return trace_id, span_id


async def test_search_arrives_upstream_in_its_callers_trace(service: Service, upstream: FakeUpstream) -> None:
    """The same trace id; the span is that of the service, not its caller's."""
    trace_id, headers = traced()

    await service.search("otters", headers=headers)

    seen_id, span_id = arrived(upstream)
    assert seen_id == trace_id
    assert span_id not in headers["traceparent"]


async def test_ingestion_arrives_upstream_in_its_callers_trace(service: Service, upstream: FakeUpstream) -> None:
    """The same for documents."""
    trace_id, headers = traced()

    await service.take_in(headers, birds="Ravens remember faces.")

    assert arrived(upstream)[0] == trace_id


async def test_caller_without_a_trace_gets_one(service: Service, upstream: FakeUpstream) -> None:
    """The service begins one, and two requests have two."""
    await service.search("otters one")
    first = arrived(upstream)[0]
    await service.search("otters two")

    assert int(first, 16)
    assert arrived(upstream)[0] != first


async def test_error_names_the_trace(service: Service, upstream: FakeUpstream) -> None:
    """Who reports an error gives the id by which all of its way can be found."""
    trace_id, headers = traced()
    upstream.always = Fault(status=500)

    answer = await service.search("otters", headers=headers)

    assert answer.error["trace_id"] == trace_id
    assert arrived(upstream)[0] == trace_id
