"""The base model artifact: the pretrained classifier that every hospital starts from.

A folder with `base.safetensors` (all floating-point tensors, BatchNorm statistics included) and `base.json`
(architecture, classes, input, tensor layout, digests). It is content-addressed: the digest covers both files, and
loading verifies it. Nothing here needs torch; `datavector.networks` turns an artifact into a network.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datavector.errors import BaseModelError, WrongLayout
from datavector.files import canonical_json, sha256_file, write_json
from datavector.layout import FloatArray, Layout, TensorFile, TensorSpec, write_tensors

FORMAT = "datavector-base/1"
DIGEST = re.compile("sha256:[0-9a-f]{64}")
DESCRIPTION = "base.json"
WEIGHTS = "base.safetensors"
FILES = (DESCRIPTION, WEIGHTS)


@dataclass(frozen=True)
class Input:
    """What the network takes: RGB images of `size` x `size` pixels, scaled to 0..1, then normalised per channel."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class BaseModel:
    """A verified base model artifact.

    Attributes:
        name: what policies call it.
        architecture: a name that `datavector.networks` can build.
        classes: label of each output, in order.
        head_seed: seed that initialised the new classification head, the same for every hospital.
        pretrained: SHA-256 of the pretrained weights, or "" for random ones.
        digest: "sha256:<hex>" over the description, which holds the weights' digest.
    """

    path: Path
    name: str
    architecture: str
    classes: tuple[str, ...]
    input: Input
    head_seed: int
    pretrained: str
    layout: Layout
    digest: str

    @classmethod
    def load(cls, path: Path, *, digest: str | None = None) -> BaseModel:
        """Reads and verifies an artifact.

        Args:
            digest: if given, the artifact must be this one.

        Raises:
            BaseModelError: files are missing, altered, or not the demanded artifact.
        """
        description = _read_description(path)
        weights = path / WEIGHTS
        if not weights.is_file() or sha256_file(weights) != description.get("weights_sha256"):
            raise BaseModelError(f"{weights} is missing or altered", remedy="fetch or create the base model again")
        if digest is not None and description["digest"] != digest:
            raise BaseModelError(
                f"the base model in {path} is {description['digest']}, but {digest} was asked for",
                remedy="name the digest that the aggregator merges (datavector agent prints it), or fetch that base",
            )
        with _described_by(path):
            base = cls._described(path, description)
            base.open().close()
        return base

    @classmethod
    def describe(cls, path: Path) -> BaseModel:
        """Reads an artifact's description alone, which is quick; to compute with the weights, `load` it.

        Raises:
            BaseModelError: the description is missing, altered, or says too little.
        """
        with _described_by(path):
            return cls._described(path, _read_description(path))

    @classmethod
    def _described(cls, path: Path, description: Mapping[str, Any]) -> BaseModel:
        size, mean, std = (description["input"][key] for key in ("size", "mean", "std"))
        return cls(
            path=path,
            name=description["name"],
            architecture=description["architecture"],
            classes=tuple(description["classes"]),
            input=Input(size, tuple(mean), tuple(std)),
            head_seed=description["head_seed"],
            pretrained=description["pretrained"],
            layout=Layout(tuple(TensorSpec(name, tuple(shape)) for name, shape in description["tensors"])),
            digest=description["digest"],
        )

    def open(self) -> TensorFile:
        """The pretrained weights, for reading."""
        return TensorFile(self.path / WEIGHTS, self.layout)

    @cached_property
    def vector_layout(self) -> Layout:
        """The layout of every data vector of this base; its header names the base."""
        return self.layout.with_metadata(format="datavector/1", base=self.digest)

    @cached_property
    def batchnorm_layers(self) -> tuple[str, ...]:
        """Names of the layers that keep running statistics, sorted."""
        suffix = ".running_mean"
        return tuple(tensor.name.removesuffix(suffix) for tensor in self.layout.tensors if tensor.name.endswith(suffix))

    @cached_property
    def head(self) -> str | None:
        """Name of the linear layer that gives the classes; None where the shapes name none, or several."""
        classes, shapes = len(self.classes), {tensor.name: tensor.shape for tensor in self.layout.tensors}
        found = [
            name.removesuffix(".weight")
            for name, shape in shapes.items()
            if name.endswith(".weight")
            and len(shape) == 2
            and shape[0] == classes
            and shapes.get(name.removesuffix("weight") + "bias") == (classes,)
        ]
        return found[0] if len(found) == 1 else None

    @property
    def features(self) -> int:
        """How many features the head takes; 0 where there is no linear one."""
        return self.layout.by_name[f"{self.head}.weight"].shape[1] if self.head else 0


def is_statistic(tensor: str) -> bool:
    """Whether a tensor of this name is a BatchNorm statistic, which is restored rather than merged."""
    return tensor.endswith((".running_mean", ".running_var"))


def save_base(
    path: Path,
    *,
    name: str,
    architecture: str,
    classes: tuple[str, ...],
    input: Input,
    head_seed: int,
    pretrained: str,
    tensors: Mapping[str, FloatArray],
) -> BaseModel:
    """Writes an artifact into the folder `path` and loads it.

    Raises:
        BaseModelError: the classes are fewer than two or not unique, or a weight is not finite.
        DiskFull: no space is left.
    """
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise BaseModelError(f"classes are {list(classes)}", remedy="give at least two classes, each once")
    layout = Layout(tuple(TensorSpec(key, tensors[key].shape) for key in sorted(tensors)))
    for spec in layout.tensors:
        if not np.isfinite(tensors[spec.name]).all():
            raise BaseModelError(f"tensor {spec.name} is not finite", remedy="use other pretrained weights")
    write_tensors(path / WEIGHTS, layout, (tensors[spec.name] for spec in layout.tensors))
    description = {
        "format": FORMAT,
        "name": name,
        "architecture": architecture,
        "classes": list(classes),
        "input": {"size": input.size, "mean": list(input.mean), "std": list(input.std)},
        "head_seed": head_seed,
        "pretrained": pretrained,
        "weights_sha256": sha256_file(path / WEIGHTS),
        "tensors": [[spec.name, list(spec.shape)] for spec in layout.tensors],
    }
    write_json(path / DESCRIPTION, {**description, "digest": _digest(description)})
    return BaseModel.load(path)


@contextmanager
def _described_by(path: Path) -> Iterator[None]:
    """Turns what a wrong description leads to into BaseModelError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, WrongLayout) as error:
        raise BaseModelError(
            f"{path / DESCRIPTION} does not describe {WEIGHTS} ({error})", remedy="create the base model again"
        ) from error


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description: Any = json.loads((path / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{path / DESCRIPTION} cannot be read ({error})",
            remedy="give the folder that `datavector base create --output` wrote",
        ) from error
    known = isinstance(description, dict) and description.get("format") == FORMAT
    if not known or description.get("digest") != _digest(description):
        raise BaseModelError(
            f"{path / DESCRIPTION} is altered or of another format than {FORMAT}",
            remedy="fetch or create the base model again",
        )
    content: dict[str, Any] = description
    return content


def _digest(description: Mapping[str, object]) -> str:
    content = {key: value for key, value in description.items() if key != "digest"}
    return "sha256:" + hashlib.sha256(canonical_json(content)).hexdigest()
