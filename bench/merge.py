"""Merging: time as a ratio to reading and writing the same bytes in the same run, and memory.

`python -m bench.merge` prints two tables: 8 vectors of ViT-B/16's size, and 200 of a small model's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from datavector.layout import FLOAT, FloatArray, write_tensors
from datavector.merge import merge_vectors
from datavector.model import BaseModel, Input, save_base

WIDTH, DEPTH, TOKENS, PATCH = 768, 12, 197, 16
CHUNK = 1 << 20
REPEATS = 3


def main() -> None:
    """Makes the files in a temporary folder, measures, prints."""
    if len(sys.argv) > 1:
        return _measured(sys.argv[1], [Path(argument) for argument in sys.argv[2:]])
    with tempfile.TemporaryDirectory(prefix="dv-bench-") as folder:
        root = Path(folder)
        _table("8 vectors of ViT-B/16's size", root / "vit", 8, vit_shapes(), REPEATS)
        _table("200 vectors of a small model", root / "small", 200, small_shapes(), 1)
    return None


def vit_shapes() -> dict[str, tuple[int, ...]]:
    """Tensors like ViT-B/16's (arXiv 2010.11929): 86.6 million values with 1000 classes."""
    shapes: dict[str, tuple[int, ...]] = {
        "conv_proj.weight": (WIDTH, 3, PATCH, PATCH),
        "conv_proj.bias": (WIDTH,),
        "class_token": (1, 1, WIDTH),
        "pos_embedding": (1, TOKENS, WIDTH),
        "ln.weight": (WIDTH,),
        "ln.bias": (WIDTH,),
        "head.weight": (1000, WIDTH),
        "head.bias": (1000,),
    }
    for layer in range(DEPTH):
        for name, outputs, inputs in (("qkv", 3, 1), ("out", 1, 1), ("mlp.0", 4, 1), ("mlp.3", 1, 4)):
            shapes[f"layer_{layer:02}.{name}.weight"] = (outputs * WIDTH, inputs * WIDTH)
            shapes[f"layer_{layer:02}.{name}.bias"] = (outputs * WIDTH,)
        for name in ("ln_1", "ln_2"):
            shapes |= {f"layer_{layer:02}.{name}.{kind}": (WIDTH,) for kind in ("weight", "bias")}
    return shapes


def small_shapes() -> dict[str, tuple[int, ...]]:
    """A million values, a tenth of them in small tensors."""
    return {"body.weight": (900, 1000)} | {f"layer_{index:02}.weight": (50, 100) for index in range(20)}


def _table(title: str, root: Path, hospitals: int, shapes: dict[str, tuple[int, ...]], repeats: int) -> None:
    base, vectors = _make(root, hospitals, shapes)
    total = base.layout.size * (hospitals + 2)
    print(f"\n{title}: {total / 2**20:,.0f} MiB read and written; best of {repeats}")
    print(f"{'':14}{'wall s':>8}{'CPU s':>8}{'ratio':>8}{'peak RSS MiB':>14}")
    floor = 0.0
    for work in ("read+write", "mean", "sum"):
        wall, cpu, rss = min(_child(work, base.path, *vectors) for _ in range(repeats))
        floor = floor or wall
        print(f"{work:14}{wall:8.2f}{cpu:8.2f}{wall / floor:8.2f}{rss:14.0f}")


def _make(root: Path, hospitals: int, shapes: dict[str, tuple[int, ...]]) -> tuple[BaseModel, list[Path]]:
    random = np.random.default_rng(0)
    tensors: dict[str, FloatArray] = {
        name: random.standard_normal(shape, dtype=FLOAT) * np.float32(0.02) for name, shape in shapes.items()
    }
    base = save_base(
        root / "base",
        name="bench",
        architecture="none",
        classes=("a", "b"),
        input=Input(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        head_seed=0,
        pretrained="",
        tensors=tensors,
    )
    names = [spec.name for spec in base.layout.tensors]
    paths = [root / f"{index}.safetensors" for index in range(hospitals)]
    for index, path in enumerate(paths):  # what another base tensor holds, scaled, is random enough
        write_tensors(path, base.vector_layout, (np.roll(tensors[name], index + 1) * FLOAT.type(0.1) for name in names))
    return base, paths


def _child(work: str, base: Path, *vectors: Path) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak RSS in MiB of one piece of work in a process of its own."""
    command = [sys.executable, "-m", "bench.merge", work, str(base), *map(str, vectors)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wall, cpu, rss = map(float, done.stdout.split()[-3:])
    return wall, cpu, rss


def _measured(work: str, paths: list[Path]) -> None:
    base = BaseModel.load(paths[0])
    output = base.path / "output"
    tasks: dict[str, Callable[[], None]] = {"read+write": lambda: _read_and_write(base, paths[1:], output)}
    task = tasks.get(work, lambda: merge_vectors(base, paths[1:], work, {}, output))
    started, cpu = time.perf_counter(), time.process_time()
    task()
    elapsed, used = time.perf_counter() - started, time.process_time() - cpu
    output.unlink()
    print(elapsed, used, _peak_rss())


def _peak_rss() -> float:
    """MiB. Not getrusage's, which a child takes over from its parent."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def _read_and_write(base: BaseModel, vectors: list[Path], output: Path) -> None:
    """The floor: all vectors and the base are read, and as much as one file is written and synced."""
    buffer = memoryview(bytearray(CHUNK))
    for path in vectors:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with (base.path / "base.safetensors").open("rb", buffering=0) as source, output.open("wb", buffering=0) as target:
        while count := source.readinto(buffer):
            target.write(buffer[:count])
        os.fsync(target.fileno())


if __name__ == "__main__":
    main()
