"""Importing the package costs next to nothing; each name loads what it needs when it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rag_adapter

HEAVY = {"aiohttp", "asyncio", "numpy", "ssl", "langchain_core", "llama_index", "haystack", "chromadb", "opentelemetry"}


def loaded(code: str) -> set[str]:
    """Run something in a fresh Python; returns the top-level modules that it has loaded."""
    script = f"import sys; {code}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30)
    return set(done.stdout.split())


def test_import_loads_nothing_heavy() -> None:
    """Neither aiohttp nor numpy nor a framework; not even asyncio, which aiohttp would need."""
    assert loaded("import rag_adapter") & HEAVY == set()
    assert loaded("from rag_adapter import socket_path, InvalidInput") & HEAVY == set()


def test_async_client_loads_aiohttp_and_no_more() -> None:
    """numpy comes with the first array that is asked for, OpenTelemetry with the app."""
    found = loaded("from rag_adapter import EmbeddingClient")

    assert found & {"numpy", "opentelemetry", "langchain_core", "llama_index", "haystack", "chromadb"} == set()
    assert "aiohttp" in found


@pytest.mark.parametrize("name", rag_adapter.__all__)
def test_each_name_is_there(name: str) -> None:
    """What `__all__` promises can be imported, is shown by `dir()`, and is the same object each time."""
    assert getattr(rag_adapter, name) is getattr(rag_adapter, name)
    assert name in dir(rag_adapter)


def test_type_checkers_see_the_same_names() -> None:
    """The imports for them name what the table of homes names."""
    tree = ast.parse(Path(rag_adapter.__file__).read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rag_adapter.")
        for alias in node.names
    }

    assert typed == {name: f"rag_adapter.{home}" for name, home in rag_adapter._HOMES.items()}


def test_name_that_is_not_there() -> None:
    """As for any module."""
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rag_adapter.nothing  # noqa: B018
    with pytest.raises(ImportError):
        from rag_adapter import nothing  # noqa: F401
