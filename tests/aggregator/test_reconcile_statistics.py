"""Policies whose method reads statistics that hospitals send beside their vectors."""

from __future__ import annotations

from dataclasses import replace

from aggregator.reconcile import CreateVersion, WakeAt, World, eligible, explain, lacking, plan
from aggregator.resources import Phase
from tests.aggregator.objects import BASE, at, policy, vector

NORTH, SOUTH, EAST = vector("north"), vector("south"), vector("east", at=100)
FISHER = policy(method="fisher")
SENT = {each.name: {"fisher": "sha256:" + "f" * 64} for each in (NORTH, SOUTH, EAST)}


def world(**sent: dict[str, str]) -> World:
    return World(FISHER, BASE, (NORTH, SOUTH), statistics=sent)


def test_a_vector_without_them_waits_and_the_policy_says_for_what():
    waiting = world(**{NORTH.name: SENT[NORTH.name], SOUTH.name: {}})
    assert eligible(waiting) == (NORTH,)
    assert lacking(waiting) == {SOUTH.name: ["fisher"]}
    assert "1 of 2 hospitals; waiting for one more; waiting for the fisher statistics of south-1" in explain(
        waiting, at(500)
    )
    assert plan(waiting, at(500)) == []


def test_statistics_of_another_kind_do_not_help():
    regmean = {"regmean": "sha256:" + "a" * 64}
    assert eligible(world(**{NORTH.name: regmean, SOUTH.name: regmean})) == ()


def test_a_version_names_them_and_others_make_another_version():
    first = World(FISHER, BASE, (NORTH, SOUTH), statistics=SENT)
    (action,) = plan(first, at(500))
    assert isinstance(action, CreateVersion)
    assert [entry.statistics for entry in action.version.spec.inputs] == [SENT[NORTH.name]] * 2
    other = replace(first, statistics=SENT | {SOUTH.name: {"fisher": "sha256:" + "0" * 64}})
    assert other.wanted.name != first.wanted.name


def test_a_method_that_reads_none_does_not_look_at_them():
    assert not lacking(World(policy(), BASE, (NORTH, SOUTH)))


def test_a_hospital_is_not_left_out_while_its_statistics_may_still_come():
    sent = {name: found for name, found in SENT.items() if name != EAST.name}
    arrived = World(FISHER, BASE, (NORTH, SOUTH, EAST), statistics=sent)
    assert plan(arrived, at(500)) == [WakeAt(at(3700))]
    assert "2 hospitals; merging at 2030-01-01 01:01:40Z unless another arrives; waiting for the fisher" in explain(
        arrived, at(500)
    )
    (late,) = plan(arrived, at(3700))
    assert late.version.hospitals == ("north", "south")
    (complete,) = plan(replace(arrived, statistics=SENT), at(500))
    assert complete.version.hospitals == ("east", "north", "south")


def test_a_newer_vector_without_them_does_not_throw_its_hospital_out_at_once():
    ready = World(FISHER, BASE, (NORTH, SOUTH, EAST), statistics=SENT)
    made = ready.wanted.with_phase(Phase.READY, now=at(600), ready_at=at(600))
    newer = vector("east", 2, at=1000)
    after = replace(ready, vectors=(NORTH, SOUTH, EAST, newer), versions=(made,))
    assert plan(after, at(1001)) == [WakeAt(at(4600))]
