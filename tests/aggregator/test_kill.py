"""SIGKILL in the middle of the aggregator's work: the end result is the same."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aggregator.registry import SqliteRegistry
from aggregator.resources import DataVector, Phase
from aggregator.store import Store
from datavector.files import sha256_file
from datavector.model import BaseModel
from tests.aggregator.objects import policy
from tests.aggregator.reconciling import merging, reconciling, wait_for_merge

ROOT = Path(__file__).parents[2]


@pytest.fixture
def filled(tmp_path: Path, large_base: BaseModel, deliver) -> list[Store]:
    """Two stores with the same three vectors of 16 MiB, ready to be merged."""
    stores, arrived = [Store(tmp_path / name) for name in ("killed", "undisturbed")], {}
    for store in stores:
        store.import_base(large_base.path)
        with contextlib.closing(SqliteRegistry(store.root / "registry.sqlite")) as registry:
            registry.set_policies([policy(base="large", quiet=0, mode="visit")])
            for hospital in ("north", "south", "east"):
                vector: DataVector = deliver(store, large_base, hospital)
                registry.add_vector(arrived.setdefault(hospital, vector))
    return stores


async def finish(store: Store) -> tuple[object, ...]:
    """Reconciles until the hospitals are asked; returns what came of it, but for times."""
    with contextlib.closing(SqliteRegistry(store.root / "registry.sqlite")) as registry:
        async with reconciling(store, registry) as running:
            await running.until(lambda: bool(running.in_phase(Phase.CALIBRATING)))
        files = sorted(str(path.relative_to(store.root)) for path in store.root.glob("versions/*/*"))
        return [
            (
                each.name,
                each.spec,
                each.status.phase,
                each.status.weights_sha256,
                sha256_file(store.merged(each.name, "sum")),
                files,
            )
            for each in registry.versions()
        ]


@pytest.mark.parametrize("times", [1, 3])
def test_an_aggregator_that_is_killed_while_it_merges_comes_to_the_same_result(filled, times):
    killed, undisturbed = filled
    command = [sys.executable, "-m", "tests.aggregator.reconciling", str(killed.root)]
    for _ in range(times):
        before = merging(killed)
        with subprocess.Popen(command, cwd=ROOT) as process:
            if not any(path.parent.name == "merged" for path in before):
                wait_for_merge(killed, besides=before)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert asyncio.run(finish(killed)) == asyncio.run(finish(undisturbed))
