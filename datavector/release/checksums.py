"""`SHA256SUMS`: one line a file, as `sha256sum -c` reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datavector.errors import ReleaseError
from datavector.files import sha256_file

SUMS = "SHA256SUMS"

_LINE = re.compile(rb"([0-9a-f]{64})  ([^\n]+)\n")


@dataclass(frozen=True)
class Differences:
    """Files, by their path inside the release, that are not as `SHA256SUMS` says."""

    missing: tuple[str, ...]
    altered: tuple[str, ...]
    extra: tuple[str, ...]

    def __str__(self) -> str:
        kinds = (("missing", self.missing), ("altered", self.altered), ("not listed", self.extra))
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds if names)

    def __bool__(self) -> bool:
        return bool(self.missing or self.altered or self.extra)


def write_sums(folder: Path) -> None:
    """Lists every file under `folder`; write it last."""
    (folder / SUMS).write_bytes(_written({name: sha256_file(folder / name) for name in _files(folder)}))


def compare_sums(folder: Path) -> Differences:
    """Compares a release with its `SHA256SUMS`, both ways.

    Raises:
        ReleaseError: there is no such file, or it is no list of checksums.
    """
    listed, found = _read_sums(folder), _files(folder)
    return Differences(
        missing=tuple(sorted(listed.keys() - set(found))),
        altered=tuple(name for name in found if name in listed and sha256_file(folder / name) != listed[name]),
        extra=tuple(name for name in found if name not in listed),
    )


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) != SUMS)


def _read_sums(folder: Path) -> dict[str, str]:
    try:
        content = (folder / SUMS).read_bytes()
        listed = {name.decode(): digest.decode() for digest, name in _LINE.findall(content)}
    except (OSError, UnicodeDecodeError) as error:
        raise ReleaseError(
            f"{folder / SUMS} cannot be read ({error})",
            remedy="give the folder of a release, or fetch the release again",
        ) from error
    if not listed or content != _written(listed):
        raise ReleaseError(f"{folder / SUMS} is no list of SHA-256 checksums", remedy="fetch the release again")
    return listed


def _written(listed: Mapping[str, str]) -> bytes:
    """The file's one form: a line that was added, altered or moved gives other bytes."""
    return "".join(f"{listed[name]}  {name}\n" for name in sorted(listed)).encode()
