"""What an aggregator's operator sees of its store."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator.main import REGISTRY, print_status
from aggregator.registry import SqliteRegistry
from aggregator.resources import Phase
from aggregator.store import Store
from datavector.errors import UsageError
from datavector.model import WEIGHTS, BaseModel
from tests.aggregator.objects import policy, vector, version


@pytest.fixture
def store(tmp_path: Path, small_base: BaseModel) -> Store:
    made = Store(tmp_path / "store")
    made.import_base(small_base.path)
    return made


def test_the_status_says_what_is_there_and_changes_nothing(store, small_base, capsys):
    registry = SqliteRegistry(store.root / REGISTRY)
    registry.set_policies([policy(base="small")])
    registry.add_vector(vector("north", base=small_base.digest))
    registry.close()
    (store.root / "uploads").rmdir()
    (store.base("small").path / WEIGHTS).unlink()  # hundreds of megabytes that a status need not read
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    print_status(store.root)
    printed = capsys.readouterr().out
    assert "north" in printed
    assert "brain: 1 of 2 hospitals; waiting for one more" in printed
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before


def test_versions_are_listed_as_they_came(store, capsys):
    rules = policy(base="small")
    registry = SqliteRegistry(store.root / REGISTRY)
    for phase, hospital in ((Phase.SUPERSEDED, "north"), (Phase.FAILED, "south"), (Phase.READY, "east")):
        registry.add_version(version(rules, vector(hospital), phase=phase))
    registry.close()
    print_status(store.root)
    printed = capsys.readouterr().out
    positions = [printed.index(phase) for phase in ("Superseded", "Failed", "Ready")]
    assert positions == sorted(positions)


def test_a_folder_without_a_registry_is_named_and_stays_empty(tmp_path):
    with pytest.raises(UsageError, match=r"holds no registry\.sqlite"):
        print_status(tmp_path)
    assert list(tmp_path.iterdir()) == []
