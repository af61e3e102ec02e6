"""Iso-C: the summed change of each weight matrix with all its singular values made equal (arXiv 2502.04959, section 4).

The paper sets them to their mean; here they are set so that the matrix keeps the Frobenius norm of the sum, which suits
data vectors better. What is no matrix (biases, norms, depthwise kernels) is the plain sum.
"""

from __future__ import annotations

import numpy as np

from datavector.layout import FLOAT, FloatArray
from datavector.merge.cohort import DoubleArray, WholeTensor, as_matrix
from datavector.merge.registry import Scale, method

SMALLEST = 1e-12  # eigenvalue over the largest, below which a direction is rounding


@method("iso-c", whole=True, exact=True)
def iso_c(tensor: WholeTensor, *, scale: Scale = 1.0) -> FloatArray:
    """The isotropic sum.

    Args:
        tensor: of every vector.
        scale: factor on the result.
    Returns:
        float32, in the tensor's shape.
    """
    total = tensor.sum()
    if (shape := as_matrix(tensor.spec.shape)) is not None:
        total = isotropic(total.reshape(shape)).reshape(total.shape)
    total *= scale
    return total.astype(FLOAT)


def isotropic(matrix: DoubleArray) -> DoubleArray:
    """A matrix of the same singular vectors and the same Frobenius norm, whose singular values are all equal.

    U V^T is M (M^T M)^(-1/2), taken from the smaller side; directions that are only rounding stay zero.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return isotropic(matrix.T).T
    largest = max(matrix.max(initial=0.0), -matrix.min(initial=0.0))
    if largest == 0:
        return matrix
    scaled = matrix / largest
    values, vectors = np.linalg.eigh(scaled @ scaled.T)
    used = values > SMALLEST * values[-1]
    vectors, values = vectors[:, used], values[used]
    polar: DoubleArray = (vectors / np.sqrt(values)) @ vectors.T @ scaled
    polar *= np.sqrt(values.sum() / len(values)) * largest
    return polar
