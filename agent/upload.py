"""Sends a vector, or statistics beside it, until the aggregator has committed it, whatever happens to the link."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from agent.client import Client, Progress
from agent.ledger import Sending
from datavector.errors import TryAgain
from datavector.wire.chunks import CHUNK, frame_chunk
from datavector.wire.v1.exchange_pb2 import (
    BeginUploadReply,
    StatisticsInfo,
    Task,
    UploadFinal,
    UploadOpen,
    UploadReply,
    UploadRequest,
    VectorInfo,
)


@dataclass(frozen=True)
class Delivery:
    """A vector that the aggregator has: its name there, and the bytes sent for it (0 if it was there already)."""

    vector: str
    sent: int


def upload(client: Client, path: Path, info: VectorInfo, *, on_progress: Progress | None = None) -> Delivery:
    """Uploads the vector file `path` as `info` describes it.

    Every try asks for the durable offset first, so after a cut only what was in flight is sent again. The ledger has
    lines for the announcement, and for the vector, with the bytes that really left, unless it is there already.

    Raises:
        ArtifactError: the aggregator found the vector altered, of another model, or not finite.
        AlreadyWithdrawn: the hospital withdrew; nothing more is sent.
        QuotaExceeded, DiskFull, Refused: it does not take the vector.
        Unreachable: the client's patience is at its end.
        Interrupted: the client was interrupted; calling again goes on from the durable offset.
    """
    with client.announcing(info) as announcing:
        begun = client.patiently(lambda: client.begin_upload(info), announcing)
    if begun.committed:
        return Delivery(begun.vector, 0)
    with client.sending_vector(info) as sending:
        way = _Way(partial(client.begin_upload, info), client.send_upload, UploadOpen(vector=info))
        reply, sent = _send(client, path, info, way, sending, on_progress)
    return Delivery(reply.vector, sent)


def send_statistics(
    client: Client, task: Task, path: Path, info: StatisticsInfo, *, on_progress: Progress | None = None
) -> int:
    """Sends a file of statistics for a task, as `upload` sends a vector; returns the bytes that left.

    Raises:
        NotFound: they are no longer wanted.
    """
    with client.sending_statistics(task, info) as sending:
        way = _Way(partial(client.begin_statistics, info), client.send_statistics, UploadOpen(statistics=info))
        return _send(client, path, info, way, sending, on_progress)[1]


Reply = BeginUploadReply | UploadReply


@dataclass(frozen=True)
class _Way:
    """The calls that take a file to the aggregator, and how its stream is opened."""

    begin: Callable[[], BeginUploadReply]
    send: Callable[[Iterator[bytes]], Reply]
    opening: UploadOpen


def _send(
    client: Client,
    path: Path,
    info: VectorInfo | StatisticsInfo,
    way: _Way,
    sending: Sending,
    on_progress: Progress | None,
) -> tuple[Reply, int]:
    """Tries until the file is committed; returns the aggregator's last answer and the bytes that left."""
    sent = 0

    def on_chunk(size: int, offset: int) -> None:
        nonlocal sent
        sent += size
        sending.measured(bytes=sent, sha256=info.sha256)
        if on_progress:
            on_progress(offset, info.size)

    def attempt() -> Reply:
        begun = way.begin()
        if begun.committed:
            return begun
        try:
            return way.send(_messages(path, info, way.opening, begun.offset, sending, on_chunk))
        except TryAgain:
            sending.demand_consent()  # a stream that ended early because of that is not tried again
            raise

    sending.measured(bytes=0, sha256=info.sha256)
    return client.patiently(attempt, sending), sent


def _messages(
    path: Path,
    info: VectorInfo | StatisticsInfo,
    opening: UploadOpen,
    offset: int,
    sending: Sending,
    on_chunk: Callable[[int, int], None],
) -> Iterator[bytes]:
    """open, chunk*, final: serialised, from `offset` on; without final, so that it does not count, once withdrawn.

    gRPC asks for them in a thread of its own and would print an error from here, so that none is raised.

    Args:
        on_chunk: takes each chunk's size and end.
    """
    opening.offset = offset
    yield UploadRequest(open=opening).SerializeToString()
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while sending.consented and (chunk := file.read(CHUNK)):
            offset += len(chunk)
            on_chunk(len(chunk), offset)
            yield frame_chunk(chunk)
    if sending.consented:
        yield UploadRequest(final=UploadFinal(size=info.size, sha256=info.sha256)).SerializeToString()
