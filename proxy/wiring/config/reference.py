"""
Settings → text for people: as TOML tables, and as the Markdown reference that docs/configuration.md holds.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from proxy.base.settings import Settings
from proxy.wiring.config.reader import plain


def as_table(settings: Any) -> dict[str, Any]:
    """Return settings as plain tables, for TOML; secrets are hidden."""
    table: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            table[f.name] = as_table(value)
        elif f.metadata.get("secret"):
            table[f.name] = _hidden(value)
        elif isinstance(value, Mapping):
            table[f.name] = {name: as_table(inner) for name, inner in value.items()}
        else:
            table[f.name] = list(value) if isinstance(value, tuple) else value
    return table


def _hidden(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict.fromkeys(value, "(hidden)")
    return re.sub(r"//.*@", "//(hidden)@", value) if "://" in value else "(hidden)" if value else ""


def reference() -> str:
    """Describe every setting as Markdown."""
    return "\n".join(_sections(Settings, "")).strip() + "\n"


def _sections(cls: Any, path: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    rows, inner = [], []
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        where = f"{path}.{f.name}".lstrip(".")
        arguments = typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            inner.append((kind, where))
        elif len(arguments) == 2 and dataclasses.is_dataclass(arguments[1]):
            inner.append((arguments[1], f"{where}.<name>"))
        else:
            rows.append(_row(f))
    if rows:
        yield f"## `[{path}]`\n\n{(cls.__doc__ or '').strip()}\n"
        yield "| setting | default | unit | meaning | reload |\n| --- | --- | --- | --- | --- |"
        yield from rows
        yield ""
    for kind, where in inner:
        yield from _sections(kind, where)


def _row(f: dataclasses.Field[Any]) -> str:
    meta = f.metadata
    default: Any = {} if f.default is dataclasses.MISSING else f.default
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, str):
        default = f'"{default}"'
    elif isinstance(default, tuple):
        default = list(default)
    bounds = f" {plain(meta['low'])} to {plain(meta['high'])}." if meta["low"] is not None else ""
    unnamed = any(f"`{choice}`" not in meta["doc"] for choice in meta["choices"])
    choices = f" One of {', '.join(f'`{choice}`' for choice in meta['choices'])}." if unnamed else ""
    why = f" *Why: {meta['why']}.*" if meta["why"] else ""
    text = f"{meta['doc']}{choices}{bounds}{why}".replace("|", "\\|")
    return f"| `{f.name}` | `{default}` | {meta['unit']} | {text} | {'yes' if meta['reload'] else 'restart'} |"
