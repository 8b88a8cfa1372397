"""What an upstream's error says, whichever shape it has, and what of it a message may show."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.base.messages import Spec
from proxy.upstream.translate.told import Told, told
from tests.fakes.stage import make_batch


def openai_error(message: str = "", *, kind: Any = None, code: Any = None, param: Any = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# --- shapes ---


@pytest.mark.parametrize(
    ("document", "message", "label"),
    [
        (openai_error("bad input", kind="t", code="c"), "bad input", " (c, t)"),
        (openai_error("bad input", kind="same", code="same"), "bad input", " (same)"),
        (openai_error("bad input", code=400, kind="BadRequestError"), "bad input", " (BadRequestError)"),
        ({"message": "bad input", "code": 422, "type": "Validation"}, "bad input", " (Validation)"),
        ({"error": "bad input", "error_type": "Overloaded"}, "bad input", " (Overloaded)"),
        ({"error": "bad input"}, "bad input", ""),
        ({"detail": "bad input"}, "bad input", ""),
        ({"object": "error", "message": "bad input", "type": "t", "code": 1}, "bad input", " (t)"),
        ({"message": "bad input"}, "bad input", ""),
        ({"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "bad input"}}, "bad input", ""),
        ({"error": {"detail": "bad input"}}, "bad input", ""),
        ({"detail": [{"msg": "bad input"}]}, "", ""),
        ({"error": {"message": ["bad input"]}}, "", ""),
        ({"error": ["bad input"]}, "", ""),
        ({"error": None, "message": "bad input"}, "", ""),
        ([{"error": {"message": "bad input"}}], "", ""),
        ({"error": {"message": "bad input", "code": "a whole sentence in place of a code"}}, "bad input", ""),
        ({"error": {"message": "bad input", "code": "x" * 65, "type": "x" * 64}}, "bad input", " (" + "x" * 64 + ")"),
        ("bad input", "", ""),
        (None, "", ""),
    ],
)
def test_shapes_of_an_error(document: Any, message: str, label: str) -> None:
    """Whatever shape an error has, its words and its machine-readable labels are found, or nothing is."""
    error = told(document)

    assert error.message == message
    assert error.heading("u", 400) == f"upstream 'u' answered HTTP 400{label}"


def test_place_of_an_error() -> None:
    """The parameter that an error names is found, unless it is no name."""
    assert told(openai_error(param="input[3]")).param == "input[3]"
    assert told(openai_error(param="the text 'my pin'")).param == ""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Told(code="insufficient_quota"), True),
        (Told(kind="insufficient_quota"), True),
        (Told(code="project_spend_limit_exceeded"), True),
        (Told(code="rate_limit_exceeded", kind="tokens"), False),
        (Told(message="insufficient_quota"), False),
    ],
    ids=str,
)
def test_error_about_money(error: Told, expected: bool) -> None:
    """A code or a type tells of money; a message does not, as it may quote."""
    assert error.is_quota() is expected


# --- what a message may show ---


LEFT_OUT = "; its words are left out, as they may quote a text"


def shown(message: str, *inputs: Any) -> str:
    """Return what becomes of a message about these inputs."""
    said = Told(message).words(make_batch(inputs or ("unrelated",)))
    return "" if said == LEFT_OUT else said.removeprefix(": ")


def leak(text: str, message: str, length: int = 16) -> str:
    """Return a stretch of the text that stands in the message, if any; what cannot be printed is a space there."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    length = min(length, len(clean))
    stretches = (clean[at : at + length] for at in range(len(clean) - length + 1))
    return next((stretch for stretch in stretches if stretch in message), "")


def test_harmless_message() -> None:
    """A message that quotes nobody is passed on."""
    message = "This model's maximum context length is 8192 tokens, however you requested 9001 tokens."

    assert shown(message, "some text of a caller that is long enough") == message


words = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), max_size=60)
texts = words.map(str.strip)


@given(before=words, text=texts.filter(lambda text: len(text) >= 16), after=words)
@example(before="Bad input: ", text="my pin is 1234 5678", after="")
@example(before="", text="a" * 24 + " words after a long word", after="")
@settings(derandomize=True, deadline=None, max_examples=300)
def test_message_quotes_a_text(before: str, text: str, after: str) -> None:
    """No sixteen characters of a caller's text get out, wherever in a message they stand."""
    assert leak(text, shown(before + text + after, "another", text)) == ""


@given(before=words, text=texts.filter(lambda text: 4 <= len(text) < 16), after=words)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_message_quotes_a_short_text(before: str, text: str, after: str) -> None:
    """A short text does not get out either."""
    assert leak(text, shown(before + text + after, text, "another")) == ""


@pytest.mark.parametrize(
    "text", ["line one of it\nline two of it\nline three", "tab\tby\ttab\tof a longer text", "ab\ncd"]
)
def test_message_quotes_a_text_of_lines(text: str) -> None:
    """Line ends and tabs, which a message shows as spaces, hide no text."""
    assert leak(text, shown(f"invalid: {text}", text)) == ""


def test_message_quotes_the_middle_of_a_text() -> None:
    """A stretch from the middle is found as well as the start."""
    text = "".join(f"word {n} of a page, " for n in range(60))

    assert shown(f"cannot tokenize {text[500:560]}", text) == ""


@pytest.mark.parametrize("text", ["  padded by spaces  ", "padded\n", "\n\n padded by lines, and longer than short \n"])
def test_message_quotes_a_trimmed_text(text: str) -> None:
    """Upstreams trim what they quote; it is recognised all the same."""
    assert leak(text.strip(), shown(f"invalid: {text.strip()}", text)) == ""


def test_message_quotes_another_callers_text() -> None:
    """A batch carries texts of several callers; none of them gets out, whichever is quoted."""
    batch = [f"the secret of caller number {n}" for n in range(20)]

    assert all(shown(f"invalid: {text}", *batch) == "" for text in batch)


def test_words_that_no_error_is_made_of() -> None:
    """What consists of other words than API errors do is left out, even where it is nobody's text."""
    assert shown("bad value 'something that was changed on its way' here") == ""
    assert shown("parameter 'input' is missing") == "parameter 'input' is missing"
    assert (
        shown("`inputs` must have less than 512 tokens. Given: 600")
        == "`inputs` must have less than 512 tokens. Given: 600"
    )


def test_number_of_a_text() -> None:
    """A number that stands in an input is somebody's; others are bounds."""
    assert shown("invalid value 4711", "my pin is 4711") == ""
    assert shown("invalid value 4711", "my pin is 4712") == "invalid value 4711"


@pytest.mark.parametrize(
    "secret",
    [
        "sk-abcdef123456",
        "sk-proj-Abc_123-xyz",
        "sk-****abcd",
        "hf_abcdefghijk",
        "jina_0123456789",
        "A" * 32,
        "b2" * 20 + "==",
    ],
)
def test_message_holds_a_key(secret: str) -> None:
    """A message that holds a key is left out."""
    assert shown(f"Incorrect API key provided: {secret} is not valid") == ""


def test_long_message() -> None:
    """A message over 400 characters is left out: what is that long quotes something."""
    assert shown("too many tokens " * 25) == ("too many tokens " * 25).strip()
    assert shown("too many tokens " * 26) == ""


def test_message_with_control_characters() -> None:
    """Line ends become spaces, other control characters leave the message out: none breaks a log line."""
    assert shown("bad\r\ninput\u2028given") == "bad input given"
    assert shown("bad input\x1b[31m") == ""


def test_token_ids_share_no_words() -> None:
    """Batches of token ids have no texts that a message could quote."""
    batch = make_batch([(1, 2, 3)], spec=Spec("m", is_tokens=True))

    assert Told("token 1, 2, 3 unknown").words(batch) == ": token 1, 2, 3 unknown"


def test_error_without_a_message() -> None:
    """Where nothing was said, nothing is said to have been left out."""
    assert Told().words(make_batch()) == ""


@pytest.mark.parametrize(
    "message",
    [
        "Input validation error: `inputs` must have less than 512 tokens. Given: 600",
        "batch size 33 > maximum allowed batch size 32",
        "`dimensions` should be smaller than the maximum embedding dimension.",
        "the input length exceeds the context length",
        "invalid input type",
        "missing request body",
    ],
)
def test_words_of_tei_and_ollama(message: str) -> None:
    """What TEI and Ollama refuse a request with is passed on: it says what the caller can mend."""
    assert shown(message) == message
