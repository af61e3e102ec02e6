"""Generates the CustomResourceDefinitions, and tells whether the committed ones are current."""

import sys
from pathlib import Path

from aggregator.crds import files, write

FOLDER = Path(__file__).parent.parent / "charts/crds/templates"


def stale() -> list[str]:
    """Names of committed files that are not what the types say: of another text, missing, or too many."""
    expected = files()
    committed = {path.name: path.read_text() for path in FOLDER.glob("*.yaml")}
    return sorted(name for name in expected.keys() | committed.keys() if expected.get(name) != committed.get(name))


def main() -> None:
    if "--write" in sys.argv:
        write(FOLDER)
        return
    if names := stale():
        sys.exit(f"definitions are not current: {', '.join(names)}; run `make crds`")
    print("custom resource definitions are current")


if __name__ == "__main__":
    main()
