from __future__ import annotations

from pathlib import Path

import pytest

from datavector.data.manifest import read_by_column, write_manifest
from datavector.data.records import Record, read_records
from datavector.errors import NoImages, UnreadableData


def manifest(folder: Path, text: str, *images: str, encoding: str = "utf-8") -> Path:
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    path = folder / "manifest.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_paths_are_relative_to_the_manifest_and_further_columns_are_allowed(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        'age,file,label,split,group\n61,"b, left.png",nevus,validation,p7\n,a.png,melanoma,,\n',
        "a.png",
        "b, left.png",
    )
    assert read_records(path) == [
        Record(tmp_path / "a.png", "melanoma"),
        Record(tmp_path / "b, left.png", "nevus", "val", "p7"),
    ]


def test_absolute_paths_and_parents_are_followed(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "a.png").touch()
    path = manifest(tmp_path / "lists", f"file,label\n{tmp_path / 'a.png'},x\n../a.png,x\n")
    assert [record.path for record in read_records(path)] == sorted([tmp_path / "a.png", tmp_path / "lists/../a.png"])


def test_the_mark_that_spreadsheets_put_first_is_no_part_of_a_column(tmp_path: Path) -> None:
    path = manifest(tmp_path, "file,label\r\na.png,x\r\n", "a.png", encoding="utf-8-sig")
    assert len(read_records(path)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,x\n", "line 1: column 'file' is missing, found are path, label"),
        ("", "found are none"),
        ("file;label\na.png;x\n", "separated by commas"),
        ("file,label,split\na.png,x,train\nb.png,x,evaluation\n", "line 3, has the unknown split 'evaluation'"),
        ("file,label\na.png,x\n\nlost.png,x\n", r"line 4, names .*lost.png, which is no readable file;"),
        ("file,label\nlost.png,x\ngone.png,x\n", "1 more of 2 are absent too"),
        ("file,label\na.png\n", "line 2, has no label"),
        ("file,label\n,x\n", "line 2, has no file"),
        ("file,label\na.png,x\na.png,y\n", r"line 3, names 'a.png' again \(first in line 2\)"),
        ("file,label\na.dcm,x\n", "'a.dcm', which is no image by its extension"),
        ('file,label\n"a.png,x\n', "cannot be read"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = manifest(tmp_path, text, "a.png", "b.png")
    with pytest.raises(UnreadableData, match=message):
        read_records(path)


def test_a_manifest_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = manifest(tmp_path, "file,label\na.png,nävus\n", "a.png", encoding="latin-1")
    with pytest.raises(UnreadableData, match="UTF-8"):
        read_records(path)


def test_a_manifest_with_a_header_only_holds_no_images(tmp_path: Path) -> None:
    with pytest.raises(NoImages, match="lists no image"):
        read_records(manifest(tmp_path, "file,label\n"))


def test_records_are_found_by_the_value_of_a_further_column(tmp_path: Path) -> None:
    text = "file,label,hospital\na.png,x,north\nb.png,y,south\nc.png,x,north\nd.png,y,\n"
    found = read_by_column(manifest(tmp_path, text, "a.png", "b.png", "c.png", "d.png"), "hospital")
    names = {value: [record.path.name for record in records] for value, records in found.items()}
    assert names == {"": ["d.png"], "north": ["a.png", "c.png"], "south": ["b.png"]}


def test_a_missing_further_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableData, match="'hospital' is missing"):
        read_by_column(manifest(tmp_path, "file,label\na.png,x\n", "a.png"), "hospital")


def test_a_written_manifest_reads_back_whatever_is_in_its_names(tmp_path: Path) -> None:
    records = [Record(tmp_path / name, 'a "b", c', group="p,1") for name in ('one "x".png', "two, y.png")]
    for record in records:
        record.path.touch()
    write_manifest(tmp_path / "other" / "manifest.csv", records)
    assert read_records(tmp_path / "other" / "manifest.csv") == records
