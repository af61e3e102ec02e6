"""The steps of a hospital's main job that no other file of this folder tests."""

from __future__ import annotations

import pytest
from PIL import Image

from agent.main import Ready, _load_images
from agent.metrics import Metrics
from agent.preflight import IMAGES
from datavector.data.records import Record
from datavector.wire.v1.exchange_pb2 import PolicyInfo
from tests.agent.conftest import CLASSES, settings_of


@pytest.fixture
def records(tmp_path):
    """Four images to train on, one of them corrupt, and two to validate with."""
    records = []
    for number in range(6):
        path = tmp_path / "data" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(path)
        records.append(Record(path, CLASSES[number % 2], "train" if number < 4 else "val"))
    records[0].path.write_bytes(b"no image")
    return records


def test_tasks_need_the_training_images_only(base, records, tmp_path):
    settings, metrics = settings_of(tmp_path / "state", tmp_path / "data"), Metrics()
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"max_corrupt": 0.5})})
    (training,) = _load_images(settings, Ready(PolicyInfo(), base, records), metrics)
    assert [record.path for record in training.records] == [record.path for record in records[1:4]]
    assert len(list((settings.state / IMAGES).glob("*.pixels"))) == 1
    assert metrics.registry.get_sample_value("datavector_agent_corrupt_images", {"split": "train"}) == 1


def test_decoded_images_of_earlier_data_are_removed(base, records, tmp_path):
    settings, sound = settings_of(tmp_path / "state", tmp_path / "data"), records[1:]
    training, validation = _load_images(settings, Ready(PolicyInfo(), base, sound), Metrics(), ("train", "val"))
    first = {path.name for path in (settings.state / IMAGES).iterdir()}
    assert (len(training), len(validation), len(first)) == (3, 2, 4)
    _load_images(settings, Ready(PolicyInfo(), base, sound), Metrics())
    assert {path.name for path in (settings.state / IMAGES).iterdir()} == first
    _load_images(settings, Ready(PolicyInfo(), base, sound[1:]), Metrics(), ("train", "val"))
    second = {path.name for path in (settings.state / IMAGES).iterdir()}
    assert len(second) == 4
    assert len(second & first) == 2  # those to validate with are still the same
    assert len(training.images) == 3  # what is in use stays in memory
