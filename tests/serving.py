"""A real receiver for tests: in a thread of this process, or in a process of its own that can be killed.

`python -m tests.serving STORE CERTIFICATES [SETTING=TEXT ...]` serves until it is killed; the first line that it
prints is its address.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.receiver import Receiver
from aggregator.registry import SqliteRegistry
from aggregator.resources import MergePolicy, ModelVersion, Phase, utc_now
from aggregator.settings import ReceiverSettings, Tls
from aggregator.store import Store
from datavector.files import sha256_file
from datavector.layout import FloatArray
from datavector.model import BaseModel, Input, save_base
from datavector.wire.v1.exchange_pb2 import VectorInfo

ROOT = Path(__file__).parent.parent


def make_base(folder: Path, *, name: str = "small", elements: int = 1000, layers: int = 2) -> BaseModel:
    """A hand-made base model with a few BatchNorm layers of 2, 3, ... channels and `elements` further values."""
    random = np.random.default_rng(0)
    tensors: dict[str, FloatArray] = {"head.weight": random.normal(size=elements).astype(np.float32)}
    for layer in range(layers):
        for statistic in ("running_mean", "running_var"):
            tensors[f"bn{layer}.{statistic}"] = np.ones(layer + 2, dtype=np.float32)
    return save_base(
        folder, name=name, architecture="handmade", classes=("a", "b"), input=Input(8, (0.5,) * 3, (0.5,) * 3),
        head_seed=0, pretrained="", tensors=tensors,
    )  # fmt: skip


def write_tau(path: Path, base: BaseModel, *, seed: int = 1) -> Path:
    """A vector file of `base` with random values."""
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(base.vector_layout.header)
        left = base.vector_layout.elements
        while left:
            count = min(left, 1 << 22)
            file.write(random.standard_normal(count, dtype=np.float32).data)
            left -= count
    return path


def announce(path: Path, base: BaseModel, *, sequence: int = 1) -> VectorInfo:
    """What an agent says of a vector file."""
    return VectorInfo(
        base_digest=base.digest,
        sha256=sha256_file(path),
        size=path.stat().st_size,
        sequence=sequence,
        sample_count=10,
    )


def make_store(root: Path, *bases: BaseModel) -> Store:
    """A store with these base models and one policy for each, of its name."""
    store = Store(root)
    for base in bases:
        store.import_base(base.path)
    registry = SqliteRegistry(root / "registry.sqlite")
    registry.set_policies(map(policy_of, bases))
    registry.close()
    return store


def policy_of(base: BaseModel, **spec: Any) -> MergePolicy:
    """A policy of the base model's name."""
    return MergePolicy.parse({"metadata": {"name": base.name}, "spec": {"baseModelRef": base.digest, **spec}})


def make_settings(certificates: Path, *, listen: str = "127.0.0.1:0", **changes: Any) -> ReceiverSettings:
    """Settings of a receiver; other `changes` are those of its TLS and its limits, by their own names."""
    tls = {
        "certificate": certificates / "aggregator.crt",
        "key": certificates / "aggregator.key",
        "ca": certificates / "ca.crt",
        **{name: value for name, value in changes.items() if name in Tls.model_fields},
    }
    limits = {name: value for name, value in changes.items() if name not in tls}
    return ReceiverSettings.model_validate({"listen": listen, "tls": tls, "limits": limits})


class Serving:
    """A receiver that runs in a thread.

    Attributes:
        woken: how often it called `wake`.
    """

    def __init__(self, store: Store, settings: ReceiverSettings) -> None:
        self.store = store
        self.registry = SqliteRegistry(store.root / "registry.sqlite")
        self.woken = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.receiver = Receiver(store, self.registry, settings, self._wake)
        self.address = f"localhost:{self._run(self.receiver.start()).rpartition(':')[2]}"

    def stop(self) -> None:
        self._run(self.receiver.stop(0.2))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.registry.close()

    def calibrate(
        self,
        base: BaseModel,
        name: str,
        *hospitals: str,
        mode: str = "visit",
        quorum: int | None = None,
        visits: int = 1,
    ) -> None:
        """Makes a version of the policy `base.name` that asks its hospitals; its merged weights are b"weights"."""
        calibration = {"mode": mode, "visits": visits}
        policy = policy_of(base, calibration=calibration | ({"quorum": quorum} if quorum else {}))
        others = [each for each in self.registry.policies() if each.name != base.name]
        self.registry.set_policies([*others, policy])
        self.store.merged(name, "sum").parent.mkdir(parents=True, exist_ok=True)
        self.store.merged(name, "sum").write_bytes(b"weights")
        inputs = [
            {"dataVector": each, "hospital": each, "digest": f"sha256:{'0' * 64}", "sampleCount": 1}
            for each in hospitals
        ]
        spec = {
            "policyRef": base.name, "baseModelRef": base.digest, "inputs": inputs, "inputsHash": "0" * 64,
            "method": {}, "calibration": calibration, "export": {},
        }  # fmt: skip
        self.registry.add_version(
            ModelVersion.parse({"metadata": {"name": name}, "spec": spec, "status": {"phase": "Calibrating"}})
        )

    def stop_calibration(self, name: str) -> None:
        """Lets another version take its place."""
        version = next(version for version in self.registry.versions() if version.name == name)
        self.registry.save(version.with_phase(Phase.SUPERSEDED, now=utc_now()))

    def metric(self, name: str, **labels: str) -> float:
        return self.receiver.metrics.registry.get_sample_value(f"datavector_receiver_{name}", labels) or 0.0

    def _wake(self) -> None:
        self.woken += 1

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


@contextmanager
def serve(store: Store, settings: ReceiverSettings) -> Iterator[Serving]:
    serving = Serving(store, settings)
    try:
        yield serving
    finally:
        serving.stop()


def start_process(store: Path, certificates: Path, *settings: str) -> tuple[subprocess.Popen[str], str]:
    """Serves a store in another process; returns it with its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serving", str(store), str(certificates), *settings],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    return process, process.stdout.readline().strip()


async def _main(root: str, certificates: str, *changes: str) -> None:
    settings: dict[str, Any] = dict(change.split("=", 1) for change in changes)
    store = Store(Path(root))
    registry = SqliteRegistry(store.root / "registry.sqlite")
    receiver = Receiver(store, registry, make_settings(Path(certificates), **settings), lambda: None)
    address = await receiver.start()
    print(f"localhost:{address.rpartition(':')[2]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
