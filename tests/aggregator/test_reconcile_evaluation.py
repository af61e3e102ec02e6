"""What becomes of candidates that hospitals evaluate, and of vectors that are out of line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aggregator.metrics import OperatorMetrics
from aggregator.reconcile import (
    Base,
    CreateVersion,
    EraseVersion,
    RunJob,
    Save,
    WakeAt,
    World,
    eligible,
    explain,
    plan,
    revocations,
    sweep,
)
from aggregator.resources import (
    Candidate,
    DataVector,
    Evaluation,
    Head,
    MergePolicy,
    Method,
    ModelVersion,
    Phase,
)
from datavector.choice import Counts
from tests.aggregator.objects import BASE, at, policy, vector, version

NORTH, SOUTH, EAST = vector("north"), vector("south"), vector("east")
VECTORS = (NORTH, SOUTH, EAST)
CANDIDATES = ("mean", "sum", "sum.head")


def auto(*, head: str = "auto", mode: str = "visit", quorum: int | None = None, **rules: Any) -> MergePolicy:
    """A policy that tries the mean and the sum."""
    made = policy(mode=mode, quiet=0)
    evaluation = Evaluation(quorum=quorum, deadline_seconds=600, **rules)
    method = Method(name="auto", candidates=(Candidate(name="mean"), Candidate(name="sum")))
    spec = made.spec.model_copy(update={"method": method, "head": Head(mode=head), "evaluation": evaluation})
    return made.model_copy(update={"spec": spec})


def counts(right: int) -> Counts:
    return Counts(np.array([[right, 50 - right], [50 - right, right]]), np.zeros((10, 3)))


def found(**right: int) -> dict[str, Counts]:
    """What a hospital tells: `mean=40` of 50 images of each class, hospitals' own models by their names."""
    names = {"head": "sum.head", "north": "hospital.north", "south": "hospital.south", "east": "hospital.east"}
    every = {"mean": 20, "sum": 30, "head": 45, "north": 25, "south": 25, "east": 25, **right}
    return {names.get(name, name): counts(hits) for name, hits in every.items()}


def evaluating(rules: MergePolicy, **changes: Any) -> ModelVersion:
    return version(
        rules, *VECTORS, phase=Phase.EVALUATING, candidates=CANDIDATES, evaluation_started_at=at(0), **changes
    )


def saved(actions: list) -> ModelVersion:
    (save,) = actions
    assert isinstance(save, Save)
    return save.resource


def judge(rules: MergePolicy, hospitals: dict[str, Any], now: float = 1) -> list:
    waiting = evaluating(rules)
    return plan(World(rules, BASE, VECTORS, (waiting,), evaluations={waiting.name: hospitals}), at(now))


def test_calibrated_candidates_are_restored_and_then_evaluated():
    rules = auto()
    calibrating = version(rules, *VECTORS, phase=Phase.CALIBRATING)
    visits = {calibrating.name: {"north": 1, "south": 1, "east": 1}}
    restoring = saved(plan(World(rules, BASE, VECTORS, (calibrating,), visits=visits), at(1)))
    assert restoring.status.phase is Phase.RESTORING
    world = World(rules, BASE, VECTORS, (restoring,))
    assert plan(world, at(2)) == [RunJob(restoring.name, "restore")]
    done = replace(world, reports={(restoring.name, "restore"): {"candidates": list(CANDIDATES)}})
    asked = saved(plan(done, at(3)))
    assert (asked.status.phase, asked.status.candidates) == (Phase.EVALUATING, CANDIDATES)


def test_everybody_is_waited_for_until_the_deadline():
    rules = auto()
    assert judge(rules, {"north": found(), "south": found()}) == [WakeAt(at(600))]
    world = World(rules, BASE, VECTORS, (evaluating(rules),))
    assert "0 of 3 hospitals evaluated its 3 candidates; waiting for east, north, south" in explain(world, at(1))


def test_the_highest_summed_balanced_accuracy_is_released():
    report = saved(judge(auto(), {name: found() for name in ("north", "south", "east")})).status.evaluation
    assert (report.validated, report.chosen) == (True, "sum.head")
    assert [score.name for score in report.candidates] == list(CANDIDATES)
    assert report.candidates[2].balanced_accuracy == 0.9
    assert report.candidates[2].images == 300


def test_after_the_deadline_two_hospitals_are_enough_and_one_is_not():
    two = saved(judge(auto(), {"north": found(), "south": found()}, now=600))
    assert (two.status.evaluation.validated, two.status.evaluation.hospitals) == (True, ("north", "south"))
    one = saved(judge(auto(), {"north": found()}, now=600))
    assert one.status.phase is Phase.RELEASING
    assert (one.status.evaluation.validated, one.status.evaluation.chosen) == (False, "mean")
    conditions = {each.type: (each.status, each.reason) for each in one.status.conditions}
    assert conditions["Evaluated"] == ("False", "Unvalidated")


def test_without_evaluations_it_is_the_mean_also_where_every_candidate_has_a_closed_form_head():
    rules = auto(head="closed-form")
    waiting = version(
        rules, *VECTORS, phase=Phase.EVALUATING, candidates=("sum.head", "mean.head"), evaluation_started_at=at(0)
    )
    released = saved(plan(World(rules, BASE, VECTORS, (waiting,)), at(600)))
    assert (released.status.evaluation.validated, released.status.evaluation.chosen) == (False, "mean.head")


def test_a_version_of_one_hospital_is_not_validated_and_does_not_wait():
    rules = auto()
    alone = version(rules, NORTH, phase=Phase.EVALUATING, candidates=CANDIDATES, evaluation_started_at=at(0))
    rules = rules.model_copy(
        update={"spec": rules.spec.model_copy(update={"trigger": policy(min_hospitals=1).spec.trigger})}
    )
    actions = plan(World(rules, BASE, (NORTH,), (alone,)), at(1))
    assert not saved(actions).status.evaluation.validated


def test_a_merge_that_is_worse_than_a_single_hospital_is_rejected_until_the_policy_allows_it():
    better = {name: found(east=48) for name in ("north", "south", "east")}
    rejected = saved(judge(auto(), better))
    assert rejected.status.phase is Phase.REJECTED
    assert "worse than the own model of east" in rejected.status.message
    assert rejected.status.evaluation.worse_than == "east"
    world = World(auto(), BASE, VECTORS, (rejected,))
    assert plan(world, at(5)) == []
    assert "is not Ready" in explain(world, at(5))
    allowed = saved(plan(replace(world, policy=auto(allow_worse=True)), at(6)))
    assert (allowed.name, allowed.status.phase) == (rejected.name, Phase.RELEASING)
    assert saved(judge(auto(allow_worse=True), better)).status.phase is Phase.RELEASING


def test_nothing_is_compared_with_singles_that_are_not_shown():
    rules = auto(singles=False)
    assert evaluating(rules).singles == ()
    better = {name: found(east=48) for name in ("north", "south", "east")}
    assert saved(judge(rules, better)).status.phase is Phase.RELEASING


def test_the_mean_is_always_among_the_candidates():
    only = auto()
    method = Method(name="auto", candidates=(Candidate(name="ties", parameters={"density": 0.3}),))
    only = only.model_copy(update={"spec": only.spec.model_copy(update={"method": method})})
    assert list(version(only, *VECTORS).bodies) == ["ties-density0.3", "mean"]
    default = only.model_copy(update={"spec": only.spec.model_copy(update={"method": Method(name="auto")})})
    assert "mean" in version(default, *VECTORS).bodies


def test_a_fixed_method_is_evaluated_only_where_the_policy_says_so():
    fixed = policy(mode="visit")
    assert version(fixed, *VECTORS).spec.evaluation is None
    judged = fixed.model_copy(update={"spec": fixed.spec.model_copy(update={"evaluation": Evaluation()})})
    assert version(judged, *VECTORS).spec.evaluation is not None
    assert version(judged, *VECTORS).name != version(fixed, *VECTORS).name


def test_what_only_delays_or_allows_makes_no_new_version():
    name = version(auto(), *VECTORS).name
    assert version(auto(quorum=2, allow_worse=True), *VECTORS).name == name
    assert version(auto(singles=False), *VECTORS).name != name
    assert version(auto(head="merged"), *VECTORS).name != name


def test_a_model_without_batchnorm_is_visited_only_for_a_head_that_is_demanded():
    plain = Base(BASE.digest, has_batchnorm=False, has_head=True)
    report = {"weights_sha256": "w"}
    for head, phase in (("auto", Phase.RESTORING), ("closed-form", Phase.CALIBRATING)):
        pending = version(auto(head=head), *VECTORS)
        world = World(auto(head=head), plain, VECTORS, (pending,), reports={(pending.name, "merge"): report})
        assert saved(plan(world, at(1))).status.phase is phase


@pytest.mark.parametrize("phase", [Phase.RESTORING, Phase.EVALUATING, Phase.REJECTED])
def test_a_newer_version_takes_the_place_of_one_that_is_not_ready(phase):
    rules = auto()
    older = version(rules, NORTH, SOUTH, phase=phase, candidates=CANDIDATES, evaluation_started_at=at(0))
    actions = plan(World(rules, BASE, VECTORS, (older,)), at(10_000))
    assert actions[0].resource.status.phase is Phase.SUPERSEDED
    assert isinstance(actions[1], CreateVersion)


@pytest.mark.parametrize("phase", [Phase.RESTORING, Phase.EVALUATING, Phase.REJECTED])
def test_a_withdrawal_revokes_whatever_the_phase(phase):
    made = version(auto(), *VECTORS, phase=phase)
    (revoked,) = revocations((NORTH, vector("south", withdrawn=True)), [made], at(1))
    assert revoked.status.phase is Phase.REVOKED


def test_the_files_of_a_rejected_version_stay_for_whoever_allows_it():
    rejected = version(auto(), *VECTORS, phase=Phase.REJECTED)
    assert sweep([rejected], VECTORS, running=(), on_disk=(rejected.name,), now=at(1)) == []
    gone = rejected.with_phase(Phase.SUPERSEDED, now=at(2))
    assert sweep([gone], VECTORS, running=(), on_disk=(gone.name,), now=at(3)) == [EraseVersion(gone.name)]


# --- Quarantine


def merged(*vectors: DataVector, outliers: dict[str, str]) -> list:
    rules = policy(mode="visit", quiet=0)
    pending = version(rules, *vectors)
    report = {"weights_sha256": "w", "outliers": outliers}
    return plan(World(rules, BASE, vectors, (pending,), reports={(pending.name, "merge"): report}), at(1))


def quarantined() -> DataVector:
    (vector_saved, _) = merged(*VECTORS, outliers={"east-1": "its norm is 100 times the median"})
    return vector_saved.resource


def test_a_vector_out_of_line_is_quarantined_with_the_figure_and_the_version_gives_way():
    (kept, given_up) = merged(*VECTORS, outliers={"east-1": "its norm is 100 times the median"})
    assert kept.resource.quarantine == "its norm is 100 times the median"
    assert given_up.resource.status.phase is Phase.SUPERSEDED
    assert "east-1" in given_up.resource.status.message


def test_the_others_are_merged_without_it_and_the_policy_says_why():
    rules, waiting = policy(quiet=0), quarantined()
    world = World(rules, BASE, (NORTH, SOUTH, waiting))
    assert {each.name for each in eligible(world)} == {"north-1", "south-1"}
    (create,) = plan(world, at(100))
    assert create.version.vectors == {"north-1", "south-1"}
    needs_three = replace(world, policy=policy(min_hospitals=3))
    assert "east-1 is quarantined: its norm is 100 times the median" in explain(needs_three, at(100))


def test_a_person_releases_it():
    waiting = quarantined()
    released = waiting.model_copy(update={"spec": waiting.spec.model_copy(update={"released": True})})
    assert released.quarantine == ""
    world = World(policy(quiet=0), BASE, (NORTH, SOUTH, released))
    assert {each.name for each in eligible(world)} == {"north-1", "south-1", "east-1"}
    actions = merged(NORTH, SOUTH, released, outliers={"east-1": "its norm is 100 times the median"})
    assert saved(actions).status.phase is Phase.CALIBRATING


def test_an_older_vector_does_not_take_a_quarantined_ones_place():
    waiting = quarantined()
    newer = waiting.model_copy(update={"spec": waiting.spec.model_copy(update={"sequence": 2})})
    world = World(policy(quiet=0), BASE, (NORTH, SOUTH, vector("east", content="east-0"), newer))
    assert {each.spec.hospital for each in eligible(world)} == {"north", "south"}


def test_the_operator_counts_the_vectors_that_wait_for_a_person():
    metrics, waiting = OperatorMetrics(), quarantined()

    def count(state: str, *vectors: DataVector) -> float | None:
        metrics.count(vectors, (), ())
        return metrics.registry.get_sample_value("datavector_operator_objects", {"kind": "DataVector", "state": state})

    assert count("Quarantined", NORTH, SOUTH, waiting) == 1
    assert count("Stored", NORTH, SOUTH, waiting) == 2
    newer = vector(waiting.spec.hospital, sequence=waiting.spec.sequence + 1)
    assert count("Quarantined", NORTH, SOUTH, waiting, newer) is None
