"""Sums of float32 values that depend neither on order nor on how the elements are divided into blocks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from datavector.layout import FloatArray

GRID_BITS = 45
SHIFTER = 1.5 * 2.0 ** (52 - GRID_BITS)  # adding it leaves float64 no bits below 2**-45
EXACT_BELOW = 2.0 ** (51 - GRID_BITS)  # sums of magnitudes below it fit the grid without rounding


def exact_sum(block: FloatArray) -> NDArray[np.float64]:
    """Sum over hospitals, the same bits in any order.

    Each value is rounded to a multiple of 2**-45, (t + C) - C in float64; sums of such multiples are exact, so a
    hospital's part can be taken out again without a trace. Where the magnitudes of an element add up to 64 or more
    (some BatchNorm statistics), the element's values are sorted and added in float64 instead: no longer exact, but
    still independent of order and of blocks.

    Args:
        block: float32, shape (hospitals, elements).
    Returns:
        float64, shape (elements,).
    """
    total, magnitude = np.zeros(block.shape[1]), np.zeros(block.shape[1])
    term = np.empty(block.shape[1])
    for row in block:
        np.add(row, SHIFTER, out=term, dtype=np.float64)
        np.subtract(term, SHIFTER, out=term)
        np.add(total, term, out=total)
        np.abs(term, out=term)
        np.add(magnitude, term, out=magnitude)
    large = magnitude >= EXACT_BELOW
    if large.any():
        total[large] = _sorted_sum(block[:, large])
    return total


def _sorted_sum(block: FloatArray) -> NDArray[np.float64]:
    # Row after row: numpy's own sum groups the terms of a single column in another way than those of many.
    total = np.zeros(block.shape[1])
    for row in np.sort(block, axis=0):
        total += row
    return total
