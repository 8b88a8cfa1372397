"""Bytes become a request, or an error that says what is wrong and quotes no text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy.base import errors
from proxy.base.errors import InvalidRequest, UnknownModel, WrongContentType
from proxy.base.keys import fingerprint, keys
from proxy.base.messages import Input, Priority, Spec
from proxy.base.settings import Catalogue, ModelSettings, RequestSettings
from proxy.edge.decode import Asked, content_type, decode, request_id

SAME_EACH_TIME = settings(deadline=None, derandomize=True)
NOW = 1000.0
BOUNDS = RequestSettings(
    max_inputs=3, interactive_timeout_s=5, bulk_timeout_s=50, max_timeout_s=100, interactive_max_bytes=8
)
MODELS = {
    "m": ModelSettings(aliases=("nick",), dimensions=8, dimensions_allowed=(4, 2), token_ids=True, max_input_tokens=5),
    "texts": ModelSettings(upstream_model="texts-v2", max_input_bytes=10),
    "cut": ModelSettings(
        space="cut-space",
        upstream_model="cut-v2",
        token_ids=True,
        long_input="truncate",
        max_input_bytes=10,
        max_input_tokens=3,
    ),
}


def ask(
    body: Any, headers: dict[str, str] | None = None, *, models: Any = MODELS, bounds: RequestSettings = BOUNDS
) -> Asked:
    """Decode a body: bytes as they are, anything else as JSON."""
    return decode(
        body if isinstance(body, bytes) else json.dumps(body).encode(),
        CIMultiDict(headers or {}),
        catalogue=Catalogue(models, bounds.default_model),
        settings=bounds,
        request_id="r-7",
        caller="uid:7",
        now=NOW,
    )


def refused(body: Any, headers: dict[str, str] | None = None, **more: Any) -> InvalidRequest:
    """Decode what makes no sense; return the error."""
    with pytest.raises(InvalidRequest) as caught:
        ask(body, headers, **more)
    return caught.value


# --- what makes sense ---


@pytest.mark.parametrize(
    ("given_input", "inputs", "is_tokens"),
    [
        ("a text", ("a text",), False),
        (["a text"], ("a text",), False),
        (["b", "a", "b"], ("b", "a", "b"), False),
        ([1, 2, 3, 4, 5], ((1, 2, 3, 4, 5),), True),
        ([[1, 2], [3], [2**31 - 1, 0]], ((1, 2), (3,), (2**31 - 1, 0)), True),
        ([[0]], ((0,),), True),
        (" ", (" ",), False),
        ("\x00\u2028🙂", ("\x00\u2028🙂",), False),
    ],
)
def test_each_form_of_input(given_input: Any, inputs: tuple[Input, ...], is_tokens: bool) -> None:
    """A text, a list of texts, token ids and a list of token ids come through as they are, each input with its key."""
    asked = ask({"input": given_input})

    request = asked.request
    assert request.inputs == inputs
    assert request.spec.is_tokens is is_tokens
    assert request.keys == keys(request.space, inputs)
    assert asked.truncated == ()


def test_smallest_request() -> None:
    """A request that says nothing but its input gets the defaults of the house."""
    asked = ask({"input": "a text"})

    request = asked.request
    assert request.spec == Spec("m")
    assert (request.id, request.caller) == ("r-7", "uid:7")
    assert request.space == fingerprint("m", Spec("m"))
    assert request.size_bytes == 6
    assert (request.arrived, request.deadline) == (NOW, NOW + 5)
    assert request.priority is Priority.INTERACTIVE
    assert (request.user, request.traceparent) == (None, None)
    assert (request.no_cache, request.no_store) == (False, False)
    assert (asked.base64, asked.model, asked.truncated) == (False, "m", ())


def test_request_that_says_everything() -> None:
    """What a caller states counts."""
    asked = ask(
        {"input": ["é", "b"], "model": "nick", "dimensions": 4, "encoding_format": "base64", "user": "u", "x": [1]},
        {
            "X-Request-Timeout-Ms": "1500",
            "X-Embedding-Priority": "interactive",
            "X-Embedding-Client": "rag@host:1/a-b_c.d",
            "Cache-Control": "no-store",
            "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        },
    )

    request = asked.request
    assert request.spec == Spec("m", 4, b'{"x":[1]}')
    assert request.space == fingerprint("m", request.spec)
    assert request.size_bytes == 3
    assert request.deadline == NOW + 1.5
    assert request.priority is Priority.INTERACTIVE
    assert request.caller == "uid:7/rag@host:1/a-b_c.d"
    assert request.user == "u"
    assert (request.no_cache, request.no_store) == (True, True)
    assert request.traceparent == "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert (asked.base64, asked.model) == (True, "nick")


def test_nulls_that_stand_for_not_given() -> None:
    """A parameter that is null was not given: it changes nothing, not even the key."""
    names = ("model", "dimensions", "encoding_format", "user", "unknown")

    asked = ask({"input": "a text"} | dict.fromkeys(names))

    assert asked == ask({"input": "a text"})


def test_header_names_in_any_case() -> None:
    """Headers are found however they are spelled."""
    asked = ask({"input": "a"}, {"x-request-timeout-ms": "7", "X-EMBEDDING-CLIENT": "app", "CACHE-control": "No-Cache"})

    assert asked.request.deadline == NOW + 0.007
    assert asked.request.caller == "uid:7/app"
    assert asked.request.no_cache


# --- the body ---


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty; send a JSON object with 'input'"),
        (b"   ", "the body is not valid JSON: "),
        (b'{"input": "a', "the body is not valid JSON: "),
        (b'{"input": "a",}', "the body is not valid JSON: "),
        (b'{"input": "a"} {', "the body is not valid JSON: "),
        (b'{"input": NaN}', "the body is not valid JSON: "),
        (b'{"input": "\\ud800"}', "the body is not valid JSON: "),
        (b'{"input": 1e999}', "the body is not valid JSON: "),
        (b"\xef\xbb\xbf{}", "the body is not valid JSON: "),
        (b"[" * 100_000, "the body is not valid JSON: "),
        (b"[]", "the body is a list, not a JSON object"),
        (b'"a text"', "the body is a string, not a JSON object"),
        (b"null", "the body is null, not a JSON object"),
        (b"true", "the body is true, not a JSON object"),
        (b"7", "the body is the number 7, not a JSON object"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_body_that_is_no_json_object(body: bytes, message: str) -> None:
    """A body that cannot be read is refused with what is wrong with it."""
    error = refused(body)

    assert error.message.startswith(message)
    assert (error.code, error.param) == ("invalid_json", None)


def test_place_in_invalid_json() -> None:
    """Line and column say where the JSON breaks."""
    error = refused(b'{\n "input": oops}')

    assert error.message.endswith("(line 2, column 11)")


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"input": "\xff"}', "byte 11 of 14"),
        (b'{"input": "\xc3"}', "byte 11 of 14"),
        (b'{"input": "caf\xe9"}', "byte 14 of 17"),
        ('{"input": "é"}'.encode("utf-16"), "byte 0 of 30"),
        ('{"input": "€"}'.encode("cp1252"), "byte 11 of 14"),
        (b'{"input": "\xed\xa0\x80"}', "byte 11 of 16"),
    ],
    ids=ascii,
)
def test_body_that_is_not_utf_8(body: bytes, place: str) -> None:
    """A body in another encoding is refused with the place of the first byte that tells."""
    error = refused(body)

    assert error.message == f"the body is not UTF-8: {place}"
    assert error.code == "invalid_json"


# --- the input ---


@pytest.mark.parametrize(
    ("given_input", "code", "message"),
    [
        (None, "missing_input", "'input' is missing"),
        ("", "empty_input", "'input' is an empty string"),
        ([], "empty_input", "'input' is an empty list"),
        ([""], "empty_input", "'input[0]' is an empty string"),
        (["a", ""], "empty_input", "'input[1]' is an empty string"),
        ([[]], "empty_input", "'input[0]' is an empty list of token ids"),
        ([[1], []], "empty_input", "'input[1]' is an empty list of token ids"),
        (7, "invalid_input", "'input' is the number 7, not a text or a list"),
        (1.5, "invalid_input", "'input' is the number 1.5, not a text or a list"),
        (True, "invalid_input", "'input' is true, not a text or a list"),
        ({"a": 1}, "invalid_input", "'input' is an object, not a text or a list"),
        ([None], "invalid_input", "'input[0]' is null, neither a text nor token ids"),
        (["a", None], "invalid_input", "'input[1]' is null, neither a text nor token ids"),
        ([1, None], "invalid_input", "'input[1]' is null, neither a text nor token ids"),
        ([{}], "invalid_input", "'input[0]' is an object, neither a text nor token ids"),
        ([True], "invalid_input", "'input[0]' is true, neither a text nor token ids"),
        ([1, False], "invalid_input", "'input[1]' is false, neither a text nor token ids"),
        ([1, 2.5], "invalid_input", "'input[1]' is the number 2.5, neither a text nor token ids"),
        ([-1], "invalid_input", "'input' holds the number -1, which is no token id (0 to 2147483647)"),
        ([2**31], "invalid_input", "'input' holds the number 2147483648, which is no token id (0 to 2147483647)"),
        ([[1, True]], "invalid_input", "'input[0]' holds true, which is no token id (0 to 2147483647)"),
        ([[1], ["a"]], "invalid_input", "'input[1]' holds a string, which is no token id (0 to 2147483647)"),
        ([[[1]]], "invalid_input", "'input[0]' holds a list, which is no token id (0 to 2147483647)"),
        ([[None]], "invalid_input", "'input[0]' holds null, which is no token id (0 to 2147483647)"),
        ([[1.0]], "invalid_input", "'input[0]' holds the number 1.0, which is no token id (0 to 2147483647)"),
    ],
)
def test_input_that_makes_no_sense(given_input: Any, code: str, message: str) -> None:
    """A wrong input is refused with what it is and where it stands."""
    error = refused({"input": given_input})

    assert (error.code, error.message, error.param) == (code, message, "input")


def test_input_that_is_not_there() -> None:
    """Without `input` there is nothing to embed."""
    error = refused({"model": "m"})

    assert (error.code, error.message, error.param) == ("missing_input", "'input' is missing", "input")


@pytest.mark.parametrize("item", ["a", [1]], ids=["texts", "token ids"])
def test_number_of_inputs_at_the_bound(item: Any) -> None:
    """As many inputs as allowed come in, and not one more."""
    below, at = ask({"input": [item] * 2}), ask({"input": [item] * 3})

    error = refused({"input": [item] * 4})

    assert (len(below.request.inputs), len(at.request.inputs)) == (2, 3)
    assert error.code == "too_many_inputs"
    assert error.message == "'input' has 4 items, the bound is 3"


def test_one_list_of_many_token_ids() -> None:
    """A list of token ids is one input, however many they are."""
    asked = ask({"input": [1, 2, 3, 4, 5]})

    assert len(asked.request.inputs) == 1


@pytest.mark.parametrize(("given_input", "place"), [([1, 2], "input"), ([[1], [2]], "input[0]")])
def test_token_ids_for_a_model_of_texts(given_input: Any, place: str) -> None:
    """Where token ids mean nothing they are refused, with what the usual sender of them can do."""
    error = refused({"input": given_input, "model": "texts"})

    assert error.code == "token_ids_not_supported"
    assert error.message.startswith(f"'{place}' is token ids, and this model takes texts only")
    assert "check_embedding_ctx_length=False" in error.message


@pytest.mark.parametrize("given_input", [["a", 7], [7, "a"], [[1], "a"], [[1], 7], ["a", [1], 7]], ids=str)
def test_input_that_mixes_forms(given_input: Any) -> None:
    """A list is of texts or of token ids, never of both."""
    error = refused({"input": given_input})

    assert (error.code, error.param) == ("invalid_input", "input")
    assert error.message.startswith("'input' mixes ")
    assert error.message.endswith("; all items have to be texts, or all token ids")


def test_message_about_a_mixed_list() -> None:
    """What a message says of a list is short, however long the list; token ids are a text, spelled in numbers."""
    bounds = RequestSettings(max_inputs=2048)

    error = refused({"input": ["a", *range(100_000, 102_000)]}, bounds=bounds)

    assert error.code == "invalid_input"
    assert len(error.message) < 500


# --- long inputs ---


@pytest.mark.parametrize(
    ("text", "is_long"),
    [("x" * 9, False), ("x" * 10, False), ("x" * 11, True), ("é" * 5, False), ("é" * 5 + "x", True), ("🙂🙂x", False)],
)
def test_text_at_the_bound(text: str, is_long: bool) -> None:
    """Bytes are counted, not characters; the bound itself is allowed."""
    if not is_long:
        assert ask({"input": text, "model": "texts"}).request.inputs == (text,)
        return
    error = refused({"input": text, "model": "texts"})

    assert (error.code, error.param) == ("input_too_long", "input")
    assert error.message == "'input' has 11 bytes, the bound is 10"


def test_long_text_among_others() -> None:
    """The first text that is too long is named by its position."""
    error = refused({"input": ["x" * 10, "x" * 12, "x" * 11], "model": "texts"})

    assert error.message == "'input[1]' has 12 bytes, the bound is 10"


@pytest.mark.parametrize(("count", "is_long"), [(4, False), (5, False), (6, True)])
def test_token_ids_at_the_bound(count: int, is_long: bool) -> None:
    """Token ids are counted; the bound itself is allowed."""
    if not is_long:
        assert len(ask({"input": [1] * count}).request.inputs[0]) == count
        return
    error = refused({"input": [1] * count})

    assert error.code == "input_too_long"
    assert error.message == "'input' has 6 tokens, the bound is 5"


@pytest.mark.parametrize(
    ("text", "left", "truncated"),
    [
        ("x" * 9, "x" * 9, ()),
        ("x" * 10, "x" * 10, ()),
        ("x" * 11, "x" * 10, (0,)),
        ("é" * 5, "é" * 5, ()),
        ("é" * 6, "é" * 5, (0,)),
        ("x" + "é" * 5, "x" + "é" * 4, (0,)),
        ("x" * 8 + "€", "x" * 8, (0,)),
        ("x" * 7 + "€", "x" * 7 + "€", ()),
        ("x" * 7 + "€x", "x" * 7 + "€", (0,)),
        ("x" * 7 + "🙂", "x" * 7, (0,)),
        ("x" * 6 + "🙂", "x" * 6 + "🙂", ()),
    ],
)
def test_text_that_is_cut(text: str, left: str, truncated: tuple[int, ...]) -> None:
    """A model that truncates cuts at its bound, between characters, and the answer can say so."""
    asked = ask({"input": text, "model": "cut"})

    assert asked.request.inputs == (left,)
    assert asked.truncated == truncated
    assert asked.request.size_bytes == len(left.encode())
    assert asked.request.keys == keys(asked.request.space, [left])


def test_texts_of_which_some_are_cut() -> None:
    """Only the long ones are cut, and their positions are known."""
    asked = ask({"input": ["x" * 11, "y", "z" * 12], "model": "cut"})

    assert asked.request.inputs == ("x" * 10, "y", "z" * 10)
    assert asked.truncated == (0, 2)


@pytest.mark.parametrize(
    ("given_input", "inputs", "truncated"),
    [
        ([1, 2, 3], ((1, 2, 3),), ()),
        ([1, 2, 3, 4], ((1, 2, 3),), (0,)),
        ([[1, 2], [1, 2, 3, 4]], ((1, 2), (1, 2, 3)), (1,)),
    ],
)
def test_token_ids_that_are_cut(given_input: Any, inputs: Any, truncated: tuple[int, ...]) -> None:
    """Token ids are cut at their own bound."""
    asked = ask({"input": given_input, "model": "cut"})

    assert asked.request.inputs == inputs
    assert asked.truncated == truncated


@SAME_EACH_TIME
@given(st.text(alphabet="aé€🙂", min_size=1, max_size=12), st.integers(4, 20))
def test_any_text_that_is_cut(text: str, bound: int) -> None:
    """What is left is the longest beginning that fits the bound."""
    models = {"m": ModelSettings(max_input_bytes=bound, long_input="truncate")}

    asked = ask({"input": text}, models=models)

    [left] = asked.request.inputs
    assert isinstance(left, str)
    assert text.startswith(left)
    assert len(left.encode()) <= bound
    assert left == text or len(text[: len(left) + 1].encode()) > bound
    assert asked.truncated == (() if left == text else (0,))


def test_cut_that_leaves_nothing() -> None:
    """A text of which no character fits is refused: an empty one may not come in at all."""
    models = {"m": ModelSettings(max_input_bytes=2, long_input="truncate")}

    error = refused({"input": "€uro"}, models=models)

    assert error.code == "input_too_long"


# --- the model ---


@pytest.mark.parametrize(
    ("asked_model", "name", "answered"),
    [("m", "m", "m"), ("nick", "m", "nick"), ("texts", "texts", "texts"), (None, "m", "m")],
)
def test_model_that_is_served(asked_model: str | None, name: str, answered: str) -> None:
    """A model is found by name or alias; the answer calls it what the caller called it."""
    asked = ask({"input": "a", "model": asked_model})

    assert asked.request.spec.model == name
    assert asked.model == answered


def test_default_model_of_the_settings() -> None:
    """Who names no model gets the default one, by its own name."""
    bounds = RequestSettings(default_model="texts")

    asked = ask({"input": "a"}, bounds=bounds)

    assert (asked.request.spec.model, asked.model) == ("texts", "texts")


def test_model_that_nobody_serves() -> None:
    """An unknown model is refused with the known ones."""
    error = refused({"input": "a", "model": "ada"})

    assert isinstance(error, UnknownModel)
    assert (error.code, error.param) == ("model_not_found", "model")
    assert error.message == "no model 'ada' here; known: cut, m, nick, texts"


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("", "is empty, not the name of a model"),
        ("m" * 257, "has 257 characters, the bound is 256"),
        (7, "is the number 7, not the name of a model"),
        (["m"], "is a list, not the name of a model"),
        (False, "is false, not the name of a model"),
        ({}, "is an object, not the name of a model"),
    ],
)
def test_model_that_is_no_name(model: Any, says: str) -> None:
    """A model is a name of bounded length."""
    error = refused({"input": "a", "model": model})

    assert (error.code, error.param) == ("invalid_model", "model")
    assert error.message == f"'model' {says}"


def test_longest_name_of_a_model() -> None:
    """256 characters are a name."""
    asked = ask({"input": "a", "model": "m" * 256}, models={"m" * 256: ModelSettings()})

    assert asked.model == "m" * 256


@pytest.mark.parametrize(
    ("model", "space"),
    [("m", "m"), ("nick", "m"), ("texts", "texts-v2"), ("cut", "cut-space")],
)
def test_space_of_a_model(model: str, space: str) -> None:
    """Vectors are of the space that the settings name, else of the upstream's model, else of the model."""
    request = ask({"input": "a", "model": model}).request

    assert request.space == fingerprint(space, request.spec)


# --- the other parameters ---


@pytest.mark.parametrize(("dimensions", "expected"), [(2, 2), (4, 4), (8, None), (None, None)])
def test_width_that_the_model_has(dimensions: int | None, expected: int | None) -> None:
    """An allowed width is asked for; the model's own is no special wish and makes no other key."""
    asked = ask({"input": "a", "dimensions": dimensions})

    assert asked.request.spec.dimensions == expected
    assert (asked.request.keys == ask({"input": "a"}).request.keys) == (expected is None)


@pytest.mark.parametrize(
    ("dimensions", "kind"),
    [
        (0, "the number 0"),
        (-4, "the number -4"),
        (4.0, "the number 4.0"),
        (True, "true"),
        ("4", "a string"),
        ([4], "a list"),
        (2**70, "the number 1.1805916207174113e+21"),
    ],
)
def test_width_that_is_none(dimensions: Any, kind: str) -> None:
    """A width is a whole number above zero, and true is none."""
    error = refused({"input": "a", "dimensions": dimensions})

    assert (error.code, error.param) == ("invalid_dimensions", "dimensions")
    assert error.message == f"'dimensions' is {kind}, not a whole number above 0"


@pytest.mark.parametrize(
    ("model", "choice"), [("m", "2, 4, 8"), ("texts", "only its own width")], ids=["known widths", "unknown width"]
)
def test_width_that_the_model_does_not_have(model: str, choice: str) -> None:
    """A width that is not allowed is refused with those that are."""
    error = refused({"input": "a", "model": model, "dimensions": 3})

    assert (error.code, error.param) == ("unsupported_dimensions", "dimensions")
    assert error.message == f"'dimensions' is 3; model '{model}' has: {choice}"


@pytest.mark.parametrize(("spelled", "is_base64"), [("float", False), ("base64", True), (None, False)])
def test_encoding_that_is_known(spelled: str | None, is_base64: bool) -> None:
    """Floats unless base64 is asked for; how the answer is spelled is no part of the key."""
    asked = ask({"input": "a", "encoding_format": spelled})

    assert asked.base64 is is_base64
    assert asked.request == ask({"input": "a"}).request


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        ("int8", "'int8'"),
        ("BASE64", "'BASE64'"),
        ("", "''"),
        (7, "the number 7"),
        (["float"], "a list"),
        (False, "false"),
    ],
)
def test_encoding_that_is_unknown(spelled: Any, said: str) -> None:
    """Another encoding is refused with the two that there are."""
    error = refused({"input": "a", "encoding_format": spelled})

    assert (error.code, error.param) == ("unsupported_encoding_format", "encoding_format")
    assert error.message == f"'encoding_format' is {said}; it may be 'float' or 'base64'"


def test_user_of_a_request() -> None:
    """Who the end user is travels on and makes no other key."""
    asked, other = ask({"input": "a", "user": "one"}), ask({"input": "a", "user": ""})

    assert (asked.request.user, other.request.user) == ("one", "")
    assert asked.request.keys == other.request.keys


@pytest.mark.parametrize(
    ("user", "kind"), [(7, "the number 7"), (["u"], "a list"), (False, "false"), ({}, "an object")]
)
def test_user_that_is_no_string(user: Any, kind: str) -> None:
    """A user is a string."""
    error = refused({"input": "a", "user": user})

    assert (error.code, error.param, error.message) == ("invalid_user", "user", f"'user' is {kind}, not a string")


def test_parameters_that_we_do_not_know() -> None:
    """Unknown parameters are kept, in one spelling however they came, and are part of space and key."""
    one = ask(b'{"task":"q", "input":"a", "deep":{"b":null,"a":[1, 2.0]}}').request
    same = ask(b'{"deep": {"a": [1,2.0], "b": null}, "input": "\\u0061", "task": "\\u0071"}').request
    other = ask({"input": "a", "task": "d", "deep": {"b": None, "a": [1, 2.0]}}).request
    none = ask({"input": "a"}).request

    assert one.spec.params == b'{"deep":{"a":[1,2.0],"b":null},"task":"q"}'
    assert one == same
    assert len({request.space for request in (one, other, none)}) == 3
    assert len({request.keys for request in (one, other, none)}) == 3


def test_parameter_that_is_nested_too_deeply() -> None:
    """A parameter that cannot be spelled again is the caller's mistake, not a bug of ours."""
    nested = b"[" * 300 + b"]" * 300

    error = refused(b'{"input": "a", "x": ' + nested + b"}")

    assert error.code.startswith("invalid_")


# --- the headers ---


@pytest.mark.parametrize(("value", "seconds"), [("1", 0.001), ("0001500", 1.5), ("99999", 99.999), ("100000", 100.0)])
def test_deadline_that_a_caller_sets(value: str, seconds: float) -> None:
    """A deadline is whole milliseconds, up to the bound of the settings."""
    asked = ask({"input": "a"}, {"X-Request-Timeout-Ms": value})

    assert asked.request.deadline == NOW + seconds


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("X-Request-Timeout-Ms", "0", "a whole number from 1 to 100000"),
        ("X-Request-Timeout-Ms", "100001", "a whole number from 1 to 100000"),
        ("X-Request-Timeout-Ms", "999999999999", "a whole number from 1 to 100000"),
        ("X-Request-Timeout-Ms", "1000000000000", "a whole number from 1 to 100000"),
        ("X-Request-Timeout-Ms", "-1", "a whole number from 1 to 100000"),
        ("X-Request-Timeout-Ms", "+1", "a whole number from 1 to 100000"),
        ("X-Request-Timeout-Ms", "1.5", "a whole number from 1 to 100000"),
        ("X-Request-Timeout-Ms", "10s", "a whole number from 1 to 100000"),
        ("X-Request-Timeout-Ms", "", "a whole number from 1 to 100000"),
        ("X-Request-Timeout-Ms", "٣", "a whole number from 1 to 100000"),
        ("X-Request-Timeout-Ms", "1\n", "a whole number from 1 to 100000"),
        ("X-Embedding-Priority", "high", "'interactive' or 'bulk'"),
        ("X-Embedding-Priority", "", "'interactive' or 'bulk'"),
        ("X-Embedding-Priority", "bulk,bulk", "'interactive' or 'bulk'"),
        ("X-Embedding-Client", "", "1 to 64 letters, digits and . _ : @ / -, the first a letter or a digit"),
        ("X-Embedding-Client", "a b", "1 to 64 letters, digits and . _ : @ / -, the first a letter or a digit"),
        ("X-Embedding-Client", "é", "1 to 64 letters, digits and . _ : @ / -, the first a letter or a digit"),
        ("X-Embedding-Client", "a\n", "1 to 64 letters, digits and . _ : @ / -, the first a letter or a digit"),
        ("X-Embedding-Client", "\udcff", "1 to 64 letters, digits and . _ : @ / -, the first a letter or a digit"),
        ("X-Embedding-Client", "a" * 65, "1 to 64 letters, digits and . _ : @ / -, the first a letter or a digit"),
    ],
    ids=ascii,
)
def test_header_that_makes_no_sense(name: str, value: str, right: str) -> None:
    """A header that makes no sense is refused, not ignored: it is named, shown, and what it may be is said."""
    error = refused({"input": "a"}, {name: value})

    assert (error.code, error.param) == ("invalid_header", name)
    assert error.message.startswith(f"header {name} is '")
    assert error.message.endswith(f"; it may be {right}")
    assert error.message.isprintable()


@pytest.mark.parametrize("value", ["a", "a" * 64, "A9._:@/-"])
def test_caller_that_names_itself(value: str) -> None:
    """What a caller says of itself refines the name that its connection has, and cannot replace it."""
    asked = ask({"input": "a"}, {"X-Embedding-Client": value})

    assert asked.request.caller == f"uid:7/{value}"


@pytest.mark.parametrize(
    ("value", "no_cache", "no_store"),
    [
        ("", False, False),
        ("max-age=0", False, False),
        ("no-cache", True, False),
        ("No-Cache, max-age=0", True, False),
        ("no-store", True, True),
        ("no-cache, no-store", True, True),
    ],
)
def test_cache_control(value: str, no_cache: bool, no_store: bool) -> None:
    """`no-cache` asks anew; `no-store` also leaves nothing behind."""
    request = ask({"input": "a"}, {"Cache-Control": value}).request

    assert (request.no_cache, request.no_store) == (no_cache, no_store)


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
    ids=ascii,
)
def test_trace_context_that_is_invalid(value: str) -> None:
    """An invalid trace context is as good as none, and no reason to refuse the request."""
    assert ask({"input": "a"}, {"traceparent": value}).request.traceparent is None


@pytest.mark.parametrize("value", [f"00-{TRACE}-{SPAN}-00", f"00-{TRACE}-{SPAN}-01", f"00-{'0' * 31}1-{'0' * 15}1-ff"])
def test_trace_context_that_is_valid(value: str) -> None:
    """A valid trace context travels on."""
    assert ask({"input": "a"}, {"traceparent": value}).request.traceparent == value


# --- priority and patience ---


@pytest.mark.parametrize(
    ("given_input", "stated", "priority"),
    [
        ("x" * 7, None, Priority.INTERACTIVE),
        ("x" * 8, None, Priority.INTERACTIVE),
        ("x" * 9, None, Priority.BULK),
        ("é" * 4, None, Priority.INTERACTIVE),
        ("é" * 4 + "x", None, Priority.BULK),
        (["x"], None, Priority.INTERACTIVE),
        (["x", "y"], None, Priority.BULK),
        ([1, 2], None, Priority.INTERACTIVE),
        ([1, 2, 3], None, Priority.BULK),
        ("x", "bulk", Priority.BULK),
        (["x", "y"], "interactive", Priority.INTERACTIVE),
        ("x" * 9, " Interactive ", Priority.INTERACTIVE),
    ],
)
def test_priority_of_a_request(given_input: Any, stated: str | None, priority: Priority) -> None:
    """One short text is interactive and anything else bulk, unless the caller states it; patience follows."""
    headers = {} if stated is None else {"X-Embedding-Priority": stated}

    request = ask({"input": given_input}, headers).request

    assert request.priority is priority
    assert request.deadline == NOW + (5 if priority is Priority.INTERACTIVE else 50)


def test_deadline_of_a_caller_that_states_its_priority_too() -> None:
    """A stated deadline is stronger than that of the priority."""
    request = ask({"input": "a"}, {"X-Embedding-Priority": "bulk", "X-Request-Timeout-Ms": "20"}).request

    assert request.deadline == NOW + 0.02


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"x-stainless-read-timeout": "2"}, 1.9),
        ({"x-stainless-timeout": "4.0"}, 3.8),
        ({"x-stainless-read-timeout": "2", "x-stainless-timeout": "4"}, 1.9),
        ({"x-stainless-read-timeout": "600"}, 5),
        ({"x-stainless-read-timeout": "2", "X-Request-Timeout-Ms": "30000"}, 30),
        ({"x-stainless-read-timeout": "2", "X-Embedding-Priority": "bulk"}, 1.9),
        ({"x-stainless-read-timeout": "0"}, 5),
        ({"x-stainless-read-timeout": ""}, 5),
        ({"x-stainless-read-timeout": "-1"}, 5),
        ({"x-stainless-read-timeout": "None"}, 5),
        ({"x-stainless-read-timeout": "nan"}, 5),
    ],
    ids=str,
)
def test_patience_of_an_sdk(headers: dict[str, str], seconds: float) -> None:
    """An SDK's own time-out shortens the deadline, never lengthens it; a stated one is stronger, nonsense is none."""
    request = ask({"input": "a"}, headers).request

    assert request.deadline - NOW == pytest.approx(seconds, abs=1e-9)


# --- content type and request id ---


@pytest.mark.parametrize(
    "value",
    ["application/json", "application/json; charset=utf-8", " Application/JSON ;x", "application/vnd.api+json"],
)
def test_content_type_that_is_json(value: str) -> None:
    """JSON is JSON under each of its names."""
    content_type(value, "")


@pytest.mark.parametrize(
    "value",
    ["", "text/plain", "text/json", "application/x-www-form-urlencoded", "application/jsonl", "text/x+json", "json\n"],
    ids=ascii,
)
def test_content_type_that_is_none(value: str) -> None:
    """What a browser can post across sites without asking is refused; the message says what to send."""
    with pytest.raises(WrongContentType) as caught:
        content_type(value, "")

    assert "Content-Type: application/json" in caught.value.message
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", "a"),
        ("!~" * 64, "!~" * 64),
        ("x" * 129, None),
        ("", None),
        ("a b", None),
        ("a\n", None),
        ("é", None),
        ("\x7f", None),
    ],
    ids=ascii,
)
def test_request_id_of_a_caller(value: str, expected: str | None) -> None:
    """A caller's id is kept where it is fit for a header and a log line."""
    assert request_id(CIMultiDict({"x-request-id": value})) == expected


def test_request_without_an_id() -> None:
    """No id is none; somebody else makes one up."""
    assert request_id(CIMultiDict()) is None


# --- no text in any message ---

MARK = "Secret7"
CALLERS_TEXT = st.sampled_from([MARK, MARK * 3, f"{MARK}\n{MARK}", f"é{MARK}"])
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**33), st.floats(allow_nan=False, allow_infinity=False), CALLERS_TEXT
)
NESTED = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(CALLERS_TEXT, inner, max_size=2)),
    max_leaves=8,
)
# Names are shown, by design: `model` and `encoding_format` as strings are no texts of anybody.
NAMES = st.one_of(st.sampled_from(["m", "texts", "cut", "other"]), NESTED.filter(lambda value: type(value) is not str))
BODIES = st.fixed_dictionaries(
    {"input": NESTED},
    optional={"model": NAMES, "encoding_format": NAMES, "dimensions": NESTED, "user": NESTED, MARK: NESTED},
)


@settings(SAME_EACH_TIME, max_examples=150)
@given(BODIES)
def test_any_request_with_a_text_in_it(body: dict[str, Any]) -> None:
    """Whatever is wrong with a request, the error quotes no text of it; and nothing but such an error comes out."""
    try:
        ask(body)
    except InvalidRequest as error:
        said = f"{error.message} {error} {error.code} {error.param}"

        assert MARK not in said
        assert len(error.message) < 500


@settings(SAME_EACH_TIME, max_examples=150)
@given(at=st.integers(0, 60), gone=st.integers(0, 3), put=st.binary(max_size=3))
def test_any_broken_body_with_a_text_in_it(at: int, gone: int, put: bytes) -> None:
    """Wherever a body is damaged, the error says where and quotes nothing around it."""
    body = json.dumps({"input": [MARK, MARK], "x": {MARK: MARK}}).encode()

    damaged = body[:at] + put + body[at + gone :]

    try:
        ask(damaged)
    except InvalidRequest as error:
        assert MARK not in f"{error.message} {error} {error.code} {error.param}"


@SAME_EACH_TIME
@given(st.binary(max_size=40))
def test_any_bytes(body: bytes) -> None:
    """Whatever arrives, the worst that comes of it is an error of the caller's."""
    try:
        ask(body)
    except InvalidRequest as error:
        assert error.message


@pytest.mark.parametrize(
    "body",
    [
        f'{{"input": "{MARK}'.encode(),
        f'{{"input": {MARK}}}'.encode(),
        f'{{"input": "a", {MARK}: 1}}'.encode(),
        f'{{"{MARK}" 1}}'.encode(),
        f'{{"input": "{MARK}\\x"}}'.encode(),
        f'{{"input": "{MARK}\xff"}}'.encode("latin-1"),
        f'"{MARK}"'.encode(),
        f'["{MARK}"]'.encode(),
        {"input": {MARK: MARK}},
        {"input": [MARK, ""]},
        {"input": [MARK, None]},
        {"input": [MARK, 1]},
        {"input": [[MARK]]},
        {"input": [MARK] * 4},
        {"input": MARK * 2, "model": "texts"},
        {"input": MARK, "user": [MARK]},
        {"input": MARK, "model": [MARK]},
        {"input": MARK, "model": "other"},
        {"input": MARK, "dimensions": MARK},
        {"input": MARK, "dimensions": 3},
        {"input": MARK, "encoding_format": "other"},
        {"input": MARK, "encoding_format": {MARK: MARK}},
    ],
    ids=lambda body: str(body)[:40],
)
def test_mistake_beside_a_text(body: Any) -> None:
    """Each mistake is told without the text beside it."""
    error = refused(body)

    assert MARK not in f"{error.message} {error} {error.code} {error.param}"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
def test_body_that_is_compressed(encoding: str) -> None:
    """A compressed body is refused: it may be a thousand times larger than what was sent."""
    with pytest.raises(errors.WrongContentType) as caught:
        content_type("application/json", encoding)

    assert repr(encoding) in caught.value.message


def test_body_that_says_it_is_not_compressed() -> None:
    """`identity` is no encoding."""
    content_type("application/json", " Identity ")


def test_parameters_over_their_bound() -> None:
    """Parameters are words and numbers; what is larger than 64 KiB is no parameter."""
    room = 65_536 - len('{"x":""}')
    ask({"input": "a", "x": "y" * room})
    error = refused({"input": "a", "x": "y" * (room + 1)})

    assert type(error) is errors.TooLarge
    assert "65537 bytes, the bound is 65536" in error.message
