"""Where the demo's images come from, and which hospital holds which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datavector.console import Progress
from datavector.data.manifest import read_by_column
from datavector.data.records import Record
from datavector.data.synthetic import synthesise
from datavector.errors import NoImages


@dataclass(frozen=True)
class Source:
    """Images of several hospitals and a common test set.

    Attributes:
        hospitals: training records by hospital, in the order in which the hospitals take part.
        test: images that no hospital trains on.
    """

    classes: tuple[str, ...]
    hospitals: Mapping[str, Sequence[Record]]
    test: Sequence[Record]


def synthesised(folder: Path, *, hospitals: int, images: int, seed: int, progress: Progress) -> Source:
    """Procedural skin lesions, made in `folder` unless they are there already."""
    manifest = synthesise(folder, hospitals=hospitals, images=images, seed=seed, progress=progress)
    return from_manifest(manifest, column="hospital", hospitals=hospitals, images=images, seed=seed)


def from_manifest(path: Path, *, column: str, hospitals: int, images: int, seed: int) -> Source:
    """Reads a CSV manifest `file,label,split,<column>`, where the column names the hospital of a training image.

    Args:
        hospitals: at most this many hospitals take part, the first by name.
        images: at most this many training images of each, drawn by seed.

    Raises:
        UnreadableData: the manifest or a column of it is missing, or a line is wrong.
        NoImages: fewer than two hospitals, or no test image.
    """
    found = read_by_column(path, column)
    training = {name: [record for record in records if record.split == "train"] for name, records in found.items()}
    names = [name for name in training if name and training[name]][:hospitals]
    everything = [record for records in found.values() for record in records]
    test = sorted(record for record in everything if record.split == "test")
    if len(names) < 2 or not test:
        raise NoImages(
            f"{path} has {len(names)} hospitals in column {column!r} and {len(test)} test images",
            remedy="name a column that assigns training images to at least two hospitals, and keep a test split",
        )
    classes = tuple(sorted({record.label for record in everything}))
    return Source(classes, {name: _draw(training[name], images, seed) for name in names}, test)


def _draw(records: Sequence[Record], images: int, seed: int) -> list[Record]:
    chosen = np.random.default_rng(seed).permutation(len(records))[:images]
    return sorted(records[index] for index in chosen)
