"""Where the demo's images come from, and which hospital holds which."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datavector.console import Progress
from datavector.data.records import Record
from datavector.data.synthetic import synthesise
from datavector.errors import NoImages, UnreadableData
from datavector.files import atomic_write


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
        UnreadableData: the manifest or a column of it is missing.
        NoImages: no training image of a hospital, or no test image.
    """
    rows = _rows(path, column)
    names = sorted({row[column] for row in rows if row["split"] == "train" and row[column]})[:hospitals]
    training = {
        name: _draw(
            [_record(path, row) for row in rows if row["split"] == "train" and row[column] == name], images, seed
        )
        for name in names
    }
    test = [_record(path, row) for row in rows if row["split"] == "test"]
    if len(names) < 2 or not test:
        raise NoImages(
            f"{path} has {len(names)} hospitals in column {column!r} and {len(test)} test images",
            remedy="name a column that assigns training images to at least two hospitals, and keep a test split",
        )
    classes = tuple(sorted({row["label"] for row in rows}))
    return Source(classes, training, test)


def write_manifest(path: Path, records: Sequence[Record]) -> None:
    """Writes a hospital's own manifest; without a split, the agent decides which images validate."""
    lines = ["file,label", *(f'"{record.path.resolve()}","{record.label}"' for record in records)]
    with atomic_write(path) as file:
        file.write("\n".join(lines).encode() + b"\n")


def _rows(path: Path, column: str) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnreadableData(
            f"{path} cannot be read ({error})", remedy="put a manifest.csv into the folder given as --data"
        ) from error
    for name in ("file", "label", "split", column):
        if rows and name not in rows[0]:
            raise UnreadableData(
                f"{path} has no column {name!r}, but {', '.join(rows[0])}", remedy="name one of them as --split-column"
            )
    return rows


def _record(manifest: Path, row: Mapping[str, str]) -> Record:
    return Record(manifest.parent / row["file"], row["label"], row["split"])


def _draw(records: Sequence[Record], images: int, seed: int) -> list[Record]:
    chosen = np.random.default_rng(seed).permutation(len(records))[:images]
    return sorted(records[index] for index in chosen)
