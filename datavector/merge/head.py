"""The closed-form head: a linear classifier on a merged backbone's features, from sums that hospitals give.

A hospital gives, per class, count and sum of its penultimate features, and their second moment over all classes. The
sums over hospitals and the merged head determine it, also where hospitals hold different classes; a hospital's sums can
be left out again exactly, as long as the merged model is the same. numpy only.

It is a ridge regression on the classes (Hoerl and Kennard, doi 10.1080/00401706.1970.10488634) in which each
class weighs the same, however many images it has: classes are taken to share one covariance around their means. It is
drawn to the merged head instead of to zero (targeted ridge regression, arXiv 1509.09169).
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


def solvable(moments: FeatureMoments) -> bool:
    """Whether there is anything to tell apart: images of two classes or more."""
    return int(np.count_nonzero(moments.counts)) >= 2


def solve_head(
    moments: FeatureMoments, weight: FloatArray, bias: FloatArray, *, strength: float
) -> tuple[FloatArray, FloatArray]:
    """The head that the moments determine, starting from the merged one.

    A class without images keeps the merged head's answers relative to the other classes', scaled to the new ones.
    Classes with images do not use the merged bias.

    Args:
        moments: of everybody together.
        weight: of the merged head, shape (classes, features).
        bias: of the merged head, shape (classes,).
        strength: how strongly the result is drawn to the merged head: in units of the features' mean variance.
    Returns:
        float32: weight, shape (classes, features), and bias, shape (classes,). With n classes that have images, their
        logits fit n for an image's own class and 0 for the others, less 1, by least squares: then probabilities are
        about right where classes are hard to tell apart.
    Raises:
        MergeError: fewer than two classes have images.
        WrongLayout: the merged head is of another model.
        NotFinite: the moments are too large for an answer, or the strength is too small.
    """
    if not solvable(moments):
        given = f"{np.count_nonzero(moments.counts)} of {len(moments.counts)} classes"
        raise MergeError(
            f"features came of {given}, and a head needs two", remedy="lower head.floor, or set head.mode to merged"
        )
    if weight.shape != moments.sums.shape or bias.shape != moments.counts.shape:
        raise WrongLayout(
            f"the merged head has shapes {weight.shape} and {bias.shape}, the features' sums {moments.sums.shape}",
            remedy="solve with the features of the same merged model",
        )
    present = moments.counts > 0
    counts = moments.counts[present]
    classes, features = len(counts), moments.sums.shape[1]
    means = moments.sums[present] / counts[:, None]
    centre = means.mean(axis=0)
    offsets = means - centre  # they sum to zero, and so do the logits of the classes with images
    within = (moments.second - means.T @ (counts[:, None] * means)) / counts.sum()
    # Features that hardly vary leave rounding errors; with as much on the diagonal no variance is below them.
    rounding = np.finfo(np.float64).eps * np.trace(moments.second) / counts.sum()
    covariance = within + offsets.T @ offsets / classes + rounding * np.eye(features)
    cross = offsets / classes  # covariance of the classes, as 0 and 1, and the features

    # The classes with images: a ridge regression on what the merged head's answers miss.
    merged = weight - weight[present].mean(axis=0, dtype=np.float64)
    target = max(_fit(merged[present], cross, covariance), 0.0) * merged[present]  # 0 where it is mostly wrong
    shrinkage = strength * (np.trace(covariance) / features or 1.0)
    missed = cross - target @ covariance
    solved = target + np.linalg.solve(covariance + shrinkage * np.eye(features), missed.T).T
    solved *= classes * _fit(solved, cross, covariance)  # shrinkage had made its answers too small

    # Those without keep the merged rows, at the size of the solved ones.
    before, after = _spread(merged[present], covariance), _spread(solved, covariance)
    size = np.sqrt(after / before) if before > 0 else 1.0
    answers = weight @ centre + bias
    all_weights = size * merged
    all_weights[present] = solved
    # At the centre the classes with images are equally likely.
    at_centre = np.where(present, 0.0, size * (answers - answers[present].mean()))
    found = all_weights.astype(FLOAT), (at_centre - all_weights @ centre).astype(FLOAT)
    if not all(np.isfinite(each).all() for each in found):
        raise NotFinite("the closed-form head is not finite", remedy="raise head.strength, or set head.mode to merged")
    return found


def _fit(weight: DoubleArray, cross: DoubleArray, covariance: DoubleArray) -> float:
    """The factor with which the weight's answers fit the classes best, by least squares; 0 where it has none."""
    spread = _spread(weight, covariance)
    return float(np.sum(weight * cross) / spread) if spread > 0 else 0.0


def _spread(weight: DoubleArray, covariance: DoubleArray) -> float:
    """The sum of the variances of the weight's answers."""
    return float(np.sum((weight @ covariance) * weight))


def _sum(arrays: Sequence[DoubleArray]) -> DoubleArray:
    """The sum of matrices, in any order; row by row, so hardly any memory is taken beside them."""
    total = np.zeros(arrays[0].shape)
    for row, *parts in zip(total, *arrays, strict=True):
        row[:] = sorted_sum(np.stack(parts))
    return total
