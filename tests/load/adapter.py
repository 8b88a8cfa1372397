"""
Speed of the adapter: `python -m tests.load.adapter [--tools DIR]`, `make bench-adapter`.

The app is this process, on one core together with the mock; the proxy has the other one. Exits with 1 when a target is
missed.

    import       a fresh interpreter imports rag_adapter and its client
    warm         one embed after the other, of a text that the proxy's cache knows, over the Unix socket
    thousand     1000 calls of embed at a time, again and again; upstream of 8 slots, 30 ms + 1 ms per text
    threads      32 threads with SyncEmbeddingClient, against the openai package's sync client, same proxy, cached text
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from rag_adapter import EmbeddingClient, SyncEmbeddingClient
from tests.load.bench import TOOLS_VARIABLE
from tests.load.processes import MODEL, Rig
from tests.load.results import Row, ideal, median, table

SLOTS, BASE_MS, PER_INPUT_MS = 8, 30.0, 1.0
CALLERS = 1000
THREADS = 32
WARM_CALLS = 2000
SECONDS = 4.0
RAMP_S = 1.0
"""Slots and batches find their rhythm; what is done by then does not count."""
IMPORTS = 7
BEAT_S = 0.001


def import_ms() -> float:
    """Return how long a fresh interpreter takes to import the adapter and its client; the median."""
    code = (
        "import time; a = time.perf_counter(); from rag_adapter import EmbeddingClient; print(time.perf_counter() - a)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) for _ in range(IMPORTS)]
    return median([float(run.stdout) * 1e3 for run in runs])


async def warm_ms(socket_path: str) -> float:
    """Return the median of one warm call."""
    async with EmbeddingClient(socket_path, model=MODEL) as client:
        await client.embed("a text that is known")
        times = []
        for _ in range(WARM_CALLS):
            start = time.perf_counter()
            await client.embed("a text that is known")
            times.append(time.perf_counter() - start)
    return median(times) * 1e3


async def thousand(socket_path: str, *, as_numpy: bool) -> tuple[float, float]:
    """Return texts per second, and how long the loop was held at the most, ms."""
    held_s = done = 0.0
    begin = end = 0.0

    async def beat() -> None:
        nonlocal held_s
        while True:
            start = time.perf_counter()
            await asyncio.sleep(BEAT_S)
            held_s = max(held_s, time.perf_counter() - start - BEAT_S)

    async def caller(number: int) -> None:
        nonlocal done
        turn = 0
        while (now := time.perf_counter()) < end:
            turn += 1
            await client.embed(f"caller {number} turn {turn}: {'x' * 40}", as_numpy=as_numpy)
            done += now > begin

    async with EmbeddingClient(socket_path, model=MODEL) as client:
        await client.embed("what is loaded at the first call", as_numpy=as_numpy)
        begin = time.perf_counter() + RAMP_S
        end = begin + SECONDS
        beating = asyncio.create_task(beat())
        await asyncio.gather(*(caller(number) for number in range(CALLERS)))
        beating.cancel()
    return done / SECONDS, held_s * 1e3


def by_threads(call: Callable[[], object]) -> float:
    """Return calls per second of all threads together."""
    counts = [0] * THREADS
    end = time.perf_counter() + SECONDS

    def run(number: int) -> None:
        while time.perf_counter() < end:
            call()
            counts[number] += 1

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / SECONDS


def rows(rig: Rig) -> list[Row]:
    """Measure everything, the app's loop first: each object that a process holds is a little more for its collector."""
    found = [Row("import", "rag_adapter with EmbeddingClient", import_ms(), "ms", below=150.0)]
    limits = {"base_ms": BASE_MS, "per_item_ms": PER_INPUT_MS, "max_concurrent": SLOTS, "overflow": "queue"}
    best = ideal(SLOTS, CALLERS, base_ms=BASE_MS, per_input_ms=PER_INPUT_MS)
    found.append(Row("thousand", "ideal", best, "texts/s"))
    for kind, as_numpy in (("lists of floats", False), ("arrays", True)):
        with rig.mock(**limits) as mock, rig.sidecar(mock, f"balance.slots = {SLOTS}") as sidecar:
            per_s, held_ms = asyncio.run(thousand(sidecar.socket_path, as_numpy=as_numpy))
        found += [
            Row("thousand", f"{kind}, of the ideal", per_s / best * 100, "%", at_least=90.0),
            Row("thousand", f"{kind}, the app's loop held", held_ms, "ms", at_most=20.0),
        ]
    with rig.mock() as mock, rig.sidecar(mock) as sidecar:
        found.append(Row("warm", "one cached text, p50", asyncio.run(warm_ms(sidecar.socket_path)), "ms", below=0.5))
        import openai

        theirs = openai.OpenAI(base_url=f"http://{sidecar.address}/v1", api_key="unused", max_retries=0)
        with theirs, SyncEmbeddingClient(sidecar.socket_path, model=MODEL) as ours:
            mine = by_threads(lambda: ours.embed("a text that is known"))
            other = by_threads(lambda: theirs.embeddings.create(model=MODEL, input="a text that is known"))
    found += [
        Row("threads", "SyncEmbeddingClient", mine, "calls/s"),
        Row("threads", "openai", other, "calls/s"),
        Row("threads", "SyncEmbeddingClient ÷ openai", mine / other, "×", at_least=3.0),
    ]
    return found


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="adapter", description="Measure the adapter against its targets.")
    parser.add_argument("--tools", metavar="DIR", default=os.environ.get(TOOLS_VARIABLE, ""))
    measured = rows(Rig(parser.parse_args().tools))
    print(table(measured))
    return 0 if all(row.is_met for row in measured if row.is_target) else 1


if __name__ == "__main__":
    sys.exit(main())
