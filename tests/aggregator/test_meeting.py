"""Calibration by visits and by meetings, over the real wire."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from agent.ledger import read_ledger
from datavector.errors import ArtifactError, NotFound, ProtocolError, TryAgain
from datavector.merge.batchnorm import Moments, pool
from datavector.wire.v1.exchange_pb2 import (
    LayerMoments,
    MeetJoin,
    MeetRequest,
    TaskKind,
    VisitFinal,
    VisitOpen,
    VisitReply,
    VisitRequest,
)

VERSION = "small-0123456789"
LAYERS = {"sum/bn0": 2, "sum/bn1": 3}


def moments(seed, channels):
    random = np.random.default_rng(seed)
    return Moments(int(random.integers(10, 99)), random.normal(size=channels), random.uniform(0.1, 2, size=channels))


def own(seed):
    """One hospital's moments of every layer."""
    return {layer: moments(seed + position, channels) for position, (layer, channels) in enumerate(LAYERS.items())}


def assert_same(one, other):
    assert one.count == other.count
    np.testing.assert_array_equal(one.mean, other.mean)
    np.testing.assert_array_equal(one.variance, other.variance)


@pytest.fixture
def ask(receiver, small_base):
    """Opens a calibration of a version of north, south and west."""

    def ask(mode, *, quorum=3, rounds=1, hospitals=("north", "south", "west")):
        receiver.calibrate(small_base, VERSION, *hospitals, mode=mode, quorum=quorum, visits=rounds)

    return ask


@pytest.fixture
def task_of(receiver, connect):
    """A hospital's client with its only task."""

    def task_of(hospital, **options):
        client = connect(receiver.address, hospital, **options)
        (task,) = client.list_tasks().tasks
        return client, task

    return task_of


# --- Visits ---------------------------------------------------------------------------------------------------


def test_a_visit_is_offered_to_the_hospitals_of_the_version_only(connect, receiver, ask, task_of):
    ask("visit", hospitals=("north", "south"), quorum=2)
    _, task = task_of("north")
    assert (task.kind, task.version, task.round) == (TaskKind.TASK_KIND_RECALIBRATE_VISIT, VERSION, 1)
    assert [(file.name, file.size) for file in task.weights] == [("sum.safetensors", 7)]
    assert not connect(receiver.address, "west").list_tasks().tasks


def test_a_visitor_gets_what_the_others_left_pooled_and_never_its_own(receiver, ask, task_of):
    ask("visit", rounds=2)
    for seed, hospital in enumerate(("north", "south"), 1):
        client, task = task_of(hospital)
        client.complete_visit(task, own(seed * 10), images=seed)
    client, task = task_of("west")
    found = client.begin_visit(task)
    for layer in LAYERS:
        assert_same(found[layer], pool([own(10)[layer], own(20)[layer]]))
    client.complete_visit(task, own(30), images=3)
    client, task = task_of("north")
    assert task.round == 2
    for layer, pooled in client.begin_visit(task).items():
        assert_same(pooled, pool([own(20)[layer], own(30)[layer]]))
    assert receiver.woken == 3
    assert receiver.metric("visits_total", mode="visit") == 3


def test_the_first_visitor_finds_nothing(ask, task_of):
    ask("visit")
    client, task = task_of("north")
    assert client.begin_visit(task) == {}


def test_a_second_round_waits_until_a_quorum_has_done_the_first(connect, receiver, ask, task_of):
    ask("visit", quorum=2, rounds=2)
    client, task = task_of("north")
    assert "south, west" in client.complete_visit(task, own(1), images=1).waiting_for
    assert not client.list_tasks().tasks
    south, task = task_of("south")
    south.complete_visit(task, own(2), images=1)
    assert client.list_tasks().tasks[0].round == 2


def test_an_answer_that_got_lost_is_given_again_and_changes_nothing(receiver, ask, task_of):
    ask("visit")
    client, task = task_of("north")
    client.complete_visit(task, own(1), images=1)
    client.complete_visit(task, own(2), images=2)
    (visit,) = receiver.store.visits(VERSION)
    assert visit.images == 1
    assert_same(visit.moments["sum/bn0"], own(1)["sum/bn0"])


def test_a_visit_that_is_no_longer_wanted_is_refused_and_not_stored(receiver, ask, task_of):
    ask("visit")
    client, task = task_of("north")
    receiver.stop_calibration(VERSION)
    with pytest.raises(NotFound, match="does not wait for 'north'"):
        client.complete_visit(task, own(1), images=1)
    assert receiver.store.visits(VERSION) == []


def layer(name, count=5, mean=None, variance=None):
    channels = LAYERS.get(name, 2)
    mean, variance = mean or [0.0] * channels, variance or [1.0] * channels
    return VisitRequest(layer=LayerMoments(layer=name, count=count, mean=mean, variance=variance))


FINAL = VisitRequest(final=VisitFinal(images=1, layers=2))


@pytest.mark.parametrize(
    "messages",
    [
        [layer("sum/bn0"), FINAL],
        [layer("sum/bn0"), layer("sum/bn0"), FINAL],
        [layer("sum/bn0"), layer("sum/bn1")],
        [layer("sum/bn0"), layer("sum/bn1"), layer("sum/bn2"), FINAL],
        [layer("sum/bn0"), layer("sum/bn1"), VisitRequest(final=VisitFinal(images=0, layers=2))],
        [layer("sum/bn0", mean=[1.0] * 3), layer("sum/bn1"), FINAL],
        [layer("sum/bn0", mean=[0.0, float("nan")]), layer("sum/bn1"), FINAL],
        [layer("sum/bn0", variance=[1.0, -1.0]), layer("sum/bn1"), FINAL],
        [layer("sum/bn0", count=0), layer("sum/bn1"), FINAL],
        [layer("sum/bn0", count=1 << 63), layer("sum/bn1"), FINAL],
        [layer("sum/bn0", mean=[1e300, 0.0]), layer("sum/bn1"), FINAL],
        [],
    ],
    ids=[
        "layer missing",
        "twice",
        "no final",
        "other layer",
        "no image",
        "channels",
        "NaN",
        "negative",
        "count",
        "huge count",
        "huge",
        "end",
    ],
)
def test_a_visit_is_stored_whole_or_not_at_all(receiver, ask, task_of, messages):
    ask("visit")
    client, task = task_of("north")
    opened = [VisitRequest(open=VisitOpen(task_id=task.id)), *messages]
    with pytest.raises((ProtocolError, ArtifactError)):
        client.result(client._stub().CompleteVisit.future(iter(opened)), VisitReply)
    assert receiver.store.visits(VERSION) == []
    assert receiver.woken == 0


# --- Meetings -------------------------------------------------------------------------------------------------


def attend(client, task, seed, *, images, gone_at="", step=None, **options):
    """A hospital's forward pass: its moments of each layer out, pooled ones back. `gone_at`: leaves there."""
    pooled = {}
    with client.meet(task, images=images, **options) as meeting:
        for layer, values in own(seed).items():
            if layer == gone_at:
                client.interrupt()
            if step:
                step(layer)
            pooled[layer] = meeting.pool(layer, values)
    return pooled, meeting


def together(*passes) -> list[Future]:
    pool = ThreadPoolExecutor(len(passes))
    futures = [pool.submit(attend, *arguments, **options) for arguments, options in passes]
    pool.shutdown(wait=True)
    return futures


def test_everybody_gets_the_moments_of_all_and_the_stored_visits_pool_to_the_same(receiver, ask, task_of):
    ask("meeting")
    seats = [(*task_of(name), seed) for name, seed in (("north", 10), ("south", 20), ("west", 30))]
    results = [future.result() for future in together(*((seat, {"images": seat[2]}) for seat in seats))]
    visits = receiver.store.visits(VERSION)
    assert [(visit.hospital, visit.images) for visit in visits] == [("north", 10), ("south", 20), ("west", 30)]
    for pooled, meeting in results:
        assert meeting.hospitals == ("north", "south", "west")
        assert meeting.done.images == 60
        for layer in LAYERS:
            assert_same(pooled[layer], pool([own(seed)[layer] for seed in (10, 20, 30)]))
            assert_same(pooled[layer], pool([visit.moments[layer] for visit in visits]))
    assert receiver.woken == 1
    assert receiver.metric("visits_total", mode="meeting") == 3


def test_a_meeting_needs_its_quorum_and_waits_a_little_for_the_rest(start_receiver, small_base, connect):
    receiver = start_receiver(small_base, meeting_grace_seconds=0.1)
    hospitals = ("north", "south", "west")
    receiver.calibrate(small_base, VERSION, *hospitals, mode="meeting", quorum=2)
    seats = []
    for seed, name in enumerate(("north", "south"), 1):
        client = connect(receiver.address, name)
        seats.append(((client, client.list_tasks().tasks[0], seed), {"images": 1}))
    for future in together(*seats):
        assert future.result()[1].hospitals == ("north", "south")
    assert not connect(receiver.address, "west").list_tasks().tasks


def test_who_does_not_want_to_wait_longer_is_told_how_many_came_and_the_others_wait_on(ask, task_of):
    ask("meeting", hospitals=("north", "south"), quorum=2)
    north, south = task_of("north"), task_of("south")
    with pytest.raises(TryAgain, match="1 of 2 hospitals came within 1 s"):
        attend(*north, 10, images=1, wait_seconds=1)
    both = together(((*north, 10), {"images": 1}), ((*south, 20), {"images": 1, "wait_seconds": 600}))
    assert [future.exception() for future in both] == [None, None]


def test_a_hospital_that_is_lost_drops_out_from_that_layer_on(receiver, ask, task_of):
    ask("meeting", quorum=2)
    north, south, west = (task_of(name) for name in ("north", "south", "west"))
    futures = together(
        ((*north, 10), {"images": 1}),
        ((*south, 20), {"images": 2}),
        ((*west, 30), {"images": 4, "gone_at": "sum/bn1"}),
    )
    pooled, meeting = futures[0].result()
    assert_same(pooled["sum/bn0"], pool([own(seed)["sum/bn0"] for seed in (10, 20, 30)]))
    assert_same(pooled["sum/bn1"], pool([own(seed)["sum/bn1"] for seed in (10, 20)]))
    assert list(meeting.done.hospitals) == ["north", "south"]
    assert [visit.hospital for visit in receiver.store.visits(VERSION)] == ["north", "south"]
    assert futures[2].exception() is not None


def test_below_the_quorum_everybody_may_start_again(receiver, ask, task_of, connect):
    ask("meeting", hospitals=("north", "south"), quorum=2)
    north, south = task_of("north"), task_of("south")
    lost, left = together(((*south, 20), {"images": 1, "gone_at": "sum/bn1"}), ((*north, 10), {"images": 1}))
    assert lost.exception() is not None
    assert isinstance(left.exception(), TryAgain)
    assert "1 of 2 hospitals are left" in str(left.exception())
    assert receiver.store.visits(VERSION) == []
    again = connect(receiver.address, "south")
    both = together(((*north, 10), {"images": 1}), ((again, south[1], 20), {"images": 1}))
    assert [future.exception() for future in both] == [None, None]


def test_a_hospital_that_stalls_is_not_waited_for(start_receiver, small_base, connect):
    receiver = start_receiver(small_base, idle_timeout_seconds=1)
    hospitals = ("north", "south", "west")
    receiver.calibrate(small_base, VERSION, *hospitals, mode="meeting", quorum=2)
    others_done = threading.Event()
    seats = []
    for seed, name in enumerate(hospitals, 1):
        client = connect(receiver.address, name)
        stall = {"step": lambda layer: layer == "sum/bn1" and others_done.wait()} if name == "west" else {}
        seats.append(((client, client.list_tasks().tasks[0], seed), {"images": 1, **stall}))
    with ThreadPoolExecutor(3) as executor:
        north, south, west = (executor.submit(attend, *arguments, **options) for arguments, options in seats)
        assert list(north.result()[1].done.hospitals) == ["north", "south"]
        south.result()
        others_done.set()
        assert isinstance(west.exception(), TryAgain)
        assert "nothing arrived for 1 seconds" in str(west.exception())


def test_when_several_stall_at_once_and_too_few_are_left_everybody_is_told(start_receiver, small_base, connect):
    receiver = start_receiver(small_base, idle_timeout_seconds=0.5)
    hospitals = ("north", "south", "west")
    receiver.calibrate(small_base, VERSION, *hospitals, mode="meeting")
    all_told = threading.Event()
    seats = []
    for seed, name in enumerate(hospitals, 1):
        client = connect(receiver.address, name)
        stall = {"step": lambda layer: layer == "sum/bn1" and all_told.wait()} if name != "north" else {}
        seats.append(((client, client.list_tasks().tasks[0], seed), {"images": 1, **stall}))
    with ThreadPoolExecutor(3) as executor:
        north, *stalling = (executor.submit(attend, *arguments, **options) for arguments, options in seats)
        assert isinstance(north.exception(), TryAgain)
        all_told.set()
        assert all(isinstance(each.exception(), TryAgain) for each in stalling)


def test_a_step_that_fails_at_the_aggregator_leaves_nobody_waiting(receiver, ask, task_of, monkeypatch, caplog):
    ask("meeting", hospitals=("north", "south"))

    def failing(*_):
        raise ValueError("a mistake")

    monkeypatch.setattr(receiver.store, "save_meeting", failing)
    both = together(((*task_of("north"), 10), {"images": 1}), ((*task_of("south"), 20), {"images": 1}))
    for each in both:
        assert isinstance(each.exception(), TryAgain)
        assert "a mistake" not in str(each.exception())
    assert "a mistake" in caplog.text


@pytest.mark.parametrize("images", [0, 2**63])
def test_a_number_of_images_that_makes_no_sense_is_refused(ask, task_of, images):
    ask("meeting")
    with pytest.raises(ProtocolError, match="images were used"):
        attend(*task_of("north"), 10, images=images)


def test_who_is_at_another_layer_than_the_others_is_sent_away(receiver, ask, task_of):
    ask("meeting", quorum=2)
    seats = [task_of(name) for name in ("north", "south")]
    west, task = task_of("west")

    def astray():
        with west.meet(task, images=1) as meeting:
            meeting.pool("sum/bn1", own(30)["sum/bn1"])

    with ThreadPoolExecutor(3) as executor:
        stray = executor.submit(astray)
        others = [executor.submit(attend, *seat, 10, images=1) for seat in seats]
        assert [future.exception() for future in others] == [None, None]
        assert isinstance(stray.exception(), ProtocolError)


def test_a_meeting_that_is_no_longer_wanted_lets_the_waiting_go(start_receiver, small_base, connect):
    receiver = start_receiver(small_base, poll_seconds=0.05)
    receiver.calibrate(small_base, VERSION, "north", "south", mode="meeting", quorum=2)
    client = connect(receiver.address)
    (task,) = client.list_tasks().tasks
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(attend, client, task, 1, images=1)
        receiver.stop_calibration(VERSION)
        assert isinstance(waiting.exception(), NotFound)


def test_a_meeting_cannot_be_passed_as_a_visit(receiver, ask, task_of):
    ask("meeting")
    client, task = task_of("north")
    with pytest.raises(ProtocolError, match="in a meeting"):
        client.begin_visit(task)
    with pytest.raises(ProtocolError, match="in a meeting"):
        client.complete_visit(task, own(1), images=1)
    assert receiver.store.visits(VERSION) == []


def test_a_meeting_that_was_left_early_is_in_the_ledger_with_what_was_sent(ask, task_of, tmp_path):
    ask("meeting", hospitals=("north", "south"), quorum=2)
    lost, _ = together(
        ((*task_of("south"), 20), {"images": 1, "gone_at": "sum/bn1"}), ((*task_of("north"), 10), {"images": 1})
    )
    assert lost.exception() is not None
    last = read_ledger(tmp_path / "south.jsonl")[-1]
    assert last.state == "unconfirmed"
    assert last.bytes > 0
    assert last.sha256


@pytest.mark.parametrize("first", [MeetRequest(layer=LayerMoments(layer="sum/bn0")), MeetRequest(join=MeetJoin())])
def test_a_meeting_begins_with_joining_it(ask, task_of, first):
    ask("meeting")
    client, _ = task_of("north")
    with pytest.raises((ProtocolError, NotFound)), client.streaming(client._stub().Meet(iter([first]))) as call:
        next(call)
