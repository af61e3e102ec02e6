"""Vectors on their way in: durable offset, takeover, checks while bytes pass by, commit.

The order on commit is: fsync the file, rename it to its blob, fsync the folder, record the vector, answer. A crash
between any two of these is mended by the next try. Until it is recorded, a vector has a folder of its own, with the
record to be: a withdrawal finds it there and takes it back, too.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aggregator.appending import SHA256, Read, append, interrupted
from aggregator.ending import Ending, endable
from aggregator.metrics import Metrics
from aggregator.registry import Registry
from aggregator.resources import (
    MOST_IMAGES,
    Artifact,
    DataVector,
    Metadata,
    ModelVersion,
    VectorSpec,
    VectorStatus,
    last_sequence,
    utc_now,
)
from aggregator.store import PART, RECORD, Store
from datavector.errors import (
    AlreadyWithdrawn,
    ArtifactError,
    DataVectorError,
    DiskFull,
    ProtocolError,
    QuotaExceeded,
    Refused,
    WrongLayout,
)
from datavector.files import disk_full_at, fsync, sha256_file, write_json
from datavector.model import BaseModel
from datavector.vector import VectorScanner
from datavector.wire.v1.exchange_pb2 import BeginUploadReply, VectorInfo

Key = tuple[str, str]

MOST_VECTORS = 2**31  # that a hospital may have numbered


@dataclass(frozen=True)
class Arrival:
    """A vector as it was announced, after the announcement was checked."""

    hospital: str
    base: BaseModel
    sha256: str
    sequence: int
    sample_count: int

    @classmethod
    def parse(cls, hospital: str, base: BaseModel, info: VectorInfo) -> Arrival:
        """
        Raises:
            ProtocolError: the announcement makes no sense.
            WrongLayout: the size is not that of this base model's vectors.
        """
        sound = 1 <= info.sequence <= MOST_VECTORS and 1 <= info.sample_count <= MOST_IMAGES
        if not SHA256.fullmatch(info.sha256) or not sound:
            raise ProtocolError(
                f"a vector was announced with SHA-256 {info.sha256[:80]!r}, sequence {info.sequence} and "
                f"{info.sample_count} samples",
                remedy="announce a digest of 64 hexadecimal digits, and numbers from 1 on",
            )
        if info.size != base.vector_layout.size:
            raise WrongLayout(
                f"the vector has {info.size} bytes, vectors of {base.name} have {base.vector_layout.size}",
                remedy="send a vector of the base model that the aggregator merges",
            )
        return cls(hospital, base, info.sha256, info.sequence, info.sample_count)

    @property
    def key(self) -> Key:
        return self.hospital, self.sha256

    @property
    def name(self) -> str:
        """Deterministic: the same vector of the same hospital has one name."""
        digest = hashlib.sha256(f"{self.base.digest}{self.sha256}".encode()).hexdigest()
        return f"{self.hospital}-{digest[:10]}"

    def vector(self) -> DataVector:
        return DataVector(
            metadata=Metadata(name=self.name, creation_timestamp=(now := utc_now())),
            spec=VectorSpec(
                hospital=self.hospital,
                base_model_ref=self.base.digest,
                sequence=self.sequence,
                artifact=Artifact(digest=f"sha256:{self.sha256}", size=self.base.vector_layout.size),
                sample_count=self.sample_count,
            ),
            status=VectorStatus(stored_at=now),
        )


@dataclass(eq=False)
class Stream:
    """One open Upload call."""

    arrival: Arrival
    ending: Ending
    commit: asyncio.Task[DataVector] | None = None

    def end(self, reason: DataVectorError) -> None:
        """Lets the call end with `reason`: at once if it waits for the hospital, else at its next step."""
        self.ending.end(reason, at_once=self.commit is None)


class Uploads:
    """All uploads of a receiver. At most one stream writes a vector at a time: the newest.

    Args:
        wake: called after every recorded vector, whether or not its hospital still listens.
    """

    def __init__(
        self,
        store: Store,
        registry: Registry,
        metrics: Metrics,
        wake: Callable[[], None],
        *,
        max_open: int,
        max_kept: int,
    ) -> None:
        self._store = store
        self._registry = registry
        self._metrics = metrics
        self._wake = wake
        self._max_open = max_open
        self._max_kept = max_kept
        self._streams: dict[Key, Stream] = {}

    async def begin(self, arrival: Arrival) -> BeginUploadReply:
        """The durable offset; an older stream of the same vector ends here, so that the offset stays true.

        Raises:
            AlreadyWithdrawn: the hospital took this vector back.
            Refused: a newer vector has replaced it.
            QuotaExceeded: it has too many vectors or open uploads.
            DiskFull: the rest of it has no room.
        """
        if stored := await self._stored(arrival):
            return BeginUploadReply(offset=stored.spec.artifact.size, committed=True, vector=stored.name)
        self._take_over(arrival)
        path = self._store.upload(*arrival.key) / PART
        offset = path.stat().st_size if path.is_file() else 0
        needed = arrival.base.vector_layout.size - offset
        if shutil.disk_usage(self._store.root).free < needed:
            raise DiskFull(path, needed=needed)
        self._note(arrival)
        return BeginUploadReply(offset=offset)

    async def receive(self, arrival: Arrival, offset: int, read: Read) -> DataVector:
        """Takes messages (chunk*, final) that go on from `offset`, and commits.

        Raises:
            TryAgain: the stream stalled, ended without its final record, or another one took over; what arrived
                is kept.
            ArtifactError, DiskFull: nothing of the vector is kept.
            AlreadyWithdrawn: the hospital took this vector back, or all while it was on its way.
            Refused: a newer vector has replaced it.
            QuotaExceeded: it has too many vectors or open uploads.
        """
        if stored := await self._stored(arrival):
            self._metrics.uploads.labels("repeated").inc()
            return stored
        self._take_over(arrival)
        folder = self._store.upload(*arrival.key)
        try:
            self._note(arrival)
            async with endable() as ending:
                stream = self._streams[arrival.key] = Stream(arrival, ending)
                try:
                    scanner = VectorScanner(arrival.base.vector_layout)
                    await append(folder / PART, offset, read, scanner, arrival.sha256, ending, self._metrics)
                    # The commit goes on even if the call ends here: a hospital that lost the answer asks again.
                    stream.commit = asyncio.create_task(self._commit(stream, folder / PART))
                    vector = await asyncio.shield(stream.commit)
                finally:
                    if stream.commit is None:
                        self._close(stream)
        except (ArtifactError, DiskFull):
            self._metrics.uploads.labels("refused").inc()
            self._discard(arrival.hospital, folder)
            raise
        except BaseException:
            self._metrics.uploads.labels("interrupted").inc()
            raise
        self._metrics.uploads.labels("committed").inc()
        return vector

    def withdraw(self, hospital: str, base_digest: str | None) -> tuple[list[DataVector], list[ModelVersion]]:
        """Takes back a hospital's vectors of one base, or all: those that are recorded and those on their way.

        Returns:
            The withdrawn vectors, and the revoked versions that contain one.
        """
        arriving = {
            folder: vector
            for folder in self._store.uploads(hospital)
            if (vector := _record_to_be(folder)) and base_digest in (None, vector.spec.base_model_ref)
        }
        vectors, versions = self._registry.withdraw(hospital, base_digest, arriving.values())
        reason = AlreadyWithdrawn("this hospital withdrew while the vector was on its way", remedy="do not send it")
        for stream in self._streams.values():
            if stream.arrival.hospital == hospital and base_digest in (None, stream.arrival.base.digest):
                stream.end(reason)
        for folder in arriving:
            self._discard(hospital, folder)
        return vectors, versions

    async def finish_commits(self) -> None:
        """Waits for the commits that are under way."""
        commits = [stream.commit for stream in self._streams.values() if stream.commit]
        await asyncio.gather(*commits, return_exceptions=True)

    # --- Before the bytes

    async def _stored(self, arrival: Arrival) -> DataVector | None:
        """The vector if it is here already: recorded, just being committed, or left unrecorded by a crash."""
        stream = self._streams.get(arrival.key)
        if stream and stream.commit:
            await asyncio.wait([stream.commit])
        if recorded := self._recorded(arrival):
            return recorded
        blob = self._store.blob(*arrival.key)
        if not await asyncio.to_thread(_holds, blob, arrival.sha256):
            return None
        # While the file was read, another call may have recorded it, and a withdrawal may have taken it back.
        if recorded := self._recorded(arrival):
            return recorded
        if not blob.is_file():
            return None
        self._check_quota(arrival.hospital)
        return self._add(arrival)

    def _recorded(self, arrival: Arrival) -> DataVector | None:
        """The record of a vector that may still be merged, or None if there is no record, and it may come.

        Raises:
            AlreadyWithdrawn: it was taken back.
            Refused: a newer one takes its place.
        """
        vectors = self._registry.vectors()
        vector = next((vector for vector in vectors if vector.name == arrival.name), None)
        last = last_sequence(vectors, arrival.hospital, arrival.base.digest)
        if vector is None:
            if arrival.sequence < last:
                raise Refused(
                    f"{arrival.hospital!r} has sent a newer vector (sequence {last}) than this one "
                    f"({arrival.sequence})",
                    remedy="to send this one all the same, remove vector.json in the agent's state folder, "
                    "and start it",
                )
            return None
        if not vector.granted:
            when = vector.status.withdrawn_at  # in a cluster the operator writes it, a moment later
            raise AlreadyWithdrawn(
                f"{vector.name} was withdrawn" + (f" at {when:%Y-%m-%d %H:%M}Z" if when else ""),
                remedy="consent goes one way: change training.seed or the images, then train again",
            )
        if vector.spec.sequence < last or vector.status.erased_at is not None:
            raise Refused(
                f"{vector.name} was replaced by a newer vector",
                remedy="change training.seed or the images, then train again",
            )
        return vector

    def _add(self, arrival: Arrival) -> DataVector:
        vector = self._registry.add_vector(arrival.vector())
        self._wake()
        shutil.rmtree(self._store.upload(*arrival.key), ignore_errors=True)
        return vector

    def _check_quota(self, hospital: str) -> None:
        kept = [
            vector.name
            for vector in self._registry.vectors()
            if vector.spec.hospital == hospital and vector.status.erased_at is None
        ]
        if len(kept) >= self._max_kept:
            raise QuotaExceeded(
                f"{hospital!r} has {len(kept)} vectors here, more are not kept",
                remedy="withdraw, or wait until replaced ones are erased",
            )

    def _take_over(self, arrival: Arrival) -> None:
        """Makes room for a new stream of this vector within the hospital's quota."""
        older = self._streams.pop(arrival.key, None)
        if older:
            older.end(interrupted("another stream of this vector took over"))
        self._check_quota(arrival.hospital)
        streaming = {sha256 for hospital, sha256 in self._streams if hospital == arrival.hospital}
        if len(streaming) >= self._max_open:
            raise QuotaExceeded(
                f"{arrival.hospital!r} has {len(streaming)} open uploads, more are not taken",
                remedy="let one end first",
            )
        open_now = {*streaming, arrival.sha256}
        abandoned = [folder for folder in self._store.uploads(arrival.hospital) if folder.name not in open_now]
        for folder in abandoned[: max(len(abandoned) + len(open_now) - self._max_open, 0)]:
            self._discard(arrival.hospital, folder)

    def _note(self, arrival: Arrival) -> None:
        """Makes the folder of a vector on its way, with the record to be."""
        path = self._store.upload(*arrival.key) / RECORD
        if not path.is_file():
            write_json(path, arrival.vector().dump(), mode=0o600)

    def _discard(self, hospital: str, folder: Path) -> None:
        """Removes a vector that is not recorded: what has arrived of it, or its blob where a crash left one."""
        recorded = {
            vector.spec.artifact.digest for vector in self._registry.vectors() if vector.spec.hospital == hospital
        }
        if f"sha256:{folder.name}" not in recorded:
            self._store.erase_blob(hospital, folder.name)
        shutil.rmtree(folder, ignore_errors=True)

    async def _commit(self, stream: Stream, path: Path) -> DataVector:
        try:
            with disk_full_at(path):
                await asyncio.to_thread(fsync, path)
                return self._record(stream, path)
        finally:
            self._close(stream)

    def _record(self, stream: Stream, path: Path) -> DataVector:
        """Makes a vector of a file on disk, in one step: a withdrawal comes before it and ends it, or finds it."""
        stream.ending.check()
        blob = self._store.blob(*stream.arrival.key)
        if not blob.parent.is_dir():
            blob.parent.mkdir()
            fsync(blob.parent.parent)
        path.rename(blob)
        fsync(blob.parent)
        try:
            return self._add(stream.arrival)
        except DataVectorError:
            blob.rename(path)
            raise

    def _close(self, stream: Stream) -> None:
        if self._streams.get(stream.arrival.key) is stream:
            del self._streams[stream.arrival.key]


def _record_to_be(folder: Path) -> DataVector | None:
    """The record of a vector on its way; None where nothing of it has arrived."""
    try:
        return DataVector.parse(json.loads((folder / RECORD).read_text()))
    except FileNotFoundError:
        return None


def _holds(path: Path, sha256: str) -> bool:
    try:
        return sha256_file(path) == sha256
    except FileNotFoundError:
        return False
