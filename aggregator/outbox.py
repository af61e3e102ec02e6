"""Vectors on their way into the Kubernetes API: first on disk, so that an outage of the API loses nothing.

    <store>/outbox/<vector>.json    a DataVector as it is wanted: there, or Withdrawn

A thread sends what waits. A file goes when the API has the object as it is wanted, and the cache has the API's answer;
until then it is sent again, also after a restart. Sending twice changes nothing.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Collection
from pathlib import Path

from pydantic import ValidationError

from aggregator.cluster import FIRST_PAUSE, LONGEST_PAUSE, Cache, ClusterRegistry, complain
from aggregator.kube import Api
from aggregator.reconcile import revocations, withdraw
from aggregator.resources import DataVector, ModelVersion, utc_now
from datavector.errors import ApiUnavailable, UsageError
from datavector.files import fsync, write_json

log = logging.getLogger(__name__)


class OutboxRegistry(ClusterRegistry):
    """The registry of the receiver: a vector or a withdrawal is on disk when the call returns, and in the API soon.

    What it lists is the cache under what waits, so a withdrawal counts at once: versions with a withdrawn vector are
    Revoked here before the operator has written that.

    Raises:
        UsageError: the outbox holds a file that this version does not understand.
    """

    def __init__(self, api: Api, cache: Cache, folder: Path) -> None:
        super().__init__(api, cache)
        self._folder = folder
        folder.mkdir(0o700, exist_ok=True)
        self._lock = threading.RLock()
        self._waiting = {vector.name: vector for vector in map(_read, sorted(folder.glob("*.json")))}
        self._news = threading.Event()
        self._stopping = threading.Event()

    def vectors(self) -> list[DataVector]:
        waiting = self.waiting()  # before the cache is read: what goes from here is there by then
        vectors = {vector.name: vector for vector in super().vectors()}
        for vector in waiting:
            known = vectors.get(vector.name)
            if known is None or (known.granted and not vector.granted):
                vectors[vector.name] = vector
        return list(vectors.values())

    def versions(self) -> list[ModelVersion]:
        versions = super().versions()
        revoked = {version.name: version for version in revocations(self.vectors(), versions, utc_now())}
        return [revoked.get(version.name, version) for version in versions]

    def waiting(self) -> list[DataVector]:
        """What the API does not have yet, as it is wanted: withdrawals first, each part by name."""
        with self._lock:
            return sorted(self._waiting.values(), key=lambda vector: (vector.granted, vector.name))

    def add_vector(self, vector: DataVector) -> DataVector:
        with self._lock:
            known = next((each for each in self.vectors() if each.name == vector.name), None)
            if known is None:
                self._put(vector)
        return known or vector

    def withdraw(
        self, hospital: str, base_digest: str | None, arriving: Collection[DataVector] = ()
    ) -> tuple[list[DataVector], list[ModelVersion]]:
        with self._lock:
            vectors = {vector.name: vector for vector in (*arriving, *self.vectors())}
            taken_back, revoked = withdraw(vectors.values(), self.versions(), hospital, base_digest, utc_now())
            for vector in taken_back:
                if vectors[vector.name].granted:
                    self._put(vector)
        return taken_back, revoked

    def start(self) -> None:
        """Begins to send, in a thread of its own."""
        threading.Thread(target=self._keep_sending, name="outbox", daemon=True).start()

    def stop(self) -> None:
        """Sends nothing more; no file goes after this call."""
        with self._lock:
            self._stopping.set()
        self._news.set()

    def _put(self, vector: DataVector) -> None:
        write_json(self._path(vector), vector.dump(), mode=0o600)
        self._waiting[vector.name] = vector
        self._news.set()

    def _path(self, vector: DataVector) -> Path:
        return self._folder / f"{vector.name}.json"

    # --- In the thread

    def _keep_sending(self) -> None:
        pause, said = FIRST_PAUSE, set[str]()
        while not self._stopping.is_set():
            faults = self._send_waiting()
            if said and not faults:
                log.info("what waited for the Kubernetes API has been sent")
            said = {complain(error, said) for error in faults}
            self._news.wait(pause if faults else None)
            self._news.clear()
            pause = min(2 * pause, LONGEST_PAUSE) if faults else FIRST_PAUSE

    def _send_waiting(self) -> list[Exception]:
        """Tries everything that waits once. What the API refuses stays: a person may mend the cause."""
        faults = list[Exception]()
        for vector in self.waiting():
            try:
                self._send(vector)
            except ApiUnavailable as error:
                return [*faults, error]
            except Exception as error:  # a thread that ended would send nothing any more
                faults.append(error)
        return faults

    def _send(self, vector: DataVector) -> None:
        if vector.granted:
            super().add_vector(vector)
        else:
            self.withdraw_vector(vector)
        with self._lock:
            if self._waiting[vector.name] is vector and not self._stopping.is_set():  # else withdrawn meanwhile
                self._path(vector).unlink(missing_ok=True)
                fsync(self._folder)
                del self._waiting[vector.name]


def _read(path: Path) -> DataVector:
    try:
        return DataVector.parse(json.loads(path.read_text()))
    except (ValueError, ValidationError) as error:
        raise UsageError(
            f"{path} cannot be read ({error})",
            remedy="start the version of this program that wrote it, until the outbox is empty",
        ) from error
