"""Whether a vector is out of line with the others: figures for a person, who decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datavector.merge.engine import MergeInput
from datavector.model import BaseModel


@dataclass(frozen=True)
class Inspection:
    """What one vector looks like beside its cohort.

    Attributes:
        norm: Euclidean, over everything but BatchNorm statistics.
        norm_ratio: norm over the cohort's median.
        norm_deviation: distance of the norm from the median, in robust standard deviations (1.4826 x MAD).
        cosine: mean cosine to the other vectors; NaN where there is no other.
        sign_conflict: share of its weight (of absolute values) whose sign the others' sum contradicts.
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
    reason: str


def inspect_vectors(base: BaseModel, vectors: Sequence[MergeInput]) -> list[Inspection]:
    """Looks at all vectors of a merge together, as streams; one inspection each, in the order given."""
    raise NotImplementedError
