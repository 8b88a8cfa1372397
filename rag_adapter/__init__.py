"""
What the app installs to reach the sidecar.

So far it knows where the sidecar is (`socket_path()`); any OpenAI client does the rest, see the README.
"""

from rag_adapter.address import socket_path

__all__ = ["socket_path"]
