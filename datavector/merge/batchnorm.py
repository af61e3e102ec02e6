"""Moments of BatchNorm inputs: what hospitals give so that a merged model's statistics can be restored.

A merged network's activations are distributed like no hospital's, so its BatchNorm statistics are measured anew
(REPAIR, arXiv 2211.08403). Per layer a hospital gives count, mean and variance of that layer's input; pooled by the
law of total variance they are exactly those of all images together. numpy only: the receiver pools, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datavector.errors import MergeError, NotFinite, WrongLayout
from datavector.layout import FLOAT, FloatArray
from datavector.merge.exact import sorted_sum
from datavector.model import BaseModel
from datavector.vector import open_vector

DoubleArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of one BatchNorm layer's input.

    Attributes:
        count: values per channel (images x height x width), at least 1.
        mean: float64, shape (channels,).
        variance: float64, shape (channels,), biased: the mean squared distance from the mean.
    Raises:
        WrongLayout: the shapes differ, or a count or variance is negative.
        NotFinite: a value is NaN or infinite.
    """

    count: int
    mean: DoubleArray
    variance: DoubleArray

    def __post_init__(self) -> None:
        remedy = "measure the moments again, with the weights that the task names"
        if self.mean.ndim != 1 or self.mean.shape != self.variance.shape:
            raise WrongLayout(
                f"BatchNorm moments have shapes {self.mean.shape} and {self.variance.shape}", remedy=remedy
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.variance).all()):
            raise NotFinite("BatchNorm moments hold NaN or infinity", remedy=remedy)
        if self.count < 1 or (self.variance < 0).any():
            raise WrongLayout("BatchNorm moments of no image, or of negative variance", remedy=remedy)


def pool(moments: Sequence[Moments]) -> Moments:
    """The moments of everybody's values together. Any order of the same moments gives the same bits.

    Raises:
        MergeError: there are none.
        WrongLayout: they are of layers with different numbers of channels.
    """
    if not moments:
        raise MergeError("there are no BatchNorm moments to pool", remedy="wait for a hospital's visit")
    if len({each.mean.shape for each in moments}) > 1:
        raise WrongLayout("BatchNorm moments are of different layers", remedy="pool the moments of one layer at a time")
    if len(moments) == 1:
        return moments[0]
    total = sum(each.count for each in moments)
    counts = np.array([each.count for each in moments], dtype=np.float64)[:, None]
    means = np.stack([each.mean for each in moments])
    variances = np.stack([each.variance for each in moments])
    mean = sorted_sum(counts * means) / total
    variance = sorted_sum(counts * (variances + np.square(means - mean))) / total
    return Moments(total, mean, variance)


def pool_layers(moments: Sequence[Mapping[str, Moments]]) -> dict[str, Moments]:
    """Pools what several hospitals measured, layer by layer; nothing where there is none of them."""
    return {layer: pool([each[layer] for each in moments]) for layer in (moments[0] if moments else {})}


def restore(moments: Mapping[str, Moments]) -> dict[str, FloatArray]:
    """The tensors that moments become, by name: `<layer>.running_mean` and `<layer>.running_var`, float32.

    The variance stays the biased one, which a network in training mode normalises with.
    """
    tensors: dict[str, FloatArray] = {}
    for layer, each in moments.items():
        tensors[f"{layer}.running_mean"] = each.mean.astype(FLOAT)
        tensors[f"{layer}.running_var"] = each.variance.astype(FLOAT)
    return tensors


def uploaded(base: BaseModel, vector: Path, sample_count: int) -> dict[str, Moments]:
    """The statistics of a hospital's own fine-tuned model, theta_pre + tau, weighted by its training images.

    Raises:
        WrongLayout: the file is no vector of this base.
    """
    with base.open() as pretrained, open_vector(vector, base) as difference:

        def tuned(name: str) -> DoubleArray:
            return pretrained.read(name).astype(np.float64) + difference.read(name)

        return {
            layer: Moments(
                sample_count,
                tuned(f"{layer}.running_mean"),
                np.maximum(tuned(f"{layer}.running_var"), 0.0),  # tau is rounded: tiny variances may fall below 0
            )
            for layer in base.batchnorm_layers
        }
