"""Reconciliation with the real registry, the real store and real job processes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregator.embedded import ChildJobs
from aggregator.reconcile import RunJob
from aggregator.reconciler import Reconciler
from aggregator.registry import SqliteRegistry
from aggregator.resources import Consent, Phase
from aggregator.store import Store
from datavector.errors import ApiConflict, ApiRejected, DiskFull
from datavector.files import sha256_file
from datavector.model import BaseModel
from datavector.networks import create_base
from datavector.release import verify_release
from tests.aggregator.objects import policy, vector, version
from tests.aggregator.reconciling import reconciling, wait_for_merge
from tests.integration.processes import children, command_line


@pytest.fixture
def store(tmp_path: Path, small_base: BaseModel, large_base: BaseModel) -> Store:
    made = Store(tmp_path / "store")
    for base in (small_base, large_base):
        made.import_base(base.path)
    return made


@pytest.fixture
def registry(store: Store) -> Iterator[SqliteRegistry]:
    with contextlib.closing(SqliteRegistry(store.root / "registry.sqlite")) as opened:
        yield opened


@pytest.fixture
def arrive(store, registry, deliver):
    """Records hospitals' vectors, as the receiver does: `arrive(base, "north", "south")`."""

    def add(base: BaseModel, *hospitals: str, sequence: int = 1) -> None:
        for hospital in hospitals:
            registry.add_vector(deliver(store, base, hospital, sequence=sequence))

    return add


@pytest.fixture
def complained() -> Iterator[asyncio.Event]:
    """Set once an error is logged."""
    event = asyncio.Event()
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda _: event.set()
    logging.getLogger("aggregator").addHandler(handler)
    yield event
    logging.getLogger("aggregator").removeHandler(handler)


async def test_arrivals_are_merged_and_their_hospitals_asked(store, registry, arrive, small_base):
    registry.set_policies([policy(base="small", quiet=0, mode="visit")])
    async with reconciling(store, registry) as running:
        await running.until(lambda: running.waiting == {"brain": "0 of 2 hospitals; waiting for 2 more"})
        arrive(small_base, "north", "south")
        await running.until(lambda: bool(running.in_phase(Phase.CALIBRATING)))
        (version,) = running.in_phase(Phase.CALIBRATING)
        assert running.waiting["brain"].startswith(f"{version.name}: 0 of 2 hospitals came back to calibrate it")
        assert version.status.weights_sha256 == sha256_file(store.merged(version.name, "sum"))


async def test_a_later_arrival_makes_the_next_version_and_the_unfinished_one_leaves_no_file(
    store, registry, arrive, small_base
):
    registry.set_policies([policy(base="small", quiet=0, mode="visit")])
    arrive(small_base, "north", "south")
    async with reconciling(store, registry) as running:
        await running.until(lambda: bool(running.in_phase(Phase.CALIBRATING)))
        (first,) = running.in_phase(Phase.CALIBRATING)
        arrive(small_base, "east")
        await running.until(lambda: bool(running.in_phase(Phase.SUPERSEDED) and running.in_phase(Phase.CALIBRATING)))
        (second,) = running.in_phase(Phase.CALIBRATING)
        assert second.hospitals == ("east", "north", "south")
        assert not store.has_version(first.name)


async def test_a_quiet_period_is_waited_for_and_then_the_merge_begins_by_itself(store, registry, arrive, small_base):
    registry.set_policies([policy(base="small", quiet=0.3, mode="visit")])
    arrive(small_base, "north", "south")
    last = max(vector.status.stored_at for vector in registry.vectors())
    async with reconciling(store, registry) as running:
        await running.until(lambda: bool(running.in_phase(Phase.CALIBRATING)))
    (version,) = registry.versions()
    assert (version.status.calibration_started_at - last).total_seconds() >= 0.3


async def test_a_withdrawal_while_a_merge_runs_ends_it_and_leaves_nothing(store, registry, arrive, large_base):
    registry.set_policies([policy(base="large", quiet=0, mode="visit")])
    arrive(large_base, "north", "south")
    async with reconciling(store, registry) as running:
        await asyncio.to_thread(wait_for_merge, store)
        registry.withdraw("north", None)
        await running.until(lambda: running.waiting == {"brain": "1 of 2 hospitals; waiting for one more"})
        await running.until(lambda: all(v.status.erased_at for v in registry.vectors() if not v.granted))
        (version,) = registry.versions()
        assert version.status.phase is Phase.REVOKED
        assert not store.has_version(version.name)
    assert [path.parent.name for path in (store.root / "blobs").glob("*/*")] == ["south"]


async def test_a_job_that_is_stopped_before_it_began_is_forgotten(store, registry, arrive, small_base):
    registry.set_policies([policy(base="small", quiet=0, mode="visit")])
    arrive(small_base, "north", "south", "east")
    async with reconciling(store, registry) as running:
        running.reconciler.reconcile()  # plans and starts, but no process can begin before the next await
        registry.withdraw("east", None)
        running.reconciler.reconcile()
        await running.until(lambda: bool(running.in_phase(Phase.CALIBRATING)))
        assert [v.hospitals for v in running.in_phase(Phase.CALIBRATING)] == [("north", "south")]
        assert all(v.status.erased_at for v in registry.vectors() if not v.granted)


async def test_a_failure_is_recorded_with_its_reason_and_tried_again(store, registry, arrive, small_base):
    registry.set_policies([policy(base="small", quiet=0, mode="visit")])
    arrive(small_base, "north", "south")
    vector = registry.vectors()[0]
    blob = store.blob(vector.spec.hospital, vector.spec.artifact.digest)
    blob.rename(store.root / "aside")
    async with reconciling(store, registry) as running:
        await running.until(lambda: any(version.status.attempts for version in registry.versions()))
        (version,) = registry.versions()
        assert f"the stored vector {vector.name} is missing or altered" in version.status.message
        (store.root / "aside").rename(blob)
        await running.until(lambda: bool(running.in_phase(Phase.CALIBRATING)))
    (version,) = registry.versions()
    assert (version.status.attempts, version.status.message) == (0, "")


async def test_the_files_of_versions_whose_policy_is_gone_go_with_a_withdrawal(store, registry, arrive, small_base):
    registry.set_policies([policy(base="small", quiet=0, mode="visit")])
    arrive(small_base, "north", "south")
    async with reconciling(store, registry) as running:
        await running.until(lambda: bool(running.in_phase(Phase.CALIBRATING)))
    registry.set_policies([])
    registry.withdraw("north", None)
    async with reconciling(store, registry) as running:
        await running.until(lambda: not any((store.root / "versions").iterdir()))
    assert [path.parent.name for path in (store.root / "blobs").glob("*/*")] == ["south"]


async def test_a_fault_of_the_disk_does_not_end_the_reconciliation(store, registry, arrive, small_base, complained):
    registry.set_policies([policy(base="small", quiet=0, mode="visit")])
    arrive(small_base, "north", "south")
    versions = store.root / "versions"
    versions.rmdir()
    versions.write_text("in the way")
    async with reconciling(store, registry) as running:
        await complained.wait()
        versions.unlink()
        await running.until(lambda: bool(running.in_phase(Phase.CALIBRATING)))


async def test_a_job_that_cannot_even_start_is_not_started_again_at_once(
    store, registry, arrive, small_base, monkeypatch, caplog, complained
):
    registry.set_policies([policy(base="small", quiet=0, mode="visit")])
    arrive(small_base, "north", "south")
    with monkeypatch.context() as broken:
        broken.setattr("sys.executable", str(store.root / "no-python"))
        async with reconciling(store, registry) as running:
            running.reconciler.wake()
            await complained.wait()
            for _ in range(20):
                running.reconciler.wake()
                await asyncio.sleep(0)
            assert caplog.text.count("could not be run") == 1
            registry.withdraw("north", None)
            await running.until(lambda: bool(running.in_phase(Phase.REVOKED)))
            await running.until(lambda: not any((store.root / "versions").iterdir()))


async def test_a_fault_that_nobody_foresaw_is_logged_and_does_not_end_the_reconciliation(
    store, registry, arrive, small_base, caplog, complained
):
    registry.set_policies([policy(base="small", quiet=0, mode="visit")])
    arrive(small_base, "north", "south")
    async with reconciling(store, registry) as running:
        await running.until(lambda: bool(running.in_phase(Phase.CALIBRATING)))
        (version,) = running.in_phase(Phase.CALIBRATING)
        visits = store.version(version.name) / "visits"
        visits.mkdir()
        (visits / "north.npz").write_bytes(b"no archive")
        running.reconciler.wake()
        await complained.wait()
        (fault,) = caplog.records
        assert "trying again" in fault.message
        assert fault.exc_info, "with its traceback"
        (visits / "north.npz").unlink()
        running.waiting.clear()
        await running.until(lambda: bool(running.waiting))


async def test_a_fault_of_one_policy_stops_neither_the_others_nor_a_withdrawal(
    store, registry, arrive, small_base, large_base, monkeypatch, complained
):
    rules = {"quiet": 0, "mode": "visit"}
    registry.set_policies([policy("one", base="small", **rules)])
    arrive(small_base, "north", "south")
    async with reconciling(store, registry) as running:
        await running.until(lambda: bool(running.in_phase(Phase.CALIBRATING)))
        (version,) = running.in_phase(Phase.CALIBRATING)

        def full(name, _):
            raise DiskFull(store.version(name))

        with monkeypatch.context() as broken:
            broken.setattr(store, "write_version", full)
            registry.set_policies([policy("one", base="small", **rules), policy("other", base="large", **rules)])
            arrive(small_base, "west")
            arrive(large_base, "north", "south")
            registry.withdraw("south", small_base.digest)
            await running.until(lambda: complained.is_set() and not store.has_version(version.name))
            waiting = running.waiting
        assert "stopped by an error: no space left" in waiting["one"]
        assert "stopped by an error: no space left" in waiting["other"]
        assert not [each for each in registry.vectors() if not each.granted and not each.status.erased_at]
        await running.until(lambda: len(running.in_phase(Phase.CALIBRATING)) == 2)


async def test_a_version_whose_policy_is_gone_asks_nobody_any_more(store, registry, arrive, small_base):
    registry.set_policies([policy(base="small", quiet=0, mode="visit")])
    arrive(small_base, "north", "south")
    async with reconciling(store, registry) as running:
        await running.until(lambda: bool(running.in_phase(Phase.CALIBRATING)))
        registry.set_policies([])
        await running.until(lambda: bool(running.in_phase(Phase.SUPERSEDED)))
        await running.until(lambda: not any((store.root / "versions").iterdir()))


@pytest.mark.parametrize("after", [(), ("small",), ("large",), ("missing",)], ids=str)
async def test_a_withdrawal_revokes_whatever_became_of_the_policy(store, registry, arrive, small_base, after):
    registry.set_policies([policy(base="small", quiet=0, mode="visit")])
    arrive(small_base, "north", "south")
    async with reconciling(store, registry) as running:
        await running.until(lambda: bool(running.in_phase(Phase.CALIBRATING)))
        registry.set_policies([policy(base=base, quiet=0, mode="visit") for base in after])
        (taken, _) = registry.vectors()
        registry.save(taken.model_copy(update={"spec": taken.spec.model_copy(update={"consent": Consent.WITHDRAWN})}))
        await running.until(lambda: bool(running.in_phase(Phase.REVOKED)))


async def test_a_job_that_is_killed_is_tried_again_and_not_counted(store, registry, arrive, large_base):
    registry.set_policies([policy(base="large", quiet=0, mode="visit")])
    arrive(large_base, "north", "south")
    async with reconciling(store, registry) as running:
        await asyncio.to_thread(wait_for_merge, store)
        (job,) = (pid for pid in children(os.getpid()) if "aggregator.job" in command_line(pid))
        os.kill(job, signal.SIGKILL)
        await running.until(lambda: any(version.status.message for version in registry.versions()))
    (version,) = registry.versions()
    assert (version.status.attempts, version.status.message) == (0, "the merge process was killed by signal 9")
    assert version.status.retry_at is not None


async def test_stopping_ends_the_jobs_and_starting_again_goes_on(store, registry, arrive, large_base):
    registry.set_policies([policy(base="large", quiet=0, mode="visit")])
    arrive(large_base, "north", "south", "east")
    async with reconciling(store, registry):
        await asyncio.to_thread(wait_for_merge, store)
    async with reconciling(store, registry) as running:
        await running.until(lambda: bool(running.in_phase(Phase.CALIBRATING)))
    (version,) = registry.versions()
    assert version.status.weights_sha256 == sha256_file(store.merged(version.name, "sum"))


@pytest.mark.slow
async def test_from_arrivals_to_ready_and_after_a_withdrawal_to_what_never_had_the_hospital(
    tmp_path, store, registry, arrive, deliver
):
    base = create_base(tmp_path / "resnet", architecture="resnet18", classes=("a", "b", "c"), size=32)
    store.import_base(base.path)
    registry.set_policies([policy(base="resnet18", quiet=0, mode="uploaded")])
    arrive(base, "north", "south", "east")
    async with reconciling(store, registry) as running:
        await running.until(lambda: bool(running.in_phase(Phase.READY)))
        (first,) = running.in_phase(Phase.READY)
        assert verify_release(store.release(first.name)).ok
        lineage = (store.release(first.name) / "release.json").read_text()
        assert all(entry.digest in lineage for entry in first.spec.inputs)
        assert first.status.release_sha256 == sha256_file(store.release(first.name) / "SHA256SUMS")
        assert (first.status.calibration.mode, first.status.calibration.images) == ("uploaded", 300)
        registry.withdraw("north", None)
        assert [version.status.phase for version in registry.versions()] == [Phase.REVOKED], "before anything else"
        await running.until(lambda: bool(running.in_phase(Phase.READY)))
        (second,) = running.in_phase(Phase.READY)
        assert second.hospitals == ("east", "south")
        assert not store.has_version(first.name)
        assert running.waiting == {"brain": f"{second.name} is Ready"}
    assert sorted(path.parent.name for path in (store.root / "blobs").glob("*/*")) == ["east", "south"]

    other = Store(tmp_path / "other")
    other.import_base(base.path)
    with contextlib.closing(SqliteRegistry(other.root / "registry.sqlite")) as never:
        never.set_policies([policy(base="resnet18", quiet=0, mode="visit")])
        for hospital in ("east", "south"):
            never.add_vector(deliver(other, base, hospital))
        async with reconciling(other, never) as running:
            await running.until(lambda: bool(running.in_phase(Phase.CALIBRATING)))
        (undisturbed,) = never.versions()
        assert sha256_file(other.merged(undisturbed.name, "sum")) == sha256_file(store.merged(second.name, "sum"))


# --- One object that cannot be written ------------------------------------------------------------------------


class Refusing(SqliteRegistry):
    """A registry that refuses to save objects of these names, as an API server may."""

    refused: frozenset[str] = frozenset()

    def save(self, *changed):
        for resource in changed:
            if resource.name in self.refused:
                raise ApiRejected(resource.name, "as the test says")
        super().save(*changed)


@pytest.mark.parametrize("lost", [False, True], ids=["with its store", "without its store"])
@pytest.mark.parametrize("refused", [0, 1])
def test_a_revocation_that_cannot_be_saved_holds_up_no_other(store, tmp_path, refused, lost):
    north, south, east, west = (vector(name, at=0) for name in ("north", "south", "east", "west"))
    policies = policy("one"), policy("two")
    versions = [version(policies[0], north, south), version(policies[1], east, west)]
    with contextlib.closing(Refusing(tmp_path / "objects.sqlite")) as registry:
        registry.set_policies(policies)
        for each in (north, south, east, west):
            registry.add_vector(each)
        for each in versions:
            registry.add_version(each)
        registry.save(vector("north", withdrawn=True), vector("east", withdrawn=True))
        if lost:
            (store.root / ".datavector-aggregator").unlink()
        registry.refused = frozenset({versions[refused].name})
        Reconciler(store, registry, ChildJobs(store.root)).reconcile()
        phases = {each.name: each.status.phase for each in registry.versions()}
        assert phases[versions[1 - refused].name] is Phase.REVOKED
        assert phases[versions[refused].name] is not Phase.REVOKED


def test_a_version_that_is_deleted_before_its_job_is_started_is_planned_with_anew(store, tmp_path):
    with (
        contextlib.closing(SqliteRegistry(tmp_path / "objects.sqlite")) as registry,
        pytest.raises(ApiConflict, match="ModelVersion brain-1 has changed meanwhile"),
    ):
        Reconciler(store, registry, ChildJobs(store.root))._carry_out(RunJob("brain-1", "merge"))
