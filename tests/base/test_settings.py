"""Settings hold what they say, and the catalogue finds a model by all its names."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from proxy.base import settings
from proxy.base.errors import UnknownModel
from proxy.base.messages import Priority
from proxy.base.settings import Catalogue, ModelSettings, RequestSettings, Settings, UpstreamSettings, shown

CLASSES = [cls for cls in vars(settings).values() if isinstance(cls, type) and dataclasses.is_dataclass(cls)]
FIELDS = [
    pytest.param(cls, field, id=f"{cls.__name__}.{field.name}")
    for cls in CLASSES
    for field in dataclasses.fields(cls)
    if field.metadata
]


# --- what is declared ---


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_default_is_allowed(cls: Any, field: Any) -> None:
    """Each default keeps the bounds and choices that a user's value has to keep."""
    value = getattr(cls(), field.name)

    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    assert low is None or value >= low
    assert high is None or value <= high
    # An empty kind stands for "missing": there is no right guess.
    assert not choices or value in choices or (cls is UpstreamSettings and field.name == "kind")


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_setting_explains_itself(cls: Any, field: Any) -> None:
    """Each setting has a sentence, numbers have bounds, and the unit in the name is the unit stated."""
    metadata = field.metadata

    assert metadata["doc"].endswith((".", "…`."))
    if type(getattr(cls(), field.name)) in (int, float):
        assert metadata["low"] is not None
        assert metadata["high"] is not None
    if field.name.endswith("_s"):
        assert metadata["unit"] == "s"
    if field.name.endswith("_bytes"):
        assert metadata["unit"] == "bytes"


def test_two_upstreams_and_their_headers() -> None:
    """A default that is a mapping is a fresh one each time; two upstreams never share their headers."""
    one, other = UpstreamSettings(), UpstreamSettings()

    assert one.headers == {}
    assert one.headers is not other.headers


def test_settings_of_nobody() -> None:
    """Settings are complete without a word from the user."""
    whole = Settings()

    assert whole.request == RequestSettings()
    assert whole.models == {}


@pytest.mark.parametrize(("priority", "seconds"), [(Priority.INTERACTIVE, 3.0), (Priority.BULK, 70.0)])
def test_patience_of_each_priority(priority: Priority, seconds: float) -> None:
    """A request that states no deadline has that of its priority."""
    patience = RequestSettings(interactive_timeout_s=3.0, bulk_timeout_s=70.0)

    assert patience.timeout_s(priority) == seconds


@pytest.mark.parametrize(
    ("own", "allowed", "widths"),
    [
        (0, (), ()),
        (8, (), (8,)),
        (0, (4, 2), (2, 4)),
        (8, (4, 2), (2, 4, 8)),
        (8, (8, 4), (4, 8)),
    ],
)
def test_widths_of_a_model(own: int, allowed: tuple[int, ...], widths: tuple[int, ...]) -> None:
    """A model has its own width, where it is known, and the allowed ones: each once, narrow to wide."""
    catalogue = Catalogue({"m": ModelSettings(dimensions=own, dimensions_allowed=allowed)}, "m")

    assert catalogue.widths("m") == widths


def test_width_that_a_canary_has_shown() -> None:
    """A width that the settings leave open is known as soon as a canary has shown it; a stated one stays."""
    models = {"open": ModelSettings(dimensions_allowed=(4,)), "stated": ModelSettings(dimensions=16)}
    learned: dict[str, int] = {}
    catalogue = Catalogue(models, "open", lambda: learned)
    before = catalogue.width("open"), catalogue.widths("open")
    learned.update(open=8, stated=9)

    assert before == (None, (4,))
    assert (catalogue.width("open"), catalogue.widths("open")) == (8, (4, 8))
    assert catalogue.width("stated") == 16


# --- the catalogue ---

SMALL = ModelSettings(aliases=("tiny", "mini"), dimensions=2)
LARGE = ModelSettings(aliases=("huge",), dimensions=4)
MODELS = {"small": SMALL, "large": LARGE}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("small", ("small", SMALL)),
        ("large", ("large", LARGE)),
        ("tiny", ("small", SMALL)),
        ("mini", ("small", SMALL)),
        ("huge", ("large", LARGE)),
        (None, ("small", SMALL)),
    ],
)
def test_model_by_any_of_its_names(asked: str | None, found: tuple[str, ModelSettings]) -> None:
    """A name or an alias finds its model under its own name; no name finds the first."""
    assert Catalogue(MODELS, "").resolve(asked) == found


@pytest.mark.parametrize("default", ["large", "huge"])
def test_default_that_the_settings_name(default: str) -> None:
    """The default model may be named, also by an alias."""
    assert Catalogue(MODELS, default).resolve(None) == ("large", LARGE)


def test_alias_that_is_another_model_s_name() -> None:
    """A model's own name is stronger than another's alias for it."""
    models = {"a": ModelSettings(dimensions=1), "b": ModelSettings(aliases=("a",), dimensions=2)}

    assert Catalogue(models, "").resolve("a") == ("a", models["a"])


@pytest.mark.parametrize("asked", ["medium", "Small", "small "])
def test_model_that_nobody_serves(asked: str) -> None:
    """An unknown name is refused with all the known ones, sorted; names are taken to the letter."""
    with pytest.raises(UnknownModel) as caught:
        Catalogue(MODELS, "").resolve(asked)

    assert caught.value.message == f"no model '{asked}' here; known: huge, large, mini, small, tiny"
    assert caught.value.param == "model"


def test_catalogue_without_models() -> None:
    """Where nothing is served, no request finds a model, whether it names one or not."""
    with pytest.raises(UnknownModel):
        Catalogue({}, "").resolve(None)


# --- showing ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a name", "'a name'"),
        ("", "''"),
        ("é🙂", "'é🙂'"),
        ("a\nb\r\tc\x1b[31m", "'a?b??c?[31m'"),
        ("a\u2028b\u202ec", "'a?b?c'"),
        ("\udcff", "'?'"),
        ("x" * 64, "'" + "x" * 64 + "'"),
        ("x" * 65, "'" + "x" * 64 + "…'"),
    ],
    ids=ascii,
)
def test_value_shown_in_a_message(value: str, expected: str) -> None:
    """A value is quoted, cut at 64 characters, and shows nothing that could break a log line."""
    assert shown(value) == expected


@hypothesis_settings(deadline=None, derandomize=True)
@given(st.text(alphabet=st.characters(), max_size=80), st.integers(1, 70))
def test_any_value_shown_in_a_message(value: str, limit: int) -> None:
    """Whatever the value, what is shown is one printable line that UTF-8 can spell, and bounded."""
    found = shown(value, limit)

    assert found.isprintable()
    assert len(found.encode().decode()) <= limit + 3
