"""What the demo measures beside the main job: every hospital alone, and the controls.

All of it happens in the demo's own process, from the files that the real processes left; only here are the images of
several hospitals in one place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from agent.recalibrate import forward_with_moments, own_alone, pooled_with, recalibrate
from agent.train import TrainSettings, evaluate, train
from datavector.data.images import ImageSet
from datavector.demo.report import Score
from datavector.layout import FloatArray, TensorFile, write_tensors
from datavector.merge import merge_vectors
from datavector.merge.batchnorm import Moments, pool_layers, restore, uploaded
from datavector.merge.restored import write_restored, write_tuned
from datavector.metrics import accuracy, balanced_accuracy
from datavector.model import BaseModel, is_statistic
from datavector.networks import build, head_tensors, load_file, preprocess
from datavector.vector import open_vector

MAX_IMAGES = 1024


@dataclass(frozen=True)
class Study:
    """The demo's data in one place.

    Attributes:
        vectors: each hospital's vector file, in the order in which the hospitals took part.
        training: each hospital's training images, as its agent chose them, in the same order.
        validation: each hospital's validation images.
        test: images that nobody trained on.
        folder: for what the study writes.
    """

    base: BaseModel
    vectors: Mapping[str, Path]
    training: Mapping[str, ImageSet]
    validation: Mapping[str, ImageSet]
    test: ImageSet
    method: str
    parameters: Mapping[str, float]
    folder: Path

    def single(self, hospital: str) -> Score:
        """A hospital's own model: pretrained + its vector, statistics included."""
        tuned = self.folder / "tuned.safetensors"
        write_tuned(tuned, self.base, self.vectors[hospital])
        return self._score(self._network(tuned))

    def pooled(self, settings: TrainSettings) -> Score:
        """Training on everybody's images at once: what sharing images would give."""
        training, validation = union(self.training.values()), union(self.validation.values())
        result = train(self.base, training, validation, settings, self.folder / "pooled")
        return self._score(self._network(result.weights))

    def random(self, *, keep_head: bool, seed: int) -> Score:
        """Random vectors, each tensor of its true norm, merged and restored like the true ones.

        Args:
            keep_head: whether the classification head's part stays true: the honest control, since any head but the
                true one is at chance by itself.
        """
        kept = head_tensors(self.base) if keep_head else frozenset[str]()
        files = []
        for number, path in enumerate(self.vectors.values()):
            files.append(self.folder / f"random-{number}-{keep_head}.safetensors")
            with open_vector(path, self.base) as vector:
                generator = np.random.default_rng([seed, number])
                write_tensors(files[-1], self.base.vector_layout, randomised(vector, kept, generator))
        merged = self._merge(files, f"random-{keep_head}")
        return self._visited(merged)

    def calibrations(self) -> dict[str, Score]:
        """The merged weights under each way to restore the statistics; "none" keeps the pretrained ones."""
        merged = self._merge(list(self.vectors.values()), "merged")
        return {
            "visit": self._visited(merged),
            "second visit": self._visited(merged, rounds=2),
            "meeting": self._met(merged),
            "uploaded": self._uploaded(merged),
            "none": self._score(self._network(merged)),
        }

    # --- Restoring, as the real processes do it

    def _visited(self, merged: Path, *, rounds: int = 1) -> Score:
        left: dict[str, dict[str, Moments]] = {}
        for _ in range(rounds):
            for hospital, images in self.training.items():
                others = pool_layers([moments for name, moments in left.items() if name != hospital])
                network = self._network(merged)
                visit = recalibrate(network, self.base, images, partial(pooled_with, others), max_images=MAX_IMAGES)
                left[hospital] = visit.moments
        return self._restored(merged, pool_layers(list(left.values())))

    def _met(self, merged: Path) -> Score:
        """A meeting equals one pass over everybody's images together."""
        network = self._network(merged)
        everybody = union(self.training.values())
        moments, _ = forward_with_moments(network, preprocess(everybody.images, self.base.input), own_alone)
        return self._restored(merged, moments)

    def _uploaded(self, merged: Path) -> Score:
        images = [len(images) for images in self.training.values()]
        counts = zip(self.vectors.values(), images, strict=True)
        moments = [uploaded(self.base, path, count) for path, count in counts]
        return self._restored(merged, pool_layers(moments))

    def _restored(self, merged: Path, moments: dict[str, Moments]) -> Score:
        restored = self.folder / "restored.safetensors"
        write_restored(restored, self.base, merged, restore(moments))
        return self._score(self._network(restored))

    def _merge(self, vectors: Sequence[Path], name: str) -> Path:
        output = self.folder / f"{name}.safetensors"
        if not output.is_file():
            merge_vectors(self.base, vectors, self.method, self.parameters, output)
        return output

    def _network(self, weights: Path) -> nn.Module:
        network = build(self.base)
        load_file(network, weights, self.base.layout)
        return network

    def _score(self, network: nn.Module) -> Score:
        confusion = evaluate(network, self.base, self.test)
        return Score(accuracy(confusion), balanced_accuracy(confusion))


def randomised(vector: TensorFile, kept: frozenset[str], generator: np.random.Generator) -> Iterator[FloatArray]:
    """A vector's tensors, replaced by random ones of the same norm but for statistics and those that are kept."""
    for spec in vector.layout.tensors:
        values = vector.read(spec.name)
        if spec.name in kept or is_statistic(spec.name):
            yield values
            continue
        noise = generator.standard_normal(spec.shape).astype(np.float32)
        yield noise * np.float32(np.linalg.norm(values) / max(float(np.linalg.norm(noise)), 1e-30))


def union(sets: Collection[ImageSet]) -> ImageSet:
    """Several sets' images as one set, in their order."""
    return ImageSet(
        images=torch.cat([each.images for each in sets]),
        labels=torch.cat([each.labels for each in sets]),
        records=tuple(record for each in sets for record in each.records),
        corrupt=tuple(item for each in sets for item in each.corrupt),
    )
