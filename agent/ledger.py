"""What left this building: one JSON line for everything the agent sends, written before it is sent.

A "sending" line is on disk before the first byte goes out and a "sent" line follows when the aggregator has
confirmed it; whatever stops the agent in between, the first line stays. Lines are only ever appended.

The ledger also knows whether the hospital has withdrawn: from that line on nothing but withdrawals may leave, until a
person has the hospital rejoin.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from datavector.errors import AlreadyWithdrawn, UnreadableData
from datavector.files import disk_full_at, fsync

State = Literal["sending", "sent", "unconfirmed", "decided"]
Decision = Literal["withdrawal", "rejoin"]

WITHDRAWAL: Final = "withdrawal"
REJOIN: Final = "rejoin"


@dataclass(frozen=True)
class Entry:
    """One line.

    Attributes:
        time: RFC 3339, UTC.
        state: "sending" before the first byte, "sent" once confirmed, "unconfirmed" if the call failed (some or all
            of it may have left), "decided" for what only this line is about.
        what: "announcement" (of a vector), "vector", "statistics" (beside a vector), "visit", "evaluation", "meeting",
            "withdrawal" or "rejoin".
        bytes: of a "sending" line: size of what is to be sent, 0 for a meeting; of the line that follows: what has
            left, which for a vector that goes on after a cut is less, or more if some was sent twice.
        sha256: of what is sent; empty while a meeting has only begun.
        to: address and identity of the aggregator.
        base: digest of the base model, where it concerns one.
        version: the merged version, where it concerns one.
    """

    time: str
    state: State
    what: str
    bytes: int
    sha256: str
    to: str
    base: str = ""
    version: str = ""


class Ledger:
    """Appends to a ledger file (mode 0600), durably."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._decided: tuple[tuple[int, ...] | None, list[Entry]] = (None, [])  # as of which state of the file

    @contextmanager
    def sending(
        self, what: str, *, to: str, bytes: int = 0, sha256: str = "", base: str = "", version: str = ""
    ) -> Iterator[Sending]:
        """Records that something leaves while the block runs, and whether it arrived.

        The block may tell size and digest that only the end shows, by `Sending.measured`.

        Raises:
            AlreadyWithdrawn: the hospital has withdrawn; nothing but another withdrawal may leave.
            DiskFull: the line cannot be written; then nothing may be sent.
        """
        if what != WITHDRAWAL:
            self.demand_consent(base)
        sending = Sending(self, Entry(_now(), "sending", what, bytes, sha256, to, base, version))
        self.append(sending.entry)
        try:
            yield sending
        except BaseException:
            self.append(replace(sending.entry, time=_now(), state="unconfirmed"))
            raise
        self.append(replace(sending.entry, time=_now(), state="sent"))

    def demand_consent(self, base: str) -> None:
        """
        Args:
            base: digest of the base model that is meant.
        Raises:
            AlreadyWithdrawn: the hospital has withdrawn from it, or from all, and has not rejoined since.
        """
        if (standing := self.withdrawal(base)) is not None:
            raise AlreadyWithdrawn(
                f"this hospital withdrew on {standing.time}, so nothing leaves any more",
                remedy="to take part again run `datavector rejoin`, then train with another seed or other images",
            )

    def withdrawal(self, base: str) -> Entry | None:
        """The withdrawal from a base model that stands now; cheap while nothing is written."""
        standing = None
        for entry in self._decisions():
            if entry.base in ("", base):
                standing = entry if entry.what == WITHDRAWAL else None
        return standing

    def _decisions(self) -> list[Entry]:
        """Withdrawals and rejoins, oldest first; the file is read again when it has changed."""
        state, decisions = self._decided
        if (now := _state_of(self.path)) != state:
            decisions = [entry for entry in read_ledger(self.path) if entry.what in (WITHDRAWAL, REJOIN)]
            self._decided = now, decisions
        return decisions

    def decide(self, what: Decision, base: str = "") -> None:
        """Records what a person decided, for one base model or (empty) for all. It holds at once, whoever is told."""
        self.append(Entry(_now(), "decided", what, 0, "", "nobody", base))

    def append(self, entry: Entry) -> None:
        """Writes one line and waits until it is on disk."""
        fresh = not self.path.exists()
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with disk_full_at(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                line = json.dumps(asdict(entry)).encode() + b"\n"
                _write(descriptor, line if _ends_with_a_line(descriptor) else b"\n" + line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if fresh:
            fsync(self.path.parent)


class Sending:
    """Something on its way out."""

    def __init__(self, ledger: Ledger, entry: Entry) -> None:
        self.entry = entry
        self._ledger = ledger

    @property
    def consented(self) -> bool:
        """Whether more of it may leave: a withdrawal ends it, however far it is."""
        return self._ledger.withdrawal(self.entry.base) is None

    def demand_consent(self) -> None:
        """
        Raises:
            AlreadyWithdrawn: the hospital has withdrawn since this began.
        """
        self._ledger.demand_consent(self.entry.base)

    def measured(self, *, bytes: int, sha256: str) -> None:
        self.entry = replace(self.entry, bytes=bytes, sha256=sha256)


def read_ledger(path: Path) -> list[Entry]:
    """The lines of a ledger, oldest first; a line torn by a crash is left out, a missing file is an empty ledger.

    Raises:
        UnreadableData: the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableData(f"{path} cannot be read ({error.strerror})", remedy="check its permissions") from error
    return [entry for line in lines if (entry := _parse(line)) is not None]


def _state_of(path: Path) -> tuple[int, ...]:
    """What changes with every line that is appended."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _parse(line: bytes) -> Entry | None:
    try:
        return Entry(**json.loads(line))
    except (ValueError, TypeError):
        return None


def _ends_with_a_line(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
