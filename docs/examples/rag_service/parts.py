"""
What the app consists of, and who needs whom.

    rag ──► database      a pool; PostgreSQL as our child where $DATABASE_URL names none
        └─► embeddings    the adapter; the proxy as our child where nobody serves its socket
"""

from __future__ import annotations

from rag_adapter import EmbeddingClient, EmbeddingService
from rag_service.database import Database
from rag_service.manager import ServiceManager
from rag_service.rag import RAGTool
from rag_service.settings import Settings


def registered(settings: Settings) -> ServiceManager:
    """Return a manager that knows all parts and has started none of them."""
    manager = ServiceManager()

    async def database() -> Database:
        return await Database.start(settings.database_url, folder=settings.folder, dimensions=settings.dimensions)

    async def rag() -> RAGTool:
        embeddings: EmbeddingService = manager.instances["embeddings"]
        return RAGTool(manager.instances["database"], embeddings, model=settings.model, dimensions=settings.dimensions)

    manager.register_service("database", "storage", [], Database.is_healthy, database, Database.stop)
    manager.register_service(
        *EmbeddingService.registration(
            "embeddings",
            is_health_awaited=True,
            client=EmbeddingClient(client_name="rag"),
            supervise="auto",
            ready_timeout_s=settings.ready_timeout_s,
        )
    )
    manager.register_service("rag", "tool", ["database", "embeddings"], lambda _: True, rag, RAGTool.aclose)
    return manager
