"""One merge by several processes on a file system that they share: each writes its share of the blocks into one file.

Beside the output lies a folder `<output>.shares`. In it, for each merge,

- `<key>.data`, of the result's full length from the start, into which every share writes its blocks in place;
- `<key>.<index>-of-<of>.done`, made durably when a share's blocks are durable.

Whoever finds all marks renames the data to the output: nobody needs to be the last, and a second renaming does no harm.
A share that was killed has no mark: run it again, with the same index, and it writes the same bytes. A share that runs
again after the end finds all marks and the output, and has nothing to do; so the marks stay. Remove the folder when all
processes have ended. The key is of the merge's digest, so what another merge to the same output left is not mixed in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datavector.errors import ConfigError, MergeError
from datavector.files import atomic_write, disk_full_at, fsync

KEY = 16  # hexadecimal digits


@dataclass(frozen=True)
class Share:
    """A part of a merge that `of` processes do together; see above.

    Raises:
        ConfigError: there is no such part.
    """

    index: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise ConfigError(f"share {self.index} of {self.of}", remedy="number the shares from 0 on")


class SharedFile:
    """The output of a merge, of which this process writes a share."""

    def __init__(self, output: Path, digest: str, size: int, share: Share) -> None:
        self.output = output
        self.size = size
        self.folder = output.with_name(f"{output.name}.shares")
        key = digest.rpartition(":")[2][:KEY]
        self.data = self.folder / f"{key}.data"
        self.marks = [f"{key}.{index}-of-{share.of}.done" for index in range(share.of)]
        self.mark = self.marks[share.index]

    def is_written(self) -> bool:
        """Whether an earlier run has written this share.

        Raises:
            MergeError: marks say so of some share, but what was written is gone.
        """
        done = self._done()
        if done and not (self.data.exists() or (self._all_done() and self.output.exists())):
            raise MergeError(
                f"shares of {self.output} are marked as done, but what they wrote is gone",
                remedy=f"remove {self.folder} and run all shares again",
            )
        return self.mark in done

    @contextmanager
    def open(self) -> Iterator[int]:
        """The data, to write this share's blocks into; when that ends without an error, the share is done.

        Raises:
            DiskFull: no space is left.
        """
        with disk_full_at(self.output):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.data, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.ftruncate(descriptor, self.size)
                yield descriptor
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        with atomic_write(self.folder / self.mark):
            pass

    def finish(self) -> None:
        """Gives the output its name if all shares are done; any number of times is as once."""
        if not self._all_done():
            return
        try:
            self.data.replace(self.output)
        except FileNotFoundError:  # another share was first
            return
        fsync(self.folder)
        fsync(self.output.parent)

    def _all_done(self) -> bool:
        return self._done() == set(self.marks)

    def _done(self) -> set[str]:
        """The marks that are there. Listed, as a network file system may remember that a name was not there."""
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        return there & set(self.marks)
