"""
Text → passages, by its own structure: sections, paragraphs, lines.

Each passage begins with the heading it stands under: a table row means little without it. It counts characters, not
tokens, and passages do not overlap; good enough for prose with headings, and easy to predict. A model with a narrow
window wants its own tokens counted here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MOST_CHARS = 800
"""About 200 tokens of English: a few paragraphs, small enough that a passage is about one thing. The heading comes on
top."""

MOST_HEADING_CHARS = 200
"""It stands on top of each passage, so a long one would come a hundred times."""

_BLANK = re.compile(r"\n\s*\n")
_ENDS = ("\n", ". ", " ")
"""Where a paragraph that is too long may end, the best first."""


def chunks(text: str, most_chars: int = MOST_CHARS) -> list[str]:
    """Cut a text into passages. A heading with nothing under it is none."""
    found: list[str] = []
    heading = body = ""

    def end_passage() -> None:
        nonlocal body
        if body:
            found.append(f"{heading}\n\n{body}" if heading else body)
        body = ""

    for paragraph in filter(None, map(str.strip, _BLANK.split(text))):
        if paragraph.startswith("#"):
            end_passage()
            heading, _, rest = paragraph.partition("\n")
            heading = heading[:MOST_HEADING_CHARS]
        else:
            rest = paragraph
        for piece in _pieces(rest, most_chars):
            if body and len(body) + 2 + len(piece) > most_chars:
                end_passage()
            body += f"\n\n{piece}" if body else piece
    end_passage()
    return found


def _pieces(paragraph: str, most_chars: int) -> Iterator[str]:
    """Cut a paragraph that is too long at the end of a line, a sentence or a word, or where it has to be."""
    while len(paragraph) > most_chars:
        ends = (paragraph.rfind(end, 0, most_chars) + len(end.rstrip(" ")) for end in _ENDS)
        place = next((end for end in ends if end > most_chars // 2), most_chars)
        yield paragraph[:place].rstrip()
        paragraph = paragraph[place:].lstrip()
    if paragraph:
        yield paragraph
