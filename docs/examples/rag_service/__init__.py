"""
A small RAG service: documents come in, passages that answer a question go out, and no call ever hangs.

Read it from the top of the list below; a file looks down only.

    __main__   the command: serves, takes in some documents, says what to paste
    app        FastAPI: lifespan, routes, errors → HTTP
    rag        RAGTool, shaped like the old class: retrieve_chunks_from_text → _generate_embedding → pgvector
    parts      what the app consists of, registered at the service manager
    manager    the service manager: starts in the order of dependencies, tells health, stops in reverse
    database   the passages in PostgreSQL with pgvector, by a pool
    postgres   PostgreSQL itself as a child of the app, where there is no other
    chunks     text → passages
    budget     how long a request may take
    settings   what the environment says

docs/examples/rag_service/README.md has the commands.
"""
