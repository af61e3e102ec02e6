"""Sums that depend neither on the order of the hospitals nor on how tensors are cut into blocks.

Floating-point sums depend on their order because every addition rounds. Here each contribution is first rounded, alone,
to a multiple of 2^-45: adding a constant C in [128, 256) to a small float64 leaves no finer bits, and taking C away
again is exact (Dekker's splitting, doi 10.1007/BF01397083). Multiples of 2^-45 below 2^8 then add up without any
rounding at all. 2^-45 is far below what a float32 weight resolves. Larger values, which sound vectors do not have, are
added in ascending order instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

DoubleArray = NDArray[np.float64]
Rows = NDArray[np.floating[Any]]

ANCHOR = 192.0  # in the middle of [128, 256), where float64 resolves 2^-45
LARGEST = 16.0  # of a contribution on the grid
LARGEST_SUM = 48.0  # ANCHOR + LARGEST + LARGEST_SUM = 2^8, so partial sums with an ANCHOR in them stay exact


def exact_sum(rows: Rows) -> DoubleArray:
    """Sums over hospitals.

    Args:
        rows: float32 or float64, shape (hospitals, elements), finite.
    Returns:
        float64, shape (elements,): the same bits for any order of the rows and any cut between elements.
    """
    limit = min(LARGEST, LARGEST_SUM / len(rows))
    if -limit <= rows.min(initial=0.0) and rows.max(initial=0.0) <= limit:
        return _grid_sum(rows)
    large = (np.abs(rows) > limit).any(axis=0)
    total = np.empty(rows.shape[1])
    total[~large] = _grid_sum(rows[:, ~large])
    total[large] = sorted_sum(rows[:, large])
    return total


def exact_weighted_sum(rows: Rows, weights: DoubleArray) -> DoubleArray:
    """Sums weight x row over hospitals, each product rounded alone.

    Args:
        rows: shape (hospitals, elements).
        weights: shape (hospitals,).
    """
    return exact_sum(rows * weights[:, None])


def _grid_sum(rows: Rows) -> DoubleArray:
    """Every second row carries +ANCHOR, the others -ANCHOR, so most cancel without an operation of their own."""
    total = np.zeros(rows.shape[1])
    rounded = np.empty_like(total)
    anchor = ANCHOR
    for row in rows:
        rounded[:] = row
        rounded += anchor
        total += rounded
        anchor = -anchor
    if len(rows) % 2:
        total -= ANCHOR
    return total


def sorted_sum(rows: Rows) -> DoubleArray:
    """Sums over the first axis in ascending order of the values, so the order of the rows does not matter."""
    total = np.zeros(rows.shape[1])
    for row in np.sort(rows.astype(np.float64), axis=0):
        total += row
    return total
