"""Ready or not, and why."""

from __future__ import annotations

from proxy.watch.health import readiness

MODELS = {"m": {"dimensions": 8, "upstreams": {}}}


def test_all_is_well() -> None:
    """With every model served the process is ready, and shows its models."""
    is_ready, body = readiness(is_draining=False, problems={"m": "", "n": ""}, models=MODELS)

    assert is_ready
    assert body == {"status": "ready", "reasons": [], "models": MODELS}


def test_one_model_cannot_be_served() -> None:
    """A single model without an upstream makes the process unready, and the answer says which and why."""
    is_ready, body = readiness(is_draining=False, problems={"m": "", "n": "a: no connection"}, models=MODELS)

    assert not is_ready
    assert body == {"status": "not ready", "reasons": ["model n: a: no connection"], "models": MODELS}


def test_draining() -> None:
    """A draining process is unready although all is well."""
    is_ready, body = readiness(is_draining=True, problems={"m": ""}, models=MODELS)

    assert not is_ready
    assert body["status"] == "not ready"
    assert body["reasons"] == ["draining"]


def test_draining_and_in_trouble() -> None:
    """All reasons are told, the drain first."""
    _, body = readiness(is_draining=True, problems={"m": "down", "n": "gone"}, models=MODELS)

    assert body["reasons"] == ["draining", "model m: down", "model n: gone"]
