"""How good merged models are: every merge method beside single hospitals, pooled training and federated averaging.

    python -m bench.accuracy run --data DIR --output RESULTS     # DIR holds brain-mri's manifest.csv
    python -m bench.accuracy table RESULTS

A cell is one way to divide images among hospitals, a number of hospitals and a seed. Each has a file in the folder of
results, written after every stage; a cell that is finished is not run again. With a GPU, cells run beside each other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from agent.features import class_moments
from agent.recalibrate import choose_images, measure, own_alone, pooled_with
from agent.statistics import write_fisher, write_regmean
from agent.train import (
    Augmented,
    TrainSettings,
    _parameter_groups,
    class_log_prior,
    epoch_batches,
    learning_rate,
    train,
)
from datavector.data import synthetic
from datavector.data.images import ImageSet, load_images
from datavector.data.lesions import Look
from datavector.data.manifest import read_by_column
from datavector.data.records import Record, assign_splits
from datavector.files import write_json
from datavector.layout import write_tensors
from datavector.merge import MergeInput, body_id, gram_matrix, merge_vectors
from datavector.merge.batchnorm import Moments, pool_layers, restore
from datavector.merge.head import FeatureMoments, Kind, missing_classes, pool_features, solve_head
from datavector.metrics import accuracy, balanced_accuracy, confusion_matrix
from datavector.model import is_statistic
from datavector.networks import (
    build,
    create_base,
    export_tensors,
    head_tensors,
    load_file,
    load_weights,
    preprocess,
)
from datavector.vector import open_vector, write_vector

SIZE, VALIDATION, IMAGES = 128, 0.15, 480
FLOOR = 5
BODIES: tuple[tuple[str, dict[str, float]], ...] = (
    ("mean", {}),
    ("sum", {}),
    ("iso-c", {}),
    ("iso-c", {"scale": 0.5}),
    ("ties", {"scale": 2}),
    ("sum", {"scale": 0.5}),
    ("tsv", {}),
    ("model-stock", {}),
    ("fisher", {}),
    ("regmean", {}),
    ("iso-c", {"scale": 1.25}),
    ("weighted-mean", {}),
    ("geometric-median", {}),
    ("trimmed-mean", {"trim": 0.25}),
    ("median", {}),
    ("krum", {}),
    ("ties", {}),
    ("dare", {}),
)
HEADS: tuple[tuple[str, Kind, float], ...] = (
    ("visit", "lda", 0.1),
    ("visit", "lda", 1.0),
    ("visit", "lda", 10.0),
    ("visit", "ridge", 1.0),
    ("restored", "lda", 1.0),
)
USUAL = "visit lda 1"
DIVISIONS = ("hospital_iid", "hospital_label_skew", "lesions_shift")
FISHER_IMAGES = 32


@dataclass(frozen=True)
class Cell:
    """One cell of the study."""

    division: str
    hospitals: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.division}/{self.hospitals}/{self.seed}"


@dataclass(frozen=True)
class Setting:
    """What all cells share."""

    data: str
    device: str
    epochs: int
    images: int
    bodies: int
    attacks: bool
    test: int
    output: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run")
    run.add_argument("--data", required=True, help="folder of manifest.csv with hospital columns")
    run.add_argument("--output", type=Path, required=True)
    run.add_argument("--cells", default="", help="only cells whose name contains this; several with commas")
    run.add_argument("--workers", type=int, default=1)
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--epochs", type=int, default=16)
    run.add_argument("--images", type=int, default=IMAGES, help="training images of all hospitals together")
    run.add_argument("--bodies", type=int, default=len(BODIES), help="only the first ones")
    run.add_argument("--no-attacks", action="store_true")
    run.add_argument("--test", type=int, default=0, help="only so many test images; all where 0")
    run.set_defaults(do=_run)
    table = commands.add_parser("table")
    table.add_argument("results", type=Path)
    table.set_defaults(do=lambda arguments: _tables(arguments.results))
    arguments = parser.parse_args()
    arguments.do(arguments)


def _run(arguments: argparse.Namespace) -> None:
    wanted = [part for part in arguments.cells.split(",") if part]
    arguments.output.mkdir(parents=True, exist_ok=True)
    done = {each["cell"] for each in read_results(arguments.output) if each["finished"]}
    cells = [
        cell
        for seed in range(3)
        for hospitals in (4, 8)
        for division in DIVISIONS
        if (cell := Cell(division, hospitals, seed)).name not in done
        and (not wanted or any(part in cell.name for part in wanted))
    ]
    setting = Setting(
        arguments.data,
        arguments.device,
        arguments.epochs,
        arguments.images,
        arguments.bodies,
        not arguments.no_attacks,
        arguments.test,
        str(arguments.output),
    )
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        for finished in as_completed([pool.submit(study, cell, setting) for cell in cells]):
            try:
                result = finished.result()
            except Exception as error:
                print(f"a cell failed: {type(error).__name__}: {error}", flush=True)
                continue
            print(f"{time.monotonic() - started:6.0f} s  {result['cell']}  ({result['seconds']:.0f} s)", flush=True)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """What was measured of each cell, finished or not."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


# --- One cell -------------------------------------------------------------------------------------------------


def study(cell: Cell, setting: Setting) -> dict[str, Any]:
    """Trains everybody, merges in every way, measures all."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="dv-study-", dir=memory if memory.is_dir() else None))
    try:
        started = time.monotonic()
        result: dict[str, Any] = {"cell": cell.name, "finished": False, "timing": {}}
        Study(cell, setting, folder).run(result)
        result |= {"finished": True, "seconds": time.monotonic() - started}
        _save(setting, result)
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save(setting: Setting, result: Mapping[str, Any]) -> None:
    write_json(Path(setting.output) / f"{result['cell'].replace('/', '-')}.json", result)


class Study:
    """A cell at work."""

    def __init__(self, cell: Cell, setting: Setting, folder: Path) -> None:
        self.cell, self.setting, self.folder = cell, setting, folder
        self.device = torch.device(setting.device)
        classes, hospitals, test = divide(cell, setting, folder)
        self.base = create_base(
            folder / "base", architecture="efficientnet_lite0", classes=classes, size=SIZE, seed=cell.seed
        )
        self.settings = TrainSettings(epochs=setting.epochs, seed=cell.seed, device=setting.device, workers=1)
        self.training, self.validation = {}, {}
        for name, records in hospitals.items():
            split = assign_splits(records, validation=VALIDATION, seed=cell.seed)
            self.training[name] = self._load([each for each in split if each.split == "train"])
            self.validation[name] = self._load([each for each in split if each.split == "val"])
        self.test = self._load(test[:: max(1, len(test) // setting.test)] if setting.test else test)
        self.head = self.base.head
        self._reused = build(self.base).to(self.device)
        self.inputs: dict[str, MergeInput] = {}

    def run(self, results: dict[str, Any]) -> None:
        """Fills in what was measured, stage by stage."""
        clock = time.monotonic()

        def lap(stage: str) -> None:
            nonlocal clock
            print(f"  {self.cell.name}: {stage}, {time.monotonic() - clock:.0f} s", flush=True)
            results["timing"][stage] = round(time.monotonic() - clock, 1)
            clock = time.monotonic()
            _save(self.setting, results)

        results["images"] = {name: len(each) for name, each in self.training.items()}
        for name in self.training:
            self.inputs[name] = self._train(name)
        lap("training")
        probabilities = []
        results["singles"], results["judged"] = {}, {}
        for name in self.inputs:
            network = self._single(name)
            logits, _ = self._forward(network, self.test)
            probabilities.append(logits.softmax(1))
            results["singles"][name] = self._score(logits)
            results["judged"][f"hospital.{name}"] = self._judged(network)
        results["ensemble"] = self._score(torch.stack(probabilities).mean(0))
        lap("singles")
        results["pooled"] = self._pooled()
        lap("pooled")
        results["fedavg"] = self._fedavg()
        lap("fedavg")
        inputs = list(self.inputs.values())
        gram = gram_matrix(self.base, inputs)
        results["gram"] = gram.tolist()
        results["bodies"] = {}
        for method, parameters in BODIES[: self.setting.bodies]:
            body = body_id(method, parameters)
            merged = self._merge(inputs, method, parameters)
            results["bodies"][body], judged = self._candidates(merged, more=body in ("sum", "iso-c"))
            results["judged"] |= {f"{body}{suffix}": counts for suffix, counts in judged.items()}
            lap(body)
        for body in ("sum", "iso-c"):
            if body in results["bodies"]:
                merged = self._merge(inputs, body, {})
                results["bodies"][body]["second visit"] = self._visited(merged, rounds=2)
                results["bodies"][body]["meeting"] = self._met(merged)
        results["controls"] = self._controls()
        lap("controls")
        if self.setting.attacks and self.cell.seed == 0 and self.cell.division != "lesions_shift":
            results["attacks"] = self._attacks()
            lap("attacks")

    # --- Learning

    def _load(self, records: Sequence[Record]) -> ImageSet:
        return load_images(records, self.base.classes, SIZE)

    def _train(self, name: str, *, rotate: int = 0) -> MergeInput:
        """A hospital's vector with its statistics; its labels moved on by `rotate` classes."""
        images, folder = self.training[name], self.folder / f"{name}-{rotate}"
        validation = self.validation[name]
        if rotate:
            images = replace(images, labels=(images.labels + rotate) % len(self.base.classes))
            validation = replace(validation, labels=(validation.labels + rotate) % len(self.base.classes))
        result = train(self.base, images, validation, self.settings, folder)
        digest = write_vector(folder / "vector", self.base, result.tensors(self.base))
        network = build(self.base)
        load_file(network, result.weights, self.base.layout)
        if not rotate:
            write_fisher(folder / "fisher", network, self.base, self._few(images), device=self.device)
            write_regmean(folder / "regmean", network, self.base, images, device=self.device)
        return MergeInput(folder / "vector", f"sha256:{digest}", len(images), folder / "fisher", folder / "regmean")

    def _few(self, images: ImageSet) -> ImageSet:
        chosen = choose_images(len(images), FISHER_IMAGES, self.cell.seed)
        records = tuple(images.records[index] for index in chosen.tolist())
        return replace(images, images=images.images[chosen], labels=images.labels[chosen], records=records)

    def _single(self, name: str) -> nn.Module:
        with self.base.open() as pretrained, open_vector(self.inputs[name].path, self.base) as vector:
            names = [spec.name for spec in self.base.layout.tensors]
            tensors = {each: pretrained.read(each) + vector.read(each) for each in names}
        network = build(self.base)
        load_weights(network, tensors)
        return network

    def _pooled(self) -> list[float]:
        everybody, validation = union(self.training.values()), union(self.validation.values())
        result = train(self.base, everybody, validation, self.settings, self.folder / "pooled")
        network = build(self.base)
        load_file(network, result.weights, self.base.layout)
        return self._score(self._forward(network, self.test)[0])

    def _fedavg(self) -> dict[str, list[float]]:
        """Federated averaging (arXiv 1602.05629) of the same epochs, one a round, everybody there in each."""
        network = build(self.base).to(self.device)
        weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        images = {name: len(each) for name, each in self.training.items()}
        for epoch in range(self.settings.epochs):
            total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in weights.items()}
            for name, data in self.training.items():
                network.load_state_dict(weights)
                self._epoch(network, data, epoch)
                for key, tensor in network.state_dict().items():
                    total[key] += tensor.double() * (images[name] / sum(images.values()))
            weights = {key: total[key].to(tensor.dtype) for key, tensor in weights.items()}
        network.load_state_dict(weights)
        plain = self._score(self._forward(network, self.test)[0])
        merged = self.folder / "fedavg"
        tensors = export_tensors(network)
        write_tensors(merged, self.base.layout, (tensors[spec.name] for spec in self.base.layout.tensors))
        return {"averaged statistics": plain, "visit": self._visited(merged, rounds=1)}

    def _epoch(self, network: nn.Module, data: ImageSet, epoch: int) -> None:
        settings, device = self.settings, self.device
        network.train()
        optimizer = torch.optim.AdamW(_parameter_groups(network, settings.weight_decay), lr=settings.learning_rate)
        prior = class_log_prior(data.labels, len(self.base.classes)).to(device)
        samples, batches = (
            Augmented(data.images, data.labels, settings.seed, epoch),
            epoch_batches(len(data), settings, epoch),
        )
        for step, batch in enumerate(batches):
            rate = learning_rate(epoch * len(batches) + step, settings.epochs * len(batches), settings.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            images = torch.stack([samples[index][0] for index in batch]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = network(preprocess(images, self.base.input))
            loss = functional.cross_entropy(logits.float() + prior, data.labels[batch].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    # --- Merging and restoring

    def _merge(self, inputs: Sequence[MergeInput], method: str, parameters: Mapping[str, float]) -> Path:
        output = self.folder / "merged"
        merge_vectors(self.base, inputs, method, parameters, output)
        return output

    def _visits(self, merged: Path, rounds: int = 1) -> tuple[dict[str, Moments], FeatureMoments]:
        """Everybody's visit, one after the other, as the product does it."""
        left: dict[str, dict[str, Moments]] = {}
        features: dict[str, FeatureMoments] = {}
        for _ in range(rounds):
            for name, images in self.training.items():
                others = pool_layers([moments for other, moments in left.items() if other != name])
                visit = measure(
                    self._network(merged), self.base, images.images, partial(pooled_with, others),
                    head=self.head, device=self.device,
                )  # fmt: skip
                left[name] = visit.moments
                features[name] = self._moments(visit.features, images)
        return pool_layers(list(left.values())), pool_features(list(features.values()))

    def _moments(self, features: torch.Tensor | None, images: ImageSet) -> FeatureMoments:
        assert features is not None
        return class_moments(features, images.labels, len(self.base.classes), floor=FLOOR)

    def _restored(self, merged: Path, moments: Mapping[str, Moments]) -> nn.Module:
        network = self._network(merged)
        tensors = {name: torch.from_numpy(values) for name, values in restore(moments).items()}
        network.load_state_dict(tensors, strict=False)
        return network

    def _visited(self, merged: Path, rounds: int) -> list[float]:
        moments, _ = self._visits(merged, rounds)
        return self._score(self._forward(self._restored(merged, moments), self.test)[0])

    def _met(self, merged: Path) -> list[float]:
        everybody = union(self.training.values())
        met = measure(self._network(merged), self.base, everybody.images, own_alone, device=self.device)
        return self._score(self._forward(self._restored(merged, met.moments), self.test)[0])

    def _candidates(
        self, merged: Path, *, quick: bool = False, more: bool = False
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Scores on the test images with the merged head and with closed-form ones; and the hospitals' counts."""
        moments, first = self._visits(merged)
        network = self._restored(merged, moments)
        logits, features = self._forward(network, self.test)
        scores: dict[str, Any] = {"merged": self._score(logits)}
        held = {name: self._forward(network, images) for name, images in self.validation.items()}
        judged = {"": {name: self._confusion(each[0], self.validation[name]) for name, each in held.items()}}
        pooled = {"visit": first}
        if more:
            restored = [self._moments(self._forward(network, each)[1], each) for each in self.training.values()]
            pooled["restored"] = pool_features(restored)
        for when, kind, strength in HEADS:
            key = f"{when} {kind} {strength:g}"
            if when not in pooled or missing_classes(pooled[when]) or (quick and key != USUAL):
                continue
            weight, bias = map(torch.from_numpy, solve_head(pooled[when], strength=strength, kind=kind))
            scores[key] = self._score(features @ weight.T + bias)
            judged[f".head {key}"] = {
                name: self._confusion(each[1] @ weight.T + bias, self.validation[name]) for name, each in held.items()
            }
        return scores, judged

    def _controls(self) -> dict[str, Any]:
        """What no learning explains: random vectors of the same norms, and the pretrained backbone."""
        controls: dict[str, Any] = {}
        for name, kept in (("random", frozenset[str]()), ("random body", head_tensors(self.base))):
            inputs = [self._random(each, kept, index) for index, each in enumerate(self.inputs.values())]
            scores, _ = self._candidates(self._merge(inputs, "sum", {}))
            controls[name] = scores
        controls["pretrained"], _ = self._candidates(self.base.path / "base.safetensors")
        return controls

    def _random(self, true: MergeInput, kept: frozenset[str], number: int) -> MergeInput:
        path = self.folder / f"random-{number}"
        generator = np.random.default_rng([self.cell.seed, number])

        def tensors() -> Iterator[Any]:
            with open_vector(true.path, self.base) as vector:
                for spec in self.base.layout.tensors:
                    values = vector.read(spec.name)
                    noise = generator.standard_normal(spec.shape).astype(np.float32)
                    if spec.name not in kept and not is_statistic(spec.name):
                        values = noise * np.float32(np.linalg.norm(values) / max(float(np.linalg.norm(noise)), 1e-30))
                    yield values

        write_tensors(path, self.base.vector_layout, tensors())
        return MergeInput(path, f"sha256:{number:064x}", true.samples)

    # --- Attacks

    def _attacks(self) -> dict[str, Any]:
        """One hospital, the first, sends something else."""
        (name, honest), *others = self.inputs.items()
        sent = {
            "random": self._random(honest, frozenset(), 1000),
            "sign-flipped": self._scaled(honest, -1.0),
            "100 x": self._scaled(honest, 100.0),
            "labels rotated": self._train(name, rotate=1),
        }
        found: dict[str, Any] = {}
        for attack, vector in sent.items():
            inputs = [vector, *(each for _, each in others)]
            gram = gram_matrix(self.base, inputs)
            found[attack] = {"gram": gram.tolist()}
            for method, parameters in ATTACKED:
                scores, _ = self._candidates(self._merge(inputs, method, parameters), quick=True)
                best = scores.get(USUAL, scores["merged"])
                found[attack][body_id(method, parameters)] = [scores["merged"], best]
        inputs = [each for _, each in others]
        found["without it"] = {}
        for method, parameters in ATTACKED:
            scores, _ = self._candidates(self._merge(inputs, method, parameters), quick=True)
            found["without it"][body_id(method, parameters)] = [
                scores["merged"],
                scores.get(USUAL, scores["merged"]),
            ]
        return found

    def _scaled(self, true: MergeInput, factor: float) -> MergeInput:
        path = self.folder / f"scaled{factor:g}"
        with open_vector(true.path, self.base) as vector:
            names = [spec.name for spec in self.base.layout.tensors]
            write_tensors(path, self.base.vector_layout, (vector.read(each) * np.float32(factor) for each in names))
        return MergeInput(path, f"sha256:{abs(int(factor)):064x}", true.samples)

    # --- Measuring

    def _network(self, weights: Path) -> nn.Module:
        """The one network that is used again and again."""
        load_file(self._reused, weights, self.base.layout)
        return self._reused

    @torch.no_grad()
    def _forward(self, network: nn.Module, images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and features of all images, on the CPU."""
        kept: list[torch.Tensor] = []
        assert self.head
        handle = network.get_submodule(self.head).register_forward_pre_hook(
            lambda _, arguments: kept.append(arguments[0].float().cpu())
        )
        network = network.to(self.device).eval()
        logits = [
            network(preprocess(batch.to(self.device), self.base.input)).float().cpu()
            for batch in torch.split(images.images, 128)
        ]
        handle.remove()
        return torch.cat(logits), torch.cat(kept)

    def _score(self, logits: torch.Tensor) -> list[float]:
        confusion = confusion_matrix(self.test.labels.numpy(), logits.argmax(1).numpy(), len(self.base.classes))
        return [round(accuracy(confusion), 5), round(balanced_accuracy(confusion), 5)]

    def _confusion(self, logits: torch.Tensor, images: ImageSet) -> list[list[int]]:
        found = confusion_matrix(images.labels.numpy(), logits.argmax(1).numpy(), len(self.base.classes))
        return [[int(count) for count in row] for row in found]

    def _judged(self, network: nn.Module) -> dict[str, Any]:
        return {
            name: self._confusion(self._forward(network, images)[0], images) for name, images in self.validation.items()
        }


ATTACKED: tuple[tuple[str, dict[str, float]], ...] = (
    ("mean", {}),
    ("sum", {}),
    ("ties", {"scale": 2}),
    ("iso-c", {}),
    ("trimmed-mean", {"trim": 0.25}),
    ("median", {}),
    ("geometric-median", {}),
    ("krum", {}),
    ("model-stock", {}),
)


def union(sets: Any) -> ImageSet:
    every = list(sets)
    return ImageSet(
        images=torch.cat([each.images for each in every]),
        labels=torch.cat([each.labels for each in every]),
        records=tuple(record for each in every for record in each.records),
        corrupt=(),
    )


# --- Who holds what -------------------------------------------------------------------------------------------


def divide(cell: Cell, setting: Setting, folder: Path) -> tuple[tuple[str, ...], dict[str, list[Record]], list[Record]]:
    """Classes, each hospital's images, and the test images."""
    if cell.division.startswith("lesions"):
        if cell.division == "lesions_shift":
            synthetic.hospital_look = wide_look  # type: ignore[assignment]
        manifest = synthetic.synthesise(
            folder / "images", hospitals=cell.hospitals, images=setting.images // cell.hospitals, seed=cell.seed
        )
        column = "hospital"
    else:
        manifest, column = Path(setting.data) / "manifest.csv", cell.division
    found = read_by_column(manifest, column)
    everything = [record for records in found.values() for record in records]
    hospitals = {name: [each for each in records if each.split == "train"] for name, records in found.items() if name}
    test = sorted(record for record in everything if record.split == "test")
    if cell.hospitals == 8 and not cell.division.startswith("lesions"):
        hospitals = _halved(hospitals, cell)
    drawn = {}
    for name in sorted(hospitals):
        order = np.random.default_rng(cell.seed).permutation(len(hospitals[name]))[: setting.images // cell.hospitals]
        drawn[name] = [replace(hospitals[name][index], split="") for index in sorted(order)]
    return tuple(sorted({record.label for record in everything})), drawn, test


def _halved(hospitals: Mapping[str, list[Record]], cell: Cell) -> dict[str, list[Record]]:
    """Each hospital's images dealt to two: evenly, or unequally by class where classes are unequal already."""
    halves: dict[str, list[Record]] = {}
    for number, (name, records) in enumerate(sorted(hospitals.items())):
        random = np.random.default_rng([cell.seed, number])
        shares = {
            label: random.beta(0.3, 0.3) if "skew" in cell.division else 0.5
            for label in sorted({record.label for record in records})
        }
        first = [random.random() < shares[record.label] for record in records]
        for half in (True, False):
            own = [record for record, mine in zip(records, first, strict=True) if mine == half]
            if len({record.label for record in own}) > 1 and len(own) >= 20:
                halves[f"{name}-{int(half)}"] = own
    return halves


_narrow_look = synthetic.hospital_look


@lru_cache(maxsize=1024)
def wide_look(seed: int, hospital: int) -> Look:
    """Twice the spread of colour, light and size."""
    look = _narrow_look(seed, hospital)

    def twice(value: float, middle: float, least: float = 0.0) -> float:
        return max(least, middle + 2 * (value - middle))

    return replace(
        look,
        tone=twice(look.tone, 0.3),
        gains=tuple(twice(gain, 1.0) for gain in look.gains),
        light=twice(look.light, 1.0),
        contrast=twice(look.contrast, 1.0),
        zoom=twice(look.zoom, 0.51, 0.25),
        noise=twice(look.noise, 0.0175, 0.002),
    )


# --- Tables ---------------------------------------------------------------------------------------------------


def _tables(path: Path) -> None:
    print(len(read_results(path)), "cells")


if __name__ == "__main__":
    main()
