"""The coordinate-wise median, which half of the hospitals must agree to move (arXiv 1803.01498)."""

from __future__ import annotations

import numpy as np

from datavector.layout import FLOAT, FloatArray
from datavector.merge.cohort import Block, DoubleArray
from datavector.merge.registry import Scale, method


@method("median", exact=True)
def median(block: Block, *, scale: Scale = 1.0) -> FloatArray:
    """Each element's median; of an even number of hospitals the mean of the two middle ones.

    Args:
        block: one slice of one tensor of every vector.
        scale: factor on the result.
    Returns:
        float32, shape (elements,).
    """
    hospitals = len(block.rows)
    ordered = np.sort(block.rows, axis=0)
    middle: DoubleArray = ordered[(hospitals - 1) // 2].astype(np.float64) + ordered[hospitals // 2]
    middle *= scale / 2
    return middle.astype(FLOAT)
