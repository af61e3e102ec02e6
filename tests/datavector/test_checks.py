from __future__ import annotations

from pathlib import Path

import pytest

from datavector.checks import check_records
from datavector.data.records import Record
from datavector.errors import NoImages, OneClassOnly, UnknownClass


def images(split: str = "", **counts: int) -> list[Record]:
    return [
        Record(Path(f"/data/{split}/{label}/{number}.png"), label, split)
        for label, count in counts.items()
        for number in range(count)
    ]


def test_images_are_counted_per_class_and_split() -> None:
    summary = check_records(images(nevus=8, melanoma=6) + images("val", nevus=2), ["melanoma", "nevus"])
    assert summary.counts == {"train": {"melanoma": 6, "nevus": 8}, "val": {"melanoma": 0, "nevus": 2}}
    assert summary.images == 16
    assert summary.warnings == ()
    assert str(summary) == "16 images (14 train, 2 val) of 2 classes"


def test_without_a_base_the_classes_are_those_of_the_images() -> None:
    assert check_records(images(b=5, a=5)).classes == ("a", "b")


@pytest.mark.parametrize("records", [[], images("test", a=3, b=3)])
def test_no_image_to_train_on_is_an_error(records: list[Record]) -> None:
    with pytest.raises(NoImages, match="no image to train on"):
        check_records(records, ["a", "b"])


def test_one_class_only_is_an_error() -> None:
    with pytest.raises(OneClassOnly, match="all 9 training images have the label 'a'"):
        check_records(images(a=9) + images("test", b=3), ["a", "b"])


def test_a_class_that_the_base_lacks_is_an_error_even_where_it_is_the_only_one() -> None:
    with pytest.raises(UnknownClass, match="no class 'nevi'"):
        check_records(images(nevi=4), ["melanoma", "nevus"])


def test_what_is_unusual_is_said_in_sentences() -> None:
    summary = check_records(images(a=40, b=4), ["a", "b", "c"])
    assert summary.warnings == (
        "No training image of c: this hospital cannot contribute to them.",
        "Fewer than 5 training images of b (4).",
        "Strong imbalance: a has 10 times as many training images as b.",
    )


def test_a_patient_in_two_splits_is_pointed_out() -> None:
    records = images(a=6, b=6)
    records += [Record(Path(f"/p/{split}.png"), "a", split, "patient-7") for split in ("train", "test")]
    [warning] = check_records(records, ["a", "b"]).warnings
    assert "more than one split" in warning
    assert "patient-7" in warning
