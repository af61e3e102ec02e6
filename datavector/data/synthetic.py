"""A data set to try DataVector with, drawn by a program: several hospitals' skin lesions under a dermatoscope.

The images show what dermatologists look for - asymmetry, border, colours, network, globules, streaks, cysts, lacunae,
vessels (the dermoscopic criteria of Argenziano et al., J Am Acad Dermatol 2003; 48: 679-693) - as overlapping
distributions, so that no image is certain. Hospitals differ in patients and in equipment. They are no medical images: a
model trained on them knows nothing of skin.
"""

from __future__ import annotations

import csv
import io
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Final

import numpy as np

from datavector.data.lesions import LABELS, Look, draw_lesion, photograph
from datavector.errors import UsageError
from datavector.files import atomic_write, disk_full_at

HOSPITALS: Final = ("north", "south", "east", "west")
SPLITS: Final = ("train", "val", "test")
COLUMNS: Final = ("file", "label", "split", "hospital")


def synthesise(
    output: Path,
    *,
    hospitals: int = 4,
    images: int = 120,
    test_images: int = 400,
    validation_images: int = 0,
    seed: int = 0,
    size: int = 160,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draws JPEG images into `output/<split>/<label>/` and lists them in `output/manifest.csv`.

    Test and validation images are common: they mix all hospitals' looks evenly, have balanced classes and name no
    hospital in the manifest. The same arguments give the same bytes (for one version of numpy and Pillow); `processes`
    changes only the time it takes (10 ms an image and core).

    Args:
        images: training images of each hospital.
        size: side of the square images in pixels.
        progress: called with the number of images drawn and of all.
    Returns:
        The manifest: columns file, label, split, hospital.
    Raises:
        UsageError: fewer than one hospital or image, or a size below 32 pixels.
        DiskFull: no space is left.
    """
    if hospitals < 1 or images < 1 or size < 32 or min(test_images, validation_images) < 0:
        raise UsageError(
            f"{images} images of {size} pixels for each of {hospitals} hospitals cannot be drawn",
            remedy="ask for at least one hospital, one image and 32 pixels",
        )
    plans = [*_training(seed, hospitals, images)]
    plans += [*_common(seed, hospitals, validation_images, "val"), *_common(seed, hospitals, test_images, "test")]
    with disk_full_at(output):
        for split, label in {(plan.split, plan.label) for plan in plans}:
            (output / split / label).mkdir(parents=True, exist_ok=True)
        with _mapper(processes) as mapper:
            for done, _ in enumerate(mapper(_draw, plans, repeat(output), repeat(size)), start=1):
                if progress:
                    progress(done, len(plans))
    return _write_manifest(output / "manifest.csv", plans)


@dataclass(frozen=True)
class _Plan:
    """One image to draw; all its randomness comes from `seed`, `split`, `hospital` and `index`."""

    seed: int
    split: str
    hospital: int
    index: int
    label: str

    @property
    def file(self) -> str:
        return f"{self.split}/{self.label}/{hospital_name(self.hospital)}-{self.index:05}.jpg"


def hospital_name(number: int) -> str:
    """north, south, east, west, then hospital-5 and so on."""
    return HOSPITALS[number] if number < len(HOSPITALS) else f"hospital-{number + 1}"


def _training(seed: int, hospitals: int, images: int) -> Iterator[_Plan]:
    for hospital in range(hospitals):
        edges = np.cumsum(hospital_look(seed, hospital).weights)
        for index in range(images):
            kind = int(np.searchsorted(edges, (index + 0.5) / images))
            yield _Plan(seed, "train", hospital, index, LABELS[min(kind, len(LABELS) - 1)])


def _common(seed: int, hospitals: int, images: int, split: str) -> Iterator[_Plan]:
    for index in range(images):
        yield _Plan(seed, split, index % hospitals, index, LABELS[index // hospitals % len(LABELS)])


def _write_manifest(path: Path, plans: list[_Plan]) -> Path:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for plan in sorted(plans, key=lambda plan: plan.file):
        owner = hospital_name(plan.hospital) if plan.split == "train" else ""
        lines.writerow((plan.file, plan.label, plan.split, owner))
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
    return path


@contextmanager
def _mapper(processes: int) -> Iterator[Callable[..., Iterator[None]]]:
    if processes < 2:
        yield map
        return
    # spawn: a forked child inherits torch's and gRPC's locks, perhaps held
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.map(function, *arguments, chunksize=16)


def _draw(plan: _Plan, output: Path, size: int) -> None:
    rng = np.random.default_rng([plan.seed, SPLITS.index(plan.split), plan.hospital, plan.index])
    look = hospital_look(plan.seed, plan.hospital)
    image = photograph(draw_lesion(plan.label, look, rng, size), look, rng)
    image.save(output / plan.file, "JPEG", quality=look.quality)


@lru_cache(maxsize=1024)
def hospital_look(seed: int, hospital: int) -> Look:
    """The look of a hospital: spread evenly over what is possible, so that any few hospitals differ."""
    offset = np.random.default_rng([seed, 7919]).random(10)
    steps = np.sqrt([2, 3, 5, 7, 11, 13, 19, 23, 29, 31])  # a Kronecker sequence: fills the unit cube evenly
    tone, warm, green, light, contrast, vignette, blur, noise, quality, zoom = (
        (offset + hospital * steps) % 1.0
    ).tolist()
    rng = np.random.default_rng([seed, 7919, hospital])
    weights = np.exp(0.25 * rng.standard_normal(len(LABELS)))
    return Look(
        tone=0.2 + 0.2 * tone,
        gains=(1 + 0.06 * (warm - 0.5), 1 + 0.03 * (green - 0.5), 1 - 0.08 * (warm - 0.5)),
        light=0.93 + 0.14 * light,
        contrast=0.92 + 0.16 * contrast,
        vignette=0.25 * vignette,
        blur=0.9 * blur**2,
        noise=0.005 + 0.025 * noise,
        quality=int(45 + 50 * quality),
        zoom=0.43 + 0.16 * zoom,
        hairs=float(8 * rng.random() ** 1.5),
        ruler=float(rng.random() ** 2),
        weights=tuple((weights / weights.sum()).tolist()),
    )
