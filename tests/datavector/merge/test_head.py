import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datavector.errors import MergeError, NotFinite, WrongLayout
from datavector.merge.head import FeatureMoments, pool_features, solvable, solve_head

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


def merged_head():
    random = np.random.default_rng([0, 1])
    return random.normal(size=(CLASSES, FEATURES)).astype(np.float32), random.normal(size=CLASSES).astype(np.float32)


def solve(moments, strength=1.0, head=None):
    return solve_head(moments, *(head or merged_head()), strength=strength)


def answers(head, features):
    return features @ head[0].T + head[1]


def test_the_head_is_that_of_everybodys_images_together():
    parts = [hospital(1, classes=(0, 1)), hospital(2, classes=(1, 2)), hospital(3, images=9)]
    features, labels = np.concatenate([each[0] for each in parts]), np.concatenate([each[1] for each in parts])
    found = solve(pool_features([moments_of(*each) for each in parts]))
    together = solve(moments_of(features, labels))
    np.testing.assert_allclose(found[0], together[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], together[1], rtol=1e-5, atol=1e-5)
    assert (answers(found, features).argmax(1) == labels).mean() > 0.9


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_the_head_is_a_ridge_regression_that_starts_from_the_merged_head(strength):
    """With as many images of each class, that is plain ridge regression on what the merged head's answers miss."""
    random = np.random.default_rng(4)
    labels = np.repeat([0, 1, 2], 30)
    features = np.random.default_rng(0).normal(0, 2, (CLASSES, FEATURES))[labels] + random.normal(size=(90, FEATURES))
    centred, targets = features - features.mean(axis=0), np.eye(CLASSES)[labels] - 1 / CLASSES
    penalty = strength * (centred**2).sum() / FEATURES
    # A merged head that knows something, and one that is wrong: of the second nothing is used.
    for merged in (random.normal(size=(CLASSES, FEATURES)) / 9 + targets.T @ centred / 90, -targets.T @ centred):
        start = centred @ (merged - merged.mean(axis=0)).T
        start_size = max(0.0, (start * targets).sum() / (start**2).sum())
        missed = targets - start_size * start
        step = np.linalg.solve(centred.T @ centred + penalty * np.eye(FEATURES), centred.T @ missed)
        expected = start_size * start + centred @ step
        expected *= CLASSES * (expected * targets).sum() / (expected**2).sum()
        found = solve(moments_of(features, labels), strength, (merged.astype(np.float32), np.ones(3, np.float32)))
        np.testing.assert_allclose(answers(found, features), expected, rtol=1e-3, atol=1e-3)


def test_the_stronger_it_is_the_nearer_to_the_merged_head():
    moments = moments_of(*hospital(1))
    good = solve(moments)
    merged = good[0] + np.random.default_rng(3).normal(0, 0.1, good[0].shape).astype(np.float32), good[1]

    def distance(strength):
        directions = [each - each.mean(axis=0) for each in (solve(moments, strength, merged)[0], merged[0])]
        return np.linalg.norm(np.subtract(*(each / np.linalg.norm(each) for each in directions)))

    assert distance(1e6) < 1e-3 < distance(10.0) < distance(0.01)


def test_answers_are_as_sure_as_fits_the_images_best():
    features, labels = hospital(1, images=3000)
    balanced = np.concatenate([np.flatnonzero(labels == each)[:900] for each in range(CLASSES)])
    features, labels = features[balanced], labels[balanced]
    for strength in (0.1, 100.0):
        found = answers(solve(moments_of(features, labels), strength), features)
        targets = CLASSES * np.eye(CLASSES)[labels] - 1
        assert (found * targets).sum() / (found**2).sum() == pytest.approx(1, abs=1e-3)


def test_how_many_images_a_class_has_does_not_favour_it():
    many, few = hospital(1, images=400, classes=(0,)), hospital(2, images=12, classes=(1, 2))
    found = solve(pool_features([moments_of(*many), moments_of(*few)]), 0.1)
    features, labels = hospital(9, images=300)
    right = answers(found, features).argmax(1) == labels
    assert min(right[labels == each].mean() for each in range(CLASSES)) > 0.75


@given(st.permutations(range(5)), st.integers(0, 4))
@settings(deadline=None)
def test_any_order_gives_the_same_bits_and_a_hospital_leaves_nothing_behind(order, leaving):
    parts = [moments_of(*hospital(seed)) for seed in range(5)]

    def bits(chosen):
        pooled = pool_features(chosen)
        return [each.tobytes() for each in (pooled.counts, pooled.sums, pooled.second, *solve(pooled))]

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


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 1, 0]], ids=["right about the others", "wrong about the others"])
def test_a_class_that_nobody_gave_is_answered_as_by_the_merged_head(rows):
    features, labels = hospital(1, images=300)
    merged = [each[rows] for each in solve(moments_of(features, labels), 0.1)]
    some = labels != 1
    found = solve(moments_of(features[some], labels[some]), 1.0, merged)
    right = answers(found, features).argmax(1) == labels
    assert min(right[labels == each].mean() for each in range(CLASSES)) > 0.75

    now, before = (
        each[:, 1] - each[:, [0, 2]].mean(axis=1) for each in (answers(found, features), answers(merged, features))
    )
    factor = np.linalg.norm(now) / np.linalg.norm(before)
    np.testing.assert_allclose(now, factor * before, rtol=1e-3, atol=1e-3 * np.abs(now).max())


def test_images_of_one_class_alone_make_no_head():
    pooled = pool_features([moments_of(*hospital(1, classes=(2,)))])
    assert not solvable(pooled)
    with pytest.raises(MergeError, match="of 1 of 3 classes"):
        solve(pooled)


def test_a_head_of_another_model_is_refused():
    weight, bias = merged_head()
    with pytest.raises(WrongLayout, match="merged head"):
        solve_head(moments_of(*hospital(1)), weight[:, :-1], bias, strength=1)
    with pytest.raises(WrongLayout, match="merged head"):
        solve_head(moments_of(*hospital(1)), weight, bias[:-1], strength=1)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1e3, 1e30])
def test_features_that_are_all_the_same_still_give_a_finite_head(value):
    moments = moments_of(np.full((6, FEATURES), value), np.array([0, 1, 2, 0, 1, 2]))
    for head in (merged_head(), (np.zeros((CLASSES, FEATURES), np.float32), np.zeros(CLASSES, np.float32))):
        found = solve(moments, head=head)
        assert all(np.isfinite(each).all() for each in found)
        assert np.abs(answers(found, np.full((1, FEATURES), value))).max() < 100


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
