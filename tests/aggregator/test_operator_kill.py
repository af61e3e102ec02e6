"""SIGKILL in the middle of the operator's work: what comes of it is the same, and no Job is made twice."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aggregator.reconcile import Base, World, desired_version, eligible
from aggregator.resources import DataVector
from aggregator.store import Store
from datavector.files import sha256_file
from datavector.merge import merge_vectors
from datavector.model import BaseModel
from tests.aggregator.objects import policy
from tests.cluster.aggregation import (
    CLAIM,
    Namespace,
    RunningOperator,
    condition,
    in_phase,
    manifest,
    phases,
    record,
    waiting_for,
)
from tests.cluster.watching import Changes

KILLS = 20
LONGEST = 8  # changes that an operator lives to see
ASKS = policy(base="small", quiet=0, mode="none", min_hospitals=2, history=20)


class Killer:
    """Kills an operator with the n-th change that it sees, n drawn anew each time, and starts it again."""

    def __init__(self, operator: RunningOperator, changes: Changes, draw: Callable[[], int]) -> None:
        self.kills = 0
        self._operator = operator
        self._changes = changes
        self._draw = draw
        self._at: int | None = len(changes) + draw()
        changes.on_change = self._on_change

    def restart(self) -> None:
        """Starts the operator if it was killed."""
        if not self._operator.running:
            self._operator.kill()  # waits for its end
            self.kills += 1
            self._operator.start()
            self._at = len(self._changes) + self._draw()

    def end(self) -> None:
        """Lets the operator live."""
        self._at = None
        self.restart()
        self._at = None

    def _on_change(self, number: int) -> None:
        if self._at is not None and number >= self._at:
            self._at = None
            self._operator.kill()


@pytest.mark.slow
def test_an_operator_that_is_killed_at_any_moment_comes_to_the_same_end_with_one_job_for_each_stage(
    space, store, start_kubelet, start_operator, deliver, small_base, tmp_path
):
    start_kubelet(volumes={CLAIM: store.root}, modules={"aggregator.job": "tests.aggregator.quick_job"})
    changes = Changes(space.cluster.kubeconfig, space.name)
    operator = start_operator()
    moments = random.Random(2030)
    killer = Killer(operator, changes, lambda: moments.randint(1, LONGEST))

    def until(condition: Callable[..., Any], *args: str) -> Any:
        def told() -> Any:
            killer.restart()
            return condition(*args)

        return space.until(told, why=operator.tail)

    def is_ready(version: str) -> bool:
        return phases(space).get(version) == "Ready"

    def is_revoked(version: str) -> bool:
        return phases(space)[version] == "Revoked" and waiting_for(space) == f"{lasting} is Ready"

    space.apply(manifest(ASKS))
    here = [deliver(store, small_base, "north"), deliver(store, small_base, "south")]
    for each in here:
        record(space, each)
    lasting = expected_version(small_base, here)
    until(lambda: in_phase(space, "Ready") == [lasting])
    sequence, revoked = 0, set[str]()
    while killer.kills < KILLS:
        sequence += 1
        third = deliver(store, small_base, "west", sequence=sequence)
        record(space, third)
        made = expected_version(small_base, [*here, third])
        until(is_ready, made)
        assert merged(store, made) == merge(store, small_base, [*here, third], tmp_path)
        patch = '--patch={"spec":{"consent":"Withdrawn"}}'
        space.kubectl("patch", f"dv/{third.name}", "--type=merge", patch)
        revoked.add(made)
        until(is_revoked, made)
    killer.end()
    space.until(lambda: not any(store.has_version(name) for name in revoked), why=operator.tail)
    space.until(lambda: all(is_settled(each) for each in space.items("datavectors")), why=operator.tail)
    assert phases(space) == {lasting: "Ready", **dict.fromkeys(revoked, "Revoked")}
    assert merged(store, lasting) == merge(store, small_base, here, tmp_path)
    assert space.get("mp/brain")["status"]["latestVersion"] == lasting
    assert {path.parent.name for path in store.root.glob("blobs/*/*")} == {"north", "south"}
    assert_one_job_for_each_stage(space, changes, versions={lasting, *revoked})


def expected_version(base: BaseModel, vectors: list[DataVector]) -> str:
    """The name of the version that merges `vectors`."""
    known = Base(base.digest, has_batchnorm=bool(base.batchnorm_layers), vector_size=base.vector_layout.size)
    world = World(ASKS, known, tuple(vectors))
    return desired_version(world, eligible(world)).name


def merge(store: Store, base: BaseModel, vectors: list[DataVector], folder: Path) -> str:
    """The digest of what comes of merging `vectors`, and nothing else, in this process."""
    target = folder / "merged.safetensors"
    files = [store.blob(each.spec.hospital, each.spec.artifact.digest) for each in vectors]
    merge_vectors(base, files, "sum", {}, target)
    return sha256_file(target)


def merged(store: Store, version: str) -> str:
    return sha256_file(store.merged(version, "sum"))


def is_settled(vector: dict[str, Any]) -> bool:
    granted = vector["spec"]["consent"] == "Granted"
    return condition(vector, "Stored" if granted else "Erased").get("status") == "True"


def assert_one_job_for_each_stage(space: Namespace, changes: Changes, *, versions: set[str]) -> None:
    made, alive = defaultdict(set), defaultdict(set)
    for kind, job in changes.of("jobs"):
        labels, uid = job["metadata"]["labels"], job["metadata"]["uid"]
        key = labels["datavector.dev/version"], labels["datavector.dev/stage"]
        made[key].add(uid)
        (alive[key].discard if kind == "DELETED" else alive[key].add)(uid)
        assert len(alive[key]) <= 1, key
    assert set(made) == {(version, stage) for version in versions for stage in ("merge", "release")}
    assert all(len(uids) == 1 for uids in made.values()), made
    assert len(space.items("pods")) <= len(made)
