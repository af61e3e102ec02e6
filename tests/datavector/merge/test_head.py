import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datavector.errors import MergeError, NotFinite, WrongLayout
from datavector.merge.head import FeatureMoments, missing_classes, pool_features, solve_head

CLASSES, FEATURES = 3, 6


def moments_of(features, labels):
    return FeatureMoments(
        np.bincount(labels, minlength=CLASSES),
        np.stack([features[labels == each].sum(axis=0) for each in range(CLASSES)]),
        features.T @ features,
    )


def hospital(seed, images=40, classes=(0, 1, 2)):
    random = np.random.default_rng(seed)
    labels = random.choice(classes, images)
    centres = np.random.default_rng(0).normal(0, 2, (CLASSES, FEATURES))
    return centres[labels] + random.normal(0, 1, (images, FEATURES)) + 5, labels


def test_the_head_is_that_of_everybodys_images_together():
    parts = [hospital(1, classes=(0, 1)), hospital(2, classes=(1, 2)), hospital(3, images=9)]
    features, labels = np.concatenate([each[0] for each in parts]), np.concatenate([each[1] for each in parts])
    weight, bias = solve_head(pool_features([moments_of(*each) for each in parts]))
    together = solve_head(moments_of(features, labels))
    np.testing.assert_allclose(weight, together[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bias, together[1], rtol=1e-5, atol=1e-5)
    assert ((features @ weight.T + bias).argmax(1) == labels).mean() > 0.9


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_the_head_is_a_ridge_regression_in_which_each_class_weighs_the_same(strength):
    """With as many images of each class, that is plain ridge regression on one-hot targets."""
    random = np.random.default_rng(4)
    labels = np.repeat([0, 1, 2], 30)
    features = np.random.default_rng(0).normal(0, 2, (CLASSES, FEATURES))[labels] + random.normal(size=(90, FEATURES))
    centred, targets = features - features.mean(axis=0), np.eye(CLASSES)[labels] - 1 / CLASSES
    covariance = centred.T @ centred / len(labels)
    penalty = strength * np.trace(covariance) / FEATURES
    expected = np.linalg.solve(covariance + penalty * np.eye(FEATURES), centred.T @ targets / len(labels)).T
    weight, bias = solve_head(moments_of(features, labels), strength=strength)
    found = features @ weight.T + bias
    scale = np.linalg.norm(weight) / np.linalg.norm(expected)
    np.testing.assert_allclose(found, scale * centred @ expected.T, rtol=1e-3, atol=1e-3)
    assert 1 < scale < 1000


def test_how_many_images_a_class_has_does_not_favour_it():
    many, few = hospital(1, images=400, classes=(0,)), hospital(2, images=12, classes=(1, 2))
    weight, bias = solve_head(pool_features([moments_of(*many), moments_of(*few)]), strength=0.1)
    features, labels = hospital(9, images=300)
    answers = (features @ weight.T + bias).argmax(1)
    assert min((answers[labels == each] == each).mean() for each in range(CLASSES)) > 0.75


@given(st.permutations(range(5)), st.integers(0, 4))
@settings(deadline=None)
def test_any_order_gives_the_same_bits_and_a_hospital_leaves_nothing_behind(order, leaving):
    parts = [moments_of(*hospital(seed)) for seed in range(5)]

    def bits(chosen):
        pooled = pool_features(chosen)
        return [each.tobytes() for each in (pooled.counts, pooled.sums, pooled.second, *solve_head(pooled))]

    assert bits([parts[index] for index in order]) == bits(parts)
    others = [index for index in order if index != leaving]
    assert bits([parts[index] for index in others]) == bits([parts[index] for index in sorted(others)])


def test_pooling_takes_no_memory_for_each_hospital():
    features = 200
    part = FeatureMoments(np.ones(CLASSES, np.int64), np.ones((CLASSES, features)), np.ones((features, features)))
    tracemalloc.start()
    try:
        pool_features([part] * 20)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 3 * part.second.nbytes


def test_a_class_that_nobody_has_is_named_and_makes_no_head():
    pooled = pool_features([moments_of(*hospital(1, classes=(0, 2)))])
    assert missing_classes(pooled) == [1]
    with pytest.raises(MergeError, match="1 classes"):
        solve_head(pooled)


def test_features_that_are_all_the_same_still_give_a_finite_head():
    features, labels = np.ones((6, FEATURES)), np.array([0, 1, 2, 0, 1, 2])
    weight, bias = solve_head(moments_of(features, labels))
    assert np.isfinite(weight).all()
    assert np.isfinite(bias).all()


def test_moments_that_do_not_belong_together_are_refused():
    good = moments_of(*hospital(1))
    with pytest.raises(WrongLayout):
        FeatureMoments(good.counts[:2], good.sums, good.second)
    with pytest.raises(WrongLayout, match="negative"):
        FeatureMoments(-good.counts, good.sums, good.second)
    with pytest.raises(NotFinite):
        FeatureMoments(good.counts, good.sums * np.nan, good.second)
    with pytest.raises(MergeError):
        pool_features([])
