"""The mean of data vectors, each hospital counting the same: one round of federated averaging (arXiv 1602.05629)."""

from __future__ import annotations

import numpy as np

from datavector.layout import FloatArray
from datavector.merge.exact import exact_sum
from datavector.merge.registry import Block, method


@method("mean")
def mean_vectors(block: Block) -> FloatArray:
    """Exact, order-independent mean over hospitals.

    Args:
        block: float32, shape (hospitals, elements): one slice of one tensor.
    Returns:
        float32, shape (elements,).
    """
    total = exact_sum(block)
    total /= len(block)
    return total.astype(np.float32)
