"""Krum: the one vector that is nearest to its neighbours (arXiv 1703.02757). Robust, and merges nothing."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from datavector.layout import FloatArray
from datavector.merge.cohort import Block, Cohort, distances
from datavector.merge.registry import Range, method


def central(cohort: Cohort, *, byzantine: float) -> int:
    """Which hospital's squared distances to its nearest neighbours add up to the least."""
    hospitals = len(cohort)
    neighbours = max(1, hospitals - int(byzantine) - 2)
    nearest = np.sort(distances(cohort.gram), axis=1)[:, 1 : neighbours + 1]  # the first is its own: 0
    return int(np.argmin(nearest.sum(axis=1)))


@method("krum", prepare=central)
def krum(block: Block, chosen: int, *, byzantine: Annotated[float, Range(0, 1000, whole=True)] = 1) -> FloatArray:  # noqa: ARG001
    """The chosen hospital's vector.

    Args:
        block: one slice of one tensor of every vector.
        chosen: what `central` gave.
        byzantine: hospitals that may send anything.
    Returns:
        float32, shape (elements,).
    """
    vector: FloatArray = block.rows[chosen]
    return vector
