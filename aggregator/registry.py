"""The registry of objects: who keeps DataVectors, policies and versions. Here: SQLite, for the embedded mode."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, TypeVar

from aggregator.reconcile import withdraw
from aggregator.resources import DataVector, MergePolicy, ModelVersion, Resource, utc_now

AnyResource = TypeVar("AnyResource", bound=Resource)


class Registry(Protocol):
    """What receiver and reconciliation need of a registry. Every call is durable when it returns."""

    def policies(self) -> list[MergePolicy]: ...

    def vectors(self) -> list[DataVector]: ...

    def versions(self) -> list[ModelVersion]: ...

    def add_vector(self, vector: DataVector) -> DataVector:
        """Records a vector; the one that is already there under that name wins and is returned."""

    def add_version(self, version: ModelVersion) -> ModelVersion:
        """Records a version; the one that is already there under that name wins and is returned."""

    def save(self, *changed: Resource) -> None:
        """Replaces objects, all or none."""

    def withdraw(self, hospital: str, base_digest: str | None) -> tuple[list[DataVector], list[ModelVersion]]:
        """Withdraws a hospital's vectors and revokes every version with one of them, in one step.

        Returns:
            The hospital's withdrawn vectors, and all revoked versions that contain one.
        """


class SqliteRegistry:
    """Objects as JSON rows of one table; a change is on disk before the call returns."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS objects (kind TEXT, name TEXT, body TEXT NOT NULL, PRIMARY KEY (kind, name))"
        )

    def policies(self) -> list[MergePolicy]:
        return self._list(MergePolicy)

    def vectors(self) -> list[DataVector]:
        return self._list(DataVector)

    def versions(self) -> list[ModelVersion]:
        return self._list(ModelVersion)

    def set_policies(self, policies: Iterable[MergePolicy]) -> None:
        """Makes these the only policies: the policy file is their source of truth."""
        with self._lock, self._connection as transaction:
            transaction.execute("BEGIN IMMEDIATE")
            transaction.execute("DELETE FROM objects WHERE kind = ?", (MergePolicy.kind_name,))
            self._put(policies)

    def add_vector(self, vector: DataVector) -> DataVector:
        return self._add(vector)

    def add_version(self, version: ModelVersion) -> ModelVersion:
        return self._add(version)

    def save(self, *changed: Resource) -> None:
        with self._lock, self._connection as transaction:
            transaction.execute("BEGIN IMMEDIATE")
            self._put(changed)

    def withdraw(self, hospital: str, base_digest: str | None) -> tuple[list[DataVector], list[ModelVersion]]:
        vectors, versions = withdraw(self.vectors(), self.versions(), hospital, base_digest, utc_now())
        self.save(*vectors, *versions)
        return vectors, versions

    def close(self) -> None:
        self._connection.close()

    def _list(self, kind: type[AnyResource]) -> list[AnyResource]:
        with self._lock:
            rows = self._connection.execute(
                "SELECT body FROM objects WHERE kind = ? ORDER BY name", (kind.kind_name,)
            ).fetchall()
        return [kind.parse(json.loads(body)) for (body,) in rows]

    def _add(self, resource: AnyResource) -> AnyResource:
        with self._lock:
            self._connection.execute(
                "INSERT INTO objects VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (resource.kind_name, resource.name, json.dumps(resource.dump())),
            )
            (body,) = self._connection.execute(
                "SELECT body FROM objects WHERE kind = ? AND name = ?", (resource.kind_name, resource.name)
            ).fetchone()
        return type(resource).parse(json.loads(body))

    def _put(self, resources: Iterable[Resource]) -> None:
        self._connection.executemany(
            "INSERT INTO objects VALUES (?, ?, ?) ON CONFLICT (kind, name) DO UPDATE SET body = excluded.body",
            [(resource.kind_name, resource.name, json.dumps(resource.dump())) for resource in resources],
        )
