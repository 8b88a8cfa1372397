"""The command. `python -m proxy` is `embedding-sidecar`."""

import sys


def main() -> int:
    """Run the command, or say what has to be installed first: the package alone is the adapter."""
    try:
        from proxy.wiring.cli import main as command
    except ModuleNotFoundError as error:
        print(f"{error.name} is missing; the proxy needs: pip install 'embedding-sidecar[proxy]'", file=sys.stderr)
        return 1
    return command()


if __name__ == "__main__":
    sys.exit(main())
