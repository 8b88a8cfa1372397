"""
The command: `embedding-sidecar run | check | show`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

import tomli_w
import uvloop

from proxy.wiring import config
from proxy.wiring.lifecycle import VERSION, Lifecycle
from proxy.wiring.pipeline import Pipeline
from proxy.wiring.server import Listener, ListenError

EXIT_CANNOT_START = 1
EXIT_BAD_SETTINGS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 when it cannot start, 2 when the settings are wrong."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_SETTINGS
    except ListenError as error:
        print(error, file=sys.stderr)
        return EXIT_CANNOT_START


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="embedding-sidecar",
        description="A local proxy that owns all upstream embedding calls of an app.",
        epilog="Without a file it serves an embedded model, and OpenAI's when OPENAI_API_KEY is set.",
    )
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="serve until SIGTERM; SIGHUP reads the settings again")
    run.add_argument("--config", metavar="FILE", help="settings, TOML (default: $EMBEDDING_SIDECAR_CONFIG)")
    run.add_argument("--hello", action="store_true", help="print commands to paste, once it is ready")
    run.set_defaults(command=_run)

    check = commands.add_parser("check", help="say everything that is wrong with the settings")
    check.add_argument("config", metavar="FILE", nargs="?")
    check.set_defaults(command=_check)

    show = commands.add_parser("show", help="print the settings in force, as TOML")
    show.add_argument("config", metavar="FILE", nargs="?")
    show.add_argument("--reference", action="store_true", help="describe every setting instead, as Markdown")
    show.set_defaults(command=_show)
    return parser


def _run(options: argparse.Namespace) -> int:
    wants_hello = options.hello or sys.stdout.isatty()

    def greet(listeners: list[Listener], pipeline: Pipeline) -> None:
        if wants_hello:
            default, needs_key = pipeline.catalogue.default, bool(pipeline.callers)
            print(hello(listeners, pipeline.problems(), default, needs_key=needs_key), flush=True)

    async def serve() -> None:
        lifecycle = Lifecycle(options.config, os.environ, greet=greet)
        lifecycle.handle_signals()
        await lifecycle.run()

    uvloop.run(serve())
    return 0


def _check(options: argparse.Namespace) -> int:
    settings = config.load(options.config, os.environ).settings
    print(f"all good: {len(settings.models)} model(s) on {len(settings.upstreams)} upstream(s)")
    return 0


def _show(options: argparse.Namespace) -> int:
    if options.reference:
        print(config.reference(), end="")
    else:
        print(tomli_w.dumps(config.as_table(config.load(options.config, os.environ).settings)), end="")
    return 0


def hello(listeners: list[Listener], problems: dict[str, str], default: str, *, needs_key: bool = False) -> str:
    """Say what is served and what to paste."""
    lines = [f"embedding-sidecar {VERSION} is {'not ready' if any(problems.values()) else 'ready'}"]
    for model, problem in problems.items():
        mark = " (default)" if model == default else ""
        lines.append(f"  model {model}{mark}: {problem or 'ok'}")
    lines += ["", "Paste into another terminal:"]
    key = '-H "Authorization: Bearer $KEY" ' if needs_key else ""
    for listener in listeners:
        if listener.name == "unix":
            where = f"--unix-socket {shlex.quote(listener.address)} http://localhost"
        else:
            where = f"{key}http://{listener.address}"
        lines.append(f"""  curl -s {where}/v1/embeddings --json '{{"input": "hello world"}}'""")
    lines += ["", "Ctrl-C stops it.", ""]
    return "\n".join(lines)
