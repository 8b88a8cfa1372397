"""One small tree that is Python's own kinds of error, too."""

from __future__ import annotations

import ast
import pickle
import re
from pathlib import Path

import pytest

from rag_adapter.errors import (
    DeadlineExceeded,
    EmbeddingError,
    EmbeddingFailed,
    InvalidInput,
    SidecarUnavailable,
    Unavailable,
)

KINDS = {
    InvalidInput: ValueError,
    DeadlineExceeded: TimeoutError,
    SidecarUnavailable: ConnectionError,
    Unavailable: RuntimeError,
    EmbeddingFailed: RuntimeError,
}


@pytest.mark.parametrize(("ours", "python_s"), KINDS.items())
def test_error_is_a_kind_of_python_s(ours: type[EmbeddingError], python_s: type[Exception]) -> None:
    """Code that has never heard of us catches it, and reads its message."""
    error = ours("what is wrong")

    assert isinstance(error, python_s)
    assert str(error) == error.message == "what is wrong"


@pytest.mark.parametrize("kind", KINDS)
def test_error_crosses_processes(kind: type[EmbeddingError]) -> None:
    """A worker pool pickles what its workers raise."""
    error = kind("m", code="c", retryable=True, retry_after_s=2.5, request_id="r", index=3, status=503)

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is kind
    assert vars(copy) == vars(error)
    assert copy.args == ("m",)


def test_own_copy_of_a_shared_error() -> None:
    """Each of several callers raises its own, with its own index and the same cause."""
    error = Unavailable("m", code="overloaded", retry_after_s=1.0, request_id="r", index=7, status=503)
    error.__cause__ = ValueError()

    own = error.own(2)

    assert own is not error
    assert vars(own) == {**vars(error), "index": 2}
    assert own.__cause__ is error.__cause__


def test_defaults_of_each_kind() -> None:
    """What nobody says otherwise: a code of its own, and whether asking again makes sense."""
    found = {kind: (kind("m").code, kind("m").retryable) for kind in KINDS}

    assert found == {
        InvalidInput: ("invalid_input", False),
        DeadlineExceeded: ("deadline_exceeded", False),
        SidecarUnavailable: ("sidecar_unavailable", True),
        Unavailable: ("unavailable", True),
        EmbeddingFailed: ("embedding_failed", False),
    }


# --- codes ---

ROOT = Path(__file__).resolve().parents[2]
PIECES = ("address", "blocking", "client", "desk", "exchange", "many", "reach", "settings", "sockets", "wire")
SAID_BY_CLASS = {"invalid_input", "deadline_exceeded"}
NEVER_BY_ITSELF = {"embedding_failed", "sidecar_unavailable", "unavailable"}
"""Of the classes; what the clients raise always says more, but for pages of others (429, 503) and texts."""


def codes_in_source() -> set[str]:
    """Every code that the clients spell: as `code=`, or as the first argument of `_unavailable()`."""
    codes = set()
    for piece in PIECES:
        for node in ast.walk(ast.parse((ROOT / "rag_adapter" / f"{piece}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                codes.add(node.value.value)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_unavailable":
                codes.add(ast.literal_eval(node.args[0]))
    return {code for code in codes if code is not None}


def test_every_code_is_documented() -> None:
    """docs/adapter.md knows each code that the clients give, with its class, and no other."""
    page = (ROOT / "docs" / "adapter.md").read_text(encoding="utf-8").partition("## Errors")[2]
    listed = dict(re.findall(r"^\| `([a-z_]+)` \| (\w+) \|", page, re.MULTILINE))

    assert set(listed) == codes_in_source() | SAID_BY_CLASS
    assert set(listed.values()) == {kind.__name__ for kind in KINDS}
    assert not NEVER_BY_ITSELF & set(listed)
