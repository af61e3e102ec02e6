"""Clinical metrics, all of them from a confusion matrix: its counts sum over hospitals, and no image is behind one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Confusion = NDArray[np.int64]


@dataclass(frozen=True)
class ClassMetrics:
    """How well one class is told from all others.

    Attributes:
        sensitivity: share of its images that were recognised (recall); NaN where there are none.
        specificity: share of the other classes' images that were not taken for it; NaN where there are none.
        support: its images.
    """

    sensitivity: float
    specificity: float
    support: int


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, classes: int) -> Confusion:
    """Counts images by class (row) and prediction (column).

    Args:
        labels, predictions: integers in 0..classes-1, shape (images,).
    Returns:
        int64, shape (classes, classes).
    Raises:
        ValueError: shapes differ, or a value is out of range.
    """
    rows, columns = np.asarray(labels, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
    if rows.shape != columns.shape or rows.ndim != 1:
        raise ValueError(f"labels have shape {rows.shape}, predictions {columns.shape}")
    for values in (rows, columns):
        if values.size and not 0 <= values.min() <= values.max() < classes:
            raise ValueError(f"values reach from {values.min()} to {values.max()}, but there are {classes} classes")
    return np.bincount(rows * classes + columns, minlength=classes * classes).reshape(classes, classes)


def accuracy(confusion: Confusion) -> float:
    """Share of all images whose class was recognised; NaN where there are none."""
    return _share(int(np.trace(confusion)), int(confusion.sum()))


def balanced_accuracy(confusion: Confusion) -> float:
    """Mean sensitivity over the classes that are present; NaN where none is."""
    support = confusion.sum(axis=1)
    present = support > 0
    return float(np.mean(np.diag(confusion)[present] / support[present])) if present.any() else float("nan")


def per_class(confusion: Confusion) -> list[ClassMetrics]:
    """Each class against all others, in the classes' order."""
    total, support, predicted = int(confusion.sum()), confusion.sum(axis=1), confusion.sum(axis=0)
    return [
        ClassMetrics(
            sensitivity=_share(int(hit), int(own)),
            specificity=_share(int(total - own - (claimed - hit)), int(total - own)),
            support=int(own),
        )
        for hit, own, claimed in zip(np.diag(confusion), support, predicted, strict=True)
    ]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


BINS = 10  # of confidence


def reliability(labels: ArrayLike, probabilities: ArrayLike) -> NDArray[np.float64]:
    """How sure a model was, and how often it was right then (a reliability diagram's data; arXiv 1706.04599).

    Args:
        labels: integers, shape (images,).
        probabilities: shape (images, classes).
    Returns:
        float64, shape (BINS, 3): by confidence, in equal steps from 0 to 1: images, those recognised, and the sum of
        the confidences.
    """
    truth, sure = np.asarray(labels, dtype=np.int64), np.asarray(probabilities, dtype=np.float64)
    bins = np.zeros((BINS, 3))
    if len(truth):
        confidence, right = sure.max(axis=1), sure.argmax(axis=1) == truth
        places = np.clip((confidence * BINS).astype(np.int64), 0, BINS - 1)
        np.add.at(bins, places, np.stack([np.ones(len(truth)), right, confidence], axis=1))
    return bins


def calibration_error(bins: NDArray[np.float64]) -> float:
    """Expected calibration error: by how much confidence and accuracy differ, over all images; NaN without any."""
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum()) if bins[:, 0].sum() else float("nan")
