"""The plain sum of data vectors: arXiv 2408.13038, section 3; with a scale, task arithmetic (arXiv 2212.04089)."""

from __future__ import annotations

from datavector.layout import FLOAT, FloatArray
from datavector.merge.cohort import Block
from datavector.merge.exact import exact_sum
from datavector.merge.registry import Scale, method


@method("sum", exact=True)
def sum_vectors(block: Block, *, scale: Scale = 1.0) -> FloatArray:
    """Exact, order-independent sum over hospitals.

    Args:
        block: one slice of one tensor of every vector.
        scale: factor on the sum.
    Returns:
        float32, shape (elements,).
    """
    total = exact_sum(block.rows)
    if scale != 1.0:
        total *= scale
    return total.astype(FLOAT)
