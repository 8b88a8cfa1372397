"""
The proxy under cProfile, from one SIGUSR1 to SIGUSR2: `python tests/load/profiled.py FILE run --config …`.

Start-up and the time before the load are not in it. A file of its own, run by its path, since the proxy may be that of
another checkout, which is the current folder.
"""

from __future__ import annotations

import cProfile
import os
import runpy
import signal
import sys


def main() -> None:
    """Run the proxy's command; the profile is in FILE once it is there."""
    output = sys.argv.pop(1)
    profile = cProfile.Profile()

    def stop(*_: object) -> None:
        profile.disable()
        profile.dump_stats(f"{output}.part")
        os.rename(f"{output}.part", output)

    signal.signal(signal.SIGUSR1, lambda *_: profile.enable())
    signal.signal(signal.SIGUSR2, stop)
    # In place of this file's folder, whose names would hide others.
    sys.path[0] = os.getcwd()
    runpy.run_module("proxy", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
