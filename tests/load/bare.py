"""The yardstick: the reverse proxy one would write in thirty lines of aiohttp. `python -m tests.load.bare URL PORT`."""

from __future__ import annotations

import asyncio
import sys

import aiohttp
import uvloop
from aiohttp import web

LIFE_S = 3600.0


async def serve(target: str, port: int) -> None:
    """Pass every body on as it is, over pooled connections without a bound, and the answer back."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:

        async def handle(request: web.Request) -> web.Response:
            body = await request.read()
            async with session.post(target, data=body, headers={"Content-Type": "application/json"}) as answer:
                return web.Response(status=answer.status, body=await answer.read(), content_type="application/json")

        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/embeddings", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        print(f"listening 127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await asyncio.sleep(LIFE_S)


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], int(sys.argv[2])))
