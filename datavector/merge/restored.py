"""Weights made of others: merged ones with some tensors replaced (statistics, a head), a hospital's own model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from datavector.layout import FloatArray, TensorFile, write_tensors
from datavector.model import BaseModel
from datavector.vector import open_vector


def write_restored(path: Path, base: BaseModel, merged: Path, replaced: Mapping[str, FloatArray]) -> None:
    """Copies merged weights with the tensors in `replaced` put in their places, atomically.

    Raises:
        WrongLayout: the weights are of another model, or a tensor has another shape.
        DiskFull: no space is left.
    """
    with TensorFile(merged, base.layout) as weights:
        names = (spec.name for spec in base.layout.tensors)
        write_tensors(path, base.layout, (replaced[name] if name in replaced else weights.read(name) for name in names))


def tuned_tensors(base: BaseModel, vector: Path) -> Iterator[FloatArray]:
    """A hospital's own model: the pretrained weights and its vector, statistics included; in the layout's order.

    Raises:
        WrongLayout: the file is no vector of this base.
    """
    with base.open() as pretrained, open_vector(vector, base) as difference:
        for spec in base.layout.tensors:
            yield pretrained.read(spec.name) + difference.read(spec.name)


def write_tuned(path: Path, base: BaseModel, vector: Path) -> None:
    """A hospital's own model, as `tuned_tensors` gives it, in a file.

    Raises:
        WrongLayout: the file is no vector of this base.
        DiskFull: no space is left.
    """
    write_tensors(path, base.layout, tuned_tensors(base, vector))
