"""What a visit gives for the closed-form head: sums of features by class, never of a class with few images."""

from __future__ import annotations

import numpy as np
import torch

from datavector.merge.head import FeatureMoments


def class_moments(features: torch.Tensor, labels: torch.Tensor, classes: int, *, floor: int) -> FeatureMoments:
    """Count and sum of the features of each class, and the second moment over all of them.

    A class with fewer images than `floor` is left out altogether: a sum over one image is that image's features.

    Args:
        features: what the head takes, shape (images, features).
        labels: int64, shape (images,).
    """
    counts = torch.bincount(labels, minlength=classes)
    counts[counts < floor] = 0
    counted = counts[labels] > 0
    values = features[counted].double()
    sums = torch.zeros((classes, features.shape[1]), dtype=torch.float64).index_add_(0, labels[counted], values)
    return FeatureMoments(counts.numpy().astype(np.int64), sums.numpy(), (values.T @ values).numpy())
