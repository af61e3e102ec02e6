"""The mean of data vectors, each hospital counting the same: one round of federated averaging (arXiv 1602.05629)."""

from __future__ import annotations

from datavector.layout import FLOAT, FloatArray
from datavector.merge.cohort import Block
from datavector.merge.exact import exact_sum
from datavector.merge.registry import method


@method("mean", exact=True)
def mean_vectors(block: Block) -> FloatArray:
    """Exact, order-independent mean over hospitals.

    Args:
        block: one slice of one tensor of every vector.
    Returns:
        float32, shape (elements,).
    """
    total = exact_sum(block.rows)
    total /= len(block.rows)
    return total.astype(FLOAT)
