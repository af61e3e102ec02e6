"""Statistics that the aggregator asks for: measured, sent, and gone on with after a stop; against a real receiver."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from agent.client import Client
from agent.metrics import Metrics
from agent.site import VECTOR
from agent.statistics import write_statistics
from agent.tasks import FOLDER, TaskServer
from agent.upload import upload
from aggregator.resources import MergePolicy
from datavector.errors import Interrupted
from datavector.files import sha256_file
from datavector.merge.restored import write_tuned
from datavector.merge.statistics import FISHER, REGMEAN, layout_of
from datavector.networks import build, load_file
from datavector.vector import write_vector
from tests.agent.conftest import settings_of
from tests.serving import Serving, announce


@dataclass
class Trained:
    """A hospital whose vector the aggregator has, and the receiver, whose policy tries two methods with statistics."""

    server: TaskServer
    receiver: Serving
    client: Client
    said: list[str]

    @property
    def stored(self) -> dict[str, str]:
        return self.receiver.store.statistics("north", self.server.vector_sha256)

    @property
    def files(self) -> list[str]:
        return [path.name for path in (self.server.settings.state / FOLDER).glob("*")]


@pytest.fixture
def trained(start_receiver, connect, base, train_set, tmp_path) -> Trained:
    receiver = start_receiver()
    receiver.store.import_base(base.path)
    method = {"name": "auto", "candidates": [{"name": FISHER}, {"name": REGMEAN}]}
    policy = {"metadata": {"name": "trial"}, "spec": {"baseModelRef": base.digest, "method": method}}
    receiver.registry.set_policies([MergePolicy.parse(policy)])
    client, settings, said = connect(receiver.address), settings_of(tmp_path / "state"), list[str]()
    settings.state.mkdir()
    with base.open() as pretrained:
        tuned = {spec.name: pretrained.read(spec.name) * 1.01 for spec in base.layout.tensors}
    sha256 = write_vector(settings.state / VECTOR, base, tuned)
    upload(client, settings.state / VECTOR, announce(settings.state / VECTOR, base))
    server = TaskServer(
        settings=settings, client=client, base=base, load_images=lambda _: train_set, metrics=Metrics(),
        show=said.append, vector_sha256=sha256, stop=threading.Event(), meeting_wait_seconds=1,
    )  # fmt: skip
    return Trained(server, receiver, client, said)


def test_both_kinds_are_measured_with_the_hospitals_own_model_and_sent(trained, base, train_set, tmp_path):
    served = trained.server.serve_waiting()
    assert (served.waiting, served.failed) == (2, ())
    assert sorted(trained.stored) == [FISHER, REGMEAN]
    own, path = build(base), tmp_path / "own"
    write_tuned(path, base, trained.server.settings.state / VECTOR)
    load_file(own, path, base.layout)
    for kind, digest in trained.stored.items():
        write_statistics(kind, path, own, base, train_set.images, train_set.labels)
        assert digest == f"sha256:{sha256_file(path)}"
    assert not trained.files
    assert not trained.server.serve_waiting().waiting


def test_another_vector_in_the_state_folder_is_not_what_is_asked_for(trained):
    other = replace(trained.server, vector_sha256="0" * 64)
    assert other.serve_waiting().failed == ()
    assert all("skipped (the state folder has another vector)" in line for line in trained.said)
    assert not trained.stored


def test_measuring_ends_at_a_stop_and_leaves_no_model_behind(trained):
    trained.server.stop.set()
    with pytest.raises(Interrupted, match="measuring statistics"):
        trained.server.serve_waiting()
    assert not trained.files
    assert not trained.stored


def test_what_was_measured_before_a_stop_is_sent_after_it(trained, base, train_set):
    file = measured_before(trained)
    write_statistics(FISHER, file, build(base), base, train_set.images[:2], train_set.labels[:2])
    sha256 = sha256_file(file)
    trained.server.serve_waiting()
    assert trained.stored[FISHER] == f"sha256:{sha256}"


def measured_before(trained: Trained) -> Path:
    """Where Fisher information waits to be sent."""
    (task,) = (each for each in trained.client.list_tasks().tasks if each.statistics == FISHER)
    folder = trained.server.settings.state / FOLDER
    folder.mkdir(exist_ok=True)
    return folder / f"{task.id}.safetensors"


def test_statistics_that_are_refused_are_measured_anew_and_stop_nothing_else(trained, base):
    file = measured_before(trained)
    file.write_bytes(bytes(layout_of(FISHER, base).size))
    assert trained.server.serve_waiting().failed == (file.stem,)
    assert "header is not the one" in " ".join(trained.said)
    assert sorted(trained.stored) == [REGMEAN]
    assert trained.server.serve_waiting().failed == ()
    assert sorted(trained.stored) == [FISHER, REGMEAN]
