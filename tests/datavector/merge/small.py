"""Small merges: files of a few tensors, and each method written plainly, in float64, over whole arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datavector.files import sha256_file
from datavector.layout import TensorFile, write_tensors
from datavector.merge import MergeInput, merge_vectors
from datavector.merge.statistics import FISHER, REGMEAN, layout_of
from datavector.model import BaseModel, Input, save_base

SHAPES = {
    "bias": (5,),
    "conv.weight": (6, 4, 3, 3),
    "depthwise.weight": (8, 1, 3, 3),
    "head.weight": (3, 20),
    "norm.running_mean": (4,),
    "norm.running_var": (4,),
    "scalar": (),
    "wide.weight": (40, 500),
}


def small_base(folder: Path) -> BaseModel:
    random = np.random.default_rng(1)
    return save_base(
        folder,
        name="small",
        architecture="none",
        classes=("a", "b", "c"),
        input=Input(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        head_seed=0,
        pretrained="",
        tensors={name: np.abs(random.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()},
    )


def small_input(folder: Path, base: BaseModel, seed: int, scale: float = 0.01) -> MergeInput:
    """A hospital's vector with its statistics."""
    random = np.random.default_rng([7, seed])
    shared = np.random.default_rng(6)  # what all hospitals have in common
    folder.mkdir(parents=True, exist_ok=True)
    path, fisher, regmean = (folder / f"{seed}.{kind}" for kind in ("vector", "fisher", "regmean"))
    specs = base.layout.tensors
    taus = [scale * (shared.standard_normal(each.shape) + random.standard_normal(each.shape)) for each in specs]
    write_tensors(path, base.vector_layout, (tau.astype(np.float32) for tau in taus))
    write_tensors(fisher, layout_of(FISHER, base), (random.random(each.shape).astype(np.float32) for each in specs))
    layout = layout_of(REGMEAN, base)
    features = [random.standard_normal((2 * each.shape[0], each.shape[0])) for each in layout.tensors]
    write_tensors(regmean, layout, ((each.T @ each).astype(np.float32) for each in features))
    statistics = {FISHER: fisher, REGMEAN: regmean}
    return MergeInput(path, f"sha256:{sha256_file(path)}", 10 + seed, statistics)


def read(path: Path, layout):
    with TensorFile(path, layout) as file:
        return {spec.name: file.read(spec.name) for spec in layout.tensors}


def merged_bytes(base: BaseModel, inputs, output: Path, method: str, **parameters) -> bytes:
    merge_vectors(base, inputs, method, parameters, output)
    return output.read_bytes()


def matrix(array):
    """A weight as (outputs, inputs), or None where it is none."""
    if array.ndim < 2 or min(array.shape[:2]) < 2:
        return None
    return array.reshape(array.shape[0], -1)
