"""
The examples of docs/frameworks.md do what they show, as they stand there.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "frameworks.md"
EXAMPLES = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))

FINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "LangChain": lambda names: names["documents"][0].page_content,
    "LlamaIndex": lambda names: names["found"][0].get_content(),
    "Haystack": lambda names: names["result"]["retriever"]["documents"][0].content,
    "Chroma": lambda names: names["found"]["documents"][0][0],
}


@pytest.mark.parametrize("framework", FINDS)
def test_example(framework: str, embedded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each retrieves the passage about yeast, from the sidecar that the environment names."""
    monkeypatch.setenv("EMBEDDING_SIDECAR_SOCKET", embedded.socket_path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", EXAMPLES[framework], re.DOTALL)
    names: dict[str, Any] = {}

    for block in blocks:
        exec(compile(block, f"{PAGE.name}: {framework}", "exec"), names)

    assert blocks
    assert "yeast" in FINDS[framework](names)
