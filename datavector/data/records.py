"""What a hospital's images are: one record per image, and which of them train and which validate."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from datavector.errors import UnknownClass, UnreadableData, UsageError

EXTENSIONS: Final = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
SPLITS: Final = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, order=True)
class Record:
    """One image.

    Attributes:
        split: "train", "val", "test", or "" where nobody has decided.
        group: what must not be torn apart between training and validation (a patient), or "".
    """

    path: Path
    label: str
    split: str = ""
    group: str = ""


def is_image(path: Path) -> bool:
    """Whether a file's name is that of an image; hidden files (macOS leaves `._scan.jpg` behind) are none."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def read_records(source: Path) -> list[Record]:
    """The images of a folder (`datavector.data.folder`) or of a CSV manifest (`datavector.data.manifest`), sorted.

    Raises:
        UnreadableData: `source` is absent, not readable, or not laid out as either of them.
        NoImages: it holds no image.
    """
    from datavector.data.folder import read_folder
    from datavector.data.manifest import read_manifest

    if source.is_dir():
        return read_folder(source)
    if source.suffix.lower() == ".csv" and source.is_file():
        return read_manifest(source)
    what = "is neither a folder nor a .csv file" if source.exists() else "does not exist"
    raise UnreadableData(
        f"{source} {what}", remedy="give a folder with one folder per class, or a CSV manifest with columns file,label"
    )


def assign_splits(records: Sequence[Record], *, validation: float, seed: int) -> list[Record]:
    """Decides for every record, sorted, whether it trains, validates or tests.

    Where records with split "val" exist, that decision stands. Else each class gives `validation` of its undecided and
    training images; all images of a group go the same way, so shares are then met as nearly as whole groups allow.
    Every class with two images or more keeps one for training. The choice depends on `seed` and on the paths relative
    to their common folder: not on where that folder lies, nor on the order of files.

    Args:
        validation: share of the images, 0 <= validation < 1.
    Raises:
        UsageError: the share is outside that range.
    """
    if not 0 <= validation < 1:
        raise UsageError(f"the validation share is {validation}", remedy="give a share from 0 up to, not including, 1")
    candidates = sorted(record for record in records if record.split in ("", "train"))
    decided = any(record.split == "val" for record in records)
    chosen = set() if decided or validation == 0 else _choose(candidates, validation, seed)
    return sorted(replace(record, split="val" if record in chosen else record.split or "train") for record in records)


def demand_known(records: Iterable[Record], classes: Sequence[str]) -> None:
    """Raises UnknownClass for the first label that is not among the base model's `classes`."""
    known = set(classes)
    unknown = sorted({record.label for record in records if record.label not in known})
    if not unknown:
        return
    label = unknown[0]
    example = min(record.path for record in records if record.label == label)
    lower = {name.lower(): name for name in classes}
    near = difflib.get_close_matches(label.lower(), list(lower), n=1, cutoff=0.5)
    others = f" (nor has it {', '.join(map(repr, unknown[1:4]))})" if unknown[1:] else ""
    hint = f"rename {label!r} to {lower[near[0]]!r} if that is what it means" if near else f"rename or remove {label!r}"
    raise UnknownClass(
        f"the base model has no class {label!r}{others}, the label of {example}; its classes are {', '.join(classes)}",
        remedy=f"{hint}; a new class needs a new base model",
    )


def _choose(candidates: Sequence[Record], validation: float, seed: int) -> set[Record]:
    """Takes units (groups or single images), in an order drawn by `seed`, that bring classes nearer their share."""
    if not candidates:
        return set()
    units = _units(candidates, seed)
    held = Counter(record.label for record in candidates)
    target = {label: min(math.floor(validation * count + 0.5), count - 1) for label, count in held.items()}
    taken: Counter[str] = Counter()
    chosen: set[Record] = set()
    for unit in units:
        labels = Counter(record.label for record in unit)
        gain = sum(abs(target[key] - taken[key]) - abs(target[key] - taken[key] - labels[key]) for key in labels)
        if gain > 0 and _leaves_one(held, taken, labels):
            taken += labels
            chosen.update(unit)
    if not chosen:  # every share rounds to none, or every group is larger than twice a share
        small = min(
            (u for u in units if _leaves_one(held, Counter(), Counter(r.label for r in u))), key=len, default=[]
        )
        chosen.update(small)
    return chosen


def _units(candidates: Sequence[Record], seed: int) -> list[list[Record]]:
    """What goes one way together, in an order that only `seed`, group names and relative paths determine."""
    paths = {record: Path(os.path.normpath(record.path.absolute())) for record in candidates}
    common = os.path.commonpath([path.parent for path in paths.values()])
    units: defaultdict[str, list[Record]] = defaultdict(list)
    for record in candidates:
        relative = paths[record].relative_to(common).as_posix()
        units[f"group\0{record.group}" if record.group else f"file\0{relative}"].append(record)
    return [units[key] for key in sorted(units, key=lambda key: _drawn(seed, key))]


def _drawn(seed: int, key: str) -> bytes:
    """A key's place in the order; a file's name need not be UTF-8."""
    return hashlib.sha256(f"{seed}\0{key}".encode(errors="surrogateescape")).digest()


def _leaves_one(held: Counter[str], taken: Counter[str], labels: Counter[str]) -> bool:
    return all(held[label] - taken[label] - count >= 1 for label, count in labels.items())
