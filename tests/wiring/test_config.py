"""File and environment become settings, or every mistake is told at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base.settings import KINDS, PROFILES, Settings, UpstreamSettings
from proxy.upstream.translate import Profile, ollama, openai, tei
from proxy.wiring import config
from proxy.wiring.config.profiles import dialect_of, profile_of
from tests.fakes.stage import make_batch

BASE: dict[str, Any] = {
    "upstreams": {"u": {"kind": "openai", "base_url": "http://127.0.0.1:1/v1"}},
    "models": {"m": {"upstreams": ["u"]}},
}
DIGEST = hashlib.sha256(b"a key").hexdigest()
SECRET = "s3cr3t-mark"


class Reader:
    """Writes a file and loads it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "settings.toml"

    def __call__(self, given: str | dict[str, Any], environ: Mapping[str, str] | None = None) -> config.Loaded:
        self.path.write_text(given if isinstance(given, str) else tomli_w.dumps(given), encoding="utf-8")
        return config.load(str(self.path), environ or {})

    def problems(self, given: str | dict[str, Any], environ: Mapping[str, str] | None = None) -> list[str]:
        """Return what is wrong, each without its place among the others; empty when nothing is."""
        try:
            self(given, environ)
        except config.ConfigError as error:
            return error.problems
        return []


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One setting, found by walking the classes."""

    where: tuple[str, ...]
    field: dataclasses.Field[Any]
    kind: Any

    def __str__(self) -> str:
        return ".".join(self.where)

    def table(self, value: Any) -> dict[str, Any]:
        """Return valid tables with this setting in them."""
        table = json.loads(json.dumps(BASE))
        at = table
        for word in self.where[:-1]:
            at = at.setdefault(word, {})
        if self.where[0] == "callers":
            at["key_sha256"] = DIGEST
        at[self.where[-1]] = value
        return table


def leaves(cls: Any = Settings, where: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Name every setting; the tables of names are entered at `u`, `m` and `c`."""
    names = {"upstreams": "u", "models": "m", "callers": "c"}
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            yield from leaves(kind, (*where, field.name))
        elif not where:
            yield from leaves(typing.get_args(kind)[1], (field.name, names[field.name]))
        else:
            yield Leaf((*where, field.name), field, kind)


LEAVES = list(leaves())
BOUNDED = [leaf for leaf in LEAVES if leaf.field.metadata["low"] is not None]
CHOSEN = [leaf for leaf in LEAVES if leaf.field.metadata["choices"]]


def one(problems: list[str]) -> str:
    """Return the only problem."""
    assert len(problems) == 1, problems
    return problems[0]


# --- without a file ---


def test_neither_file_nor_key() -> None:
    """Without a file the embedded model is served, with everything that is known of it filled in."""
    loaded = config.load(None, {})

    assert list(loaded.settings.upstreams) == ["builtin"]
    assert list(loaded.settings.models) == ["wordllama"]
    model = loaded.settings.models["wordllama"]
    assert model.upstreams == ("builtin",)
    assert model.upstream_model == "wordllama"
    assert model.dimensions == 256
    assert model.dimensions_allowed == (64, 128, 256)
    assert model.max_input_bytes == 32_768
    assert loaded.api_keys == {}


def test_openai_key_without_a_file() -> None:
    """With `$OPENAI_API_KEY` OpenAI's three models are served too; the embedded one stays the default."""
    loaded = config.load(None, {"OPENAI_API_KEY": "sk-x"})

    assert list(loaded.settings.models) == [
        "wordllama",
        "text-embedding-3-small",
        "text-embedding-3-large",
        "text-embedding-ada-002",
    ]
    widths = {name: model.dimensions for name, model in loaded.settings.models.items()}
    assert list(widths.values()) == [256, 1536, 3072, 1536]
    assert loaded.settings.models["text-embedding-ada-002"].dimensions_allowed == ()
    assert loaded.settings.models["text-embedding-3-small"].token_ids
    assert loaded.settings.upstreams["openai"].profile == "openai"
    assert loaded.api_keys == {"openai": "sk-x"}


def test_file_with_models_and_openai_key(read: Reader) -> None:
    """A file that names models is the whole truth: `$OPENAI_API_KEY` adds none to it."""
    loaded = read(BASE, {"OPENAI_API_KEY": "sk-x"})

    assert list(loaded.settings.models) == ["m"]
    assert loaded.api_keys == {}


def test_file_without_models(read: Reader) -> None:
    """A file about other things leaves the embedded model as it is."""
    loaded = read({"listen": {"tcp": "off"}})

    assert loaded.settings.listen.tcp == "off"
    assert list(loaded.settings.models) == ["wordllama"]


def test_file_named_by_variable(read: Reader) -> None:
    """`$EMBEDDING_SIDECAR_CONFIG` names the file where the command does not."""
    read(BASE)

    assert list(config.load(None, {"EMBEDDING_SIDECAR_CONFIG": str(read.path)}).settings.models) == ["m"]


def test_file_named_twice(read: Reader, tmp_path: Path) -> None:
    """The command's file goes before the variable's."""
    read(BASE)
    variables = {"EMBEDDING_SIDECAR_CONFIG": str(tmp_path / "none.toml")}

    assert list(config.load(str(read.path), variables).settings.models) == ["m"]


def test_file_variable_is_empty() -> None:
    """An empty `$EMBEDDING_SIDECAR_CONFIG` counts as none."""
    assert list(config.load(None, {"EMBEDDING_SIDECAR_CONFIG": ""}).settings.models) == ["wordllama"]


def test_builtin_model_that_the_file_limits(read: Reader) -> None:
    """What the file says of the embedded model stays; only the rest is filled in."""
    loaded = read(
        {
            "upstreams": {"here": {"kind": "builtin"}},
            "models": {"small": {"upstreams": ["here"], "dimensions_allowed": [64], "max_input_bytes": 1000}},
        }
    )

    model = loaded.settings.models["small"]
    assert model.dimensions_allowed == (64,)
    assert model.max_input_bytes == 1000
    assert model.dimensions == 256
    assert model.upstream_model == "wordllama"


def test_model_of_a_server_beside_the_builtin_one(read: Reader) -> None:
    """What is known of the embedded model is filled in for no other."""
    table = json.loads(json.dumps(BASE))
    table["upstreams"]["here"] = {"kind": "builtin"}
    table["models"]["w"] = {"upstreams": ["here"]}

    loaded = read(table)

    assert loaded.settings.models["m"].dimensions == 0
    assert loaded.settings.models["w"].dimensions == 256


# --- the socket's place ---


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, "/run/user/7/embedding-sidecar.sock"),
        ({}, f"/tmp/embedding-sidecar-{os.getuid()}/embedding-sidecar.sock"),
        ({"EMBEDDING_SIDECAR_SOCKET": "/a/b", "XDG_RUNTIME_DIR": "/run/user/7"}, "/a/b"),
        ({"EMBEDDING_SIDECAR__LISTEN__SOCKET": "/c", "EMBEDDING_SIDECAR_SOCKET": "/a/b"}, "/c"),
    ],
)
def test_socket_that_the_file_does_not_name(variables: dict[str, str], expected: str) -> None:
    """The socket is where the setting says, else `$EMBEDDING_SIDECAR_SOCKET`, else the runtime folder, else /tmp."""
    assert config.load(None, variables).settings.listen.socket == expected


def test_socket_in_file_and_short_variable(read: Reader) -> None:
    """`$EMBEDDING_SIDECAR_SOCKET` is the adapter's too: it counts over the file, or they would miss each other."""
    assert read({"listen": {"socket": "/f"}}, {"EMBEDDING_SIDECAR_SOCKET": "/v"}).settings.listen.socket == "/v"


def test_socket_that_the_file_leaves_empty(read: Reader) -> None:
    """An empty `listen.socket` means what a missing one means: `$EMBEDDING_SIDECAR_SOCKET` first."""
    assert read({"listen": {"socket": ""}}, {"EMBEDDING_SIDECAR_SOCKET": "/v"}).settings.listen.socket == "/v"


# --- mistakes ---


def test_ten_mistakes_in_one_file(read: Reader) -> None:
    """All mistakes are told at once, each with its key, its value where there is one, and a remedy."""
    with pytest.raises(config.ConfigError) as caught:
        read(
            """
            lisen = 1
            [listen]
            tpc = "off"
            socket_mode = 660
            backlog = 0
            max_connections = 2.5
            keepalive_timeout_s = "long"
            allowed_uids = ["me"]
            [log]
            level = "inof"
            [upstreams.u]
            kind = "opanai"
            [models.m]
            token_ids = "yes"
            """
        )

    assert str(caught.value).startswith(f"{read.path}: 11 problems\n  - ")
    assert len(caught.value.problems) == 11
    told = "\n".join(caught.value.problems)
    assert "lisen: no such setting; did you mean 'listen'?" in told
    assert "listen.tpc: no such setting; did you mean 'tcp'?" in told
    assert "listen.socket_mode = 660: is not a text" in told
    assert "listen.backlog = 0: has to be from 1 to 65535 connections" in told
    assert "listen.max_connections = 2.5: is not a whole number" in told
    assert "listen.keepalive_timeout_s = 'long': is not a number" in told
    assert "listen.allowed_uids = ['me']: is not a list of " in told
    assert "log.level = 'inof': may be debug, info, warning, error; did you mean 'info'?" in told
    assert "upstreams.u.kind = 'opanai': may be builtin, openai, ollama, tei; did you mean 'openai'?" in told
    assert "models.m.token_ids = 'yes': is not true or false" in told


def test_single_mistake(read: Reader) -> None:
    """One problem is not called problems."""
    with pytest.raises(config.ConfigError) as caught:
        read({"nothing-of-ours": 1})

    assert str(caught.value) == f"{read.path}: 1 problem\n  - nothing-of-ours: no such setting"


def test_mistake_without_a_file() -> None:
    """Where there is no file, the problems are those of the settings."""
    with pytest.raises(config.ConfigError) as caught:
        config.load(None, {"EMBEDDING_SIDECAR__LISTEN__BACKLOG": "many"})

    assert str(caught.value).startswith("settings: 1 problem\n")


def test_contradictions_beside_what_cannot_be_read(read: Reader) -> None:
    """Contradictions are told in the same breath, but not where something was misread: its default stands there."""
    both = read.problems({"listen": {"socket": "off", "tcp": "off", "backlog": 0}})
    same_place = read.problems({"listen": {"socket_mode": 660}, "upstreams": {"u": 5}, "models": {"m": 5}})

    assert [problem.split(" ")[0] for problem in both] == ["listen.backlog", "listen.tcp"]
    assert [problem.split(":")[0] for problem in same_place] == ["listen.socket_mode = 660", "upstreams.u", "models.m"]


WRONG: dict[Any, tuple[Any, ...]] = {
    str: (5, True, ["a"], {"a": "b"}),
    int: ("5", 1.5, True, [1]),
    float: ("5", True, [1.0]),
    bool: (1, "true", []),
}


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_value_of_a_wrong_type(leaf: Leaf, read: Reader) -> None:
    """A value of another type is refused for every setting, by its key."""
    if typing.get_origin(leaf.kind) is tuple:
        wrong: tuple[Any, ...] = (5, "a", [WRONG[typing.get_args(leaf.kind)[0]][0]], [True])
    else:
        wrong = WRONG.get(leaf.kind, (5, "a", {"x": 1}))
    told = [one(read.problems(leaf.table(value))) for value in wrong]

    assert len(told) >= 3
    for problem in told:
        assert problem.startswith(str(leaf))
        assert ": is not " in problem or ": is a table, write [" in problem


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("listen = 5", "listen: is a table, write [listen]"),
        ("models = true", "models: is a table, write [models.<name>]"),
        ("[upstreams]\na = 'x'", "upstreams.a: is a table, write [upstreams.a]"),
        ("[upstreams.a]\nbatch = 5", "upstreams.a.batch: is a table, write [upstreams.a.batch]"),
        ("[upstreams.a]\nheaders.b = 1", "upstreams.a.headers.b: is not a text"),
        ("[models.'a b']\nspace = 1", 'models."a b".space = 1: is not a text'),
    ],
)
def test_value_in_place_of_a_table(toml: str, expected: str, read: Reader) -> None:
    """A value where a table belongs is answered with how to write the table."""
    assert expected in read.problems(toml)


@pytest.mark.parametrize("kind", [str, int])
def test_list_of_wrong_items_in_words(kind: type, read: Reader) -> None:
    """The sentence about a list reads like one a person would say."""
    key, value, words = {
        str: ("dimensions_allowed", ["a"], "is not a list of whole numbers"),
        int: ("aliases", [1], "is not a list of texts"),
    }[kind]

    assert one(read.problems({**BASE, "models": {"m": {"upstreams": ["u"], key: value}}})).endswith(words)


@pytest.mark.parametrize("leaf", BOUNDED, ids=str)
def test_value_at_a_bound(leaf: Leaf, read: Reader) -> None:
    """Bounds are inclusive: the bound itself is taken, one below and one above is not."""
    low, high = leaf.field.metadata["low"], leaf.field.metadata["high"]
    at_bound = [read.problems(leaf.table(leaf.kind(value))) for value in (low, high)]
    outside = [read.problems(leaf.table(leaf.kind(value))) for value in (low - 1, high + 1)]

    assert not [problem for problems in at_bound for problem in problems if "has to be" in problem]
    for problems in outside:
        assert one(problems).startswith(f"{leaf} = ")
        assert ": has to be from " in problems[0]


@pytest.mark.parametrize("leaf", BOUNDED, ids=str)
def test_bound_as_the_message_spells_it(leaf: Leaf, read: Reader) -> None:
    """The bounds that a message names are the ones that count, written so that they can be pasted."""
    low, high = leaf.field.metadata["low"], leaf.field.metadata["high"]
    problem = one(read.problems(leaf.table(leaf.kind(high + 1))))
    words = problem.partition("has to be from ")[2].split()

    assert words[1] == "to"
    assert float(words[0]) == low
    assert float(words[2]) == high
    assert "e+" not in problem.partition("has to be")[2]
    assert problem.endswith(leaf.field.metadata["unit"])


@pytest.mark.parametrize("spelled", ["nan", "inf", "-inf"])
def test_number_that_is_none(spelled: str, read: Reader) -> None:
    """TOML's nan and inf are in no bounds."""
    assert one(read.problems(f"listen.body_timeout_s = {spelled}")).startswith("listen.body_timeout_s = ")


def test_whole_number_where_any_number_may_stand(read: Reader) -> None:
    """`10` is as good as `10.0`, and becomes it."""
    value = read("listen.body_timeout_s = 10").settings.listen.body_timeout_s

    assert value == 10.0
    assert type(value) is float


def test_number_larger_than_any_float(read: Reader) -> None:
    """A number with hundreds of digits is out of bounds, not the end of the program."""
    assert one(read.problems("listen.body_timeout_s = 1" + "0" * 400)).startswith("listen.body_timeout_s = ")


@pytest.mark.parametrize("leaf", CHOSEN, ids=str)
def test_word_that_is_no_choice(leaf: Leaf, read: Reader) -> None:
    """A word is answered with the words that are allowed, and with the one that was probably meant."""
    choices = leaf.field.metadata["choices"]
    meant = max(choices, key=len)
    strange = one(read.problems(leaf.table("§")))
    close = one(read.problems(leaf.table(meant + "x")))

    assert strange == f"{leaf} = '§': may be {', '.join(choices)}"
    assert close == f"{leaf} = '{meant}x': may be {', '.join(choices)}; did you mean {meant!r}?"


def test_long_value_in_a_message(read: Reader) -> None:
    """A value is shown shortened, and on one line."""
    problem = one(read.problems({"log": {"level": "x\n" * 1000}}))

    assert len(problem) < 200
    assert "\n" not in problem


def test_key_with_a_line_break(read: Reader) -> None:
    """A key cannot break the list of problems into lines of its own."""
    assert "\n" not in one(read.problems('"a\\nb" = 1'))


# --- files that cannot be read ---


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"a = ", "is not valid TOML: "),
        (b"a = 1\na = 2", "is not valid TOML: "),
        (b'a = "\xff"', "is not UTF-8: byte 5"),
    ],
    ids=["missing", "half a line", "a key twice", "not UTF-8"],
)
def test_file_that_cannot_be_read(content: bytes | None, expected: str, tmp_path: Path) -> None:
    """A file that is missing or is no TOML is one problem, with its reason."""
    path = tmp_path / "s.toml"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(config.ConfigError) as caught:
        config.load(str(path), {})

    assert one(caught.value.problems).startswith(expected)
    assert str(path) in str(caught.value)


def test_folder_in_place_of_the_file(tmp_path: Path) -> None:
    """A path that can be opened by nobody as a file says so."""
    with pytest.raises(config.ConfigError, match="cannot be read: Is a directory"):
        config.load(str(tmp_path), {})


# --- the environment ---


def test_every_type_from_the_environment(read: Reader) -> None:
    """Texts, numbers, switches and lists may come from variables, which go over the file."""
    loaded = read(
        {**BASE, "listen": {"tcp": "127.0.0.1:1", "backlog": 5}},
        {
            "EMBEDDING_SIDECAR__LISTEN__TCP": "127.0.0.1:2",
            "EMBEDDING_SIDECAR__LISTEN__BACKLOG": "6",
            "EMBEDDING_SIDECAR__LISTEN__BODY_TIMEOUT_S": "0.5",
            "EMBEDDING_SIDECAR__LISTEN__ALLOWED_UIDS": "1, 2,",
            "EMBEDDING_SIDECAR__MODELS__M__TOKEN_IDS": "False",
            "EMBEDDING_SIDECAR__MODELS__M__ALIASES": "a,b",
            "EMBEDDING_SIDECAR__UPSTREAMS__U__HEADERS__TEAM": "red",
            "EMBEDDING_SIDECAR__UPSTREAMS__U__BATCH__MAX_INPUTS": "7",
            "EMBEDDING_SIDECAR__CALLERS__APP__KEY_SHA256": DIGEST,
        },
    ).settings

    assert (loaded.listen.tcp, loaded.listen.backlog, loaded.listen.body_timeout_s) == ("127.0.0.1:2", 6, 0.5)
    assert loaded.listen.allowed_uids == (1, 2)
    assert loaded.models["m"].token_ids is False
    assert loaded.models["m"].aliases == ("a", "b")
    assert loaded.upstreams["u"].headers == {"team": "red"}
    assert loaded.upstreams["u"].batch.max_inputs == 7
    assert loaded.upstreams["u"].base_url == "http://127.0.0.1:1/v1"
    assert loaded.callers["app"].key_sha256 == DIGEST


def test_switch_turned_on_by_variable(read: Reader) -> None:
    """`true` in any case turns a switch on."""
    table = {**BASE, "upstreams": {"u": {**BASE["upstreams"]["u"], "profile": "openai"}}}

    loaded = read(table, {"EMBEDDING_SIDECAR__MODELS__M__TOKEN_IDS": "TRUE"})

    assert loaded.settings.models["m"].token_ids is True


def test_list_emptied_by_variable(read: Reader) -> None:
    """An empty variable is an empty list."""
    loaded = read({**BASE, "listen": {"allowed_uids": [5]}}, {"EMBEDDING_SIDECAR__LISTEN__ALLOWED_UIDS": ""})

    assert loaded.settings.listen.allowed_uids == ()


def test_everything_from_the_environment() -> None:
    """Upstreams and models may be made of variables alone."""
    loaded = config.load(
        None,
        {
            "EMBEDDING_SIDECAR__UPSTREAMS__LOCAL__KIND": "openai",
            "EMBEDDING_SIDECAR__UPSTREAMS__LOCAL__PROFILE": "llamacpp",
            "EMBEDDING_SIDECAR__MODELS__BGE__UPSTREAMS": "local",
        },
    )

    assert list(loaded.settings.models) == ["bge"]
    assert loaded.settings.upstreams["local"].profile == "llamacpp"


def test_odd_model_name_in_a_variable(read: Reader) -> None:
    """A name's odd characters are underscores in a variable, and find the name in the file."""
    table = {**BASE, "models": {"BAAI/bge-m3": {"upstreams": ["u"]}, "BAAI/bge-m4": {"upstreams": ["u"]}}}

    loaded = read(table, {"EMBEDDING_SIDECAR__MODELS__BAAI_BGE_M3__SPACE": "new"}).settings

    assert list(loaded.models) == ["BAAI/bge-m3", "BAAI/bge-m4"]
    assert loaded.models["BAAI/bge-m3"].space == "new"
    assert loaded.models["BAAI/bge-m4"].space == "BAAI/bge-m4@http://127.0.0.1:1/v1"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("LISTEN__BACKLOG", "1.5", "is not a whole number"),
        ("LISTEN__BACKLOG", "", "is not a whole number"),
        ("LISTEN__BODY_TIMEOUT_S", "10s", "is not a number"),
        ("LISTEN__ALLOWED_UIDS", "1,x", "is not a whole number"),
        ("MODELS__M__TOKEN_IDS", "1", "may be true or false"),
    ],
)
def test_wrong_value_in_a_variable(name: str, value: str, expected: str, read: Reader) -> None:
    """A value that cannot be read is told by the variable's name."""
    variable, where = f"EMBEDDING_SIDECAR__{name}", name.lower().replace("__", ".")

    assert read.problems(BASE, {variable: value}) == [f"${variable}: {where} = '{value}': {expected}"]


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("EMBEDDING_SIDECAR__LISTEN__TPC", "did you mean 'tcp'?"),
        ("EMBEDDING_SIDECAR__LISEN__TCP", "did you mean 'listen'?"),
        ("EMBEDDING_SIDECAR__UPSTREAMS__U__BATCH__INPUTS", "did you mean 'max_inputs'?"),
        ("EMBEDDING_SIDECAR__", "no such setting"),
        ("EMBEDDING_SIDECAR__LISTEN__TCP__X", "listen.tcp"),
    ],
)
def test_variable_that_names_no_setting(variable: str, expected: str, read: Reader) -> None:
    """A variable with our prefix that names nothing is a mistake, not silence."""
    assert expected in one(read.problems(BASE, {variable: "5"}))


@pytest.mark.parametrize(
    "variables",
    [{"EMBEDDING_SIDECAR__LISTEN__TPC": "5"}, {"EMBEDDING_SIDECAR__LISTEN__BACKLOG": "0"}],
    ids=["unknown", "out of bounds"],
)
def test_mistake_of_a_variable_names_it(variables: dict[str, str], read: Reader) -> None:
    """Who looks into the file in vain is told that the value came from the environment."""
    assert f"${next(iter(variables))}" in one(read.problems(BASE, variables))


@pytest.mark.parametrize(
    ("toml", "variables"),
    [
        ("listen = 5", {"EMBEDDING_SIDECAR__LISTEN__TCP": "off"}),
        ("models = 5", {"EMBEDDING_SIDECAR__MODELS__A__SPACE": "x"}),
        ("[models]\na = 5", {"EMBEDDING_SIDECAR__MODELS__A__SPACE": "x"}),
        ("[upstreams.u]\nbatch = 5", {"EMBEDDING_SIDECAR__UPSTREAMS__U__BATCH__MAX_INPUTS": "1"}),
        ("", {"EMBEDDING_SIDECAR__LISTEN": "x", "EMBEDDING_SIDECAR__LISTEN__TCP": "off"}),
        ("listen = 5", {"EMBEDDING_SIDECAR_SOCKET": "/s"}),
    ],
)
def test_variable_below_what_is_no_table(toml: str, variables: dict[str, str], read: Reader) -> None:
    """A variable that reaches into a value of the file leaves the file's mistake to be told."""
    assert any("is a table" in problem for problem in read.problems(toml, variables))


def test_variables_that_kubernetes_makes_up() -> None:
    """A Kubernetes service of our name sets variables with one underscore; they mean nothing to us."""
    variables = {
        "EMBEDDING_SIDECAR_PORT": "tcp://10.0.0.1:8484",
        "EMBEDDING_SIDECAR_PORT_8484_TCP": "tcp://10.0.0.1:8484",
        "EMBEDDING_SIDECAR_PORT_8484_TCP_PROTO": "tcp",
        "EMBEDDING_SIDECAR_SERVICE_HOST": "10.0.0.1",
        "EMBEDDING_SIDECAR_SERVICE_PORT": "8484",
    }

    assert config.load(None, variables) == config.load(None, {})


# --- the way out ---


def far_table(base_url: str = "https://far.example/v1", **transport: Any) -> dict[str, Any]:
    return {**BASE, "upstreams": {"u": {"kind": "openai", "base_url": base_url, "transport": transport}}}


@pytest.mark.parametrize(
    ("base_url", "variables", "expected"),
    [
        ("https://far.example/v1", {}, ""),
        ("https://far.example/v1", {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
        ("https://far.example/v1", {"https_proxy": "http://p:1"}, "http://p:1"),
        ("https://far.example/v1", {"HTTP_PROXY": "http://p:1"}, ""),
        ("http://far.example/v1", {"HTTP_PROXY": "http://p:1", "ALL_PROXY": "http://q:1"}, "http://p:1"),
        ("https://far.example/v1", {"ALL_PROXY": "http://q:1"}, "http://q:1"),
        ("https://far.example/v1", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "other.example"}, "http://p:1"),
        ("https://far.example/v1", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "other.example,far.example"}, ""),
        ("https://far.example/v1", {"HTTPS_PROXY": "http://p:1", "no_proxy": ".example"}, ""),
        ("https://far.example/v1", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, ""),
        ("http://127.0.0.1:1/v1", {"HTTP_PROXY": "http://p:1"}, ""),
        ("http://localhost:1/v1", {"ALL_PROXY": "http://p:1"}, ""),
        ("http://[::1]:1/v1", {"ALL_PROXY": "http://p:1"}, ""),
    ],
)
def test_proxy_of_the_environment(base_url: str, variables: dict[str, str], expected: str, read: Reader) -> None:
    """The usual variables say how to get out; what they except, and this machine, is asked directly."""
    assert read(far_table(base_url), variables).settings.upstreams["u"].transport.http_proxy == expected


def test_proxy_of_file_and_environment(read: Reader) -> None:
    """The file's proxy goes before the environment's, and holds for excepted hosts too."""
    loaded = read(far_table(http_proxy="http://p:1"), {"HTTPS_PROXY": "http://q:1", "NO_PROXY": "*"})

    assert loaded.settings.upstreams["u"].transport.http_proxy == "http://p:1"


def test_proxy_and_the_embedded_model() -> None:
    """The embedded model goes nowhere, so no proxy is in its settings, and a wrong one does it no harm."""
    loaded = config.load(None, {"ALL_PROXY": "socks5://p:1"})

    assert loaded.settings.upstreams["builtin"].transport.http_proxy == ""


@pytest.mark.parametrize("proxy", ["p:1", "socks5://p:1", "https://p:1", "http://", f"http//me:{SECRET}@p"])
@pytest.mark.parametrize("is_variable", [False, True])
def test_proxy_that_cannot_be_used(proxy: str, is_variable: bool, read: Reader) -> None:
    """Another proxy than an HTTP one is a mistake, told without its address: that may hold a password."""
    variables = {"HTTPS_PROXY": proxy} if is_variable else {}
    problem = one(read.problems(far_table(**({} if is_variable else {"http_proxy": proxy})), variables))

    assert problem.startswith("upstreams.u.transport.http_proxy")
    assert "is not http://host:port" in problem
    assert SECRET not in problem


# --- the space of a model ---


@pytest.mark.parametrize(
    ("upstream", "model", "expected"),
    [
        ({}, {}, "m@http://127.0.0.1:1/v1"),
        ({}, {"upstream_model": "theirs"}, "theirs@http://127.0.0.1:1/v1"),
        ({}, {"upstreams": ["v", "u"]}, "m@http://127.0.0.1:2/v1"),
        ({}, {"space": "own"}, "own"),
        ({"base_url": "", "profile": "llamacpp"}, {}, "m@http://127.0.0.1:8080/v1"),
        ({"kind": "builtin"}, {}, "wordllama@builtin"),
        ({"kind": "ollama", "base_url": "http://127.0.0.1:1"}, {}, "m@http://127.0.0.1:1"),
        ({"kind": "ollama", "base_url": ""}, {"upstream_model": "bge-m3"}, "bge-m3@http://127.0.0.1:11434"),
        ({"kind": "tei", "base_url": ""}, {}, "m@http://127.0.0.1:3000"),
        ({"kind": "tei", "base_url": "", "route": "openai"}, {}, "m@http://127.0.0.1:3000"),
    ],
    ids=[
        "plain",
        "other name there",
        "first of two",
        "said",
        "of the profile",
        "builtin",
        "ollama",
        "of ollama",
        "of tei",
        "other route of tei",
    ],
)
def test_space_of_a_model(upstream: dict[str, Any], model: dict[str, Any], expected: str, read: Reader) -> None:
    """A space that nobody has named is the model there, at the first upstream: equal names elsewhere are another."""
    table = {
        "upstreams": {
            "u": {**BASE["upstreams"]["u"], **upstream},
            "v": {"kind": "openai", "base_url": "http://127.0.0.1:2/v1"},
        },
        "models": {"m": {"upstreams": ["u"], **model}},
    }

    assert read(table).settings.models["m"].space == expected


# --- kinds ---


@pytest.mark.parametrize(
    ("upstream", "profile", "url"),
    [
        ({"kind": "openai", "profile": "vllm"}, openai.PROFILES["vllm"], "http://h/embeddings"),
        ({"kind": "openai"}, openai.PROFILES["generic"], "http://h/embeddings"),
        ({"kind": "ollama"}, ollama.PROFILE, "http://h/api/embed"),
        ({"kind": "tei"}, tei.PROFILES["native"], "http://h/embed"),
        ({"kind": "tei", "route": "openai"}, tei.PROFILES["openai"], "http://h/embeddings"),
    ],
    ids=str,
)
def test_profile_and_dialect_of_a_kind(upstream: dict[str, str], profile: Profile, url: str) -> None:
    """Kind, profile and route together say whose habits an upstream has and how it is spoken to."""
    settings = UpstreamSettings(**upstream, base_url="http://h", headers={"X-Team": "a"})
    call = dialect_of("u", settings, "k-1").call(make_batch())

    assert profile_of(settings) is profile
    assert call.url == url
    assert call.headers["Authorization"] == "Bearer k-1"
    assert call.headers["X-Team"] == "a"


def test_stay_of_a_model(read: Reader) -> None:
    """How long Ollama keeps a model is read as the file says it, and sent."""
    settings = read(kind_table("ollama", keep_alive="24h")).settings.upstreams["u"]

    assert json.loads(dialect_of("u", settings, "").call(make_batch()).body)["keep_alive"] == "24h"


def test_embedded_model_has_no_profile() -> None:
    """The embedded model is no server: whoever asks for its profile or its dialect has lost the way."""
    with pytest.raises(ValueError, match="kind 'builtin' has no profile"):
        profile_of(UpstreamSettings(kind="builtin"))
    with pytest.raises(ValueError, match="kind 'builtin' has no profile"):
        dialect_of("u", UpstreamSettings(kind="builtin"), "")


def test_every_kind_and_profile_is_known() -> None:
    """What the settings offer is what there is."""
    kinds = [UpstreamSettings(kind=kind) for kind in KINDS if kind != "builtin"]

    assert all(profile_of(settings) for settings in kinds)
    assert tuple(openai.PROFILES) == PROFILES


# --- secrets ---


def key_table(**upstream: Any) -> dict[str, Any]:
    return {**BASE, "upstreams": {"u": {**BASE["upstreams"]["u"], **upstream}}}


def test_key_from_a_variable(read: Reader) -> None:
    """A key comes from the variable that the upstream names, without the blanks around it."""
    assert read(key_table(api_key_env="MY_KEY"), {"MY_KEY": " k \n"}).api_keys == {"u": "k"}


def test_key_from_a_file(read: Reader, tmp_path: Path) -> None:
    """A key comes from the file that the upstream names, without the line's end."""
    (tmp_path / "key").write_text("k\n", encoding="utf-8")

    assert read(key_table(api_key_file=str(tmp_path / "key"))).api_keys == {"u": "k"}


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_key_variable_that_is_not_set(value: str | None, read: Reader) -> None:
    """A variable that is missing or blank is told, but not its name: keys have been found in that place."""
    variables = {} if value is None else {"MY_KEY": value}

    assert read.problems(key_table(api_key_env="MY_KEY"), variables) == [
        "upstreams.u.api_key_env: the variable of this name is not set; export it"
    ]


def test_key_from_both(read: Reader, tmp_path: Path) -> None:
    """Two places for one key are one too many."""
    problem = one(read.problems(key_table(api_key_env="MY_KEY", api_key_file="/k"), {"MY_KEY": "k"}))

    assert problem == "upstreams.u.api_key_file: api_key_env is given too; keep one of them"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read: No such file or directory"),
        (b" \n", "the file is empty"),
        (b"\xff", "cannot be read: not UTF-8"),
    ],
    ids=["missing", "empty", "not UTF-8"],
)
def test_key_file_without_a_key(content: bytes | None, expected: str, read: Reader, tmp_path: Path) -> None:
    """A key's file that holds none is told by its path."""
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)

    problem = one(read.problems(key_table(api_key_file=str(path))))
    assert problem.startswith("upstreams.u.api_key_file = '")
    assert problem.endswith(expected)


@pytest.mark.parametrize(("path", "is_quoted"), [(SECRET, False), (f"/nowhere/{SECRET}", True), (f"./{SECRET}", True)])
def test_key_in_place_of_its_file(path: str, is_quoted: bool, read: Reader) -> None:
    """Where a path is expected, what looks like none may be the key itself, and is not quoted."""
    problem = one(read.problems(key_table(api_key_file=path)))

    assert problem.startswith("upstreams.u.api_key_file")
    assert problem.endswith(": cannot be read: No such file or directory")
    assert (SECRET in problem) is is_quoted


def test_key_with_a_line_break_inside(read: Reader) -> None:
    """A key that no header can carry is refused here, not at each call."""
    assert "api_key_env" in one(read.problems(key_table(api_key_env="MY_KEY"), {"MY_KEY": "one\ntwo"}))


@pytest.mark.parametrize("headers", [{"X-Team": "one\ntwo"}, {"X Team": "red"}], ids=["value", "name"])
def test_header_that_cannot_be_sent(headers: dict[str, str], read: Reader) -> None:
    """A header that no request can carry is refused here, not at each call."""
    assert "headers" in one(read.problems(key_table(headers=headers)))


def secret_table() -> dict[str, Any]:
    return key_table(
        api_key_env="MY_KEY", headers={"X-Token": SECRET}, transport={"http_proxy": f"http://me:{SECRET}@proxy:1"}
    )


def test_secrets_in_the_repr(read: Reader) -> None:
    """Who logs what was loaded logs no key, no header's value and no password."""
    loaded = read(secret_table(), {"MY_KEY": SECRET})

    assert loaded.api_keys == {"u": SECRET}
    assert SECRET not in repr(loaded)


@pytest.mark.parametrize("spelled", ["http://me:{}@p:1", "http://{}@p:1", "http://me:x@{}@p:1"])
def test_password_of_a_proxy_in_the_table(spelled: str, read: Reader) -> None:
    """A proxy is shown without who we are to it, wherever the signs stand in the password."""
    table = config.as_table(read(far_table(), {"HTTPS_PROXY": spelled.format(SECRET)}).settings)

    assert SECRET not in tomli_w.dumps(table)
    assert table["upstreams"]["u"]["transport"]["http_proxy"].endswith("@p:1")


def test_secrets_in_the_table(read: Reader) -> None:
    """What `show` prints holds no key, no header's value, no password and no digest, but tells that there is one."""
    loaded = read({**secret_table(), "callers": {"app": {"key_sha256": DIGEST}}}, {"MY_KEY": SECRET})

    table = config.as_table(loaded.settings)
    text = tomli_w.dumps(table)
    assert SECRET not in text
    assert DIGEST not in text
    assert table["upstreams"]["u"]["headers"] == {"X-Token": "(hidden)"}
    assert table["callers"]["app"]["key_sha256"] == "(hidden)"


@pytest.mark.parametrize(
    "table",
    [
        {**secret_table(), "listen": {"backlog": 0}},
        {**secret_table(), "listen": {"socket": "off", "tcp": "off"}},
        key_table(api_key=SECRET),
        key_table(api_key_env=f"sk-{SECRET}"),
        key_table(headers=f"Authorization: {SECRET}"),
        key_table(headers={"Authorization": ["Bearer", SECRET]}),
        key_table(base_url=f"http://me:{SECRET}@host/v1"),
        key_table(base_url=f"http://me:{SECRET}@host/v1/embeddings"),
        key_table(base_url=f"ftp://me:{SECRET}@host/v1"),
        {**BASE, "callers": {"app": SECRET}},
        {**BASE, "callers": {"app": {"key_sha256": SECRET}}},
        {**BASE, "callers": {"app": {"key_sha256": [SECRET]}}},
    ],
    ids=[
        "beside a misread value",
        "beside a contradiction",
        "unknown setting",
        "key in place of the variable's name",
        "headers as a text",
        "header as a list",
        "password in the URL",
        "password in the URL with the path",
        "password in an odd URL",
        "caller's key without its table",
        "caller's key in place of its digest",
        "caller's key in a list",
    ],
)
def test_secrets_in_a_message(table: dict[str, Any], read: Reader) -> None:
    """A secret in the wrong place is a mistake to be told without telling the secret: messages end in logs."""
    with pytest.raises(config.ConfigError) as caught:
        read(table, {"MY_KEY": SECRET})

    assert SECRET not in str(caught.value)


# --- settings that contradict each other ---


def model_table(**model: Any) -> dict[str, Any]:
    return {**BASE, "models": {"m": {"upstreams": ["u"], **model}}}


def kind_table(kind: str, **upstream: Any) -> dict[str, Any]:
    return {**BASE, "upstreams": {"u": {"kind": kind, **upstream}}}


def builtin_table(**model: Any) -> dict[str, Any]:
    return {"upstreams": {"here": {"kind": "builtin"}}, "models": {"m": {"upstreams": ["here"], **model}}}


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "nowhere to connect": (
        {"listen": {"socket": "off", "tcp": "off"}},
        "listen.tcp = 'off': listen.socket is off too, so nobody could connect",
    ),
    "mode in decimal": ({"listen": {"socket_mode": "0999"}}, "listen.socket_mode = '0999': is not an octal mode"),
    "mode too long": ({"listen": {"socket_mode": "07777"}}, "listen.socket_mode = '07777': is not an octal mode"),
    "port missing": ({"listen": {"tcp": "127.0.0.1"}}, "listen.tcp = '127.0.0.1': is not host:port, such as"),
    "port above 65535": ({"listen": {"tcp": "127.0.0.1:65536"}}, "listen.tcp = '127.0.0.1:65536': is not host:port"),
    "IPv6 without brackets": ({"listen": {"tcp": "::1:80"}}, "listen.tcp = '::1:80': is not host:port"),
    "open to all without keys": (
        {"listen": {"tcp": "0.0.0.0:8484"}},
        "listen.tcp = '0.0.0.0:8484': is reachable from outside and no client keys are configured; add [callers.",
    ),
    "open to all over IPv6": ({"listen": {"tcp": "[::]:8484"}}, "listen.tcp = '[::]:8484': is reachable from outside"),
    "open by a name": ({"listen": {"tcp": "myhost:8484"}}, "listen.tcp = 'myhost:8484': is reachable from outside"),
    "digest too short": (
        {"callers": {"app": {"key_sha256": DIGEST[:-1]}}},
        "callers.app.key_sha256: is not 64 hexadecimal digits; make it with: printf",
    ),
    "digest missing": ({"callers": {"app": {}}}, "callers.app.key_sha256: is not 64 hexadecimal digits"),
    "room for less than a request's inputs": (
        {"admission": {"max_inputs": 2047}},
        "admission.max_inputs = 2047: is below request.max_inputs = 2048, so a full request could never come in",
    ),
    "room for less than a request's bytes": (
        {"admission": {"max_bytes": 32 * 1024**2 - 1}},
        "admission.max_bytes = 33554431: is below listen.max_body_bytes = 33554432",
    ),
    "interactive patience above the longest": (
        {"request": {"interactive_timeout_s": 601}},
        "request.interactive_timeout_s = 601: is above request.max_timeout_s = 600",
    ),
    "bulk patience above the longest": (
        {"request": {"bulk_timeout_s": 601}},
        "request.bulk_timeout_s = 601: is above request.max_timeout_s = 600",
    ),
    "upstream without a kind": (
        {**BASE, "upstreams": {"u": {"base_url": "http://h"}}},
        "upstreams.u.kind: is missing; it may be builtin, openai, ollama or tei",
    ),
    "upstream without a URL": (
        {**BASE, "upstreams": {"u": {"kind": "openai", "profile": "vllm"}}},
        "upstreams.u.base_url: is missing, and profile 'vllm' has none of its own",
    ),
    "URL without a scheme": (key_table(base_url="h:80/v1"), "upstreams.u.base_url = 'h:80/v1': is not http://host"),
    "URL without a host": (key_table(base_url="http:///v1"), "upstreams.u.base_url = 'http:///v1': is not http://host"),
    "URL with half a bracket": (
        key_table(base_url="http://[::1/v1"),
        "upstreams.u.base_url = 'http://[::1/v1': is not",
    ),
    "URL with a port above 65535": (
        key_table(base_url="http://h:65536"),
        "upstreams.u.base_url = 'http://h:65536': is",
    ),
    "URL with a port in words": (key_table(base_url="http://h:http"), "upstreams.u.base_url = 'http://h:http': is not"),
    "URL of the route itself": (
        key_table(base_url="http://h/v1/embeddings/"),
        "upstreams.u.base_url = 'http://h/v1/embeddings/': leave '/embeddings' out",
    ),
    "URL of Ollama's own route": (
        kind_table("ollama", base_url="http://h/api/embed"),
        "upstreams.u.base_url = 'http://h/api/embed': leave '/api/embed' out, it is appended",
    ),
    "URL of Ollama's other routes": (
        kind_table("ollama", base_url="http://h/v1/"),
        "upstreams.u.base_url = 'http://h/v1/': leave '/v1' out, '/api/embed' stands beside it",
    ),
    "URL of TEI's own route": (
        kind_table("tei", base_url="http://h/embed"),
        "upstreams.u.base_url = 'http://h/embed': leave '/embed' out, it is appended",
    ),
    "URL of TEI's other route": (
        kind_table("tei", base_url="http://h/v1"),
        "upstreams.u.base_url = 'http://h/v1': leave '/v1' out, '/embed' stands beside it",
    ),
    "URL of the route that is asked for": (
        kind_table("tei", route="openai", base_url="http://h/v1/embeddings"),
        "upstreams.u.base_url = 'http://h/v1/embeddings': leave '/embeddings' out, it is appended",
    ),
    "profile of another kind": (
        kind_table("ollama", profile="vllm"),
        "upstreams.u.profile = 'vllm': only kind 'openai' has it, and this is 'ollama'; leave it out",
    ),
    "profile of the embedded model": (
        {"upstreams": {"here": {"kind": "builtin", "profile": "vllm"}}, "models": {"m": {"upstreams": ["here"]}}},
        "upstreams.here.profile = 'vllm': only kind 'openai' has it, and this is 'builtin'; leave it out",
    ),
    "stay of a model that somebody else loads": (
        key_table(keep_alive="24h"),
        "upstreams.u.keep_alive = '24h': only kind 'ollama' has it, and this is 'openai'; leave it out",
    ),
    "route of a server that has one": (
        kind_table("ollama", route="openai"),
        "upstreams.u.route = 'openai': only kind 'tei' has it, and this is 'ollama'; leave it out",
    ),
    "stay in words": (
        kind_table("ollama", keep_alive="long"),
        "upstreams.u.keep_alive = 'long': is no duration such as '30m' or '1h30m', no number of seconds, and not '-1'",
    ),
    "stay without a unit": (kind_table("ollama", keep_alive="1.5"), "upstreams.u.keep_alive = '1.5': is no duration"),
    "token ids for Ollama": (
        {**kind_table("ollama"), "models": {"m": {"upstreams": ["u"], "token_ids": True}}},
        "models.m.token_ids = true: upstream 'u' has kind 'ollama', which is not known to speak cl100k",
    ),
    "widths for a server that has one": (
        {**key_table(profile="llamacpp"), "models": {"m": {"upstreams": ["u"], "dimensions_allowed": [5]}}},
        "models.m.dimensions_allowed = [5]: upstream 'u' has profile 'llamacpp', which does not know 'dimensions'",
    ),
    "URL with a user": (key_table(base_url="http://me@h/v1"), "upstreams.u.base_url: may not hold a user, a query or"),
    "URL with a query": (
        key_table(base_url="http://h/v1?k=v"),
        "upstreams.u.base_url: may not hold a user, a query or",
    ),
    "URL with a fragment": (key_table(base_url="http://h/v1#x"), "upstreams.u.base_url: may not hold a user, a query"),
    "OpenAI without a key": (
        {**BASE, "upstreams": {"u": {"kind": "openai", "profile": "openai"}}},
        "upstreams.u.api_key_env: this upstream needs an API key; name the variable that holds it",
    ),
    "Azure without a key": (
        key_table(profile="azure", base_url="https://a.example/openai/v1"),
        "upstreams.u.api_key_env: this upstream needs an API key; name the variable that holds it",
    ),
    "name of a model that no header can show": (
        {**BASE, "models": {"m\n": {"upstreams": ["u"]}}},
        'models."m?": a name is 1 to 128 visible ASCII characters',
    ),
    "upstream twice": (model_table(upstreams=["u", "u"]), "models.m.upstreams = ['u', 'u']: names one of them twice"),
    "socket that its owner cannot open": ({"listen": {"socket_mode": "0077"}}, "listen.socket_mode = '0077'"),
    "certificates that are not there": (
        key_table(transport={"ca_file": "/nowhere/ca.pem"}),
        "upstreams.u.transport.ca_file = '/nowhere/ca.pem': cannot be read",
    ),
    "certificates that are none": (
        key_table(transport={"client_cert_file": __file__}),
        "upstreams.u.transport: ca_file, client_cert_file and client_key_file are no certificates and key that fit",
    ),
    "client key without its certificate": (
        key_table(transport={"client_key_file": "/nowhere/key.pem"}),
        "upstreams.u.transport",
    ),
    "model that nobody serves": (
        {**BASE, "models": {"m": {}}},
        "models.m.upstreams: is missing; name who serves it: u",
    ),
    "model without any upstreams": (
        {"models": {"m": {}}},
        "models.m.upstreams: is missing; name who serves it: add [upstreams.<name>] first",
    ),
    "upstream with a slip": (
        {"upstreams": {"local": BASE["upstreams"]["u"]}, "models": {"m": {"upstreams": ["locla"]}}},
        "models.m.upstreams = 'locla': no such upstream; did you mean 'local'; known: local",
    ),
    "another model at the embedded one": (
        builtin_table(upstream_model="bge"),
        "models.m.upstream_model = 'bge': the embedded model is 'wordllama'",
    ),
    "width that the embedded model has not": (
        builtin_table(dimensions_allowed=[100]),
        "models.m.dimensions_allowed = [100]: the embedded model has 64, 128, 256",
    ),
    "text too long for the embedded model": (
        builtin_table(max_input_bytes=32_769),
        "models.m.max_input_bytes = 32769: the embedded model takes 32768",
    ),
    "token ids for the embedded model": (
        builtin_table(token_ids=True),
        "models.m.token_ids = true: the embedded model takes texts only",
    ),
    "token ids for a strange tokenizer": (
        model_table(token_ids=True),
        "models.m.token_ids = true: upstream 'u' has profile 'generic', which is not known to speak cl100k",
    ),
    "width of nothing": (
        model_table(dimensions_allowed=[0, 5]),
        "models.m.dimensions_allowed = [0, 5]: widths are above 0",
    ),
    "upstreams without a model": (
        {"upstreams": BASE["upstreams"]},
        "models: there is none; add [models.<name>] with upstreams",
    ),
    "alias of itself": (model_table(aliases=["m"]), "models.m.aliases = 'm': is a name already"),
    "alias twice": (model_table(aliases=["a", "a"]), "models.m.aliases = 'a': is a name already"),
    "alias of two models": (
        {**BASE, "models": {"m": {"upstreams": ["u"], "aliases": ["a"]}, "n": {"upstreams": ["u"], "aliases": ["a"]}}},
        "models.n.aliases = 'a': is a name already",
    ),
    "default with a slip": (
        {**model_table(aliases=["other"]), "request": {"default_model": "othr"}},
        "request.default_model = 'othr': no such model; did you mean 'other'?",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_settings_that_cannot_be_meant(name: str, read: Reader) -> None:
    """Each check across settings finds its case, alone, and says what to do."""
    table, expected = CONTRADICTIONS[name]

    assert one(read.problems(table)).startswith(expected)


@pytest.mark.parametrize(
    "table",
    [
        {"listen": {"socket": "off"}},
        {"listen": {"tcp": "off"}},
        {"listen": {"socket_mode": "600"}},
        {"listen": {"tcp": "localhost:0"}},
        {"listen": {"tcp": "127.9.9.9:65535"}},
        {"listen": {"tcp": "[::1]:8484"}},
        {"listen": {"tcp": "0.0.0.0:8484"}, "callers": {"app": {"key_sha256": DIGEST.upper()}}},
        {"admission": {"max_inputs": 2048, "max_bytes": 32 * 1024**2}},
        {"request": {"interactive_timeout_s": 600, "bulk_timeout_s": 600}},
        key_table(base_url="https://[::1]:8/v1/"),
        key_table(base_url="", profile="llamacpp"),
        key_table(profile="openai", base_url="http://h/v1"),
        {**model_table(token_ids=True), "upstreams": {"u": {**BASE["upstreams"]["u"], "profile": "openai"}}},
        kind_table("ollama"),
        kind_table("ollama", base_url="http://h/ollama", keep_alive="-1"),
        kind_table("ollama", keep_alive=""),
        kind_table("ollama", keep_alive="0"),
        kind_table("ollama", keep_alive="1h30m"),
        kind_table("ollama", keep_alive="-1.5h", profile="generic", route="native"),
        kind_table("tei"),
        kind_table("tei", route="openai", base_url="http://h/v1"),
        kind_table("tei", base_url="http://h/models/embed-small"),
        {**kind_table("tei"), "models": {"m": {"upstreams": ["u"], "dimensions_allowed": [5]}}},
        {"upstreams": {"h": {"kind": "builtin", "keep_alive": "30m"}}, "models": {"m": {"upstreams": ["h"]}}},
        builtin_table(dimensions=256, dimensions_allowed=[64], max_input_bytes=32_768, upstream_model="wordllama"),
        {**model_table(aliases=["a"]), "request": {"default_model": "a"}},
        {**BASE, "request": {"default_model": "m"}},
    ],
)
def test_settings_at_the_edge_of_sense(table: dict[str, Any], read: Reader) -> None:
    """What the checks guard against is refused, and nothing next to it."""
    assert read.problems(table) == []


def test_width_of_the_embedded_model_itself(read: Reader) -> None:
    """The embedded model's own vectors have 256 numbers: another `dimensions` could never pass its canary."""
    assert one(read.problems(builtin_table(dimensions=64))).startswith("models.m.dimensions")


def test_socket_path_at_its_bound(read: Reader) -> None:
    """A path of 100 bytes is taken, one of 101 is not; bytes count, not letters."""
    longest = "/" + "a" * 99
    too_long = [one(read.problems({"listen": {"socket": path}})) for path in (longest + "a", "/" + "ä" * 50)]

    assert read({"listen": {"socket": longest}}).settings.listen.socket == longest
    for problem in too_long:
        assert problem.startswith("listen.socket = ")
        assert problem.endswith(": has 101 bytes, a Unix socket's path may have 100; choose a shorter folder")


@pytest.mark.parametrize(
    "table",
    [
        {"listen": {"socket": "\0abc"}},
        key_table(api_key_file="a\0b"),
        key_table(transport={"ca_file": "a\0b"}),
    ],
    ids=["socket", "key file", "certificates"],
)
def test_path_with_a_null_byte(table: dict[str, Any], read: Reader) -> None:
    """TOML can spell a null byte and no path can hold one: a mistake like others."""
    assert len(read.problems(table)) == 1


# --- after a reload ---


def changed(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, tuple | str):
        return value + type(value)("x")
    return not value if isinstance(value, bool) else value + 1


def test_settings_that_take_a_restart() -> None:
    """Exactly the settings that are declared so are named after a reload that changed everything."""
    old = Settings()
    parts = {}
    expected = []
    for field in dataclasses.fields(old):
        part = getattr(old, field.name)
        if dataclasses.is_dataclass(part):
            values = {f.name: changed(getattr(part, f.name)) for f in dataclasses.fields(part)}
            parts[field.name] = dataclasses.replace(part, **values)
            expected += [f"{field.name}.{f.name}" for f in dataclasses.fields(part) if not f.metadata["reload"]]

    assert list(config.needs_restart(old, Settings(**parts))) == expected
    assert "listen.tcp" in expected
    assert list(config.needs_restart(old, Settings())) == []


def test_models_that_changed(read: Reader) -> None:
    """Upstreams, models and keys never take a restart."""
    new = read({**BASE, "callers": {"app": {"key_sha256": DIGEST}}}).settings

    assert list(config.needs_restart(config.load(None, {}).settings, new)) == []


# --- for people ---


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """Draw valid settings: every bounded number, choice, switch and list, and a few texts."""
    table: dict[str, Any] = {"upstreams": {"u": {}}, "models": {"m": {}}}
    for leaf in LEAVES:
        meta = leaf.field.metadata
        if leaf.kind in (int, float) and draw(st.booleans()):
            numbers = st.integers if leaf.kind is int else st.floats
            value: Any = draw(numbers(leaf.kind(meta["low"]), leaf.kind(meta["high"])))
        elif meta["choices"] and leaf.where[-1] not in ("kind", "profile", "route"):
            value = draw(st.sampled_from(meta["choices"]))
        elif leaf.where[-1] in ("allowed_uids", "dimensions_allowed"):
            value = draw(st.lists(st.integers(1, 10**6), max_size=3))
        elif leaf.where[-1] in ("aliases",):
            value = draw(
                st.lists(st.text(min_size=1).filter(lambda s: s != "m" and s.isprintable()), max_size=3, unique=True)
            )
        elif leaf.where[-1] in ("space", "upstream_model"):
            value = draw(st.text().filter(str.isprintable))
        else:
            continue
        at = table
        for word in leaf.where[:-1]:
            at = at.setdefault(word, {})
        at[leaf.where[-1]] = value
    table["upstreams"]["u"].update(BASE["upstreams"]["u"])
    table["models"]["m"]["upstreams"] = ["u"]
    # What the checks across settings forbid is another test's.
    table.pop("callers", None)
    for part, key in (("admission", "max_inputs"), ("admission", "max_bytes"), ("listen", "max_body_bytes")):
        table.setdefault(part, {}).pop(key, None)
    for key in ("max_inputs", "interactive_timeout_s", "bulk_timeout_s", "max_timeout_s"):
        table.setdefault("request", {}).pop(key, None)
    for key in ("min_slots", "start_slots"):
        table["upstreams"]["u"].get("balance", {}).pop(key, None)
    return table


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(tables())
def test_settings_shown_and_read_again(table: dict[str, Any]) -> None:
    """What `show` prints is a settings file that means the same."""
    with tempfile.TemporaryDirectory() as folder:
        read = Reader(Path(folder))
        first = read(table)
        second = read(config.as_table(first.settings))

    assert second == first


def test_default_settings_shown_and_read_again(read: Reader) -> None:
    """The settings without a file can be printed, kept as a file, and mean the same."""
    variables = {"OPENAI_API_KEY": "sk-x"}
    first = config.load(None, variables)

    assert read(config.as_table(first.settings), variables) == first


def sections(text: str) -> dict[str, dict[str, list[str]]]:
    """Read the reference's tables: by section and setting, its cells."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("## "):
            rows = found.setdefault(line.removeprefix("## ").strip("`[]"), {})
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")]
            rows[cells[0].strip("`")] = cells
    return found


def test_reference_names_every_setting() -> None:
    """The reference has a row for every field of every settings class: default, unit, meaning, and reload or not."""
    found = sections(config.reference())
    expected: dict[str, set[str]] = {}
    for leaf in LEAVES:
        section = ".".join("<name>" if word in "umc" else word for word in leaf.where[:-1])
        expected.setdefault(section, set()).add(leaf.where[-1])
        _, default, unit, text, reload = found[section][leaf.where[-1]]
        value = {} if leaf.field.default is dataclasses.MISSING else leaf.field.default

        assert default == f"`{json.dumps(value)}`", str(leaf)
        assert unit == leaf.field.metadata["unit"], str(leaf)
        assert reload == ("yes" if leaf.field.metadata["reload"] else "restart"), str(leaf)
        assert text.startswith(leaf.field.metadata["doc"].replace("|", "\0")), str(leaf)
        assert leaf.field.metadata["why"].replace("|", "\0") in text, str(leaf)
        for choice in leaf.field.metadata["choices"]:
            assert f"`{choice}`" in text, str(leaf)

    assert {section: set(rows) for section, rows in found.items()} == expected


def test_reference_spells_bounds_that_count() -> None:
    """The bounds in the reference are the exact ones, in digits."""
    found = sections(config.reference())
    for leaf in BOUNDED:
        section = ".".join("<name>" if word in "umc" else word for word in leaf.where[:-1])
        low, high = leaf.field.metadata["low"], leaf.field.metadata["high"]
        text = found[section][leaf.where[-1]][3].partition(" *Why")[0]
        numbers = text.rpartition(". ")[2].rstrip(".").split(" to ")

        assert [float(number) for number in numbers] == [low, high], str(leaf)
        assert "e+" not in "".join(numbers), str(leaf)


def test_reference_is_a_document() -> None:
    """It begins with a section, each with the sentence of its class, and ends with one line's end."""
    text = config.reference()

    assert text.startswith("## `[")
    assert text.endswith("|\n")
    assert "\n\nWhere callers find the proxy, and how patient it is with their connections.\n\n| setting |" in text


def test_walk_finds_the_settings() -> None:
    """The walk that these tests rest on sees all classes: a table of each kind, nested ones too."""
    names = {str(leaf) for leaf in LEAVES}

    assert {"listen.tcp", "upstreams.u.transport.ca_file", "models.m.aliases", "callers.c.key_sha256"} <= names
    assert len(names) > 60
    assert all(not isinstance(leaf.kind, types.UnionType) for leaf in LEAVES)
    assert tomllib.loads(tomli_w.dumps(LEAVES[0].table("x")))["listen"]["socket"] == "x"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("localhost:80", ("localhost", 80)),
    ],
)
def test_address_split(address: str, expected: tuple[str, int]) -> None:
    """host:port and [ipv6]:port fall into two."""
    assert config.host_port(address) == expected


@pytest.mark.parametrize(
    "address", ["", ":80", "h:", "h:x", "h:-1", "h:65536", "h:123456", "::1:80", "[h]:80", "[::1]"]
)
def test_address_that_is_none(address: str) -> None:
    """Anything else is refused with two examples."""
    with pytest.raises(ValueError, match=r"is not host:port, such as 127\.0\.0\.1:8484 or \[::1\]:8484"):
        config.host_port(address)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.255.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("128.0.0.1", False),
        ("::", False),
        ("localhost.example", False),
    ],
)
def test_address_of_this_machine_only(host: str, expected: bool) -> None:
    """Loopback addresses and `localhost` reach this machine only; another name may be anything."""
    assert config.is_loopback(host) is expected


@pytest.mark.parametrize(
    ("balance", "problems"),
    [
        ({"slots": 4, "min_slots": 4, "start_slots": 4}, []),
        ({"slots": 4, "min_slots": 5}, ["min_slots = 5: is above balance.slots = 4"]),
        ({"slots": 4, "start_slots": 5}, ["start_slots = 5: is above balance.slots = 4"]),
        ({"min_slots": 17}, ["min_slots = 17: is above balance.slots = 16, which is the profile's own"]),
        ({"min_slots": 3, "start_slots": 2}, ["start_slots = 2: is below balance.min_slots = 3"]),
    ],
)
def test_slots_that_contradict_each_other(balance: dict[str, int], problems: list[str], read: Reader) -> None:
    """The least, the first and the most number of slots are in this order; the message names both."""
    upstream = {"kind": "openai", "profile": "vllm", "base_url": "http://127.0.0.1:1/v1", "balance": balance}
    if "slots" not in balance:
        upstream["profile"] = "azure"
        upstream["api_key_env"] = "K"
    table = {"upstreams": {"u": upstream}, "models": {"m": {"upstreams": ["u"]}}}

    assert read.problems(table, {"K": "key"}) == [f"upstreams.u.balance.{problem}" for problem in problems]
