"""
`python -m rag_service`: serves on loopback, takes some documents in, and says what to paste.

Without arguments the documents are this project's own, docs/*.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from rag_service.app import create_app
from rag_service.rag import RAGTool

HERE = Path(__file__).resolve().parent

GREETING = """
A RAG service at {url}, with {passages} passages of {documents} documents, ready.

  Search      curl -sG {url}/search --data-urlencode 'q=how long is a failing upstream left alone?' -d limit=2
  Take in     curl -s {url}/documents --json '{{"documents": [{{"name": "note", "text": "Otters hold hands."}}]}}'
  Health      curl -s {url}/health
  Too late    curl -sG {url}/search -d q=otters -H 'X-Request-Timeout-Ms: 1'
{kill}
Ctrl-C ends it, and what it has started.
"""
KILL = "  Proxy gone  kill -9 {pid}; curl -sG {url}/search -d q=otters -d limit=1\n"


class Server(uvicorn.Server):
    """Takes the documents in and says hello once it listens."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, paths: list[Path]) -> None:
        super().__init__(config)
        self._app = app
        self._paths = paths

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            await self._greet()

    async def _greet(self) -> None:
        instances = self._app.state.manager.instances
        rag: RAGTool = instances["rag"]
        for path in self._paths:
            await rag.ingest(path.name, await asyncio.to_thread(path.read_text, encoding="utf-8"))
        documents = await instances["database"].documents()
        supervision = instances["embeddings"].snapshot().supervision
        host, port = self.servers[0].sockets[0].getsockname()
        url = f"http://{host}:{port}"
        kill = KILL.format(url=url, pid=supervision.pid) if supervision and supervision.pid else ""
        passages = sum(documents.values())
        print(GREETING.format(url=url, passages=passages, documents=len(documents), kill=kill), flush=True)


def main() -> None:
    """Serve until somebody says stop."""
    parser = argparse.ArgumentParser(prog="python -m rag_service", description="A small RAG service.")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1; 0: any that is free (default: 8000)")
    parser.add_argument("documents", type=Path, nargs="*", help="texts to take in (default: this project's docs/*.md)")
    arguments = parser.parse_args()
    paths = arguments.documents or sorted(HERE.parents[1].glob("*.md"))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Where the proxy becomes our child, it has these settings: the embedded model, no key, no network.
    os.environ.setdefault("EMBEDDING_SIDECAR_CONFIG", str(HERE / "sidecar.toml"))
    app = create_app()
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has shut down by then, and tells who waits for us
        Server(uvicorn.Config(app, port=arguments.port, log_level="warning"), app, paths).run()


if __name__ == "__main__":
    main()
