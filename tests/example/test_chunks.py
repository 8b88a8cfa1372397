"""Text → passages."""

from __future__ import annotations

import pytest
from rag_service.chunks import chunks

from tests.example.service import ROOT


def test_passage_begins_with_its_heading() -> None:
    """Each one that stands under it, and the text before the first heading has none."""
    found = chunks("Before.\n\n# One\n\nfirst\n\nsecond\n\n## Two\nthird", most_chars=10)

    assert found == ["Before.", "# One\n\nfirst", "# One\n\nsecond", "## Two\n\nthird"]


@pytest.mark.parametrize(("most", "passages"), [(6, 2), (7, 2), (8, 1), (9, 1)])
def test_paragraphs_share_a_passage_while_they_fit(most: int, passages: int) -> None:
    """Two of three characters and the blank line between them are eight."""
    assert len(chunks("abc\n\ndef", most_chars=most)) == passages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three\nfour five", ["one two three", "four five"]),
        ("Number one. Two three", ["Number one.", "Two three"]),
        ("aaaaaaaaa bbbbbbbbbb cc", ["aaaaaaaaa", "bbbbbbbbbb cc"]),
        ("a" * 40, ["a" * 16, "a" * 16, "a" * 8]),
    ],
)
def test_long_paragraph_is_cut_where_it_hurts_least(text: str, expected: list[str]) -> None:
    """At the end of a line, else of a sentence, else of a word, else where it has to be."""
    assert chunks(text, most_chars=16) == expected


@pytest.mark.parametrize("text", ["", " \n\n ", "# Only a heading", "# One\n\n## Two"])
def test_nothing_to_say_is_no_passage(text: str) -> None:
    """A heading alone answers no question."""
    assert chunks(text) == []


def test_no_word_of_a_page_is_lost() -> None:
    """Every word of every page is in its passages, in order."""
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        body = [line for line in text.splitlines() if not line.startswith("#")]
        found = [line for passage in chunks(text) for line in passage.splitlines() if not line.startswith("#")]

        assert " ".join(found).split() == " ".join(body).split(), page.name


def test_heading_as_long_as_a_book() -> None:
    """It stands on each passage, but not all of it: a text does not grow by being cut."""
    text = "# " + "x" * 100_000 + "\n\n" + "word " * 20_000

    assert sum(map(len, chunks(text))) < 1.5 * len(text)
