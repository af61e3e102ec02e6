"""What hospitals send beside their vectors where a method reads it: one safetensors file of each kind."""

from __future__ import annotations

from collections.abc import Callable

from datavector.layout import Layout, TensorSpec
from datavector.merge.cohort import as_matrix
from datavector.model import BaseModel

FISHER, REGMEAN = "fisher", "regmean"


def layout_of(kind: str, base: BaseModel) -> Layout:
    """The layout of a hospital's file of that kind, fully determined by the base model."""
    return _LAYOUTS[kind](base)


def _fisher(base: BaseModel) -> Layout:
    """The diagonal Fisher information of every tensor, in its shape."""
    return base.layout.with_metadata(format="datavector-fisher/1", base=base.digest)


def _regmean(base: BaseModel) -> Layout:
    """For each weight that is a matrix, the Gram matrix of its inputs, (inputs, inputs)."""
    matrices = [(spec.name, as_matrix(spec.shape)) for spec in base.layout.tensors]
    tensors = tuple(TensorSpec(name, (shape[1], shape[1])) for name, shape in matrices if shape is not None)
    return Layout(tensors).with_metadata(format="datavector-regmean/1", base=base.digest)


_LAYOUTS: dict[str, Callable[[BaseModel], Layout]] = {FISHER: _fisher, REGMEAN: _regmean}
KINDS = tuple(_LAYOUTS)
