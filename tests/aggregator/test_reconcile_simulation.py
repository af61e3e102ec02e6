"""Random histories of arrivals, withdrawals, jobs, visits, statistics, time and crashes, carried out in memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aggregator.reconcile import (
    ATTEMPTS,
    Action,
    CreateVersion,
    EraseBlob,
    EraseVersion,
    Failure,
    RunJob,
    Save,
    Stage,
    StopJob,
    WakeAt,
    World,
    desired_version,
    eligible,
    job_failed,
    plan,
    sweep,
    withdraw,
)
from aggregator.resources import DataVector, MergePolicy, ModelVersion, Phase
from tests.aggregator.objects import BASE, START, policy, vector

POLICIES = (
    policy("prompt", min_hospitals=1, quiet=0, max_wait=0, mode="uploaded", history=2),
    policy("patient", min_hospitals=2, quiet=60, max_wait=200, mode="visit", visits=2, deadline_seconds=500),
    policy("measured", min_hospitals=1, quiet=0, max_wait=0, method="fisher", deadline_seconds=400),
)
HOSPITALS = ("north", "south", "east")
ROUNDS = 30  # of planning, until nothing but waiting may be left

HOSPITAL = st.sampled_from(HOSPITALS)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), HOSPITAL),
        st.tuples(st.just("withdraw"), HOSPITAL),
        st.tuples(st.just("visit"), HOSPITAL),
        st.tuples(st.just("measure"), HOSPITAL),
        st.tuples(st.just("finish"), st.integers(0, 3)),
        st.tuples(st.just("fail"), st.integers(0, 3)),
        st.tuples(st.just("fall over"), st.integers(0, 3)),
        st.tuples(st.just("pass"), st.sampled_from((1, 30, 61, 201, 600, -60, -7200))),
    ),
    max_size=25,
)


class Aggregator:
    """Carries actions out as the real ones do: in order, each as a whole, forgetting its jobs in a crash."""

    def __init__(self, crashes: Iterable[int] = ()) -> None:
        self.now = START
        self.vectors: dict[str, DataVector] = {}
        self.versions: dict[str, ModelVersion] = {}
        self.reports: dict[tuple[str, Stage], dict[str, Any]] = {}
        self.visits: dict[str, dict[str, int]] = {}
        self.running: dict[str, Stage] = {}
        self.on_disk: set[str] = set()
        self.blobs: set[str] = set()
        self.measured: set[str] = set()
        self._crashes: Iterator[int] = iter(crashes)

    # --- What happens to it

    def happen(self, event: tuple[str, object]) -> None:
        match event:
            case ("arrive", str(hospital)):
                self._arrive(hospital)
            case ("withdraw", str(hospital)):
                vectors, versions = withdraw(
                    self.vectors.values(), self.versions.values(), hospital, BASE.digest, self.now
                )
                self.vectors |= {each.name: each for each in vectors}
                self.versions |= {each.name: each for each in versions}
            case ("visit", str(hospital)):
                for name, version in self.versions.items():
                    if version.status.phase is Phase.CALIBRATING and hospital in version.hospitals:
                        rounds = self.visits.setdefault(name, {})
                        rounds[hospital] = rounds.get(hospital, 0) + 1
            case ("measure", str(hospital)):
                own = [name for name, each in self.vectors.items() if each.spec.hospital == hospital]
                self.measured |= set(own[-1:]) & self.blobs
            case ("finish", int(number)):
                self._end_job(number)
            case ("fail", int(number)):
                self._end_job(number, "no luck")
            case ("fall over", int(number)):
                self._end_job(number, "killed", passing=True)
            case ("pass", int(seconds)):
                self.now += timedelta(seconds=seconds)

    def _arrive(self, hospital: str) -> None:
        sequence = 1 + sum(each.spec.hospital == hospital for each in self.vectors.values())
        seconds = (self.now - START).total_seconds()
        self.vectors[f"{hospital}-{sequence}"] = vector(hospital, sequence, at=seconds)
        self.blobs.add(f"{hospital}-{sequence}")

    def _end_job(self, number: int, failure: str = "", *, passing: bool = False) -> None:
        if not self.running:
            return
        name, stage = sorted(self.running.items())[number % len(self.running)]
        del self.running[name]
        version = self.versions[name]
        if failure:
            self.versions[name] = job_failed(version, Failure(failure, passing=passing, at=self.now))
        else:
            assert version.vectors <= self.blobs, "a job lost its input"
            digest = {"merge": "weights_sha256", "release": "release_sha256"}[stage]
            calibration = {"mode": "uploaded", "hospitals": [], "images": 0}
            self.reports[name, stage] = {digest: ",".join(sorted(version.vectors))} | (
                {"calibration": calibration} if stage == "release" else {}
            )

    # --- What it does

    def settle(self) -> timedelta | None:
        """Plans and carries out until nothing is left but waiting, crashing on the way.

        Returns:
            How long to wait; None for ever.
        """
        for _ in range(ROUNDS):
            actions = self._plan()
            todo = [action for action in actions if not isinstance(action, WakeAt)]
            if not todo:
                self._check()
                waits = [action.time - self.now for action in actions if isinstance(action, WakeAt)]
                return min(waits, default=None)
            crash_after = next(self._crashes, len(todo))
            for action in todo[:crash_after]:
                self._carry_out(action)
            if crash_after < len(todo):
                self.running.clear()
        raise AssertionError(f"not settled: {todo}")

    def _plan(self) -> list[Action]:
        worlds = [self.world(each) for each in POLICIES]
        versions, vectors = tuple(self.versions.values()), tuple(self.vectors.values())
        actions = sweep(versions, vectors, running=self.running, on_disk=self.on_disk, now=self.now)
        return actions + [action for world in worlds for action in plan(world, self.now)]

    def world(self, of: MergePolicy) -> World:
        return World(
            policy=of,
            base=BASE,
            vectors=tuple(self.vectors.values()),
            versions=tuple(each for each in self.versions.values() if each.spec.policy_ref == of.name),
            reports=self.reports,
            visits=self.visits,
            statistics=dict.fromkeys(self.measured, ("fisher",)),
            running=frozenset(self.running),
        )

    def _carry_out(self, action: Action) -> None:
        match action:
            case CreateVersion(version):
                self.versions.setdefault(version.name, version)
            case Save(ModelVersion() as version):
                assert self.versions[version.name].status.phase is not Phase.REVOKED
                self.versions[version.name] = version
            case RunJob(name, stage):
                assert name not in self.running
                assert self.versions[name].vectors <= self.blobs
                assert self.versions[name].vectors <= self.measured or not self.versions[name].spec.method.statistics
                self.running[name] = stage
                self.on_disk.add(name)
            case StopJob(name):
                del self.running[name]
            case EraseVersion(name):
                assert name not in self.running
                self.on_disk.discard(name)
                self.visits.pop(name, None)
                self.reports = {key: report for key, report in self.reports.items() if key[0] != name}
            case EraseBlob(erased):
                assert erased.granted is self.vectors[erased.name].granted
                self.blobs.discard(erased.name)
                self.measured.discard(erased.name)
                self.vectors[erased.name] = erased

    # --- What must always hold

    def _check(self) -> None:
        withdrawn = {name for name, each in self.vectors.items() if not each.granted}
        for version in self.versions.values():
            phase = version.status.phase
            assert (phase is Phase.REVOKED) == bool(version.vectors & withdrawn)
            if phase.unfinished:
                assert version.vectors <= self.blobs
            if phase is Phase.READY:
                assert version.name in self.on_disk
                assert version.status.release_sha256 == ",".join(sorted(version.vectors))
        inputs = [(each.spec.policy_ref, each.spec.inputs) for each in self.versions.values()]
        assert len({str(key) for key in inputs}) == len(inputs), "two versions of the same inputs"
        live = {name for name, each in self.versions.items() if each.status.phase.unfinished}
        assert set(self.running) <= live
        assert self.on_disk <= live | {name for name, each in self.versions.items() if each.status.phase is Phase.READY}
        assert not withdrawn & self.blobs, "a withdrawn blob is still there"

    def ready(self, of: MergePolicy) -> list[ModelVersion]:
        """Oldest first."""
        own = [each for each in self.world(of).versions if each.status.phase is Phase.READY]
        return sorted(own, key=lambda each: each.status.ready_at or START)


def live_through(events: list[tuple[str, object]], crashes: Iterable[int] = ()) -> Aggregator:
    aggregator = Aggregator(crashes)
    for event in events:
        aggregator.happen(event)
        aggregator.settle()
    return aggregator


def let_everything_succeed(aggregator: Aggregator) -> None:
    for _ in range(100):
        wait = aggregator.settle()
        if aggregator.running:
            aggregator.happen(("finish", 0))
        elif wait is None:
            return
        else:
            aggregator.now += wait
    raise AssertionError("waits for ever")


@given(EVENTS)
def test_whatever_happened_each_policy_ends_with_its_newest_inputs_ready(events):
    aggregator = live_through(events)
    let_everything_succeed(aggregator)
    for each in POLICIES:
        world = aggregator.world(each)
        vectors = eligible(world)
        ready = aggregator.ready(each)
        if len(vectors) < each.spec.trigger.min_hospitals:
            assert ready == []
            continue
        wanted = desired_version(world, vectors).name
        known = aggregator.versions[wanted]
        assert known.status.phase is Phase.READY or known.status.message == "no luck"
        assert len(ready) <= each.spec.history_limit
        if known.status.phase is Phase.READY:
            assert ready[-1].name == wanted, "clients take the version that became Ready last"


@given(EVENTS, st.lists(st.integers(0, 3), max_size=40))
def test_crashes_between_any_two_actions_change_nothing_in_the_end(events, crashes):
    undisturbed, disturbed = live_through(events), live_through(events, crashes)
    assert disturbed.versions == undisturbed.versions
    assert disturbed.vectors == undisturbed.vectors
    assert (disturbed.blobs, disturbed.on_disk, disturbed.running) == (
        undisturbed.blobs, undisturbed.on_disk, undisturbed.running,
    )  # fmt: skip


@given(EVENTS, HOSPITAL)
def test_after_a_withdrawal_the_rest_becomes_what_it_is_without_that_hospital(events, gone):
    """Among hospitals that sent once: what is Ready in the end is what never had the hospital that left."""
    arrivals = [(kind, name) for kind, name in events if kind == "arrive"]
    sent = [
        each for name in dict.fromkeys(name for _, name in arrivals) for each in (("arrive", name), ("measure", name))
    ]
    left = live_through([*sent, *itertools.repeat(("finish", 0), 20), ("withdraw", gone)])
    never = live_through([event for event in sent if event[1] != gone])
    for aggregator in (left, never):
        let_everything_succeed(aggregator)
    for each in POLICIES:
        newest = [[version.name for version in aggregator.ready(each)][-1:] for aggregator in (left, never)]
        assert newest[0] == newest[1]


def test_a_job_that_always_fails_is_given_up_within_its_attempts():
    aggregator = live_through([("arrive", "north")])
    for number in range(3 * ATTEMPTS):
        if not aggregator.running:
            break
        aggregator.happen(("fall over" if number % 3 else "fail", 0))
        aggregator.settle()
        aggregator.happen(("pass", 600))
        aggregator.settle()
    (version,) = (each for each in aggregator.versions.values() if each.spec.policy_ref == "prompt")
    assert (version.status.phase, version.status.message) == (Phase.FAILED, "no luck")
    assert aggregator.on_disk == set()
