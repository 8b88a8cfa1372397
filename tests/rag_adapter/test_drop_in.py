"""The replacement of the old method: same signature, same exceptions, no threads."""

from __future__ import annotations

import ast
import asyncio
import inspect
import logging
import os
import re
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from rag_adapter import drop_in
from rag_adapter.client import EmbeddingClient
from rag_adapter.drop_in import GenerateEmbedding, generate_embedding
from rag_adapter.errors import EmbeddingFailed, InvalidInput, SidecarUnavailable
from rag_adapter.modes import Comparison, ModalEmbedder
from tests.fakes.running import running
from tests.fakes.upstream import FakeUpstream, Fault, vector

ROOT = Path(__file__).resolve().parents[2]


class OldTool:
    """A RAG tool as it was."""

    def __init__(self) -> None:
        self.searched: list[list[float]] = []

    async def retrieve_chunks_from_text(self, text: str) -> list[str]:
        embedding = await self._generate_embedding(text)
        self.searched.append(embedding)
        return ["a chunk"]

    async def _generate_embedding(self, text: str) -> list[float]:
        raise NotImplementedError


class Tool(GenerateEmbedding, OldTool):
    """The same with the drop-in."""

    embedding_dimensions = 8


class ShadowedTool(Tool):
    """The same on its way: it still has the old method, under another name."""

    async def _generate_embedding_old(self, text: str) -> list[float]:
        if text == "fails":
            raise RuntimeError("Failed to generate embedding")
        return [0.5] * 8


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drop-in reads the environment; whoever runs the tests may have set things."""
    for name in list(os.environ):
        if name.startswith(("EMBEDDING_", "OPENAI_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A proxy that starts takes over the logging of its process; here that is pytest's."""
    loggers = [logging.getLogger(name) for name in ("", "embedding_sidecar", "embedding_sidecar.attempt")]
    before = [(logger, logger.level) for logger in loggers]
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers
    for logger, level in before:
        logger.setLevel(level)


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture
async def sidecar(tmp_path: Path, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """A proxy where the drop-in looks for one; afterwards nothing of the drop-in's is open."""
    async with running(tmp_path, upstream.toml()) as proxy:
        monkeypatch.setenv("EMBEDDING_SIDECAR_SOCKET", proxy.socket_path)
        yield
        await drop_in.aclose()


def right(text: str) -> list[float]:
    return [float(x) for x in vector(text, 8)]


def test_signature_is_the_old_one() -> None:
    """`async def _generate_embedding(self, text: str) -> list[float]`, to the letter."""
    old, new = OldTool._generate_embedding, GenerateEmbedding._generate_embedding

    assert inspect.signature(new) == inspect.signature(old)
    assert inspect.iscoroutinefunction(new)


async def test_tool_with_the_drop_in(sidecar: None) -> None:
    """The rest of the class does not notice."""
    tool = Tool()
    chunks = await tool.retrieve_chunks_from_text("a question")

    assert chunks == ["a chunk"]
    assert tool.searched == [right("a question")]
    assert type(tool.searched[0][0]) is float


@pytest.mark.parametrize("text", ["", "  ", "\n\t", None, 7])
async def test_empty_text(text: str) -> None:
    """A ValueError, as ever, and nobody is asked."""
    with pytest.raises(ValueError, match="the text is empty") as caught:
        await Tool()._generate_embedding(text)

    assert type(caught.value) is ValueError


async def test_no_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A RuntimeError that says what to do; its cause is the adapter's own error."""
    monkeypatch.setenv("EMBEDDING_SIDECAR_SOCKET", str(tmp_path / "nobody.sock"))
    with pytest.raises(RuntimeError, match=r"socket_missing: no sidecar at .*: start it with") as e:
        await Tool()._generate_embedding("secret words")
    await drop_in.aclose()

    assert type(e.value) is RuntimeError
    assert isinstance(e.value.__cause__, SidecarUnavailable)
    assert "secret" not in str(e.value)


async def test_text_that_the_upstream_refuses(sidecar: None, upstream: FakeUpstream) -> None:
    """Only an empty text is a ValueError; the upstream's refusal is a failure, as it was."""
    upstream.always = Fault(status=400, body={"error": {"message": "too long", "code": "input_too_long"}})
    with pytest.raises(RuntimeError, match="no embedding, input_too_long") as caught:
        await Tool()._generate_embedding("a text")

    assert not isinstance(caught.value, ValueError)
    assert isinstance(caught.value.__cause__, InvalidInput)


async def test_settings_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a failure too, and no ValueError."""
    monkeypatch.setenv("EMBEDDING_SIDECAR_URL", "localhost")
    with pytest.raises(RuntimeError, match="no embedding, invalid_settings") as caught:
        await Tool()._generate_embedding("a text")
    await drop_in.aclose()

    assert isinstance(caught.value.__cause__, EmbeddingFailed)


async def test_width_is_not_the_index_s(sidecar: None) -> None:
    """A vector that the index would refuse is a failure here already."""

    class Wide(Tool):
        embedding_dimensions = 1536

    with pytest.raises(RuntimeError, match="no embedding, wrong_width: the vector has 8 numbers, and 1536 are"):
        await Wide()._generate_embedding("a text")


async def test_width_is_not_checked(sidecar: None) -> None:
    """Without a width any is right."""
    assert await generate_embedding("a text") == right("a text")


async def test_deadline_of_the_class(sidecar: None, upstream: FakeUpstream) -> None:
    """A class may be more or less patient than the client is by itself."""
    upstream.always = Fault(hang=True)

    class Hasty(Tool):
        embedding_timeout_s = 0.2

    with pytest.raises(RuntimeError, match="no embedding, ") as caught:
        await Hasty()._generate_embedding("a text")

    assert isinstance(caught.value.__cause__, TimeoutError)


async def test_model_of_the_class(sidecar: None) -> None:
    """The sidecar is asked for the model that the class names."""

    class Other(Tool):
        embedding_model = "other"

    with pytest.raises(RuntimeError, match="no embedding, model_not_found"):
        await Other()._generate_embedding("a text")


async def test_hundred_at_once(sidecar: None, upstream: FakeUpstream) -> None:
    """What hung from five on: now no thread is started, and few requests carry all texts."""
    before = threading.active_count()
    tools = [Tool() for _ in range(100)]
    found = await asyncio.gather(*(tool._generate_embedding(f"text {n}") for n, tool in enumerate(tools)))

    assert found == [right(f"text {n}") for n in range(100)]
    assert threading.active_count() == before
    assert len(upstream.seen) < 20


async def test_all_instances_share_one_client(sidecar: None) -> None:
    """One per loop, whoever asks; closed, it is opened anew by the next call."""
    embedder = ModalEmbedder()
    drop_in.use(embedder)
    await Tool()._generate_embedding("a")
    await generate_embedding("b")
    with pytest.raises(RuntimeError, match="has an embedder already"):
        drop_in.use(ModalEmbedder())
    await drop_in.aclose()
    await drop_in.aclose()
    await generate_embedding("c")
    drop_in.use(drop_in._embedder())

    assert drop_in._embedder() is not embedder


def test_loop_after_loop(tmp_path: Path) -> None:
    """Each loop has its own; that of a loop that is gone goes with the next."""

    async def one() -> list[float]:
        async with FakeUpstream() as upstream, running(tmp_path, upstream.toml()) as proxy:
            drop_in.use(ModalEmbedder(sidecar=EmbeddingClient(proxy.socket_path)))
            return await generate_embedding("a text")

    found = [asyncio.run(one()) for _ in range(3)]

    assert found == [right("a text")] * 3
    assert len(drop_in._embedders) == 1


# --- the page ---


def blocks(page: str) -> list[str]:
    """Return the pieces of Python of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["migration.md", "service.md"])
def test_pages_are_python(page: str) -> None:
    """What is shown there can be pasted."""
    for block in blocks(page):
        compile(block, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

    assert blocks(page)


async def test_class_of_the_migration_page(sidecar: None) -> None:
    """The class at the end of the migration searches by the right vector."""
    names: dict[str, Any] = {}
    exec(next(block for block in blocks("migration.md") if "class RetrievalTool(GenerateEmbedding)" in block), names)
    asked: list[tuple[Any, ...]] = []

    class Pool:
        async def fetch(self, *arguments: Any) -> list[dict[str, str]]:
            asked.append(arguments)
            return [{"content": "a chunk"}]

    tool = names["RetrievalTool"](Pool())
    tool.embedding_dimensions, tool.embedding_model = 8, "m"  # those of this test's sidecar
    chunks = await tool.retrieve_chunks_from_text("a question")

    assert chunks == ["a chunk"]
    assert asked[0][1:] == (str(right("a question")), 5)


# --- modes ---


async def test_shadow_of_the_old_method(sidecar: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that has kept its old method answers by it, and the comparison is told."""
    monkeypatch.setenv("EMBEDDING_MODE", "shadow")
    told: asyncio.Queue[Comparison] = asyncio.Queue()
    drop_in.use(ModalEmbedder(report=told.put_nowait))
    found = await ShadowedTool()._generate_embedding("a text")
    comparison = await asyncio.wait_for(told.get(), 10)

    assert found == [0.5] * 8
    assert comparison.cosine is not None
    assert not comparison.is_alike


async def test_old_method_fails_in_shadow(sidecar: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exceptions are the caller's, as they were."""
    monkeypatch.setenv("EMBEDDING_MODE", "shadow")
    with pytest.raises(RuntimeError, match=r"^Failed to generate embedding$"):
        await ShadowedTool()._generate_embedding("fails")


async def test_over_and_back_without_a_restart(
    sidecar: None, upstream: FakeUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shadow, sidecar, direct and back, by a file, within one running app."""
    path = tmp_path / "mode"
    monkeypatch.setenv("EMBEDDING_MODE_FILE", str(path))
    monkeypatch.setenv("EMBEDDING_DIRECT_URL", upstream.base_url)
    monkeypatch.setenv("EMBEDDING_DIRECT_API_KEY", "sk-direct")
    monkeypatch.setenv("EMBEDDING_DIRECT_MODEL", "m")
    tool, found = ShadowedTool(), []
    for number, mode in enumerate(("shadow", "sidecar", "direct", "sidecar")):
        path.write_text(mode)
        os.utime(path, ns=(number, number))
        found.append(await tool._generate_embedding("a text"))

    assert found == [[0.5] * 8, *[right("a text")] * 3]
    assert [seen.headers.get("Authorization") for seen in upstream.seen].count("Bearer sk-direct") == 1


async def test_mode_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a failure like any other."""
    monkeypatch.setenv("EMBEDDING_MODE", "fast")
    with pytest.raises(RuntimeError, match="no embedding, invalid_mode: the embedding mode is 'fast'"):
        await generate_embedding("a text")
    await drop_in.aclose()
