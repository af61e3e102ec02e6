"""Fisher-weighted averaging: each element counts as much as a hospital's model depends on it (arXiv 2111.09832).

Hospitals send the diagonal of the Fisher information beside the vector.
"""

from __future__ import annotations

import numpy as np

from datavector.errors import MergeError
from datavector.layout import FLOAT, FloatArray
from datavector.merge.cohort import Block, DoubleArray
from datavector.merge.exact import exact_sum
from datavector.merge.registry import Scale, method
from datavector.merge.statistics import FISHER


@method("fisher", statistics=FISHER)
def fisher(block: Block, *, scale: Scale = 1.0) -> FloatArray:
    """The mean weighted by Fisher information; the plain mean where nobody's model depends on an element.

    Args:
        block: one slice of one tensor of every vector, with its Fisher information.
        scale: factor on the result.
    Returns:
        float32, shape (elements,).
    """
    if block.statistics is None or (block.statistics < 0).any():
        raise MergeError("a Fisher information is missing or negative", remedy="let the hospitals send it again")
    total, weighted = np.zeros(block.rows.shape[1]), np.zeros(block.rows.shape[1])
    for row, weight in zip(block.rows, block.statistics.astype(np.float64), strict=True):  # numpy's sum looks at shapes
        total += weight
        weighted += weight * row
    mean = exact_sum(block.rows) / len(block.rows)
    merged: DoubleArray = np.divide(weighted, total, out=mean, where=total > 0)
    return (scale * merged).astype(FLOAT)
