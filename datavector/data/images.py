"""Decoded images of one size: in memory, or in a memory-mapped file where there are many.

Every image is decoded once and squashed to a square by the operation that a release's ONNX graph also performs, so
that training and inference see the same pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from datavector.data.decode import decode as decode
from datavector.data.records import Record, demand_known
from datavector.errors import CorruptImages, UnreadableData
from datavector.files import atomic_write, canonical_json

BATCH = 256  # images that are in memory at once while a cache is written
FORMAT = "datavector-images/1"
_CACHE = re.compile(r"[0-9a-f]{64}\.(pixels|json)")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageSet:
    """Images that could be decoded, with their labels.

    Attributes:
        images: uint8, shape (images, 3, size, size), RGB; changing it never changes a cache file.
        labels: int64, shape (images,), indices into the classes.
        records: where each image came from.
        corrupt: the files that could not be decoded, each with the reason.
    """

    images: torch.Tensor
    labels: torch.Tensor
    records: tuple[Record, ...]
    corrupt: tuple[tuple[Path, str], ...]

    def __len__(self) -> int:
        return len(self.records)


def load_images(
    records: Sequence[Record],
    classes: Sequence[str],
    size: int,
    *,
    cache: Path | None = None,
    max_corrupt: float = 0.05,
    progress: Progress | None = None,
) -> ImageSet:
    """Decodes every record's image, in the records' order, on all CPU cores.

    Args:
        classes: the base model's; labels become indices into it.
        size: side of the square images in pixels.
        cache: a folder; pixels are then kept in a file there (3 x size x size bytes an image), mapped into memory, and
            used again at the next call with the same files. Its name is a digest of the files' paths, lengths and
            modification times: what has changed is decoded anew, and so are all while the operating system cannot read
            one of them. The files are their owner's alone; they may be deleted at any time (`unused_caches`).
        max_corrupt: the share of undecodable images that is tolerated.
        progress: called with the number of images done and of all.
    Raises:
        UnknownClass: a label is not among the classes.
        CorruptImages: more than `max_corrupt` of the images cannot be decoded.
        DiskFull: the cache does not fit.
    """
    demand_known(records, classes)
    images, corrupt = _in_memory(records, size, progress) if cache is None else _mapped(records, size, cache, progress)
    demand_few(corrupt, len(records), max_corrupt)
    broken = {path for path, _ in corrupt}
    decoded = tuple(record for record in records if record.path not in broken)
    index = {label: position for position, label in enumerate(classes)}
    labels = torch.tensor([index[record.label] for record in decoded], dtype=torch.int64)
    return ImageSet(images, labels, decoded, tuple(corrupt))


def cache_size(records: Sequence[Record], size: int, cache: Path) -> int:
    """Bytes that `load_images` would write into the folder `cache` at most; 0 where it finds them there."""
    return 0 if _recall(_files(records, size, cache)[1]) is not None else len(records) * 3 * size * size


def unused_caches(used: Iterable[Sequence[Record]], size: int, cache: Path) -> list[Path]:
    """The files in the folder `cache` that `load_images` would use for none of these lists of records."""
    kept = {file for records in used for file in _files(records, size, cache)}
    return [file for file in sorted(cache.glob("*")) if _CACHE.fullmatch(file.name) and file not in kept]


def resize(pixels: NDArray[np.uint8], size: int) -> torch.Tensor:
    """Squashes (height, width, 3) pixels to uint8 (3, size, size): antialiased bilinear in float32, then rounded."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    small = functional.interpolate(image, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return small[0].round().clamp(0, 255).to(torch.uint8)


Corrupt = list[tuple[Path, str]]
Failed = list[tuple[Path, UnreadableData]]


def _in_memory(records: Sequence[Record], size: int, progress: Progress | None) -> tuple[torch.Tensor, Corrupt]:
    images = torch.empty((len(records), 3, size, size), dtype=torch.uint8)
    failed: Failed = []
    filled = 0
    for image in _decoded(records, size, failed, progress):
        images[filled] = image
        filled += 1
    return images[:filled], _reasons(failed)


def _mapped(
    records: Sequence[Record], size: int, cache: Path, progress: Progress | None
) -> tuple[torch.Tensor, Corrupt]:
    pixels, note = _files(records, size, cache)
    corrupt = _recall(note)
    shape = (len(records) - len(corrupt or ()), 3, size, size)
    if corrupt is None or not pixels.is_file() or pixels.stat().st_size != np.prod(shape):
        failed: Failed = []
        note.unlink(missing_ok=True)
        with atomic_write(pixels, mode=0o600) as file:
            for image in _decoded(records, size, failed, progress):
                file.write(image.numpy().data)
        corrupt = _reasons(failed)
        if not any(_may_pass(error) for _, error in failed):  # else the next call has to look again
            with atomic_write(note, mode=0o600) as file:  # in ASCII, which keeps names that are no UTF-8, too
                content = {"format": FORMAT, "corrupt": [[str(path), reason] for path, reason in corrupt]}
                file.write(json.dumps(content).encode())
        shape = (len(records) - len(corrupt), 3, size, size)
    elif progress:
        progress(len(records), len(records))
    if not shape[0]:
        return torch.empty(shape, dtype=torch.uint8), corrupt
    # shared=False maps copy-on-write: pages come from the file and are dropped under memory pressure.
    flat = torch.from_file(str(pixels), shared=False, size=int(np.prod(shape)), dtype=torch.uint8)
    return flat.reshape(shape), corrupt


def _reasons(failed: Failed) -> Corrupt:
    return [(path, error.message) for path, error in failed]


def _may_pass(error: UnreadableData) -> bool:
    """Whether the operating system refused the file (no permission, I/O error), not a decoder its content."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno is not None


def _recall(note: Path) -> Corrupt | None:
    """The corrupt files that an earlier call found, or None where its note is absent or damaged."""
    try:
        content = json.loads(note.read_text())
        return [(Path(path), reason) for path, reason in content["corrupt"]] if content["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(records: Sequence[Record], size: int, cache: Path) -> tuple[Path, Path]:
    """Where the pixels are kept, and the note that says that they are whole."""
    content = canonical_json([FORMAT, size, [_identity(record.path) for record in records]])
    key = hashlib.sha256(content).hexdigest()
    return cache / f"{key}.pixels", cache / f"{key}.json"


def _identity(path: Path) -> list[object]:
    name = os.fsencode(path.absolute()).hex()  # it need not be UTF-8
    try:
        status = path.stat()
    except OSError:
        return [name, -1, -1]
    return [name, status.st_size, status.st_mtime_ns]


def _decoded(records: Sequence[Record], size: int, failed: Failed, progress: Progress | None) -> Iterator[torch.Tensor]:
    """Yields (3, size, size) images in the records' order; notes in `failed` those that it cannot decode."""

    def load(record: Record) -> torch.Tensor | UnreadableData:
        try:
            return resize(decode(record.path), size)
        except UnreadableData as error:
            return error

    waiting = iter(records)
    done = 0
    with _one_torch_thread(), ThreadPoolExecutor() as pool:
        while batch := list(islice(waiting, BATCH)):
            for record, image in zip(batch, pool.map(load, batch), strict=True):
                done += 1
                if progress:
                    progress(done, len(records))
                if isinstance(image, UnreadableData):
                    failed.append((record.path, image))
                else:
                    yield image


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keeps torch from starting one set of threads inside each of the pool's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def demand_few(corrupt: Sequence[tuple[Path, str]], count: int, max_corrupt: float) -> None:
    """Raises CorruptImages if more than a share `max_corrupt` of `count` images cannot be decoded."""
    if len(corrupt) > max_corrupt * count:
        first = "; ".join(reason for _, reason in corrupt[:3])
        raise CorruptImages(
            f"{len(corrupt)} of {count} images cannot be decoded, more than {max_corrupt:.0%}: {first}"
            + ("; ..." if corrupt[3:] else ""),
            remedy="replace or remove these files, or raise data.max_corrupt",
        )
