"""
The old method, its first repair and the adapter, side by side: who holds the event loop, and for how long?

    .venv-example/bin/python docs/examples/old_method.py
    .venv-example/bin/python docs/examples/old_method.py 1 2 --answer-s 60

Everything is on loopback: an upstream in a process of its own that answers each call after 0.2 s, or as you say,
however many there are at a time. Beside the callers a heartbeat asks for its turn every 5 ms; the longest time that it
did not get it is what every other request, health check and timer of the app has waited. docs/analysis.md explains
what comes out.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import multiprocessing
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path

from openai import AsyncOpenAI, OpenAI

from rag_adapter import EmbeddingClient, SupervisedSidecar

MODEL = "text-embedding-3-small"
WIDTH = 1536
BEAT_S = 0.005
SLOW = "measured:"
"""How the texts begin for which the upstream takes its time: the proxy asks for some others before it is ready."""

Embed = Callable[[str], Awaitable[list[float]]]

# --- three ways to embed a text ---


def old_method(url: str) -> Embed:
    """A thread per call, a client of its own in it, and a join that holds the loop until it is back."""

    async def generate_embedding(text: str) -> list[float]:
        answers: list[list[float]] = []

        def call() -> None:
            client = OpenAI(api_key="unused", base_url=url)
            answers.append(client.embeddings.create(model=MODEL, input=text).data[0].embedding)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(timeout=25)
        if not answers:
            raise RuntimeError("Embedding timed out")
        return answers[0]

    return generate_embedding


def first_repair(url: str) -> Embed:
    """No thread and no join, but still a client per call."""

    async def generate_embedding(text: str) -> list[float]:
        async with AsyncOpenAI(api_key="unused", base_url=url) as client:
            answer = await client.embeddings.create(model=MODEL, input=text)
            return answer.data[0].embedding

    return generate_embedding


def adapter(client: EmbeddingClient) -> Embed:
    """One client for all, the proxy behind it."""
    return client.embed


# --- what is measured ---


class Heartbeat:
    """Notes the longest time for which the loop gave nobody a turn, and the most threads there were."""

    def __init__(self) -> None:
        self.held_s = 0.0
        self.threads = 0

    async def __aenter__(self) -> Heartbeat:
        self._task = asyncio.create_task(self._beat())
        await asyncio.sleep(2 * BEAT_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(2 * BEAT_S)
        self._task.cancel()

    async def _beat(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(BEAT_S)
            self.held_s = max(self.held_s, time.perf_counter() - began - BEAT_S)
            self.threads = max(self.threads, threading.active_count())


async def measured(name: str, embed: Embed, callers: int) -> None:
    """Let so many callers embed at once, each a text of its own, and print how it went."""
    latencies: list[float] = []
    errors = 0

    async def caller(number: int, start: float) -> None:
        nonlocal errors
        try:
            await embed(f"{SLOW} {name} {callers} {number}")
        except Exception:
            errors += 1
        latencies.append(time.perf_counter() - start)

    async with Heartbeat() as heart:
        start = time.perf_counter()
        await asyncio.gather(*(caller(number, start) for number in range(callers)))
    print(
        f"{name:<14}{callers:>7}{statistics.median(latencies):>10.2f} s{max(latencies):>10.2f} s"
        f"{heart.held_s:>12.3f} s{heart.threads:>9}{errors:>8}",
        flush=True,
    )


def cost_of_a_client() -> float:
    """Return how much CPU it takes to make a client, before it has sent anything: its TLS context, mostly."""
    began = time.process_time()
    for _ in range(10):
        OpenAI(api_key="unused", base_url="https://localhost/v1").close()
    return (time.process_time() - began) / 10


# --- the upstream ---


def upstream(address: Connection, answer_s: float) -> None:
    """Serve OpenAI's /v1/embeddings, with the same vector for every text; what is not measured is answered at once."""
    from aiohttp import web

    vector = [1 / WIDTH**0.5] * WIDTH
    as_base64 = base64.b64encode(struct.pack(f"<{WIDTH}f", *vector)).decode()

    async def embeddings(request: web.Request) -> web.Response:
        body = await request.json()
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        if texts[0].startswith(SLOW):
            await asyncio.sleep(answer_s)
        embedding = as_base64 if body.get("encoding_format") == "base64" else vector
        data = [{"object": "embedding", "index": index, "embedding": embedding} for index in range(len(texts))]
        return web.json_response({"object": "list", "data": data, "model": MODEL, "usage": {"total_tokens": 1}})

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/embeddings", embeddings)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address.send(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
        await asyncio.Event().wait()

    asyncio.run(serve())


SETTINGS = """
[upstreams.slow]
kind = "openai"
profile = "generic"
base_url = "{url}"

[models."{model}"]
upstreams = ["slow"]
dimensions = {width}
"""


async def compare(url: str, folder: str, ladder: list[int]) -> None:
    """Print the table."""
    socket = f"{folder}/sidecar.sock"
    sidecar = SupervisedSidecar(socket, config=f"{folder}/sidecar.toml")
    async with sidecar, EmbeddingClient(socket, model=MODEL) as client:
        ways = {"old method": old_method(url), "first repair": first_repair(url), "adapter": adapter(client)}
        print(f"{'':14}{'callers':>7}{'median':>12}{'slowest':>12}{'loop held':>14}{'threads':>9}{'errors':>8}")
        for name, embed in ways.items():
            await embed("warm up: what is imported at the first call is not what is measured")
            for callers in ladder:
                await measured(name, embed, callers)


def main() -> None:
    """Start the upstream, measure, end it."""
    parser = argparse.ArgumentParser(description="Who holds the event loop, and for how long?")
    parser.add_argument("callers", type=int, nargs="*", default=[1, 5, 10], help="at a time (default: 1 5 10)")
    parser.add_argument("--answer-s", type=float, default=0.2, help="how long the upstream takes (default: 0.2)")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=upstream, args=(sending, arguments.answer_s), daemon=True)
    process.start()
    try:
        with tempfile.TemporaryDirectory(prefix="old-") as folder:
            url = receiving.recv()
            settings = SETTINGS.format(url=url, model=MODEL, width=WIDTH)
            Path(folder, "sidecar.toml").write_text(settings, encoding="utf-8")
            asyncio.run(compare(url, folder, arguments.callers))
        print(f"making one OpenAI client: {cost_of_a_client() * 1000:.0f} ms of CPU")
    finally:
        process.terminate()
        process.join()


if __name__ == "__main__":
    main()
