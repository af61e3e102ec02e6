"""What hospitals send beside their vectors: who is asked for it, how it comes in, and that it goes with the vector."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from agent.client import Client
from agent.ledger import Ledger, read_ledger
from agent.upload import send_statistics, upload
from datavector.errors import AlreadyWithdrawn, NotFinite, NotFound, ProtocolError, TryAgain, WrongDigest, WrongLayout
from datavector.files import sha256_file
from datavector.layout import FLOAT, write_tensors
from datavector.merge.statistics import FISHER, layout_of
from datavector.model import BaseModel
from datavector.wire.chunks import CHUNK, frame_chunk
from datavector.wire.v1.exchange_pb2 import StatisticsInfo, Task, UploadFinal, UploadOpen, UploadRequest
from tests.serving import Serving, announce, policy_of, write_tau


@dataclass
class Asked:
    """A receiver whose policy reads Fisher information, and the hospital north, whose vector it has."""

    receiver: Serving
    base: BaseModel
    client: Client
    folder: Path
    vector_sha256: str

    def task(self) -> Task:
        (task,) = self.client.list_tasks().tasks
        return task

    def file(self, *, seed: int = 0, value: float | None = None) -> Path:
        """Statistics of the right layout."""
        random, layout = np.random.default_rng(seed), layout_of(FISHER, self.base)
        drawn = [random.random(spec.shape, dtype=FLOAT) for spec in layout.tensors]
        if value is not None:
            drawn[0].reshape(-1)[0] = value
        path = self.folder / f"fisher-{seed}"
        write_tensors(path, layout, iter(drawn))
        return path

    def send(self, file: Path, **changes: object) -> int:
        task = self.task()
        return send_statistics(self.client, task, file, describe(task, file, **changes))

    @property
    def stored(self) -> dict[str, str]:
        return self.receiver.store.statistics("north", self.vector_sha256)

    @property
    def files(self) -> list[str]:
        return [path.name for path in (self.receiver.store.root / "statistics").glob("*/*")]


def describe(task: Task, file: Path, **changes: object) -> StatisticsInfo:
    said = {"task_id": task.id, "sha256": sha256_file(file), "size": file.stat().st_size}
    return StatisticsInfo(**(said | changes))


@pytest.fixture
def asked(start_receiver, large_base, connect, tmp_path):
    receiver = start_receiver(large_base)
    receiver.registry.set_policies([policy_of(large_base, method={"name": "fisher"})])
    client, path = connect(receiver.address), write_tau(tmp_path / "tau", large_base)
    upload(client, path, info := announce(path, large_base))
    return Asked(receiver, large_base, client, tmp_path, info.sha256)


def test_a_hospital_is_asked_once_for_what_the_policy_reads(asked, connect):
    task = asked.task()
    assert (task.statistics, task.vector_sha256, task.base_digest) == (FISHER, asked.vector_sha256, asked.base.digest)
    assert not connect(asked.receiver.address, "south").list_tasks().tasks
    file, woken = asked.file(), asked.receiver.woken
    assert asked.send(file) == file.stat().st_size
    assert asked.stored == {FISHER: f"sha256:{sha256_file(file)}"}
    assert asked.receiver.woken == woken + 1
    assert not asked.client.list_tasks().tasks
    lines = [entry.state for entry in read_ledger(asked.folder / "north.jsonl") if entry.what == "statistics"]
    assert lines == ["sending", "sent"]


def test_where_no_method_reads_any_nobody_is_asked(asked):
    asked.receiver.registry.set_policies([policy_of(asked.base, method={"name": "sum"})])
    assert not asked.client.list_tasks().tasks


def test_what_is_here_stays_and_the_same_again_sends_nothing(asked):
    task, first, other = asked.task(), asked.file(), asked.file(seed=1)
    asked.send(first)
    assert send_statistics(asked.client, task, other, describe(task, other)) == 0
    assert asked.stored == {FISHER: f"sha256:{sha256_file(first)}"}


def test_another_hospital_cannot_send_them(asked, connect):
    task, file = asked.task(), asked.file()
    with pytest.raises(NotFound):
        send_statistics(connect(asked.receiver.address, "south"), task, file, describe(task, file))
    assert not asked.files


def test_after_a_cut_it_goes_on_from_the_durable_offset(asked, connect, cut_link):
    link = cut_link(asked.receiver.address)
    link.cut_at(9 << 20, then="refuse")
    client = connect(link.address, patience_seconds=None, on_waiting=lambda _: link.set("open"))
    task, file = asked.task(), asked.file()
    sent = send_statistics(client, task, file, describe(task, file))
    assert asked.stored == {FISHER: f"sha256:{sha256_file(file)}"}
    assert asked.receiver.metric("resumed_bytes_total") > 1 << 20
    assert file.stat().st_size <= sent < file.stat().st_size + (9 << 20)


@pytest.mark.parametrize("value", [np.nan, -1e-3])
def test_values_that_are_no_fisher_information_are_refused_and_nothing_is_kept(asked, value):
    with pytest.raises(NotFinite, match="file of fisher statistics"):
        asked.send(asked.file(value=value))
    assert not asked.files


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"size": 10}, WrongLayout), ({"sha256": "../.."}, ProtocolError), ({"sha256": "0" * 64}, WrongDigest)],
)
def test_what_is_not_as_announced_is_refused_and_nothing_is_kept(asked, changes, error):
    with pytest.raises(error):
        asked.send(asked.file(), **changes)
    assert not asked.files


class OpenStream:
    """Statistics that are held before their final record, sent by a client of its own."""

    def __init__(self, client: Client, info: StatisticsInfo, data: bytes) -> None:
        self.ended_by: Exception | None = None
        self._arrived, self._goes_on = threading.Event(), threading.Event()
        self._info, self._data = info, data
        self._thread = threading.Thread(target=self._run, args=(client,), daemon=True)
        self._thread.start()
        self._arrived.wait()

    def _messages(self):
        yield UploadRequest(open=UploadOpen(statistics=self._info)).SerializeToString()
        for begin in range(0, len(self._data), CHUNK):
            yield frame_chunk(self._data[begin : begin + CHUNK])
        self._arrived.set()
        self._goes_on.wait()
        yield UploadRequest(final=UploadFinal(size=self._info.size, sha256=self._info.sha256)).SerializeToString()

    def _run(self, client: Client) -> None:
        try:
            client.send_statistics(self._messages())
        except Exception as error:
            self.ended_by = error

    def end(self) -> Exception | None:
        self._goes_on.set()
        self._thread.join()
        return self.ended_by


@pytest.fixture
def hold(asked, connect):
    """Opens a stream of a file, up to its final record: `hold(file)`."""

    def begin(file: Path) -> OpenStream:
        client = connect(asked.receiver.address, ledger=Ledger(asked.folder / "other.jsonl"))
        return OpenStream(client, describe(asked.task(), file), file.read_bytes())

    return begin


def test_a_withdrawal_while_they_come_leaves_nothing(asked, hold):
    stream = hold(asked.file())
    asked.client.withdraw()
    assert isinstance(stream.end(), AlreadyWithdrawn)
    assert not asked.files


def test_what_is_erased_while_it_comes_is_wanted_no_more(asked, hold):
    stream = hold(asked.file())
    asked.receiver.store.erase_blob("north", asked.vector_sha256)
    assert isinstance(stream.end(), NotFound)
    assert not asked.files


@pytest.mark.parametrize("seed", [0, 1])
def test_the_newer_of_two_streams_goes_on_also_where_it_was_measured_anew(asked, hold, seed):
    stream, newer = hold(asked.file()), asked.file(seed=seed)
    asked.send(newer)
    assert isinstance(stream.end(), TryAgain)
    assert asked.stored == {FISHER: f"sha256:{sha256_file(newer)}"}
    assert len(asked.files) == 1


def test_parts_that_were_left_do_not_add_up(asked):
    for seed in range(3):
        file = asked.file(seed=seed)
        info = describe(asked.task(), file)
        cut = [
            UploadRequest(open=UploadOpen(statistics=info)).SerializeToString(),
            frame_chunk(file.read_bytes()[:CHUNK]),
        ]
        with pytest.raises(TryAgain):
            asked.client.send_statistics(iter(cut))
    assert len(asked.files) == 1


def test_they_are_erased_with_the_vector(asked):
    asked.send(asked.file())
    asked.receiver.store.erase_blob("north", asked.vector_sha256)
    assert not asked.files
    assert not asked.receiver.store.blobs()


def test_statistics_without_a_vector_are_seen_by_the_collection_of_garbage(asked):
    asked.send(asked.file())
    asked.receiver.store.blob("north", asked.vector_sha256).unlink()
    assert asked.receiver.store.blobs() == {("north", asked.vector_sha256)}
