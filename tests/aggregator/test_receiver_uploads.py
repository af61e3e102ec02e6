"""Uploads as the receiver sees them: odd streams, takeover, quota, crashes, a full disk."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
from queue import SimpleQueue

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator.metrics import Metrics
from aggregator.registry import SqliteRegistry
from aggregator.uploads import Arrival, Uploads
from datavector.errors import (
    AlreadyWithdrawn,
    ArtifactError,
    BaseModelError,
    DiskFull,
    NotFinite,
    ProtocolError,
    QuotaExceeded,
    Refused,
    TryAgain,
    WrongDigest,
    WrongLayout,
)
from datavector.wire.chunks import CHUNK, frame_chunk
from datavector.wire.v1.exchange_pb2 import UploadFinal, UploadOpen, UploadRequest
from tests.serving import announce, make_base, make_store, write_tau


@pytest.fixture
def vector(small_base, tmp_path):
    path = write_tau(tmp_path / "tau.safetensors", small_base)
    return path.read_bytes(), announce(path, small_base)


@pytest.fixture
def large_vector(large_base, tmp_path):
    path = write_tau(tmp_path / "large.safetensors", large_base)
    return path.read_bytes(), announce(path, large_base)


def opening(info, offset=0):
    return UploadRequest(open=UploadOpen(vector=info, offset=offset)).SerializeToString()


def final(info):
    return UploadRequest(final=UploadFinal(size=info.size, sha256=info.sha256)).SerializeToString()


def chunks(data, size=CHUNK):
    return [frame_chunk(data[begin : begin + size]) for begin in range(0, len(data), size)]


class OpenUpload:
    """An upload whose messages the test sends one by one, from a client of its own."""

    def __init__(self, client, info, offset=0):
        self._messages = SimpleQueue()
        self._messages.put(opening(info, offset))
        self.ended_by = None
        self._thread = threading.Thread(target=self._run, args=(client,), daemon=True)
        self._thread.start()

    def _run(self, client):
        try:
            client.send_upload(iter(self._messages.get, None))
        except Exception as error:
            self.ended_by = error

    def send(self, *messages):
        for message in messages:
            self._messages.put(message)

    def end(self):
        """Waits until the receiver has ended it, and returns the error."""
        self._thread.join()
        self._messages.put(None)
        return self.ended_by


def durable(client, info, at_least):
    """Asks for the durable offset until it has grown to `at_least`."""
    while (offset := client.begin_upload(info).offset) < at_least:
        pass
    return offset


def until_stored(receiver, hospital, info, size):
    """Waits until `size` bytes have arrived, without asking (asking ends the stream)."""
    path = receiver.store.upload(hospital, info.sha256) / "part"
    while not path.is_file() or path.stat().st_size < size:
        pass


# --- What is no vector ----------------------------------------------------------------------------------------


def test_a_stream_that_ends_without_its_final_record_commits_nothing_and_keeps_what_came(receiver, connect, vector):
    data, info = vector
    client = connect(receiver.address)
    with pytest.raises(TryAgain, match="without its final record"):
        client.send_upload(iter([opening(info), *chunks(data)]))
    assert receiver.registry.vectors() == []
    assert client.begin_upload(info).offset == len(data)
    assert client.send_upload(iter([opening(info, len(data)), final(info)])).vector


def test_a_truncated_vector_is_refused_and_removed(receiver, connect, vector):
    data, info = vector
    with pytest.raises(WrongDigest):
        connect(receiver.address).send_upload(iter([opening(info), *chunks(data[:-4]), final(info)]))
    assert not receiver.store.upload("north", info.sha256).exists()


def test_a_vector_that_is_too_long_is_refused(receiver, connect, vector):
    data, info = vector
    with pytest.raises(WrongLayout, match="longer than"):
        connect(receiver.address).send_upload(iter([opening(info), *chunks(data + b"\0"), final(info)]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -1e13])
def test_a_vector_that_is_not_finite_is_refused_with_what_to_do(receiver, connect, vector, value):
    data, info = vector
    bad = data[:-4] + np.float32(value).tobytes()
    client = connect(receiver.address)
    with pytest.raises(NotFinite, match="lower learning_rate"):
        client.send_upload(iter([opening(info), *chunks(bad), final(info)]))
    assert not receiver.store.upload("north", info.sha256).exists()
    assert client.begin_upload(info).offset == 0


def test_another_architectures_vector_of_the_same_length_is_refused_at_its_header(receiver, connect, vector, tmp_path):
    data, info = vector
    other = make_base(tmp_path / "other", name="other")
    foreign = write_tau(tmp_path / "foreign", other).read_bytes()
    assert len(foreign) == len(data)
    with pytest.raises(WrongLayout, match="header"):
        connect(receiver.address).send_upload(iter([opening(info), *chunks(foreign), final(info)]))


def test_another_architectures_announcement_is_refused_before_any_byte(receiver, connect, vector):
    _, info = vector
    info.size += 4
    with pytest.raises(WrongLayout, match="bytes, vectors of small have"):
        connect(receiver.address).begin_upload(info)


def test_an_unknown_base_is_answered_with_those_that_are_merged(receiver, connect, vector, small_base):
    _, info = vector
    info.base_digest = "sha256:" + "0" * 64
    with pytest.raises(BaseModelError, match=small_base.digest):
        connect(receiver.address).begin_upload(info)


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "../../etc/passwd"},
        {"sequence": 0},
        {"sequence": 2**63},
        {"sample_count": 0},
        {"sample_count": 2**40},
    ],
)
def test_an_announcement_that_makes_no_sense_is_refused(receiver, connect, vector, change):
    _, info = vector
    for name, value in change.items():
        setattr(info, name, value)
    with pytest.raises(ProtocolError):
        connect(receiver.address).begin_upload(info)


@pytest.mark.parametrize("first", [b"", b"\xff\xff", frame_chunk(b"data"), UploadRequest(final={}).SerializeToString()])
def test_a_stream_that_does_not_begin_with_its_announcement_is_refused(receiver, connect, first):
    with pytest.raises(ProtocolError):
        connect(receiver.address).send_upload(iter([first]))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=8),
    position=st.integers(min_value=0),
    flip=st.integers(1, 255),
)
def test_whatever_byte_is_altered_in_whatever_division_it_is_refused(receiver, connect, vector, sizes, position, flip):
    data, info = vector
    altered = bytearray(data)
    altered[position % len(data)] ^= flip
    client = shared(connect, receiver)
    with pytest.raises(ArtifactError):
        client.send_upload(iter([opening(info), *divided(bytes(altered), sizes), final(info)]))
    assert receiver.registry.vectors() == []
    assert not receiver.store.upload("north", info.sha256).exists()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=8), cut=st.integers(0, 4200))
def test_whatever_division_and_cut_the_stored_vector_is_the_sent_one(receiver, connect, vector, sizes, cut):
    data, info = vector
    client = shared(connect, receiver)
    cut = min(cut, len(data))
    with pytest.raises(TryAgain):
        client.send_upload(iter([opening(info), *divided(data[:cut], sizes)]))
    offset = client.begin_upload(info).offset
    assert offset == cut
    client.send_upload(iter([opening(info, offset), *divided(data[offset:], sizes), final(info)]))
    blob = receiver.store.blob("north", info.sha256)
    assert blob.read_bytes() == data
    forget(receiver, blob)


def divided(data, sizes):
    """Chunks of these sizes, over and over."""
    pieces, begin = [], 0
    while begin < len(data):
        size = max(sizes[len(pieces) % len(sizes)], 1)
        pieces.append(frame_chunk(data[begin : begin + size]))
        begin += size
    return pieces


_clients = {}


def shared(connect, receiver):
    """One client for all examples of a property."""
    if receiver.address not in _clients:
        _clients[receiver.address] = connect(receiver.address)
    return _clients[receiver.address]


def forget(receiver, blob):
    """Removes a stored vector as if it had never come."""
    receiver.registry._connection.execute("DELETE FROM objects WHERE kind = 'DataVector'")
    blob.unlink()


# --- Several streams ------------------------------------------------------------------------------------------


def test_a_new_stream_takes_over_from_one_that_stalls(receiver, connect, large_vector):
    data, info = large_vector
    stalled = OpenUpload(connect(receiver.address), info)
    stalled.send(*chunks(data[: 3 * CHUNK]))
    until_stored(receiver, "north", info, 3 * CHUNK)
    client = connect(receiver.address)
    offset = client.begin_upload(info).offset
    assert offset == 3 * CHUNK
    assert isinstance(stalled.end(), TryAgain)
    assert "took over" in stalled.ended_by.message
    client.send_upload(iter([opening(info, offset), *chunks(data[offset:]), final(info)]))
    assert receiver.store.blob("north", info.sha256).read_bytes() == data


def test_a_stream_that_opens_at_a_stale_offset_is_told_the_true_one(receiver, connect, vector):
    data, info = vector
    client = connect(receiver.address)
    with pytest.raises(TryAgain, match="from byte 0, not 8"):
        client.send_upload(iter([opening(info, 8), *chunks(data[8:]), final(info)]))


def test_a_silent_stream_is_ended_and_its_bytes_are_kept(start_receiver, small_base, large_base, connect, large_vector):
    data, info = large_vector
    receiver = start_receiver(small_base, large_base, idle_timeout_seconds=1)
    silent = OpenUpload(connect(receiver.address), info)
    silent.send(*chunks(data[:CHUNK]))
    assert "nothing arrived for 1 seconds" in silent.end().message
    assert connect(receiver.address).begin_upload(info).offset == CHUNK


def test_two_hospitals_upload_at_once_and_both_are_kept_apart(receiver, connect, large_vector):
    data, info = large_vector
    north = OpenUpload(connect(receiver.address, "north"), info)
    south = OpenUpload(connect(receiver.address, "south"), info)
    for piece in chunks(data):
        north.send(piece)
        south.send(piece)
    north.send(final(info))
    south.send(final(info))
    assert (north.end(), south.end()) == (None, None)
    assert {vector.spec.hospital for vector in receiver.registry.vectors()} == {"north", "south"}
    assert receiver.store.blob("north", info.sha256) != receiver.store.blob("south", info.sha256)


def test_a_hospital_may_have_only_so_many_open_uploads(start_receiver, small_base, connect, tmp_path):
    receiver = start_receiver(small_base, uploads_per_hospital=1)
    first, second = (announce(write_tau(tmp_path / str(seed), small_base, seed=seed), small_base) for seed in (1, 2))
    running = OpenUpload(connect(receiver.address), first)
    running.send(frame_chunk(b""))
    until_stored(receiver, "north", first, 0)
    with pytest.raises(QuotaExceeded, match="1 open uploads"):
        connect(receiver.address).begin_upload(second)
    assert connect(receiver.address, "south").begin_upload(second).offset == 0


def test_an_abandoned_upload_gives_way_to_a_new_one(start_receiver, small_base, connect, tmp_path):
    receiver = start_receiver(small_base, uploads_per_hospital=1)
    client = connect(receiver.address)
    vectors = [write_tau(tmp_path / str(seed), small_base, seed=seed) for seed in (1, 2)]
    first, second = (announce(path, small_base) for path in vectors)
    with pytest.raises(TryAgain):
        client.send_upload(iter([opening(first), frame_chunk(vectors[0].read_bytes()[:100])]))
    data = vectors[1].read_bytes()
    client.send_upload(iter([opening(second), *chunks(data), final(second)]))
    assert not receiver.store.upload("north", first.sha256).exists()


def test_a_hospital_may_have_only_so_many_vectors(start_receiver, small_base, connect, tmp_path):
    receiver = start_receiver(small_base, vectors_per_hospital=1)
    client = connect(receiver.address)
    for seed in (1, 2):
        path = write_tau(tmp_path / str(seed), small_base, seed=seed)
        info = announce(path, small_base, sequence=seed)
        if seed == 1:
            client.send_upload(iter([opening(info), *chunks(path.read_bytes()), final(info)]))
    with pytest.raises(QuotaExceeded, match="has 1 vectors here"):
        client.begin_upload(info)


def whole(vector):
    data, info = vector
    return iter([opening(info), *chunks(data), final(info)])


def test_a_vector_that_a_newer_one_has_replaced_is_refused_with_what_to_do(
    receiver, connect, small_base, vector, tmp_path
):
    client = connect(receiver.address)
    client.send_upload(whole(vector))
    path = write_tau(tmp_path / "newer", small_base, seed=2)
    newer = announce(path, small_base, sequence=2)
    client.send_upload(whole((path.read_bytes(), newer)))
    data, info = vector
    info.sequence = 3
    with pytest.raises(Refused, match=r"was replaced by a newer vector; change training\.seed"):
        client.begin_upload(info)
    with pytest.raises(Refused, match="was replaced by a newer vector"):
        client.send_upload(whole((data, info)))
    assert client.begin_upload(newer).committed


def test_a_vector_that_is_older_than_the_last_one_is_refused_before_it_is_sent(
    receiver, connect, small_base, vector, tmp_path
):
    client = connect(receiver.address)
    path = write_tau(tmp_path / "newer", small_base, seed=2)
    client.send_upload(whole((path.read_bytes(), announce(path, small_base, sequence=2))))
    _, info = vector
    assert info.sequence == 1
    with pytest.raises(Refused, match=r"has sent a newer vector \(sequence 2\) than this one \(1\)"):
        client.begin_upload(info)
    info.sequence = 3
    assert not client.begin_upload(info).committed


def test_a_withdrawal_ends_what_is_on_its_way_and_it_is_never_taken_again(receiver, connect, large_vector):
    data, info = large_vector
    running = OpenUpload(connect(receiver.address), info)
    running.send(*chunks(data[:CHUNK]))
    until_stored(receiver, "north", info, CHUNK)
    (name,) = connect(receiver.address).withdraw().vectors
    assert isinstance(running.end(), AlreadyWithdrawn)
    assert_withdrawn(receiver, connect, info, name)


def test_a_withdrawal_finds_a_vector_whose_link_was_cut(receiver, connect, large_vector):
    data, info = large_vector
    client = connect(receiver.address)
    with pytest.raises(TryAgain):
        client.send_upload(iter([opening(info), *chunks(data[:CHUNK])]))
    (name,) = client.withdraw().vectors
    assert_withdrawn(receiver, connect, info, name)


def test_a_withdrawal_finds_a_vector_that_was_only_announced(receiver, connect, vector):
    client = connect(receiver.address)
    client.begin_upload(vector[1])
    (name,) = client.withdraw().vectors
    assert_withdrawn(receiver, connect, vector[1], name)


def test_a_withdrawal_finds_what_a_crash_left_between_rename_and_record(receiver, connect, vector):
    data, info = vector
    client = connect(receiver.address)
    left_by_a_crash(receiver.store, client, info, data)
    (name,) = client.withdraw().vectors
    assert_withdrawn(receiver, connect, info, name)


def assert_withdrawn(receiver, connect, info, name):
    """Nothing has stayed but the record that it was taken back, and it is not taken again."""
    (record,) = receiver.registry.vectors()
    assert (record.name, record.granted, record.spec.sequence) == (name, False, info.sequence)
    assert not receiver.store.upload("north", info.sha256).exists()
    with pytest.raises(AlreadyWithdrawn, match=name):
        connect(receiver.address).begin_upload(info)


def test_a_withdrawal_from_one_base_leaves_uploads_for_another(receiver, connect, small_base, large_vector, vector):
    data, info = large_vector
    running = OpenUpload(connect(receiver.address), info)
    running.send(*chunks(data[:CHUNK]))
    until_stored(receiver, "north", info, CHUNK)
    client = connect(receiver.address)
    client.begin_upload(vector[1])
    assert len(client.withdraw(small_base.digest).vectors) == 1
    running.send(*chunks(data[CHUNK:]), final(info))
    assert running.end() is None
    assert [record.granted for record in receiver.registry.vectors()] == [False, True]


# --- Crashes and disks ----------------------------------------------------------------------------------------


def left_by_a_crash(store, client, info, data):
    """A vector whose file is in its place, but not recorded."""
    client.begin_upload(info)
    blob = store.blob("north", info.sha256)
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)


def test_a_crash_between_rename_and_record_is_mended_by_the_next_try(receiver, connect, vector):
    data, info = vector
    client = connect(receiver.address)
    left_by_a_crash(receiver.store, client, info, data)
    reply = client.begin_upload(info)
    assert reply.committed
    assert [stored.name for stored in receiver.registry.vectors()] == [reply.vector]
    assert not receiver.store.upload("north", info.sha256).exists()
    assert receiver.woken == 1


def test_what_a_crash_left_goes_when_the_hospital_sends_something_else(start_receiver, small_base, connect, tmp_path):
    receiver = start_receiver(small_base, uploads_per_hospital=1)
    client = connect(receiver.address)
    first, second = (write_tau(tmp_path / str(seed), small_base, seed=seed) for seed in (1, 2))
    left = announce(first, small_base)
    left_by_a_crash(receiver.store, client, left, first.read_bytes())
    client.send_upload(whole((second.read_bytes(), announce(second, small_base))))
    assert not receiver.store.blob("north", left.sha256).exists()
    assert len(receiver.registry.vectors()) == 1


@pytest.mark.parametrize("fault", [DiskFull, TryAgain])
def test_a_vector_that_cannot_be_recorded_is_not_left_as_a_blob(receiver, connect, vector, fault, monkeypatch):
    data, info = vector
    client = connect(receiver.address)

    def failing(_):
        raise fault(receiver.store.root) if fault is DiskFull else TryAgain("locked", remedy="later")

    with monkeypatch.context() as broken:
        broken.setattr(receiver.registry, "add_vector", failing)
        with pytest.raises(fault):
            client.send_upload(whole(vector))
    assert not receiver.store.blob("north", info.sha256).exists()
    kept = client.begin_upload(info).offset
    assert kept == (0 if fault is DiskFull else len(data)), "a full disk keeps nothing"
    assert client.send_upload(iter([opening(info, kept), *chunks(data[kept:]), final(info)])).vector


def test_a_vector_that_a_crash_left_counts_for_the_quota(start_receiver, small_base, connect, vector, tmp_path):
    receiver = start_receiver(small_base, vectors_per_hospital=1)
    client = connect(receiver.address)
    client.send_upload(whole(vector))
    path = write_tau(tmp_path / "left", small_base, seed=2)
    info = announce(path, small_base, sequence=2)
    path.rename(receiver.store.blob("north", info.sha256))
    with pytest.raises(QuotaExceeded, match="has 1 vectors here"):
        client.begin_upload(info)


@pytest.fixture
def uploads(small_base, tmp_path):
    """The uploads of a store, without a server: for what hangs on the order of single steps."""
    store = make_store(tmp_path / "steps", small_base)
    registry = SqliteRegistry(store.root / "registry.sqlite")
    woken = []
    uploads = Uploads(
        store, registry, Metrics(), lambda: woken.append(len(registry.vectors())), max_open=2, max_kept=16
    )
    yield uploads, store, registry, woken
    registry.close()


def test_a_commit_whose_hospital_no_longer_listens_is_told_to_whoever_merges(uploads, small_base, vector):
    uploads, _, registry, woken = uploads
    data, info = vector
    messages = [*chunks(data), final(info)]

    all_read = asyncio.Event()

    async def read():
        message = messages.pop(0)
        if not messages:
            all_read.set()
        return message

    async def cut_after_final():
        call = asyncio.create_task(uploads.receive(Arrival.parse("north", small_base, info), 0, read))
        await all_read.wait()
        call.cancel()
        await uploads.finish_commits()

    asyncio.run(cut_after_final())
    assert len(registry.vectors()) == 1
    assert woken == [1]


def test_a_withdrawal_while_a_file_left_by_a_crash_is_read_finds_it(uploads, small_base, vector):
    uploads, store, registry, _ = uploads
    data, info = vector
    arrival = Arrival.parse("north", small_base, info)

    async def withdraw_meanwhile():
        await uploads.begin(arrival)
        blob = store.blob("north", info.sha256)
        blob.parent.mkdir(parents=True)
        blob.write_bytes(data)
        begun = asyncio.create_task(uploads.begin(arrival))
        await asyncio.sleep(0)
        uploads.withdraw("north", None)
        await begun

    with pytest.raises(AlreadyWithdrawn):
        asyncio.run(withdraw_meanwhile())
    assert [record.granted for record in registry.vectors()] == [False]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(path):
    """Writes until there is no space left."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


def test_a_vector_for_which_there_is_no_room_is_refused_before_it_is_sent(
    start_receiver, small_base, large_base, connect, large_vector, small_disk
):
    receiver = start_receiver(large_base, store=small_disk)
    with pytest.raises(DiskFull, match="the aggregator's disk is full"):
        connect(receiver.address).begin_upload(large_vector[1])


def test_a_disk_that_fills_up_on_the_way_keeps_nothing_half_and_the_receiver_goes_on(
    start_receiver, small_base, large_base, connect, large_vector, vector, small_disk
):
    receiver = start_receiver(small_base, store=small_disk)
    client = connect(receiver.address)
    data, info = vector
    path = receiver.store.upload("north", info.sha256)
    client.begin_upload(info)
    fill(small_disk / "filler")
    with pytest.raises(DiskFull, match="nothing of this call was kept"):
        client.send_upload(iter([opening(info), *chunks(data), final(info)]))
    assert not path.exists()
    assert client.describe().hospital == "north"
    (small_disk / "filler").unlink()
    assert client.send_upload(iter([opening(info), *chunks(data), final(info)])).vector
