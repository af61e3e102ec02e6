"""The mean of data vectors, weighted by training images: federated averaging's own weights (arXiv 1602.05629)."""

from __future__ import annotations

import numpy as np

from datavector.layout import FLOAT, FloatArray
from datavector.merge.cohort import Block, Cohort, DoubleArray
from datavector.merge.exact import exact_sum
from datavector.merge.registry import method


def weights_of(cohort: Cohort) -> DoubleArray:
    """Training images, shape (hospitals,)."""
    return np.array(cohort.samples, dtype=np.float64)


@method("weighted-mean", prepare=weights_of, exact=True, weighs=True)
def weighted_mean(block: Block, weights: DoubleArray) -> FloatArray:
    """Exact, order-independent mean over hospitals, each counting as often as it has images.

    Args:
        block: one slice of one tensor of every vector.
        weights: training images, shape (hospitals,).
    Returns:
        float32, shape (elements,).
    """
    shares = weights / weights.sum()
    return exact_sum(block.rows * shares[:, None]).astype(FLOAT)
