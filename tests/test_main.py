"""The command itself."""

from __future__ import annotations

import sys

import pytest

from proxy.__main__ import main


def test_package_without_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where only the adapter is installed, the command says what else it takes."""
    monkeypatch.setitem(sys.modules, "proxy.wiring.cli", None)

    assert main() == 1
    assert "pip install 'embedding-sidecar[proxy]'" in capsys.readouterr().err


def test_command_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where everything is there, it is the command line."""
    monkeypatch.setattr(sys, "argv", ["embedding-sidecar", "show", "--reference"])

    assert main() == 0
    assert "## `[listen]`" in capsys.readouterr().out
