from __future__ import annotations

import csv
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from datavector.checks import check_records
from datavector.data.decode import decode
from datavector.data.lesions import LABELS
from datavector.data.records import read_records
from datavector.data.synthetic import hospital_look, hospital_name, synthesise
from datavector.errors import UsageError

SMALL = {"hospitals": 3, "images": 15, "validation_images": 6, "test_images": 30, "size": 48}


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesise(tmp_path_factory.mktemp("small"), **SMALL)


def test_the_manifest_assigns_training_images_to_hospitals_and_leaves_the_rest_common(small: Path) -> None:
    with small.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert Counter((row["split"], row["hospital"]) for row in rows) == {
        ("train", "north"): 15,
        ("train", "south"): 15,
        ("train", "east"): 15,
        ("val", ""): 6,
        ("test", ""): 30,
    }


def test_folder_and_manifest_are_data_that_an_agent_reads(small: Path) -> None:
    records = read_records(small)
    assert read_records(small.parent) == records
    counts = check_records(records, LABELS).counts
    assert set(counts["test"].values()) == {6}
    assert min(counts["train"].values()) >= 3
    assert all(decode(record.path).shape == (48, 48, 3) for record in records)


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_processes(small: Path, tmp_path: Path) -> None:
    synthesise(tmp_path / "again", **SMALL, processes=2)
    assert digests(tmp_path / "again") == digests(small.parent)


def test_another_seed_gives_other_images_and_other_hospitals(small: Path, tmp_path: Path) -> None:
    synthesise(tmp_path, **SMALL, seed=1)
    before, after = set(digests(small.parent).values()), set(digests(tmp_path).values())
    assert not before & after
    assert hospital_look(0, 0) != hospital_look(1, 0)


def test_more_images_and_hospitals_leave_the_first_ones_as_they_were(small: Path, tmp_path: Path) -> None:
    synthesise(tmp_path, **{**SMALL, "hospitals": 6, "test_images": 0, "validation_images": 0})
    after = digests(tmp_path)
    assert {name: digest for name, digest in digests(small.parent).items() if name.startswith("train/")}.items() <= (
        after.items()
    )
    assert any("hospital-6" in name for name in after)


def test_hospitals_differ_in_look() -> None:
    tones = [hospital_look(0, number).tone for number in range(4)]
    assert max(tones) - min(tones) > 0.1
    assert all(sum(hospital_look(0, number).weights) == pytest.approx(1) for number in range(4))
    assert [hospital_name(number) for number in (0, 3, 4)] == ["north", "west", "hospital-5"]


def test_a_lesion_is_darker_than_the_skin_around_it(small: Path) -> None:
    centres, corners = [], []
    for record in read_records(small):
        pixels = decode(record.path).astype(float)
        centres.append(pixels[18:30, 18:30].mean())
        corners.append(pixels[:5, 18:30].mean())
    assert np.mean(centres) < np.mean(corners) - 15


def test_progress_is_told_for_every_image(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    synthesise(tmp_path, hospitals=1, images=4, test_images=2, size=32, progress=lambda *step: steps.append(step))
    assert steps == [(number, 6) for number in range(1, 7)]


@pytest.mark.parametrize("wrong", [{"hospitals": 0}, {"images": 0}, {"size": 8}, {"test_images": -1}])
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="cannot be drawn"):
        synthesise(tmp_path, **wrong)
