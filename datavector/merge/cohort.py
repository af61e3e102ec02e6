"""Everything that a merge method may look at: the hospitals' vectors as streams, and what is known of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from datavector.layout import FLOAT, FloatArray, TensorSpec
from datavector.merge.exact import exact_sum
from datavector.merge.parallel import in_threads

DoubleArray = NDArray[np.float64]

VALUES, LONGEST = 1 << 20, 1 << 17  # of a slice: of all vectors together, and of one


class Tensors(Protocol):
    """Named tensors, read as float32 in slices."""

    def read_slice(self, values: FloatArray, tensor: str, start: int) -> None:
        """Fills `values` with the elements of a tensor from `start` on."""


@dataclass(frozen=True, eq=False)
class Block:
    """One slice of one tensor of every vector.

    Attributes:
        rows: float32, shape (hospitals, elements).
        tensor: its name.
        start: element of the tensor at which the slice begins.
        statistics: float32, shape (hospitals, elements): the same slice of the hospitals' Fisher information, where the
            method reads it.
    """

    rows: FloatArray
    tensor: str = ""
    start: int = 0
    statistics: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class Cohort:
    """The vectors of a merge.

    Attributes:
        tensors: those that are merged, in order.
        sources: each hospital's vector.
        samples: each hospital's training images.
        keys: a text for each hospital that says whose vector it is: its digest, or its place.
        statistics: each hospital's, of the kind that the method reads; empty where it reads none.
    """

    tensors: tuple[TensorSpec, ...]
    sources: tuple[Tensors, ...]
    samples: tuple[int, ...]
    keys: tuple[str, ...]
    statistics: tuple[Tensors, ...] = ()

    def __len__(self) -> int:
        return len(self.sources)

    def slices(self, tensor: TensorSpec) -> Iterator[Block]:
        """All of a tensor, slice by slice; the rows are overwritten by the next one.

        Where slices are cut depends on the number of vectors alone, never on how work is divided.
        """
        length = max(min(LONGEST, VALUES // len(self)), 1)
        rows = np.empty((len(self), min(length, tensor.elements)), dtype=FLOAT)
        for start in range(0, tensor.elements, length):
            part = rows[:, : min(length, tensor.elements - start)]
            for source, row in zip(self.sources, part, strict=True):
                source.read_slice(row, tensor.name, start)
            yield Block(part, tensor.name, start)

    @cached_property
    def grams(self) -> dict[str, DoubleArray]:
        """By tensor the inner products of all vectors: float64, shape (hospitals, hospitals)."""
        names = [tensor.name for tensor in self.tensors]
        return dict(zip(names, in_threads(self._gram_of, self.tensors), strict=True))

    def _gram_of(self, tensor: TensorSpec) -> DoubleArray:
        total = np.zeros((len(self), len(self)))
        for block in self.slices(tensor):
            rows = block.rows.astype(np.float64)
            total += rows @ rows.T
        return (total + total.T) / 2

    @cached_property
    def gram(self) -> DoubleArray:
        """The inner products over all tensors together."""
        total = np.zeros((len(self), len(self)))
        for matrix in self.grams.values():
            total += matrix
        return total


@dataclass(frozen=True, eq=False)
class WholeTensor:
    """One tensor of every vector, which a method reads as it needs it."""

    spec: TensorSpec
    cohort: Cohort

    def read(self, hospital: int) -> FloatArray:
        """A hospital's tensor in its shape."""
        values: FloatArray = np.empty(self.spec.elements, dtype=FLOAT)
        self.cohort.sources[hospital].read_slice(values, self.spec.name, 0)
        return values.reshape(self.spec.shape)

    def sum(self) -> DoubleArray:
        """The exact, order-independent sum over hospitals, float64, in the tensor's shape."""
        total = np.empty(self.spec.elements)
        for block in self.cohort.slices(self.spec):
            total[block.start : block.start + block.rows.shape[1]] = exact_sum(block.rows)
        return total.reshape(self.spec.shape)


def draw_key(*parts: object) -> int:
    """A number of 128 bits that names a place for a random generator, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:16], "little")


def distances(gram: DoubleArray) -> DoubleArray:
    """Squared distances between all vectors, from their inner products."""
    norms = np.diag(gram)
    return np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0.0)


def cosines(gram: DoubleArray) -> DoubleArray:
    """Cosines between all vectors, from their inner products; 0 with a vector that is zero."""
    norms = np.sqrt(np.diag(gram))
    products = norms[:, None] * norms[None, :]
    shares: DoubleArray = np.divide(gram, products, out=np.zeros_like(gram), where=products > 0)
    return shares


def as_matrix(shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns of a weight as a matrix: outputs, and all inputs of each; None where that makes no sense.

    Vectors, and depthwise kernels (one input channel), are no matrices.
    """
    if len(shape) < 2 or shape[0] < 2 or shape[1] < 2:
        return None
    return shape[0], int(np.prod(shape[1:]))
