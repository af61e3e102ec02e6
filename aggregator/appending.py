"""The bytes of an upload: checked and appended to what has arrived of the file, until a final record that fits."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from aggregator.ending import Ending
from aggregator.metrics import Metrics
from datavector.errors import ProtocolError, TryAgain, WrongDigest
from datavector.files import disk_full_at
from datavector.vector import VectorScanner
from datavector.wire.chunks import CHUNK, read_request

Read = Callable[[], Awaitable[bytes | None]]

SHA256 = re.compile(r"[0-9a-f]{64}")


async def append(
    path: Path, offset: int, read: Read, scanner: VectorScanner, sha256: str, ending: Ending, metrics: Metrics
) -> None:
    """Takes messages (chunk*, final) that go on from `offset`, which must be where the file ends.

    Args:
        scanner: has seen nothing yet; what is there already passes through it first.
        sha256: that was announced.

    Raises:
        TryAgain: the stream ended without its final record; what arrived is kept.
        ArtifactError: the file is not what was announced, or not of its layout.
        DiskFull: no space is left.
    """
    with disk_full_at(path), path.open("ab", buffering=0) as file:
        if file.tell() != offset:
            raise interrupted(f"the upload goes on from byte {file.tell()}, not {offset}")
        if offset:
            await asyncio.to_thread(_rescan, path, scanner)
            metrics.resumed_bytes.inc(offset)
        while True:
            message = await read()
            ending.check()
            if message is None:
                raise interrupted("the stream ended without its final record")
            part = read_request(message)
            if not isinstance(part, memoryview):
                break
            scanner.feed(part)
            metrics.received_bytes.inc(len(part))
            while part:
                part = part[file.write(part) :]
    if part.WhichOneof("part") != "final":
        raise ProtocolError("an upload was opened twice", remedy="send open, chunks, final")
    scanner.finish(size=part.final.size, sha256=part.final.sha256)
    if part.final.sha256 != sha256:
        raise WrongDigest(
            f"the {scanner.what} was announced with SHA-256 {sha256}, but ended with {part.final.sha256}",
            remedy="the file changed while it was sent: send it again",
        )


def interrupted(reason: str) -> TryAgain:
    return TryAgain(reason, remedy="what arrived is kept: go on from the durable offset")


def _rescan(path: Path, scanner: VectorScanner) -> None:
    """Passes what has arrived through the scanner again: a resumed upload is checked from its first byte."""
    with path.open("rb", buffering=0) as file:
        while block := file.read(CHUNK):
            scanner.feed(block)
