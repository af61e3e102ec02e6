"""The data vector of a hospital: tau = theta_ft - theta_pre (arXiv 2408.13038, section 3).

A vector file is safetensors, float32, with every floating-point tensor of the model; the BatchNorm statistics
travel with it as differences too. Its header is fully determined by the base model, so a receiver demands it byte
for byte and then needs no parser: length, header, finite values and digest decide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from datavector.errors import NotFinite, WrongDigest, WrongLayout
from datavector.files import sha256_file
from datavector.layout import FLOAT, FloatArray, Layout, TensorFile, write_tensors
from datavector.model import BaseModel

LARGEST = 1e12  # beyond what any training gives, and sums of it stay finite


def write_vector(path: Path, base: BaseModel, tuned: Mapping[str, FloatArray]) -> str:
    """Writes theta_ft - theta_pre for every tensor of `base`, into a file that only its owner may read.

    Args:
        tuned: the fine-tuned tensors by name, float32, in the base model's shapes.

    Returns:
        SHA-256 of the file, 64 hexadecimal digits.

    Raises:
        WrongLayout: a tensor is missing or has another shape.
        NotFinite: training diverged.
        DiskFull: no space is left.
    """
    with base.open() as pretrained:
        differences = (_difference(pretrained, tuned, name) for name in _names(base, tuned))
        write_tensors(path, base.vector_layout, differences, mode=0o600)
    return sha256_file(path)


def open_vector(path: Path, base: BaseModel) -> TensorFile:
    """A vector file of `base`, for reading.

    Raises:
        WrongLayout: its length or header is not the one that the base model determines.
    """
    return TensorFile(path, base.vector_layout)


class VectorScanner:
    """Checks a vector while its bytes pass by, in any division into chunks; or other tensors of a known layout.

    Feed it every byte from the first on, then call `finish`. Memory is one chunk, whatever the vector's size.

    Args:
        what: the file's name in errors.
        least: that a value may be.
    """

    def __init__(self, layout: Layout, what: str = "vector", least: float = -LARGEST) -> None:
        self.layout = layout
        self.what = what
        self.least = least
        self.offset = 0
        self._digest = hashlib.sha256()
        self._carry = b""  # bytes of a float that a chunk's end cut in two

    def feed(self, chunk: bytes | memoryview) -> None:
        """Takes the next bytes.

        Raises:
            WrongLayout: the header differs, or the file is too long.
            NotFinite: a value is NaN, infinite, below `least` or above LARGEST.
        """
        header, begin = self.layout.header, self.offset
        self.offset += len(chunk)
        if self.offset > self.layout.size:
            raise WrongLayout(
                f"the {self.what} is longer than the {self.layout.size} bytes that its model demands",
                remedy=f"send a {self.what} of the base model that the aggregator merges",
            )
        in_header = memoryview(chunk)[: max(len(header) - begin, 0)]
        if in_header != header[begin : begin + len(in_header)]:
            raise WrongLayout(
                f"the {self.what}'s header is not the one that its model demands",
                remedy=f"send a {self.what} of the base model that the aggregator merges; a different architecture, "
                "class list or software version gives another header",
            )
        self._demand_finite(memoryview(chunk)[len(in_header) :])
        self._digest.update(chunk)

    def finish(self, *, size: int, sha256: str) -> None:
        """Compares what passed by with what was announced.

        Raises:
            WrongDigest: length or SHA-256 differ.
        """
        if (self.offset, self._digest.hexdigest()) != (size, sha256) or size != self.layout.size:
            raise WrongDigest(
                f"{self.offset} bytes arrived with SHA-256 {self._digest.hexdigest()}, "
                f"announced were {size} bytes with {sha256}",
                remedy=f"the bytes changed on the way or on disk: send the {self.what} again from its start",
            )

    def _demand_finite(self, payload: memoryview) -> None:
        if self._carry:
            payload = memoryview(self._carry + bytes(payload))
        whole = len(payload) - len(payload) % FLOAT.itemsize
        self._carry = bytes(payload[whole:])
        values = np.frombuffer(payload[:whole], dtype=FLOAT)
        if not self.least <= values.min(initial=0.0) <= values.max(initial=0.0) <= LARGEST:  # a NaN is in no order
            raise NotFinite(
                f"the {self.what} holds NaN, infinity or a value beyond {self.least:g} to {LARGEST:g} before byte "
                f"{self.offset}",
                remedy="if training diverged, lower learning_rate, and train again",
            )


def _names(base: BaseModel, tuned: Mapping[str, FloatArray]) -> list[str]:
    missing = [tensor.name for tensor in base.layout.tensors if tensor.name not in tuned]
    if missing:
        raise WrongLayout(f"fine-tuned weights lack {missing[0]}", remedy="fine-tune the base model's own architecture")
    return [tensor.name for tensor in base.layout.tensors]


def _difference(pretrained: TensorFile, tuned: Mapping[str, FloatArray], name: str) -> FloatArray:
    before = pretrained.read(name)
    if tuned[name].shape != before.shape:  # numpy would stretch some of them
        raise WrongLayout(
            f"{name} has shape {tuned[name].shape}, its model demands {before.shape}",
            remedy="fine-tune the base model's own architecture and classes",
        )
    difference: FloatArray = tuned[name].astype(FLOAT) - before
    if not np.isfinite(difference).all():
        raise NotFinite(f"{name} became NaN or infinite", remedy="lower learning_rate and train again")
    return difference
