import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datavector.errors import MergeError, NotFinite, WrongLayout
from datavector.layout import TensorFile
from datavector.merge.batchnorm import Moments, pool, restore, uploaded


def moments_of(values):
    return Moments(len(values), values.mean(axis=0), values.var(axis=0))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_pooled_moments_are_those_of_all_values_together(counts, seed):
    random = np.random.default_rng(seed)
    parts = [random.normal(random.normal(0, 50), random.uniform(0.01, 20), (count, 3)) for count in counts]
    pooled, whole = pool([moments_of(part) for part in parts]), moments_of(np.concatenate(parts))
    assert pooled.count == whole.count
    np.testing.assert_allclose(pooled.mean, whole.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(pooled.variance, whole.variance, rtol=1e-10)


@given(st.integers(1, 12), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_any_order_pools_to_the_same_bits(hospitals, seed, shuffler):
    random = np.random.default_rng(seed)
    moments = [moments_of(random.normal(0, 10.0 ** random.integers(-6, 6), (9, 5))) for _ in range(hospitals)]
    expected = pool(moments)
    shuffler.shuffle(moments)
    found = pool(moments)
    assert (found.mean.tobytes(), found.variance.tobytes()) == (expected.mean.tobytes(), expected.variance.tobytes())


def test_a_variance_far_below_the_squared_mean_survives():
    values = 1e6 + np.random.default_rng(0).normal(0, 1e-3, (400, 2))
    pooled = pool([moments_of(values[:100]), moments_of(values[100:])])
    np.testing.assert_allclose(pooled.variance, values.var(axis=0), rtol=1e-6)


def test_there_must_be_something_to_pool():
    with pytest.raises(MergeError):
        pool([])


def test_moments_of_different_layers_are_not_pooled():
    with pytest.raises(WrongLayout):
        pool([moments_of(np.ones((2, 3))), moments_of(np.ones((2, 4)))])


def test_moments_that_cannot_be_are_refused():
    one = np.ones(2)
    for count, mean, variance in ((0, one, one), (1, one, -one), (1, one, np.ones(3)), (1, np.ones((2, 1)), one)):
        with pytest.raises(WrongLayout):
            Moments(count, mean, variance)
    with pytest.raises(NotFinite):
        Moments(1, np.array([np.nan, 1]), one)


def test_restored_statistics_are_named_as_in_the_state_dict():
    tensors = restore({"norm": Moments(3, np.array([1.0]), np.array([4.0]))})
    assert {name: (value.dtype, value.tolist()) for name, value in tensors.items()} == {
        "norm.running_mean": (np.float32, [1.0]),
        "norm.running_var": (np.float32, [4.0]),
    }


def test_uploaded_moments_are_those_of_the_tuned_model(base, vectors):
    found = uploaded(base, vectors[0], 17)["norm"]
    with base.open() as pretrained, TensorFile(vectors[0], base.vector_layout) as difference:
        mean, variance = (
            pretrained.read(f"norm.{k}") + difference.read(f"norm.{k}") for k in ("running_mean", "running_var")
        )
    assert found.count == 17
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(found.variance, variance, rtol=1e-6)
