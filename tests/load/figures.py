"""
The figures of docs/operations.md: start to ready, and memory. `make figures` prints them.

Run it with nothing else running. Speed has benchmarks of its own.
"""

from __future__ import annotations

import socket
import statistics
import time
from pathlib import Path

from tests.fakes.sidecar import Sidecar

NOWHERE = """
[upstreams.nowhere]
kind = "openai"
base_url = "http://127.0.0.1:9/v1"
[models.m]
upstreams = ["nowhere"]
"""
CONNECTIONS = 2000


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Print one line per figure."""
    starts = []
    for _ in range(5):
        start = time.perf_counter()
        with Sidecar() as sidecar:
            starts.append(time.perf_counter() - start)
            with_model = resident_bytes(sidecar.pid)
    print(
        f"start to ready, embedded model: {min(starts):.2f} to {max(starts):.2f} s, "
        f"median {statistics.median(starts):.2f}"
    )
    print(f"memory idle, with the embedded model: {with_model / 1e6:.0f} MB")
    with Sidecar(NOWHERE) as sidecar:
        idle = resident_bytes(sidecar.pid)
        print(f"memory idle, without it: {idle / 1e6:.0f} MB")
        host, port = sidecar.address.split(":")
        connections = [socket.create_connection((host, int(port))) for _ in range(CONNECTIONS)]
        for connection in connections:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            connection.recv(4096)
        grown = resident_bytes(sidecar.pid) - idle
        print(f"memory of an idle connection: {grown / CONNECTIONS / 1e3:.1f} kB")
        for connection in connections:
            connection.close()


if __name__ == "__main__":
    main()
