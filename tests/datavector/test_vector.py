"""Vector files, and the scanner that takes nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datavector.errors import NotFinite, WrongDigest, WrongLayout
from datavector.layout import Layout, TensorSpec
from datavector.vector import VectorScanner, open_vector, write_vector

LAYOUT = Layout((TensorSpec("a", (3, 5)), TensorSpec("b", (7,)))).with_metadata(base="sha256:0", format="x")
HEADER = len(LAYOUT.header)
VALUES = np.random.default_rng(0).normal(size=LAYOUT.elements).astype("<f4")
WHOLE = LAYOUT.header + VALUES.tobytes()
CUTS = st.lists(st.integers(0, len(WHOLE)), max_size=12).map(sorted)
BAD = st.sampled_from((np.nan, np.inf, -np.inf))


def scan(content: bytes, cuts: list[int]) -> VectorScanner:
    scanner = VectorScanner(LAYOUT)
    for begin, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        scanner.feed(memoryview(content)[begin:end])
    return scanner


def finish(scanner: VectorScanner, content: bytes = WHOLE) -> None:
    scanner.finish(size=len(content), sha256=hashlib.sha256(content).hexdigest())


@given(CUTS)
def test_a_vector_passes_in_any_division_into_chunks(cuts):
    scanner = scan(WHOLE, cuts)
    assert scanner.offset == len(WHOLE)
    finish(scanner)


def test_a_vector_passes_byte_by_byte():
    finish(scan(WHOLE, list(range(len(WHOLE)))))


@given(st.integers(0, HEADER - 1), st.integers(1, 255), CUTS)
def test_every_altered_byte_of_the_header_is_refused(position, change, cuts):
    altered = bytearray(WHOLE)
    altered[position] ^= change
    with pytest.raises(WrongLayout):
        scan(bytes(altered), cuts)


@given(st.integers(0, LAYOUT.elements - 1), BAD, CUTS)
def test_a_value_that_is_not_finite_is_refused_wherever_it_is_and_however_it_is_cut(position, bad, cuts):
    values = VALUES.copy()
    values[position] = bad
    with pytest.raises(NotFinite, match="holds NaN, infinity or a value beyond"):
        scan(LAYOUT.header + values.tobytes(), cuts)


@given(st.integers(0, len(WHOLE) - 1), CUTS)
def test_a_vector_that_ends_early_is_refused_whatever_was_announced(length, cuts):
    cut_short = WHOLE[:length]
    for announced in (WHOLE, cut_short):
        with pytest.raises(WrongDigest):
            finish(scan(cut_short, [min(cut, length) for cut in cuts]), announced)


@given(st.binary(min_size=1, max_size=9), CUTS)
def test_a_vector_that_goes_on_too_long_is_refused(more, cuts):
    with pytest.raises(WrongLayout, match="longer than"):
        scan(WHOLE + more, cuts)


@given(st.integers(HEADER, len(WHOLE) - 1), st.integers(0, 6))
def test_an_altered_value_is_found_by_the_digest(position, bit):
    altered = bytearray(WHOLE)
    altered[position] ^= 1 << bit
    try:
        scanner = scan(bytes(altered), [])
    except NotFinite:
        return
    with pytest.raises(WrongDigest, match="announced were"):
        finish(scanner)


# --- Files


@pytest.fixture
def tuned(small_base):
    with small_base.open() as weights:
        return {spec.name: weights.read(spec.name) + np.float32(0.25) for spec in small_base.layout.tensors}


def test_a_vector_is_what_fine_tuning_changed(small_base, tuned, tmp_path):
    digest = write_vector(tmp_path / "tau", small_base, tuned)
    content = (tmp_path / "tau").read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()
    with open_vector(tmp_path / "tau", small_base) as tau, small_base.open() as weights:
        for name, value in tuned.items():
            assert np.array_equal(tau.read(name), value - weights.read(name))
    scanner = VectorScanner(small_base.vector_layout)
    scanner.feed(content)
    scanner.finish(size=len(content), sha256=digest)


def test_a_vector_is_its_owners_alone(small_base, tuned, tmp_path):
    write_vector(tmp_path / "tau", small_base, tuned)
    assert (tmp_path / "tau").stat().st_mode & 0o777 == 0o600


def test_a_vector_names_its_base_in_the_header(small_base, large_base, tuned, tmp_path):
    write_vector(tmp_path / "tau", small_base, tuned)
    assert small_base.digest.encode() in (tmp_path / "tau").read_bytes()[:2000]
    with pytest.raises(WrongLayout):
        open_vector(tmp_path / "tau", large_base)


def test_a_diverged_training_gives_no_vector(small_base, tuned, tmp_path):
    tuned["bn0.running_var"][1] = np.nan
    with pytest.raises(NotFinite, match=r"bn0.running_var became NaN"):
        write_vector(tmp_path / "tau", small_base, tuned)
    assert list(tmp_path.iterdir()) == []


def test_a_difference_that_overflows_gives_no_vector(small_base, tuned, tmp_path):
    tuned["head.weight"][0] = np.finfo(np.float32).max
    small = {**tuned, "head.weight": tuned["head.weight"].astype("f8") * 10}
    with pytest.raises(NotFinite), np.errstate(over="ignore"):
        write_vector(tmp_path / "tau", small_base, small)


def test_missing_and_misshapen_tensors_are_named(small_base, tuned, tmp_path):
    lacking = {name: value for name, value in tuned.items() if name != "head.weight"}
    with pytest.raises(WrongLayout, match=r"lack head.weight"):
        write_vector(tmp_path / "tau", small_base, lacking)
    for shape in ((1,), (2, 500), (999,)):
        with pytest.raises(WrongLayout, match=r"head.weight has shape"):
            write_vector(tmp_path / "tau", small_base, {**tuned, "head.weight": np.ones(shape, dtype=np.float32)})
    assert list(tmp_path.iterdir()) == []
