"""Sending a vector over good and bad links."""

from __future__ import annotations

import threading

import pytest

from agent.ledger import Ledger, read_ledger
from agent.upload import upload
from datavector.errors import AlreadyWithdrawn, Interrupted, ProtocolError, TryAgain, Unreachable, WrongDigest
from datavector.wire.chunks import CHUNK, frame_chunk
from datavector.wire.v1.exchange_pb2 import UploadOpen, UploadRequest
from tests.serving import announce, make_store, start_process, write_tau

IN_FLIGHT = 8 << 20  # what sockets and gRPC's windows hold at most on loopback


@pytest.fixture
def vector(large_base, tmp_path):
    path = write_tau(tmp_path / "tau.safetensors", large_base)
    return path, announce(path, large_base)


def test_a_vector_arrives_whole_and_is_told_to_whoever_merges(receiver, connect, vector):
    path, info = vector
    delivery = upload(connect(receiver.address), path, info)
    assert [stored.name for stored in receiver.registry.vectors()] == [delivery.vector]
    assert delivery.sent == info.size
    assert receiver.store.blob("north", info.sha256).read_bytes() == path.read_bytes()
    assert not receiver.store.upload("north", info.sha256).exists()
    assert receiver.woken == 1
    assert receiver.metric("uploads_total", outcome="committed") == 1
    assert receiver.metric("received_bytes_total") == info.size


def test_the_same_vector_again_gets_the_same_answer_and_sends_nothing(receiver, connect, vector):
    path, info = vector
    client = connect(receiver.address)
    first, again = upload(client, path, info), upload(client, path, info)
    assert (again.vector, again.sent) == (first.vector, 0)
    assert receiver.metric("received_bytes_total") == info.size
    assert len(receiver.registry.vectors()) == 1


def test_progress_ends_at_the_full_size(receiver, connect, vector):
    path, info = vector
    seen = []
    upload(connect(receiver.address), path, info, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (info.size, info.size)


@pytest.mark.parametrize("outage", ["open", "refuse", "reset"])
def test_an_upload_cut_in_the_middle_goes_on_from_the_durable_offset(receiver, connect, cut_link, vector, outage):
    path, info = vector
    link = cut_link(receiver.address)
    link.cut_at(9 << 20, then=outage)
    waited = []

    def back_again(sentence):
        waited.append(sentence)
        link.set("open")

    client = connect(link.address, patience_seconds=None, on_waiting=back_again)
    upload(client, path, info)
    assert receiver.store.blob("north", info.sha256).read_bytes() == path.read_bytes()
    assert waited
    assert "next try in" in waited[0]
    resumed = receiver.metric("resumed_bytes_total")
    assert resumed >= CHUNK
    assert receiver.metric("received_bytes_total") == info.size
    assert link.sent < info.size + CHUNK + IN_FLIGHT


def test_a_link_that_dies_without_a_word_is_noticed(receiver, connect, cut_link, vector):
    path, info = vector
    link = cut_link(receiver.address)
    link.cut_at(9 << 20, then="freeze")
    upload(connect(link.address, patience_seconds=None, keepalive_seconds=1), path, info)
    assert receiver.metric("received_bytes_total") == info.size
    assert receiver.metric("resumed_bytes_total") >= CHUNK


def test_a_killed_receiver_goes_on_where_it_was_killed(authority, connect, cut_link, large_base, tmp_path, vector):
    path, info = vector
    store = make_store(tmp_path / "store", large_base)
    process, address = start_process(store.root, authority)
    link = cut_link(address)
    link.cut_at(9 << 20, then="refuse")
    restarted = []

    def restart(_sentence):
        if not restarted:
            process.kill()
            process.wait()
            restarted.append(start_process(store.root, authority, f"listen=127.0.0.1:{address.rpartition(':')[2]}"))
            link.set("open")

    client = connect(link.address, patience_seconds=None, on_waiting=restart)
    try:
        upload(client, path, info)
    finally:
        for started, _ in restarted:
            started.kill()
            started.wait()
    assert store.blob("north", info.sha256).read_bytes() == path.read_bytes()
    assert link.sent < info.size + CHUNK + IN_FLIGHT


def test_while_nobody_listens_it_says_since_when_and_gives_up_when_patience_ends(connect, cut_link, vector):
    path, info = vector
    link = cut_link("localhost:1")
    link.set("refuse")
    with pytest.raises(Unreachable, match="not reachable"):
        upload(connect(link.address), path, info)


def test_an_interrupted_upload_stops_and_goes_on_later(receiver, connect, cut_link, vector):
    path, info = vector
    link = cut_link(receiver.address)
    link.cut_at(9 << 20, then="freeze")
    client = connect(link.address, patience_seconds=None)
    threading.Thread(target=lambda: (link.was_cut.wait(), client.interrupt()), daemon=True).start()
    with pytest.raises(Interrupted):
        upload(client, path, info)
    upload(connect(receiver.address), path, info)
    assert receiver.metric("received_bytes_total") <= info.size + CHUNK
    assert receiver.metric("resumed_bytes_total") > 0


def test_a_file_that_is_not_the_announced_one_is_refused_and_not_kept(receiver, connect, large_base, vector, tmp_path):
    path, info = vector
    other = write_tau(tmp_path / "other", large_base, seed=2)
    with pytest.raises(WrongDigest, match="send the vector again"):
        upload(connect(receiver.address), other, info)
    assert not receiver.store.upload("north", info.sha256).exists()
    assert receiver.registry.vectors() == []
    upload(connect(receiver.address), path, info)


def test_a_withdrawn_vector_is_not_taken_again(receiver, connect, vector):
    path, info = vector
    client = connect(receiver.address)
    name = upload(client, path, info).vector
    assert client.withdraw().vectors == [name]
    client.ledger.decide("rejoin")
    with pytest.raises(AlreadyWithdrawn, match=r"change training\.seed or the images"):
        upload(client, path, info)


def test_after_a_withdrawal_nothing_leaves_until_the_hospital_rejoins(receiver, connect, vector, large_base, tmp_path):
    client = connect(receiver.address)
    upload(client, *vector)
    client.withdraw()
    other = write_tau(tmp_path / "other", large_base, seed=2)
    info = announce(other, large_base, sequence=2)
    before = read_ledger(client.ledger.path)
    with pytest.raises(AlreadyWithdrawn, match="datavector rejoin"):
        upload(client, other, info)
    assert read_ledger(client.ledger.path) == before
    client.ledger.decide("rejoin")
    assert upload(client, other, info).sent == info.size


def test_a_withdrawal_in_the_middle_of_an_upload_ends_it(receiver, connect, vector, tmp_path):
    path, info = vector
    client, ledger = connect(receiver.address, patience_seconds=None), Ledger(tmp_path / "north.jsonl")
    seen = []

    def withdraw_at_once(done, _total):
        if not seen:
            ledger.decide("withdrawal")
        seen.append(done)

    with pytest.raises(AlreadyWithdrawn, match="nothing leaves any more"):
        upload(client, path, info, on_progress=withdraw_at_once)
    assert seen == [CHUNK]
    assert receiver.registry.vectors() == []
    last = read_ledger(ledger.path)[-1]
    assert (last.what, last.state, last.bytes) == ("vector", "unconfirmed", CHUNK)


def test_a_withdrawal_before_the_end_of_the_last_byte_keeps_the_vector_from_counting(receiver, connect, vector):
    path, info = vector
    client = connect(receiver.address, patience_seconds=None)

    def withdraw_at_the_end(done, total):
        if done == total:
            client.ledger.decide("withdrawal", info.base_digest)

    with pytest.raises(AlreadyWithdrawn):
        upload(client, path, info, on_progress=withdraw_at_the_end)
    assert receiver.registry.vectors() == []


@pytest.mark.parametrize("cut_at", [0, 9 << 20])
def test_a_withdrawal_while_an_upload_waits_for_the_link_ends_it(receiver, connect, cut_link, vector, cut_at):
    path, info = vector
    link = cut_link(receiver.address)

    def withdraw_and_back_again(_sentence):
        if not ledger.withdrawal(info.base_digest):
            ledger.decide("withdrawal", info.base_digest)
        link.set("open")

    client = connect(link.address, patience_seconds=None, on_waiting=withdraw_and_back_again)
    ledger = client.ledger
    client.server_identity()
    if cut_at:
        link.cut_at(cut_at, then="refuse")
    else:
        link.set("refuse")
    with pytest.raises(AlreadyWithdrawn):
        upload(client, path, info)
    assert receiver.registry.vectors() == []
    assert link.sent < (9 << 20) + CHUNK + IN_FLIGHT


def test_the_ledger_says_what_left_before_it_leaves(receiver, connect, cut_link, vector, tmp_path):
    path, info = vector
    link = cut_link(receiver.address)
    client = connect(link.address)
    before = []
    upload(client, path, info, on_progress=lambda *_: before.append(read_ledger(tmp_path / "north.jsonl")))
    announcing, announced, first, last = read_ledger(tmp_path / "north.jsonl")
    assert before[0] == [announcing, announced, first]
    assert (announcing.state, announced.state, announced.what) == ("sending", "sent", "announcement")
    assert announced.bytes == len(info.SerializeToString())
    assert (first.state, first.what, first.bytes, first.sha256) == ("sending", "vector", info.size, info.sha256)
    assert first.base == info.base_digest
    assert first.to == f"{link.address} (spiffe://datavector.local/aggregator)"
    assert last.state == "sent"


def test_of_a_vector_that_is_there_already_only_the_announcement_is_in_the_ledger(receiver, connect, vector, tmp_path):
    path, info = vector
    upload(connect(receiver.address), path, info)
    before = len(read_ledger(tmp_path / "north.jsonl"))
    upload(connect(receiver.address), path, info)
    again = read_ledger(tmp_path / "north.jsonl")[before:]
    assert [(entry.what, entry.state) for entry in again] == [("announcement", "sending"), ("announcement", "sent")]


def test_an_announcement_that_is_refused_is_in_the_ledger(receiver, connect, vector, tmp_path):
    path, info = vector
    info.sample_count = 0
    with pytest.raises(ProtocolError):
        upload(connect(receiver.address), path, info)
    entries = read_ledger(tmp_path / "north.jsonl")
    assert [(entry.what, entry.state) for entry in entries] == [
        ("announcement", "sending"), ("announcement", "unconfirmed"),
    ]  # fmt: skip


def test_the_ledger_counts_the_bytes_that_really_left(receiver, connect, vector, tmp_path):
    path, info = vector
    with pytest.raises(TryAgain):
        connect(receiver.address).send_upload(iter([opening(info), frame_chunk(path.read_bytes()[:CHUNK])]))
    upload(connect(receiver.address), path, info)
    first, last = read_ledger(tmp_path / "north.jsonl")[2:]
    assert (first.bytes, last.bytes) == (info.size, info.size - CHUNK)


def opening(info):
    return UploadRequest(open=UploadOpen(vector=info)).SerializeToString()


def test_a_failed_upload_stays_in_the_ledger_as_unconfirmed(receiver, connect, vector, tmp_path, large_base):
    _, info = vector
    with pytest.raises(WrongDigest):
        upload(connect(receiver.address), write_tau(tmp_path / "other", large_base, seed=2), info)
    assert [entry.state for entry in read_ledger(tmp_path / "north.jsonl")][2:] == ["sending", "unconfirmed"]
