"""The registry of objects: who keeps DataVectors, policies and versions. Here: SQLite, for the embedded mode."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from aggregator.reconcile import withdraw
from aggregator.resources import BaseModelResource, DataVector, MergePolicy, ModelVersion, Phase, Resource, utc_now
from datavector.errors import DiskFull, TryAgain

AnyResource = TypeVar("AnyResource", bound=Resource)


class Registry(Protocol):
    """What receiver and reconciliation need of a registry. Every call is durable when it returns."""

    def policies(self) -> list[MergePolicy]: ...

    def vectors(self) -> list[DataVector]: ...

    def versions(self) -> list[ModelVersion]: ...

    def base_models(self) -> list[BaseModelResource]: ...

    def base_reference(self, reference: str) -> str:
        """What a policy's baseModelRef names in the store: a name or a digest."""

    def complete(self) -> bool:
        """Whether every object is understood: else there may be some that name files which no other does."""

    def add_vector(self, vector: DataVector) -> DataVector:
        """Records a vector; the one that is already there under that name wins and is returned."""

    def add_version(self, version: ModelVersion) -> ModelVersion:
        """Records a version; the one that is already there under that name wins and is returned."""

    def save(self, *changed: Resource) -> None:
        """Replaces objects, all or none.

        A state that was planned before a person's decision never undoes it: one that would bring a Revoked version or
        a withdrawn vector back, or a released one into quarantine, is left out.

        Raises:
            DiskFull: no space is left; nothing has changed.
        """

    def withdraw(
        self, hospital: str, base_digest: str | None, arriving: Collection[DataVector] = ()
    ) -> tuple[list[DataVector], list[ModelVersion]]:
        """Withdraws a hospital's vectors and revokes every version with one of them, in one step.

        Args:
            base_digest: of the base model whose vectors are meant; None for all.
            arriving: vectors on their way, which are recorded as withdrawn.
        Returns:
            The hospital's withdrawn vectors, and all revoked versions that contain one.
        """


class SqliteRegistry:
    """Objects as JSON rows of one table; a change is on disk before the call returns.

    Every list is in the order in which its objects were recorded. Every method raises TryAgain where the file cannot
    be read or written.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._path = path
        self._lock = threading.Lock()
        with self._faults_named():
            self._connection = _read_only(path) if read_only else _connect(str(path))
            if not read_only:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS objects "
                    "(kind TEXT, name TEXT, body TEXT NOT NULL, PRIMARY KEY (kind, name))"
                )

    def policies(self) -> list[MergePolicy]:
        return self._list(MergePolicy)

    def vectors(self) -> list[DataVector]:
        return self._list(DataVector)

    def versions(self) -> list[ModelVersion]:
        return self._list(ModelVersion)

    def base_models(self) -> list[BaseModelResource]:
        return []  # the store's are all there are

    def base_reference(self, reference: str) -> str:
        return reference

    def set_policies(self, policies: Iterable[MergePolicy]) -> None:
        """Makes these the only policies: the policy file is their source of truth."""
        with self._transaction():
            self._connection.execute("DELETE FROM objects WHERE kind = ?", (MergePolicy.kind_name,))
            self._put(policies)

    def complete(self) -> bool:
        return True

    def add_vector(self, vector: DataVector) -> DataVector:
        return self._add(vector)

    def add_version(self, version: ModelVersion) -> ModelVersion:
        return self._add(version)

    def save(self, *changed: Resource) -> None:
        with self._transaction():
            self._put(resource for resource in changed if not self._would_undo(resource))

    def withdraw(
        self, hospital: str, base_digest: str | None, arriving: Collection[DataVector] = ()
    ) -> tuple[list[DataVector], list[ModelVersion]]:
        with self._transaction():
            vectors, versions = self._all(DataVector), self._all(ModelVersion)
            vectors += [vector for vector in arriving if self._get(vector) is None]
            taken_back, revoked = withdraw(vectors, versions, hospital, base_digest, utc_now())
            self._put([*taken_back, *revoked])
        return taken_back, revoked

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, and nobody else writes meanwhile, in this process or another."""
        with self._lock, self._faults_named():
            self._connection.execute("BEGIN IMMEDIATE")
            with self._connection:
                yield

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise DiskFull(self._path) from error
            raise TryAgain(
                f"the registry {self._path} cannot be used ({error})",
                remedy="if this stays, look at the aggregator's disk and the file's permissions",
            ) from error

    def _list(self, kind: type[AnyResource]) -> list[AnyResource]:
        with self._lock, self._faults_named():
            return self._all(kind)

    def _add(self, resource: AnyResource) -> AnyResource:
        with self._transaction():
            known = self._get(resource)
            if known is None:
                self._put([resource])
        return known or resource

    def _would_undo(self, resource: Resource) -> bool:
        known = self._get(resource)
        if isinstance(known, ModelVersion) and isinstance(resource, ModelVersion):
            return known.status.phase is Phase.REVOKED is not resource.status.phase
        if isinstance(known, DataVector) and isinstance(resource, DataVector):
            taken_back = resource.granted and not known.granted
            return taken_back or (known.spec.released and not resource.spec.released)
        return False

    # --- Inside a transaction, or with the lock held

    def _all(self, kind: type[AnyResource]) -> list[AnyResource]:
        rows = self._connection.execute("SELECT body FROM objects WHERE kind = ? ORDER BY rowid", (kind.kind_name,))
        return [kind.parse(json.loads(body)) for (body,) in rows.fetchall()]

    def _get(self, resource: AnyResource) -> AnyResource | None:
        """The object of that kind and name as it stands."""
        row = self._connection.execute(
            "SELECT body FROM objects WHERE kind = ? AND name = ?", (resource.kind_name, resource.name)
        ).fetchone()
        return None if row is None else type(resource).parse(json.loads(row[0]))

    def _put(self, resources: Iterable[Resource]) -> None:
        self._connection.executemany(
            "INSERT INTO objects VALUES (?, ?, ?) ON CONFLICT (kind, name) DO UPDATE SET body = excluded.body",
            [(resource.kind_name, resource.name, json.dumps(resource.dump())) for resource in resources],
        )


def _connect(database: str, *, uri: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(database, uri=uri, check_same_thread=False, isolation_level=None)


def _read_only(path: Path) -> sqlite3.Connection:
    """A connection that writes nothing.

    SQLite reads a file in WAL mode with the help of files beside it, which it would make. They are there while
    somebody has the registry open or was killed; otherwise the file is whole without them.
    """
    alone = not path.with_name(f"{path.name}-wal").exists()
    return _connect(f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if alone else ''}", uri=True)
