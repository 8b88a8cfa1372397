"""
From start to stop: starting → ready ⇄ unready → draining → stopped.

Owns the process: listeners, the pipeline in force, the canaries, signals. SIGTERM drains, SIGINT drains without
lingering over idle connections, a second one of either ends at once. SIGHUP reads the settings again: a new pipeline
is built and proven, then swapped; whatever goes wrong on the way, the old one stays.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from importlib.resources import files

import orjson

from proxy.base.clock import Clock, MonotonicClock
from proxy.base.events import Event, LifecycleMoved, ListenersOpened, Observer, ReloadFinished
from proxy.base.settings import Settings
from proxy.edge.accept import Accept, Page
from proxy.funnel.cache import CacheStore
from proxy.watch import health, log, status, telemetry
from proxy.wiring import config
from proxy.wiring.pipeline import Pipeline, build
from proxy.wiring.server import (
    Listener,
    ListenError,
    Server,
    close_listeners,
    open_listeners,
    refuse_strangers,
)

VERSION = version("embedding-sidecar")
_LOOK_S = 0.25
"""How often readiness is looked at; looking costs nothing."""

OPEN_PAGES = frozenset({"/livez", "/readyz", "/openapi.json"})
"""Pages that need no client key: orchestrators have none, and they tell nothing worth hiding."""


def observers(*all_of_them: Observer) -> Observer:
    """Tell each of several observers; one that raises is dropped and named, and the request goes on."""
    listening = list(all_of_them)

    def observe(event: Event) -> None:
        for observer in tuple(listening):
            try:
                observer(event)
            except Exception as error:
                listening.remove(observer)
                log.write(
                    logging.ERROR,
                    "an observer failed and is dropped",
                    observer=type(observer).__name__,
                    fact=type(event).__name__,
                    error=type(error).__name__,
                )

    return observe


class Lifecycle:
    """One process, from start to stop."""

    def __init__(
        self,
        path: str | None,
        environ: Mapping[str, str],
        *,
        greet: Callable[[list[Listener], Pipeline], None],
        clock: Clock | None = None,
    ) -> None:
        """
        Args:
            path: the settings' file, or None.
            environ: the environment.
            greet: called once, when the first canaries are back.
            clock: where time comes from.
        """
        self._path = path
        self._environ = environ
        self._greet = greet
        self._clock = clock or MonotonicClock()
        self._rng = random.Random()
        self._started = self._clock.now()
        self._telemetry = telemetry.Telemetry()
        self._observe = observers(self._telemetry, log.Log())
        self._state = "starting"
        self._store = CacheStore(0)
        self._at_start: Settings
        self._pipeline: Pipeline
        self._server: Server
        self._listeners: list[Listener] = []
        self._retiring: set[asyncio.Task[None]] = set()
        self._reload_wanted = asyncio.Event()
        self._stop_wanted = asyncio.Event()
        self._is_hasty = False

    async def run(self) -> None:
        """
        Serve until a signal says stop.

        Raises:
            ConfigError, ListenError: it cannot start; says why.
        """
        loaded = config.load(self._path, self._environ)
        log.configure(loaded.settings.log)
        asyncio.get_running_loop().set_exception_handler(log.loop_trouble)
        self._observe(LifecycleMoved("starting", VERSION))
        self._at_start = loaded.settings
        self._pipeline = self._built(loaded)
        self._store.resize(loaded.settings.cache.max_bytes)
        try:
            has_keys = bool(loaded.settings.callers)
            self._listeners = open_listeners(loaded.settings.listen, self._environ, has_keys=has_keys)
            await self._served()
        finally:
            close_listeners(self._listeners)
            await self._closed()
            self._moved("stopped")

    async def _served(self) -> None:
        """Serve until somebody wants a stop, and drain."""
        accept = Accept(
            service=lambda: self._pipeline,
            pages=self._pages(),
            open_pages=OPEN_PAGES,
            clock=self._clock,
            observe=self._observe,
        )
        self._server = Server(accept, self._listeners, self._pipeline.listen, self._clock)
        await self._server.start()
        self._observe(ListenersOpened(tuple(f"{x.name}:{x.address}" for x in self._listeners)))
        async with asyncio.TaskGroup() as group:
            work = group.create_task(self._work())
            await self._stop_wanted.wait()
            work.cancel()
        self._moved("draining")
        settings = self._pipeline.settings.lifecycle
        await self._server.drain(
            timeout_s=settings.drain_timeout_s, linger_s=0.0 if self._is_hasty else settings.drain_linger_s
        )

    def _built(self, loaded: config.Loaded, old: Pipeline | None = None) -> Pipeline:
        return build(
            loaded.settings,
            loaded.api_keys,
            clock=self._clock,
            rng=self._rng,
            observe=self._observe,
            store=self._store,
            old=old,
        )

    # --- ready or not ---

    async def _work(self) -> None:
        """Prove the pipeline, then follow its readiness and reload when asked; one after the other, never both."""
        await self._pipeline.prove()
        self._moved(self._readiness())
        self._greet(self._listeners, self._pipeline)
        self._pipeline.keep_proving()
        # What is there by now stays. Looking through it again and again would hold the loop for 20 to 30 ms each time.
        gc.collect()
        gc.freeze()
        while True:
            if (state := self._readiness()) != self._state:
                self._moved(state)
            try:
                async with self._clock.timeout_at(self._clock.now() + _LOOK_S):
                    await self._reload_wanted.wait()
            except TimeoutError:
                continue
            self._reload_wanted.clear()
            try:
                await self._reload()
            except Exception as error:  # a defect of ours, but no reason to stop serving
                self._observe(ReloadFinished(problem=f"internal error {type(error).__name__}"))

    def _readiness(self) -> str:
        if self._state == "draining":
            return self._state
        return "unready" if any(self._pipeline.problems().values()) else "ready"

    def _moved(self, state: str) -> None:
        self._state = state
        self._observe(LifecycleMoved(state))

    # --- reload ---

    async def _reload(self) -> None:
        """Build, prove, swap; the old pipeline finishes what is inside it."""
        old = self._pipeline
        try:
            loaded = config.load(self._path, self._environ)
            refuse_strangers(self._listeners, has_keys=bool(loaded.settings.callers))
        except (config.ConfigError, ListenError) as error:
            self._observe(ReloadFinished(problem=str(error)))
            return
        new = self._built(loaded, old)
        try:
            # A model that was broken before is no reason to refuse: the file may be about something else.
            before, after = old.problems(), await new.prove()
            broken = [f"model {m}: {problem}" for m, problem in after.items() if problem and not before.get(m)]
        except BaseException:
            await new.aclose()
            raise
        if broken:
            await new.aclose()
            self._observe(ReloadFinished(problem="; ".join(broken)))
            return
        self._swap(old, new)
        restart = tuple(config.needs_restart(self._at_start, loaded.settings))
        self._observe(ReloadFinished(needs_restart=restart))

    def _swap(self, old: Pipeline, new: Pipeline) -> None:
        if new.has_moved(old):
            old.stop_storing()
            self._store.clear()
        self._store.resize(new.settings.cache.max_bytes)
        log.configure(new.settings.log)
        self._pipeline = new
        new.keep_proving()
        retiring = asyncio.create_task(old.retire())
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)

    # --- stop ---

    def handle_signals(self) -> None:
        """Let SIGHUP reload, SIGTERM and SIGINT stop, and a second one of these end at once."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: signal.Signals) -> None:
        if self._stop_wanted.is_set():
            os._exit(128 + number)  # whoever asks twice does not want to wait for anything
        self.stop(is_hasty=number == signal.SIGINT)

    def reload(self) -> None:
        """Ask for the settings to be read again; requests meanwhile are served as before."""
        self._reload_wanted.set()

    def stop(self, *, is_hasty: bool = False) -> None:
        """Ask for the drain; `run()` returns after it. Hasty: without lingering over idle connections."""
        self._is_hasty = is_hasty
        self._stop_wanted.set()

    async def _closed(self) -> None:
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await self._pipeline.aclose()

    # --- pages ---

    def _pages(self) -> dict[str, Callable[[], Awaitable[Page]]]:
        document = files("proxy.edge").joinpath("openapi.json").read_bytes()

        async def livez() -> Page:
            return Page(200, "application/json", b'{"status":"alive"}')

        async def readyz() -> Page:
            is_ready, body = health.readiness(
                is_draining=self._state == "draining",
                problems=self._pipeline.problems(),
                models=self._pipeline.models(),
            )
            return _json(body, 200 if is_ready else 503)

        async def metrics() -> Page:
            body = await asyncio.to_thread(self._telemetry.exposition)
            return Page(200, telemetry.CONTENT_TYPE, body)

        async def status_page() -> Page:
            return _json(
                status.status(
                    version=VERSION,
                    state=self._state,
                    uptime_s=self._clock.now() - self._started,
                    stages=self._pipeline.snapshot(),
                    **self._server.snapshot(),
                )
            )

        async def openapi() -> Page:
            return Page(200, "application/json", document)

        return {
            "/livez": livez,
            "/readyz": readyz,
            "/metrics": metrics,
            "/status": status_page,
            "/openapi.json": openapi,
        }


def _json(body: object, status_code: int = 200) -> Page:
    return Page(
        status_code, "application/json", orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    )
