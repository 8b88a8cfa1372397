"""
The proxy as a child of the app, where nobody else runs it.

Several workers of one app may each have a SupervisedSidecar on the same socket: one of them starts the proxy, the
others attach. A proxy that somebody else runs (systemd, another app) is attached to as well, and nothing is started.

What serves is found out by asking `/readyz` on the socket; who may start is settled by a lock on a file beside it,
which the kernel releases when its holder dies. One task does it all, in turns:

    the socket    the lock         this turn                                                      state
    answers       (let go of)      follow whoever serves, until it is gone                        attached
    is dead       taken            run a child, until it ends; then wait, longer each time        starting, ready,
                                                                                                  restarting
    is dead       somebody else's  they are about to start one: look again soon                   starting, restarting

Without a child and without a task it is stopped. The first start is the caller's to hear of: if the child ends before
it was ever ready, `start()` raises with its last lines, and nothing is tried again. Later ends are restarted for ever.

`answer` asks who serves, `lock` says who may start one, `child` is the process. docs/service.md is for the operator.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rag_adapter.address import find
from rag_adapter.errors import SidecarUnavailable
from rag_adapter.supervise.answer import ANSWER_S, Answer, ask
from rag_adapter.supervise.child import LOGGER, Child
from rag_adapter.supervise.lock import Lock

COMMAND = (sys.executable, "-m", "proxy", "run")
"""`embedding-sidecar run`, by the same interpreter."""

_NOT_THE_CHILD_S = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
"""What the app's own service manager told the app, and nobody else."""

_BACKOFF_BASE_S = 0.2
_BACKOFF_MAX_S = 30.0
"""A child that cannot live is started twice a minute: a mended file is found soon, and it is no load."""

_STABLE_S = 60.0
"""A child that served this long was a good one: its end is the first of a new series."""

_LOOK_FIRST_S = 0.05
_LOOK_S = 1.0
"""How often the socket is asked: 0.3 ms of the app's time. While something starts sooner, and then ever less often."""

_LOOK_AT_READY_S = 5.0
"""A child that is ready tells of its end by ending; asking finds out only whether it hangs."""


class State(enum.StrEnum):
    """What the supervision is at."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    """Our child has been ready, and runs. Whether it is so at this moment, the client's `is_ready()` tells."""
    ATTACHED = "attached"
    """Somebody else's proxy serves."""
    RESTARTING = "restarting"
    """It was there, has ended, and comes back; ours, or somebody else's that we wait for."""


@dataclass(frozen=True, slots=True)
class SupervisionSnapshot:
    """The supervision as of now."""

    state: State
    pid: int | None
    """Our child's; None while there is none."""
    restarts: int
    """Children started after the first one."""
    last_exit: int | None
    """Exit code of the child that ended last; negative: the signal that ended it."""


# --- the rules ---


def failures(before: int, ready_s: float) -> int:
    """Return how many children in a row have ended too soon, now that one more has ended after this time of service."""
    return 1 if ready_s >= _STABLE_S else before + 1


def backoff_s(failures: int, rng: random.Random) -> float:
    """
    Return how long to wait before the next child.

    Args:
        failures: children in a row that ended too soon; at least 1.
        rng: between half of the wait and all of it, so that several hosts do not move in step.
    """
    bound_s = min(_BACKOFF_MAX_S, _BACKOFF_BASE_S * 2.0 ** min(failures - 1, 20))
    return bound_s * rng.uniform(0.5, 1.0)


# --- the supervisor ---


class SupervisedSidecar:
    """
    Sees to it that a proxy serves the socket: `async with SupervisedSidecar():`, or `start()` and `stop()`.

    Belongs to the loop that started it.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        config: str | None = None,
        command: Sequence[str] = COMMAND,
        environ: Mapping[str, str] | None = None,
        tcp: str | None = "off",
        ready_timeout_s: float = 30.0,
        stop_timeout_s: float = 10.0,
        takeover_after_s: float = 10.0,
        silence_timeout_s: float = 30.0,
        rng: random.Random | None = None,
    ) -> None:
        """
        Args:
            address: the Unix socket, `/path.sock` or `unix:/path.sock`; None: where the clients look.
            config: the proxy's settings, TOML; None: `$EMBEDDING_SIDECAR_CONFIG`, else the proxy's defaults.
            command: what runs the proxy, when it is not installed beside the app.
            environ: variables for the child, beside and before the app's own.
            tcp: the proxy's TCP listener. Off, since two apps on one machine would fight for the port; None: as the
                settings say.
            ready_timeout_s: `start()` waits this long.
            stop_timeout_s: after SIGTERM the child gets this long to finish, then SIGKILL. Docker allows 10 s in all.
            takeover_after_s: a proxy that somebody else runs may be gone this long (its manager restarts it) before we
                start our own. One that another worker ran is replaced at once.
            silence_timeout_s: a child that runs and does not answer for so long hangs, and is restarted.
            rng: for the backoff.

        Raises:
            ValueError: this is no Unix socket. TCP may lead to another machine, where we start nothing.
        """
        where = find(address)
        if not where.path:
            raise ValueError(
                f"a supervised sidecar needs a Unix socket, and {where} is none: give its path as the address, or "
                "leave EMBEDDING_SIDECAR_URL unset"
            )
        self._path = where.path
        self._command = [*command, *(("--config", config) if config else ())]
        self._environ = dict(environ or {})
        self._tcp = tcp
        self._ready_timeout_s = ready_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._takeover_after_s = takeover_after_s
        self._silence_timeout_s = silence_timeout_s
        self._rng = rng or random.Random()
        self._lock = Lock(f"{self._path}.lock")
        self._state = State.STOPPED
        self._task: asyncio.Task[None] | None = None
        self._was_ready: asyncio.Future[None]
        self._child: Child | None = None
        self._detail = ""
        self._children = 0
        self._failures = 0
        self._last_exit: int | None = None

    async def start(self) -> None:
        """
        Return when a proxy serves the socket and is ready: ours, or whoever's was there.

        Raises:
            SidecarUnavailable: it ended, or was not ready in time; the message has its last lines. Nothing of it
                is left behind.
        """
        is_first = self._task is None
        task = self._begun() if self._task is None else self._task
        try:
            waited_for = {task, self._was_ready}
            await asyncio.wait(waited_for, timeout=self._ready_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled():
                task.result()
            if not self._was_ready.done():
                raise self._not_ready()
        except BaseException:
            if is_first:
                await self.stop()
            raise

    def _begun(self) -> asyncio.Task[None]:
        self._was_ready = asyncio.get_running_loop().create_future()
        self._state, self._detail, self._failures = State.STARTING, "", 0
        self._task = asyncio.create_task(self._run(), name="embedding-sidecar supervision")
        self._task.add_done_callback(_tell_of_defect)
        return self._task

    async def stop(self) -> None:
        """
        End the child, if there is one: SIGTERM, its drain, SIGKILL when that takes too long. It is reaped.

        Who cancels this cannot wait for the drain: the child is killed.
        """
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                if self._child is not None:
                    self._child.kill()
                await asyncio.wait({task})
                raise
            finally:
                self._lock.release()
                self._state = State.STOPPED

    async def __aenter__(self) -> SupervisedSidecar:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def socket(self) -> str:
        """Path of the socket."""
        return self._path

    def snapshot(self) -> SupervisionSnapshot:
        """Say what the supervision is at."""
        return SupervisionSnapshot(
            state=self._state,
            pid=self._child.pid if self._child else None,
            restarts=max(0, self._children - 1),
            last_exit=self._last_exit,
        )

    def __repr__(self) -> str:
        return f"<SupervisedSidecar {self._path}: {self._state}>"

    # --- turns ---

    async def _run(self) -> None:
        while True:
            try:
                await self._turn()
            except SidecarUnavailable as error:
                if not self._was_ready.done():
                    raise
                LOGGER.error("%s", error)
                await self._back_off()

    async def _turn(self) -> None:
        answer = await ask(self._path)
        if answer is not None and answer.problem is not None:
            raise answer.problem
        if answer is not None:
            await self._follow_other()
        elif self._lock.take():
            await self._run_child()
        else:
            self._state = self._coming
            await asyncio.sleep(_LOOK_S / 4)

    @property
    def _coming(self) -> State:
        return State.RESTARTING if self._was_ready.done() else State.STARTING

    async def _back_off(self, ready_s: float = 0.0) -> None:
        self._state = State.RESTARTING
        self._failures = failures(self._failures, ready_s)
        await asyncio.sleep(backoff_s(self._failures, self._rng))

    def _note(self, answer: Answer, state: State) -> None:
        """Take notice of what the proxy says; the state moves when it is ready, and stays so."""
        self._detail = answer.detail
        if answer.status == 200:
            self._state = state
            if not self._was_ready.done():
                self._was_ready.set_result(None)

    # --- somebody else's ---

    async def _follow_other(self) -> None:
        """Return when nobody serves any more, and nobody can be expected to."""
        # A lock that can be had is held by no worker like us: this is a stranger's, with a manager of its own.
        is_stranger = self._lock.take()
        self._lock.release()
        now = asyncio.get_running_loop().time
        self._state = State.ATTACHED
        LOGGER.info("attached to the sidecar at %s", self._path)
        looks, gone_since = _looks(), None
        while True:
            answer = await ask(self._path)
            if answer is not None:
                gone_since = None
                self._state = State.ATTACHED
                self._note(answer, State.ATTACHED)
            else:
                gone_since = now() if gone_since is None else gone_since
                self._state = self._coming
                if not is_stranger or now() - gone_since >= self._takeover_after_s:
                    LOGGER.warning("the sidecar at %s is gone", self._path)
                    return
            await asyncio.sleep(next(looks))

    # --- our own ---

    async def _run_child(self) -> None:
        """
        Start a child, and return when it has ended and the wait for the next one is over.

        Raises:
            SidecarUnavailable: the very first one has never been ready, and nobody else serves either.
        """
        self._state = self._coming
        try:
            self._child = child = await self._started()
            try:
                ready_s = await self._until_it_ends(child)
                self._state = self._coming
            except asyncio.CancelledError:
                # From here on another worker may start one: ours takes no more connections, it only finishes.
                child.terminate()
                self._lock.release()
                raise
            finally:
                self._last_exit = await child.end(self._stop_timeout_s)
        finally:
            self._child = None
        if await ask(self._path) is not None:
            return  # somebody was faster, and ours has made way
        if not self._was_ready.done():
            raise _unavailable(f"the sidecar ended with {_spelled(self._last_exit)} before it was ready", child.lines)
        LOGGER.warning("the sidecar ended with %s after %.1f s", _spelled(self._last_exit), ready_s)
        await self._back_off(ready_s)

    async def _started(self) -> Child:
        try:
            child = await Child.started(self._command, self._variables())
        except OSError as error:
            raise _unavailable(f"the sidecar cannot be started: {error.strerror}") from error
        self._children += 1
        return child

    async def _until_it_ends(self, child: Child) -> float:
        """Follow a child; returns how long it has been ready."""
        now = asyncio.get_running_loop().time
        ready_since, heard = None, now()
        patience_s = max(self._ready_timeout_s, self._silence_timeout_s)
        looks: Iterator[float] = _looks()
        while not await child.has_ended_within(next(looks)):
            answer = await ask(self._path, min(ANSWER_S, patience_s / 2))
            if answer is not None and answer.status:
                heard, patience_s = now(), self._silence_timeout_s
                self._note(answer, State.READY)
                if ready_since is None and answer.status == 200:
                    LOGGER.info("the sidecar at %s is ready, pid %d", self._path, child.pid)
                    ready_since, looks = now(), itertools.repeat(min(_LOOK_AT_READY_S, patience_s / 4))
            elif answer is not None and answer.problem is not None:
                heard = now()  # ours, not the child's: no file descriptors, for example
            elif now() - heard >= patience_s:
                LOGGER.error("the sidecar, pid %d, has not answered for %.1f s and is killed", child.pid, patience_s)
                child.kill()
        return 0.0 if ready_since is None else now() - ready_since

    def _variables(self) -> dict[str, str]:
        variables = {name: value for name, value in os.environ.items() if name not in _NOT_THE_CHILD_S}
        # Lines that nobody would see are not written: each costs the proxy 7 µs and the app as much again.
        variables.setdefault("EMBEDDING_SIDECAR__LOG__LEVEL", _level_name(LOGGER.getEffectiveLevel()))
        variables["EMBEDDING_SIDECAR__LOG__FORMAT"] = "json"
        if self._tcp is not None:
            variables["EMBEDDING_SIDECAR__LISTEN__TCP"] = self._tcp
        variables |= self._environ
        variables.pop("EMBEDDING_SIDECAR__LISTEN__SOCKET", None)  # it would be stronger than the next one
        variables["EMBEDDING_SIDECAR_SOCKET"] = self._path
        return variables

    def _not_ready(self) -> SidecarUnavailable:
        lines = self._child.lines if self._child else ()
        said = f"; it says: {self._detail}" if self._detail else ""
        return _unavailable(
            f"the sidecar at {self._path} was not ready within {self._ready_timeout_s:g} s{said}", lines
        )


def _looks() -> Iterator[float]:
    """Yield the waits between two looks at the socket: short at first, as something is starting."""
    wait_s = _LOOK_FIRST_S
    while True:
        yield wait_s
        wait_s = min(wait_s * 1.2, _LOOK_S)


def _unavailable(what: str, lines: Sequence[str] = ()) -> SidecarUnavailable:
    said = "".join(f"\n  {line}" for line in lines)
    return SidecarUnavailable(f"{what}; its last lines:{said}" if lines else what, code="sidecar_not_started")


def _spelled(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _tell_of_defect(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) and not isinstance(error, SidecarUnavailable):
        LOGGER.error("the supervision of the sidecar has failed", exc_info=error)


def _level_name(level: int) -> str:
    """Return the proxy's name for the least level that a logger takes."""
    return next((name for bound, name in ((10, "debug"), (20, "info"), (30, "warning")) if level <= bound), "error")
