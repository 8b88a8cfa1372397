"""
Plain tables → settings classes.

Each value is checked against the field that declares it. A mistake is noted with key, value and what would be right,
and the default stands in, so that one look finds them all. What could be a secret in the wrong place is not quoted.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from proxy.base.settings import shown

WORDS: Mapping[type, tuple[str, str]] = {
    str: ("a text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "trues and falses"),
}


class Problems:
    """Mistakes, each at a key; one that came from a variable names the variable."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._keys: list[str] = []
        self.variables: dict[str, str] = {}
        """By key, the variable that has set it."""

    def has_told(self, problem: str) -> bool:
        """Whether something has been noted at the key of another problem, or above it."""
        key = re.split(r" = |: ", problem, maxsplit=1)[0]
        return any(key == noted or key.startswith(f"{noted}.") for noted in self._keys)

    def note(self, key: str, problem: str, value: Any = None) -> None:
        """Note a mistake at a key; a value is shown, shortened."""
        self._keys.append(key)
        source = f"${self.variables[key]}: " if key in self.variables else ""
        self.told.append(f"{source}{key}{f' = {spelled(value)}' if value is not None else ''}: {problem}")


def read(cls: Any, table: Any, path: str, problems: Problems) -> Any:
    """Make an instance of a settings class from a table."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(table, dict):
        problems.note(path, f"is a table, write [{path}]")
        return cls()
    values = {}
    for key, value in table.items():
        where = f"{path}.{quoted(key)}".lstrip(".")
        kind = hints.get(key)
        if key not in fields:
            problems.note(where, f"no such setting{meant(key, fields)}")
        elif dataclasses.is_dataclass(kind):
            values[key] = read(kind, value, where, problems)
        elif typing.get_origin(kind) is Mapping:
            values[key] = _read_mapping(typing.get_args(kind)[1], value, where, problems)
        else:
            problem, checked = _checked(kind, value, fields[key].metadata)
            if problem:
                # A list where a word belongs may be a secret that was put in brackets.
                is_odd = isinstance(value, list | dict) and typing.get_origin(kind) is not tuple
                problems.note(where, problem, None if is_odd or fields[key].metadata["secret"] else value)
            else:
                values[key] = checked
    return cls(**values)


def _read_mapping(kind: Any, value: Any, where: str, problems: Problems) -> dict[str, Any]:
    if not isinstance(value, dict):
        problems.note(where, f"is a table, write [{where}{'.<name>' if dataclasses.is_dataclass(kind) else ''}]")
        return {}
    if dataclasses.is_dataclass(kind):
        return {name: read(kind, inner, f"{where}.{quoted(name)}", problems) for name, inner in value.items()}
    for name, inner in value.items():
        if not isinstance(inner, str):
            problems.note(f"{where}.{quoted(name)}", "is not a text")
    return {name: inner for name, inner in value.items() if isinstance(inner, str)}


def _checked(kind: Any, value: Any, metadata: Mapping[str, Any]) -> tuple[str, Any]:
    """Check one value against its type and bounds: what is wrong, or nothing and the value."""
    if typing.get_origin(kind) is tuple:
        item_kind = typing.get_args(kind)[0]
        if not isinstance(value, list) or not all(type(item) is item_kind for item in value):
            return f"is not a list of {WORDS[item_kind][1]}", None
        return "", tuple(value)
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind:
        return f"is not {WORDS[kind][0]}", None
    if kind is str and not value.isprintable():
        return "holds a character that cannot be printed", None
    low, high, unit, choices = (metadata[name] for name in ("low", "high", "unit", "choices"))
    if low is not None and not low <= value <= high:
        return f"has to be from {plain(low)} to {plain(high)}{f' {unit}' if unit else ''}", None
    if choices and value not in choices:
        return f"may be {', '.join(choices)}{meant(value, choices)}", None
    return "", value


def from_text(kind: Any, value: str) -> Any:
    """
    Read a variable's value as the field takes it.

    Raises:
        ValueError: says what it is not.
    """
    if typing.get_origin(kind) is tuple:
        return [from_text(typing.get_args(kind)[0], item.strip()) for item in value.split(",") if item.strip()]
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError("may be true or false")
        return value.lower() == "true"
    if kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            raise ValueError(f"is not {WORDS[kind][0]}") from None
    return value


# --- words ---


def plain(number: float) -> str:
    """Spell a bound without an exponent."""
    return str(int(number)) if number == int(number) else f"{number:g}"


def meant(word: str, known: Iterable[str]) -> str:
    """Guess what was meant."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def quoted(key: str) -> str:
    """Spell a key as TOML does, on one line."""
    if re.fullmatch(r"[A-Za-z0-9_-]+", key):
        return key
    return f'"{"".join(c if c.isprintable() else "?" for c in key)}"'


def spelled(value: Any) -> str:
    """Show a value, shortened."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, bool):
        return str(value).lower()
    return shown(repr(value)).strip("'")
