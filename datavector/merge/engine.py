"""Streams over vector files, block by block: memory depends neither on the model nor, for long, on their number.

Blocks are small enough to stay in a core's cache between reading, summing and writing, and each thread has buffers of
its own, so a merge costs little more than the reading and writing itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datavector.errors import MergeError, NotFinite
from datavector.files import atomic_write, disk_full_at
from datavector.layout import FLOAT, FloatArray, TensorFile
from datavector.merge.registry import Merge, choose
from datavector.model import BaseModel, is_statistic
from datavector.vector import open_vector

BLOCK_BYTES = 512 << 10  # of one block over all hospitals: half of a usual second-level cache
MOST_ELEMENTS, FEWEST_ELEMENTS = 1 << 15, 1 << 14
MOST_THREADS = 4
RUN = 64  # neighbouring blocks that a thread takes at once

Progress = Callable[[int, int], None]


def merge_vectors(
    base: BaseModel,
    vectors: Sequence[Path],
    method: str,
    parameters: Mapping[str, Any],
    output: Path,
    *,
    progress: Progress | None = None,
) -> None:
    """Writes theta_pre + merge(vectors) in the base model's layout; BatchNorm statistics stay the pretrained ones.

    Args:
        vectors: files of `base`, in any order: the output's bytes are the same.
        method: a name from `datavector.merge.methods()`.
        parameters: of the method.
        output: replaced atomically.
        progress: called with the bytes of the output done and in all.
    Raises:
        ConfigError: an unknown method or parameter.
        MergeError: there are no vectors.
        WrongLayout: a file is no vector of this base.
        NotFinite: the merged weights overflow float32.
        DiskFull: no space is left.
    """
    merge = choose(method, parameters)
    if not vectors:
        raise MergeError("there are no vectors to merge", remedy="wait until a hospital has sent one")
    with ExitStack() as files:
        pretrained = files.enter_context(base.open())
        opened = [files.enter_context(open_vector(path, base)) for path in vectors]
        target = files.enter_context(atomic_write(output))
        target.write(base.layout.header)
        target.flush()
        work = _Work(merge, pretrained, opened, target.fileno(), output)
        _run(work, list(_blocks(base, len(opened))), progress)


@dataclass(frozen=True)
class _Slice:
    """`count` elements of a tensor, and where they begin in the base's file and in a vector's, in bytes."""

    tensor: str
    base_offset: int
    vector_offset: int
    count: int


def _blocks(base: BaseModel, hospitals: int) -> Iterator[_Slice]:
    length = min(MOST_ELEMENTS, max(FEWEST_ELEMENTS, BLOCK_BYTES // FLOAT.itemsize // hospitals))
    for spec in base.layout.tensors:
        begin, vector_begin = base.layout.offsets[spec.name], base.vector_layout.offsets[spec.name]
        for start in range(0, spec.elements, length):
            skipped = start * FLOAT.itemsize
            yield _Slice(spec.name, begin + skipped, vector_begin + skipped, min(length, spec.elements - start))


class _Work:
    """What the threads share, and the buffers that each has for itself."""

    def __init__(
        self, merge: Merge, pretrained: TensorFile, vectors: Sequence[TensorFile], descriptor: int, output: Path
    ) -> None:
        self.merge = merge
        self.pretrained = pretrained
        self.vectors = vectors
        self.descriptor = descriptor
        self.output = output

    def do(self, slices: Sequence[_Slice]) -> int:
        """Merges and writes some slices; returns their bytes."""
        largest = max(piece.count for piece in slices)
        weights = np.empty(largest, dtype=FLOAT)
        rows = np.empty((len(self.vectors), largest), dtype=FLOAT)
        for piece in slices:
            self._merge(piece, weights[: piece.count], rows[:, : piece.count])
        return sum(piece.count for piece in slices) * FLOAT.itemsize

    def _merge(self, piece: _Slice, weights: FloatArray, rows: FloatArray) -> None:
        self.pretrained.read_into(weights, piece.base_offset)
        if not is_statistic(piece.tensor):
            for vector, row in zip(self.vectors, rows, strict=True):
                vector.read_into(row, piece.vector_offset)
            with np.errstate(over="ignore", invalid="ignore"):
                weights += self.merge(rows)
            if not np.isfinite(weights).all():
                raise NotFinite(
                    f"the merged weights of {piece.tensor} overflow",
                    remedy="a vector has values out of proportion: check the vectors, or use the mean",
                )
        left, offset = weights.data.cast("B"), piece.base_offset
        with disk_full_at(self.output):
            while left:
                done = os.pwrite(self.descriptor, left, offset)
                left, offset = left[done:], offset + done


def _run(work: _Work, slices: Sequence[_Slice], progress: Progress | None) -> None:
    """Every thread takes runs of neighbouring slices, so each file is read forwards."""
    total = sum(piece.count for piece in slices) * FLOAT.itemsize
    runs = [slices[begin : begin + RUN] for begin in range(0, len(slices), RUN)]
    done = 0
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        try:
            for written in threads.map(work.do, runs):
                done += written
                if progress:
                    progress(done, total)
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
