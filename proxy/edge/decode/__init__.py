"""
Bytes of the caller → a Request, or an error that says what is wrong.

Pure: no socket, no clock but the instant it is given. Follows OpenAI's API reference for `POST /v1/embeddings`; what
the reference leaves open is said beside the line. Nothing here repairs an input: a vector belongs to exactly the text
that was sent.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import orjson

from proxy.base.errors import InvalidRequest, TooLarge, WrongContentType
from proxy.base.keys import fingerprint, keys
from proxy.base.messages import Input, Priority, Request, Spec, size_bytes
from proxy.base.settings import Catalogue, ModelSettings, RequestSettings, shown
from proxy.edge.decode.lists import MAX_TOKEN_ID, are_token_ids

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,63}")
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
# Visible ASCII only: the id stands in headers and log lines.
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_OWN_FIELDS = frozenset({"input", "model", "dimensions", "encoding_format", "user"})
_MAX_MODEL_CHARS = 256
_MAX_PARAMS_BYTES = 65_536
"""Parameters are words and numbers; they are no place for texts, which are counted and bounded as inputs."""


class Asked(NamedTuple):
    """A request and what only the edge needs to know of it."""

    request: Request
    base64: bool
    """Whether the caller wants base64; floats otherwise."""
    model: str
    """The model's name as the caller spelled it, for the answer."""
    truncated: tuple[int, ...]
    """Positions of the inputs that were cut to the model's bound."""


def content_type(value: str, encoding: str) -> None:
    """
    Insist on JSON, as it is: a compressed body may be a thousand times larger than what was sent.

    Raises:
        WrongContentType: the headers are missing or say something else.
    """
    if value == "application/json" and not encoding:
        return
    if encoding.strip().lower() not in ("", "identity"):
        raise WrongContentType(f"content encoding {shown(encoding)} is not supported; send the body as it is")
    kind = value.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise WrongContentType(
            f"content type {shown(value)} is not JSON; send 'Content-Type: application/json' (curl: --json)"
        )


def decode(
    body: bytes,
    headers: Mapping[str, str],
    *,
    catalogue: Catalogue,
    settings: RequestSettings,
    request_id: str,
    caller: str,
    now: float,
    lists: Sequence[Any] = (),
) -> Asked:
    """
    Read one request.

    Args:
        body: what the caller sent, at most `listen.max_body_bytes` of it.
        headers: the request's headers, case-insensitive.
        catalogue: the models served here.
        settings: bounds and defaults.
        request_id: see `request_id()`.
        caller: who asks, as far as the connection tells.
        now: the instant of arrival.
        lists: what `lists.taken_out()` has taken out of the body, if it has.

    Raises:
        InvalidRequest: with a code and the name of the parameter or header.
        UnknownModel: the message lists the known ones.

    Source: OpenAI API reference, "Create embeddings".
    """
    fields = _fields(body)
    asked_model = _model(fields.get("model"))
    name, model = catalogue.resolve(asked_model)
    inputs, is_tokens = _inputs(list(lists) or fields.get("input"), model, settings.max_inputs)
    inputs, truncated = _fitted(inputs, model, is_tokens=is_tokens)
    sizes = tuple([size_bytes(item) if type(item) is not str or not item.isascii() else len(item) for item in inputs])
    total_bytes = sum(sizes)
    priority = _priority(headers, inputs, total_bytes, settings)
    dimensions = _dimensions(fields["dimensions"], name, catalogue) if "dimensions" in fields else None
    known_space = model.space or model.upstream_model or name
    spec, space = _spec(known_space, name, dimensions, _params(fields), is_tokens=is_tokens)
    cache_control = headers.get("Cache-Control", "").lower()
    client = _client(headers)
    request = Request(
        id=request_id,
        spec=spec,
        inputs=inputs,
        keys=keys(space, inputs),
        space=space,
        sizes=sizes,
        size_bytes=total_bytes,
        priority=priority,
        caller=f"{caller}/{client}" if caller and client else client or caller,
        arrived=now,
        deadline=now + _timeout_s(headers, settings, priority),
        user=_user(fields["user"]) if "user" in fields else None,
        no_cache="no-cache" in cache_control or "no-store" in cache_control,
        no_store="no-store" in cache_control,
        traceparent=_traceparent(headers),
    )
    return Asked(request, _is_base64(fields.get("encoding_format")), asked_model or name, truncated)


def request_id(headers: Mapping[str, str]) -> str | None:
    """Return the caller's own id of the request where it is fit for a header and a log line, else None."""
    value = headers.get("X-Request-Id")
    return value if value and _REQUEST_ID.fullmatch(value) else None


def stated_timeout_s(headers: Mapping[str, str], settings: RequestSettings) -> float | None:
    """
    Return the patience that the caller states, None when it states none.

    Raises:
        InvalidRequest: the header makes no sense.
    """
    value = headers.get("X-Request-Timeout-Ms")
    if value is None:
        return None
    seconds = int(value) / 1000 if re.fullmatch(r"[0-9]{1,12}", value) else 0.0
    if not 0 < seconds <= settings.max_timeout_s:
        right = f"a whole number from 1 to {settings.max_timeout_s * 1000:.0f}"
        _refuse_header("X-Request-Timeout-Ms", value, right)
    return seconds


# --- the body ---


def _fields(body: bytes) -> dict[str, Any]:
    if not body:
        raise InvalidRequest("the body is empty; send a JSON object with 'input'", code="invalid_json")
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(_why_no_json(body, error), code="invalid_json") from error
    if not isinstance(fields, dict):
        raise InvalidRequest(f"the body is {_kind(fields)}, not a JSON object", code="invalid_json")
    if None in fields.values():
        # Some clients spell "not given" as null; no upstream has to learn that.
        return {key: value for key, value in fields.items() if value is not None}
    return fields


def _why_no_json(body: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        body.decode()
    except UnicodeDecodeError as flaw:
        return f"the body is not UTF-8: byte {flaw.start} of {len(body)}"
    # orjson's message never quotes the document, only says what it expected and where.
    return f"the body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"


def _model(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        _refuse("model", f"'model' is {'empty' if value == '' else _kind(value)}, not the name of a model")
    if len(value) > _MAX_MODEL_CHARS:
        _refuse("model", f"'model' has {len(value)} characters, the bound is {_MAX_MODEL_CHARS}")
    return value


def _user(value: Any) -> str:
    if not isinstance(value, str):
        _refuse("user", f"'user' is {_kind(value)}, not a string")
    return value


def _is_base64(value: Any) -> bool:
    if value not in (None, "float", "base64"):
        wanted = shown(value) if isinstance(value, str) else _kind(value)
        _refuse(
            "encoding_format",
            f"'encoding_format' is {wanted}; it may be 'float' or 'base64'",
            code="unsupported_encoding_format",
        )
    return bool(value == "base64")


def _dimensions(value: Any, name: str, catalogue: Catalogue) -> int | None:
    if type(value) is not int or value < 1:
        _refuse("dimensions", f"'dimensions' is {_kind(value)}, not a whole number above 0", code="invalid_dimensions")
    allowed = catalogue.widths(name)
    if value not in allowed:
        choice = ", ".join(map(str, allowed)) or "only its own width"
        _refuse(
            "dimensions",
            f"'dimensions' is {value}; model {name!r} has: {choice}",
            code="unsupported_dimensions",
        )
    # The model's own width is no special wish: both spellings share one cache entry and one batch.
    return None if value == catalogue.width(name) else value


def _params(fields: dict[str, Any]) -> bytes:
    """Spell what we do not know ourselves canonically: equal parameters, equal bytes."""
    if fields.keys() <= _OWN_FIELDS:
        return b"{}"
    try:
        params = orjson.dumps({k: v for k, v in fields.items() if k not in _OWN_FIELDS}, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as error:  # what was read may be nested more deeply than can be written
        raise InvalidRequest("a parameter is nested too deeply", code="invalid_parameter") from error
    if len(params) > _MAX_PARAMS_BYTES:
        raise TooLarge(f"the further parameters have {len(params)} bytes, the bound is {_MAX_PARAMS_BYTES}")
    return params


def _spec(space: str, name: str, dimensions: int | None, params: bytes, *, is_tokens: bool) -> tuple[Spec, str]:
    """Say how inputs are to be embedded, and name the space of such vectors."""
    if params == b"{}":
        return _usual_spec(space, name, dimensions, is_tokens)
    spec = Spec(name, dimensions, params, is_tokens)
    return spec, fingerprint(space, spec)


@functools.lru_cache(maxsize=1024)
def _usual_spec(space: str, name: str, dimensions: int | None, is_tokens: bool) -> tuple[Spec, str]:
    """The usual ones are remembered; with callers' parameters there is no end to them."""
    spec = Spec(name, dimensions, b"{}", is_tokens)
    return spec, fingerprint(space, spec)


# --- the inputs ---


def _inputs(value: Any, model: ModelSettings, max_inputs: int) -> tuple[tuple[Input, ...], bool]:
    """
    Tell the four forms apart.

    The cases: (1) nothing; (2) one text; (3) a list, empty or too long; (4) of texts; (5) of token ids, which is one
    input; (6) of lists of token ids, or of tuples of them, which have been looked at; (7) anything else.
    """
    if value is None:
        _refuse("input", "'input' is missing", code="missing_input")
    if isinstance(value, str):
        return (_text(value, None),), False
    if not isinstance(value, list):
        _refuse("input", f"'input' is {_kind(value)}, not a text or a list")
    if not value:
        _refuse("input", "'input' is an empty list", code="empty_input")
    kinds = {type(item) for item in value}
    if kinds == {int}:
        return (_token_ids(value, None, model),), True
    if len(value) > max_inputs:
        _refuse("input", f"'input' has {len(value)} items, the bound is {max_inputs}", code="too_many_inputs")
    if kinds == {str}:
        if "" in value:
            _text("", value.index(""))
        return tuple(value), False
    if kinds <= {list, tuple}:
        return tuple(_token_ids(item, index, model) for index, item in enumerate(value)), True
    if len(kinds) > 1 and kinds <= {str, int, list}:
        found = " and ".join(word for kind, word in _ITEMS.items() if kind in kinds)
        _refuse("input", f"'input' mixes {found}; all items have to be texts, or all token ids")
    index = next(i for i, item in enumerate(value) if type(item) not in (str, int, list))
    _refuse("input", f"'input[{index}]' is {_kind(value[index])}, neither a text nor token ids")


_ITEMS = {str: "texts", int: "numbers", list: "lists"}


def _text(text: str, index: int | None) -> str:
    if not text:
        _refuse("input", f"'{_place(index)}' is an empty string", code="empty_input")
    return text


def _token_ids(ids: list[Any] | tuple[int, ...], index: int | None, model: ModelSettings) -> tuple[int, ...]:
    if not model.token_ids:
        _refuse(
            "input",
            f"'{_place(index)}' is token ids, and this model takes texts only; "
            "with LangChain's OpenAIEmbeddings set check_embedding_ctx_length=False",
            code="token_ids_not_supported",
        )
    if isinstance(ids, tuple):
        return ids  # looked at before
    if not ids:
        _refuse("input", f"'{_place(index)}' is an empty list of token ids", code="empty_input")
    if are_token_ids(ids):
        return tuple(ids)
    wrong = next(item for item in ids if type(item) is not int or not 0 <= item <= MAX_TOKEN_ID)
    _refuse("input", f"'{_place(index)}' holds {_kind(wrong)}, which is no token id (0 to {MAX_TOKEN_ID})")


def _fitted(
    inputs: tuple[Input, ...], model: ModelSettings, *, is_tokens: bool
) -> tuple[tuple[Input, ...], tuple[int, ...]]:
    """Hold each input against the model's bound: reject or cut, as the model's policy says."""
    bound, unit = (model.max_input_tokens, "tokens") if is_tokens else (model.max_input_bytes, "bytes")
    # A text of n characters has at most 4 n bytes: most are settled without encoding them.
    if max(map(len, inputs)) * 4 <= bound:
        return inputs, ()
    size = len if is_tokens else size_bytes
    long = [index for index, item in enumerate(inputs) if size(item) > bound]
    if not long:
        return inputs, ()
    if model.long_input == "reject":
        place = _place(long[0] if len(inputs) > 1 else None)
        _refuse("input", f"'{place}' has {size(inputs[long[0]])} {unit}, the bound is {bound}", code="input_too_long")
    cut = {index: _cut(inputs[index], bound) for index in long}
    if not all(cut.values()):
        _refuse("input", f"the first character of an input passes the bound of {bound} {unit}", code="input_too_long")
    return tuple(cut.get(index, item) for index, item in enumerate(inputs)), tuple(long)


def _cut(item: Input, bound: int) -> Input:
    if isinstance(item, str):
        # A character cut in the middle is left out.
        return item.encode()[:bound].decode(errors="ignore")
    return item[:bound]


# --- the headers ---


def _timeout_s(headers: Mapping[str, str], settings: RequestSettings, priority: Priority) -> float:
    stated = stated_timeout_s(headers, settings)
    return min(settings.timeout_s(priority), _sdk_patience_s(headers)) if stated is None else stated


def _sdk_patience_s(headers: Mapping[str, str]) -> float:
    """
    Return how long OpenAI's SDK waits before it gives up and asks again, less a moment for the way back.

    Answering later would double the load: its next try is on its way already.
    """
    value = headers.get("x-stainless-read-timeout") or headers.get("x-stainless-timeout")
    return _stated_patience_s(value) if value else math.inf


@functools.lru_cache(maxsize=64)
def _stated_patience_s(value: str) -> float:
    """An app states the same with each request."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", value) or float(value) <= 0:
        return math.inf
    return float(value) * 0.95


def _priority(
    headers: Mapping[str, str], inputs: tuple[Input, ...], total_bytes: int, settings: RequestSettings
) -> Priority:
    value = headers.get("X-Embedding-Priority")
    if value is not None:
        try:
            return Priority(value.strip().lower())
        except ValueError:
            _refuse_header("X-Embedding-Priority", value, "'interactive' or 'bulk'")
    is_short = len(inputs) == 1 and total_bytes <= settings.interactive_max_bytes
    return Priority.INTERACTIVE if is_short else Priority.BULK


def _client(headers: Mapping[str, str]) -> str:
    """Return what a caller says of itself: it refines the name that its connection gives it, and cannot replace it."""
    value = headers.get("X-Embedding-Client")
    if value is None:
        return ""
    if not _NAME.fullmatch(value):
        _refuse_header(
            "X-Embedding-Client", value, "1 to 64 letters, digits and . _ : @ / -, the first a letter or a digit"
        )
    return value


def _traceparent(headers: Mapping[str, str]) -> str | None:
    """Return a valid W3C trace context; an invalid one is as good as none, says the recommendation (§4.3)."""
    value = headers.get("traceparent")
    return value if value and _TRACEPARENT.fullmatch(value) else None


# --- words ---


def _refuse(param: str, message: str, *, code: str | None = None) -> NoReturn:
    raise InvalidRequest(message, code=code or f"invalid_{param}", param=param)


def _refuse_header(name: str, value: str, right: str) -> NoReturn:
    raise InvalidRequest(f"header {name} is {shown(value)}; it may be {right}", code="invalid_header", param=name)


def _place(index: int | None) -> str:
    return "input" if index is None else f"input[{index}]"


def _kind(value: Any) -> str:
    """Name a JSON value's kind, and the value itself where it is a number and so no text of anybody."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    names = {str: "a string", list: "a list", dict: "an object", type(None): "null"}
    return names[type(value)]
