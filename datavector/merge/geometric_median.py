"""The geometric median: the vector whose distances to all hospitals' add up to the least (arXiv 1912.13445).

It is a weighted mean, and its weights follow from the inner products of the vectors alone (Weiszfeld's algorithm).
"""

from __future__ import annotations

import numpy as np

from datavector.layout import FLOAT, FloatArray
from datavector.merge.cohort import Block, Cohort, DoubleArray
from datavector.merge.exact import exact_weighted_sum
from datavector.merge.registry import Scale, method

MOST_STEPS = 1000
CLOSE = 1e-12  # change of the weights at which they have settled
NEAR = 1e-9  # of the mean norm: a distance that counts as none


def weiszfeld(cohort: Cohort, *, scale: float = 1.0) -> DoubleArray:  # noqa: ARG001
    """Weights of the geometric median, shape (hospitals,), summing to 1."""
    gram = cohort.gram
    weights = np.full(len(gram), 1 / len(gram))
    floor = NEAR * np.sqrt(np.diag(gram).mean()) or 1.0
    for _ in range(MOST_STEPS):
        squared = weights @ gram @ weights - 2 * (gram @ weights) + np.diag(gram)
        inverse = 1 / np.maximum(np.sqrt(np.maximum(squared, 0.0)), floor)
        before, weights = weights, inverse / inverse.sum()
        if np.abs(weights - before).max() < CLOSE:
            break
    return weights


@method("geometric-median", prepare=weiszfeld)
def geometric_median(block: Block, weights: DoubleArray, *, scale: Scale = 1.0) -> FloatArray:
    """The weighted mean that is the geometric median.

    Args:
        block: one slice of one tensor of every vector.
        weights: what `weiszfeld` gave.
        scale: factor on the result.
    Returns:
        float32, shape (elements,).
    """
    return (scale * exact_weighted_sum(block.rows, weights)).astype(FLOAT)
