"""What the policies make of arrivals, withdrawals, jobs and time."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import datetime

import pytest

from aggregator.reconcile import (
    ATTEMPTS,
    Base,
    CreateVersion,
    EraseBlob,
    EraseVersion,
    Failure,
    RunJob,
    Save,
    StopJob,
    WakeAt,
    World,
    abandon,
    due,
    eligible,
    explain,
    job_failed,
    plan,
    quorum,
    sweep,
    vector_state,
    withdraw,
)
from aggregator.resources import Consent, DataVector, Metadata, ModelVersion, Phase, VectorStatus
from tests.aggregator.objects import BASE, START, at, policy, vector, version

NORTH, SOUTH, EAST = vector("north", at=0), vector("south", at=10), vector("east", at=500)


def created(world: World, now: datetime) -> list[tuple[str, ...]]:
    return [tuple(sorted(action.version.vectors)) for action in plan(world, now) if isinstance(action, CreateVersion)]


def phases(actions: list) -> dict[str, Phase]:
    return {
        action.resource.name: action.resource.status.phase
        for action in actions
        if isinstance(action, Save) and isinstance(action.resource, ModelVersion)
    }


def swept(*worlds: World, now: datetime, on_disk: frozenset[str] = frozenset()) -> list:
    """What is erased, where these are the worlds of all policies."""
    versions = [version for world in worlds for version in world.versions]
    vectors = list({vector.name: vector for world in worlds for vector in world.vectors}.values())
    running = {name for world in worlds for name in world.running}
    return sweep(versions, vectors, running=running, on_disk=on_disk, now=now)


# --- When a version is made ------------------------------------------------------------------------------------


def test_a_policy_waits_for_enough_hospitals():
    world = World(policy(min_hospitals=2), BASE, (NORTH,))
    assert plan(world, at(1e6)) == []
    assert explain(world, at(1e6)) == "1 of 2 hospitals; waiting for one more"


def test_two_vectors_of_one_hospital_are_one_hospital():
    world = World(policy(min_hospitals=2), BASE, (NORTH, vector("north", 2, at=5)))
    assert plan(world, at(1e6)) == []


def test_vectors_of_another_base_do_not_count():
    other = vector("south", base="sha256:" + "c" * 64)
    assert plan(World(policy(min_hospitals=2), BASE, (NORTH, other)), at(1e6)) == []


def test_nothing_is_made_while_the_store_lacks_the_base():
    world = World(policy(base="lite0"), None, (NORTH, SOUTH))
    assert plan(world, at(1e6)) == []
    assert explain(world, at(0)) == "base model 'lite0' is not in the store; import it: datavector base import"


def test_a_policy_waits_until_the_last_arrival_is_quiet_for_long_enough():
    world = World(policy(min_hospitals=2, quiet=60), BASE, (NORTH, SOUTH))
    assert plan(world, at(69)) == [WakeAt(at(70))]
    assert created(world, at(70)) == [("north-1", "south-1")]


def test_quiet_is_measured_from_the_objects_not_from_when_they_were_first_seen():
    world = World(policy(quiet=60), BASE, (NORTH, SOUTH))
    assert created(world, at(1e6)) == [("north-1", "south-1")]


def test_a_stream_of_arrivals_is_merged_at_the_latest_after_the_maximum_wait():
    arrivals = tuple(vector(f"h{number}", at=50 * number) for number in range(10))
    world = World(policy(min_hospitals=2, quiet=60, max_wait=300), BASE, arrivals)
    assert plan(world, at(349)) == [WakeAt(at(350))], "the second hospital made it enough at 50"
    assert len(created(world, at(350))) == 1


def test_a_hospital_that_keeps_sending_does_not_put_off_the_others_for_longer_than_the_maximum_wait():
    again = tuple(vector("north", number, at=50 * number) for number in range(1, 10))
    world = World(policy(min_hospitals=2, quiet=60, max_wait=300), BASE, (*again, vector("south", at=100)))
    assert plan(world, at(399)) == [WakeAt(at(400))]
    assert created(world, at(400)) == [("north-9", "south-1")]


def test_a_replacement_waits_on_its_own_after_what_it_replaces_was_merged():
    rules = policy(quiet=60, max_wait=300)
    unmerged, merged, newest = (vector("north", number, at=at) for number, at in ((1, 0), (2, 100), (3, 1000)))
    ready = version(rules, merged, SOUTH, phase=Phase.READY, at=200)
    world = World(rules, BASE, (unmerged, merged, newest, SOUTH), (ready,))
    assert due(world, at(1000)) == at(1060)


def test_nobody_waits_for_what_a_clock_that_was_ahead_has_written():
    year = 365 * 86400
    world = World(policy(quiet=60), BASE, (NORTH, vector("south", at=year)))
    assert created(world, at(1000)) == [("north-1", "south-1")]
    waiting = version(policy(), NORTH, SOUTH, retry_at=at(year))
    assert plan(World(policy(), BASE, (NORTH, SOUTH), (waiting,)), at(1)) == [RunJob(waiting.name, "merge")]
    rules = policy(mode="visit", deadline_seconds=1000)
    calibrating = version(rules, NORTH, SOUTH, phase=Phase.CALIBRATING, at=year)
    assert phases(plan(World(rules, BASE, (NORTH, SOUTH), (calibrating,)), at(1))) == {
        calibrating.name: Phase.RELEASING
    }
    apart = World(policy(quiet=60), BASE, (NORTH, vector("south", at=100)))
    assert plan(apart, at(90)) == [WakeAt(at(160))], "clocks a few seconds apart are no fault"


def test_each_later_arrival_makes_the_next_version_after_its_own_quiet_period():
    rules = policy(quiet=60)
    world = World(rules, BASE, (NORTH, SOUTH, EAST), (version(rules, NORTH, SOUTH, phase=Phase.READY),))
    assert plan(world, at(501)) == [WakeAt(at(560))]
    assert created(world, at(560)) == [("east-1", "north-1", "south-1")]


def test_the_latest_sequence_of_a_hospital_counts():
    world = World(policy(quiet=0), BASE, (vector("north", 2, at=1), vector("north", 10, at=0), SOUTH))
    assert created(world, at(10)) == [("north-10", "south-1")]


def test_of_equal_sequences_the_one_stored_later_counts_in_any_order():
    first, second = vector("north", 1, at=0, content="x"), vector("north", 1, at=5, content="a")
    for vectors in itertools.permutations((first, second, SOUTH)):
        assert created(World(policy(quiet=0), BASE, vectors), at(10)) == [("a", "south-1")]
    for vectors in itertools.permutations((first, vector("north", 1, at=0, content="y"), SOUTH)):
        assert created(World(policy(quiet=0), BASE, vectors), at(10)) == [("south-1", "y")]


def test_a_hospital_whose_newest_vector_is_withdrawn_is_out():
    world = World(policy(quiet=0), BASE, (NORTH, vector("north", 2, withdrawn=True), SOUTH))
    assert created(world, at(1e6)) == []


def test_a_suspended_policy_starts_nothing_but_finishes_what_it_began():
    rules = policy(quiet=0, suspend=True)
    started = version(rules, NORTH, SOUTH)
    world = World(rules, BASE, (NORTH, SOUTH, EAST), (started,))
    assert plan(world, at(1e6)) == [RunJob(started.name, "merge")]
    assert explain(world, at(1e6)) == "suspended: set suspend to false to go on"


def test_a_suspended_policy_still_revokes():
    rules = policy(quiet=0, suspend=True)
    ready = version(rules, NORTH, SOUTH, phase=Phase.READY)
    world = World(rules, BASE, (vector("north", withdrawn=True), SOUTH), (ready,))
    assert phases(plan(world, at(1))) == {ready.name: Phase.REVOKED}


# --- Names -----------------------------------------------------------------------------------------------------


def test_names_do_not_depend_on_the_order_of_the_vectors():
    names = {version(policy(), *vectors).name for vectors in itertools.permutations((NORTH, SOUTH, EAST))}
    assert len(names) == 1
    assert names.pop().startswith("brain-")


@pytest.mark.parametrize(
    "other",
    [policy(method="mean"), policy(mode="none"), policy(mode="visit", visits=2), policy("other")],
    ids=["method", "mode", "visits", "policy"],
)
def test_other_settings_make_another_version(other):
    assert version(other, NORTH, SOUTH).name != version(policy(), NORTH, SOUTH).name


def test_what_does_not_shape_the_result_is_no_input_of_a_version():
    assert version(policy(quiet=1, history=2), NORTH, SOUTH) == version(policy(), NORTH, SOUTH)
    assert version(policy(quorum=1, deadline_seconds=5), NORTH, SOUTH) == version(policy(), NORTH, SOUTH)


@pytest.mark.parametrize("change", [{"hospital": "west"}, {"sample_count": 101}])
def test_the_same_bytes_of_another_hospital_or_of_more_images_make_another_version(change):
    other = NORTH.model_copy(update={"spec": NORTH.spec.model_copy(update=change)})
    assert version(policy(), other, SOUTH).name != version(policy(), NORTH, SOUTH).name


def test_the_longest_policy_and_hospital_names_fit():
    world = World(policy("p" * 52, quiet=0), BASE, tuple(vector(f"{letter}" * 63) for letter in "ab"))
    (action,) = plan(world, at(1))
    assert len(action.version.name) == 63


# --- What becomes of a version ---------------------------------------------------------------------------------


def test_a_new_version_is_merged_then_released_then_ready():
    rules = policy(mode="uploaded")
    pending = version(rules, NORTH, SOUTH)
    name, vectors = pending.name, (NORTH, SOUTH)
    assert plan(World(rules, BASE, vectors, (pending,)), at(1)) == [RunJob(name, "merge")]
    merged = {(name, "merge"): {"weights_sha256": "m"}}
    (save,) = plan(World(rules, BASE, vectors, (pending,), reports=merged), at(2))
    assert (save.resource.status.phase, save.resource.status.weights_sha256) == (Phase.RELEASING, "m")
    releasing = save.resource
    assert plan(World(rules, BASE, vectors, (releasing,), reports=merged), at(3)) == [RunJob(name, "release")]
    done = {
        **merged,
        (name, "release"): {"release_sha256": "r", "calibration": {"mode": "uploaded", "hospitals": [], "images": 0}},
    }
    (save,) = plan(World(rules, BASE, vectors, (releasing,), reports=done), at(4))
    status = save.resource.status
    assert (status.phase, status.ready_at, status.weights_sha256, status.release_sha256) == (
        Phase.READY, at(4), "m", "r",
    )  # fmt: skip
    assert plan(World(rules, BASE, vectors, (save.resource,), reports=done), at(5)) == []


def test_a_running_job_is_left_alone():
    pending = version(policy(), NORTH, SOUTH)
    world = World(policy(), BASE, (NORTH, SOUTH), (pending,), running=frozenset({pending.name}))
    assert plan(world, at(1)) == []


def test_a_model_without_batchnorm_asks_nobody():
    rules = policy(mode="visit")
    pending = version(rules, NORTH, SOUTH)
    reports = {(pending.name, "merge"): {"weights_sha256": "m"}}
    world = World(rules, Base(BASE.digest, has_batchnorm=False), (NORTH, SOUTH), (pending,), reports)
    assert phases(plan(world, at(1))) == {pending.name: Phase.RELEASING}


@pytest.mark.parametrize("mode", ["visit", "meeting"])
def test_after_the_merge_the_hospitals_are_asked(mode):
    rules = policy(mode=mode, quorum=1)
    pending = version(rules, NORTH, SOUTH)
    reports = {(pending.name, "merge"): {"weights_sha256": "m"}}
    (save,) = plan(World(rules, BASE, (NORTH, SOUTH), (pending,), reports), at(5))
    assert (save.resource.status.phase, save.resource.status.calibration_started_at) == (Phase.CALIBRATING, at(5))


def test_a_calibration_waits_for_its_quorum_until_the_deadline():
    rules = policy(mode="visit", quorum=2, deadline_seconds=1000)
    calibrating = version(rules, NORTH, SOUTH, EAST, phase=Phase.CALIBRATING, at=0)
    world = World(rules, BASE, (NORTH, SOUTH, EAST), (calibrating,), visits={calibrating.name: {"south": 1}})
    assert plan(world, at(999)) == [WakeAt(at(1000))]
    assert explain(world, at(999)) == (
        f"{calibrating.name}: 1 of 2 hospitals came back to calibrate it; "
        "waiting for east, north or until 2030-01-01 00:16:40Z"
    )
    (save,) = plan(world, at(1000))
    assert (save.resource.status.phase, save.resource.status.quorum) == (Phase.RELEASING, 2)
    enough = replace(world, visits={calibrating.name: {"south": 1, "east": 1}})
    assert phases(plan(enough, at(1))) == {calibrating.name: Phase.RELEASING}


def test_a_second_round_of_visits_is_waited_for_but_a_meeting_is_one_round():
    for mode, rounds, reached in (("visit", 1, False), ("visit", 2, True), ("meeting", 1, True)):
        rules = policy(mode=mode, visits=2)
        calibrating = version(rules, NORTH, SOUTH, phase=Phase.CALIBRATING)
        visits = {calibrating.name: {"north": rounds, "south": rounds}}
        actions = plan(World(rules, BASE, (NORTH, SOUTH), (calibrating,), visits=visits), at(1))
        assert bool(phases(actions)) is reached


def test_a_quorum_is_never_larger_than_the_version():
    of_two = version(policy(mode="visit"), NORTH, SOUTH)
    assert quorum(policy(mode="visit", quorum=7).spec.calibration, of_two) == 2
    assert quorum(policy(mode="visit").spec.calibration, of_two) == 2


def test_a_quorum_that_is_lowered_keeps_the_visits_so_far():
    calibrating = version(policy(mode="visit"), NORTH, SOUTH, EAST, phase=Phase.CALIBRATING)
    visits = {calibrating.name: {"north": 1, "south": 1}}
    world = World(policy(mode="visit", quorum=2), BASE, (NORTH, SOUTH, EAST), (calibrating,), visits=visits)
    assert phases(plan(world, at(600))) == {calibrating.name: Phase.RELEASING}


def test_a_visit_of_a_hospital_outside_the_version_does_not_count():
    rules = policy(mode="visit", quorum=2)
    calibrating = version(rules, NORTH, SOUTH, phase=Phase.CALIBRATING)
    visits = {calibrating.name: {"north": 1, "west": 1}}
    assert phases(plan(World(rules, BASE, (NORTH, SOUTH), (calibrating,), visits=visits), at(1))) == {}


def test_a_failed_job_is_tried_again_when_its_time_has_come_and_at_last_given_up():
    pending = version(policy(), NORTH, SOUTH)
    world = World(policy(), BASE, (NORTH, SOUTH), (pending,))
    for attempt in range(1, ATTEMPTS):
        failed = job_failed(world.versions[0], Failure("not finite", passing=False, at=at(0)))
        world = replace(world, versions=(failed,))
        assert plan(world, at(2**attempt - 1)) == [WakeAt(at(2**attempt))]
        assert plan(world, at(2**attempt)) == [RunJob(pending.name, "merge")]
        assert explain(world, at(0)) == f"{pending.name} is Pending; the last try failed: not finite"
    failed = job_failed(world.versions[0], Failure("not finite", passing=False, at=at(0)))
    assert (failed.status.phase, failed.status.message) == (Phase.FAILED, "not finite")
    given_up = replace(world, versions=(failed,))
    assert plan(given_up, at(1e6)) == [], "the same inputs are not tried again"
    assert explain(given_up, at(1e6)) == f"{pending.name} failed: not finite"


def test_a_failure_that_may_pass_is_tried_again_without_end():
    releasing = version(policy(), NORTH, SOUTH, phase=Phase.RELEASING)
    for _ in range(10 * ATTEMPTS):
        releasing = job_failed(releasing, Failure("disk full", passing=True, at=at(0)))
    world = World(policy(), BASE, (NORTH, SOUTH), (releasing,))
    assert plan(world, at(29)) == [WakeAt(at(30))]
    assert plan(world, at(30)) == [RunJob(releasing.name, "release")]


def test_a_version_of_the_base_model_that_the_policy_had_before_gives_way():
    old = version(policy(), NORTH, SOUTH)
    other = Base("sha256:" + "c" * 64, has_batchnorm=False)
    world = World(policy(base=other.digest), other, (NORTH, SOUTH), (old,))
    assert phases(plan(world, at(1))) == {old.name: Phase.SUPERSEDED}


def test_the_next_arrival_is_merged_after_a_failure():
    failed = version(policy(), NORTH, SOUTH, phase=Phase.FAILED)
    assert created(World(policy(), BASE, (NORTH, SOUTH, EAST), (failed,)), at(560)) == [
        ("east-1", "north-1", "south-1")
    ]


@pytest.mark.parametrize("phase", [Phase.PENDING, Phase.CALIBRATING])
def test_an_unfinished_version_gives_way_to_a_newer_one(phase):
    rules = policy(mode="visit")
    old, new = version(rules, NORTH, SOUTH, phase=phase), version(rules, NORTH, SOUTH, EAST)
    actions = plan(World(rules, BASE, (NORTH, SOUTH, EAST), (old,)), at(560))
    assert phases(actions) == {old.name: Phase.SUPERSEDED}
    assert actions[-1].version.name == new.name


def test_a_version_that_is_being_released_finishes_unless_the_newer_one_is_ready():
    rules = policy()
    old, new = version(rules, NORTH, SOUTH, phase=Phase.RELEASING), version(rules, NORTH, SOUTH, EAST)
    vectors = (NORTH, SOUTH, EAST)
    (create,) = plan(World(rules, BASE, vectors, (old,)), at(560))
    assert create.version.name == new.name
    assert RunJob(old.name, "release") in plan(World(rules, BASE, vectors, (old, new)), at(561))
    ready = version(rules, *vectors, phase=Phase.READY)
    assert phases(plan(World(rules, BASE, vectors, (old, ready)), at(562))) == {old.name: Phase.SUPERSEDED}


def test_a_superseded_version_loses_its_job_and_then_its_files():
    old = version(policy(), NORTH, SOUTH, phase=Phase.SUPERSEDED)
    new = version(policy(), NORTH, SOUTH, EAST, phase=Phase.READY)
    name = frozenset({old.name})
    world = World(policy(), BASE, (NORTH, SOUTH, EAST), (old, new), running=name)
    assert plan(world, at(560)) == []
    assert swept(world, on_disk=name, now=at(560)) == [StopJob(old.name)]
    ended = replace(world, running=frozenset())
    assert swept(ended, on_disk=name, now=at(560)) == [EraseVersion(old.name)]
    assert swept(ended, now=at(560)) == []


def test_no_more_ready_versions_stay_than_the_history_limit_says():
    rules = policy(history=2)
    ready = [version(rules, vector("north", number), SOUTH, phase=Phase.READY, at=number) for number in (1, 2, 3, 4)]
    newest = (vector("north", 4), SOUTH)
    assert set(phases(plan(World(rules, BASE, newest, tuple(ready)), at(9)))) == {ready[0].name, ready[1].name}


def test_a_policy_that_is_changed_back_serves_its_earlier_version_again():
    sums, means = policy(method="sum"), policy(method="mean")
    first = version(sums, NORTH, SOUTH, phase=Phase.READY, at=20)
    second = version(means, NORTH, SOUTH, phase=Phase.READY, at=30)
    (save,) = plan(World(sums, BASE, (NORTH, SOUTH), (first, second)), at(40))
    assert (save.resource.name, save.resource.status.ready_at) == (first.name, at(40))
    assert plan(World(sums, BASE, (NORTH, SOUTH), (save.resource, second)), at(40)) == []


def test_a_changed_policy_does_not_wait_for_quiet():
    means = policy(method="mean", quiet=60)
    ready = version(policy(), NORTH, SOUTH, phase=Phase.READY, at=20)
    assert created(World(means, BASE, (NORTH, SOUTH), (ready,)), at(21)) == [("north-1", "south-1")]


# --- Withdrawal ------------------------------------------------------------------------------------------------


def taken_back(world: World, hospital: str, now: datetime) -> World:
    """The world after the receiver took a withdrawal."""
    vectors, versions = withdraw(world.vectors, world.versions, hospital, None, now)
    changed = {resource.name: resource for resource in (*vectors, *versions)}
    return replace(
        world,
        vectors=tuple(changed.get(each.name, each) for each in world.vectors),
        versions=tuple(changed.get(each.name, each) for each in world.versions),
    )


def test_a_withdrawal_takes_back_every_vector_and_revokes_every_version_with_one_of_them():
    older, newer = vector("north", 1), vector("north", 2)
    first = version(policy(), older, SOUTH, phase=Phase.READY)
    second = version(policy(), newer, SOUTH, phase=Phase.READY)
    third = version(policy(), EAST, SOUTH, phase=Phase.READY)
    vectors, versions = withdraw((older, newer, SOUTH), (first, second, third), "north", None, at(5))
    assert [(each.name, each.spec.consent, each.status.withdrawn_at) for each in vectors] == [
        ("north-1", Consent.WITHDRAWN, at(5)), ("north-2", Consent.WITHDRAWN, at(5)),
    ]  # fmt: skip
    assert {each.name: each.status.phase for each in versions} == dict.fromkeys(
        (first.name, second.name), Phase.REVOKED
    )
    again = withdraw(vectors, versions, "north", None, at(6))
    assert again == (vectors, versions), "the second time changes nothing"


def test_a_withdrawal_from_one_base_leaves_the_others():
    other = vector("north", base="sha256:" + "c" * 64, content="other")
    vectors, _ = withdraw((NORTH, other), (), "north", BASE.digest, at(5))
    assert [each.name for each in vectors] == ["north-1"]


def test_a_withdrawal_revokes_first_and_alone():
    rules = policy(quiet=0)
    ready = version(rules, NORTH, SOUTH, EAST, phase=Phase.READY)
    other = version(policy(method="mean"), SOUTH, EAST)
    gone = vector("north", withdrawn=True)
    actions = plan(World(rules, BASE, (gone, SOUTH, EAST), (ready, other)), at(1e6))
    assert actions == [Save(ready.with_phase(Phase.REVOKED, now=at(1e6), message="north-1 was withdrawn"))]


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.REVOKED])
def test_a_version_in_any_phase_is_revoked(phase):
    rules = policy()
    contains = version(rules, NORTH, SOUTH, phase=phase)
    world = World(rules, BASE, (vector("north", withdrawn=True), SOUTH), (contains,))
    assert phases(plan(world, at(1e6))) == {contains.name: Phase.REVOKED}


def test_after_a_withdrawal_the_rest_is_merged_at_once():
    rules = policy(quiet=600)
    ready = version(rules, NORTH, SOUTH, EAST, phase=Phase.READY)
    world = taken_back(World(rules, BASE, (NORTH, SOUTH, EAST), (ready,)), "north", at(501))
    assert created(world, at(501)) == [("east-1", "south-1")]


def test_after_a_withdrawal_left_no_version_the_rest_does_not_wait_for_a_fresh_arrival_to_be_quiet():
    rules = policy(quiet=600)
    ready = version(rules, NORTH, SOUTH, EAST, phase=Phase.READY)
    fresh = vector("west", at=990)
    world = taken_back(World(rules, BASE, (NORTH, SOUTH, EAST, fresh), (ready,)), "north", at(1000))
    assert created(world, at(1000)) == [("east-1", "south-1", "west-1")]


def test_arrivals_after_a_withdrawal_left_too_few_wait_for_quiet_again():
    rules = policy(min_hospitals=2, quiet=600)
    ready = version(rules, NORTH, SOUTH, phase=Phase.READY)
    world = taken_back(World(rules, BASE, (NORTH, SOUTH), (ready,)), "north", at(1000))
    world = replace(world, vectors=(*world.vectors, vector("west", at=2000)))
    assert plan(world, at(2001)) == [WakeAt(at(2600))]


def test_below_the_minimum_nothing_is_ready():
    rules = policy(min_hospitals=2)
    ready = version(rules, NORTH, SOUTH, phase=Phase.READY)
    world = taken_back(World(rules, BASE, (NORTH, SOUTH), (ready,)), "south", at(1000))
    assert plan(world, at(1000)) == []
    assert [each.status.phase for each in world.versions] == [Phase.REVOKED]
    assert explain(world, at(1000)) == "1 of 2 hospitals; waiting for one more"


def test_a_ready_version_without_the_withdrawn_vector_stays_and_is_all_that_is_needed():
    rules = policy()
    without = version(rules, NORTH, SOUTH, phase=Phase.READY, at=20)
    contains = version(rules, NORTH, SOUTH, EAST, phase=Phase.READY, at=600)
    world = taken_back(World(rules, BASE, (NORTH, SOUTH, EAST), (without, contains)), "east", at(1000))
    assert plan(world, at(1000)) == []
    assert explain(world, at(1000)) == f"{without.name} is Ready"


def test_an_older_version_of_the_same_inputs_that_had_given_way_is_taken_up_again():
    rules = policy(mode="visit")
    old = version(rules, NORTH, SOUTH, phase=Phase.SUPERSEDED)
    contains = version(rules, NORTH, SOUTH, EAST, phase=Phase.CALIBRATING)
    world = taken_back(World(rules, BASE, (NORTH, SOUTH, EAST), (old, contains)), "east", at(1000))
    assert phases(plan(world, at(1000))) == {old.name: Phase.PENDING}


def test_a_revoked_version_loses_its_job_then_its_files_then_the_blob_goes():
    rules = policy()
    old = version(rules, NORTH, SOUTH)
    world = taken_back(World(rules, BASE, (NORTH, SOUTH), (old,)), "north", at(1000))
    name = frozenset({old.name})
    busy = replace(world, running=name)
    assert swept(busy, on_disk=name, now=at(1000)) == [StopJob(old.name)], "it may still be reading the blob"
    files, blob = swept(world, on_disk=name, now=at(1000))
    assert files == EraseVersion(old.name)
    assert (blob.vector.name, blob.vector.status.erased_at) == ("north-1", at(1000))
    assert blob.vector.spec.consent is Consent.WITHDRAWN
    assert swept(replace(world, vectors=(blob.vector, SOUTH)), now=at(1001)) == []


def test_the_files_of_a_withdrawn_version_go_even_if_its_policy_is_gone():
    revoked = version(policy("gone"), NORTH, SOUTH, phase=Phase.REVOKED)
    ready = version(policy("gone"), EAST, SOUTH, phase=Phase.READY)
    names = {revoked.name, ready.name}
    assert sweep((revoked, ready), (), running=(), on_disk=names, now=at(1)) == [EraseVersion(revoked.name)]


def test_an_unfinished_version_whose_policy_is_gone_is_ended():
    calibrating = version(policy("gone", mode="visit"), NORTH, SOUTH, phase=Phase.CALIBRATING)
    ready = version(policy("gone"), NORTH, SOUTH, phase=Phase.READY)
    assert phases(abandon((calibrating, ready), at(1))) == {calibrating.name: Phase.SUPERSEDED}


# --- Blobs -----------------------------------------------------------------------------------------------------


def test_a_replaced_blob_goes_when_no_version_is_being_made_of_it():
    newer = vector("north", 2, at=5)
    releasing = version(policy(), NORTH, SOUTH, phase=Phase.RELEASING)
    world = World(policy(), BASE, (NORTH, newer, SOUTH), (releasing,))
    assert swept(world, now=at(100)) == []
    ready = replace(world, versions=(version(policy(), NORTH, SOUTH, phase=Phase.READY),))
    (erase,) = swept(ready, now=at(100))
    assert isinstance(erase, EraseBlob)
    assert erase.vector.name == NORTH.name


def test_two_policies_on_one_base_do_not_erase_each_others_blobs():
    newer = vector("north", 2, at=5)
    vectors = (NORTH, newer, SOUTH)
    mine, other = policy("mine"), policy("other")
    needs = World(mine, BASE, vectors, (version(mine, NORTH, SOUTH, phase=Phase.RELEASING),))
    done = World(other, BASE, vectors, (version(other, newer, SOUTH, phase=Phase.READY),))
    assert swept(done, now=at(100)) != []
    assert swept(needs, done, now=at(100)) == []


def test_a_vector_that_no_policy_merges_yet_is_kept():
    assert sweep((), (NORTH, SOUTH), running=(), on_disk=(), now=at(1e6)) == []


def test_of_equal_vectors_from_two_hospitals_both_count():
    north, south = vector("north", content="same"), vector("south", content="same")
    named = [
        each.model_copy(update={"metadata": Metadata(name=f"{each.spec.hospital}-same")}) for each in (north, south)
    ]
    assert created(World(policy(quiet=0), BASE, tuple(named)), at(1)) == [("north-same", "south-same")]
    one, other = (version(policy(), *order) for order in (named, named[::-1]))
    assert one.spec == other.spec


# --- Sentences -------------------------------------------------------------------------------------------------


def test_a_policy_says_when_it_will_merge():
    world = World(policy(quiet=60), BASE, (NORTH, SOUTH))
    assert explain(world, START) == "2 hospitals; merging at 2030-01-01 00:01:10Z unless another arrives"
    assert explain(world, at(70)) == "2 hospitals; merging now"
    pending = version(policy(), NORTH, SOUTH)
    assert explain(replace(world, versions=(pending,)), at(70)) == f"{pending.name} is Pending"
    ready = version(policy(), NORTH, SOUTH, phase=Phase.READY)
    assert explain(replace(world, versions=(ready,)), at(70)) == f"{ready.name} is Ready"


def unstored(vector: DataVector) -> DataVector:
    """A vector of which only the object is there."""
    return vector.model_copy(update={"status": VectorStatus()})


def test_a_newer_vector_without_a_file_that_fits_takes_no_ones_place_and_erases_nothing():
    asks, older, other = policy(), vector("north"), vector("south")
    newer = unstored(vector("north", 2))
    world = World(asks, BASE, (older, other, newer))
    assert {each.name for each in eligible(world)} == {"north-1", "south-1"}
    assert sweep([], [older, other, newer], running=(), on_disk=(), now=at(0)) == []


def test_a_vector_without_a_file_says_that_and_not_that_its_size_is_wrong():
    state = vector_state(unstored(vector("north")), BASE, None, (), at(0))
    assert {(each.type, each.status, each.reason) for each in state.status.conditions} == {
        ("Stored", "False", "FileMissing"),
        ("Validated", "False", "FileMissing"),
    }
