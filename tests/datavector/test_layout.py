"""Layouts against the safetensors library: its files are ours and ours are its."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from datavector.errors import WrongLayout
from datavector.layout import Layout, TensorFile, TensorSpec, write_tensors

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)
LAYOUTS = st.dictionaries(st.text(st.characters(codec="ascii", exclude_categories=("Cc",)), min_size=1), SHAPES).map(
    lambda shapes: Layout(tuple(TensorSpec(name, shapes[name]) for name in sorted(shapes)))
)
SMALL = Layout((TensorSpec("a", (2, 3)), TensorSpec("b", ()), TensorSpec("c.weight", (4,))))


def values_of(layout: Layout) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {spec.name: np.asarray(random.normal(size=spec.shape), dtype=np.float32) for spec in layout.tensors}


def write(path: Path, layout: Layout) -> dict[str, np.ndarray]:
    values = values_of(layout)
    write_tensors(path, layout, values.values())
    return values


@given(LAYOUTS.filter(lambda layout: "__metadata__" not in layout.by_name))
@settings(max_examples=50)
def test_our_bytes_are_those_of_the_library(tmp_path_factory, layout):
    folder = tmp_path_factory.mktemp("layout", numbered=True)
    values = write(folder / "ours", layout)
    save_file(values, folder / "theirs")
    ours = (folder / "ours").read_bytes()
    assert ours == (folder / "theirs").read_bytes()
    assert len(ours) == layout.size


def test_the_library_reads_our_file_and_its_metadata(tmp_path):
    layout = SMALL.with_metadata(format="datavector/1", base="sha256:0")
    values = write(tmp_path / "file", layout)
    loaded = load_file(tmp_path / "file")
    assert all(np.array_equal(loaded[name], values[name]) for name in values)
    assert loaded.keys() == values.keys()
    with safe_open(tmp_path / "file", "np") as file:
        assert file.metadata() == {"format": "datavector/1", "base": "sha256:0"}


def test_the_header_with_one_entry_of_metadata_is_the_librarys(tmp_path):
    layout = SMALL.with_metadata(format="x")
    values = values_of(layout)
    save_file(values, tmp_path / "theirs", {"format": "x"})
    write(tmp_path / "ours", layout)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_metadata_is_part_of_the_header_in_one_order():
    assert SMALL.with_metadata(a="1", b="2").header == SMALL.with_metadata(b="2", a="1").header
    assert SMALL.with_metadata(a="1").header != SMALL.with_metadata(a="2").header


def test_a_tensor_is_read_whole_or_in_part(tmp_path):
    values = write(tmp_path / "file", SMALL)
    with TensorFile(tmp_path / "file", SMALL) as file:
        for name, value in values.items():
            read = file.read(name)
            assert read.shape == value.shape
            assert np.array_equal(read, value)
        assert np.array_equal(file.read("a", start=2, count=3), values["a"].reshape(-1)[2:5])
        assert np.array_equal(file.read("a", start=4), values["a"].reshape(-1)[4:])
        assert file.read("a", count=0).size == 0
        file.read("a")[:] = 0
        assert np.array_equal(file.read("a"), values["a"]), "what was read is a copy"


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b"", lambda b: bytes([b[0] ^ 1]) + b[1:]]
)
def test_a_file_of_another_length_or_header_is_refused_and_closed(tmp_path, damage):
    path = tmp_path / "file"
    write(path, SMALL)
    path.write_bytes(damage(path.read_bytes()))
    next_free = os.dup(0)
    os.close(next_free)
    with pytest.raises(WrongLayout, match="make it again"):
        TensorFile(path, SMALL)
    still_free = os.dup(0)
    os.close(still_free)
    assert still_free == next_free


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "file"
    write(path, SMALL)
    with TensorFile(path, SMALL) as file:
        os.truncate(path, SMALL.size - 4)
        with pytest.raises(WrongLayout, match="ends too early"):
            file.read("c.weight")


def test_names_are_sorted_and_unique():
    for names in (("b", "a"), ("a", "a")):
        with pytest.raises(WrongLayout):
            Layout(tuple(TensorSpec(name, (1,)) for name in names))


def test_a_tensor_of_another_shape_is_not_written(tmp_path):
    values = values_of(SMALL)
    values["a"] = values["a"].T
    with pytest.raises(WrongLayout, match=r"a has shape \(3, 2\)"):
        write_tensors(tmp_path / "file", SMALL, values.values())
    with pytest.raises(ValueError, match="zip"):
        write_tensors(tmp_path / "file", SMALL, list(values_of(SMALL).values())[:2])
    assert list(tmp_path.iterdir()) == []


def test_other_number_types_and_orders_are_written_as_float32(tmp_path):
    values = values_of(SMALL)
    write_tensors(tmp_path / "file", SMALL, [value.astype("f8", order="F") for value in values.values()])
    assert np.array_equal(load_file(tmp_path / "file")["a"], values["a"])
