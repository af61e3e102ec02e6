"""What hospitals send beside their vectors where a method reads it: one safetensors file of each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from datavector.layout import Layout, TensorSpec
from datavector.merge.cohort import as_matrix
from datavector.model import BaseModel

FISHER, REGMEAN = "fisher", "regmean"
MOST_INPUTS = 8192  # a Gram matrix of as many is half a gigabyte in float64


def layout_of(kind: str, base: BaseModel) -> Layout:
    """The layout of a hospital's file of that kind, fully determined by the base model."""
    return _LAYOUTS[kind](base)


def _fisher(base: BaseModel) -> Layout:
    """The diagonal Fisher information of every tensor, in its shape."""
    return base.layout.with_metadata(format="datavector-fisher/1", base=base.digest)


def gram_inputs(shape: Sequence[int]) -> int:
    """Inputs of a weight of which there is a Gram matrix; 0 where it is no matrix, or has more than MOST_INPUTS."""
    matrix = as_matrix(shape)
    return matrix[1] if matrix and matrix[1] <= MOST_INPUTS else 0


def _regmean(base: BaseModel) -> Layout:
    """For each weight with `gram_inputs`, the Gram matrix of its inputs, (inputs, inputs)."""
    sizes = [(spec.name, gram_inputs(spec.shape)) for spec in base.layout.tensors]
    tensors = tuple(TensorSpec(name, (inputs, inputs)) for name, inputs in sizes if inputs)
    return Layout(tensors).with_metadata(format="datavector-regmean/1", base=base.digest)


_LAYOUTS: dict[str, Callable[[BaseModel], Layout]] = {FISHER: _fisher, REGMEAN: _regmean}
KINDS = tuple(_LAYOUTS)
