"""Facts become lines."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from proxy.base import events
from proxy.base.settings import LogSettings
from proxy.watch.log import Log, configure, loop_trouble, write

REQUEST = events.RequestFinished(
    "r-1",
    "tcp",
    "POST",
    "/v1/embeddings",
    200,
    0.0204,
    caller="c",
    model="m",
    priority="bulk",
    inputs=3,
    hits=1,
    tokens=7,
    upstream="u",
    attempts=2,
    queue_s=0.001,
    upstream_s=0.0185,
    trace_id="abc",
)
CANARY = events.CanaryFinished("m", "u", 0.1234)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Give the process its logging back."""
    loggers = [logging.getLogger(name) for name in ("", "embedding_sidecar", "embedding_sidecar.attempt")]
    levels, handlers = [logger.level for logger in loggers], logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def told(*happened: Any, level: str = "info") -> list[dict[str, Any]]:
    """Write events as JSON and read the lines; their time is checked and left out."""
    stream = io.StringIO()
    configure(LogSettings(format="json", level=level), stream)
    log = Log()
    for event in happened:
        log(event)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("ts"))
    return lines


# --- each event ---


def test_request() -> None:
    """A request is one line with everything that is known of it."""
    assert told(REQUEST) == [
        {
            "level": "info",
            "event": "request",
            "request_id": "r-1",
            "status": 200,
            "ms": 20.4,
            "method": "POST",
            "path": "/v1/embeddings",
            "listener": "tcp",
            "caller": "c",
            "model": "m",
            "priority": "bulk",
            "inputs": 3,
            "cached": 1,
            "tokens": 7,
            "upstream": "u",
            "attempts": 2,
            "queue_ms": 1.0,
            "upstream_ms": 18.5,
            "trace_id": "abc",
        }
    ]


def test_request_of_which_little_is_known() -> None:
    """What is empty or zero is left out, but for status and time."""
    (line,) = told(events.RequestFinished("r-1", "unix", "GET", "other", 404, 0.0, code="unknown_url", message="no"))

    assert line == {
        "level": "info",
        "event": "request",
        "request_id": "r-1",
        "status": 404,
        "ms": 0.0,
        "code": "unknown_url",
        "message": "no",
        "method": "GET",
        "path": "other",
        "listener": "unix",
    }


@pytest.mark.parametrize(
    ("path", "status", "level"),
    [
        ("/v1/embeddings", 200, "info"),
        ("/v1/embeddings", 400, "info"),
        ("/v1/embeddings", 499, "info"),
        ("/v1/embeddings", 500, "error"),
        ("/v1/embeddings", 502, "info"),
        ("/v1/embeddings", 503, "info"),
        ("/livez", 200, "debug"),
        ("/readyz", 503, "debug"),
        ("/metrics", 200, "debug"),
        ("/status", 200, "debug"),
        ("/openapi.json", 200, "debug"),
        ("other", 404, "info"),
    ],
)
def test_level_of_a_request(path: str, status: int, level: str) -> None:
    """Requests are told at info, probes of machines at debug; only a bug of ours is an error."""
    (line,) = told(replace(REQUEST, path=path, status=status), level="debug")

    assert line["level"] == level


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            events.BreakerMoved("u", "closed", "open"),
            {"level": "warning", "event": "breaker", "upstream": "u", "state": "open", "was": "closed"},
        ),
        (
            events.BreakerMoved("u", "open", "half-open"),
            {"level": "info", "event": "breaker", "upstream": "u", "state": "half-open", "was": "open"},
        ),
        (
            replace(CANARY, changed=True),
            {"level": "info", "event": "canary", "model": "m", "upstream": "u", "ms": 123.4, "result": "right"},
        ),
        (
            replace(CANARY, changed=True, problem="no"),
            {"level": "warning", "event": "canary", "model": "m", "upstream": "u", "ms": 123.4, "problem": "no"},
        ),
        (CANARY, {"level": "debug", "event": "canary", "model": "m", "upstream": "u", "ms": 123.4, "result": "right"}),
        (
            replace(CANARY, problem="no"),
            {"level": "debug", "event": "canary", "model": "m", "upstream": "u", "ms": 123.4, "problem": "no"},
        ),
        (
            events.ListenersOpened(("unix:/s", "tcp:127.0.0.1:1")),
            {"level": "info", "event": "listening", "listeners": ["unix:/s", "tcp:127.0.0.1:1"]},
        ),
        (events.LifecycleMoved("ready"), {"level": "info", "event": "ready"}),
        (
            events.LifecycleMoved("unready", "model m: gone"),
            {"level": "info", "event": "unready", "detail": "model m: gone"},
        ),
        (events.ReloadFinished(), {"level": "info", "event": "reloaded"}),
        (
            events.ReloadFinished("bad file"),
            {"level": "error", "event": "reload refused, nothing changed", "problem": "bad file"},
        ),
    ],
)
def test_change_of_state(event: events.Event, line: dict[str, Any]) -> None:
    """Each change of state is one line, at the level that says whether a human is wanted."""
    assert told(event, level="debug") == [line]


def test_reload_that_needs_a_restart() -> None:
    """What a reload cannot take is told in a warning of its own."""
    lines = told(events.ReloadFinished(needs_restart=("listen.tcp", "listen.socket")))

    assert [(line["level"], line["event"]) for line in lines] == [
        ("info", "reloaded"),
        ("warning", "changed in the file, but takes a restart"),
    ]
    assert lines[1]["keys"] == "listen.tcp, listen.socket"


@pytest.mark.parametrize(
    "event",
    [
        events.AttemptFinished("u", "", 0.1, 1),
        events.CacheLookedUp("m", 1, 1),
        events.InputsJoined("m", 1),
        events.BatchFinished("m", "u", 1, 0.0, 0.0),
        events.ConnectionStale("u"),
        object(),
    ],
    ids=lambda event: type(event).__name__,
)
def test_event_that_is_only_counted(event: Any) -> None:
    """Events of the hot path and unknown ones write nothing."""
    assert told(event, level="debug") == []


@pytest.mark.parametrize(
    ("level", "events_told"),
    [
        ("debug", ["request", "canary", "request", "breaker", "reload refused, nothing changed"]),
        ("info", ["request", "breaker", "reload refused, nothing changed"]),
        ("warning", ["breaker", "reload refused, nothing changed"]),
        ("error", ["reload refused, nothing changed"]),
    ],
)
def test_least_level(level: str, events_told: list[str]) -> None:
    """Nothing below the level of the settings is written."""
    lines = told(
        replace(REQUEST, path="/livez"),
        CANARY,
        REQUEST,
        events.BreakerMoved("u", "closed", "open"),
        events.ReloadFinished("bad file"),
        level=level,
    )

    assert [line["event"] for line in lines] == events_told


# --- formats and streams ---


def test_console() -> None:
    """The readable form has time, letter of the level, event and fields."""
    stream = io.StringIO()
    configure(LogSettings(format="console"), stream)
    Log()(events.BreakerMoved("u", "closed", "open"))

    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} W breaker upstream=u state=open was=closed\n", stream.getvalue())


@pytest.mark.parametrize(
    ("format_", "stream", "is_json"),
    [
        ("auto", io.StringIO, True),
        ("auto", Terminal, False),
        ("json", Terminal, True),
        ("console", io.StringIO, False),
    ],
)
def test_format(format_: str, stream: type[io.StringIO], is_json: bool) -> None:
    """`auto` is readable on a terminal and JSON elsewhere; the other two are what they say."""
    target = stream()
    configure(LogSettings(format=format_), target)
    write(logging.INFO, "hello", n=1)

    assert target.getvalue().startswith("{") == is_json
    assert "hello" in target.getvalue()


def test_stream_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines go to standard error unless somebody says otherwise."""
    configure(LogSettings(format="json"))
    write(logging.INFO, "hello")
    captured = capsys.readouterr()

    assert json.loads(captured.err)["event"] == "hello"
    assert captured.out == ""


def test_configured_again() -> None:
    """A reload replaces stream, format and level; no line is written twice."""
    first, second = io.StringIO(), io.StringIO()
    configure(LogSettings(format="json"), first)
    configure(LogSettings(format="console", level="error"), second)
    write(logging.WARNING, "quiet")
    write(logging.ERROR, "loud")

    assert first.getvalue() == ""
    assert second.getvalue().count("\n") == 1
    assert second.getvalue().endswith("E loud\n")


def test_libraries_are_heard_from_warning_on() -> None:
    """Other loggers write to the same stream, from warning on, in the same form."""
    stream = io.StringIO()
    configure(LogSettings(format="json", level="debug"), stream)
    logging.getLogger("aiohttp.server").info("chatter")
    logging.getLogger("aiohttp.server").warning("trouble with %s", "a socket")
    (line,) = stream.getvalue().splitlines()

    assert json.loads(line)["event"] == "trouble with a socket"
    assert json.loads(line)["level"] == "warning"


def test_retries_are_not_told_twice() -> None:
    """aiohttp-retry's own words, which hold our arguments, are not written even at debug."""
    stream = io.StringIO()
    configure(LogSettings(format="json", level="debug"), stream)
    logging.getLogger("embedding_sidecar.attempt").debug("Attempt 1 out of 3")

    assert stream.getvalue() == ""


def test_exception_is_named_and_not_quoted() -> None:
    """Of an exception only its class is written: its message may quote a text."""
    stream = io.StringIO()
    configure(LogSettings(format="json"), stream)
    try:
        raise ValueError("a caller's text")
    except ValueError:
        logging.getLogger("asyncio").exception("it broke")
    logging.getLogger("asyncio").error("no exception here", exc_info=True)
    broken, plain = (json.loads(line) for line in stream.getvalue().splitlines())

    assert broken["error"] == "ValueError"
    assert "error" not in plain
    assert "a caller's text" not in stream.getvalue()


async def test_trouble_of_the_loop() -> None:
    """What asyncio complains of is an error line with the class of the exception, and not its words."""
    stream = io.StringIO()
    configure(LogSettings(format="json"), stream)
    loop_trouble(asyncio.get_running_loop(), {"message": "never retrieved", "exception": ValueError("a caller's text")})
    line = json.loads(stream.getvalue())

    assert (line["level"], line["event"], line["message"]) == ("error", "asyncio", "never retrieved")
    assert line["error"] == "ValueError"
    assert "a caller's text" not in stream.getvalue()


def test_lines_in_their_order() -> None:
    """Ours and those of libraries end up in the order in which they were written, each at once."""
    target = io.BytesIO()
    stream = io.TextIOWrapper(target, encoding="utf-8")
    configure(LogSettings(format="json"), stream)
    lengths = []
    for number in range(2):
        write(logging.INFO, f"ours {number}")
        lengths.append(target.getvalue().count(b"\n"))
        logging.getLogger("library").warning("theirs %s", number)
        lengths.append(target.getvalue().count(b"\n"))
    events_told = [json.loads(line)["event"] for line in target.getvalue().splitlines()]

    assert lengths == [1, 2, 3, 4]
    assert events_told == ["ours 0", "theirs 0", "ours 1", "theirs 1"]


def test_lines_of_both_kinds_are_spelled_alike() -> None:
    """What passes through `logging`, as when somebody else listens too, is the same line."""
    stream, other = io.StringIO(), logging.NullHandler()
    configure(LogSettings(format="json"), stream)
    Log()(REQUEST)
    logging.getLogger().addHandler(other)
    Log()(REQUEST)
    straight, through = stream.getvalue().splitlines()

    assert list(json.loads(straight).items())[1:] == list(json.loads(through).items())[1:]
    assert list(json.loads(straight))[:4] == ["ts", "level", "event", "request_id"]


def test_somebody_else_listens(caplog: pytest.LogCaptureFixture) -> None:
    """A handler that was added to ours hears our lines too."""
    stream = io.StringIO()
    configure(LogSettings(format="json"), stream)
    logging.getLogger().addHandler(caplog.handler)
    write(logging.INFO, "hello", n=1)

    assert [record.getMessage() for record in caplog.records] == ["hello"]
    assert json.loads(stream.getvalue())["n"] == 1


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stream", [Full(), io.StringIO()], ids=["full", "closed"])
def test_stream_that_takes_nothing(stream: io.StringIO) -> None:
    """A line that cannot be written is lost, and nobody is served less for it."""
    configure(LogSettings(format="json"), stream)
    if not isinstance(stream, Full):
        stream.close()

    Log()(REQUEST)


def test_field_that_cannot_be_spelled() -> None:
    """Neither is a line of half a character a reason to write none any more."""
    stream = io.StringIO()
    configure(LogSettings(format="json"), stream)
    log = Log()
    log(replace(REQUEST, caller="\ud800"))
    log(REQUEST)

    assert [json.loads(line)["caller"] for line in stream.getvalue().splitlines()] == ["c"]


@pytest.mark.parametrize(
    ("seconds", "ms"), [(0.0, 0.0), (0.000004, 0.0), (0.000005, 0.01), (0.0123456, 12.35), (61.5, 61500.0), (1e-9, 0.0)]
)
def test_milliseconds(seconds: float, ms: float) -> None:
    """Times are told to a hundredth of a millisecond; what is less is nothing."""
    (line,) = told(replace(REQUEST, total_s=seconds, queue_s=seconds, upstream_s=seconds))

    assert (line["ms"], line.get("queue_ms", 0.0), line.get("upstream_ms", 0.0)) == (ms, ms, ms)


def test_value_that_json_does_not_know() -> None:
    """A field of any kind is written somehow, since a lost line helps nobody."""
    stream = io.StringIO()
    configure(LogSettings(format="json"), stream)
    write(logging.INFO, "odd", value=1 + 2j)

    assert json.loads(stream.getvalue())["value"] == "(1+2j)"


def test_line_ends_stay_inside_a_line() -> None:
    """No value can end a JSON line and begin one of its own."""
    stream = io.StringIO()
    configure(LogSettings(format="json"), stream)
    Log()(replace(REQUEST, caller='x"}\n{"event": "forged"'))

    assert len(stream.getvalue().splitlines()) == 1


def test_line_ends_stay_inside_a_readable_line() -> None:
    """Nor can it end a line of the readable form."""
    stream = io.StringIO()
    configure(LogSettings(format="console"), stream)
    Log()(replace(REQUEST, caller="x\n12:00:00.000 E forged"))

    assert len(stream.getvalue().splitlines()) == 1
