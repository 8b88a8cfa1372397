"""Sidecar, direct, shadow: which way a text takes, how the operator moves it, and what shadow tells."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rag_adapter.client import EmbeddingClient
from rag_adapter.errors import EmbeddingFailed, SidecarUnavailable
from rag_adapter.modes import Comparison, ModalEmbedder, Mode
from rag_adapter.modes.shadow import Shadow, cosine
from rag_adapter.modes.switch import ModeSwitch
from tests.fakes.running import running
from tests.fakes.upstream import FakeUpstream, Fault, vector


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
async def socket(tmp_path: Path, upstream: FakeUpstream) -> AsyncIterator[str]:
    """The socket of a proxy in front of the upstream."""
    async with running(tmp_path, upstream.toml()) as proxy:
        yield proxy.socket_path


def environment(mode: str, upstream: FakeUpstream, **further: str) -> dict[str, str]:
    return {
        "EMBEDDING_MODE": mode,
        "EMBEDDING_DIRECT_URL": upstream.base_url,
        "EMBEDDING_DIRECT_API_KEY": "sk-direct",
        "EMBEDDING_DIRECT_MODEL": "upstream-s-name",
        **further,
    }


def right(text: str) -> list[float]:
    return [float(x) for x in vector(text, 8)]


async def until_compared(embedder: ModalEmbedder, count: int = 1) -> None:
    async with asyncio.timeout(10):
        while embedder.shadow_snapshot().compared < count:
            await asyncio.sleep(0.005)


# --- which mode ---


@pytest.mark.parametrize(
    ("environ", "mode"),
    [
        ({}, Mode.SIDECAR),
        ({"EMBEDDING_MODE": ""}, Mode.SIDECAR),
        ({"EMBEDDING_MODE": "direct"}, Mode.DIRECT),
        ({"EMBEDDING_MODE": " Shadow\n"}, Mode.SHADOW),
        ({"EMBEDDING_MODE": "direct", "EMBEDDING_MODE_FILE": "/no/such/file"}, Mode.DIRECT),
    ],
)
def test_mode_of_the_environment(environ: dict[str, str], mode: Mode) -> None:
    """Without a word it is the sidecar; a file that is not there says nothing."""
    assert ModeSwitch(environ).now() == mode


def test_mode_is_switched_by_the_file(tmp_path: Path) -> None:
    """Each call sees what the file says by then; without the file the environment counts again."""
    path = tmp_path / "mode"
    switch = ModeSwitch({"EMBEDDING_MODE": "shadow", "EMBEDDING_MODE_FILE": str(path)})
    seen = [switch.now()]
    for number, word in enumerate(("direct\n", "sidecar", "", "direct")):
        path.write_text(word)
        os.utime(path, ns=(number, number))  # file systems may tell the time more coarsely than we write
        seen.append(switch.now())
    path.unlink()
    seen.append(switch.now())

    assert seen == [Mode.SHADOW, Mode.DIRECT, Mode.SIDECAR, Mode.SHADOW, Mode.DIRECT, Mode.SHADOW]


def test_mode_is_switched_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is that of now, not that of the start."""
    monkeypatch.delenv("EMBEDDING_MODE_FILE", raising=False)
    switch = ModeSwitch()
    seen = []
    for word in ("direct", "sidecar"):
        monkeypatch.setenv("EMBEDDING_MODE", word)
        seen.append(switch.now())

    assert seen == [Mode.DIRECT, Mode.SIDECAR]


def test_first_word_is_no_mode() -> None:
    """A mistake in a deployment is told by its first call."""
    switch = ModeSwitch({"EMBEDDING_MODE": "driect"})
    for _ in range(2):
        with pytest.raises(EmbeddingFailed, match="is 'driect'; it may be sidecar, direct or shadow") as caught:
            switch.now()

    assert caught.value.code == "invalid_mode"


def test_later_word_is_no_mode(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A slip of the pen in the file leaves a running app as it is, and is logged once."""
    path = tmp_path / "mode"
    environ = {"EMBEDDING_MODE": "direct", "EMBEDDING_MODE_FILE": str(path)}
    switch = ModeSwitch(environ)
    switch.now()
    path.write_text("sidecra")
    during = [switch.now(), switch.now()]
    path.write_text("sidecar")
    after = switch.now()

    assert during == [Mode.DIRECT, Mode.DIRECT]
    assert after == Mode.SIDECAR
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "the embedding mode is 'sidecra'; it may be sidecar, direct or shadow: it stays direct"),
        ("WARNING", "the embedding mode was direct, and is sidecar from now on"),
    ]


def test_file_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder in place of the file is a slip like any other."""
    environ = {"EMBEDDING_MODE": "direct"}
    switch = ModeSwitch(environ)
    switch.now()
    environ["EMBEDDING_MODE_FILE"] = str(tmp_path)

    assert switch.now() == Mode.DIRECT
    assert f"{tmp_path}: Is a directory" in caplog.text


# --- sidecar and direct ---


async def test_sidecar(socket: str, upstream: FakeUpstream) -> None:
    """The sidecar is asked, by its name of the model, and nobody else."""
    client = EmbeddingClient(socket)
    async with ModalEmbedder(sidecar=client, environ=environment("sidecar", upstream)) as embedder:
        found = await embedder.embed("a text", model="m")

    assert found == right("a text")
    assert embedder.mode == Mode.SIDECAR
    assert [seen.body["model"] for seen in upstream.seen] == ["m"]


@pytest.mark.parametrize("has_base64", [True, False])
async def test_direct(has_base64: bool) -> None:
    """The upstream itself is asked, with its own key and its own name of the model; it need not know base64."""
    async with FakeUpstream(has_base64=has_base64) as upstream:
        async with ModalEmbedder(environ=environment("direct", upstream)) as embedder:
            found = await asyncio.gather(*(embedder.embed(f"text {n}", model="m") for n in range(20)))
        seen = upstream.seen

    assert found == [right(f"text {n}") for n in range(20)]
    assert {each.body["model"] for each in seen} == {"upstream-s-name"}
    assert {each.headers["Authorization"] for each in seen} == {"Bearer sk-direct"}
    assert len(upstream.connections) <= 8


async def test_direct_without_a_name_of_its_own(upstream: FakeUpstream) -> None:
    """Where no other name is set, the model is the one that the call names; OpenAI's usual key serves too."""
    environ = environment("direct", upstream, OPENAI_API_KEY="sk-usual")
    del environ["EMBEDDING_DIRECT_MODEL"], environ["EMBEDDING_DIRECT_API_KEY"]
    async with ModalEmbedder(environ=environ) as embedder:
        await embedder.embed("a text", model="m")

    assert upstream.seen[0].body["model"] == "m"
    assert upstream.seen[0].headers["Authorization"] == "Bearer sk-usual"


async def test_direct_without_a_key(upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent: without a key of its own the client would show the sidecar's to a stranger."""
    monkeypatch.setenv("EMBEDDING_SIDECAR_API_KEY", "the-sidecar-s")
    environ = environment("direct", upstream)
    del environ["EMBEDDING_DIRECT_API_KEY"]
    async with ModalEmbedder(environ=environ) as embedder:
        with pytest.raises(EmbeddingFailed, match="set EMBEDDING_DIRECT_API_KEY"):
            await embedder.embed("a text")

    assert upstream.seen == []


async def test_addresses_that_are_none(upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in the settings is no ValueError: that would mean that the text is empty."""
    monkeypatch.setenv("EMBEDDING_SIDECAR_URL", "localhost")
    for mode in ("sidecar", "direct"):
        async with ModalEmbedder(environ=environment(mode, upstream, EMBEDDING_DIRECT_URL="localhost")) as embedder:
            with pytest.raises(EmbeddingFailed, match="no address") as caught:
                await embedder.embed("a text")

        assert caught.value.code == "invalid_settings"


async def test_sidecar_is_found_by_the_client_s_rule(
    socket: str, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a client of the app's own the environment says where the sidecar is; closed, it is opened anew."""
    monkeypatch.setenv("EMBEDDING_SIDECAR_SOCKET", socket)
    monkeypatch.delenv("EMBEDDING_SIDECAR_URL", raising=False)
    async with ModalEmbedder(environ={}) as embedder:
        first = await embedder.embed("a text")
        await embedder.aclose()
        second = await embedder.embed("a text")

    assert first == second == right("a text")


# --- shadow ---


async def test_shadow_answers_by_the_old_way(socket: str, upstream: FakeUpstream) -> None:
    """The answer is the old way's; the sidecar's is compared with it, and told three times."""
    told: list[Comparison] = []
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("rag_adapter.shadow")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    async def old(text: str) -> list[float]:
        return [2 * x for x in right(text)]

    client = EmbeddingClient(socket)
    try:
        async with ModalEmbedder(
            sidecar=client, report=told.append, environ=environment("shadow", upstream)
        ) as embedder:
            found = await embedder.embed("secret words", old=old)
            await until_compared(embedder)
            snapshot = embedder.shadow_snapshot()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)

    assert found == await old("secret words")
    (comparison,) = told
    assert comparison.cosine == pytest.approx(1.0)
    assert comparison.is_alike
    assert (comparison.old_width, comparison.sidecar_width) == (8, 8)
    assert (comparison.old_error, comparison.sidecar_error) == (None, None)
    (record,) = records
    assert record.levelno == logging.INFO
    assert record.shadow["cosine"] == comparison.cosine  # type: ignore[attr-defined]
    assert "secret" not in str(vars(record))
    assert (snapshot.compared, snapshot.different, snapshot.skipped, snapshot.under_way) == (1, 0, 0, 0)
    assert snapshot.cosine_min == snapshot.cosine_mean == snapshot.cosine_p01 == snapshot.cosine_p50
    assert snapshot.old is not None
    assert snapshot.sidecar is not None
    assert snapshot.sidecar.p50_s == snapshot.sidecar.p99_s == comparison.sidecar_s


async def test_shadow_without_an_old_way(socket: str, upstream: FakeUpstream) -> None:
    """Where the app passes none, the direct way is the old one."""
    async with ModalEmbedder(sidecar=EmbeddingClient(socket), environ=environment("shadow", upstream)) as embedder:
        found = await embedder.embed("a text")
        await until_compared(embedder)

    assert found == right("a text")
    assert sorted(seen.body["model"] for seen in upstream.seen) == ["m", "upstream-s-name"]
    assert embedder.shadow_snapshot().cosine_min == pytest.approx(1.0)


async def test_sidecar_is_down_in_shadow(tmp_path: Path, upstream: FakeUpstream) -> None:
    """The answer is there all the same, and the error is counted."""
    client = EmbeddingClient(str(tmp_path / "nobody.sock"))
    async with ModalEmbedder(sidecar=client, environ=environment("shadow", upstream)) as embedder:
        found = await embedder.embed("a text")
        await until_compared(embedder)
        snapshot = embedder.shadow_snapshot()

    assert found == right("a text")
    assert snapshot.sidecar_errors == {"socket_missing": 1}
    assert (snapshot.different, snapshot.cosine_min, snapshot.sidecar) == (1, None, None)


async def test_sidecar_s_settings_are_wrong_in_shadow(upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """That does not concern the answer either."""
    monkeypatch.setenv("EMBEDDING_SIDECAR_URL", "localhost")
    async with ModalEmbedder(environ=environment("shadow", upstream)) as embedder:
        found = await embedder.embed("a text")
        await until_compared(embedder)

    assert found == right("a text")
    assert embedder.shadow_snapshot().sidecar_errors == {"invalid_settings": 1}


async def test_old_way_fails_in_shadow(socket: str, upstream: FakeUpstream) -> None:
    """Its own exception goes to the caller as it is; that the sidecar did better is told."""
    error = RuntimeError("as ever")

    async def old(text: str) -> list[float]:
        raise error

    told: list[Comparison] = []
    client = EmbeddingClient(socket)
    async with ModalEmbedder(sidecar=client, report=told.append, environ=environment("shadow", upstream)) as embedder:
        with pytest.raises(RuntimeError) as caught:
            await embedder.embed("a text", old=old)
        await until_compared(embedder)

    assert caught.value is error
    assert told[0].old_error == "RuntimeError"
    assert told[0].sidecar_error is None
    assert not told[0].is_alike
    assert embedder.shadow_snapshot().old_errors == {"RuntimeError": 1}


async def test_slow_sidecar_in_shadow(socket: str, upstream: FakeUpstream) -> None:
    """The answer does not wait for the sidecar; what is under way is bounded, and the rest is not compared."""
    gate = asyncio.Event()
    upstream.always = Fault(wait_for=gate)

    async def old(text: str) -> list[float]:
        return right(text)

    client = EmbeddingClient(socket)
    async with ModalEmbedder(sidecar=client, max_shadows=3, environ=environment("shadow", upstream)) as embedder:
        found = [await embedder.embed(f"text {n}", old=old) for n in range(5)]
        during = embedder.shadow_snapshot()
        gate.set()
        await until_compared(embedder, 3)
        after = embedder.shadow_snapshot()

    assert found == [right(f"text {n}") for n in range(5)]
    assert (during.compared, during.under_way, during.skipped) == (0, 3, 2)
    assert (after.compared, after.under_way, after.skipped) == (3, 0, 2)


async def test_closed_while_shadows_are_under_way(socket: str, upstream: FakeUpstream) -> None:
    """Nothing is left behind, and nothing waits for a sidecar that hangs."""
    upstream.always = Fault(hang=True)

    async def old(text: str) -> list[float]:
        return right(text)

    async with ModalEmbedder(sidecar=EmbeddingClient(socket), environ=environment("shadow", upstream)) as embedder:
        await embedder.embed("a text", old=old)

    assert embedder.shadow_snapshot().under_way == 0
    assert embedder.shadow_snapshot().compared == 0


async def test_caller_leaves_in_shadow(socket: str, upstream: FakeUpstream) -> None:
    """Without an answer there is nothing to compare: the question to the sidecar is given up too."""
    asked = asyncio.Event()

    async def old(text: str) -> list[float]:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with ModalEmbedder(sidecar=EmbeddingClient(socket), environ=environment("shadow", upstream)) as embedder:
        call = asyncio.create_task(embedder.embed("a text", old=old))
        await asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        async with asyncio.timeout(10):
            while embedder.shadow_snapshot().under_way:
                await asyncio.sleep(0.005)

    assert embedder.shadow_snapshot().compared == 0


async def test_report_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged and not called again; answers and counts go on."""
    calls = 0

    def report(comparison: Comparison) -> None:
        nonlocal calls
        calls += 1
        raise ZeroDivisionError

    async def way(text: str) -> list[float]:
        return [1.0, 0.0]

    shadow = Shadow(report=report)
    for _ in range(2):
        assert await shadow.answer("a text", way, way) == [1.0, 0.0]
        while shadow.snapshot().under_way:
            await asyncio.sleep(0)

    assert calls == 1
    assert shadow.snapshot().compared == 2
    assert "ZeroDivisionError" in caplog.text


async def test_old_way_gives_no_vector() -> None:
    """Whatever it gives is the answer; there is nothing to compare with."""

    async def old(text: str) -> list[float]:
        return None  # type: ignore[return-value]

    async def sidecar(text: str) -> list[float]:
        return [1.0]

    shadow = Shadow()
    answered = await shadow.answer("a text", old, sidecar)
    while shadow.snapshot().under_way:
        await asyncio.sleep(0)

    assert answered is None
    assert shadow.snapshot().compared == 0


async def test_percentiles_of_many_comparisons() -> None:
    """Counts and mean are of all, percentiles of the last thousand."""

    async def old(text: str) -> list[float]:
        return [1.0, 0.0]

    async def sidecar(text: str) -> list[float]:
        if text == "fails":
            raise SidecarUnavailable("gone")
        angle = math.acos(float(text))
        return [math.cos(angle), math.sin(angle)]

    shadow = Shadow(max_tasks=2)
    for text in ["0.5"] * 10 + ["fails"] * 3 + ["1.0"] * 980 + ["0.25"] * 20:
        await shadow.answer(text, old, sidecar)
        while shadow.snapshot().under_way:
            await asyncio.sleep(0)
    snapshot = shadow.snapshot()

    assert (snapshot.compared, snapshot.different) == (1013, 33)
    assert snapshot.sidecar_errors == {"sidecar_unavailable": 3}
    assert snapshot.cosine_mean == pytest.approx((0.5 * 10 + 980 + 0.25 * 20) / 1010)
    assert snapshot.cosine_min == pytest.approx(0.25)
    assert snapshot.cosine_p01 == pytest.approx(0.25)
    assert snapshot.cosine_p50 == pytest.approx(1.0)


# --- numbers ---

VECTORS = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=16).filter(any)


@given(VECTORS, st.data())
def test_cosine_is_numpy_s(a: list[float], data: st.DataObject) -> None:
    """The same as numpy's."""
    b = data.draw(st.lists(st.floats(-10, 10, width=32), min_size=len(a), max_size=len(a)).filter(any))
    x, y = numpy.array(a), numpy.array(b)
    sizes = numpy.linalg.norm(x) * numpy.linalg.norm(y)
    assume(sizes > 1e-12)

    assert cosine(a, b) == pytest.approx(float(x @ y / sizes), abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 0.0]), ([0.0, 0.0], [1.0, 0.0]), ([1.0], [0.0]), ([], [])])
def test_vectors_without_a_cosine(a: list[float], b: list[float]) -> None:
    """Other widths, and zero, have none."""
    assert cosine(a, b) is None


@pytest.mark.parametrize(
    ("cosine", "old_error", "sidecar_error", "is_alike"),
    [
        (1.0, None, None, True),
        (0.999, None, None, True),
        (0.998, None, None, False),
        (None, None, None, False),
        (None, None, "refused", False),
        (None, "TimeoutError", None, False),
        (None, "TimeoutError", "deadline_exceeded", True),
    ],
)
def test_what_counts_as_alike(
    cosine: float | None, old_error: str | None, sidecar_error: str | None, is_alike: bool
) -> None:
    """Two vectors that are nearly the same, or two errors."""
    found = Comparison(cosine, 0.1, 0.1, old_error, sidecar_error, 0, 0)

    assert found.is_alike == is_alike
