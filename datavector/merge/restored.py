"""Merged weights with some tensors replaced: restored BatchNorm statistics, a closed-form head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from datavector.layout import FloatArray, TensorFile, write_tensors
from datavector.model import BaseModel


def write_restored(path: Path, base: BaseModel, merged: Path, replaced: Mapping[str, FloatArray]) -> None:
    """Copies merged weights with the tensors in `replaced` put in their places, atomically.

    Raises:
        WrongLayout: the weights are of another model, or a tensor has another shape.
        DiskFull: no space is left.
    """
    with TensorFile(merged, base.layout) as weights:
        names = (spec.name for spec in base.layout.tensors)
        write_tensors(path, base.layout, (replaced[name] if name in replaced else weights.read(name) for name in names))
