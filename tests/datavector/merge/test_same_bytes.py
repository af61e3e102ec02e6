"""The same vectors give the same bytes: in any order, in any blocks, by any number of workers, at any magnitude."""

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from datavector.errors import ConfigError, Interrupted, MergeError
from datavector.layout import write_tensors
from datavector.merge import (
    MergeInput,
    Share,
    choose,
    cohort,
    engine,
    find,
    merge_digest,
    merge_vectors,
    methods,
    parallel,
)
from datavector.merge.cohort import Block, Cohort
from datavector.merge.shares import SharedFile
from tests.datavector.merge.small import merged_bytes, small_base, small_input

EXACT_SPLIT = [name for name in methods() if not engine.choose(name, {}).method.whole]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def inputs(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    return [small_input(folder, base, seed) for seed in range(5)]


@pytest.fixture(scope="module")
def expected(base, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    return {method: merged_bytes(base, inputs, folder / method, method) for method in methods()}


@pytest.mark.parametrize("method", methods())
def test_in_any_order(base, inputs, expected, tmp_path, method):
    for number, order in enumerate([inputs[::-1], inputs[2:] + inputs[:2]]):
        assert merged_bytes(base, order, tmp_path / str(number), method) == expected[method]


@pytest.mark.parametrize("method", methods())
def test_whether_or_not_somebody_has_computed_the_digests(base, inputs, expected, tmp_path, method):
    bare = [MergeInput(each.path, "", each.samples, each.statistics) for each in inputs]
    assert merged_bytes(base, bare[::-1], tmp_path / "out", method) == expected[method]


@pytest.mark.parametrize("method", EXACT_SPLIT)
def test_in_any_blocks_and_threads(base, inputs, expected, tmp_path, monkeypatch, method):
    for length, threads in ((64, 3), (333, 1), (5000, 4)):
        monkeypatch.setattr(engine, "MOST_ELEMENTS", length)
        monkeypatch.setattr(engine, "FEWEST_ELEMENTS", 1)
        monkeypatch.setattr(engine, "RUN", 2)
        monkeypatch.setattr(parallel, "MOST_THREADS", threads)
        assert merged_bytes(base, inputs, tmp_path / str(length), method) == expected[method]


@pytest.mark.parametrize("method", [name for name in EXACT_SPLIT if find(name).prepare is None])
def test_in_blocks_of_one_value(method):
    random = np.random.default_rng(0)
    rows, statistics = (random.random((11, 5)).astype(np.float32) for _ in range(2))
    merge = choose(method, {}).ready(Cohort((), (), (), ()))
    alone = [merge(Block(rows[:, [i]], statistics=statistics[:, [i]])) for i in range(5)]
    assert np.concatenate(alone).tobytes() == merge(Block(rows, statistics=statistics)).tobytes()


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("of", [1, 2, 5])
def test_by_any_number_of_workers_in_any_order(base, inputs, expected, tmp_path, method, of):
    for index in reversed(range(of)):
        assert not (tmp_path / "out").exists()
        merge_vectors(base, inputs, method, {}, tmp_path / "out", share=Share(index, of))
    assert (tmp_path / "out").read_bytes() == expected[method]
    marks = sorted(path.name.partition(".")[2] for path in (tmp_path / "out.shares").iterdir())
    assert marks == [f"{index}-of-{of}.done" for index in range(of)]


def test_workers_at_the_same_time(base, inputs, expected, tmp_path):
    command = [sys.executable, "-c", WORKER, base.path, tmp_path / "out", *(each.path for each in inputs)]
    workers = [subprocess.Popen([*map(str, command), str(index)]) for index in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert (tmp_path / "out").read_bytes() == expected["ties"]


WORKER = """
import sys
from pathlib import Path
from datavector.merge import Share, merge_vectors
from datavector.model import BaseModel
base, output, *vectors, index = sys.argv[1:]
inputs, share = [Path(vector) for vector in vectors], Share(int(index), 3)
merge_vectors(BaseModel.load(Path(base)), inputs, "ties", {}, Path(output), share=share)
"""


def test_a_worker_that_runs_again_after_the_end_changes_nothing(base, inputs, expected, tmp_path):
    for index in (0, 1, 0):
        merge_vectors(base, inputs, "sum", {}, tmp_path / "out", share=Share(index, 2))
    assert (tmp_path / "out").read_bytes() == expected["sum"]
    assert not list((tmp_path / "out.shares").glob("*.data"))


def test_a_worker_that_was_killed_before_it_named_the_output_names_it(base, inputs, expected, tmp_path, monkeypatch):
    merge_vectors(base, inputs, "sum", {}, tmp_path / "out", share=Share(0, 2))
    with monkeypatch.context() as killed:
        killed.setattr(SharedFile, "finish", lambda self: None)
        merge_vectors(base, inputs, "sum", {}, tmp_path / "out", share=Share(1, 2))
    assert not (tmp_path / "out").exists()
    merge_vectors(base, inputs, "sum", {}, tmp_path / "out", share=Share(1, 2))
    assert (tmp_path / "out").read_bytes() == expected["sum"]


def test_what_another_merge_left_is_not_mixed_in(base, inputs, expected, tmp_path):
    merge_vectors(base, inputs, "mean", {}, tmp_path / "out", share=Share(0, 2))
    merge_vectors(base, inputs, "sum", {}, tmp_path / "out", share=Share(1, 2))
    assert not (tmp_path / "out").exists()
    merge_vectors(base, inputs, "sum", {}, tmp_path / "out", share=Share(0, 2))
    assert (tmp_path / "out").read_bytes() == expected["sum"]


def test_marks_of_work_that_is_gone_are_an_error(base, inputs, tmp_path):
    merge_vectors(base, inputs, "sum", {}, tmp_path / "out", share=Share(0, 2))
    next((tmp_path / "out.shares").glob("*.data")).unlink()
    with pytest.raises(MergeError, match="gone; remove"):
        merge_vectors(base, inputs, "sum", {}, tmp_path / "out", share=Share(1, 2))


@pytest.mark.parametrize(("index", "of"), [(-1, 2), (2, 2), (0, 0)])
def test_a_share_is_one_of_all(index, of):
    with pytest.raises(ConfigError):
        Share(index, of)


def test_a_worker_that_was_stopped_is_run_again(base, inputs, expected, tmp_path):
    merge_vectors(base, inputs, "sum", {}, tmp_path / "out", share=Share(1, 2))
    asked = itertools.count()
    with pytest.raises(Interrupted):
        merge_vectors(base, inputs, "sum", {}, tmp_path / "out", share=Share(0, 2), cancelled=lambda: next(asked) >= 3)
    assert not (tmp_path / "out").exists()
    merge_vectors(base, inputs, "sum", {}, tmp_path / "out", share=Share(0, 2))
    assert (tmp_path / "out").read_bytes() == expected["sum"]


@pytest.mark.parametrize("method", ["ties", "krum", "geometric-median", "model-stock"])
def test_looking_at_the_vectors_first_can_be_cancelled_too(base, inputs, tmp_path, method):
    asked = itertools.count()
    with pytest.raises(Interrupted):
        merge_vectors(base, inputs, method, {}, tmp_path / "out", cancelled=lambda: next(asked) >= 4)
    assert next(asked) < 3 * len(inputs)


@pytest.mark.parametrize("method", methods())
def test_a_merge_that_is_cancelled_leaves_nothing(base, inputs, tmp_path, method):
    asked = itertools.count()
    with pytest.raises(Interrupted):
        merge_vectors(base, inputs, method, {}, tmp_path / "out", cancelled=lambda: next(asked) >= 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", methods())
def test_one_hospital_taken_out_leaves_what_would_have_been_without_it(base, inputs, tmp_path, method):
    """A merge keeps nothing of an earlier one: the others, merged after five were, and merged by themselves."""
    merged_bytes(base, inputs, tmp_path / "out", method)
    after = merged_bytes(base, inputs[:1] + inputs[2:], tmp_path / "out", method)
    assert after == merged_bytes(base, inputs[:1] + inputs[2:], tmp_path / "never", method)


usual = st.floats(-1, 1, width=32)
huge = st.floats(-(2.0**40), 2.0**40, width=32)
tiny = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-38, 2.0**-46, 3 * 2.0**-46])


@pytest.mark.parametrize("method", sorted(set(methods()) - {"fisher", "regmean"}))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_values_any_order_gives_the_same_finite_bytes(base, tmp_path_factory, method, data):
    folder = tmp_path_factory.mktemp("values")
    inputs = []
    for index in range(data.draw(st.integers(1, 4))):
        drawn = data.draw(npst.arrays(np.float32, 24, elements=st.one_of(usual, tiny, huge), fill=st.just(0.0)))
        path = folder / f"{index}"
        write_tensors(path, base.vector_layout, (np.resize(drawn, each.shape) for each in base.layout.tensors))
        inputs.append(MergeInput(path))
    first = merged_bytes(base, inputs, folder / "a", method)
    assert merged_bytes(base, inputs[::-1], folder / "b", method) == first
    assert np.isfinite(np.frombuffer(first[len(base.layout.header) :], dtype="<f4")).all()


def test_the_digest_tells_inputs_method_and_parameters_apart(base, inputs):
    def digest(inputs=inputs, method="sum", **parameters):
        return merge_digest(base, inputs, method, parameters)

    heavier = [MergeInput(each.path, each.digest, each.samples + 1) for each in inputs]
    assert digest() == digest(inputs[::-1]) == digest(scale=1.0) == digest(heavier)
    others = {digest(inputs[1:]), digest(method="mean"), digest(scale=0.5), digest(method="weighted-mean")}
    assert len(others | {digest(), digest(heavier, "weighted-mean")}) == 6


def test_the_digest_is_of_vectors_and_statistics_that_are_read(base, inputs):
    bare = [MergeInput(each.path) for each in inputs]
    assert merge_digest(base, bare, "sum", {}) == merge_digest(base, inputs, "sum", {})
    other = [replace(each, statistics=inputs[0].statistics) for each in inputs]
    assert merge_digest(base, other, "mean", {}) == merge_digest(base, inputs, "mean", {})
    assert merge_digest(base, other, "fisher", {}) != merge_digest(base, inputs, "fisher", {})


def test_the_inner_products_are_those_of_everything_that_is_merged(base, inputs, monkeypatch):
    from tests.datavector.merge.small import read

    rows = np.stack(
        [
            np.concatenate(
                [v.reshape(-1) for k, v in read(each.path, base.vector_layout).items() if "running" not in k]
            )
            for each in inputs
        ]
    ).astype(float)
    found = engine.gram_matrix(base, inputs)
    np.testing.assert_allclose(found, rows @ rows.T, rtol=1e-12)
    monkeypatch.setattr(cohort, "VALUES", 7 * len(inputs))
    np.testing.assert_allclose(engine.gram_matrix(base, inputs), found, rtol=1e-12)
