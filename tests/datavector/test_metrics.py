from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datavector.metrics import (
    ClassMetrics,
    accuracy,
    balanced_accuracy,
    calibration_error,
    confusion_matrix,
    per_class,
    reliability,
)

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1)


def confusion(pairs: list[tuple[int, int]]) -> np.ndarray:
    labels, predictions = zip(*pairs, strict=True)
    return confusion_matrix(labels, predictions, 4)


def test_rows_are_classes_and_columns_predictions() -> None:
    assert confusion_matrix([0, 0, 1, 2], [0, 1, 1, 0], 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_a_known_table_gives_known_metrics() -> None:
    table = np.array([[8, 2, 0], [1, 3, 0], [0, 0, 0]])
    assert accuracy(table) == 11 / 14
    assert balanced_accuracy(table) == pytest.approx((0.8 + 0.75) / 2)
    first, second, third = per_class(table)
    assert first == ClassMetrics(sensitivity=0.8, specificity=0.75, support=10)
    assert second == ClassMetrics(sensitivity=0.75, specificity=0.8, support=4)
    assert math.isnan(third.sensitivity)
    assert (third.specificity, third.support) == (1.0, 0)


def test_no_images_give_no_number() -> None:
    empty = confusion_matrix([], [], 3)
    assert empty.shape == (3, 3)
    assert math.isnan(accuracy(empty))
    assert math.isnan(balanced_accuracy(empty))


@pytest.mark.parametrize(("labels", "predictions"), [([0, 3], [0, 0]), ([0, 0], [0, -1]), ([0], [0, 1])])
def test_values_that_are_no_classes_are_refused(labels: list[int], predictions: list[int]) -> None:
    with pytest.raises(ValueError, match=r"classes|shape"):
        confusion_matrix(labels, predictions, 3)


@given(PAIRS, PAIRS)
def test_hospitals_counts_sum_to_those_of_all_images(
    north: list[tuple[int, int]], south: list[tuple[int, int]]
) -> None:
    assert (confusion(north) + confusion(south) == confusion(north + south)).all()


@given(PAIRS)
def test_metrics_equal_their_definitions(pairs: list[tuple[int, int]]) -> None:
    table = confusion(pairs)
    recalls = [
        np.mean([prediction == label for label, prediction in pairs if label == kind])
        for kind in sorted({label for label, _ in pairs})
    ]
    assert accuracy(table) == pytest.approx(np.mean([label == prediction for label, prediction in pairs]))
    assert balanced_accuracy(table) == pytest.approx(np.mean(recalls))
    for kind, metrics in enumerate(per_class(table)):
        others = [prediction != kind for label, prediction in pairs if label != kind]
        if others:
            assert metrics.specificity == pytest.approx(np.mean(others))


def test_reliability_counts_images_hits_and_confidence_by_bin():
    probabilities = [[0.95, 0.05], [0.55, 0.45], [0.1, 0.9], [1.0, 0.0]]
    bins = reliability([0, 1, 1, 1], probabilities)
    assert bins[9].tolist() == pytest.approx([3, 2, 2.85])
    assert bins[5].tolist() == pytest.approx([1, 0, 0.55])
    assert bins[:, 0].sum() == 4
    assert calibration_error(bins) == pytest.approx((abs(2 - 2.85) + 0.55) / 4)
    assert math.isnan(calibration_error(reliability([], np.zeros((0, 2)))))
