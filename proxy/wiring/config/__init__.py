"""
File and environment → Settings, or every mistake at once.

One TOML file; over it the environment, `EMBEDDING_SIDECAR__LISTEN__TCP=…` for `listen.tcp` and so on. Nothing reads
the environment anywhere else. `reader` checks each value against the field that declares it, `checks` holds the
settings against each other, `reference` describes them for people; each mistake names the key, the value and what
would be right.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
import typing
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxy.base.settings import ModelSettings, Settings, UpstreamSettings
from proxy.upstream.builtin import MAX_INPUT_BYTES, MODEL, WIDTH, WIDTHS
from proxy.wiring.config.checks import OFF, contradictions, host_port, is_loopback, split_url
from proxy.wiring.config.profiles import base_url_of
from proxy.wiring.config.reader import Problems, from_text, quoted, read
from proxy.wiring.config.reference import as_table, reference

__all__ = [
    "OFF",
    "ConfigError",
    "Loaded",
    "as_table",
    "default_socket",
    "host_port",
    "is_loopback",
    "load",
    "needs_restart",
    "reference",
]

ENV_PREFIX = "EMBEDDING_SIDECAR"


class ConfigError(Exception):
    """Something is wrong with the settings; `problems` says all of it."""

    def __init__(self, source: str, problems: list[str]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {problem}" for problem in problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings that passed every check, and the secrets that belong to them."""

    settings: Settings
    api_keys: Mapping[str, str] = field(repr=False)
    """By upstream, where it has one."""


def load(path: str | None, environ: Mapping[str, str]) -> Loaded:
    """
    Read the settings.

    Args:
        path: a TOML file; None means `$EMBEDDING_SIDECAR_CONFIG`, and without that the defaults: the embedded model,
            and OpenAI's where `$OPENAI_API_KEY` is set.
        environ: the environment.

    Raises:
        ConfigError: with every mistake.
    """
    path = path or environ.get(f"{ENV_PREFIX}_CONFIG") or None
    problems = Problems()
    table = _parsed(path) if path else {}
    _overlay(table, environ, problems)
    settings = _with_defaults(read(Settings, table, "", problems), table, environ)
    api_keys = dict(_api_keys(settings, environ, problems))
    # What was misread stands at its default now: a second problem at the same place would be of our making.
    problems.told.extend([p for p in contradictions(settings, api_keys) if not problems.has_told(p)])
    if problems.told:
        raise ConfigError(path or "settings", problems.told)
    return Loaded(settings, api_keys)


def needs_restart(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Name the settings that differ and that a reload does not take."""
    for f in dataclasses.fields(old):
        before, after = getattr(old, f.name), getattr(new, f.name)
        where = f"{path}.{f.name}".lstrip(".")
        if dataclasses.is_dataclass(before):
            yield from needs_restart(before, after, where)
        elif before != after and f.metadata.get("reload") is False:
            yield where


# --- file and environment ---


def _parsed(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(path, [f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(path, [f"is not UTF-8: byte {error.start}"]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(path, [f"is not valid TOML: {error}"]) from error


def _overlay(table: dict[str, Any], environ: Mapping[str, str], problems: Problems) -> None:
    """Put `EMBEDDING_SIDECAR__A__B=value` over `a.b`. Two underscores each: Kubernetes makes up names with one."""
    if socket := environ.get(f"{ENV_PREFIX}_SOCKET"):
        listen = table.setdefault("listen", {})
        if isinstance(listen, dict):
            listen["socket"] = socket
    for name, value in sorted(environ.items()):
        if name.startswith(f"{ENV_PREFIX}__"):
            _put(table, name, value, problems)


def _put(table: dict[str, Any], name: str, value: str, problems: Problems) -> None:
    kind: Any = Settings
    at: Any = table
    path: list[str] = []
    *words, last = name.removeprefix(f"{ENV_PREFIX}__").lower().split("__")
    for word in words:
        key, kind = _step(kind, word, at)
        at = at.setdefault(key, {})
        path.append(quoted(key))
        if not isinstance(at, dict):
            return  # the reader tells that this has to be a table
    key, kind = _step(kind, last, at)
    where = ".".join([*path, quoted(key)])
    problems.variables[where] = name
    try:
        at[key] = from_text(kind, value)
    except ValueError as error:
        problems.note(where, str(error), value)


def _step(kind: Any, word: str, at: dict[str, Any]) -> tuple[str, Any]:
    """Find what a word of a variable's name stands for: a field, or a name in a table (`_` for any odd character)."""
    if dataclasses.is_dataclass(kind):
        return word, typing.get_type_hints(kind).get(word)
    inner = typing.get_args(kind)[1] if len(typing.get_args(kind)) == 2 else None
    spelled = {re.sub(r"[^a-z0-9]", "_", key.lower()): key for key in at}
    return spelled.get(word, word), inner


# --- defaults that depend on others ---


def _with_defaults(settings: Settings, table: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    upstreams, models = dict(settings.upstreams), dict(settings.models)
    if not upstreams and not models:
        upstreams["builtin"] = UpstreamSettings(kind="builtin")
        models[MODEL] = ModelSettings(upstreams=("builtin",))
        if environ.get("OPENAI_API_KEY"):
            upstreams["openai"] = UpstreamSettings(kind="openai", profile="openai", api_key_env="OPENAI_API_KEY")
            models.update(_openai_models())
    told = table.get("models")
    for name, model in models.items():
        if model.upstreams and all(u in upstreams and upstreams[u].kind == "builtin" for u in model.upstreams):
            models[name] = _builtin_model(model, told.get(name) if isinstance(told, dict) else None)
    for name, model in models.items():
        if not model.space and model.upstreams and model.upstreams[0] in upstreams:
            models[name] = dataclasses.replace(model, space=_space(name, model, upstreams[model.upstreams[0]]))
    for name, upstream in upstreams.items():
        if proxy := upstream.transport.http_proxy or _environment_proxy(upstream, environ):
            transport = dataclasses.replace(upstream.transport, http_proxy=proxy)
            upstreams[name] = dataclasses.replace(upstream, transport=transport)
    socket = settings.listen.socket or default_socket(environ)
    listen = dataclasses.replace(settings.listen, socket=socket)
    return dataclasses.replace(settings, listen=listen, upstreams=upstreams, models=models)


def default_socket(environ: Mapping[str, str]) -> str:
    """Say where the socket is when nobody says otherwise; `rag_adapter` looks there by the same rule."""
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return f"{runtime}/embedding-sidecar.sock"
    return f"/tmp/embedding-sidecar-{os.getuid()}/embedding-sidecar.sock"  # noqa: S108 - server.py insists on owning it


def _environment_proxy(upstream: UpstreamSettings, environ: Mapping[str, str]) -> str:
    """Return the proxy that `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY` mean for an upstream; never one for loopback."""
    parts = split_url(base_url_of(upstream))
    if parts is None or parts.hostname is None or is_loopback(parts.hostname):
        return ""

    def variable(name: str) -> str:
        return environ.get(name.lower()) or environ.get(name.upper()) or ""

    # typeshed does not know it; it takes the variables from us instead of from the process
    bypass = urllib.request.proxy_bypass_environment  # type: ignore[attr-defined]
    if bypass(parts.hostname, {"no": variable("no_proxy")}):
        return ""
    return variable(f"{parts.scheme}_proxy") or variable("all_proxy")


def _openai_models() -> dict[str, ModelSettings]:
    """OpenAI's embedding models, as its model pages describe them."""
    return {
        "text-embedding-3-small": ModelSettings(
            upstreams=("openai",), dimensions=1536, dimensions_allowed=(256, 512, 768, 1024), token_ids=True
        ),
        "text-embedding-3-large": ModelSettings(
            upstreams=("openai",), dimensions=3072, dimensions_allowed=(256, 512, 1024, 1536), token_ids=True
        ),
        "text-embedding-ada-002": ModelSettings(upstreams=("openai",), dimensions=1536, token_ids=True),
    }


def _space(name: str, model: ModelSettings, first: UpstreamSettings) -> str:
    """
    Name the vector space by who serves it: two servers that answer to the same name are not the same space. The first
    upstream counts, since the others have to show the same vectors.
    """
    place = base_url_of(first) or first.kind
    return f"{model.upstream_model or name}@{re.sub('//[^/]*@', '//', place)}"


def _builtin_model(model: ModelSettings, told: Any) -> ModelSettings:
    """The embedded model is known: what the file leaves open has one right value."""
    own: dict[str, Any] = {
        "upstream_model": MODEL,
        "dimensions": WIDTH,
        "dimensions_allowed": WIDTHS,
        "max_input_bytes": MAX_INPUT_BYTES,
    }
    said = told if isinstance(told, dict) else {}
    return dataclasses.replace(model, **{key: value for key, value in own.items() if key not in said})


# --- secrets ---


def _api_keys(settings: Settings, environ: Mapping[str, str], problems: Problems) -> Iterator[tuple[str, str]]:
    """Yield each upstream's key. A key found in the wrong place is not quoted."""
    for name, upstream in settings.upstreams.items():
        where = f"upstreams.{quoted(name)}"
        variable, path = upstream.api_key_env, upstream.api_key_file
        if variable and path:
            problems.note(f"{where}.api_key_file", "api_key_env is given too; keep one of them")
        elif variable:
            # never quoted: where the name of a variable is expected, keys have been found
            yield from _key(name, f"{where}.api_key_env", None, environ.get(variable, ""), problems)
        elif path:
            said = path if "/" in path else None
            try:
                key = Path(path).read_text(encoding="utf-8")
            except OSError as error:
                problems.note(f"{where}.api_key_file", f"cannot be read: {error.strerror}", said)
            except UnicodeDecodeError:
                problems.note(f"{where}.api_key_file", "cannot be read: not UTF-8", said)
            else:
                yield from _key(name, f"{where}.api_key_file", said, key, problems)


def _key(name: str, where: str, source: str | None, key: str, problems: Problems) -> Iterator[tuple[str, str]]:
    key = key.strip()
    if not key:
        missing = "the variable of this name is not set; export it" if where.endswith("env") else "the file is empty"
        problems.note(where, missing, source)
    elif not re.fullmatch(r"[!-~]+", key):
        problems.note(where, "holds more than a key: it has blanks, line breaks or letters beyond ASCII inside", source)
    else:
        yield name, key
