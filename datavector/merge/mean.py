"""The mean of data vectors: model soups (arXiv 2203.05482) of models that were tuned from one base."""

from __future__ import annotations

import numpy as np

from datavector.layout import FloatArray
from datavector.merge.exact import exact_sum
from datavector.merge.methods import method


@method("mean")
def mean_vector(block: FloatArray) -> FloatArray:
    """Exact, order-independent mean over hospitals, each counting alike.

    Args:
        block: float32, shape (hospitals, elements): one slice of one tensor.
    Returns:
        float32, shape (elements,).
    """
    return (exact_sum(block) / len(block)).astype(np.float32)
