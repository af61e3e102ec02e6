"""Statistics that a policy's method reads beside the vectors: of which vectors they are wanted, and how they come in.

A file of them belongs to one vector. It comes once, is checked as a vector is, and is erased with the vector. One that
is cut off on its way goes on from where it was.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from aggregator.appending import SHA256, Read, append, interrupted
from aggregator.ending import Ending, endable
from aggregator.metrics import Metrics
from aggregator.reconcile import Vectors
from aggregator.registry import Registry
from aggregator.resources import DataVector
from aggregator.store import PART, Store
from datavector.errors import ArtifactError, DiskFull, NotFound, ProtocolError, WrongLayout
from datavector.files import fsync
from datavector.merge.statistics import FISHER, layout_of
from datavector.model import BaseModel
from datavector.vector import LARGEST, VectorScanner
from datavector.wire.v1.exchange_pb2 import StatisticsInfo

Asked = Collection[tuple[str, str]]
"""Digest of a base model, and a kind of statistics that some policy's method reads beside its vectors."""


@dataclass(frozen=True)
class Wanted:
    """Statistics that wait for a hospital to send them."""

    vector: DataVector
    kind: str

    @property
    def id(self) -> str:
        return f"{self.vector.name}.{self.kind}"

    @property
    def base_digest(self) -> str:
        return self.vector.spec.base_model_ref

    @property
    def vector_sha256(self) -> str:
        return self.vector.spec.artifact.digest.removeprefix("sha256:")


class StatisticsUploads:
    """All of them at a receiver. At most one stream writes a file at a time: the newest.

    Args:
        wake: called after every file that has come in.
    """

    def __init__(self, store: Store, registry: Registry, metrics: Metrics, wake: Callable[[], None]) -> None:
        self._store = store
        self._registry = registry
        self._metrics = metrics
        self._wake = wake
        self._streams: dict[Path, Ending] = {}

    def wanted(self, hospital: str, asked: Asked) -> Iterator[Wanted]:
        """What waits for a hospital, of what policies ask for."""
        for wanted in self._of(hospital, asked):
            if not self._is_here(wanted):
                yield wanted

    def find(self, hospital: str, task_id: str, asked: Asked) -> Wanted:
        """The task of that name, whether the hospital has done it or not.

        Raises:
            NotFound: no policy asks for it (any more), or it is not of this hospital.
        """
        for wanted in self._of(hospital, asked):
            if wanted.id == task_id:
                return wanted
        raise _not_wanted(hospital, task_id)

    def begin(self, wanted: Wanted, base: BaseModel, info: StatisticsInfo) -> tuple[int, bool]:
        """The durable offset, and whether statistics of this kind are here already.

        Raises:
            ProtocolError: the announcement makes no sense.
            WrongLayout: the size is not that of this base model's statistics.
            DiskFull: the rest has no room.
        """
        part = self._part(wanted, base, info)
        if self._is_here(wanted):
            return info.size, True
        self._take_over(part)
        for other in part.parent.glob(f"{wanted.vector_sha256}.{wanted.kind}.*"):
            if other != part:  # measured anew, with another result
                other.unlink()
        offset = part.stat().st_size if part.is_file() else 0
        if shutil.disk_usage(self._store.root).free < info.size - offset:
            raise DiskFull(part, needed=info.size - offset)
        return offset, False

    async def receive(self, wanted: Wanted, base: BaseModel, info: StatisticsInfo, offset: int, read: Read) -> None:
        """Takes messages (chunk*, final) that go on from `offset`, and commits.

        Raises:
            TryAgain: the stream ended early, or another one took over; what arrived is kept.
            ArtifactError, DiskFull: nothing is kept.
            NotFound: nobody wants it any more; nothing is kept.
        """
        part = self._part(wanted, base, info)
        if self._is_here(wanted):
            return
        self._take_over(part)
        try:
            if not part.parent.is_dir():
                part.parent.mkdir()
                fsync(part.parent.parent)
            async with endable() as ending:
                self._streams[part] = ending
                try:
                    scanner = _scanner(wanted.kind, base)
                    await append(part, offset, read, scanner, info.sha256, ending, self._metrics)
                    await asyncio.to_thread(fsync, part)
                    ending.check()
                finally:
                    if self._streams.get(part) is ending:
                        del self._streams[part]
            if wanted.vector.name not in {vector.name for vector in self._usable(wanted.base_digest)}:
                raise _not_wanted(wanted.vector.spec.hospital, wanted.id)  # taken back or replaced meanwhile
            part.rename(part.with_suffix(""))
            fsync(part.parent)
        except (ArtifactError, DiskFull, NotFound):
            part.unlink(missing_ok=True)
            raise
        self._wake()

    def _of(self, hospital: str, asked: Asked) -> Iterator[Wanted]:
        """What is asked for beside a hospital's vectors, whether it is here or not."""
        for base, kind in sorted(asked):
            for vector in self._usable(base):
                if vector.spec.hospital == hospital:
                    yield Wanted(vector, kind)

    def _usable(self, base_digest: str) -> tuple[DataVector, ...]:
        return Vectors.of(self._registry.vectors()).usable.get(base_digest, ())

    def _is_here(self, wanted: Wanted) -> bool:
        spec = wanted.vector.spec
        return wanted.kind in self._store.statistics(spec.hospital, spec.artifact.digest)

    def _part(self, wanted: Wanted, base: BaseModel, info: StatisticsInfo) -> Path:
        """Where a file is while it comes, after its announcement was checked."""
        if not SHA256.fullmatch(info.sha256):
            raise ProtocolError(
                f"statistics were announced with SHA-256 {info.sha256[:80]!r}",
                remedy="announce a digest of 64 hexadecimal digits",
            )
        if info.size != (size := layout_of(wanted.kind, base).size):
            raise WrongLayout(
                f"the {wanted.kind} statistics have {info.size} bytes, those of {base.name} have {size}",
                remedy="use a matching version of the agent",
            )
        spec = wanted.vector.spec
        file = self._store.statistics_file(spec.hospital, spec.artifact.digest, wanted.kind, info.sha256)
        return file.with_name(f"{file.name}.{PART}")

    def _take_over(self, part: Path) -> None:
        if older := self._streams.pop(part, None):
            older.end(interrupted("another stream of these statistics took over"))


def _scanner(kind: str, base: BaseModel) -> VectorScanner:
    least = 0.0 if kind == FISHER else -LARGEST  # Fisher information is a mean of squares
    return VectorScanner(layout_of(kind, base), f"file of {kind} statistics", least)


def _not_wanted(hospital: str, task_id: str) -> NotFound:
    return NotFound(f"task {task_id!r} does not wait for {hospital!r}", remedy="ask for tasks again")
