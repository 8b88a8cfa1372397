"""`python -m proxy` is `embedding-sidecar`."""

import sys

from proxy.wiring.cli import main

if __name__ == "__main__":
    sys.exit(main())
