"""
The house stands: floors, rooms, homes of libraries, and a listing that tells the route.

Reads the imports of every file in proxy/ and rag_adapter/.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.wiring.pipeline import ROUTE

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"base": 1, "edge": 2, "funnel": 2, "upstream": 2, "watch": 2, "wiring": 3}

# Within a room files do not know each other either, but for these: each leads to a pure file.
NEIGHBOURS = {
    ("edge.accept", "edge.encode"),
    ("edge.accept", "edge.decode"),
    ("edge.accept", "edge.decode.lists"),
    ("edge.accept.call", "edge.decode"),
    ("upstream.transport", "upstream.translate"),
    ("upstream.transport", "upstream.vectors"),
    ("upstream.transport.pool", "upstream.translate"),
    ("upstream.builtin", "upstream.vectors"),
    ("upstream.translate.openai", "upstream.translate.told"),
    ("upstream.translate.ollama", "upstream.translate.told"),
    ("upstream.translate.tei", "upstream.translate.told"),
    ("upstream.translate.tei", "upstream.translate.openai"),
}

# Replacing a library is a change to one file.
HOMES = {
    "aiohttp": {
        "edge.accept",
        "edge.accept.body",
        "upstream.attempt",
        "upstream.transport",
        "upstream.transport.pool",
        "wiring.connection",
        "wiring.server",
    },
    "aiohttp_retry": {"upstream.attempt"},
    "aiolimiter": {"upstream.bucket"},
    "pybreaker": {"upstream.circuit"},
    "prometheus_client": {"watch.telemetry"},
    "opentelemetry": {"watch.telemetry"},
    "wordllama": {"upstream.builtin"},
    "numpy": {"edge.encode", "upstream.vectors", "upstream.balance.canary", "upstream.builtin"},
    "orjson": {
        "edge.accept",
        "edge.decode",
        "edge.decode.lists",
        "edge.encode",
        "upstream.translate.ollama",
        "upstream.translate.openai",
        "upstream.translate.tei",
        "upstream.vectors",
        "watch.log",
        "wiring.lifecycle",
    },
    "pybase64": {"edge.encode", "upstream.vectors"},
    "tomli_w": {"wiring.cli"},
    "uvloop": {"wiring.cli"},
    "yarl": {"upstream.transport.pool"},
}

# The adapter, from the bottom: a file looks down. A folder is one piece.
ADAPTER = (
    {"errors", "fork", "tally", "trace"},
    {"address"},
    {"wire"},
    {"many", "reach", "settings"},
    {"exchange", "outbox", "sockets"},
    {"desk"},
    {"blocking", "client"},
    {"modes", "retrieval", "supervise"},
    {"chroma", "drop_in", "haystack", "langchain", "llamaindex", "service"},
)

# It installs light: beside aiohttp, what a file imports is there only where an app has it.
ADAPTER_HOMES = {
    "aiohttp": {"exchange"},
    "chromadb": {"chroma"},
    "haystack": {"haystack"},
    "langchain_core": {"langchain"},
    "llama_index": {"llamaindex"},
    "numpy": {"blocking", "chroma", "client", "many", "retrieval", "wire"},
    "tqdm": {"haystack"},
}

# Another end of the journey, in place of translate and transport: not a station on the way.
ENDS = {"upstream.builtin"}


def files() -> dict[str, Path]:
    """Name each file of the proxy without `proxy.` and `.py`: `funnel.cache`, `upstream.translate.openai`."""
    found = {}
    for path in sorted((ROOT / "proxy").rglob("*.py")):
        parts = path.relative_to(ROOT / "proxy").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "__init__"] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Name what a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = files()


def inner_imports(name: str) -> set[str]:
    known = {imported.removeprefix("proxy.") for imported in imports(FILES[name]) if imported.startswith("proxy.")}
    return {imported for imported in known if imported in FILES}


@pytest.mark.parametrize("name", [name for name in FILES if name.partition(".")[0] in FLOORS])
def test_file_looks_down_not_sideways(name: str) -> None:
    """A file imports from floors below its own, and from its own room only where NEIGHBOURS says so."""
    room = name.partition(".")[0]
    for imported in inner_imports(name):
        other = imported.partition(".")[0]
        if other == room:
            is_pair = any(name == a and (imported == b or imported.startswith(b + ".")) for a, b in NEIGHBOURS)
            # A stage that is a folder is one piece: its files know each other.
            is_own_folder = name.split(".")[1:2] == imported.split(".")[1:2]
            assert FLOORS[room] in (1, 3) or imported == room or is_pair or is_own_folder, f"{name} → {imported}"
        else:
            assert FLOORS[other] < FLOORS[room], f"{name} → {imported}"


@pytest.mark.parametrize("name", FILES)
def test_library_stays_at_home(name: str) -> None:
    """Each library is imported in its home only; the floor below imports nothing but the standard library."""
    for imported in imports(FILES[name]):
        library = imported.partition(".")[0]
        if library in sys.stdlib_module_names or library in ("proxy", ""):
            continue
        assert name in HOMES.get(library, set()), f"{name} imports {imported}"


def test_funnel_knows_no_http_and_no_bytes_of_json() -> None:
    """The funnel is asyncio and numbers; whoever speaks HTTP or JSON stands at an edge."""
    for name in FILES:
        if name.startswith("funnel."):
            libraries = {imported.partition(".")[0] for imported in imports(FILES[name])}
            assert not libraries & {"aiohttp", "orjson", "json", "http"}


@pytest.mark.parametrize("room", ["funnel", "upstream"])
def test_listing_is_the_route(room: str) -> None:
    """`ls` shows the files of a room in the order in which a request meets them."""
    listed = sorted({".".join(name.split(".")[:2]) for name in FILES if name.startswith(f"{room}.")} - ENDS)
    route = [name for name in ROUTE if name.startswith(f"{room}.")]

    assert route == listed


def test_route_climbs_the_same_stairs_back() -> None:
    """The route begins with accept and decode, ends with encode, and names nothing that is not there."""
    route = list(ROUTE)

    assert route[:2] == ["edge.accept", "edge.decode"]
    assert route[-1] == "edge.encode"
    assert set(route) <= set(FILES)
    assert {".".join(name.split(".")[:2]) for name in FILES if name.startswith("edge.")} <= set(route)


def adapter_files() -> Iterator[tuple[str, Path]]:
    """Name each file of the adapter by its piece: `client`, and `modes` for all that is in its folder."""
    for path in sorted((ROOT / "rag_adapter").rglob("*.py")):
        yield path.relative_to(ROOT / "rag_adapter").with_suffix("").parts[0], path


@pytest.mark.parametrize(("piece", "path"), [*adapter_files()], ids=lambda value: value if type(value) is str else "")
def test_adapter_s_file_looks_down(piece: str, path: Path) -> None:
    """It imports pieces below its own, and libraries at their homes; nothing of the proxy."""
    floors = {name: number for number, names in enumerate(ADAPTER) for name in names}
    for imported in imports(path):
        library, _, rest = imported.partition(".")
        other = rest.partition(".")[0]
        if library == "rag_adapter":
            is_lower = piece == "__init__" or other in ("", piece) or floors.get(other, 99) < floors[piece]
            assert is_lower, f"{piece} → {imported}"
        elif library not in sys.stdlib_module_names:
            assert piece in ADAPTER_HOMES.get(library, set()), f"{piece} imports {imported}"


def test_proxy_imports_nothing_of_the_adapter() -> None:
    """They share the wire and nothing else."""
    for name, path in FILES.items():
        assert not any(imported.startswith("rag_adapter") for imported in imports(path)), name


def test_nobody_reads_the_environment_at_import() -> None:
    """`os.environ` is handed down from the command; a stage sees its settings and nothing else."""
    readers = {name for name, path in FILES.items() if "os.environ" in path.read_text() or "getenv" in path.read_text()}

    assert readers == {"wiring.cli"}


@pytest.mark.parametrize("path", [*FILES.values(), *(ROOT / "rag_adapter").rglob("*.py")], ids=lambda p: p.stem)
def test_every_file_opens_with_a_docstring(path: Path) -> None:
    """A file says first what it is and why it stands there."""
    assert ast.get_docstring(ast.parse(path.read_text()))
