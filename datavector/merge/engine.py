"""Streams over vector files, block by block: memory depends neither on the model nor, for long, on their number.

Blocks are long enough that threads seldom wait for each other between two steps of numpy (at an eighth of the length,
two threads are slower than one), and each thread has buffers of its own, so a merge costs little more than the reading
and writing itself. Blocks are independent of each other, so several processes can share one merge (shares.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from threadpoolctl import threadpool_limits

from datavector.errors import Interrupted, MergeError, NotFinite
from datavector.files import atomic_write, canonical_json, disk_full_at, sha256_file, write_at
from datavector.layout import FLOAT, FloatArray, Layout, TensorFile, TensorSpec
from datavector.merge.cohort import Block, Cohort, Tensors, WholeTensor
from datavector.merge.parallel import in_threads
from datavector.merge.registry import Chosen, Merge, choose
from datavector.merge.shares import Share, SharedFile
from datavector.merge.statistics import layout_of
from datavector.model import BaseModel, is_statistic
from datavector.vector import open_vector

BLOCK_BYTES = 4 << 20  # of one block over all hospitals
MOST_ELEMENTS, FEWEST_ELEMENTS = 1 << 17, 1 << 12
RUN = 8  # neighbouring blocks that a thread takes at once

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MergeInput:
    """One hospital's part of a merge.

    Attributes:
        path: the vector file.
        digest: "sha256:<hex>" of the file; "" to have it computed where the method needs it.
        samples: training images, the weight of methods that weigh.
        statistics: by kind, the files that the hospital sent beside it.
    """

    path: Path
    digest: str = ""
    samples: int = 1
    statistics: Mapping[str, Path] = field(default_factory=dict)


class Output(Protocol):
    """Where merged weights go."""

    def write_slice(self, values: FloatArray, tensor: str, start: int) -> None:
        """Writes elements of a tensor from `start` on; called from several threads."""


def merge_vectors(
    base: BaseModel,
    vectors: Sequence[MergeInput | Path],
    method: str,
    parameters: Mapping[str, Any],
    output: Path,
    *,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    share: Share | None = None,
) -> None:
    """Writes theta_pre + merge(vectors) in the base model's layout; BatchNorm statistics stay the pretrained ones.

    Args:
        base: of all vectors.
        vectors: in any order: the output's bytes are the same.
        method: a name from `datavector.merge.methods()`.
        parameters: of the method.
        output: replaced atomically.
        progress: called with the elements of the output done and in all (of the share).
        cancelled: asked between blocks; True ends the merge, and leaves nothing half-written.
        share: this process's part, where several merge together.
    Raises:
        ConfigError: an unknown method or parameter.
        MergeError: there are no vectors, or one lacks the statistics that the method reads.
        WrongLayout: a file is no vector of this base.
        NotFinite: the merged weights overflow float32.
        Interrupted: it was cancelled.
        DiskFull: no space is left.
    """
    chosen = choose(method, parameters)
    inputs = _inputs(vectors)
    if share or not chosen.method.exact or chosen.method.keyed:
        inputs = sorted((each if each.digest else _with_digest(each) for each in inputs), key=lambda each: each.digest)

    def write(descriptor: int) -> None:
        target = _LayoutFile(descriptor, base.layout, output)
        with ExitStack() as files:
            pretrained = files.enter_context(base.open())
            cohort = _open(base, inputs, chosen, files)
            merge_tensors(pretrained, cohort, chosen, target, progress=progress, cancelled=cancelled, share=share)
            if not share or share.index == 0:
                _copy_rest(pretrained, target)

    if share is None:
        with atomic_write(output) as file:
            write(file.fileno())
        return
    shared = SharedFile(output, merge_digest(base, inputs, method, parameters), base.layout.size, share)
    if not shared.is_written():
        with shared.open() as descriptor:
            write(descriptor)
    shared.finish()


def merge_tensors(
    pretrained: Tensors,
    cohort: Cohort,
    chosen: Chosen,
    output: Output,
    *,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    share: Share | None = None,
) -> None:
    """Writes pretrained + merged for the cohort's tensors, wherever they are read from and written to."""
    cohort = replace(cohort, sources=tuple(_Stoppable(source, cancelled) for source in cohort.sources))
    with threadpool_limits(1, "blas"):  # the threads are ours; and one thread's sums are the same everywhere
        merge = chosen.ready(cohort)
        work = _Work(pretrained, cohort, chosen, merge, output)
        parts = list(_wholes(cohort)) if chosen.method.whole else list(_blocks(cohort))
        run = 1 if chosen.method.whole else RUN
        runs = [parts[begin : begin + run] for begin in range(0, len(parts), run)]
        if share:
            runs = runs[share.index :: share.of]
        total, done = sum(piece.count for pieces in runs for piece in pieces), 0
        for written in in_threads(work.do, runs):
            done += written
            if progress:
                progress(done, total)


def merge_digest(base: BaseModel, inputs: Sequence[MergeInput], method: str, parameters: Mapping[str, Any]) -> str:
    """A digest of all that decides a merge's bytes: the base, the inputs, the method and its parameters.

    Of an input that is its vector's digest (computed where it is not given), and the images or the file of statistics
    where the method reads them.
    """
    chosen = choose(method, parameters)
    content = {
        "base": base.digest,
        "inputs": sorted(_read_of(each, chosen) for each in inputs),
        "method": method,
        "parameters": dict(chosen.parameters),
    }
    return "sha256:" + hashlib.sha256(canonical_json(content)).hexdigest()


def _read_of(each: MergeInput, chosen: Chosen) -> list[str | int]:
    """What a method reads of an input, as digests and numbers."""
    found: list[str | int] = [each.digest or f"sha256:{sha256_file(each.path)}"]
    found.append(each.samples if chosen.method.weighs else 1)
    statistics = each.statistics.get(chosen.method.statistics)
    return [*found, sha256_file(statistics)] if statistics else found


def gram_matrix(base: BaseModel, vectors: Sequence[MergeInput | Path]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Inner products of all vectors over everything that is merged: float64, shape (hospitals, hospitals)."""
    with open_cohort(base, vectors) as cohort, threadpool_limits(1, "blas"):
        return cohort.gram


@contextmanager
def open_cohort(base: BaseModel, vectors: Sequence[MergeInput | Path]) -> Iterator[Cohort]:
    """The vectors themselves, for looking at.

    Raises:
        WrongLayout: a file is no vector of this base.
    """
    with ExitStack() as files:
        yield _open(base, _inputs(vectors), choose("sum", {}), files)


# --- Opening --------------------------------------------------------------------------------------------------


def _inputs(vectors: Sequence[MergeInput | Path]) -> list[MergeInput]:
    return [each if isinstance(each, MergeInput) else MergeInput(each) for each in vectors]


def _with_digest(each: MergeInput) -> MergeInput:
    return replace(each, digest=f"sha256:{sha256_file(each.path)}")


def _open(base: BaseModel, inputs: Sequence[MergeInput], chosen: Chosen, files: ExitStack) -> Cohort:
    if not inputs:
        raise MergeError("there are no vectors to merge", remedy="wait until a hospital has sent one")

    kind, statistics = chosen.method.statistics, list[TensorFile]()
    for each in inputs if kind else ():
        if kind not in each.statistics:
            raise MergeError(
                f"{chosen.method.name} reads statistics that {each.path} comes without",
                remedy="let the hospital send them, or use another method",
            )
        statistics.append(files.enter_context(TensorFile(each.statistics[kind], layout_of(kind, base))))
    return Cohort(
        tensors=tuple(spec for spec in base.layout.tensors if not is_statistic(spec.name)),
        sources=tuple(files.enter_context(open_vector(each.path, base)) for each in inputs),
        samples=tuple(each.samples for each in inputs),
        keys=tuple(each.digest for each in inputs),
        statistics=tuple(statistics),
    )


# --- Working --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Stoppable:
    """A hospital's vector that can no more be read when the merge is cancelled, whoever reads it."""

    source: Tensors
    cancelled: Callable[[], bool]

    def read_slice(self, values: FloatArray, tensor: str, start: int) -> None:
        if self.cancelled():
            raise Interrupted("the merge was stopped", remedy="start it again; nothing half-written is left")
        self.source.read_slice(values, tensor, start)


@dataclass(frozen=True)
class _Piece:
    """`count` elements of a tensor from `start` on."""

    tensor: TensorSpec
    start: int
    count: int


def _blocks(cohort: Cohort) -> Iterator[_Piece]:
    length = min(MOST_ELEMENTS, max(FEWEST_ELEMENTS, BLOCK_BYTES // FLOAT.itemsize // len(cohort)))
    for spec in cohort.tensors:
        for start in range(0, spec.elements, length):
            yield _Piece(spec, start, min(length, spec.elements - start))


def _wholes(cohort: Cohort) -> Iterator[_Piece]:
    """Whole tensors, the largest first, so that no thread is left with one at the end."""
    for spec in sorted(cohort.tensors, key=lambda spec: (-spec.elements, spec.name)):
        if spec.elements:
            yield _Piece(spec, 0, spec.elements)


@dataclass(frozen=True, eq=False)
class _Work:
    """What the threads share."""

    pretrained: Tensors
    cohort: Cohort
    chosen: Chosen
    merge: Merge
    output: Output

    def do(self, pieces: Sequence[_Piece]) -> int:
        """Merges and writes some pieces, in buffers of their own; returns their elements."""
        largest = max(piece.count for piece in pieces)
        weights: FloatArray = np.empty(largest, dtype=FLOAT)
        whole = self.chosen.method.whole  # such a method reads tensors itself
        rows = np.empty((0 if whole else len(self.cohort), largest), dtype=FLOAT)
        statistics = np.empty((0 if whole else len(self.cohort.statistics), largest), dtype=FLOAT)
        for piece in pieces:
            count = slice(piece.count)
            self._merge(piece, weights[count], rows[:, count], statistics[:, count])
        return sum(piece.count for piece in pieces)

    def _merge(self, piece: _Piece, weights: FloatArray, rows: FloatArray, statistics: FloatArray) -> None:
        name = piece.tensor.name
        self.pretrained.read_slice(weights, name, piece.start)
        if self.chosen.method.whole:
            part: WholeTensor | Block = WholeTensor(piece.tensor, self.cohort)
        else:
            _read(self.cohort.sources, rows, piece)
            _read(self.cohort.statistics, statistics, piece)
            part = Block(rows, name, piece.start, statistics if self.cohort.statistics else None)
        with np.errstate(over="ignore", invalid="ignore"):
            weights += self.merge(part).reshape(-1)
        if not np.isfinite(weights).all():
            raise NotFinite(
                f"the merged weights of {name} overflow",
                remedy="a vector has values out of proportion: check the vectors, or use the mean",
            )
        self.output.write_slice(weights, name, piece.start)


def _read(sources: Sequence[Tensors], rows: FloatArray, piece: _Piece) -> None:
    for source, row in zip(sources, rows, strict=True):
        source.read_slice(row, piece.tensor.name, piece.start)


# --- Writing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LayoutFile:
    """A file of a layout, open for writing anywhere."""

    descriptor: int
    layout: Layout
    path: Path

    def write_slice(self, values: FloatArray, tensor: str, start: int) -> None:
        with disk_full_at(self.path):
            write_at(self.descriptor, values.data.cast("B"), self.layout.offsets[tensor] + start * FLOAT.itemsize)


def _copy_rest(pretrained: TensorFile, output: _LayoutFile) -> None:
    """The header, and the statistics, which are restored rather than merged."""
    with disk_full_at(output.path):
        write_at(output.descriptor, output.layout.header, 0)
    for spec in output.layout.tensors:
        if is_statistic(spec.name) and spec.elements:
            output.write_slice(pretrained.read(spec.name).reshape(-1), spec.name, 0)
