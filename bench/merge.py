"""Merging: time as a ratio to reading and writing the same bytes in the same run, beside mergekit, and memory.

`python -m bench.merge` prints three tables: every method on 8 vectors of ViT-B/16's size, both tools as whole
processes on 8 checkpoints of that size, and memory at 8 and 200 vectors of a small model. mergekit (PyPI, LGPL) is
installed in an environment of its own; where that fails, its columns are missing, and the table says why.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from datavector.layout import FLOAT, FloatArray, write_tensors
from datavector.merge import MergeInput, find, merge_vectors, methods
from datavector.merge.statistics import layout_of
from datavector.model import BaseModel, Input, save_base

WIDTH, DEPTH, TOKENS, PATCH = 768, 12, 197, 16
CHUNK = 1 << 20
REPEATS = 3
SLOW = ("regmean",)  # measured once
MERGEKIT = "0.1.5"
HOME = Path.home() / ".cache" / "datavector" / "bench" / "mergekit"
LAUNCHER = """
import resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""
# Methods of both tools with the same definition; of dare only the distribution is the same.
PAIRS: tuple[tuple[str, dict[str, float], str, dict[str, float | bool]], ...] = (
    ("mean", {}, "linear", {"weight": 1.0}),
    ("sum", {}, "task_arithmetic", {"weight": 1.0}),
    ("ties", {"density": 0.2}, "ties", {"weight": 1.0, "density": 0.2}),
    ("dare", {"density": 0.5}, "dare_linear", {"weight": 1.0, "density": 0.5}),
    ("model-stock", {}, "model_stock", {}),
)


def main() -> None:
    """Makes the files in a temporary folder, measures, prints."""
    if len(sys.argv) > 1:
        return _measured(sys.argv[1], [Path(argument) for argument in sys.argv[2:]])
    with tempfile.TemporaryDirectory(prefix="dv-bench-") as folder:
        root = Path(folder)
        base, vectors = _make(root / "vit", 8, vit_shapes())
        _every_method(base, vectors)
        _beside_mergekit(root / "checkpoints", base, vectors)
        _memory(root / "small")
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


def _every_method(base: BaseModel, vectors: list[Path]) -> None:
    total = base.layout.size * (len(vectors) + 2)
    print(f"\n8 vectors of ViT-B/16's size, in process: {total / 2**20:,.0f} MiB read and written; best of {REPEATS}")
    print(f"{'':18}{'wall s':>8}{'CPU s':>8}{'ratio':>8}{'peak RSS MiB':>14}   goal: mean and sum 1.5, RSS 128 MB")
    floor = 0.0
    for work in ("read+write", *methods()):
        repeats = 1 if work in SLOW else REPEATS
        wall, cpu, rss = min(_child(work, base.path, *vectors) for _ in range(repeats))
        floor = floor or wall
        print(f"{work:18}{wall:8.2f}{cpu:8.2f}{wall / floor:8.2f}{rss:14.0f}", flush=True)


def _beside_mergekit(folder: Path, base: BaseModel, vectors: list[Path]) -> None:
    """The same checkpoints merged by both tools, each as a whole process."""
    folder.mkdir()
    shutil.copy(base.path / "base.safetensors", folder / "base.safetensors")
    pretrained = load_file(folder / "base.safetensors")
    models = [folder / f"model-{index}.safetensors" for index in range(len(vectors))]
    for model, vector in zip(models, vectors, strict=True):
        save_file({name: pretrained[name] + change for name, change in load_file(vector).items()}, model)
    os.sync()  # else the first ones measured share the disk with what was just written
    program, why = _mergekit()
    print(f"\n8 checkpoints of ViT-B/16's size, whole processes, one run each{why}")
    print(f"{'':14}{'datavector s':>14}{'RSS MiB':>9}{'mergekit s':>12}{'RSS MiB':>9}{'times':>7}{'difference':>12}")
    for method, parameters, theirs, settings in PAIRS:
        ours = folder / "ours.safetensors"
        param = [part for key, value in parameters.items() for part in ("--param", f"{key}={value}")]
        command = [sys.executable, "-m", "datavector", "merge", "--base", str(folder / "base.safetensors")]
        wall, rss = _process([*command, "--method", method, *param, *map(str, models), "-o", str(ours)])
        line = f"{method:14}{wall:14.2f}{rss:9.0f}"
        if program:
            config, output = folder / "config.yaml", folder / "theirs"
            config.write_text(json.dumps(_config(theirs, settings, folder, models)))
            their_wall, their_rss = _process([str(program), str(config), str(output)])
            found = load_file(next(output.glob("*.safetensors")))
            merged = load_file(ours)
            worst = max(float(np.abs(found[name] - merged[name]).max()) for name in merged)
            line += f"{their_wall:12.2f}{their_rss:9.0f}{their_wall / wall:7.1f}{worst:12.1e}"
            shutil.rmtree(output)
        print(line, flush=True)
    shutil.rmtree(folder)


def _config(method: str, settings: dict[str, float | bool], folder: Path, models: Sequence[Path]) -> dict[str, object]:
    config: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": str(path), "parameters": settings} for path in models],
        "dtype": "float32",
    }
    if method != "linear":
        config["base_model"] = str(folder / "base.safetensors")
    if method in ("task_arithmetic", "dare_linear"):
        config["parameters"] = {"normalize": False}
    return config


def _mergekit() -> tuple[Path | None, str]:
    """mergekit's program for arbitrary checkpoints, installed where it is not yet; or why there is none."""
    program = HOME / "bin" / "mergekit-pytorch"
    if not program.is_file():
        installer = Path(sys.executable).with_name("uv")
        steps = [
            [str(installer), "venv", "--quiet", str(HOME)],
            [
                str(installer),
                "pip",
                "install",
                "--quiet",
                "--python",
                str(HOME / "bin" / "python"),
                f"mergekit=={MERGEKIT}",
            ],
        ]
        for step in steps:
            if subprocess.run(step, check=False).returncode:
                return None, f" (mergekit {MERGEKIT} could not be installed)"
    return program, f"; mergekit {MERGEKIT}"


def _memory(root: Path) -> None:
    print("\nA small model of a million values: peak RSS in MiB, and wall seconds")
    print(f"{'':18}{'N = 8':>8}{'N = 200':>9}{'8: s':>8}{'200: s':>8}")
    base, vectors = _make(root, 200, small_shapes())
    for work in methods():
        if find(work).statistics or work in SLOW:
            continue
        few, many = (_child(work, base.path, *vectors[:count]) for count in (8, 200))
        print(f"{work:18}{few[2]:8.0f}{many[2]:9.0f}{few[0]:8.2f}{many[0]:8.2f}", flush=True)


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


def _process(command: Sequence[str]) -> tuple[float, float]:
    """Wall seconds and peak RSS in MiB of a whole process.

    A process of its own starts it: getrusage's peak of a child is never below that of the process it was forked from.
    """
    done = subprocess.run([sys.executable, "-c", LAUNCHER, *command], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    wall, rss = map(float, done.stdout.split()[-2:])
    return wall, rss


def _measured(work: str, paths: list[Path]) -> None:
    base, vectors = BaseModel.load(paths[0]), paths[1:]
    output = base.path / "output"
    inputs = [MergeInput(path, f"sha256:{path.stem:0>64}") for path in vectors]
    if work != "read+write" and (kind := find(work).statistics):
        inputs = [_with_statistics(base, each, kind) for each in inputs]
    started, cpu = time.perf_counter(), time.process_time()
    if work == "read+write":
        _read_and_write(base, vectors, output)
    else:
        merge_vectors(base, inputs, work, {}, output)
    elapsed, used = time.perf_counter() - started, time.process_time() - cpu
    output.unlink()
    print(elapsed, used, _peak_rss())


def _with_statistics(base: BaseModel, each: MergeInput, kind: str) -> MergeInput:
    """All hospitals share one file of statistics: what is measured is reading it as often as there are hospitals."""
    path = base.path / kind
    if not path.is_file():
        layout = layout_of(kind, base)
        random = np.random.default_rng(0)
        write_tensors(path, layout, (random.random(spec.shape, dtype=FLOAT) for spec in layout.tensors))
    return MergeInput(each.path, each.digest, statistics={kind: path})


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
