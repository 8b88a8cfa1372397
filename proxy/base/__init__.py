"""Floor 1: words that every room uses. Imports the standard library only, and nothing of the floors above."""
