from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from datavector.data.records import read_records
from datavector.errors import NoImages, UnreadableData


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(root: Path) -> list[tuple[str, str, str]]:
    return [(record.path.relative_to(root).as_posix(), record.label, record.split) for record in read_records(root)]


def test_a_folder_per_class_is_read_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.JPG", "b/1.jpeg", "a/x/deep.tiff", "a/notes.txt", "a/._1.jpg", ".git/a.png", "readme.md")
    assert found(tmp_path) == [("a/x/deep.tiff", "a", ""), ("b/1.jpeg", "b", ""), ("b/2.JPG", "b", "")]


def test_folders_of_splits_are_recognised(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "valid/a/2.png", "test/b/3.webp")
    assert found(tmp_path) == [
        ("test/b/3.webp", "b", "test"),
        ("train/a/1.png", "a", "train"),
        ("valid/a/2.png", "a", "val"),
    ]


def test_splits_without_training_images_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "val/a/1.png")
    with pytest.raises(UnreadableData, match="no folder train"):
        read_records(tmp_path)


def test_splits_mixed_with_classes_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "nevus/1.png")
    with pytest.raises(UnreadableData, match=r"splits \(train\) with others \(nevus\)"):
        read_records(tmp_path)


@pytest.mark.parametrize("names", [[], ["1.png"], ["a/notes.txt"], ["train/a/notes.txt"]])
def test_a_folder_without_images_in_class_folders_is_refused(tmp_path: Path, names: list[str]) -> None:
    touch(tmp_path, *names)
    with pytest.raises(NoImages, match="holds no image"):
        read_records(tmp_path)


def test_a_link_that_leads_back_up_is_entered_once(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert [name for name, _, _ in found(tmp_path)] == ["a/1.png", "b/1.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    touch(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "b").chmod(0)
    request.addfinalizer(lambda: (tmp_path / "b").chmod(0o700))
    with pytest.raises(UnreadableData, match=r"b cannot be listed \(Permission denied\)"):
        read_records(tmp_path)


def test_the_shared_data_set_is_read_alike_as_folder_and_as_manifest(shared: Callable[[str], Path]) -> None:
    root = shared("brain-mri")
    assert read_records(root) == read_records(root / "manifest.csv")


@pytest.fixture
def shared() -> Callable[[str], Path]:
    def find(name: str) -> Path:
        path = Path(__file__).parents[4] / "shared" / "data" / name
        if not path.is_dir():
            pytest.skip(f"../shared/data/{name} is not here")
        return path

    return find
