"""Whom the receiver denies: hospitals or certificates, one a line. A list that cannot be read denies everybody."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Protocol

from datavector.errors import Denied
from datavector.wire.certs import CertificateReport

log = logging.getLogger(__name__)


class DenyList(Protocol):
    """Hospital names or SHA-256 certificate fingerprints."""

    def names(self, peer: CertificateReport) -> bool:
        """Whether the list holds a hospital or its certificate.

        Raises:
            Denied: the list cannot be read: a lost mount must not let anyone back in.
        """


class DenyFile:
    """A file, re-read when it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state: tuple[int, int, int] | None = None
        self._entries: frozenset[str] = frozenset()

    def names(self, peer: CertificateReport) -> bool:
        try:
            status = self._path.stat()
            state = (status.st_mtime_ns, status.st_size, status.st_ino)
            if state != self._state:
                self._entries = parse_entries(self._path.read_text())
                self._state = state
        except (OSError, ValueError) as error:
            log.error("the deny list %s cannot be read: %s", self._path, error)
            raise unknown() from error
        return listed(peer, self._entries)


_ENTRY = re.compile(r"[0-9a-f]{64}|[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def parse_entries(text: str) -> frozenset[str]:
    """The names and fingerprints of a list's text, where `#` begins a comment; what is neither is logged.

    Commas and blanks divide entries as ends of lines do: who denies in a hurry is understood.
    """
    lines = (line.partition("#")[0].lower().replace(",", " ") for line in text.splitlines())
    entries = frozenset(entry.removeprefix("sha256:").replace(":", "") for line in lines for entry in line.split())
    for entry in entries:
        if not _ENTRY.fullmatch(entry):
            log.error("the deny list names %r, which is neither a hospital nor 64 hexadecimal digits", entry[:80])
    return entries


def listed(peer: CertificateReport, entries: frozenset[str]) -> bool:
    return bool(entries & {peer.hospital, peer.fingerprint})


def unknown() -> Denied:
    """What everybody is told while there is no list to look at."""
    return Denied("the aggregator cannot tell whom to deny", remedy="ask the aggregation site")
