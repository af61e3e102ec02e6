"""The coordinate-wise trimmed mean, which bounds what a few hospitals can do (arXiv 1803.01498)."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from datavector.layout import FLOAT, FloatArray
from datavector.merge.cohort import Block
from datavector.merge.exact import exact_sum
from datavector.merge.registry import Range, Scale, method


@method("trimmed-mean", exact=True)
def trimmed_mean(block: Block, *, trim: Annotated[float, Range(0, 0.49)] = 0.2, scale: Scale = 1.0) -> FloatArray:
    """The mean of each element's middle values.

    Args:
        block: one slice of one tensor of every vector.
        trim: share of the hospitals left out at each end, rounded down.
        scale: factor on the result.
    Returns:
        float32, shape (elements,).
    """
    hospitals = len(block.rows)
    cut = int(trim * hospitals)
    middle = np.sort(block.rows, axis=0)[cut : hospitals - cut]
    total = exact_sum(middle)
    total *= scale / len(middle)
    return total.astype(FLOAT)
