"""From the last vector's commit to a Ready release, at the demo's size, with nobody to wait for.

`python -m bench.latency` starts a real aggregator, uploads two vectors of EfficientNet-Lite0, and asks the registry.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from agent.client import Client, Credentials
from agent.ledger import Ledger
from agent.upload import upload
from aggregator.main import REGISTRY
from aggregator.registry import SqliteRegistry
from aggregator.resources import ModelVersion, Phase
from datavector.demo.sites import Sites
from datavector.layout import FloatArray, TensorFile
from datavector.model import BaseModel, is_statistic
from datavector.networks import create_base
from datavector.vector import write_vector
from datavector.wire.certs import init_authority, issue_aggregator, issue_hospital
from datavector.wire.v1.exchange_pb2 import VectorInfo

HOSPITALS = ("north", "south")
REPEATS = 3


def main() -> None:
    """Measures a few times and prints a table."""
    print(f"\nLast commit to Ready: EfficientNet-Lite0, 128 px, two hospitals, statistics uploaded; {REPEATS} runs")
    print(f"{'run':>4}{'merge s':>10}{'release s':>12}{'Ready after s':>16}")
    for run in range(1, REPEATS + 1):
        with tempfile.TemporaryDirectory(prefix="dv-bench-") as folder:
            merge, release, ready = _measure(Path(folder))
        print(f"{run:>4}{merge:>10.1f}{release:>12.1f}{ready:>16.1f}")
    sys.stdout.flush()


def _measure(root: Path) -> tuple[float, float, float]:
    base = create_base(root / "base", architecture="efficientnet_lite0", classes=("a", "b", "c", "d"), size=128)
    certificates = root / "certs"
    init_authority(certificates)
    issue_aggregator(certificates, server_names=["127.0.0.1"])
    sites = Sites(root / "sites", certificates)
    policy = {
        "kind": "MergePolicy",
        "apiVersion": "datavector.dev/v1alpha1",
        "metadata": {"name": "bench"},
        "spec": {
            "baseModelRef": base.name,
            "trigger": {"minHospitals": len(HOSPITALS), "quietPeriodSeconds": 0},
            "calibration": {"mode": "uploaded"},
        },
    }
    with sites.aggregator(base.path, policy) as store:
        for seed, hospital in enumerate(HOSPITALS):
            issue_hospital(certificates, hospital)
            _upload(root, sites, base, hospital, seed)
        committed = time.time()
        version = _wait_until_ready(store)
        ready = time.time() - committed
        merged = (store / "versions" / version.name / "report-merge.json").stat().st_mtime - committed
    return merged, ready - merged, ready


def _upload(root: Path, sites: Sites, base: BaseModel, hospital: str, seed: int) -> None:
    path = root / f"{hospital}.safetensors"
    generator = np.random.default_rng(seed)
    with base.open() as pretrained:
        tuned = {spec.name: _nudged(pretrained, spec.name, generator) for spec in base.layout.tensors}
    sha256 = write_vector(path, base, tuned)
    info = VectorInfo(base_digest=base.digest, sha256=sha256, size=path.stat().st_size, sequence=1, sample_count=100)
    folder = sites.certificates
    credentials = Credentials(folder / f"{hospital}.crt", folder / f"{hospital}.key", folder / "ca.crt")
    with Client(sites.address, credentials, ledger=Ledger(root / f"{hospital}.jsonl")) as client:
        upload(client, path, info)


def _nudged(pretrained: TensorFile, name: str, generator: np.random.Generator) -> FloatArray:
    """Pretrained values with a little noise, as a short fine-tuning would leave them."""
    values = pretrained.read(name)
    if not is_statistic(name):
        values += 0.01 * values.std() * generator.standard_normal(values.shape, dtype=np.float32)
    return values


def _wait_until_ready(store: Path) -> ModelVersion:
    registry = SqliteRegistry(store / REGISTRY)
    try:
        while True:
            for version in registry.versions():
                if version.status.phase is Phase.READY:
                    return version
                if version.status.phase is Phase.FAILED:
                    sys.exit(f"the version failed: {version.status.message}")
            time.sleep(0.02)
    finally:
        registry.close()


if __name__ == "__main__":
    main()
