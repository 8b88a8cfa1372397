"""The docs say what the code does."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from proxy.base.settings import KINDS
from proxy.upstream.translate import ollama, openai, tei
from proxy.watch.telemetry import PREFIX, Telemetry
from proxy.wiring.config import reference

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def tables(page: str) -> list[list[str]]:
    """Return the cells of every table row of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    rows = [line.strip()[1:-1].split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows]


def test_every_setting_is_documented_as_declared() -> None:
    """docs/configuration.md ends with the reference that the classes give; `make docs` writes it."""
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")

    assert page.endswith("<!-- from here on written by `make docs` -->\n\n" + reference())


def codes_in_source() -> set[str]:
    """Every error code that the source spells, and those it makes of a field's name."""
    codes = {"invalid_input", "invalid_model", "invalid_user"}
    for path in (ROOT / "proxy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                codes.add(node.value.value)
            elif isinstance(node, ast.ClassDef):
                codes |= {
                    statement.value.value
                    for statement in node.body
                    if isinstance(statement, ast.Assign)
                    and isinstance(statement.targets[0], ast.Name)
                    and statement.targets[0].id == "code"
                    and isinstance(statement.value, ast.Constant)
                }
    return codes - {None}


def test_every_error_code_is_documented() -> None:
    """docs/errors.md knows each code that the proxy gives, and none that it does not."""
    listed = {code for row in tables("errors.md") for code in re.findall(r"`([a-z_]+)`", row[0])}
    only_logged = {"write_timeout"}

    assert listed == codes_in_source() - only_logged


def test_profiles_are_documented_as_they_are() -> None:
    """The table of profiles in docs/upstreams.md has the numbers of the code."""
    others = {"ollama": ollama.PROFILE, "tei": tei.PROFILES["native"], "tei, openai": tei.PROFILES["openai"]}
    profiles = {f"`{name}`": profile for name, profile in {**openai.PROFILES, **others}.items()}
    rows = {row[0]: row[1:] for row in tables("upstreams.md") if row[0] in profiles and len(row) > 2}
    words = {True: "yes", False: "no"}

    assert rows == {
        name: [
            f"`{p.base_url}`" if p.base_url else "",
            words[p.has_base64],
            words[p.has_dimensions],
            words[p.has_user],
            words[p.speaks_cl100k],
            str(p.max_inputs),
            str(p.max_bytes),
            str(p.max_tokens or ""),
            str(p.slots),
            str(p.start_slots),
            f"{p.keepalive_s:g}",
            f"{p.abandoned_s:g}",
            f"{p.first_answer_s:g}" if p.first_answer_s else "",
        ]
        for name, p in profiles.items()
    }


def test_kinds_are_documented() -> None:
    """The table of kinds in docs/upstreams.md knows each, and no other."""
    listed = [row[0].strip("`") for row in tables("upstreams.md") if len(row) == 2 and row[0].startswith("`")]

    assert tuple(listed) == KINDS


def test_every_metric_is_documented() -> None:
    """docs/operations.md lists each metric with its type and labels."""
    telemetry = Telemetry()
    suffix = {"counter": "_total"}
    found = {}
    for family in telemetry.registry.collect():
        if family.name.startswith(PREFIX):
            name = family.name.removeprefix(f"{PREFIX}_") + suffix.get(family.type, "")
            found[f"`{name}`"] = family.type
    listed = {
        row[0]: row[1]
        for row in tables("operations.md")
        if len(row) == 4 and row[1] in ("counter", "gauge", "histogram")
    }

    assert listed == found


def test_links_between_pages_lead_somewhere() -> None:
    """No page points at a file that is not there."""
    for page in [ROOT / "README.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
