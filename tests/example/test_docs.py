"""What docs/analysis.md, docs/architecture.md and the example's README show is so."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.example.service import ROOT, Service
from tests.fakes.sidecar import Sidecar

DOCS = ROOT / "docs"
EXAMPLE = DOCS / "examples" / "rag_service" / "README.md"
PAGES = (DOCS / "analysis.md", DOCS / "architecture.md", EXAMPLE)


def blocks(page: Path, language: str) -> list[str]:
    """Return the blocks of a language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def sidecar() -> Iterator[Sidecar]:
    """A proxy with the embedded model."""
    with Sidecar() as sidecar:
        yield sidecar


async def ran(*command: str, **environ: str) -> str:
    """Run a program of the example's environment, and return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *command),
        env={**os.environ, **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.parametrize("number", range(len(blocks(DOCS / "analysis.md", "python"))))
async def test_code_of_the_analysis_runs(sidecar: Sidecar, number: int) -> None:
    """As it stands, against a proxy with the embedded model; what is printed beside it comes out."""
    page = (DOCS / "analysis.md").read_text(encoding="utf-8")
    code = blocks(DOCS / "analysis.md", "python")[number]

    output = await ran("-c", code, EMBEDDING_SIDECAR_SOCKET=sidecar.socket_path)

    shown = re.match(r"```\n\n((?:    .*\n)+)", page.partition(code)[2])
    if shown:
        assert output.splitlines() == [line.strip() for line in shown[1].splitlines()]


async def test_old_method_holds_the_loop_as_long_as_all_its_calls_take() -> None:
    """The script of the analysis prints its table, and the rows say what the page says."""
    output = await ran(str(DOCS / "examples" / "old_method.py"), "3", "--answer-s", "0.1")

    rows = {line[:14].strip(): line[14:].split() for line in output.splitlines() if " s " in line}
    assert rows.keys() == {"old method", "first repair", "adapter"}
    assert float(rows["old method"][5]) >= 0.3  # three calls of 0.1 s, one after the other
    assert [row[-1] for row in rows.values()] == ["0", "0", "0"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """To a file that is there, and to a heading in it."""
    for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_stages_of_the_architecture_are_the_route() -> None:
    """The line of stages is that of the code."""
    route = re.search(r"ROUTE: Final = \{\n(.*?)\n\}", (ROOT / "proxy/wiring/pipeline.py").read_text(), re.DOTALL)
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    line = re.search(r"^    edge\.accept → .*?edge\.encode$", page, re.DOTALL | re.MULTILINE)

    assert route
    assert line
    assert re.findall(r"[a-z]+\.[a-z]+", line[0]) == re.findall(r'^    "([a-z.]+)"', route[1], re.MULTILINE)


async def test_lines_to_paste_work(example: Service) -> None:
    """Those of the README are those of the greeting, and curl gets an answer of 200 from each."""
    pasted = [line.strip() for line in EXAMPLE.read_text(encoding="utf-8").splitlines() if "    curl " in line]
    assert len(pasted) == 3
    for line in pasted:
        line = line.replace("http://127.0.0.1:8000", example.url)
        assert line.replace("  ", " ") in example.greeting
        process = await asyncio.create_subprocess_shell(
            f"{line} --fail", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        await process.communicate()
        assert process.returncode == 0, line
