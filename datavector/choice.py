"""Which candidate becomes the merged model: hospitals evaluate, counts are summed, a rule decides.

Pure: no file, no clock. A hospital gives a confusion matrix for each candidate, over its own validation images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datavector.metrics import Confusion

BINS = 10  # of confidence, for the reliability diagram
SINGLE = "hospital."  # how the name of a hospital's own model begins, beside the candidates


@dataclass(frozen=True, eq=False)
class Counts:
    """What one hospital found for one model on its validation images.

    Attributes:
        confusion: int64, shape (classes, classes): images by class (row) and prediction (column).
        bins: float64, shape (BINS, 3): by confidence, images, those recognised, and the sum of their confidences.
    """

    confusion: Confusion
    bins: NDArray[np.float64]


Evaluations = Mapping[str, Mapping[str, Counts]]
"""By hospital and model: a candidate's name, or SINGLE and the name of the hospital whose own model it is."""


@dataclass(frozen=True)
class Score:
    """A model's result, as shares of 1, on everybody's validation images together and on each hospital's.

    Attributes:
        hospitals: by hospital: images, accuracy, balanced accuracy.
    """

    name: str
    images: int
    accuracy: float
    balanced_accuracy: float
    hospitals: Mapping[str, tuple[int, float, float]]


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        chosen: name of a candidate.
        validated: whether enough hospitals evaluated it.
        reason: why it, as a sentence.
        margin: of error of the best candidate's balanced accuracy, as a share of 1.
        hospitals: who evaluated, sorted.
        scores: of the candidates, in the order given.
        singles: of the hospitals' own models.
        worse_than: the best single, where it is better than the chosen candidate on accuracy or balanced accuracy by
            more than nothing; empty otherwise, or where singles were not evaluated.
    """

    chosen: str
    validated: bool
    reason: str
    margin: float
    hospitals: tuple[str, ...]
    scores: tuple[Score, ...]
    singles: tuple[Score, ...]
    worse_than: str


def choose_candidate(
    evaluations: Evaluations, candidates: Sequence[str], singles: Sequence[str], *, fallback: str, needed: int
) -> Choice:
    """Chooses by balanced accuracy of the summed counts.

    Args:
        candidates: names, the simplest (or preferred) first.
        singles: names of hospitals' own models; may be empty.
        fallback: the candidate where fewer than `needed` hospitals have evaluated every one.
    """
    raise NotImplementedError
