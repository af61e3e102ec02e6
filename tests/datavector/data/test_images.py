from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from datavector.data.images import BATCH, cache_size, load_images, resize, unused_caches
from datavector.data.records import Record
from datavector.errors import CorruptImages, UnknownClass

CLASSES = ("a", "b")
Paint = Callable[..., Path]


@pytest.fixture
def records(paint: Paint) -> list[Record]:
    rng = np.random.default_rng(0)
    return [
        Record(paint(f"{label}/{number}.png", rng.integers(0, 256, (20 + number, 31, 3), dtype=np.uint8)), label)
        for label in CLASSES
        for number in range(10)
    ]


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def test_images_come_in_the_records_order_with_their_labels(records: list[Record]) -> None:
    loaded = load_images(records[::-1], CLASSES, 16)
    assert loaded.images.shape == (20, 3, 16, 16)
    assert loaded.images.dtype == torch.uint8
    assert loaded.labels.tolist() == [1] * 10 + [0] * 10
    assert loaded.records == tuple(records[::-1])
    assert loaded.corrupt == ()
    assert len(loaded) == 20
    assert torch.equal(loaded.images, load_images(records, CLASSES, 16).images.flip(0))


@pytest.mark.parametrize(("height", "width"), [(7, 90), (64, 64), (16, 16), (201, 33)])
def test_resizing_is_the_antialiased_bilinear_of_the_release_graph(height: int, width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exact = functional.interpolate(
        torch.tensor(pixels).permute(2, 0, 1)[None].double(), (16, 16), mode="bilinear", antialias=True
    )[0]
    assert (resize(pixels, 16).double() - exact).abs().max() <= 0.5 + 1e-3


def test_a_corrupt_image_is_named_and_left_out(records: list[Record]) -> None:
    whole = load_images(records, CLASSES, 16)
    spoil(records[3].path)
    loaded = load_images(records, CLASSES, 16)
    assert [path for path, _ in loaded.corrupt] == [records[3].path]
    assert "cannot be decoded" in loaded.corrupt[0][1]
    assert loaded.records == tuple(records[:3] + records[4:])
    assert torch.equal(loaded.images, torch.cat([whole.images[:3], whole.images[4:]]))


@pytest.mark.parametrize("cached", [False, True])
def test_too_many_corrupt_images_are_an_error(records: list[Record], tmp_path: Path, cached: bool) -> None:
    for record in records[:5]:
        spoil(record.path)
    cache = tmp_path / "cache" if cached else None
    for _ in range(2):
        with pytest.raises(
            CorruptImages, match=r"5 of 20 images cannot be decoded, more than 20%: .*a/0\.png.*; \.\.\."
        ):
            load_images(records, CLASSES, 16, cache=cache, max_corrupt=0.2)
    assert len(load_images(records, CLASSES, 16, cache=cache, max_corrupt=0.25)) == 15


def test_images_of_which_none_can_be_decoded_may_be_tolerated(records: list[Record], tmp_path: Path) -> None:
    for record in records:
        spoil(record.path)
    assert len(load_images(records, CLASSES, 16, cache=tmp_path / "cache", max_corrupt=1.0)) == 0


def test_no_records_give_no_images(tmp_path: Path) -> None:
    for cache in (None, tmp_path):
        assert load_images([], CLASSES, 16, cache=cache).images.shape == (0, 3, 16, 16)


def test_a_cache_gives_the_same_images_and_is_used_again(records: list[Record], tmp_path: Path) -> None:
    spoil(records[7].path)
    plain = load_images(records, CLASSES, 16, max_corrupt=0.1)
    first = load_images(records, CLASSES, 16, cache=tmp_path / "cache", max_corrupt=0.1)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    steps: list[tuple[int, int]] = []
    again = load_images(
        records, CLASSES, 16, cache=tmp_path / "cache", max_corrupt=0.1, progress=lambda *step: steps.append(step)
    )
    assert steps == [(20, 20)]
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    for loaded in (first, again):
        assert torch.equal(loaded.images, plain.images)
        assert (loaded.records, loaded.corrupt) == (plain.records, plain.corrupt)


def test_a_cache_is_its_owners_alone(records: list[Record], tmp_path: Path) -> None:
    load_images(records, CLASSES, 16, cache=tmp_path / "cache")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir()} == {0o600}


def test_a_cache_says_what_it_will_take_and_what_is_no_longer_used(records: list[Record], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert cache_size(records, 16, cache) == 20 * 3 * 16 * 16
    for some in (records[:10], records[10:]):
        load_images(some, CLASSES, 16, cache=cache)
        assert cache_size(some, 16, cache) == 0
    assert unused_caches([records[:10], records[10:]], 16, cache) == []
    unused = unused_caches([records[:10]], 16, cache)
    assert sorted(path.suffix for path in unused) == [".json", ".pixels"]
    for path in unused:
        path.unlink()
    assert cache_size(records[:10], 16, cache) == 0
    assert unused_caches([records], 16, tmp_path / "absent") == []


def test_a_changed_file_or_size_is_decoded_anew(records: list[Record], tmp_path: Path, paint: Paint) -> None:
    first = load_images(records, CLASSES, 16, cache=tmp_path / "cache")
    assert load_images(records, CLASSES, 8, cache=tmp_path / "cache").images.shape[-1] == 8
    paint("a/0.png", (0, 0, 0))
    os.utime(records[0].path, ns=(1, 1))
    second = load_images(records, CLASSES, 16, cache=tmp_path / "cache")
    assert not second.images[0].any()
    assert torch.equal(second.images[1:], first.images[1:])


@pytest.mark.parametrize("damage", ["pixels", "json"])
def test_a_damaged_cache_is_written_again(records: list[Record], tmp_path: Path, damage: str) -> None:
    first = load_images(records, CLASSES, 16, cache=tmp_path / "cache").images.clone()
    [file] = (tmp_path / "cache").glob(f"*.{damage}")
    file.write_bytes(file.read_bytes()[:-7])
    assert torch.equal(load_images(records, CLASSES, 16, cache=tmp_path / "cache").images, first)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="this system has no file that cannot be read")
def test_an_image_that_the_system_cannot_read_now_is_tried_again(records: list[Record], tmp_path: Path) -> None:
    records[3].path.unlink()
    records[3].path.symlink_to("/proc/self/mem")  # reading its begin is an I/O error, for root too
    steps: list[tuple[int, int]] = []
    for call in (1, 2):
        loaded = load_images(records, CLASSES, 16, cache=tmp_path / "cache", progress=lambda *step: steps.append(step))
        assert len(steps) == call * len(records)
        assert "Input/output error" in loaded.corrupt[0][1]
        assert len(loaded) == len(records) - 1
        assert not list((tmp_path / "cache").glob("*.json"))


def test_names_that_are_no_utf_8_are_cached_and_remembered(records: list[Record], tmp_path: Path) -> None:
    odd = [rename_to_latin_1(record) for record in records]
    spoil(odd[7].path)
    first = load_images(odd, CLASSES, 16, cache=tmp_path / "cache", max_corrupt=0.1)
    steps: list[tuple[int, int]] = []
    again = load_images(
        odd, CLASSES, 16, cache=tmp_path / "cache", max_corrupt=0.1, progress=lambda *step: steps.append(step)
    )
    assert steps == [(20, 20)]
    assert [path for path, _ in again.corrupt] == [odd[7].path]
    assert (again.records, again.corrupt) == (first.records, first.corrupt)


def rename_to_latin_1(record: Record) -> Record:
    name = os.fsdecode(b"M\xfcller-" + record.path.name.encode())
    try:
        return Record(record.path.rename(record.path.with_name(name)), record.label)
    except OSError as error:
        pytest.skip(f"this file system takes names in UTF-8 only ({error.strerror})")


def test_changing_the_images_never_changes_the_cache(records: list[Record], tmp_path: Path) -> None:
    first = load_images(records, CLASSES, 16, cache=tmp_path / "cache")
    before = first.images.clone()
    first.images.zero_()
    assert torch.equal(load_images(records, CLASSES, 16, cache=tmp_path / "cache").images, before)


def test_progress_counts_every_image_and_torch_keeps_its_threads(paint: Paint) -> None:
    path = paint("a/1.png")
    steps: list[int] = []
    threads = torch.get_num_threads()
    loaded = load_images([Record(path, "a")] * (BATCH + 3), CLASSES, 8, progress=lambda done, _: steps.append(done))
    assert steps == list(range(1, BATCH + 4))
    assert len(loaded) == BATCH + 3
    assert torch.get_num_threads() == threads


def test_a_label_that_the_base_lacks_is_refused(records: list[Record]) -> None:
    with pytest.raises(UnknownClass):
        load_images(records, ("a", "c"), 16)
