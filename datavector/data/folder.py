"""Folders of images, as torchvision's ImageFolder reads them: one folder per class, its name the label.

Either directly (`nevus/1.jpg`), or below folders for the splits (`train/nevus/1.jpg`, `val/...`, `test/...`).
https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from datavector.data.records import EXTENSIONS, SPLITS, Record, is_image
from datavector.errors import NoImages, UnreadableData


def read_folder(root: Path) -> list[Record]:
    """All images below `root`, sorted. Files that are no images by their extension are passed over.

    Raises:
        UnreadableData: a folder cannot be listed, or folders of splits and of classes are mixed.
        NoImages: there is none.
    """
    folders = _folders(root)
    splits = [folder for folder in folders if folder.name.lower() in SPLITS]
    if splits:
        _demand_layout(root, folders, splits)
        records = [record for folder in splits for record in _classes(folder, SPLITS[folder.name.lower()])]
    else:
        records = _classes(root, "")
    if not records:
        raise NoImages(
            f"{root} holds no image in a folder per class",
            remedy=f"put images ({' '.join(name[1:] for name in EXTENSIONS)}) into {root / 'LABEL'}, one folder per "
            "class, or give a CSV manifest",
        )
    return sorted(records)


def _demand_layout(root: Path, folders: list[Path], splits: list[Path]) -> None:
    others = [folder.name for folder in folders if folder not in splits]
    if others:
        raise UnreadableData(
            f"{root} mixes folders of splits ({', '.join(folder.name for folder in splits)}) with others "
            f"({', '.join(others[:5])})",
            remedy="leave only train, val and test there, or only folders of classes",
        )
    if not any(SPLITS[folder.name.lower()] == "train" for folder in splits):
        raise UnreadableData(
            f"{root} has {', '.join(folder.name for folder in splits)}, but no folder train",
            remedy=f"put the training images into {root / 'train' / 'LABEL'}",
        )


def _classes(folder: Path, split: str) -> list[Record]:
    return [Record(path, label.name, split) for label in _folders(folder) for path in _images(label)]


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise _unreadable(error) from error


def _images(folder: Path) -> Iterator[Path]:
    """Images at any depth, links followed, each real folder entered once (a link may lead back up)."""
    seen: set[str] = set()
    for parent, below, files in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield from (path for path in (Path(parent, name) for name in sorted(files)) if is_image(path))


def _raise(error: OSError) -> None:
    raise _unreadable(error) from error


def _unreadable(error: OSError) -> UnreadableData:
    return UnreadableData(
        f"{error.filename} cannot be listed ({error.strerror})",
        remedy="give the user that runs DataVector the right to read it",
    )
