"""
Settings against each other and against the world: what each alone cannot tell.

Pure but for reading certificate files. Each problem names key, value and remedy; values that may hold a secret are not
shown.
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from collections.abc import Iterator, Mapping
from urllib.parse import SplitResult, urlsplit

from proxy.base.settings import KINDS, ModelSettings, Settings, UpstreamSettings, shown
from proxy.upstream.builtin import MAX_INPUT_BYTES, MODEL, WIDTH, WIDTHS
from proxy.upstream.transport import tls_context
from proxy.wiring.config.profiles import base_url_of, path_of, profile_of
from proxy.wiring.config.reader import meant, quoted

OFF = "off"
MAX_SOCKET_PATH_BYTES = 100
"""A Unix address holds 107 bytes; the socket is bound to a slightly longer name first."""

_NAME = re.compile(r"[!-~]{1,128}")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # token of RFC 9110 §5.6.2
_KEEP_ALIVE = re.compile(r"-?(?:\d{1,9}|(?:\d{1,9}(?:\.\d{1,9})?(?:ns|us|µs|ms|s|m|h))+)")  # Go's time.ParseDuration


def contradictions(settings: Settings, api_keys: Mapping[str, str]) -> Iterator[str]:
    """Yield everything that is wrong with settings that were read without a mistake."""
    yield from _listen_problems(settings)
    yield from _bound_problems(settings)
    for name, upstream in settings.upstreams.items():
        for problem in _upstream_problems(upstream, has_key=name in api_keys):
            yield f"upstreams.{quoted(name)}.{problem}"
    for name, model in settings.models.items():
        for problem in _model_problems(model, settings.upstreams):
            yield f"models.{quoted(name)}.{problem}"
    yield from _name_problems(settings)


# --- listeners and callers ---


def _listen_problems(settings: Settings) -> Iterator[str]:
    listen = settings.listen
    if listen.socket == OFF and listen.tcp == OFF:
        yield "listen.tcp = 'off': listen.socket is off too, so nobody could connect; leave one of them on"
    if listen.socket != OFF and (size := len(os.fsencode(listen.socket))) > MAX_SOCKET_PATH_BYTES:
        yield (
            f"listen.socket = {shown(listen.socket)}: has {size} bytes, a Unix socket's path may have "
            f"{MAX_SOCKET_PATH_BYTES}; choose a shorter folder"
        )
    if not re.fullmatch(r"0?[0-7]{3}", listen.socket_mode) or int(listen.socket_mode, 8) & 0o600 != 0o600:
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
                f"callers.{quoted(name)}.key_sha256: is not 64 hexadecimal digits; "
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


# --- upstreams ---


def split_url(url: str) -> SplitResult | None:
    """Take a URL apart; None when it is none."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # only here a port out of range is noticed
    except ValueError:
        return None
    return parts if parts.hostname else None


def _upstream_problems(upstream: UpstreamSettings, *, has_key: bool) -> Iterator[str]:
    if not upstream.kind:
        yield f"kind: is missing; it may be {', '.join(KINDS[:-1])} or {KINDS[-1]}"
        return
    yield from _kind_problems(upstream)
    if upstream.kind == "builtin":
        return
    url = base_url_of(upstream)
    if not url:
        yield f"base_url: is missing, and {_whose(upstream)} has none of its own"
    yield from _url_problems(upstream, url)
    parts = split_url(url)
    is_azure = upstream.kind == "openai" and upstream.profile == "azure"
    is_hosted = is_azure or (parts is not None and parts.hostname == "api.openai.com")
    if is_hosted and not has_key and not upstream.api_key_env and not upstream.api_key_file:
        yield "api_key_env: this upstream needs an API key; name the variable that holds it, such as OPENAI_API_KEY"
    for name, value in upstream.headers.items():
        if not _HEADER_NAME.fullmatch(name) or not value.isprintable():
            yield f"headers.{quoted(name)}: cannot be sent: a name is letters, digits and '-', a value is one line"
    yield from _slot_problems(upstream)
    yield from _transport_problems(upstream)


def _slot_problems(upstream: UpstreamSettings) -> Iterator[str]:
    asked = upstream.balance
    slots = asked.slots or profile_of(upstream).slots
    whose = "" if asked.slots else ", which is the profile's own"
    for key in ("min_slots", "start_slots"):
        if (value := getattr(asked, key)) > slots:
            yield f"balance.{key} = {value}: is above balance.slots = {slots}{whose}"
    if 0 < asked.start_slots < asked.min_slots:
        yield f"balance.start_slots = {asked.start_slots}: is below balance.min_slots = {asked.min_slots}"


def _kind_problems(upstream: UpstreamSettings) -> Iterator[str]:
    """What only some kinds have is a mistake at others; a default is none, since `show` prints all of them."""
    for key, kind in (("profile", "openai"), ("keep_alive", "ollama"), ("route", "tei")):
        value = getattr(upstream, key)
        if upstream.kind != kind and value != getattr(UpstreamSettings(), key):
            yield f"{key} = {shown(value)}: only kind {kind!r} has it, and this is {upstream.kind!r}; leave it out"
    if upstream.kind == "ollama" and upstream.keep_alive and not _KEEP_ALIVE.fullmatch(upstream.keep_alive):
        yield (
            f"keep_alive = {shown(upstream.keep_alive)}: is no duration such as '30m' or '1h30m', no number of "
            "seconds, and not '-1' for ever"
        )


def _whose(upstream: UpstreamSettings) -> str:
    """Say for a message whose habits an upstream has."""
    return f"profile {upstream.profile!r}" if upstream.kind == "openai" else f"kind {upstream.kind!r}"


def _url_problems(upstream: UpstreamSettings, url: str) -> Iterator[str]:
    parts = split_url(url)
    path, own = parts.path.rstrip("/") if parts else "", path_of(upstream)
    masked = shown(re.sub(r"^.*@", "(hidden)@", url))
    if url and (parts is None or parts.scheme not in ("http", "https")):
        yield f"base_url = {masked}: is not http://host:port/… or https://…"
    elif path.endswith(own):
        yield f"base_url = {masked}: leave {own!r} out, it is appended"
    elif own in ("/api/embed", "/embed") and path.endswith("/v1"):
        yield f"base_url = {masked}: leave '/v1' out, {own!r} stands beside it"
    elif parts is not None and (parts.username or parts.query or parts.fragment):
        yield "base_url: may not hold a user, a query or a fragment; keys go into api_key_env or api_key_file"


def _transport_problems(upstream: UpstreamSettings) -> Iterator[str]:
    transport = upstream.transport
    if transport.http_proxy:
        proxy = split_url(transport.http_proxy)
        if proxy is None or proxy.scheme != "http":
            yield (
                "transport.http_proxy: is not http://host:port; where it is empty, HTTPS_PROXY, HTTP_PROXY and "
                "ALL_PROXY count, and NO_PROXY excepts this upstream from them"
            )
    if transport.client_key_file and not transport.client_cert_file:
        yield f"transport.client_key_file = {shown(transport.client_key_file)}: has no client_cert_file beside it"
        return
    for key in ("ca_file", "client_cert_file", "client_key_file"):
        path = getattr(transport, key)
        if path and not os.access(path, os.R_OK):
            yield f"transport.{key} = {shown(path)}: cannot be read"
            return
    try:
        tls_context(transport)
    except (OSError, ssl.SSLError):
        yield "transport: ca_file, client_cert_file and client_key_file are no certificates and key that fit, in PEM"


# --- models ---


def _model_problems(model: ModelSettings, upstreams: Mapping[str, UpstreamSettings]) -> Iterator[str]:
    if not model.upstreams:
        yield f"upstreams: is missing; name who serves it: {', '.join(upstreams) or 'add [upstreams.<name>] first'}"
    for name in model.upstreams:
        if name not in upstreams:
            known = f"known: {', '.join(upstreams)}" if upstreams else "add [upstreams.<name>] first"
            yield f"upstreams = {shown(name)}: no such upstream{meant(name, upstreams).rstrip('?')}; {known}"
        elif upstreams[name].kind == "builtin":
            yield from _builtin_problems(model)
        elif upstreams[name].kind:
            yield from _server_problems(name, model, upstreams[name])
    if any(width < 1 for width in model.dimensions_allowed):
        yield f"dimensions_allowed = {list(model.dimensions_allowed)}: widths are above 0"


def _server_problems(name: str, model: ModelSettings, upstream: UpstreamSettings) -> Iterator[str]:
    profile = profile_of(upstream)
    if model.token_ids and not profile.speaks_cl100k:
        yield (
            f"token_ids = true: upstream {name!r} has {_whose(upstream)}, "
            "which is not known to speak cl100k; ids would mean other words to it"
        )
    elif model.dimensions_allowed and not profile.has_dimensions:
        yield (
            f"dimensions_allowed = {list(model.dimensions_allowed)}: upstream {name!r} has {_whose(upstream)}, "
            "which does not know 'dimensions'"
        )


def _builtin_problems(model: ModelSettings) -> Iterator[str]:
    if model.upstream_model not in ("", MODEL):
        yield f"upstream_model = {shown(model.upstream_model)}: the embedded model is {MODEL!r}"
    if model.dimensions != WIDTH:
        yield (
            f"dimensions = {model.dimensions}: the embedded model is {WIDTH} wide; leave it out, "
            "callers ask for 64 or 128 by 'dimensions'"
        )
    if not set(model.dimensions_allowed) <= set(WIDTHS):
        widths = ", ".join(map(str, WIDTHS))
        yield f"dimensions_allowed = {list(model.dimensions_allowed)}: the embedded model has {widths}"
    if model.max_input_bytes > MAX_INPUT_BYTES:
        yield f"max_input_bytes = {model.max_input_bytes}: the embedded model takes {MAX_INPUT_BYTES}"
    if model.token_ids:
        yield "token_ids = true: the embedded model takes texts only"


def _name_problems(settings: Settings) -> Iterator[str]:
    if not settings.models:
        yield "models: there is none; add [models.<name>] with upstreams"
    for kind, named in (("models", settings.models), ("upstreams", settings.upstreams), ("callers", settings.callers)):
        for name in named:
            if not _NAME.fullmatch(name):
                yield f"{kind}.{quoted(name)}: a name is 1 to 128 visible ASCII characters, since headers show it"
    names = set(settings.models)
    for name, model in settings.models.items():
        if len(set(model.upstreams)) < len(model.upstreams):
            yield f"models.{quoted(name)}.upstreams = {list(model.upstreams)}: names one of them twice"
        for alias in model.aliases:
            if alias in names:
                yield f"models.{quoted(name)}.aliases = {shown(alias)}: is a name already"
            names.add(alias)
    default = settings.request.default_model
    if default and default not in names:
        yield f"request.default_model = {shown(default)}: no such model{meant(default, names)}"
