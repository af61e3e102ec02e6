"""The mean of data vectors, weighted by training images: federated averaging's own weights (arXiv 1602.05629)."""

from __future__ import annotations

import numpy as np

from datavector.errors import MergeError
from datavector.layout import FLOAT, FloatArray
from datavector.merge.cohort import Block, Cohort, DoubleArray
from datavector.merge.exact import exact_weighted_sum
from datavector.merge.registry import method


def shares_of(cohort: Cohort) -> DoubleArray:
    """Each hospital's share of all training images, shape (hospitals,).

    Raises:
        MergeError: a number of images is negative, or all are 0.
    """
    samples = np.array(cohort.samples, dtype=np.float64)
    if (samples < 0).any() or not samples.any():
        raise MergeError(
            f"the hospitals have {list(cohort.samples)} images", remedy="give each hospital's number of training images"
        )
    shares: DoubleArray = samples / samples.sum()
    return shares


@method("weighted-mean", prepare=shares_of, exact=True, weighs=True)
def weighted_mean(block: Block, shares: DoubleArray) -> FloatArray:
    """Exact, order-independent mean over hospitals, each counting as often as it has images.

    Args:
        block: one slice of one tensor of every vector.
        shares: what `shares_of` gave.
    Returns:
        float32, shape (elements,).
    """
    return exact_weighted_sum(block.rows, shares).astype(FLOAT)
