"""The steps of a hospital's main job that no other file of this folder tests."""

from __future__ import annotations

import pytest
from PIL import Image

from agent.main import POLICY, VECTOR, VECTOR_INFO, Ready, _last_policy, _load_images, train_vector
from agent.metrics import Metrics
from agent.preflight import IMAGES
from agent.site import Site
from datavector.data.records import Record
from datavector.errors import CorruptImages, Interrupted
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
    settings, metrics = settings_of(tmp_path / "state", tmp_path / "data", max_corrupt=0.5), Metrics()
    (training,) = _load_images(Site(settings, None, metrics), Ready(PolicyInfo(), base, records), ("train",))
    assert [record.path for record in training.records] == [record.path for record in records[1:4]]
    assert len(list((settings.state / IMAGES).glob("*.pixels"))) == 1
    assert metrics.registry.get_sample_value("datavector_agent_corrupt_images", {"split": "train"}) == 1


def test_decoded_images_of_earlier_data_are_removed(base, records, tmp_path):
    settings, sound = settings_of(tmp_path / "state", tmp_path / "data"), records[1:]
    site = Site(settings, None, Metrics())
    training, validation = _load_images(site, Ready(PolicyInfo(), base, sound), ("train", "val"))
    first = {path.name for path in (settings.state / IMAGES).iterdir()}
    assert (len(training), len(validation), len(first)) == (3, 2, 4)
    _load_images(site, Ready(PolicyInfo(), base, sound), ("train",))
    assert {path.name for path in (settings.state / IMAGES).iterdir()} == first
    _load_images(site, Ready(PolicyInfo(), base, sound[1:]), ("train", "val"))
    second = {path.name for path in (settings.state / IMAGES).iterdir()}
    assert len(second) == 4
    assert len(second & first) == 2  # those to validate with are still the same
    assert len(training.images) == 3  # what is in use stays in memory


def test_corrupt_images_are_judged_over_all_splits_together(base, records, tmp_path):
    records[5].path.write_bytes(b"no image")  # 1 of 2 to validate with, and 1 of 4 to train on: 2 of 6
    ready = Ready(PolicyInfo(), base, records)
    settings = settings_of(tmp_path / "state", tmp_path / "data", max_corrupt=0.34)
    training, validation = _load_images(Site(settings, None, Metrics()), ready, ("train", "val"))
    assert (len(training), len(validation)) == (3, 1)
    settings = settings_of(tmp_path / "state", tmp_path / "data", max_corrupt=0.33)
    with pytest.raises(CorruptImages, match="2 of 6 images"):
        _load_images(Site(settings, None, Metrics()), ready, ("train", "val"))


def test_a_stop_ends_the_decoding(base, records, tmp_path):
    site = Site(settings_of(tmp_path / "state", tmp_path / "data", max_corrupt=0.5), None, Metrics())
    site.stop.set()
    with pytest.raises(Interrupted, match="while decoding"):
        _load_images(site, Ready(PolicyInfo(), base, records), ("train",))
    assert list((site.settings.state / IMAGES).iterdir()) == []


def test_what_lies_beside_decoded_images_is_not_removed(base, records, tmp_path):
    site = Site(settings_of(tmp_path / "state", tmp_path / "data", max_corrupt=0.5), None, Metrics())
    own = site.settings.state / IMAGES / "holiday.jpg"
    own.parent.mkdir(parents=True)
    own.touch()
    _load_images(site, Ready(PolicyInfo(), base, records), ("train",))
    assert own.is_file()


DAMAGED = (b"", b'{"sha256": "ab', b"\xff\xfe", b"[]", b'{"ofANewerVersion": 1}', b'{"sequence": "x"}')


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_policy_is_as_good_as_none(tmp_path, content):
    (tmp_path / POLICY).write_bytes(content)
    assert _last_policy(settings_of(tmp_path)) is None


def test_a_damaged_announcement_of_the_vector_is_made_anew(base, records, tmp_path, capsys):
    settings = settings_of(tmp_path / "state", tmp_path / "data")
    training = settings.training.model_copy(update={"epochs": 1, "device": "cpu"})
    site = Site(settings.model_copy(update={"training": training}), None, Metrics())
    ready = Ready(PolicyInfo(last_sequence=4), base, records[1:])
    first = train_vector(site, ready)
    for content in DAMAGED:
        (settings.state / VECTOR_INFO).write_bytes(content)
        assert train_vector(site, ready) == first
    assert first.size == (settings.state / VECTOR).stat().st_size
    assert f"{settings.state / VECTOR_INFO} cannot be read and is made anew" in capsys.readouterr().out
