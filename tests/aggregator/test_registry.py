"""The SQLite registry: durable, all or none, and a withdrawal is final."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aggregator.registry import SqliteRegistry
from aggregator.resources import CalibrationReport, Consent, Phase
from datavector.errors import DiskFull, TryAgain
from tests.aggregator.objects import BASE, at, policy, vector, version

NORTH, SOUTH = vector("north"), vector("south")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.sqlite"


@pytest.fixture
def registry(path: Path) -> Iterator[SqliteRegistry]:
    opened = SqliteRegistry(path)
    yield opened
    opened.close()


def test_what_was_recorded_is_there_after_opening_again(registry, path):
    ready = version(
        policy(), NORTH, SOUTH, phase=Phase.READY, calibration=CalibrationReport(mode="visit", hospitals=(), images=3)
    )
    registry.add_vector(NORTH)
    registry.add_version(ready)
    registry.set_policies([policy()])
    again = SqliteRegistry(path)  # while the first still has it open, as after a kill
    assert (again.vectors(), again.versions(), again.policies()) == ([NORTH], [ready], [policy()])
    again.close()


def test_a_vector_is_added_once_and_the_first_wins(registry):
    assert registry.add_vector(NORTH) == NORTH
    assert registry.add_vector(vector("north", at=99)) == NORTH
    assert registry.vectors() == [NORTH]


def test_a_version_is_added_once_and_its_progress_stays(registry):
    calibrating = version(policy(), NORTH, SOUTH, phase=Phase.CALIBRATING)
    registry.add_version(calibrating)
    assert registry.add_version(version(policy(), NORTH, SOUTH)) == calibrating


def test_the_policy_file_says_which_policies_there_are(registry):
    registry.set_policies([policy("a"), policy("b")])
    registry.set_policies([policy("b", quiet=1), policy("c")])
    assert registry.policies() == [policy("b", quiet=1), policy("c")]


def test_a_save_is_all_or_none(registry):
    registry.add_vector(NORTH)
    unwritable = version(policy(), NORTH, SOUTH, weights_sha256=object())
    with pytest.raises(Exception, match="serialize"):
        registry.save(vector("north", at=7), unwritable)
    assert registry.vectors() == [NORTH]
    registry.save(vector("north", at=7))
    assert registry.vectors() == [vector("north", at=7)]


def test_a_withdrawal_and_its_revocations_are_one_step(registry, path):
    ready = version(policy(), NORTH, SOUTH, phase=Phase.READY)
    for each in (NORTH, SOUTH):
        registry.add_vector(each)
    registry.add_version(ready)
    seen = []
    other = sqlite3.connect(path)
    registry._connection.set_trace_callback(
        lambda _: seen.append(tuple(sorted(body for (body,) in other.execute("SELECT body FROM objects"))))
    )
    vectors, versions = registry.withdraw("north", None)
    registry._connection.set_trace_callback(None)
    other.close()
    assert [(each.name, each.spec.consent) for each in vectors] == [("north-1", Consent.WITHDRAWN)]
    assert [(each.name, each.status.phase) for each in versions] == [(ready.name, Phase.REVOKED)]
    assert registry.versions() == versions
    assert len(set(seen)) == 1, "another connection never saw a part of it"


def test_withdrawing_again_answers_the_same(registry):
    registry.add_vector(NORTH)
    registry.add_version(version(policy(min_hospitals=1), NORTH, phase=Phase.READY))
    first = registry.withdraw("north", BASE.digest)
    assert registry.withdraw("north", BASE.digest) == first


def test_withdrawing_where_nothing_is_changes_nothing(registry):
    registry.add_vector(NORTH)
    assert registry.withdraw("west", None) == ([], [])
    assert registry.withdraw("north", "sha256:" + "c" * 64) == ([], [])
    assert registry.vectors() == [NORTH]


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.REVOKED])
def test_a_state_from_before_a_withdrawal_never_brings_a_revoked_version_back(registry, phase):
    registry.add_vector(NORTH)
    registry.add_version(version(policy(), NORTH, SOUTH, phase=Phase.RELEASING))
    stale = version(policy(), NORTH, SOUTH, phase=phase)
    registry.withdraw("north", None)
    registry.save(stale, SOUTH)
    assert [each.status.phase for each in registry.versions()] == [Phase.REVOKED]
    assert registry.vectors()[1] == SOUTH, "the rest of that save counts"


def test_a_state_from_before_a_withdrawal_never_gives_consent_back(registry):
    registry.add_vector(NORTH)
    registry.withdraw("north", None)
    erased = NORTH.model_copy(update={"status": NORTH.status.model_copy(update={"erased_at": at(9)})})
    registry.save(erased)
    assert not registry.vectors()[0].granted
    registry.save(withdrawn := registry.vectors()[0].model_copy(update={"status": erased.status}))
    assert registry.vectors() == [withdrawn], "what keeps to it is saved"


def test_many_threads_and_connections_may_write(registry, path):
    other = SqliteRegistry(path)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: (registry, other)[n % 2].add_vector(vector(f"h{n}")), range(40)))
    assert len(registry.vectors()) == 40
    other.close()


def test_versions_come_in_the_order_in_which_they_were_recorded(registry):
    first, second = sorted(
        (version(policy(), NORTH), version(policy(), SOUTH)), key=lambda each: each.name, reverse=True
    )
    registry.add_version(first)
    registry.add_version(second)
    registry.save(first)
    assert registry.versions() == [first, second]


def test_a_broken_file_is_an_error_for_people(registry, path):
    registry._connection.execute("DROP TABLE objects")
    for use in (registry.versions, lambda: registry.add_vector(NORTH)):
        with pytest.raises(TryAgain, match=r"registry\.sqlite cannot be used"):
            use()
    (path.parent / "other.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(TryAgain, match="not a database"):
        SqliteRegistry(path.parent / "other.sqlite")


@pytest.mark.parametrize("open_elsewhere", [True, False])
def test_reading_only_leaves_the_folder_as_it_is(path, open_elsewhere):
    writer = SqliteRegistry(path)
    writer.add_vector(NORTH)
    if not open_elsewhere:
        writer.close()
    before = sorted(path.parent.iterdir())
    reader = SqliteRegistry(path, read_only=True)
    assert reader.vectors() == [NORTH]
    with pytest.raises(TryAgain, match="readonly"):
        reader.add_vector(SOUTH)
    reader.close()
    assert sorted(path.parent.iterdir()) == before
    writer.close()


def test_a_full_disk_is_named_and_changes_nothing(registry):
    registry.add_vector(NORTH)
    (pages,) = registry._connection.execute("PRAGMA page_count").fetchone()
    registry._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskFull):
        registry.save(*(vector("north", number) for number in range(1, 200)))
    assert registry.vectors() == [NORTH]
