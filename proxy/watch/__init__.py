"""Floor 2, looks on and never touches: facts and snapshots become health, log lines, status and metrics."""
