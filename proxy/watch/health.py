"""
Is it alive, is it ready?

Alive: the event loop answers; nothing else, so that trouble upstream restarts nobody. Ready: every model has an
upstream that has given a right vector, and the process is not draining. The answer names what is missing, and how old
the last right vector of each upstream is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def readiness(
    *, is_draining: bool, problems: Mapping[str, str], models: Mapping[str, Any]
) -> tuple[bool, dict[str, Any]]:
    """
    Judge.

    Args:
        is_draining: whether the process is going away.
        problems: by model, why it cannot be served; empty where it can.
        models: snapshots of the models, to be shown.

    Returns:
        Whether the process is ready, and the body of the answer.
    """
    reasons = [f"model {name}: {problem}" for name, problem in problems.items() if problem]
    if is_draining:
        reasons.insert(0, "draining")
    is_ready = not reasons
    return is_ready, {"status": "ready" if is_ready else "not ready", "reasons": reasons, "models": models}
