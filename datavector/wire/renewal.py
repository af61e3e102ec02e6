"""Certificates that are renewed while a process runs, as where a Kubernetes Secret is mounted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from datavector.errors import DataVectorError
from datavector.wire.certs import CertificateReport, Credentials, read_credentials

log = logging.getLogger(__name__)


class Renewable:
    """The files of one side's mutual TLS, and what they held when they could last be used. Threads may share it.

    Args:
        demand: raises what is wrong with a certificate that is good in itself, such as another one's.

    Attributes:
        current: what new connections are made with.

    Raises:
        CertificateError: the files cannot be used.
    """

    def __init__(self, certificate: Path, key: Path, ca: Path, demand: Callable[[CertificateReport], None]) -> None:
        self._paths = (certificate, key, ca)
        self._demand = demand
        self._lock = threading.Lock()
        self._seen = self._look()
        self._refused = ""  # why the newest files are not used
        self.current = self._read()

    def renew(self) -> bool:
        """Takes files that have changed since the last look. Those that cannot be used are logged; the old ones stay.

        Returns:
            Whether `current` is new.
        """
        with self._lock:
            found = self._look()
            if found == self._seen and not self._refused:
                return False
            self._seen = found  # before it is read: a change in between is seen at the next look
            try:
                self.current = self._read()
            except DataVectorError as error:
                if str(error) != self._refused:  # tried again each time: it may only be valid from later on
                    self._refused = str(error)
                    log.error("renewed certificate files are not used, those before them stay in use: %s", error)
                return False
            self._refused = ""
            return True

    def _read(self) -> Credentials:
        credentials = read_credentials(*self._paths)
        self._demand(credentials.report)
        return credentials

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_state(path) for path in self._paths)


def _state(path: Path) -> tuple[int, int, int] | None:
    """What tells that a file has changed, also where a symbolic link on the way to it was turned."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
