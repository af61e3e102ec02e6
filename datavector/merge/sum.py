"""The plain sum of data vectors: arXiv 2408.13038, section 3; task arithmetic (arXiv 2212.04089) with scale 1."""

from __future__ import annotations

import numpy as np

from datavector.layout import FloatArray
from datavector.merge.exact import exact_sum
from datavector.merge.registry import Block, method


@method("sum")
def sum_vectors(block: Block, *, scale: float = 1.0) -> FloatArray:
    """Exact, order-independent sum over hospitals.

    Args:
        block: float32, shape (hospitals, elements): one slice of one tensor.
        scale: factor on the sum.
    Returns:
        float32, shape (elements,).
    """
    total = exact_sum(block)
    if scale != 1.0:
        total *= scale
    return total.astype(np.float32)
