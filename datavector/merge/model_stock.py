"""Model Stock: the mean, drawn towards the base the more, the less the vectors agree (arXiv 2403.19522, section 4)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from datavector.layout import FLOAT, FloatArray
from datavector.merge.cohort import Block, Cohort, DoubleArray, cosines
from datavector.merge.exact import exact_sum
from datavector.merge.registry import Scale, method


def ratios(cohort: Cohort, *, scale: float) -> Mapping[str, float]:  # noqa: ARG001
    """By tensor how much of the mean is taken: N cos / (1 + (N - 1) cos), of the mean cosine between two vectors."""
    return {name: _ratio(gram) for name, gram in cohort.grams.items()}


def _ratio(gram: DoubleArray) -> float:
    hospitals = len(gram)
    if hospitals == 1:
        return 1.0
    cosine = float(np.clip(cosines(gram)[np.triu_indices(hospitals, 1)], -1, 1).mean())
    below = 1 + (hospitals - 1) * cosine
    return hospitals * cosine / below if below > 0 else 0.0


@method("model-stock", prepare=ratios)
def model_stock(block: Block, ratios: Mapping[str, float], *, scale: Scale = 1.0) -> FloatArray:
    """The mean times its tensor's ratio.

    Args:
        block: one slice of one tensor of every vector.
        ratios: what `ratios` gave.
        scale: factor on the result.
    Returns:
        float32, shape (elements,).
    """
    total = exact_sum(block.rows)
    total *= scale * ratios[block.tensor] / len(block.rows)
    return total.astype(FLOAT)
