"""The operator with many objects: CPU, memory and requests while they are new, after a restart, idle, and for one more.

`python -m bench.operator [COUNT ...]` starts a control plane of its own (built once; see tests/cluster), makes COUNT
vectors of four base models and 50 policies that wait for hospitals, for a base model or for quiet, and starts the
operator.
It is settled once all vectors say that they are stored and the news of one more, made then, has come through the same
watch as theirs.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from kubernetes import client, config

from aggregator.resources import (
    API_VERSION,
    GROUP,
    Artifact,
    DataVector,
    MergePolicy,
    Metadata,
    PolicyMetadata,
    PolicySpec,
    Trigger,
    VectorSpec,
)
from aggregator.store import Store
from datavector.model import BaseModel
from tests.cluster.aggregation import Namespace, RunningOperator, manifest
from tests.cluster.build import CONTROL_PLANE, CannotBuild, build
from tests.cluster.control_plane import ControlPlane
from tests.cluster.fixtures import establish_definitions
from tests.serving import make_base

COUNTS = (500, 2_000, 10_000)
POLICIES, BASES = 50, 4
MORE = 20  # objects that come one by one afterwards
IDLE_SECONDS = 60
DAY = 86400
POLL_SECONDS = 0.2
SECONDS = 900  # for anything that is waited for
THREADS = 8
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measures each number of objects and prints a table."""
    try:
        components = build(CONTROL_PLANE)
    except CannotBuild as problem:
        print(f"\nThe operator is not measured: {problem}")
        return
    print(f"\nThe operator with {POLICIES} policies, on a control plane of its own; CPU and memory of its process")
    print(
        f"{'vectors':>8} {'':8}{'CPU s':>8}{'wall s':>8}{'peak RSS MiB':>14}{'requests each':>15}"
        f"{'idle % of a core':>18}{'CPU ms for one more':>21}"
    )
    with (
        tempfile.TemporaryDirectory(prefix="dv-bench-") as folder,
        closing(ControlPlane(Path(folder) / "control-plane", components=components)) as plane,
    ):
        establish_definitions(plane)
        for count in [int(argument) for argument in sys.argv[1:]] or COUNTS:
            with closing(Bench(plane, Path(folder) / str(count), count)) as bench:
                _table(bench)


def _table(bench: Bench) -> None:
    with_new, after_restart = bench.until_settled(), bench.until_settled()
    idle, one_more = bench.idle(), bench.one_more()
    for name, cost, rest in (
        ("new", with_new, ""),
        ("restart", after_restart, f"{100 * idle:>18.1f}{1000 * one_more:>21.0f}"),
    ):
        print(
            f"{bench.count:>8} {name:8}{cost.cpu:>8.1f}{cost.wall:>8.1f}{cost.peak:>14.0f}"
            f"{cost.requests / bench.count:>15.2f}{rest}",
            flush=True,
        )


@dataclass(frozen=True)
class Cost:
    """CPU and wall seconds, peak RSS in MiB, and requests to the API."""

    cpu: float
    wall: float
    peak: float
    requests: float


class Bench:
    """A namespace with objects, a store with their files, and the operator."""

    def __init__(self, plane: ControlPlane, folder: Path, count: int) -> None:
        self.count = count
        self.space = Namespace(plane, f"bench-{count}")
        plane.kubectl("create", "namespace", self.space.name)
        self._api = client.CustomObjectsApi(config.new_client_from_config(str(plane.kubeconfig)))
        self._store = Store(folder / "store")
        self._bases = [
            self._store.import_base(make_base(folder / f"base-{number}", name=f"base-{number}").path)
            for number in range(BASES)
        ]
        self._made = 0
        self._make(self._next_vector() for _ in range(count))
        self._make(_policy(number, self._bases) for number in range(POLICIES))
        self._kubeconfig = self.space.grant("operator")
        self._log = folder / "operator.log"
        self._operator: RunningOperator | None = None

    def until_settled(self) -> Cost:
        """Starts the operator, anew where it runs, and waits until it is settled."""
        if self._operator:
            self._operator.kill()
        self._port = _free_port()
        started = time.monotonic()
        self._operator = RunningOperator(
            self._kubeconfig, self.space, self._store.root, self._log, metrics_port=self._port
        )
        self._wait_until_stored()
        self._make([self._next_vector(last=True)])
        self._wait_until_stored()
        wall = time.monotonic() - started
        status = Path(f"/proc/{self._operator.pid}/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
        return Cost(self._cpu(), wall, peak, self._metrics()["datavector_operator_api_requests_total"])

    def idle(self) -> float:
        """CPU seconds per second while nothing happens."""
        before = self._cpu()
        time.sleep(IDLE_SECONDS)
        return (self._cpu() - before) / IDLE_SECONDS

    def one_more(self) -> float:
        """CPU seconds for each of some more objects that come one by one."""
        before = self._cpu()
        for _ in range(MORE):
            self._make([self._next_vector()])
            self._wait_until_stored()
        return (self._cpu() - before) / MORE

    def close(self) -> None:
        if self._operator:
            self._operator.close()

    # --- Parts

    def _next_vector(self, *, last: bool = False) -> DataVector:
        """A vector with its file in the store; as the `last` one of all by name, it ends a list, too."""
        number, base = self._made, self._bases[self._made % BASES]
        self._made += 1
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        hospital = f"hospital-{number // BASES:05}"
        path = self._store.blob(hospital, digest)
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.truncate(base.vector_layout.size)
        return DataVector(
            metadata=Metadata(name=f"{'z' if last else 'v'}-{number:06}.{digest[:10]}"),
            spec=VectorSpec(
                hospital=hospital,
                base_model_ref=base.digest,
                sequence=1 + number % 7,
                artifact=Artifact(digest=f"sha256:{digest}", size=base.vector_layout.size),
                sample_count=100,
            ),
        )

    def _make(self, resources: Iterable[DataVector | MergePolicy]) -> None:
        def create(resource: DataVector | MergePolicy) -> None:
            self._api.create_namespaced_custom_object(
                GROUP, API_VERSION, self.space.name, resource.plural, manifest(resource)
            )

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(create, resources))

    def _wait_until_stored(self) -> None:
        wanted = ('datavector_operator_objects{kind="DataVector",state="Stored"}', self._made)
        deadline = time.monotonic() + SECONDS
        while wanted not in self._metrics().items():
            assert self._operator
            if not self._operator.running or time.monotonic() > deadline:
                sys.exit(f"the operator did not settle:\n{self._operator.tail()}")
            time.sleep(POLL_SECONDS)

    def _metrics(self) -> dict[str, float]:
        """What the operator tells Prometheus, by sample; nothing while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=60) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            return {}
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def _cpu(self) -> float:
        assert self._operator
        fields = Path(f"/proc/{self._operator.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def _policy(number: int, bases: list[BaseModel]) -> MergePolicy:
    """A policy that waits: for a base model, for more hospitals than there are, or (one for each base) for quiet."""
    base = bases[number // 2 % BASES].name if number % 2 else f"absent-{number}"
    if number // 2 < BASES:
        trigger = Trigger(min_hospitals=2, quiet_period_seconds=DAY, max_wait_seconds=DAY)
    else:
        trigger = Trigger(min_hospitals=1_000_000)
    return MergePolicy(
        metadata=PolicyMetadata(name=f"policy-{number:02}"), spec=PolicySpec(base_model_ref=base, trigger=trigger)
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
