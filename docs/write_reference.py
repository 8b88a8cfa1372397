"""Writes the generated parts of docs/: the reference of settings."""

from pathlib import Path

from proxy.wiring.config import reference

MARK = "<!-- from here on written by `make docs` -->\n"


def main() -> None:
    """Replace everything below the mark."""
    page = Path(__file__).with_name("configuration.md")
    kept, mark, _ = page.read_text(encoding="utf-8").partition(MARK)
    page.write_text(kept + mark + "\n" + reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
