"""Generates the gRPC stubs from proto/, and tells whether the committed ones are current."""

import filecmp
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
PACKAGE = Path("datavector/wire/v1")


def generate(output: Path) -> list[Path]:
    """Writes the stubs below `output` and returns their paths relative to it."""
    # The virtual path makes the generated imports those of the Python package; the protobuf package stays
    # datavector.v1.
    sources = sorted((ROOT / "proto/datavector/v1").glob("*.proto"))
    arguments = [
        "protoc",
        f"--proto_path={PACKAGE}={ROOT / 'proto/datavector/v1'}",
        f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
        *(f"--{kind}_out={output}" for kind in ("python", "pyi", "grpc_python")),
        *(str(PACKAGE / source.name) for source in sources),
    ]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed")
    return sorted(path.relative_to(output) for path in (output / PACKAGE).glob("*_pb2*"))


def main() -> None:
    if "--write" in sys.argv:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        stale = [
            str(path)
            for path in generate(Path(folder))
            if not (ROOT / path).is_file() or not filecmp.cmp(ROOT / path, Path(folder) / path, shallow=False)
        ]
    if stale:
        sys.exit(f"generated code is not current: {', '.join(stale)}; run `make stubs`")
    print("generated code is current")


if __name__ == "__main__":
    main()
