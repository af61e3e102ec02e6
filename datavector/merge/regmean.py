"""RegMean: the weights that answer most like every hospital's own, on its own inputs (arXiv 2212.09849).

Hospitals send the Gram matrix of each linear or convolutional layer's inputs beside the vector. Everything else, very
wide layers included, is the mean.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np

from datavector.layout import FLOAT, FloatArray
from datavector.merge.cohort import WholeTensor, as_matrix
from datavector.merge.registry import Range, Scale, method
from datavector.merge.statistics import REGMEAN, gram_inputs

RIDGE = 1e-6  # of the mean diagonal: inputs that no hospital has seen stay as they are


@method("regmean", whole=True, statistics=REGMEAN)
def regmean(tensor: WholeTensor, *, offdiagonal: Annotated[float, Range(0, 1)] = 0.9, scale: Scale = 1.0) -> FloatArray:
    """Solves (sum of G_j) W = sum of (G_j W_j) for the merged change of each weight.

    Args:
        tensor: of every vector, with the hospitals' Gram matrices G_j where it has them.
        offdiagonal: factor on the Gram matrices' off-diagonal elements.
        scale: factor on the result.
    Returns:
        float32, in the tensor's shape.
    """
    hospitals, shape = len(tensor.cohort), as_matrix(tensor.spec.shape)
    if shape is None or not gram_inputs(tensor.spec.shape):
        return (scale * tensor.sum() / hospitals).astype(FLOAT)
    total, answers = np.zeros((shape[1], shape[1])), np.zeros(shape)
    for hospital in range(hospitals):
        gram: FloatArray = np.empty(shape[1] ** 2, dtype=FLOAT)
        tensor.cohort.statistics[hospital].read_slice(gram, tensor.spec.name, 0)
        inner = np.multiply(gram.reshape(shape[1], shape[1]), offdiagonal, dtype=np.float64)
        np.fill_diagonal(inner, gram[:: shape[1] + 1])
        total += inner
        answers += tensor.read(hospital).reshape(shape) @ inner
    total[np.diag_indices(shape[1])] += RIDGE * np.trace(total) / shape[1] or 1.0
    return (scale * np.linalg.solve(total, answers.T).T).reshape(tensor.spec.shape).astype(FLOAT)
