"""
The settings: one frozen class per stage, each field with its meaning, unit, default, bounds and reason.

The classes only hold; `wiring/config` reads file and environment and collects every mistake. The texts here are the
ones that `embedding-sidecar show --reference` prints and docs/configuration.md contains, so there is one place to
change them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from proxy.base.errors import UnknownModel
from proxy.base.messages import Priority


def setting(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    why: str = "",
    reload: bool = True,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """
    Declare one setting.

    Args:
        default: its value when nobody says otherwise; a mapping makes a fresh dict each time.
        doc: what it means, a sentence for the user.
        unit: unit of the value.
        why: the reason for this default: a measurement, a specification, a neighbour's value.
        reload: whether SIGHUP takes a changed value; else the next start does.
        low, high: inclusive bounds.
        choices: the words allowed.
        secret: whether a value may give something away; it is in no message and no repr then.
    """
    metadata = {
        "doc": doc,
        "unit": unit,
        "why": why,
        "reload": reload,
        "low": low,
        "high": high,
        "choices": choices,
        "secret": secret,
    }
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata, repr=not secret)
    return field(default=default, metadata=metadata, repr=not secret)


# --- floor 3 and the edge ---


@dataclass(frozen=True, slots=True)
class ListenSettings:
    """Where callers find the proxy, and how patient it is with their connections."""

    socket: str = setting(
        "",
        "Path of the Unix socket. Empty: `$EMBEDDING_SIDECAR_SOCKET`, else `$XDG_RUNTIME_DIR/embedding-sidecar.sock`, "
        "else `/tmp/embedding-sidecar-<uid>/embedding-sidecar.sock`. `off`: none.",
        why="the adapter looks for it by the same rule",
        reload=False,
    )
    socket_mode: str = setting(
        "0660",
        "Access mode of the Unix socket, octal.",
        why="who may open the file may embed; add the app's user to the group",
        reload=False,
    )
    allowed_uids: tuple[int, ...] = setting(
        (),
        "Peers on the Unix socket are refused unless they run as one of these users. Empty: the file mode decides.",
    )
    tcp: str = setting(
        "127.0.0.1:8484",
        "Host and port of the TCP listener; `[::1]:8484` for IPv6; port 0 for any free one. `off`: none.",
        why="anything but loopback needs `[callers]` with keys, or the start is refused",
        reload=False,
    )
    backlog: int = setting(
        1024, "Connections that may wait to be accepted.", unit="connections", low=1, high=65535, reload=False,
        why="the kernel cuts it at net.core.somaxconn, 4096 on current Linux",
    )  # fmt: skip
    max_connections: int = setting(
        4096, "Open connections at a time; further ones are closed at once.", unit="connections", low=1,
        high=1_000_000, reload=False, why="an idle one takes about 10 kB",
    )  # fmt: skip
    keepalive_timeout_s: float = setting(
        95.0, "An idle connection is kept open this long.", unit="s", low=1, high=3600, reload=False,
        why="longer than the pools of callers (httpx 5 s, Go 90 s), so the caller closes first and no request is "
        "lost on a connection that we are just closing",
    )  # fmt: skip
    body_timeout_s: float = setting(
        10.0, "A request's body has to be here this long after its head.", unit="s", low=0.1, high=600,
        why="callers are on the same machine; 32 MiB take milliseconds",
    )  # fmt: skip
    write_timeout_s: float = setting(
        30.0, "A caller has to take its answer within this time, or is cut off.", unit="s", low=0.1, high=3600,
        why="an answer that nobody reads holds its memory",
    )  # fmt: skip
    max_body_bytes: int = setting(
        32 * 1024 * 1024, "Largest request body.", unit="bytes", low=1024, high=1024**3,
        why="2048 texts of 16 kB each; aiohttp's own 1 MiB is too small for ingestion",
    )  # fmt: skip
    max_bodies_bytes: int = setting(
        128 * 1024 * 1024, "Bytes of all bodies that are being read at a time; more is refused with 503.", unit="bytes",
        low=1024, high=64 * 1024**3, why="a body counts in admission only once it is whole",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RequestSettings:
    """What a request may ask for, and what it gets when it does not say."""

    default_model: str = setting("", "Model of a request that names none. Empty: the first of `[models]`.")
    max_inputs: int = setting(
        2048, "Inputs of one request.", unit="inputs", low=1, high=100_000, why="OpenAI's bound"
    )  # fmt: skip
    interactive_timeout_s: float = setting(
        10.0, "Deadline of an interactive request that sets none.", unit="s", low=0.05, high=3600,
        why="a person waits for the search behind it",
    )  # fmt: skip
    bulk_timeout_s: float = setting(
        60.0, "Deadline of a bulk request that sets none.", unit="s", low=0.05, high=3600,
        why="LangChain4j, Dify and LlamaIndex give up after 60 s; whoever is more patient says so by header",
    )  # fmt: skip
    max_timeout_s: float = setting(
        600.0, "Longest deadline that a caller may set by `X-Request-Timeout-Ms`.", unit="s", low=1, high=86_400,
        why="the patience of openai-python",
    )  # fmt: skip
    interactive_max_bytes: int = setting(
        4096, "A single unlabelled text up to this size counts as interactive, anything else as bulk.",
        unit="bytes", low=0, high=1024**2, why="a search query is a sentence, a chunk is a page",
    )  # fmt: skip

    def timeout_s(self, priority: Priority) -> float:
        """Return the patience of a request that does not state its own."""
        return self.interactive_timeout_s if priority is Priority.INTERACTIVE else self.bulk_timeout_s


@dataclass(frozen=True, slots=True)
class CallerSettings:
    """One client key. With at least one, every request over TCP has to show a key: `Authorization: Bearer …`."""

    key_sha256: str = setting(
        "", "SHA-256 of the key, in hexadecimal: `printf %s \"$KEY\" | sha256sum`.",
        why="the file holds nothing that opens the door", secret=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LifecycleSettings:
    """Drain and canaries."""

    drain_timeout_s: float = setting(
        30.0, "At SIGTERM, requests inside get this long to finish.", unit="s", low=0, high=3600,
        why="stay below the service manager's own limit (systemd 90 s, Kubernetes 30 s, set it higher there)",
    )  # fmt: skip
    drain_linger_s: float = setting(
        5.0, "At SIGTERM, idle keep-alive connections are served this long before they are closed.", unit="s",
        low=0, high=3600,
        why="a request may be on its way in; with 5 s, clients that reuse a connection within that lost none",
    )  # fmt: skip
    canary_interval_s: float = setting(
        30.0, "Each upstream of a model embeds the canary texts this often.", unit="s", low=0.1, high=86_400,
        why="costs forty tokens; a paid upstream may want 300",
    )  # fmt: skip
    canary_retry_s: float = setting(
        1.0, "After a failed canary the next one comes this soon, then twice as late each time, up to the interval.",
        unit="s", low=0.05, high=3600, why="an upstream that is starting up is found soon",
    )  # fmt: skip
    canary_timeout_s: float = setting(
        20.0, "A canary's deadline.", unit="s", low=0.1, high=3600, why="the first call may load a local model"
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LogSettings:
    """Log lines on standard error."""

    format: str = setting(
        "auto", "`json`, `console`, or `auto`: console on a terminal, else json.", choices=("auto", "json", "console")
    )
    level: str = setting(
        "info", "Least level that is written. Requests are `info`.", choices=("debug", "info", "warning", "error")
    )


# --- the funnel ---


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    """How much may be inside at a time; more is refused at once with 503 and Retry-After."""

    max_inputs: int = setting(
        20_000, "Inputs inside.", unit="inputs", low=1, high=10_000_000, why="ten full requests of 2048"
    )  # fmt: skip
    max_bytes: int = setting(
        64 * 1024 * 1024, "Bytes of texts inside.", unit="bytes", low=1024, high=16 * 1024**3,
        why="bounds memory: bodies, texts and vectors together take a few times this",
    )  # fmt: skip
    retry_after_s: float = setting(
        1.0, "What a refused caller is told to wait.", unit="s", low=0.1, high=3600, why="SDKs take whole seconds"
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Vectors kept in memory, per input."""

    max_bytes: int = setting(
        64 * 1024 * 1024, "Memory for cached vectors, keys and bookkeeping; 0 turns the cache off.", unit="bytes",
        low=0, high=64 * 1024**3, why="about 10 000 vectors of 1536 numbers",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MicroBatchSettings:
    """How waiting inputs become calls."""

    patience_s: float = setting(
        0.005, "Longest time that a free slot waits for callers who are just coming back. Never with a slot to spare.",
        unit="s", low=0, high=1, why="a call of 30 ms with eight inputs is worth waiting 4 ms for; 0 turns it off",
    )  # fmt: skip
    bulk_share: float = setting(
        0.2, "Share of the batches that bulk gets while interactive inputs wait too.", low=0.01, high=0.9,
        why="interactive goes first, but ingestion must not stand still for hours",
    )  # fmt: skip
    bulk_call_s: float = setting(
        2.0, "A batch of bulk inputs is made so small that its call should not take longer than this.", unit="s",
        low=0.01, high=600, why="an interactive input may have to wait for one to end, at a server with one slot",
    )  # fmt: skip
    quarantine_s: float = setting(
        600.0, "An input that the upstream refused or failed on travels alone for this long.", unit="s", low=0,
        high=86_400, why="callers send the same text again; it should not fail a batch each time",
    )  # fmt: skip


# --- one upstream ---


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """How much the upstream takes in one call. 0: the profile's own bound."""

    max_inputs: int = setting(0, "Inputs of one call.", unit="inputs", low=0, high=100_000)
    max_bytes: int = setting(0, "UTF-8 bytes of the inputs of one call.", unit="bytes", low=0, high=1024**3)
    max_tokens: int = setting(
        0, "Tokens of the inputs of one call, as estimated.", unit="tokens", low=0, high=100_000_000,
        why="the estimate learns from the usage that the upstream reports",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class BalanceSettings:
    """How many calls at a time. 0: the profile's own bound."""

    slots: int = setting(
        0, "Concurrent calls at the most.", unit="calls", low=0, high=10_000,
        why="local servers compute one after the other: more calls only queue there",
    )  # fmt: skip
    min_slots: int = setting(
        1, "Concurrent calls that are allowed however slow or overloaded the upstream is.", unit="calls", low=1,
        high=10_000, why="with one, a recovering server is asked one thing at a time",
    )  # fmt: skip
    start_slots: int = setting(
        0, "Concurrent calls to begin with; from there on it is learned, between `min_slots` and `slots`.",
        unit="calls", low=0, high=10_000, why="one more for each full round that does not slow the upstream down",
    )  # fmt: skip
    abandoned_s: float = setting(
        -1.0, "A call that was given up counts this long at the most, as the server may still be computing it. "
        "-1: the profile's own.", unit="s", low=-1, high=3600,
        why="Ollama went on for minutes after its caller had left; hosted upstreams have room, so 0 there",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class BucketSettings:
    """Limits per minute that the upstream sets. Calls are paced to keep them, not refused."""

    requests_per_minute: int = setting(
        0, "Attempts per minute; 0: what the upstream's headers say, if anything.", unit="1/min", low=0,
        high=10_000_000, why="sent evenly, one each 60 s / limit: a burst could double the limit in a window",
    )  # fmt: skip
    tokens_per_minute: int = setting(
        0, "Tokens per minute; 0: what the upstream's headers say, if anything.", unit="tokens/min", low=0,
        high=100_000_000_000,
        why="reserved by estimate, settled by the usage that comes back; a tenth of it may go at once",
    )  # fmt: skip
    hold_max_s: float = setting(
        60.0, "Longest time that an upstream may ask to be left alone, by `Retry-After` or its like.", unit="s", low=0,
        high=3600, why="Azure has asked for 86 400 s",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class CircuitSettings:
    """When to leave a failing upstream alone."""

    failures: int = setting(
        5, "Consecutive failed attempts that open the breaker.", unit="attempts", low=1, high=1000,
        why="pybreaker's default; a single restart of the upstream fails fewer",
    )  # fmt: skip
    open_s: float = setting(
        10.0, "After this time one probe may pass.", unit="s", low=0.05, high=3600,
        why="an outage of seconds should not become one of a minute",
    )  # fmt: skip
    probe_s: float = setting(
        60.0, "A probe that has not come back by then is no longer waited for, and another one may go.", unit="s",
        low=0.05, high=3600, why="a lease without an end has kept breakers half-open for days",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """The connections to the upstream."""

    connect_timeout_s: float = setting(
        5.0, "Time to open a connection, DNS and TLS included.", unit="s", low=0.05, high=600,
        why="openai-python's; a healthy one takes less than 0.5 s",
    )  # fmt: skip
    attempt_timeout_s: float = setting(
        30.0, "Time of one attempt until its answer is read.", unit="s", low=0.05, high=3600,
        why="a full batch of a hosted model takes up to 10 s; the caller's deadline cuts it shorter anyway",
    )  # fmt: skip
    keepalive_s: float = setting(
        0.0, "An idle connection is reused this long. 0: the profile's own.", unit="s", low=0, high=3600,
        why="has to be shorter than the upstream's: uvicorn and llama.cpp close after 5 s",
    )  # fmt: skip
    dns_ttl_s: float = setting(
        10.0, "Addresses are looked up again after this time.", unit="s", low=0, high=86_400,
        why="a restarted container has another one",
    )  # fmt: skip
    max_answer_bytes: int = setting(
        256 * 1024 * 1024, "Largest answer that is read.", unit="bytes", low=1024, high=4 * 1024**3,
        why="2048 vectors of 3072 numbers are 90 MB as JSON floats",
    )  # fmt: skip
    http_proxy: str = setting(
        "",
        "HTTP proxy to go through, `http://host:port`. Empty: `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`, "
        "as read at start and reload; never for loopback.",
        secret=True,
    )
    ca_file: str = setting("", "CA certificates to trust, PEM. Empty: the system's.")
    client_cert_file: str = setting("", "Client certificate to show, PEM.")
    client_key_file: str = setting("", "Key of the client certificate, PEM.")


KINDS = ("builtin", "openai", "ollama", "tei")
PROFILES = ("openai", "azure", "vllm", "llamacpp", "localai", "lmstudio", "infinity", "generic")


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """One server that embeds, or the embedded model."""

    kind: str = setting(
        "", "`builtin`: the embedded model. `openai`: a server that speaks OpenAI's /v1/embeddings. `ollama`: Ollama "
        "by its own /api/embed. `tei`: Hugging Face's text-embeddings-inference.", choices=KINDS,
    )  # fmt: skip
    profile: str = setting(
        "generic", "Whose defaults and habits a server of kind `openai` has.", choices=PROFILES,
        why="see the table of profiles in docs/upstreams.md",
    )  # fmt: skip
    keep_alive: str = setting(
        "30m", "Kind `ollama`: how long the model stays loaded after a call, such as `30m`, `24h`, `-1` for ever or "
        "`0` for not at all. Empty: as the server is set.",
        why="Ollama's own 5 min let the first query after lunch wait until the model is loaded again",
    )  # fmt: skip
    route: str = setting(
        "native", "Kind `tei`: `native` is /embed, where a long input is an error. `openai` is /v1/embeddings: base64, "
        "but long inputs are cut silently unless the server runs with `--auto-truncate false`.",
        choices=("native", "openai"), why="a vector of half a text is a wrong one",
    )  # fmt: skip
    base_url: str = setting(
        "", "Where the kind's path is appended: `/embeddings`, for `ollama` `/api/embed`, for `tei` `/embed`. Empty: "
        "the profile's own, if it has one.",
    )  # fmt: skip
    api_key_env: str = setting("", "Environment variable that holds the API key.")
    api_key_file: str = setting("", "File that holds the API key; read at start and reload.")
    headers: Mapping[str, str] = setting({}, "Further headers for each call.", secret=True)
    batch: BatchSettings = field(default_factory=BatchSettings)
    balance: BalanceSettings = field(default_factory=BalanceSettings)
    bucket: BucketSettings = field(default_factory=BucketSettings)
    circuit: CircuitSettings = field(default_factory=CircuitSettings)
    transport: TransportSettings = field(default_factory=TransportSettings)


@dataclass(frozen=True, slots=True)
class AttemptSettings:
    """Tries of one call, over all upstreams of its model."""

    max_attempts: int = setting(
        3, "Tries of one call.", unit="attempts", low=1, high=20, why="the first and two more, as SDKs do"
    )  # fmt: skip
    backoff_base_s: float = setting(
        0.1, "The wait before try n is drawn from 0 to this × 2ⁿ⁻².", unit="s", low=0, high=60,
        why="full jitter: callers that failed together do not come back together",
    )  # fmt: skip
    backoff_max_s: float = setting(5.0, "Longest such wait.", unit="s", low=0, high=600)
    retry_ratio: float = setting(
        0.2, "Further tries may be this share of the calls, over all callers; a few are always allowed.", low=0,
        high=1, why="linkerd's: when everything fails, retries would multiply the load",
    )  # fmt: skip


# --- one model ---


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """A name that callers use, and who serves it."""

    upstreams: tuple[str, ...] = setting(
        (), "Who serves it. Several must serve the same vectors: each is checked against the first by a canary."
    )
    upstream_model: str = setting("", "Its name at the upstream. Empty: the same.")
    aliases: tuple[str, ...] = setting((), "Further names for it.")
    dimensions: int = setting(
        0, "Width of its vectors. 0: learned from the first canary.", low=0, high=65_536,
        why="state it, and an upstream that serves another model is refused at the start",
    )  # fmt: skip
    dimensions_allowed: tuple[int, ...] = setting(
        (), "Values that a caller may ask for in `dimensions`. Empty: only the model's own width."
    )
    token_ids: bool = setting(
        False, "Whether token ids may be sent instead of texts.",
        why="ids are cl100k's: other models take them and answer with confident nonsense",
    )  # fmt: skip
    max_input_bytes: int = setting(
        131_072, "Longest text.", unit="bytes", low=1, high=64 * 1024**2,
        why="four times what 8192 tokens of English take; the upstream knows its exact bound and says so itself",
    )  # fmt: skip
    max_input_tokens: int = setting(
        8192, "Longest list of token ids.", unit="tokens", low=1, high=10_000_000, why="OpenAI's bound"
    )  # fmt: skip
    long_input: str = setting(
        "reject", "What happens to a longer input: `reject`, or `truncate` and say so in `X-Embedding-Truncated`.",
        choices=("reject", "truncate"),
    )  # fmt: skip
    space: str = setting(
        "", "Name of the vector space. Empty: the model's name at its first upstream, and that upstream's base_url.",
        why="give one where several models or addresses mean the same vectors, so that they share the cache",
    )  # fmt: skip


# --- all of it ---


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything, as file and environment say."""

    listen: ListenSettings = field(default_factory=ListenSettings)
    request: RequestSettings = field(default_factory=RequestSettings)
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    microbatch: MicroBatchSettings = field(default_factory=MicroBatchSettings)
    attempt: AttemptSettings = field(default_factory=AttemptSettings)
    lifecycle: LifecycleSettings = field(default_factory=LifecycleSettings)
    log: LogSettings = field(default_factory=LogSettings)
    upstreams: Mapping[str, UpstreamSettings] = field(default_factory=dict)
    models: Mapping[str, ModelSettings] = field(default_factory=dict)
    callers: Mapping[str, CallerSettings] = field(default_factory=dict)


class Catalogue:
    """The models by all their names."""

    def __init__(
        self, models: Mapping[str, ModelSettings], default: str, learned: Callable[[], Mapping[str, int]] = dict
    ) -> None:
        """
        Args:
            models: by name.
            default: the model of a request that names none; empty means the first.
            learned: returns widths that canaries have shown, by model.
        """
        self.models = dict(models)
        self._learned = learned
        self.default = default or next(iter(self.models), "")
        self._names = {alias: name for name, model in models.items() for alias in model.aliases}
        self._names.update({name: name for name in models})

    def width(self, name: str) -> int | None:
        """Return the width of a model's own vectors; None while nobody knows it."""
        return self.models[name].dimensions or self._learned().get(name)

    def widths(self, name: str) -> tuple[int, ...]:
        """Return the values that `dimensions` may take for a model; empty while nothing is known."""
        own = self.width(name)
        return tuple(sorted({*([own] if own else []), *self.models[name].dimensions_allowed}))

    def resolve(self, asked: str | None) -> tuple[str, ModelSettings]:
        """
        Find a model by name or alias; None means the default.

        Raises:
            UnknownModel: nobody serves it; the message lists what is served.
        """
        name = self._names.get(self.default if asked is None else asked)
        if name is None:
            known = ", ".join(sorted(self._names))
            raise UnknownModel(f"no model {shown(asked or '')} here; known: {known}", param="model")
        return name, self.models[name]


def shown(value: str, limit: int = 64) -> str:
    """Quote a short value of a caller for a message: cut, and without anything that could break a log line."""
    cut = value if len(value) <= limit else value[:limit] + "…"
    return "'" + "".join(c if c.isprintable() else "?" for c in cut) + "'"
