"""The published document says what the edge does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openapi_spec_validator import validate

from proxy.base import errors
from proxy.base.errors import EmbeddingError
from proxy.edge.encode import error_answer
from proxy.wiring.lifecycle import OPEN_PAGES

DOCUMENT = json.loads((Path(__file__).parents[2] / "proxy" / "edge" / "openapi.json").read_text())


def test_document_is_valid_openapi() -> None:
    """It passes the validator of the specification's own tools."""
    validate(DOCUMENT)


def all_errors() -> list[type[EmbeddingError]]:
    return [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, EmbeddingError)]


@pytest.mark.parametrize("error", all_errors(), ids=lambda c: c.__name__)
def test_every_status_of_an_error_is_documented(error: type[EmbeddingError]) -> None:
    """Whatever status the table of errors gives stands in the document."""
    options = {"status": 422} if error is errors.UpstreamRefused else {}
    answer = error_answer(error("why", **options))

    assert str(answer.status) in DOCUMENT["paths"]["/v1/embeddings"]["post"]["responses"]


def test_pages_without_a_key_say_so() -> None:
    """Each page that needs no key is documented as such, and no other is."""
    said = {
        path for path, item in DOCUMENT["paths"].items() if "Needs no key" in item.get("get", {}).get("description", "")
    }

    assert said == OPEN_PAGES
