"""
File and environment → Settings, or every mistake at once.

One TOML file; over it the environment, `EMBEDDING_SIDECAR__LISTEN__TCP=…` for `listen.tcp` and so on. Nothing reads
the environment anywhere else. Every key is checked against the class that declares it, then the settings against each
other; each mistake names the key, the value and what would be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
import re
import ssl
import tomllib
import typing
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from proxy.base.settings import ModelSettings, Settings, UpstreamSettings, shown
from proxy.upstream.builtin import MAX_INPUT_BYTES, MODEL, WIDTH, WIDTHS
from proxy.upstream.translate.openai import PROFILES
from proxy.upstream.transport import tls_context

ENV_PREFIX = "EMBEDDING_SIDECAR"
OFF = "off"
MAX_SOCKET_PATH_BYTES = 100
"""A Unix address holds 107 bytes; the socket is bound to a slightly longer name first."""


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
    problems: list[str] = []
    table = _parsed(path) if path else {}
    _overlay(table, environ, problems)
    settings = _with_defaults(_read(Settings, table, "", problems), table, environ)
    api_keys = dict(_api_keys(settings, environ, problems))
    if not problems:  # whatever was misread would only be reported twice
        problems.extend(_contradictions(settings, api_keys))
    if problems:
        raise ConfigError(path or "settings", problems)
    return Loaded(settings, api_keys)


# --- reading ---


def _parsed(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(path, [f"cannot be read: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(path, [f"is not valid TOML: {error}"]) from error


def _overlay(table: dict[str, Any], environ: Mapping[str, str], problems: list[str]) -> None:
    """Put `EMBEDDING_SIDECAR__A__B=value` over `a.b`. Two underscores each: Kubernetes makes up names with one."""
    if socket := environ.get(f"{ENV_PREFIX}_SOCKET"):
        listen = table.setdefault("listen", {})
        if isinstance(listen, dict):
            listen.setdefault("socket", socket)
    for name, value in sorted(environ.items()):
        if not name.startswith(f"{ENV_PREFIX}__"):
            continue
        words = name.removeprefix(f"{ENV_PREFIX}__").lower().split("__")
        cls: Any = Settings
        at = table
        for word in words[:-1]:
            key, cls = _step(cls, word, at)
            at = at.setdefault(key, {}) if isinstance(at, dict) else {}
        key, kind = _step(cls, words[-1], at)
        try:
            at[key] = _from_text(kind, value)
        except ValueError as error:
            problems.append(f"${name} = {shown(value)}: {error}")


def _step(cls: Any, word: str, at: dict[str, Any]) -> tuple[str, Any]:
    """Find what a word of a variable's name stands for: a field, or a name in a table (`_` for any odd character)."""
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        return word, hints.get(word)
    inner = typing.get_args(cls)[1] if typing.get_args(cls) else None
    spelled = {re.sub(r"[^a-z0-9]", "_", key.lower()): key for key in at}
    return spelled.get(word, word), inner


def _from_text(kind: Any, value: str) -> Any:
    if typing.get_origin(kind) is tuple:
        return [_from_text(typing.get_args(kind)[0], item.strip()) for item in value.split(",") if item.strip()]
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError("may be true or false")
        return value.lower() == "true"
    if kind is int:
        if not re.fullmatch(r"-?\d+", value):
            raise ValueError("is not a whole number")
        return int(value)
    if kind is float:
        try:
            return float(value)
        except ValueError:
            raise ValueError("is not a number") from None
    return value


def _read(cls: Any, table: Any, path: str, problems: list[str]) -> Any:
    """Make an instance of a settings class from a table; mistakes are noted and the default stands in."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(table, dict):
        problems.append(f"{path} = {_spelled(table)}: is a table, write [{path}]")
        return cls()
    values = {}
    for key, value in table.items():
        where = f"{path}.{_quoted(key)}".lstrip(".")
        if key not in fields:
            problems.append(f"{where}: no such setting{_meant(key, fields)}")
            continue
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            values[key] = _read(kind, value, where, problems)
        elif typing.get_origin(kind) is Mapping:
            values[key] = _read_mapping(typing.get_args(kind)[1], value, where, problems)
        else:
            problem, checked = _checked(kind, value, fields[key].metadata)
            if problem:
                problems.append(f"{where} = {_spelled(value)}: {problem}")
            else:
                values[key] = checked
    return cls(**values)


def _read_mapping(kind: Any, value: Any, where: str, problems: list[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        problems.append(f"{where} = {_spelled(value)}: is a table, write [{where}.<name>]")
        return {}
    if dataclasses.is_dataclass(kind):
        return {name: _read(kind, inner, f"{where}.{_quoted(name)}", problems) for name, inner in value.items()}
    for name, inner in value.items():
        if not isinstance(inner, str):
            problems.append(f"{where}.{_quoted(name)} = {_spelled(inner)}: is not a text")
    return value


def _checked(kind: Any, value: Any, metadata: Mapping[str, Any]) -> tuple[str, Any]:
    """Check one value against its type and bounds: what is wrong, or nothing and the value."""
    if typing.get_origin(kind) is tuple:
        item_kind = typing.get_args(kind)[0]
        if not isinstance(value, list) or not all(type(item) is item_kind for item in value):
            return f"is not a list of {_WORDS[item_kind]}s", None
        return "", tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        return f"is not {_WORDS[kind]}", None
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if low is not None and not low <= value <= high:
        return (
            f"has to be from {_plain(low)} to {_plain(high)}{' ' + metadata['unit'] if metadata['unit'] else ''}",
            None,
        )
    if choices and value not in choices:
        return f"may be {', '.join(choices)}{_meant(value, choices)}", None
    return "", value


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _meant(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _quoted(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else f'"{key}"'


def _spelled(value: Any) -> str:
    """Show a value of the file, shortened; values of secrets never get here, they are not in the file."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, bool):
        return str(value).lower()
    return shown(repr(value)).strip("'")


# --- defaults that depend on others ---


def _with_defaults(settings: Settings, table: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    upstreams, models = dict(settings.upstreams), dict(settings.models)
    if not upstreams and not models:
        upstreams["builtin"] = UpstreamSettings(kind="builtin")
        models[MODEL] = ModelSettings(upstreams=("builtin",))
        if environ.get("OPENAI_API_KEY"):
            upstreams["openai"] = UpstreamSettings(kind="openai", profile="openai", api_key_env="OPENAI_API_KEY")
            models.update(_openai_models())
    told = table.get("models", {}) if isinstance(table.get("models"), dict) else {}
    for name, model in models.items():
        if model.upstreams and all(u in upstreams and upstreams[u].kind == "builtin" for u in model.upstreams):
            models[name] = _builtin_model(model, told.get(name, {}))
    for name, upstream in upstreams.items():
        if proxy := upstream.transport.http_proxy or _environment_proxy(upstream, environ):
            transport = dataclasses.replace(upstream.transport, http_proxy=proxy)
            upstreams[name] = dataclasses.replace(upstream, transport=transport)
    socket = settings.listen.socket or default_socket(environ)
    listen = dataclasses.replace(settings.listen, socket=socket)
    return dataclasses.replace(settings, listen=listen, upstreams=upstreams, models=models)


def _environment_proxy(upstream: UpstreamSettings, environ: Mapping[str, str]) -> str:
    """Return the proxy that `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY` mean for an upstream; never one for loopback."""
    parts = urlsplit(upstream.base_url or PROFILES[upstream.profile].base_url)
    if not parts.hostname or is_loopback(parts.hostname):
        return ""
    variables = {name.lower(): value for name, value in environ.items() if name.lower().endswith("_proxy")}
    # typeshed does not know it; it takes the variables from us instead of from the process
    bypass = urllib.request.proxy_bypass_environment  # type: ignore[attr-defined]
    if bypass(parts.hostname, {"no": variables.get("no_proxy", "")}):
        return ""
    return variables.get(f"{parts.scheme}_proxy") or variables.get("all_proxy", "")


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


def _builtin_model(model: ModelSettings, told: Mapping[str, Any]) -> ModelSettings:
    """The embedded model is known: what the file leaves open has one right value."""
    own: dict[str, Any] = {
        "upstream_model": MODEL,
        "dimensions": WIDTH,
        "dimensions_allowed": WIDTHS,
        "max_input_bytes": MAX_INPUT_BYTES,
    }
    return dataclasses.replace(model, **{key: value for key, value in own.items() if key not in told})


def default_socket(environ: Mapping[str, str]) -> str:
    """Say where the socket is when nobody says otherwise; `rag_adapter` looks there by the same rule."""
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return f"{runtime}/embedding-sidecar.sock"
    return f"/tmp/embedding-sidecar-{os.getuid()}/embedding-sidecar.sock"  # noqa: S108 - server.py insists on owning it


def _api_keys(settings: Settings, environ: Mapping[str, str], problems: list[str]) -> Iterator[tuple[str, str]]:
    for name, upstream in settings.upstreams.items():
        where = f"upstreams.{_quoted(name)}"
        variable, path = upstream.api_key_env, upstream.api_key_file
        if variable and path:
            problems.append(f"{where}.api_key_file = {shown(path)}: api_key_env is given too; keep one of them")
        elif variable:
            if key := environ.get(variable, "").strip():
                yield name, key
            else:
                problems.append(f"{where}.api_key_env = {shown(variable)}: this variable is not set")
        elif path:
            try:
                if key := Path(path).read_text(encoding="utf-8").strip():
                    yield name, key
                else:
                    problems.append(f"{where}.api_key_file = {shown(path)}: the file is empty")
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
                problems.append(f"{where}.api_key_file = {shown(path)}: cannot be read: {reason}")


# --- checks across settings ---


def _contradictions(settings: Settings, api_keys: Mapping[str, str]) -> Iterator[str]:
    yield from _listen_problems(settings)
    yield from _bound_problems(settings)
    for name, upstream in settings.upstreams.items():
        for problem in _upstream_problems(upstream, has_key=name in api_keys):
            yield f"upstreams.{_quoted(name)}.{problem}"
    for name, model in settings.models.items():
        for problem in _model_problems(model, settings.upstreams):
            yield f"models.{_quoted(name)}.{problem}"
    yield from _name_problems(settings)


def _listen_problems(settings: Settings) -> Iterator[str]:
    listen = settings.listen
    if listen.socket == OFF and listen.tcp == OFF:
        yield "listen.tcp = 'off': listen.socket is off too, so nobody could connect; leave one of them on"
    if listen.socket != OFF and (size := len(os.fsencode(listen.socket))) > MAX_SOCKET_PATH_BYTES:
        yield (
            f"listen.socket = {shown(listen.socket)}: has {size} bytes, a Unix socket's path may have "
            f"{MAX_SOCKET_PATH_BYTES}; choose a shorter folder"
        )
    if not re.fullmatch(r"0?[0-7]{3}", listen.socket_mode):
        yield f"listen.socket_mode = {shown(listen.socket_mode)}: is not an octal mode such as '0660'"
    if listen.tcp != OFF:
        try:
            host, _ = host_port(listen.tcp)
        except ValueError as error:
            yield f"listen.tcp = {shown(listen.tcp)}: {error}"
        else:
            if not settings.callers and not is_loopback(host):
                yield (
                    f"listen.tcp = {shown(listen.tcp)}: is reachable from outside and no client keys are configured; "
                    "add [callers.<name>] with key_sha256, or listen on 127.0.0.1"
                )
    for name, caller in settings.callers.items():
        if not re.fullmatch(r"[0-9a-fA-F]{64}", caller.key_sha256):
            yield (
                f"callers.{_quoted(name)}.key_sha256: is not 64 hexadecimal digits; "
                'make it with: printf %s "$KEY" | sha256sum'
            )


def host_port(address: str) -> tuple[str, int]:
    """
    Split `host:port` or `[ipv6]:port`.

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+)):(\d{1,5})", address)
    if not match or int(match[3]) > 65535:
        raise ValueError("is not host:port, such as 127.0.0.1:8484 or [::1]:8484, or 'off'")
    return match[1] or match[2], int(match[3])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name other than localhost counts as no."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound_problems(settings: Settings) -> Iterator[str]:
    request, admission, listen = settings.request, settings.admission, settings.listen
    if admission.max_inputs < request.max_inputs:
        yield (
            f"admission.max_inputs = {admission.max_inputs}: is below request.max_inputs = {request.max_inputs}, "
            "so a full request could never come in"
        )
    if admission.max_bytes < listen.max_body_bytes:
        yield (
            f"admission.max_bytes = {admission.max_bytes}: is below listen.max_body_bytes = {listen.max_body_bytes}, "
            "so a full request could never come in"
        )
    for key in ("interactive_timeout_s", "bulk_timeout_s"):
        if (value := getattr(request, key)) > request.max_timeout_s:
            yield f"request.{key} = {value:g}: is above request.max_timeout_s = {request.max_timeout_s:g}"


def _upstream_problems(upstream: UpstreamSettings, *, has_key: bool) -> Iterator[str]:
    if not upstream.kind:
        yield "kind: is missing; it may be builtin or openai"
        return
    if upstream.kind == "builtin":
        return
    profile = PROFILES[upstream.profile]
    url = upstream.base_url or profile.base_url
    parts = urlsplit(url)
    if not url:
        yield f"base_url: is missing, and profile {upstream.profile!r} has none of its own"
    elif parts.scheme not in ("http", "https") or not parts.hostname:
        yield f"base_url = {shown(url)}: is not http://host:port/… or https://…"
    elif parts.path.rstrip("/").endswith("/embeddings"):
        yield f"base_url = {shown(url)}: leave '/embeddings' out, it is appended"
    elif parts.username or parts.query or parts.fragment:
        yield "base_url: may not hold a user, a query or a fragment; keys go into api_key_env or api_key_file"
    proxy = urlsplit(upstream.transport.http_proxy)
    if upstream.transport.http_proxy and (proxy.scheme != "http" or not proxy.hostname):
        yield "transport.http_proxy (or HTTPS_PROXY, HTTP_PROXY, ALL_PROXY): is not http://host:port"
    if parts.hostname == "api.openai.com" and not has_key:
        yield "api_key_env: OpenAI needs an API key; name the variable that holds it, such as 'OPENAI_API_KEY'"
    try:
        tls_context(upstream.transport)
    except (OSError, ssl.SSLError) as error:
        yield f"transport: ca_file, client_cert_file or client_key_file cannot be used: {error.strerror or error}"


def _model_problems(model: ModelSettings, upstreams: Mapping[str, UpstreamSettings]) -> Iterator[str]:
    if not model.upstreams:
        yield f"upstreams: is missing; name who serves it: {', '.join(upstreams) or 'add [upstreams.<name>] first'}"
    for name in model.upstreams:
        if name not in upstreams:
            yield f"upstreams = {shown(name)}: no such upstream{_meant(name, upstreams)}; known: {', '.join(upstreams)}"
        elif upstreams[name].kind == "builtin":
            if model.upstream_model not in ("", MODEL):
                yield f"upstream_model = {shown(model.upstream_model)}: the embedded model is {MODEL!r}"
            if not set(model.widths()) <= set(WIDTHS):
                yield f"dimensions: the embedded model has {', '.join(map(str, WIDTHS))}"
            if model.max_input_bytes > MAX_INPUT_BYTES:
                yield f"max_input_bytes = {model.max_input_bytes}: the embedded model takes {MAX_INPUT_BYTES}"
            if model.token_ids:
                yield "token_ids = true: the embedded model takes texts only"
        elif model.token_ids and not PROFILES[upstreams[name].profile].speaks_cl100k:
            yield (
                f"token_ids = true: upstream {name!r} has profile {upstreams[name].profile!r}, "
                "which is not known to speak cl100k; ids would mean other words to it"
            )
    if any(width < 1 for width in model.dimensions_allowed):
        yield f"dimensions_allowed = {list(model.dimensions_allowed)}: widths are above 0"


def _name_problems(settings: Settings) -> Iterator[str]:
    if not settings.models:
        yield "models: there is none; add [models.<name>] with upstreams"
    names = set(settings.models)
    for name, model in settings.models.items():
        for alias in model.aliases:
            if alias in names:
                yield f"models.{_quoted(name)}.aliases = {shown(alias)}: is the name of another model or alias"
            names.add(alias)
    default = settings.request.default_model
    if default and default not in names:
        yield f"request.default_model = {shown(default)}: no such model{_meant(default, names)}"


# --- after a reload, and for people ---


def needs_restart(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Name the settings that differ and that a reload does not take."""
    for f in dataclasses.fields(old):
        before, after = getattr(old, f.name), getattr(new, f.name)
        where = f"{path}.{f.name}".lstrip(".")
        if dataclasses.is_dataclass(before):
            yield from needs_restart(before, after, where)
        elif before != after and f.metadata.get("reload") is False:
            yield where


def as_table(settings: Any) -> dict[str, Any]:
    """Return settings as plain tables, for TOML; extra headers and a proxy's password are hidden."""
    table: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            table[f.name] = as_table(value)
        elif f.name == "headers":
            table[f.name] = dict.fromkeys(value, "(hidden)")
        elif f.name == "http_proxy":
            table[f.name] = re.sub(r"//[^/@]*@", "//(hidden)@", value)
        elif isinstance(value, Mapping):
            table[f.name] = {name: as_table(inner) for name, inner in value.items()}
        else:
            table[f.name] = list(value) if isinstance(value, tuple) else value
    return table


def reference() -> str:
    """Describe every setting as Markdown; docs/configuration.md holds exactly this."""
    return "\n".join(_sections(Settings, "")).strip() + "\n"


def _sections(cls: Any, path: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    rows, inner = [], []
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        where = f"{path}.{f.name}".lstrip(".")
        if dataclasses.is_dataclass(kind):
            inner.append((kind, where))
        elif _is_table(kind):
            inner.append((typing.get_args(kind)[1], f"{where}.<name>"))
        else:
            rows.append(_reference_row(f, kind))
    if rows:
        yield f"## `[{path}]`\n\n{(cls.__doc__ or '').strip()}\n"
        yield "| setting | default | unit | meaning | reload |\n| --- | --- | --- | --- | --- |"
        yield from rows
        yield ""
    for kind, where in inner:
        yield from _sections(kind, where)


def _is_table(kind: Any) -> bool:
    args = typing.get_args(kind)
    return len(args) == 2 and dataclasses.is_dataclass(args[1])


def _reference_row(f: Any, kind: Any) -> str:
    meta = f.metadata
    default = {} if f.default is dataclasses.MISSING else f.default
    spelled = (
        f'"{default}"' if isinstance(default, str) else str(list(default) if isinstance(default, tuple) else default)
    )
    if isinstance(default, bool):
        spelled = spelled.lower()
    bounds = ""
    if meta["low"] is not None:
        bounds = f" {_plain(meta['low'])} to {_plain(meta['high'])}."
    choices = (
        f" One of {', '.join(f'`{c}`' for c in meta['choices'])}." if meta["choices"] and "`" not in meta["doc"] else ""
    )
    why = f" *Why: {meta['why']}.*" if meta["why"] else ""
    text = f"{meta['doc']}{choices}{bounds}{why}".replace("|", "\\|")
    return f"| `{f.name}` | `{spelled}` | {meta['unit']} | {text} | {'yes' if meta['reload'] else 'restart'} |"
