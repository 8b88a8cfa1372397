"""
Kinds of upstream → their profiles and dialects: the one place that knows all of them.

A further kind is a file in `upstream/translate/`, a word in `base/settings.py` and a row here.
"""

from __future__ import annotations

from proxy.base.settings import UpstreamSettings
from proxy.upstream.translate import Dialect, Profile, ollama, openai, tei


def profile_of(upstream: UpstreamSettings) -> Profile:
    """
    Return the defaults and habits of an upstream's server.

    Raises:
        ValueError: there is no server: the embedded model has neither address nor dialect.
    """
    match upstream.kind:
        case "openai":
            return openai.PROFILES[upstream.profile]
        case "ollama":
            return ollama.PROFILE
        case "tei":
            return tei.PROFILES[upstream.route]
    raise ValueError(f"an upstream of kind {upstream.kind!r} has no profile")


def dialect_of(name: str, upstream: UpstreamSettings, api_key: str) -> Dialect:
    """
    Make what speaks to an upstream.

    Raises:
        ValueError: there is no server to speak to.
    """
    profile = profile_of(upstream)
    url, headers = upstream.base_url, upstream.headers
    if upstream.kind == "ollama":
        return ollama.Ollama(
            name, profile, base_url=url, api_key=api_key, headers=headers, keep_alive=upstream.keep_alive
        )
    if upstream.kind == "tei" and upstream.route == "native":
        return tei.Tei(name, profile, base_url=url, api_key=api_key, headers=headers)
    if upstream.kind == "tei":
        return tei.TeiOpenAI(name, profile, base_url=url, api_key=api_key, headers=headers)
    return openai.OpenAI(name, profile, base_url=url, api_key=api_key, headers=headers)


def base_url_of(upstream: UpstreamSettings) -> str:
    """Return where an upstream is: its own base_url, else its profile's; empty where it is nowhere."""
    if upstream.kind not in ("openai", "ollama", "tei"):
        return ""
    return upstream.base_url or profile_of(upstream).base_url


def path_of(upstream: UpstreamSettings) -> str:
    """Return the path that is appended to a server's base_url."""
    if upstream.kind == "tei" and upstream.route == "native":
        return tei.PATH
    return ollama.PATH if upstream.kind == "ollama" else openai.PATH
