from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datavector.data.records import Record, assign_splits, demand_known, read_records
from datavector.errors import UnknownClass, UnreadableData, UsageError

LABELS = st.sampled_from("abc")


def hospital(labels: list[str], *, groups: list[str] | None = None, root: str = "/data") -> list[Record]:
    groups = groups or [""] * len(labels)
    return [
        Record(Path(root, label, f"{number}.png"), label, "", group)
        for number, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]


def share(records: list[Record], split: str) -> Counter[str]:
    return Counter(record.label for record in records if record.split == split)


def test_a_source_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableData, match="absent does not exist"):
        read_records(tmp_path / "absent")


def test_a_source_that_is_neither_folder_nor_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.zip").touch()
    with pytest.raises(UnreadableData, match=r"neither a folder nor a \.csv file"):
        read_records(tmp_path / "images.zip")


def test_each_class_gives_its_share_to_validation() -> None:
    split = assign_splits(hospital(["a"] * 40 + ["b"] * 10), validation=0.2, seed=0)
    assert share(split, "val") == {"a": 8, "b": 2}
    assert share(split, "train") == {"a": 32, "b": 8}


def test_a_validation_split_that_the_hospital_made_stands() -> None:
    records = [*hospital(["a", "b"] * 10), Record(Path("/data/v.png"), "a", "val"), Record(Path("/t.png"), "b", "test")]
    split = assign_splits(records, validation=0.5, seed=0)
    assert share(split, "val") == {"a": 1}
    assert share(split, "test") == {"b": 1}
    assert share(split, "train") == {"a": 10, "b": 10}


def test_images_for_testing_never_validate() -> None:
    records = [Record(Path(f"/data/{n}.png"), "ab"[n % 2], "test" if n < 20 else "train") for n in range(40)]
    split = assign_splits(records, validation=0.5, seed=0)
    assert [record for record in split if record.split == "test"] == sorted(records[:20])


def test_another_seed_chooses_other_images() -> None:
    records = hospital(["a"] * 50)
    assert assign_splits(records, validation=0.2, seed=0) != assign_splits(records, validation=0.2, seed=1)


def test_the_choice_depends_neither_on_where_the_images_lie_nor_on_their_order() -> None:
    def chosen(root: str, step: int) -> list[str]:
        records = hospital(["a", "b", "c"] * 20, root=root)[::step]
        split = assign_splits(records, validation=0.25, seed=3)
        return [record.path.relative_to(root).as_posix() for record in split if record.split == "val"]

    assert chosen("/data", 1) == chosen("/mnt/other/place", -1) != []


def test_the_choice_of_a_seed_is_the_same_in_every_release() -> None:
    records = hospital(["a", "b"] * 6)
    records += [Record(Path(f"/data/c/Größe {number}.png"), "c", "", f"patient {number % 3}") for number in range(9)]
    split = assign_splits(records, validation=0.25, seed=0)
    chosen = [record.path.relative_to("/data").as_posix() for record in split if record.split == "val"]
    assert chosen[:4] == ["a/10.png", "a/8.png", "b/5.png", "b/7.png"]
    assert chosen[4:] == ["c/Größe 2.png", "c/Größe 5.png", "c/Größe 8.png"]


def test_names_that_are_no_utf_8_are_split_like_others() -> None:
    records = [Record(Path(os.fsdecode(b"/data/M\xfcller-%d.png" % number)), "ab"[number % 2]) for number in range(20)]
    assert share(assign_splits(records, validation=0.2, seed=0), "val") == {"a": 2, "b": 2}


def test_relative_and_absolute_paths_can_be_mixed() -> None:
    records = [Record(Path("scan.png"), "a"), Record(Path("/data/scan.png"), "a")]
    assert len(assign_splits(records, validation=0.5, seed=0)) == 2


def test_where_every_share_rounds_to_nothing_one_image_still_validates() -> None:
    split = assign_splits(hospital(["a", "a", "b", "b"]), validation=0.1, seed=0)
    assert share(split, "val").total() == 1


@pytest.mark.parametrize("validation", [-0.1, 1.0])
def test_a_share_outside_its_range_is_refused(validation: float) -> None:
    with pytest.raises(UsageError, match="validation share"):
        assign_splits(hospital(["a"]), validation=validation, seed=0)


@given(
    st.lists(st.tuples(LABELS, st.sampled_from(["", "p1", "p2", "p3", "p4"])), max_size=40),
    st.floats(0, 0.99),
    st.integers(0, 9),
)
def test_any_hospital_keeps_its_images_its_groups_and_one_training_image_per_class(
    images: list[tuple[str, str]], validation: float, seed: int
) -> None:
    records = hospital([label for label, _ in images], groups=[group for _, group in images])
    split = assign_splits(records, validation=validation, seed=seed)
    assert sorted(record.path for record in split) == sorted(record.path for record in records)
    assert {record.split for record in split} <= {"train", "val"}
    assert set(share(split, "train")) == {record.label for record in records}
    for group in {record.group for record in split} - {""}:
        assert len({record.split for record in split if record.group == group}) == 1


def test_a_label_that_the_base_lacks_is_named_with_the_nearest_class() -> None:
    with pytest.raises(UnknownClass) as caught:
        demand_known(hospital(["nevus", "Melanom"]), ["nevus", "melanoma"])
    assert "no class 'Melanom'" in caught.value.message
    assert "/data/Melanom/1.png" in caught.value.message
    assert "nevus, melanoma" in caught.value.message
    assert "to 'melanoma'" in caught.value.remedy
