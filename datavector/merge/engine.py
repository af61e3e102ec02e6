"""Merges vector files without ever holding a whole model: theta_mix = theta_pre + merge(tau_1..tau_N).

Tensors are read in blocks at positions, one block of every file at a time, so memory depends neither on the number of
hospitals nor on the size of the model. BatchNorm statistics stay the pretrained ones; they are restored later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from datavector.console import Progress
from datavector.errors import MergeError
from datavector.files import atomic_write
from datavector.layout import FLOAT, FloatArray, TensorFile, TensorSpec
from datavector.merge.methods import bind
from datavector.model import BaseModel, is_statistic
from datavector.vector import open_vector

BLOCK_VALUES = 1 << 20  # float32 values of all hospitals together that are in memory at once
SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 12, 1 << 16  # elements; the largest is what a core's cache holds best


def merge_vectors(
    base: BaseModel,
    vectors: Sequence[Path],
    method: str,
    parameters: Mapping[str, float],
    output: Path,
    *,
    progress: Progress | None = None,
) -> None:
    """Writes the merged weights, a file of the base model's layout, atomically.

    Args:
        vectors: one file for each hospital; their order does not matter.
        progress: called with elements done and elements in all.

    Raises:
        MergeError: there is no vector.
        ConfigError: an unknown method or parameter.
        WrongLayout: a vector is of another model.
        DiskFull: no space is left.
    """
    if not vectors:
        raise MergeError("there is no vector to merge", remedy="wait for a hospital, or name at least one file")
    merge = bind(method, parameters)
    block = min(max(BLOCK_VALUES // len(vectors), SMALLEST_BLOCK), LARGEST_BLOCK)
    with ExitStack() as files, atomic_write(output) as result:
        pretrained = files.enter_context(base.open())
        opened = [files.enter_context(open_vector(path, base)) for path in vectors]
        result.write(base.layout.header)
        done = 0
        for spec in base.layout.tensors:
            for values in _merged(spec, pretrained, opened, merge, block):
                result.write(values.data)
                done += values.size
                if progress:
                    progress(done, base.layout.elements)


def _merged(
    spec: TensorSpec,
    pretrained: TensorFile,
    vectors: Sequence[TensorFile],
    merge: Callable[[FloatArray], FloatArray],
    block: int,
) -> Iterator[FloatArray]:
    """The merged values of one tensor, block by block."""
    buffer = np.empty((len(vectors), min(block, spec.elements)), dtype=FLOAT)
    for start in range(0, spec.elements, block):
        count = min(block, spec.elements - start)
        values = pretrained.read(spec.name, start=start, count=count)
        if not is_statistic(spec.name):
            rows = buffer[:, :count] if count == buffer.shape[1] else np.empty((len(vectors), count), dtype=FLOAT)
            for row, vector in zip(rows, vectors, strict=True):
                vector.read_into(row, vector.layout.offsets[spec.name] + start * FLOAT.itemsize)
            values += merge(rows)
        yield values
