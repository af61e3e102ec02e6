"""How good merged models are: every merge method beside single hospitals, pooled training and federated averaging.

    python -m bench.accuracy --data DIR --output RESULTS     # DIR holds brain-mri's manifest.csv
    python -m bench.accuracy_tables RESULTS

A cell is one way to divide images among hospitals, a number of hospitals and a seed. In its folder it keeps what each
model says of the images (logits, and the features before its head), so that heads and choices can be tried later. What
is there already is not computed again: a run that was cut goes on, and one with more bodies adds them. Names that begin
with `second.` are of merged models that every hospital visited twice (`--second`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from agent.recalibrate import choose_images, measure, pooled_with
from agent.statistics import write_statistics
from agent.train import (
    Augmented,
    TrainSettings,
    _parameter_groups,
    class_log_prior,
    epoch_batches,
    learning_rate,
    train,
)
from aggregator.resources import DEFAULT_CANDIDATES
from datavector.data import synthetic
from datavector.data.images import ImageSet, load_images
from datavector.data.lesions import Look
from datavector.data.manifest import read_by_column
from datavector.data.records import Record, assign_splits
from datavector.demo.study import randomised, union
from datavector.files import write_json
from datavector.layout import write_tensors
from datavector.merge import MergeInput, body_id, gram_matrix, merge_vectors
from datavector.merge.batchnorm import Moments, pool_layers, restore
from datavector.merge.outliers import inspect_vectors
from datavector.merge.restored import write_tuned
from datavector.merge.statistics import FISHER, REGMEAN
from datavector.model import BaseModel
from datavector.networks import build, create_base, export_tensors, head_tensors, load_file, preprocess
from datavector.vector import open_vector, write_vector

SIZE, VALIDATION, IMAGES = 128, 0.15, 480
BODIES: tuple[tuple[str, dict[str, float]], ...] = (
    ("mean", {}),
    ("sum", {}),
    ("iso-c", {}),
    ("ties", {"scale": 2}),
    ("sum", {"scale": 0.5}),
    ("iso-c", {"scale": 1.25}),
    ("fisher", {}),
    ("regmean", {}),
    ("model-stock", {}),
    ("geometric-median", {}),
    ("median", {}),
    ("trimmed-mean", {"trim": 0.25}),
    ("krum", {}),
    ("ties", {}),
    ("dare", {}),
)
ATTACKED: tuple[tuple[str, dict[str, float]], ...] = (
    ("mean", {}),
    ("iso-c", {"scale": 1.25}),
    ("ties", {"scale": 2}),
    ("sum", {}),
    ("median", {}),
    ("trimmed-mean", {"trim": 0.25}),
    ("geometric-median", {}),
    ("krum", {}),
)
SECOND = "second."  # how the names begin of what two visits gave
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
        return f"{self.division}-{self.hospitals}-{self.seed}"


@dataclass(frozen=True)
class Setting:
    """What all cells share."""

    data: Path
    output: Path
    device: str
    epochs: int
    images: int
    bodies: int
    second: bool
    controls: bool
    attacks: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of manifest.csv with hospital columns")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cells", default="", help="only cells whose name contains this; several with commas")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--images", type=int, default=IMAGES, help="training images of all hospitals together")
    parser.add_argument("--bodies", type=int, default=len(BODIES), help="only the first ones")
    parser.add_argument("--second", action="store_true", help="the default candidates after a second visit, too")
    parser.add_argument("--controls", action="store_true", help="random vectors, and the pretrained backbone")
    parser.add_argument("--attacks", action="store_true", help="one hospital sends something else")
    arguments = vars(parser.parse_args())
    wanted, workers = arguments.pop("cells").split(","), arguments.pop("workers")
    setting = Setting(**arguments)
    every = (Cell(division, many, seed) for many in (4, 8) for seed in range(3) for division in DIVISIONS)
    cells = [cell for cell in every if any(part in cell.name for part in wanted)]
    started = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(study, cell, setting): cell for cell in cells}
        for finished in as_completed(running):
            error = finished.exception()
            outcome = f"failed: {type(error).__name__}: {error}" if error else "done"
            print(f"{time.monotonic() - started:6.0f} s  {running[finished].name}  {outcome}", flush=True)


# --- One cell -------------------------------------------------------------------------------------------------


def study(cell: Cell, setting: Setting) -> None:
    """Trains everybody, merges in every way, keeps what all the models say."""
    torch.set_num_threads(1)
    Study(cell, setting).run()


class Study:
    """A cell at work."""

    def __init__(self, cell: Cell, setting: Setting) -> None:
        self.cell, self.setting, self.folder = cell, setting, setting.output / cell.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(setting.device)
        classes, hospitals, test = divide(cell, setting, self.folder)
        path = self.folder / "base"
        self.base = (
            BaseModel.load(path)
            if path.is_dir()
            else create_base(path, architecture="efficientnet_lite0", classes=classes, size=SIZE, seed=cell.seed)
        )
        self.settings = TrainSettings(epochs=setting.epochs, seed=cell.seed, device=setting.device, workers=1)
        self.training, self.validation = {}, {}
        for name, records in hospitals.items():
            split = assign_splits(records, validation=VALIDATION, seed=cell.seed)
            self.training[name] = self._load([each for each in split if each.split == "train"])
            self.validation[name] = self._load([each for each in split if each.split == "val"])
        self.test = self._load(test)
        self._reused = self._build()

    def run(self) -> None:
        """Stage by stage; each leaves its files, and is passed over where they are there."""
        labels = {f"train.{name}": each.labels.numpy() for name, each in self.training.items()}
        labels |= {f"validation.{name}": each.labels.numpy() for name, each in self.validation.items()}
        np.savez(self.folder / "labels.npz", test=self.test.labels.numpy(), **labels)
        inputs = {name: self._train(name) for name in self.training}
        for name in inputs:
            self._keep(f"hospital.{name}", partial(self._single, inputs[name]))
        self._keep("pooled", self._pooled)
        averaged = self.folder / "fedavg" / "weights"
        if not averaged.is_file():
            self._average_rounds(averaged)
        self._keep("fedavg.averaged", partial(self._said, averaged))
        self._keep("fedavg.visit", partial(self._visited, averaged))
        vectors = list(inputs.values())
        write_json(self.folder / "gram.json", gram_matrix(self.base, vectors).tolist())
        for method, parameters in BODIES[: self.setting.bodies]:
            self._keep(body_id(method, parameters), partial(self._merged, vectors, method, parameters))
        for candidate in DEFAULT_CANDIDATES if self.setting.second else ():
            work = partial(self._merged, vectors, candidate.name, candidate.parameters, visits=2)
            self._keep(f"{SECOND}{candidate.body}", work)
        if self.setting.controls:
            self._controls(vectors)
        if self.setting.attacks:
            self._attacks(inputs)

    def _keep(self, name: str, work: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        path = self.folder / "said" / f"{name}.npz"
        if path.is_file():
            return
        path.parent.mkdir(exist_ok=True)
        started = time.monotonic()
        part = path.with_suffix(".part.npz")
        np.savez(part, **{key: values.numpy() for key, values in work().items()})
        part.rename(path)
        print(f"  {self.cell.name}: {name}, {time.monotonic() - started:.0f} s", flush=True)

    # --- Learning

    def _load(self, records: Sequence[Record]) -> ImageSet:
        return load_images(records, self.base.classes, SIZE)

    def _train(self, name: str, *, rotate: int = 0) -> MergeInput:
        """A hospital's vector with its statistics; its labels moved on by `rotate` classes."""
        folder = self.folder / (f"{name}-{rotate}" if rotate else name)
        vector, fisher, regmean = (folder / each for each in ("vector", "fisher", "regmean"))
        training, validation = (
            replace(each[name], labels=(each[name].labels + rotate) % len(self.base.classes))
            for each in (self.training, self.validation)
        )
        if not regmean.is_file():
            result = train(self.base, training, validation, self.settings, folder)
            write_vector(vector, self.base, result.tensors(self.base))
            network, few = self._build(result.weights), choose_images(len(training), FISHER_IMAGES, self.cell.seed)
            for kind, path, chosen in ((FISHER, fisher, few), (REGMEAN, regmean, slice(None))):
                images, labels = training.images[chosen], training.labels[chosen]
                write_statistics(kind, path, network, self.base, images, labels, device=self.device)
            print(f"  {self.cell.name}: trained {name}", flush=True)
        number = sorted(self.training).index(name) + 100 * rotate
        return MergeInput(vector, f"sha256:{number:064x}", len(training), {FISHER: fisher, REGMEAN: regmean})

    def _single(self, vector: MergeInput) -> dict[str, torch.Tensor]:
        tuned = self.folder / "tuned"
        write_tuned(tuned, self.base, vector.path)
        return self._said(tuned, features=False)

    def _pooled(self) -> dict[str, torch.Tensor]:
        everybody, validation = union(self.training.values()), union(self.validation.values())
        result = train(self.base, everybody, validation, self.settings, self.folder / "pooled")
        return self._said(result.weights, features=False)

    def _average_rounds(self, output: Path) -> None:
        """Federated averaging (arXiv 1602.05629) of the same epochs, one a round, everybody there in each."""
        network = self._build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
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
        tensors = export_tensors(network)
        output.parent.mkdir(exist_ok=True)
        write_tensors(output, self.base.layout, (tensors[spec.name] for spec in self.base.layout.tensors))

    def _epoch(self, network: nn.Module, data: ImageSet, epoch: int) -> None:
        settings, device = self.settings, self.device
        network.train()
        optimizer = torch.optim.AdamW(_parameter_groups(network, settings.weight_decay), lr=settings.learning_rate)
        prior = class_log_prior(data.labels, len(self.base.classes)).to(device)
        samples = Augmented(data.images, data.labels, settings.seed, epoch)
        batches = epoch_batches(len(data), settings, epoch)
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

    # --- Merging, restoring, asking

    def _merged(
        self, inputs: Sequence[MergeInput], method: str, parameters: Mapping[str, float], *, visits: int = 1
    ) -> dict[str, torch.Tensor]:
        output = self.folder / "merged"
        merge_vectors(self.base, inputs, method, parameters, output)
        return self._visited(output, visits)

    def _visited(self, merged: Path, visits: int = 1) -> dict[str, torch.Tensor]:
        """Everybody's visits, one after the other, as the product does it; then what the restored model says."""
        left: dict[str, dict[str, Moments]] = {}
        said: dict[str, torch.Tensor] = {}
        for name, images in [*self.training.items()] * visits:
            others = pool_layers([moments for other, moments in left.items() if other != name])
            visit = measure(
                self._network(merged), self.base, images.images, partial(pooled_with, others),
                head=self.base.head, device=self.device,
            )  # fmt: skip
            left[name] = visit.moments
            assert visit.features is not None
            said[f"features.train.{name}"] = visit.features.float()
        network = self._network(merged)
        assert self.base.head
        head = network.get_submodule(self.base.head)
        said |= {f"head.{name}": getattr(head, name).detach().cpu().clone() for name in ("weight", "bias")}
        statistics = restore(pool_layers(list(left.values())))
        network.load_state_dict({name: torch.from_numpy(each) for name, each in statistics.items()}, strict=False)
        return said | self._answers(network, features=True)

    def _said(self, weights: Path, *, features: bool = False) -> dict[str, torch.Tensor]:
        return self._answers(self._network(weights), features=features)

    def _answers(self, network: nn.Module, *, features: bool) -> dict[str, torch.Tensor]:
        """Logits, and features where they are wanted, on the test images and everybody's validation images."""
        asked = {"test": self.test, **{f"validation.{name}": each for name, each in self.validation.items()}}
        said: dict[str, torch.Tensor] = {}
        for where, images in asked.items():
            logits, before = self._forward(network, images)
            said |= {f"logits.{where}": logits} | ({f"features.{where}": before} if features else {})
        return said

    @torch.no_grad()
    def _forward(self, network: nn.Module, images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and features of all images, on the CPU."""
        kept: list[torch.Tensor] = []
        assert self.base.head
        handle = network.get_submodule(self.base.head).register_forward_pre_hook(
            lambda _, arguments: kept.append(arguments[0].float().cpu())
        )
        network.eval()
        logits = [
            network(preprocess(batch.to(self.device), self.base.input)).float().cpu()
            for batch in torch.split(images.images, 64)
        ]
        handle.remove()
        return torch.cat(logits), torch.cat(kept)

    def _build(self, weights: Path | None = None) -> nn.Module:
        network = build(self.base).to(self.device)
        load_file(network, weights or self.base.path / "base.safetensors", self.base.layout)
        return network

    def _network(self, weights: Path) -> nn.Module:
        """The one network that is used again and again."""
        load_file(self._reused, weights, self.base.layout)
        return self._reused

    # --- What no learning explains, and what no hospital should send

    def _controls(self, inputs: Sequence[MergeInput]) -> None:
        for name, kept in (("random", frozenset[str]()), ("random-body", head_tensors(self.base))):
            drawn = [self._random(each, kept, index) for index, each in enumerate(inputs)]
            self._keep(name, partial(self._merged, drawn, "sum", {}))
        self._keep("pretrained", partial(self._visited, self.base.path / "base.safetensors"))

    def _random(self, true: MergeInput, kept: frozenset[str], number: int) -> MergeInput:
        path = self.folder / f"random-{number}"
        generator = np.random.default_rng([self.cell.seed, number])
        with open_vector(true.path, self.base) as vector:
            write_tensors(path, self.base.vector_layout, randomised(vector, kept, generator))
        return replace(true, path=path)

    def _attacks(self, inputs: Mapping[str, MergeInput]) -> None:
        """One hospital, the first, sends something else."""
        (name, honest), *rest = inputs.items()
        others = [each for _, each in rest]
        sent: dict[str, list[MergeInput]] = {
            "none": [],
            "honest": [honest],
            "random": [self._random(honest, frozenset(), 1000)],
            "sign-flipped": [self._scaled(honest, -1.0)],
            "100-times": [self._scaled(honest, 100.0)],
            "labels-rotated": [self._train(name, rotate=1)],
        }
        for attack, vectors in sent.items():
            together = [*vectors, *others]
            inspections = inspect_vectors(self.base, together, gram_matrix(self.base, together))
            write_json(self.folder / f"gate.{attack}.json", [each.reason for each in inspections])
        for method, parameters in ATTACKED:
            for attack, vectors in sent.items():
                work = partial(self._merged, [*vectors, *others], method, parameters)
                self._keep(f"attack.{attack}.{body_id(method, parameters)}", work)

    def _scaled(self, true: MergeInput, factor: float) -> MergeInput:
        path = self.folder / f"scaled{factor:g}"
        with open_vector(true.path, self.base) as vector:
            names = [spec.name for spec in self.base.layout.tensors]
            write_tensors(path, self.base.vector_layout, (vector.read(each) * np.float32(factor) for each in names))
        return replace(true, path=path)


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
        manifest, column = setting.data / "manifest.csv", cell.division
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


if __name__ == "__main__":
    main()
