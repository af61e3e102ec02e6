from pathlib import Path

import numpy as np
import pytest

from datavector.model import BaseModel, Input, save_base
from datavector.vector import write_vector


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A base model of a few tensors, one of them longer than a block, with a BatchNorm layer."""
    random = np.random.default_rng(1)
    shapes = {
        "body.weight": (70, 1000),
        "empty.weight": (0, 3),
        "norm.bias": (4,),
        "norm.running_mean": (4,),
        "norm.running_var": (4,),
        "scalar": (),
    }
    tensors = {name: np.abs(random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    return save_base(
        tmp_path_factory.mktemp("base"),
        name="small",
        architecture="none",
        classes=("a", "b"),
        input=Input(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        head_seed=0,
        pretrained="",
        tensors=tensors,
    )


@pytest.fixture(scope="session")
def vectors(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Vectors of five hospitals."""
    folder = tmp_path_factory.mktemp("vectors")
    paths = []
    with base.open() as pretrained:
        for index in range(5):
            random = np.random.default_rng(100 + index)
            tuned = {
                spec.name: pretrained.read(spec.name) + np.abs(random.normal(0, 0.01, spec.shape)).astype(np.float32)
                for spec in base.layout.tensors
            }
            paths.append(folder / f"{index}.safetensors")
            write_vector(paths[-1], base, tuned)
    return paths
