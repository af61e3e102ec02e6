"""The same vectors give the same bytes: in any order, in any blocks, by any number of workers, at any magnitude."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from datavector.errors import Interrupted
from datavector.layout import write_tensors
from datavector.merge import MergeInput, Share, cohort, engine, merge_digest, merge_vectors, methods, parallel
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
    bare = [MergeInput(each.path, "", each.samples, each.fisher, each.regmean) for each in inputs]
    assert merged_bytes(base, bare[::-1], tmp_path / "out", method) == expected[method]


@pytest.mark.parametrize("method", EXACT_SPLIT)
def test_in_any_blocks_and_threads(base, inputs, expected, tmp_path, monkeypatch, method):
    for length, threads in ((64, 3), (333, 1), (5000, 4)):
        monkeypatch.setattr(engine, "MOST_ELEMENTS", length)
        monkeypatch.setattr(engine, "FEWEST_ELEMENTS", 1)
        monkeypatch.setattr(engine, "RUN", 2)
        monkeypatch.setattr(parallel, "MOST_THREADS", threads)
        assert merged_bytes(base, inputs, tmp_path / str(length), method) == expected[method]


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("of", [1, 2, 5])
def test_by_any_number_of_workers_in_any_order(base, inputs, expected, tmp_path, method, of):
    for index in reversed(range(of)):
        assert not (tmp_path / "out").exists()
        merge_vectors(base, inputs, method, {}, tmp_path / "out", share=Share(index, of))
    assert (tmp_path / "out").read_bytes() == expected[method]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_worker_that_was_stopped_is_run_again(base, inputs, expected, tmp_path):
    merge_vectors(base, inputs, "sum", {}, tmp_path / "out", share=Share(1, 2))
    asked = itertools.count()
    with pytest.raises(Interrupted):
        merge_vectors(base, inputs, "sum", {}, tmp_path / "out", share=Share(0, 2), cancelled=lambda: next(asked) >= 3)
    assert not (tmp_path / "out").exists()
    merge_vectors(base, inputs, "sum", {}, tmp_path / "out", share=Share(0, 2))
    assert (tmp_path / "out").read_bytes() == expected["sum"]


@pytest.mark.parametrize("method", ["sum", "ties", "iso-c", "krum"])
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


@pytest.mark.parametrize("method", sorted(set(methods()) - {"fisher", "regmean", "tsv"}))
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
    monkeypatch.setattr(cohort, "SLICE", 7)
    np.testing.assert_allclose(engine.gram_matrix(base, inputs), found, rtol=1e-12)
