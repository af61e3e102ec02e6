"""kill -9 at any moment: whoever starts again ends where an undisturbed run would have ended."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.client import Client, Credentials
from agent.ledger import Ledger
from agent.upload import upload
from datavector.files import claim_folder, sha256_file
from datavector.layout import write_tensors
from datavector.merge import merge_vectors
from datavector.model import BaseModel
from datavector.networks import create_base
from tests.integration.conftest import CLASSES, HOSPITALS, VISIT
from tests.integration.processes import Aggregator, Process, Site, command_line, free_port, running, until
from tests.serving import announce

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="jobs are found in /proc")

UNCALIBRATED = VISIT | {
    "trigger": {"minHospitals": 3, "quietPeriodSeconds": 0},
    "calibration": {"mode": "none"},
}


@pytest.fixture(scope="module")
def large_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A base model of 43 MB, so that there is a middle in which to kill."""
    folder = tmp_path_factory.mktemp("large") / "base"
    return create_base(folder, architecture="resnet18", classes=CLASSES, size=32, name="tiny")


@pytest.fixture(scope="module")
def vectors(large_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random vector of each hospital."""
    folder = tmp_path_factory.mktemp("vectors")
    for number, hospital in enumerate(HOSPITALS):
        random = np.random.default_rng(number)
        small = (random.normal(0, 1e-3, spec.shape).astype(np.float32) for spec in large_base.layout.tensors)
        write_tensors(folder / hospital, large_base.vector_layout, small)
    return {hospital: folder / hospital for hospital in HOSPITALS}


@pytest.fixture
def large_site(new_site: Site, large_base: BaseModel) -> Site:
    return replace(new_site, base=large_base.path)


def test_an_aggregator_and_its_jobs_are_killed_again_and_again_and_the_version_is_the_same(
    large_site: Site, large_base: BaseModel, vectors: dict[str, Path]
):
    aggregator = large_site.aggregator(UNCALIBRATED)
    port = int(aggregator.address.rpartition(":")[2])

    def start_again() -> Aggregator:
        return large_site.aggregator(UNCALIBRATED, port=port)

    # in the middle of an upload: it goes on from what is on the receiver's disk
    kill = aggregator.process.kill
    north = Sender(large_site, "north", aggregator.address, vectors["north"], large_base, at_half_way=kill)
    until(lambda: aggregator.process.ended, "half an upload")
    assert [path.stat().st_size for path in aggregator.store.root.glob("uploads/north/*/part")] > [1 << 20]
    aggregator = start_again()
    assert "north-" in north.delivered()
    assert sha256_file(aggregator.store.blob("north", sha256_file(vectors["north"]))) == sha256_file(vectors["north"])
    for hospital in ("south", "west"):
        Sender(large_site, hospital, aggregator.address, vectors[hospital], large_base).delivered()

    # in the middle of a merge: first the job alone, then the aggregator, and its job goes with it
    kill_while_writing(aggregator, aggregator.job("merge"))
    job = aggregator.job("merge")
    aggregator.process.kill()
    until(lambda: not any(command_line(job)), "the end of the job")
    assert not list(aggregator.store.root.glob("versions/*/report-merge.json"))

    # in the middle of a release
    aggregator = start_again()
    os.kill(aggregator.job("release"), signal.SIGKILL)
    aggregator.process.wait_for("the release process was killed by signal 9")
    aggregator.job("release")
    aggregator.process.kill()

    aggregator = start_again()
    version = aggregator.wait_for("Ready", *HOSPITALS)
    reference = large_site.folder / "reference.safetensors"
    merge_vectors(large_base, list(vectors.values()), "sum", {}, reference)
    assert version.status.weights_sha256 == sha256_file(reference)
    assert list(aggregator.versions()) == [version.name]
    assert not [path for path in aggregator.store.root.rglob(".*") if "safetensors" in path.name]
    release = aggregator.store.release(version.name)
    assert "FAIL" not in large_site.start("verify", release, log="verify").succeed()
    assert aggregator.process.terminate() == 0


def test_an_agent_killed_in_training_stopped_and_alone_delivers_the_vector_of_an_undisturbed_one(site: Site):
    address = f"127.0.0.1:{free_port()}"  # nobody is there yet

    def start(name: str) -> Process:
        # Ten epochs: whatever the speed, some are left wherever the agent is killed below.
        training = {"epochs": 10, "batch_size": 2}
        return site.agent("north", address, "--once", state=site.folder / name, training=training)

    for name in ("undisturbed", "again"):
        make_state(site, name)
    agent = start("undisturbed")
    agent.wait_for(f"{address}: not reachable since ")
    assert agent.terminate() == 1
    expected = sha256_file(site.folder / "undisturbed" / "vector.safetensors")

    vector = site.folder / "again" / "vector.safetensors"
    agent = start("again")
    agent.wait_for("is not reachable (Connection refused); going on with the policy that it had last")
    agent.wait_for("epoch 1 of 10")
    agent.kill()  # as soon as an epoch has ended
    agent = start("again")
    agent.wait_for("epoch 2 of 10")
    agent.work_on(0.2)  # within an epoch
    agent.kill()
    assert "epoch 1 of 10" not in agent.output
    assert not vector.exists()
    agent = start("again")
    agent.wait_for("ok    data")
    assert agent.terminate() == 1
    assert "start it again to go on" in agent.output
    assert not vector.exists()

    agent = start("again")
    agent.wait_for(f"{address}: not reachable since ")
    assert "epoch 2 of 10" not in agent.output
    assert sha256_file(vector) == expected
    aggregator = site.aggregator(VISIT, name="fresh", port=int(address.rpartition(":")[2]))
    assert "delivered: north-" in agent.succeed()
    assert [vector.spec.artifact.digest for vector in aggregator.vectors()] == [f"sha256:{expected}"]


def test_several_training_processes_leave_with_their_agent_and_no_image_stays_behind(site: Site):
    state = make_state(site, "several")

    def start() -> Process:
        training = {"epochs": 50, "batch_size": 4, "processes": 2, "device": "cpu"}
        return site.agent("north", f"127.0.0.1:{free_port()}", "--once", state=state, training=training)

    agent = start()
    agent.wait_for("epoch 1 of 50")
    agent.kill()
    until(lambda: not any(str(state) in " ".join(command_line(pid)) for pid in running()), "the end of its processes")
    (left,) = (state / "training").glob(".images.*")
    agent = start()
    agent.wait_for("epoch ")
    assert not left.exists()
    os.killpg(agent.pid, signal.SIGINT)  # what Ctrl-C does
    assert agent.wait() == 1
    assert "training stopped in epoch" in agent.output
    assert "Traceback" not in agent.output
    assert sorted(path.name for path in (state / "training").iterdir()) == ["best.safetensors", "checkpoint.pt"]


def make_state(site: Site, name: str) -> Path:
    """A state folder with the base model and the policy of north's, so that training needs no aggregator."""
    known, state = site.folder / "north" / "state", site.folder / name
    state.mkdir()
    claim_folder(state, "agent")
    shutil.copytree(known / "bases", state / "bases")
    shutil.copy(known / "policy.json", state)
    return state


def kill_while_writing(aggregator: Aggregator, job: int) -> None:
    """kill -9 of a merge as soon as it has begun to write its result, and not a moment after it has ended."""
    versions = aggregator.store.root / "versions"
    until(lambda: list(versions.glob("*/merged/.*.safetensors.*")), "a merge that writes", process=aggregator.process)
    os.kill(job, signal.SIGKILL)
    aggregator.process.wait_for("the merge process was killed by signal 9")


class Sender:
    """Sends a vector in a thread, with patience.

    Args:
        at_half_way: called once, when half of the bytes have been handed to the network.
    """

    def __init__(
        self, site: Site, hospital: str, address: str, path: Path, base: BaseModel,
        at_half_way: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        certificates = site.certificates
        self._credentials = Credentials(
            certificates / f"{hospital}.crt", certificates / f"{hospital}.key", certificates / "ca.crt"
        )
        self._ledger = Ledger(site.folder / f"{hospital}.jsonl")
        self._address, self._path, self._info = address, path, announce(path, base)
        self._at_half_way = at_half_way
        self._called = False
        self._name = ""
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def delivered(self) -> str:
        """The vector's name, once it is committed."""
        self._thread.join()
        return self._name

    def _send(self) -> None:
        with Client(self._address, self._credentials, ledger=self._ledger, patience_seconds=120) as client:
            self._name = upload(client, self._path, self._info, on_progress=self._note).vector

    def _note(self, done: int, size: int) -> None:
        if not self._called and 2 * done > size:
            self._called = True
            self._at_half_way()
