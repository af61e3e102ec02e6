"""The closed-form head: a linear classifier on a merged backbone's features, from sums that hospitals give.

A hospital gives, per class, count and sum of its penultimate features, and their second moment over all classes. From
the sums over hospitals the head follows exactly, also where hospitals hold different classes; a hospital's part can be
taken out again by leaving its sums out. numpy only.

The head is a ridge regression on the classes (Hoerl and Kennard, doi 10.1080/00401706.1970.10488634) in which each
class weighs the same, however many images it has: classes are taken to share one covariance around their means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datavector.errors import MergeError, NotFinite, WrongLayout
from datavector.layout import FLOAT, FloatArray
from datavector.merge.exact import sorted_sum

DoubleArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Sums over one hospital's images of the features h that a merged backbone gives to its head.

    Attributes:
        counts: int64, shape (classes,): images of each class; 0 for a class with fewer than the floor.
        sums: float64, shape (classes, features): sum of h over each class's images.
        second: float64, shape (features, features): sum of h h^T over all the images that are counted; symmetric.
    Raises:
        WrongLayout: the shapes do not belong together, or a count is negative.
        NotFinite: a value is NaN or infinite.
    """

    counts: NDArray[np.int64]
    sums: DoubleArray
    second: DoubleArray

    def __post_init__(self) -> None:
        remedy = "measure the features again, with the weights that the task names"
        classes, features = self.sums.shape if self.sums.ndim == 2 else (-1, -1)
        if self.counts.shape != (classes,) or self.second.shape != (features, features) or (self.counts < 0).any():
            raise WrongLayout(
                f"feature moments have shapes {self.counts.shape}, {self.sums.shape} and {self.second.shape}, "
                "or a negative count",
                remedy=remedy,
            )
        if not (np.isfinite(self.sums).all() and np.isfinite(self.second).all()):
            raise NotFinite("feature moments hold NaN or infinity", remedy=remedy)


def pool_features(moments: Sequence[FeatureMoments]) -> FeatureMoments:
    """The sums of everybody's images together. Any order of the same moments gives the same bits.

    Raises:
        MergeError: there are none, or they are of different models.
    """
    if not moments or len({each.sums.shape for each in moments}) > 1:
        raise MergeError(
            "there are no feature moments, or of different models", remedy="pool those of one merged model"
        )
    counts: NDArray[np.int64] = np.sum([each.counts for each in moments], axis=0)
    return FeatureMoments(counts, _sum([each.sums for each in moments]), _sum([each.second for each in moments]))


def missing_classes(moments: FeatureMoments) -> list[int]:
    """The classes of which there is no image; with one of them there is no head."""
    return [int(index) for index in np.flatnonzero(moments.counts == 0)]


def solve_head(moments: FeatureMoments, *, strength: float = 1.0) -> tuple[FloatArray, FloatArray]:
    """The head that the moments determine.

    Args:
        moments: of everybody together; every class has images.
        strength: shrinkage of the covariance: added to its diagonal, in units of its mean diagonal element.
    Returns:
        float32: weight, shape (classes, features), and bias, shape (classes,).
    Raises:
        MergeError: a class has no image.
    """
    if missing := missing_classes(moments):
        raise MergeError(
            f"nobody gave features of {len(missing)} classes", remedy="lower head.floor, or keep the merged head"
        )
    classes, features = moments.sums.shape
    means = moments.sums / moments.counts[:, None]
    within = (moments.second - means.T @ (moments.counts[:, None] * means)) / moments.counts.sum()
    centre = means.mean(axis=0)
    offsets = means - centre  # the centre only moves all logits by the same amount: taken out for precision
    covariance = within + offsets.T @ offsets / classes
    rounding = np.finfo(np.float64).eps * np.trace(moments.second) / moments.counts.sum()
    covariance[np.diag_indices(features)] += strength * (max(np.trace(covariance), rounding) or 1.0) / features
    weight = np.linalg.solve(covariance, offsets.T).T
    # A regression's answers are within [0, 1]: made as sure as a discriminant of the projected classes is.
    gaps, spreads = np.sum(weight * offsets), np.sum((weight @ covariance) * weight)
    weight = (gaps / spreads if spreads > 0 else 1.0) * weight
    return weight.astype(FLOAT), (-weight @ centre).astype(FLOAT)


def _sum(arrays: Sequence[DoubleArray]) -> DoubleArray:
    """The sum of matrices, in any order; row by row, so hardly any memory is taken beside them."""
    total = np.zeros(arrays[0].shape)
    for row, *parts in zip(total, *arrays, strict=True):
        row[:] = sorted_sum(np.stack(parts))
    return total
