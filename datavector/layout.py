"""The layout of a safetensors file that holds float32 tensors and nothing else.

Base models, data vectors and merged weights of one model have the same tensors at the same places, so a layout
determines the whole header, byte for byte (format: https://github.com/huggingface/safetensors#format). Files are
read at positions, never as a whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from datavector.errors import WrongLayout
from datavector.files import atomic_write, read_at

FloatArray = NDArray[np.float32]
FLOAT = np.dtype("<f4")


@dataclass(frozen=True)
class TensorSpec:
    """Name and shape of one float32 tensor."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Which tensors a file holds, in which order, and where.

    Attributes:
        tensors: sorted by name, which is also their order in the file.
        metadata: the header's `__metadata__`, text to text.
    """

    tensors: tuple[TensorSpec, ...]
    metadata: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        if names != sorted(set(names)):
            raise WrongLayout("tensor names are not sorted or not unique", remedy="sort the tensors by name")

    def with_metadata(self, **metadata: str) -> Layout:
        return Layout(self.tensors, tuple(sorted(metadata.items())))

    @cached_property
    def header(self) -> bytes:
        """The length prefix and the JSON, padded with spaces to a multiple of 8 bytes."""
        content: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        end = 0
        for tensor in self.tensors:
            begin, end = end, end + tensor.elements * FLOAT.itemsize
            content[tensor.name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        """Where each tensor begins, in bytes from the start of the file."""
        offsets, end = {}, len(self.header)
        for tensor in self.tensors:
            offsets[tensor.name] = end
            end += tensor.elements * FLOAT.itemsize
        return offsets

    @cached_property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def size(self) -> int:
        """Length of the whole file in bytes."""
        return len(self.header) + self.elements * FLOAT.itemsize

    @cached_property
    def by_name(self) -> Mapping[str, TensorSpec]:
        return {tensor.name: tensor for tensor in self.tensors}


class TensorFile:
    """Positional reads from a file whose layout is known; opening it checks length and header."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        size = os.fstat(self._descriptor).st_size
        if size != self.layout.size:
            raise WrongLayout(
                f"{self.path} has {size} bytes, its model demands {self.layout.size}",
                remedy="it was made for another model, or cut short: make it again",
            )
        header = self.layout.header
        if os.pread(self._descriptor, len(header), 0) != header:
            raise WrongLayout(
                f"{self.path} does not begin with the header that its model demands",
                remedy="it was made for another model or another version of it: make it again",
            )

    def read(self, name: str, *, start: int = 0, count: int | None = None) -> FloatArray:
        """One tensor in its shape, or `count` of its elements from `start` on as a flat array.

        The array is fresh: changing it changes no file.
        """
        tensor = self.layout.by_name[name]
        whole = start == 0 and count is None
        values: FloatArray = np.empty(tensor.elements - start if count is None else count, dtype=FLOAT)
        self.read_into(values, self.layout.offsets[name] + start * FLOAT.itemsize)
        return values.reshape(tensor.shape) if whole else values

    def read_slice(self, values: FloatArray, tensor: str, start: int) -> None:
        """Fills a contiguous array with the elements of a tensor from `start` on."""
        self.read_into(values, self.layout.offsets[tensor] + start * FLOAT.itemsize)

    def read_into(self, values: FloatArray, offset: int) -> None:
        """Fills a contiguous array from byte `offset` on."""
        if not read_at(self._descriptor, values.reshape(-1).data.cast("B"), offset):
            raise WrongLayout(f"{self.path} ends too early", remedy="it changed while it was read: make it again")

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_tensors(path: Path, layout: Layout, tensors: Iterable[FloatArray], *, mode: int = 0o644) -> None:
    """Writes a file atomically. `tensors` come in the layout's order; one is in memory at a time.

    Raises:
        WrongLayout: a tensor's shape is not the layout's.
        ValueError: there are more or fewer tensors than in the layout.
        DiskFull: no space is left.
    """
    with atomic_write(path, mode=mode) as file:
        file.write(layout.header)
        for spec, tensor in zip(layout.tensors, tensors, strict=True):
            if tensor.shape != spec.shape:
                raise WrongLayout(
                    f"{spec.name} has shape {tensor.shape}, its model demands {spec.shape}",
                    remedy="use weights of this model's architecture and classes",
                )
            file.write(np.ascontiguousarray(tensor, dtype=FLOAT).data)
