"""TIES: trim small changes, elect a sign, average those that agree with it (arXiv 2306.01708).

A hospital's small changes are told by its own vector alone, tensor by tensor, so the thresholds need one pass over each
file, and the merge one more.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from datavector.layout import FLOAT, FloatArray, TensorSpec
from datavector.merge.cohort import Block, Cohort, Tensors
from datavector.merge.exact import exact_sum
from datavector.merge.parallel import in_threads
from datavector.merge.registry import Fraction, Scale, method

SELECTED = 1 << 22  # elements of a tensor that are selected from in memory: 16 MiB
HALF = 1 << 16  # a larger one's values are found by their bits, in two steps of 16 each
PASS = 1 << 18  # elements read at once

Thresholds = Mapping[str, FloatArray]
"""By tensor the smallest magnitude that each hospital keeps: float32, shape (hospitals, 1)."""


def thresholds_of(cohort: Cohort, *, density: float, scale: float) -> Thresholds:  # noqa: ARG001
    """What each hospital keeps of each tensor: the `density` largest magnitudes, at least one."""

    def of(tensor: TensorSpec) -> FloatArray:
        keep = max(1, int(density * tensor.elements))
        return np.array([[kth_largest(source, tensor, keep)] for source in cohort.sources], dtype=FLOAT)

    found = in_threads(of, cohort.tensors)
    return {tensor.name: values for tensor, values in zip(cohort.tensors, found, strict=True)}


def kth_largest(source: Tensors, tensor: TensorSpec, k: int) -> float:
    """The k-th largest magnitude of a tensor, exactly, in bounded memory.

    Without their sign, float32 are ordered as their bits are: of a large tensor one pass counts the upper 16 bits, a
    second the lower 16 of those values whose upper bits are the wanted ones.
    """
    if not tensor.elements:
        return 0.0
    if tensor.elements <= SELECTED:
        return _select(source, tensor, k)
    upper, above = _bin_of(_histogram(source, tensor, None), k)
    lower, _ = _bin_of(_histogram(source, tensor, upper), k - above)
    return float(np.array([(upper << 16) | lower], dtype=np.uint32).view(FLOAT)[0])


def _select(source: Tensors, tensor: TensorSpec, k: int) -> float:
    values: FloatArray = np.empty(tensor.elements, dtype=FLOAT)
    source.read_slice(values, tensor.name, 0)
    np.abs(values, out=values)
    values.partition(tensor.elements - k)
    return float(values[tensor.elements - k])


def _histogram(source: Tensors, tensor: TensorSpec, upper: int | None) -> NDArray[np.int64]:
    counts = np.zeros(HALF, dtype=np.int64)
    buffer = np.empty(min(PASS, tensor.elements), dtype=FLOAT)
    for start in range(0, tensor.elements, PASS):
        values = buffer[: min(PASS, tensor.elements - start)]
        source.read_slice(values, tensor.name, start)
        bits = values.view(np.uint32)
        bits &= 0x7FFFFFFF
        part = bits >> 16 if upper is None else bits[bits >> 16 == upper] & 0xFFFF
        counts += np.bincount(part, minlength=HALF)
    return counts


def _bin_of(counts: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bin of the k-th largest, and how many are in the bins above it."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k))
    return HALF - 1 - place, int(from_top[place] - counts[HALF - 1 - place])


@method("ties", prepare=thresholds_of, exact=True)
def ties(block: Block, thresholds: Thresholds, *, density: Fraction = 0.2, scale: Scale = 1.0) -> FloatArray:  # noqa: ARG001
    """Trims each hospital's changes, elects each element's sign by the sum, and averages the changes of that sign.

    Args:
        block: one slice of one tensor of every vector.
        thresholds: what `thresholds_of` gave.
        density: share of each tensor that a hospital keeps, the largest magnitudes.
        scale: factor on the result.
    Returns:
        float32, shape (elements,).
    """
    kept = block.rows  # overwritten: fresh arrays of this size would cost more than what is computed in them
    rising = np.abs(kept)
    kept *= rising >= thresholds[block.tensor]
    np.maximum(kept, 0, out=rising)
    falling = np.minimum(kept, 0, out=kept)
    rise, fall = exact_sum(rising), exact_sum(falling)
    rises = rise + fall >= 0
    total = rise * rises + fall * ~rises
    total *= scale
    total /= np.maximum(_count(rising) * rises + _count(falling) * ~rises, 1)
    return total.astype(FLOAT)


def _count(rows: FloatArray) -> NDArray[np.uint32]:
    """How many hospitals' values are not 0. Faster than numpy's count over an axis."""
    found: NDArray[np.uint32] = (rows != 0).view(np.uint8).sum(axis=0, dtype=np.uint32)
    return found
