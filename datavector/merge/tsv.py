"""TSV: each hospital's leading singular vectors, made orthogonal to the others' (arXiv 2412.00081, section 5).

What is no matrix (biases, norms, depthwise kernels) is the mean, as in the paper.
"""

from __future__ import annotations

import numpy as np

from datavector.layout import FLOAT, FloatArray
from datavector.merge.cohort import DoubleArray, WholeTensor, as_matrix
from datavector.merge.registry import Scale, method


@method("tsv", whole=True)
def tsv(tensor: WholeTensor, *, scale: Scale = 1.0) -> FloatArray:
    """Sums the hospitals' leading components after taking their interference away.

    Args:
        tensor: of every vector.
        scale: factor on the result.
    Returns:
        float32, in the tensor's shape.
    """
    hospitals, shape = len(tensor.cohort), as_matrix(tensor.spec.shape)
    if shape is None:
        return (scale * tensor.sum() / hospitals).astype(FLOAT)
    kept = max(1, min(shape) // hospitals)
    left, values, right = [], [], []
    for hospital in range(hospitals):
        u, s, v = np.linalg.svd(tensor.read(hospital).reshape(shape).astype(np.float64), full_matrices=False)
        left.append(u[:, :kept])
        values.append(s[:kept])
        right.append(v[:kept])
    merged = (_orthogonal(np.hstack(left)) * np.concatenate(values)) @ _orthogonal(np.vstack(right))
    result: FloatArray = (scale * merged).reshape(tensor.spec.shape).astype(FLOAT)
    return result


def _orthogonal(matrix: DoubleArray) -> DoubleArray:
    """The nearest matrix with orthonormal columns (or rows)."""
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    nearest: DoubleArray = u @ v
    return nearest
