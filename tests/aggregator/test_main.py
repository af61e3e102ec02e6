"""What an aggregator's operator sees of its store."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from aggregator.main import REGISTRY, print_status
from aggregator.quarantine import release_quarantine
from aggregator.registry import SqliteRegistry
from aggregator.resources import QUARANTINED, Phase, utc_now, with_condition
from aggregator.store import Store
from datavector.errors import NotFound, UsageError
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


def test_a_quarantined_vector_is_named_and_released_by_hand(store, capsys):
    odd = vector("east")
    conditions = with_condition(
        (), QUARANTINED, "True", "OutOfLine", "its norm is 100 times the median", None, utc_now()
    )
    odd = odd.model_copy(update={"status": odd.status.model_copy(update={"conditions": conditions})})
    with contextlib.closing(SqliteRegistry(store.root / REGISTRY)) as registry:
        registry.add_vector(odd)
        registry.add_vector(vector("north"))
    print_status(store.root)
    printed = " ".join(capsys.readouterr().out.split())
    assert "east-1 is quarantined: its norm is 100 times the median" in printed
    assert "datavector release-quarantine east-1" in printed

    with pytest.raises(NotFound, match="quarantined: east-1"):
        release_quarantine(store.root, "north-1")
    assert "its norm is 100 times" in release_quarantine(store.root, "east-1")
    with contextlib.closing(SqliteRegistry(store.root / REGISTRY)) as registry:
        (found, _) = registry.vectors()
        assert (found.spec.released, found.quarantine) == (True, "")
        registry.save(odd)  # what was planned before the decision
        assert registry.vectors()[0].spec.released
    with pytest.raises(UsageError, match="kubectl patch datavector east-1"):
        release_quarantine(store.root / "elsewhere", "east-1")
