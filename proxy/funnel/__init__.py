"""Floor 2, many callers become few calls: admission → cache → coalesce → microbatch. asyncio, no HTTP."""
