"""Statistics that a policy's method reads beside the vectors: of which vectors they are wanted, and how they come in.

A file of them belongs to one vector. It comes once, is checked as a vector is, and is erased with the vector. One that
is cut off on its way goes on from where it was.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from aggregator.appending import SHA256, Read, append, interrupted
from aggregator.calibration import not_waiting
from aggregator.ending import Ending, endable
from aggregator.metrics import Metrics
from aggregator.reconcile import Vectors
from aggregator.registry import Registry
from aggregator.resources import DataVector
from aggregator.store import PART, Store
from datavector.errors import AlreadyWithdrawn, ArtifactError, DiskFull, NotFound, ProtocolError, WrongLayout
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

    vector: DataVector = field(compare=False)  # its object changes; its name does not
    name: str
    kind: str

    @property
    def id(self) -> str:
        return f"{self.name}.{self.kind}"

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
        self._streams: dict[Wanted, Ending] = {}

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
        raise not_waiting(hospital, task_id)

    def begin(self, wanted: Wanted, base: BaseModel, info: StatisticsInfo) -> tuple[int, bool]:
        """The durable offset, and whether statistics of this kind are here already.

        Raises:
            ProtocolError: the announcement makes no sense.
            WrongLayout: the size is not that of this base model's statistics.
            DiskFull: the rest has no room.
        """
        if self._is_here(wanted):
            return info.size, True
        part = self._take_over(wanted, base, info)
        return part.stat().st_size if part.is_file() else 0, False

    async def receive(self, wanted: Wanted, base: BaseModel, info: StatisticsInfo, offset: int, read: Read) -> None:
        """Takes messages (chunk*, final) that go on from `offset`, and commits.

        Raises:
            ProtocolError, WrongLayout: the announcement makes no sense.
            TryAgain: the stream ended early, or another one took over; what arrived is kept.
            ArtifactError, DiskFull: nothing is kept.
            NotFound: nobody wants it any more; nothing is kept.
            AlreadyWithdrawn: the hospital withdrew while it came; nothing is kept.
        """
        if self._is_here(wanted):
            return
        part = self._take_over(wanted, base, info)
        try:
            part.parent.mkdir(exist_ok=True)
            async with endable() as ending:
                self._streams[wanted] = ending
                try:
                    scanner = _scanner(wanted.kind, base)
                    await append(part, offset, read, scanner, info.sha256, ending, self._metrics)
                    await asyncio.to_thread(fsync, part)
                    ending.check()
                finally:
                    if self._streams.get(wanted) is ending:
                        del self._streams[wanted]
            if wanted.name not in {vector.name for vector in self._usable().get(wanted.base_digest, ())}:
                raise not_waiting(wanted.vector.spec.hospital, wanted.id)  # replaced meanwhile
            part.rename(part.with_suffix(""))
            fsync(part.parent)
        except FileNotFoundError:  # it was erased with its vector
            raise not_waiting(wanted.vector.spec.hospital, wanted.id) from None
        except (AlreadyWithdrawn, ArtifactError, DiskFull, NotFound):
            part.unlink(missing_ok=True)
            raise
        self._wake()

    def withdraw(self, hospital: str, base_digest: str | None) -> None:
        """Ends what a hospital is sending beside its vectors of one base, or of all."""
        reason = AlreadyWithdrawn("this hospital withdrew while its statistics were on their way", remedy="send none")
        for wanted, ending in self._streams.items():
            if wanted.vector.spec.hospital == hospital and base_digest in (None, wanted.base_digest):
                ending.end(reason)

    def _of(self, hospital: str, asked: Asked) -> Iterator[Wanted]:
        """What is asked for beside a hospital's vectors, whether it is here or not."""
        usable = self._usable() if asked else {}
        for base, kind in sorted(asked):
            for vector in usable.get(base, ()):
                if vector.spec.hospital == hospital:
                    yield Wanted(vector, vector.name, kind)

    def _usable(self) -> dict[str, tuple[DataVector, ...]]:
        return Vectors.of(self._registry.vectors()).usable

    def _is_here(self, wanted: Wanted) -> bool:
        spec = wanted.vector.spec
        return wanted.kind in self._store.statistics(spec.hospital, spec.artifact.digest)

    def _take_over(self, wanted: Wanted, base: BaseModel, info: StatisticsInfo) -> Path:
        """Where a file is while it comes, after its announcement was checked: only one of a kind, and by one stream."""
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
        if older := self._streams.pop(wanted, None):
            older.end(interrupted("another stream of these statistics took over"))
        spec = wanted.vector.spec
        file = self._store.statistics_file(spec.hospital, spec.artifact.digest, wanted.kind, info.sha256)
        part = file.with_name(f"{file.name}.{PART}")
        for other in part.parent.glob(f"{wanted.vector_sha256}.{wanted.kind}.*"):
            if other != part:  # measured anew, with another result
                other.unlink()
        missing = info.size - (part.stat().st_size if part.is_file() else 0)
        if shutil.disk_usage(self._store.root).free < missing:
            raise DiskFull(part, needed=missing)
        return part


def _scanner(kind: str, base: BaseModel) -> VectorScanner:
    least = 0.0 if kind == FISHER else -LARGEST  # Fisher information is a mean of squares
    return VectorScanner(layout_of(kind, base), f"file of {kind} statistics", least)
