"""The closed-form head: a linear classifier on a merged backbone's features, from sums that hospitals give.

A hospital gives, per class, count and sum of its penultimate features, and their second moment over all classes. From
the sums over hospitals the head follows exactly, also where hospitals hold different classes; a hospital's part can be
taken out again by leaving its sums out. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DoubleArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Sums over one hospital's images of the features h that a merged backbone gives to its head.

    Attributes:
        counts: int64, shape (classes,): images of each class; 0 for a class with fewer than the floor.
        sums: float64, shape (classes, features): sum of h over each class's images.
        second: float64, shape (features, features): sum of h h^T over all the images that are counted; symmetric.
    """

    counts: NDArray[np.int64]
    sums: DoubleArray
    second: DoubleArray


def pool_features(moments: Sequence[FeatureMoments]) -> FeatureMoments:
    """The sums of everybody's images together. Any order of the same moments gives the same bits."""
    raise NotImplementedError


def solve_head(moments: FeatureMoments, *, strength: float = 1.0) -> tuple[DoubleArray, DoubleArray]:
    """Weight (classes, features) and bias (classes,) of the head, float64."""
    raise NotImplementedError
