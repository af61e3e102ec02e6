"""Merging plain checkpoints, without any hospital: a pretrained model and models that were fine-tuned from it.

safetensors files (https://github.com/huggingface/safetensors#format) are read and written at positions, never as a
whole; PyTorch files are turned into such first. A model's vector is its difference to the base, made on the way.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datavector.errors import ArtifactError, NotFinite, UsageError, WrongLayout
from datavector.files import atomic_write, disk_full_at, read_at, sha256_file, write_at
from datavector.layout import FLOAT, FloatArray, TensorSpec
from datavector.merge import MergeInput, choose, gram_matrix, merge_tensors, merge_vectors
from datavector.merge.cohort import Cohort
from datavector.model import DESCRIPTION, BaseModel, is_statistic

PYTORCH = (".pt", ".pth", ".bin")
MOST_HEADER = 100 << 20  # bytes, as safetensors itself allows
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
NARROW = ("F16", "BF16")  # in which finite float32 values may be infinite
COPY = 1 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type as safetensors names it, its shape, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Checkpoint:
    """A safetensors file, read as float32 at positions; from several threads.

    Raises:
        ArtifactError: it is no safetensors file, or its header does not describe it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = threading.local()
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            self.header_size, self.entries = _read_header(path, self._descriptor)
        except BaseException:
            self.close()
            raise

    @property
    def merged(self) -> dict[str, Entry]:
        """The tensors that are merged: floating-point, and no BatchNorm statistics."""
        return {name: entry for name, entry in self.entries.items() if entry.dtype in WIDTHS and not is_statistic(name)}

    def read_slice(self, values: FloatArray, tensor: str, start: int) -> None:
        """Fills `values` with the elements of a tensor from `start` on."""
        entry = self.entries[tensor]
        width = WIDTHS[entry.dtype]
        if entry.dtype == "F32":
            self._read(values.data.cast("B"), entry.begin + start * width)
        else:
            raw = self.read_bytes(entry.begin + start * width, len(values) * width)
            values[:] = _to_float(raw, entry.dtype)

    def slice(self, tensor: str, start: int, count: int) -> FloatArray:
        """Elements of a tensor from `start` on, not to be changed; the same ones again are remembered for a thread."""
        wanted = (tensor, start, count)
        if getattr(self._last, "wanted", None) != wanted:
            self._last.wanted, self._last.values = None, np.empty(count, dtype=FLOAT)
            self.read_slice(self._last.values, tensor, start)
            self._last.wanted = wanted
        values: FloatArray = self._last.values
        return values

    def read_bytes(self, offset: int, count: int) -> bytearray:
        raw = bytearray(count)
        self._read(memoryview(raw), offset)
        return raw

    def _read(self, target: memoryview, offset: int) -> None:
        if not read_at(self._descriptor, target, offset):
            raise ArtifactError(f"{self.path} ends too early", remedy="it changed while it was read: try again")

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class Change:
    """A fine-tuned checkpoint's difference to the base, which is its vector."""

    tuned: Checkpoint
    base: Checkpoint

    def read_slice(self, values: FloatArray, tensor: str, start: int) -> None:
        """Fills `values` with the differences of a tensor from `start` on."""
        self.tuned.read_slice(values, tensor, start)
        values -= self.base.slice(tensor, start, len(values))


@dataclass(frozen=True)
class _Output:
    descriptor: int
    entries: Mapping[str, Entry]
    shift: int
    path: Path

    def write_slice(self, values: FloatArray, tensor: str, start: int) -> None:
        entry = self.entries[tensor]
        raw = _from_float(values, entry.dtype)
        if entry.dtype in NARROW and not np.isfinite(_to_float(raw, entry.dtype)).all():
            raise NotFinite(
                f"the merged weights of {tensor} overflow {entry.dtype}",
                remedy="give a base and models of float32, or use the mean",
            )
        with disk_full_at(self.path):
            write_at(self.descriptor, raw, entry.begin + self.shift + start * WIDTHS[entry.dtype])


def merge_files(
    base: Path,
    models: Sequence[Path],
    method: str,
    parameters: Mapping[str, float],
    output: Path,
    *,
    samples: Sequence[int] = (),
    progress: Progress | None = None,
) -> bool:
    """Merges data vectors with their base model, or fine-tuned checkpoints with the one they came from.

    The output has the base's tensors and types; what is not merged (whole numbers, BatchNorm statistics) is the base's.

    Args:
        base: a base model's folder, or a checkpoint (.safetensors, .pt, .pth).
        models: data vectors of that base model, or checkpoints of the same tensors.
        samples: training images of each, for methods that weigh.
    Returns:
        Whether the model has BatchNorm statistics, which a merge leaves as they were.
    Raises:
        UsageError: there are not as many samples as models.
        ConfigError: an unknown method or parameter.
        ArtifactError: a file cannot be read, or is of other tensors.
        NotFinite: the merged weights overflow the base's type.
        DiskFull: no space is left.
    """
    if samples and len(samples) != len(models):
        raise UsageError(f"{len(samples)} samples for {len(models)} models", remedy="give one --samples for each model")
    weights = list(samples) or [1] * len(models)
    if (base / DESCRIPTION).is_file():
        loaded = BaseModel.load(base)
        inputs = [MergeInput(path, samples=count) for path, count in zip(models, weights, strict=True)]
        merge_vectors(loaded, inputs, method, parameters, output, progress=progress)
        return bool(loaded.batchnorm_layers)
    chosen = choose(method, parameters)
    if chosen.method.statistics:
        raise UsageError(f"{method} needs statistics that only hospitals send", remedy="use another method")
    with _opened(base, models) as (pretrained, tuned):
        in_order = _keyed(tuned, weights, named=not chosen.method.exact or chosen.method.keyed)
        cohort = Cohort(
            tensors=_specs(pretrained),
            sources=tuple(Change(each, pretrained) for each, _, _ in in_order),
            samples=tuple(count for _, count, _ in in_order),
            keys=tuple(key for _, _, key in in_order),
        )
        metadata = {"method": method, "parameters": json.dumps(dict(chosen.parameters)), "base": base.name}
        metadata["models"] = json.dumps(sorted(path.name for path in models))
        header = _header(pretrained, metadata)
        with atomic_write(output) as file:
            file.write(header)
            _copy_rest(pretrained, file.fileno(), len(header), output)
            target = _Output(file.fileno(), pretrained.entries, len(header) - pretrained.header_size, output)
            merge_tensors(pretrained, cohort, chosen, target, progress=progress)
        return any(is_statistic(name) for name in pretrained.entries)


def compare_files(base: Path, models: Sequence[Path]) -> NDArray[np.float64]:
    """Inner products of the models' vectors: float64, shape (models, models)."""
    if (base / DESCRIPTION).is_file():
        return gram_matrix(BaseModel.load(base), list(models))
    with _opened(base, models) as (pretrained, tuned):
        sources = tuple(Change(each, pretrained) for each in tuned)
        nobody = (1,) * len(tuned)
        return Cohort(_specs(pretrained), sources, nobody, ("",) * len(tuned)).gram


# --- Opening --------------------------------------------------------------------------------------------------


@contextmanager
def _opened(base: Path, models: Sequence[Path]) -> Iterator[tuple[Checkpoint, list[Checkpoint]]]:
    with ExitStack() as files:
        pretrained = _open(base, files)
        tuned = [_open(path, files) for path in models]
        for each in tuned:
            _demand_same(pretrained, each)
        yield pretrained, tuned


def _open(path: Path, files: ExitStack) -> Checkpoint:
    if path.suffix in PYTORCH:
        path = _converted(path, files)
    checkpoint = Checkpoint(path)
    files.callback(checkpoint.close)
    return checkpoint


def _converted(path: Path, files: ExitStack) -> Path:
    """A PyTorch file as a safetensors file that goes when it is no longer needed."""
    import torch
    from safetensors.torch import save_file

    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # its unpickler raises nearly anything
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ArtifactError(f"{path} is no PyTorch state dict ({reason})", remedy="save model.state_dict()") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(each, torch.Tensor) for each in state.values()):
        raise ArtifactError(f"{path} is no PyTorch state dict", remedy="save model.state_dict()")
    folder = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="datavector-")))
    target = folder / f"{path.stem}.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, target)
    return target


def _demand_same(base: Checkpoint, tuned: Checkpoint) -> None:
    wanted = {name: entry.shape for name, entry in base.merged.items()}
    found = {name: entry.shape for name, entry in tuned.merged.items()}
    odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if odd:
        raise WrongLayout(
            f"{tuned.path.name} differs from the base in {len(odd)} tensors, first {odd[0]} "
            f"({found.get(odd[0], 'absent')}, the base's is {wanted.get(odd[0], 'absent')})",
            remedy="give models that were fine-tuned from this base",
        )


def _keyed(tuned: list[Checkpoint], samples: list[int], *, named: bool) -> list[tuple[Checkpoint, int, str]]:
    """The models with their samples; sorted by digest where the order or the digest decides bytes."""
    if not named:
        return [(each, count, "") for each, count in zip(tuned, samples, strict=True)]
    known = [(each, count, f"sha256:{sha256_file(each.path)}") for each, count in zip(tuned, samples, strict=True)]
    return sorted(known, key=lambda each: each[2])


def _specs(checkpoint: Checkpoint) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, entry.shape) for name, entry in checkpoint.merged.items())


# --- The format -----------------------------------------------------------------------------------------------


def _read_header(path: Path, descriptor: int) -> tuple[int, dict[str, Entry]]:
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or not 0 < length <= min(size - 8, MOST_HEADER):
        raise _no_safetensors(path, "its header's length is wrong")
    try:
        content: Any = json.loads(os.pread(descriptor, length, 8))
        begin = 8 + length
        entries = {
            str(name): Entry(
                str(each["dtype"]), tuple(map(int, each["shape"])), *(begin + int(at) for at in each["data_offsets"])
            )
            for name, each in content.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _no_safetensors(path, f"its header cannot be read: {error}") from error
    for name, entry in entries.items():
        width = WIDTHS.get(entry.dtype)
        wrong = width is not None and entry.end - entry.begin != entry.elements * width
        if wrong or min(entry.shape, default=0) < 0 or not begin <= entry.begin <= entry.end <= size:
            raise _no_safetensors(path, f"the place of {name} does not fit")
    return begin, entries


def _no_safetensors(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"{path} is no safetensors file ({reason})", remedy="give a .safetensors, .pt or .pth file")


def _header(base: Checkpoint, metadata: Mapping[str, str]) -> bytes:
    """The base's header with other metadata; its tensors keep their order and places."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, entry in base.entries.items():
        offsets = [entry.begin - base.header_size, entry.end - base.header_size]
        content[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy_rest(base: Checkpoint, descriptor: int, begin: int, output: Path) -> None:
    """Copies what is not merged."""
    with disk_full_at(output):
        for name in base.entries.keys() - base.merged.keys():
            entry = base.entries[name]
            for at in range(entry.begin, entry.end, COPY):
                raw = base.read_bytes(at, min(COPY, entry.end - at))
                write_at(descriptor, raw, at - base.header_size + begin)


def _to_float(raw: bytes | bytearray, dtype: str) -> FloatArray:
    if dtype == "BF16":
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(FLOAT)
    return np.frombuffer(raw, dtype={"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(FLOAT, copy=False)


def _from_float(values: FloatArray, dtype: str) -> bytes:
    if dtype == "BF16":  # to the nearest, ties to even
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    with np.errstate(over="ignore"):
        return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
