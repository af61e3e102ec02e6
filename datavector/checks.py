"""What can be said of a hospital's images before a minute of training is spent on them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from datavector.console import listed
from datavector.data.records import Record, demand_known
from datavector.errors import NoImages, OneClassOnly

FEW = 5  # images of a class below which its statistics say little
IMBALANCE = 10  # largest class over smallest from which on it is worth a warning


@dataclass(frozen=True)
class DataSummary:
    """Counts of images, and what to look at.

    Attributes:
        classes: the base model's, or where none is given those of the images, sorted.
        counts: split ("train", "val", "test") to class to images; undecided images count as "train".
        warnings: sentences for people; none of them stops anything.
    """

    classes: tuple[str, ...]
    counts: Mapping[str, Mapping[str, int]]
    warnings: tuple[str, ...]

    @property
    def images(self) -> int:
        return sum(sum(split.values()) for split in self.counts.values())

    def __str__(self) -> str:
        splits = (f"{sum(counts.values())} {split}" for split, counts in self.counts.items())
        return f"{self.images} images ({', '.join(splits)}) of {len(self.classes)} classes"


def check_records(records: Sequence[Record], classes: Sequence[str] | None = None) -> DataSummary:
    """Counts images per class and split, and says what is wrong or unusual.

    Args:
        classes: the base model's, if one is known.
    Raises:
        NoImages: there is no image to train on.
        UnknownClass: a label is not among the classes.
        OneClassOnly: all images to train on have the same label.
    """
    named = tuple(classes) if classes is not None else tuple(sorted({record.label for record in records}))
    demand_known(records, named)
    counts = {split: dict.fromkeys(named, 0) for split in ("train", "val", "test")}
    for record in records:
        counts[record.split or "train"][record.label] += 1
    training = {label: count for label, count in counts["train"].items() if count}
    if not training:
        raise NoImages("there is no image to train on", remedy="mark images with the split train, or leave it empty")
    if len(training) == 1:
        only, count = next(iter(training.items()))
        raise OneClassOnly(
            f"all {count} training images have the label {only!r}",
            remedy="add images of another class: with one there is nothing to tell apart",
        )
    present = {split: of for split, of in counts.items() if any(of.values())}
    return DataSummary(named, present, tuple(_warnings(records, training, named)))


def _warnings(records: Sequence[Record], training: Mapping[str, int], classes: Sequence[str]) -> list[str]:
    absent = [label for label in classes if label not in training]
    few = [f"{label} ({count})" for label, count in training.items() if count < FEW]
    largest, smallest = max(training, key=training.__getitem__), min(training, key=training.__getitem__)
    torn = _torn_groups(records)
    warnings = []
    if absent:
        warnings.append(f"No training image of {listed(absent)}: this hospital cannot contribute to them.")
    if few:
        warnings.append(f"Fewer than {FEW} training images of {listed(few)}.")
    if training[largest] >= IMBALANCE * training[smallest]:
        ratio = training[largest] / training[smallest]
        warnings.append(f"Strong imbalance: {largest} has {ratio:.0f} times as many training images as {smallest}.")
    if torn:
        warnings.append(
            f"{len(torn)} groups have images in more than one split, which flatters results: {listed(torn)}."
        )
    return warnings


def _torn_groups(records: Sequence[Record]) -> list[str]:
    splits: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        splits[record.group][record.split or "train"] += 1
    return sorted(group for group, found in splits.items() if group and len(found) > 1)
