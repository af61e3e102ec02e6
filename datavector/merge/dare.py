"""DARE: each hospital drops many changes at random and rescales the rest (arXiv 2311.03099); then all are summed.

What a hospital drops depends on the seed, its vector's digest and the place in the tensor, on nothing else.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np

from datavector.layout import FLOAT, FloatArray
from datavector.merge.cohort import Block, Cohort, draw_key
from datavector.merge.exact import exact_sum
from datavector.merge.registry import Fraction, Range, Scale, method

PER_DRAW = 8  # 32-bit numbers of one step of Philox's counter


def keys_of(cohort: Cohort, *, density: float, seed: float, scale: float) -> tuple[str, ...]:  # noqa: ARG001
    """What names each hospital's vector."""
    return cohort.keys


@method("dare", prepare=keys_of, exact=True, keyed=True)
def dare(
    block: Block,
    keys: tuple[str, ...],
    *,
    density: Fraction = 0.5,
    seed: Annotated[float, Range(0, 2**31, whole=True)] = 0,
    scale: Scale = 1.0,
) -> FloatArray:
    """The sum of what is left after random drops, each hospital's divided by the density.

    Args:
        block: one slice of one tensor of every vector.
        keys: a text for each hospital.
        density: share of the changes that stay.
        seed: of the drops.
        scale: factor on the sum.
    Returns:
        float32, shape (elements,).
    """
    last = np.uint32(round(density * 2**32) - 1)
    kept = np.empty_like(block.rows)
    for row, key, target in zip(block.rows, keys, kept, strict=True):
        drawn = _draw(draw_key("dare", int(seed), key, block.tensor), block.start, len(row))
        np.multiply(row, drawn <= last, out=target)
    total = exact_sum(kept)
    total *= scale / density
    return total.astype(FLOAT)


def _draw(key: int, start: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """The random numbers of elements `start` to `start + count`, wherever a slice begins."""
    first, skipped = divmod(start, PER_DRAW)
    steps = -(-(skipped + count) // PER_DRAW)
    drawn = np.random.Philox(key=key, counter=first).random_raw(steps * PER_DRAW // 2)
    return drawn.view(np.uint32)[skipped : skipped + count]
