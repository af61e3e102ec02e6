"""Whether a vector is out of line with the others: figures for a person, who decides.

Norms and directions tell gross faults: values out of proportion, noise, a flipped sign. They do not tell a hospital
that trained on wrong labels: that is for the evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datavector.merge.cohort import Cohort, cosines
from datavector.merge.engine import MergeInput, open_cohort
from datavector.model import BaseModel

FEWEST = 3  # vectors of which one can be out of line with the others
TIMES = 3.0  # a norm may be so many times the median, or the median so many times it
DEVIATIONS = 5.0  # and so many robust standard deviations from the median
MAD = 1.4826  # from the median absolute deviation to a normal distribution's standard deviation
# Of three hospitals, two with much the same images would make the third look odd.
FEWEST_DIRECTIONS = 4
LEAST_COSINE = 0.1  # of the cohort's median mean cosine: noise has a thousandth of it, a flipped sign a negative one


@dataclass(frozen=True)
class Inspection:
    """What one vector looks like beside its cohort.

    Attributes:
        norm: Euclidean, over everything but BatchNorm statistics.
        norm_ratio: norm over the cohort's median.
        norm_deviation: distance of the norm from the median, in robust standard deviations (MAD).
        cosine: mean cosine to the other vectors; NaN where there is no other.
        sign_conflict: share of its weight (of absolute values) whose sign the others' sum contradicts; NaN alone.
        zeros: share of its values that are exactly 0.
        unchanged: tensors that are 0 throughout.
        reason: why it is out of line, as a sentence with the figure; empty where it is not.
    """

    norm: float
    norm_ratio: float
    norm_deviation: float
    cosine: float
    sign_conflict: float
    zeros: float
    unchanged: int
    reason: str = ""


def inspect_vectors(base: BaseModel, vectors: Sequence[MergeInput], gram: NDArray[np.float64]) -> list[Inspection]:
    """Looks at all vectors of a merge together, as streams.

    Args:
        gram: their inner products, as `gram_matrix` gives them.
    Returns:
        One inspection each, in the order given.
    """
    norms = np.sqrt(np.diag(gram))
    median = float(np.median(norms))
    spread = MAD * float(np.median(np.abs(norms - median)))
    means = _mean_cosines(gram)
    with open_cohort(base, vectors) as cohort:
        conflicts, zeros, unchanged = _values(cohort)
    inspections = []
    for index, norm in enumerate(norms):
        found = Inspection(
            norm=float(norm),
            norm_ratio=float(norm / median) if median else 1.0,
            norm_deviation=float(abs(norm - median) / spread) if spread else 0.0 if norm == median else float("inf"),
            cosine=float(means[index]),
            sign_conflict=float(conflicts[index]),
            zeros=float(zeros[index]),
            unchanged=int(unchanged[index]),
        )
        reason = _reason(found, means, len(vectors))
        inspections.append(Inspection(**{**vars(found), "reason": reason}))
    return inspections


def _reason(found: Inspection, means: NDArray[np.float64], hospitals: int) -> str:
    if found.zeros == 1.0:
        return f"all of its {found.unchanged} tensors are unchanged: nothing was learnt"
    if hospitals < FEWEST:
        return ""
    large, small = found.norm_ratio > TIMES, found.norm_ratio < 1 / TIMES
    if (large or small) and found.norm_deviation > DEVIATIONS:
        return f"its norm is {found.norm_ratio:.3g} times the median of {hospitals} vectors"
    usual = float(np.median(means))
    if hospitals >= FEWEST_DIRECTIONS and usual > 0 and found.cosine < LEAST_COSINE * usual:
        return (
            f"its mean cosine to the others is {found.cosine:.3f}, the median of {hospitals} vectors {usual:.3f}, and "
            f"the signs of {found.sign_conflict:.0%} of it contradict the others' sum"
        )
    return ""


def _mean_cosines(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    hospitals = len(gram)
    if hospitals < 2:
        return np.full(hospitals, np.nan)
    shares = cosines(gram)
    np.fill_diagonal(shares, 0)
    means: NDArray[np.float64] = shares.sum(axis=1) / (hospitals - 1)
    return means


def _values(cohort: Cohort) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Sign conflicts, shares of zeros, and unchanged tensors, of each vector."""
    hospitals = len(cohort)
    against, weight, zeros, unchanged = (np.zeros(hospitals) for _ in range(4))
    for spec in cohort.tensors:
        changed = np.zeros(hospitals, dtype=bool)
        for block in cohort.slices(spec):
            rows = block.rows
            nothing = rows == 0
            zeros += nothing.sum(axis=1)
            changed |= ~nothing.all(axis=1)
            others = rows.sum(axis=0, dtype=np.float64) - rows
            size = np.abs(rows, dtype=np.float64)
            weight += size.sum(axis=1)
            against += np.where(others * rows < 0, size, 0).sum(axis=1)
        unchanged += ~changed & (spec.elements > 0)
    elements = sum(spec.elements for spec in cohort.tensors)
    conflicts = against / np.maximum(weight, np.finfo(np.float64).tiny) if hospitals > 1 else np.full(1, np.nan)
    return conflicts, zeros / max(elements, 1), unchanged.astype(np.int64)
