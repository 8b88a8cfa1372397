"""The arguments of a client: checked together, completed by the environment."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest

from rag_adapter.blocking import SyncEmbeddingClient
from rag_adapter.client import EmbeddingClient
from rag_adapter.errors import InvalidInput
from rag_adapter.settings import client_settings, deadline_of


def test_everything_that_is_wrong_at_once() -> None:
    """Whoever writes settings wants to hear all of it, not the first."""
    wrong: dict[str, Any] = {
        "model": "",
        "timeout_s": 0,
        "bulk_timeout_s": math.inf,
        "client_name": "my app",
        "api_key": "two\r\nlines",
        "max_connections": 0,
        "request_texts": 2049,
        "concurrency": 1.5,
    }

    with pytest.raises(ValueError, match="model has to be") as caught:
        client_settings("nowhere", **wrong, environ={})

    message = str(caught.value)
    assert [name for name in wrong if name not in message] == []
    assert "an address" in message or "it may be" in message
    assert "lines" not in message


@pytest.mark.parametrize("name", ["max_connections", "request_texts", "concurrency"])
def test_counts_at_their_bounds(name: str) -> None:
    """One is enough; the largest is taken, one more is not; true is no count."""
    most = 2048 if name == "request_texts" else 1024

    for count in (1, most):
        assert getattr(client_settings("/s", **{name: count}, environ={}), name) == count
    for count in (0, most + 1, True):
        with pytest.raises(ValueError, match=f"{name} is {count}"):
            client_settings("/s", **{name: count}, environ={})


def test_key_from_the_environment() -> None:
    """A key that the app gives is stronger; none appears in a repr."""
    environ = {"EMBEDDING_SIDECAR_API_KEY": "sk-environment"}

    by_environment = client_settings("/s", environ=environ)
    by_app = client_settings("/s", api_key="sk-app", environ=environ)

    assert (by_environment.api_key, by_app.api_key) == ("sk-environment", "sk-app")
    assert "sk-" not in repr(by_environment)
    assert client_settings("/s", environ={"EMBEDDING_SIDECAR_API_KEY": ""}).api_key is None


@pytest.mark.parametrize(("connections", "concurrency", "bulk"), [(1, 4, 1), (2, 4, 1), (8, 4, 4), (4, 4, 3)])
def test_one_connection_is_left_for_queries(connections: int, concurrency: int, bulk: int) -> None:
    """Bulk has its concurrency, but never all connections where there are several."""
    settings = client_settings("/s", max_connections=connections, concurrency=concurrency, environ={})

    assert settings.bulk_connections == bulk


def test_call_s_wish_before_client_s() -> None:
    """Model, dimensions and priority: the call's, else the client's, else the usual."""
    plain = client_settings("/s", environ={})
    settings = client_settings("/s", model="m", dimensions=8, priority="bulk", environ={})

    assert plain.spec(None, None, None, usual="interactive") == (None, None, "interactive")
    assert settings.spec(None, None, None, usual="interactive") == ("m", 8, "bulk")
    assert settings.spec("n", 4, "interactive", usual="bulk") == ("n", 4, "interactive")


@pytest.mark.parametrize(("model", "dimensions", "priority"), [("", None, None), (None, 0, None), (None, None, "now")])
def test_wish_that_makes_no_sense(model: Any, dimensions: Any, priority: Any) -> None:
    """A ValueError of ours, before anything is sent."""
    with pytest.raises(InvalidInput) as caught:
        client_settings("/s", environ={}).spec(model, dimensions, priority, usual="bulk")

    assert caught.value.code == "invalid_argument"


@pytest.mark.parametrize(
    ("timeout_s", "deadline", "expected"),
    [(None, None, 110.0), (2.0, None, 102.0), (None, 101.0, 101.0), (2.0, 101.0, 101.0), (2.0, 105.0, 102.0)],
)
def test_earlier_one_counts(timeout_s: float | None, deadline: float | None, expected: float) -> None:
    """A timeout and a deadline together: the earlier; neither: the usual time."""
    assert deadline_of(100.0, timeout_s, deadline, usual_s=10.0) == expected


@pytest.mark.parametrize("timeout_s", [0, -1.0, math.nan, math.inf, "1", True])
def test_timeout_that_is_none(timeout_s: Any) -> None:
    """Nobody waits forever, or not at all."""
    with pytest.raises(InvalidInput):
        deadline_of(100.0, timeout_s, None, usual_s=10.0)


def test_longest_patience() -> None:
    """Eleven days; more is no timeout, a deadline is cut at that, and infinity is no instant."""
    assert deadline_of(0.0, 1_000_000, None, usual_s=10.0) == 1_000_000
    assert deadline_of(0.0, None, 1e12, usual_s=10.0) == 1_000_000
    for timeout_s, deadline in ((1_000_001, None), (None, math.inf), (None, math.nan)):
        with pytest.raises(InvalidInput):
            deadline_of(0.0, timeout_s, deadline, usual_s=10.0)


def test_arguments_are_documented() -> None:
    """docs/adapter.md lists each argument of a client, and both clients take the same with the same defaults."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "adapter.md").read_text(encoding="utf-8")
    table = page.partition("## Settings of a client")[2].partition("A call may say")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    arguments = [inspect.signature(kind).parameters for kind in (EmbeddingClient, SyncEmbeddingClient, client_settings)]

    assert listed == list(arguments[0])
    assert [str(parameter) for parameter in arguments[0].values()] == [str(each) for each in arguments[1].values()]
    assert [name for name in arguments[2] if name != "environ"] == listed
