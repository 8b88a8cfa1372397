"""Floor 2, the caller's HTTP: accept → decode, and encode on the way back."""
