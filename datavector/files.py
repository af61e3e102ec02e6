"""Files that are either whole or absent, and their digests."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from datavector.errors import DiskFull, UsageError

BLOCK = 1 << 20

TEMPORARY = ".tmp"
_LEFTOVER = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(TEMPORARY)}")  # of mkstemp and atomic_write
_NEUTRAL = {"lost+found"}  # what a fresh volume may hold


@contextmanager
def atomic_write(path: Path, *, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` that replaces it, durably, when the block ends without an error.

    The order is: fsync of the file, rename, fsync of the folder. On an error nothing is left behind.

    Raises:
        DiskFull: no space is left.
    """
    with disk_full_at(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with disk_full_at(path), os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            yield file
            file.flush()
            os.fsync(descriptor)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync(path.parent)


def claim_folder(folder: Path, owner: str) -> None:
    """Marks a new or empty folder as an owner's, who may then remove files in it. There, again, it is taken as it is.

    Args:
        owner: a plain word; the mark is a file of that name.
    Raises:
        UsageError: the folder holds something, and not the mark.
    """
    mark = folder / f".datavector-{owner}"
    if mark.is_file():
        return
    strange = sorted(path.name for path in folder.glob("*") if path.name not in _NEUTRAL)
    if strange and not mark.is_file():  # another process of this owner may have come in between
        raise UsageError(
            f"{folder} holds other files ({strange[0]}), and was not made by the {owner}",
            remedy=f"give the {owner} a folder of its own, where it may remove files; if this is one, create {mark}",
        )
    mark.touch()


@contextmanager
def locked(path: Path, taken: Exception | None = None) -> Iterator[None]:
    """Holds a lock, a file that is made at `path`, through a block; it ends with the process, however that ends.

    Raises:
        taken: somebody else holds it. Without an error to raise, that is waited for.
    """
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if taken is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            assert taken is not None  # noqa: S101  else flock would have waited
            raise taken from error
        yield


def remove_leftovers(folder: Path, *, recursive: bool = True) -> None:
    """Removes what `atomic_write` left in a folder, and the folders below it, when its process was killed.

    Nobody may be writing there. Other hidden files stay, and so does what symbolic links lead to.
    """
    for parent, folders, names in os.walk(folder):
        if not recursive:
            folders.clear()
        for name in filter(_LEFTOVER.fullmatch, names):
            Path(parent, name).unlink(missing_ok=True)


@contextmanager
def disk_full_at(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Turns the operating system's 'no space left' (or a quota's) into DiskFull for `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(path, needed=needed) from error
        raise


def read_at(descriptor: int, target: memoryview, offset: int) -> bool:
    """Fills `target` from byte `offset` on; False where the file ends before."""
    while target:
        done = os.preadv(descriptor, [target], offset)
        if done == 0:
            return False
        target, offset = target[done:], offset + done
    return True


def write_at(descriptor: int, content: bytes | bytearray | memoryview, offset: int) -> None:
    """Writes all of it from byte `offset` on."""
    left = memoryview(content)
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done


def fsync(path: Path) -> None:
    """Makes a file's bytes durable, or the renames and removals in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any, *, mode: int = 0o644) -> None:
    """Writes JSON for people (indented), atomically."""
    with atomic_write(path, mode=mode) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def canonical_json(value: Any) -> bytes:
    """One JSON text per value: sorted keys, no spaces, UTF-8. What digests are computed over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
