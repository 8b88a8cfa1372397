"""embedding-sidecar: a local proxy that owns all upstream embedding calls of an app."""
