"""Policies whose method reads statistics that hospitals send beside their vectors."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest

from aggregator.reconcile import CreateVersion, RunJob, Save, WakeAt, World, eligible, explain, plan, sweep
from aggregator.resources import DataVector, ModelVersion, Phase
from tests.aggregator.objects import BASE, at, policy, vector, version

NORTH, SOUTH, EAST = vector("north"), vector("south"), vector("east")
VECTORS = (NORTH, SOUTH, EAST)
FISHER = policy(method="fisher", deadline_seconds=1000)
SENT = {each.name: ["fisher"] for each in VECTORS}
TWO = {NORTH.name: ["fisher"], SOUTH.name: ["fisher"], EAST.name: ["regmean"]}


def measuring(*vectors: DataVector) -> ModelVersion:
    return version(FISHER, *vectors, phase=Phase.MEASURING, measuring_started_at=at(0))


def saved(world: World, now: datetime) -> ModelVersion:
    (action,) = plan(world, now)
    assert isinstance(action, Save)
    assert isinstance(action.resource, ModelVersion)
    return action.resource


def test_a_version_asks_for_what_its_method_reads_and_then_is_merged():
    pending = version(FISHER, *VECTORS)
    world = World(FISHER, BASE, VECTORS, (pending,), statistics=TWO)
    asking = saved(world, at(5))
    assert (asking.status.phase, asking.status.measuring_started_at) == (Phase.MEASURING, at(5))
    world = replace(world, versions=(asking,))
    assert plan(world, at(6)) == [WakeAt(at(1005))]
    assert "waiting for the fisher statistics of east-1, which agents send" in explain(world, at(6))
    complete = replace(world, statistics=SENT)
    merging = saved(complete, at(7))
    assert merging.status.phase is Phase.PENDING
    assert plan(replace(complete, versions=(merging,)), at(7)) == [RunJob(merging.name, "merge")]


def test_where_all_are_here_nobody_is_asked():
    world = World(FISHER, BASE, VECTORS, (version(FISHER, *VECTORS),), statistics=SENT)
    assert plan(world, at(5)) == [RunJob(world.versions[0].name, "merge")]
    plain = World(policy(), BASE, VECTORS, (version(policy(), *VECTORS),))
    assert plan(plain, at(5)) == [RunJob(plain.versions[0].name, "merge")]


def late() -> World:
    """A version whose deadline has passed; east's statistics are missing."""
    world = World(FISHER, BASE, VECTORS, (measuring(*VECTORS),), statistics=TWO)
    return replace(world, versions=(saved(world, at(1000)),))


def test_after_the_deadline_the_next_version_is_without_those_whose_statistics_are_missing():
    world = late()
    (given_up,) = world.versions
    assert (given_up.status.phase, given_up.status.unmeasured) == (Phase.SUPERSEDED, ("east-1",))
    assert {each.name for each in eligible(world)} == {"north-1", "south-1"}
    (made,) = plan(world, at(1000))
    assert made == CreateVersion(version(FISHER, NORTH, SOUTH).model_copy(update={"status": made.version.status}))
    assert "left out until they come: the statistics of east-1" in explain(world, at(1000))


def test_when_they_come_after_all_the_version_is_taken_up_again():
    world = replace(late(), statistics=SENT)
    revived = saved(world, at(2000))
    assert (revived.name, revived.status.phase) == (world.versions[0].name, Phase.PENDING)


def test_what_one_method_missed_is_not_missed_by_another():
    other = replace(late(), policy=policy())
    assert eligible(other) == tuple(sorted(VECTORS, key=lambda each: each.spec.artifact.digest))


def test_a_ready_version_stays_while_a_newer_vector_is_measured():
    ready = version(FISHER, *VECTORS, phase=Phase.READY, at=10)
    newer = vector("east", 2, at=100)
    world = World(FISHER, BASE, (*VECTORS, newer), (ready,), statistics=SENT)
    (created,) = plan(world, at(200))
    assert created.version.hospitals == ("east", "north", "south")
    asking = created.version.with_phase(Phase.MEASURING, now=at(200), measuring_started_at=at(200))
    world = replace(world, versions=(ready, asking))
    assert plan(world, at(201)) == [WakeAt(at(1200))]


def test_a_withdrawal_makes_the_next_version_at_once():
    asking = measuring(*VECTORS)
    gone = vector("east", withdrawn=True)
    world = World(FISHER, BASE, (NORTH, SOUTH, gone), (asking,), statistics=TWO)
    assert saved(world, at(5)).status.phase is Phase.REVOKED
    world = replace(world, versions=(saved(world, at(5)),))
    (created,) = plan(world, at(5))
    assert created.version.hospitals == ("north", "south")


@pytest.mark.parametrize("change", [{"suspend": True}, {"method": "mean"}])
def test_a_version_that_is_measured_finishes_or_gives_way_like_any_other(change):
    rules = policy(**{"method": "fisher", "deadline_seconds": 1000, **change})
    asking = measuring(*VECTORS)
    world = World(rules, BASE, VECTORS, (asking,), statistics=TWO)
    planned = plan(world, at(5))
    if "suspend" in change:
        assert planned == [WakeAt(at(1000))]
    else:
        assert planned[0].resource.status.phase is Phase.SUPERSEDED
        assert isinstance(planned[1], CreateVersion)


def test_vectors_of_a_version_that_is_measured_are_kept():
    newer = vector("east", 2, at=100)
    asking = measuring(*VECTORS)
    assert sweep([asking], (*VECTORS, newer), running=(), on_disk=(), now=at(200)) == []
