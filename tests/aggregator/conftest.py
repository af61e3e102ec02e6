"""A store with hospitals' vectors in it, and an operator in a namespace of its own that works on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.resources import Artifact, DataVector, Metadata, VectorSpec, VectorStatus, utc_now
from aggregator.store import Store
from datavector.model import BaseModel
from datavector.vector import write_vector
from tests.aggregator.cluster_site import ClusterSite
from tests.cluster.aggregation import Namespace, RunningOperator, record
from tests.cluster.client import Cluster

Deliver = Callable[..., DataVector]


@pytest.fixture
def deliver(tmp_path: Path) -> Deliver:
    """Puts a hospital's vector into a store, as the receiver does: `deliver(store, base, "north")`.

    The same hospital always delivers the same small random changes of the base's weights.
    """

    def put(store: Store, base: BaseModel, hospital: str, *, sequence: int = 1, images: int = 100) -> DataVector:
        random = np.random.default_rng([sequence, *hospital.encode()])
        with base.open() as weights:
            tuned = {spec.name: _nudged(weights.read(spec.name), random) for spec in base.layout.tensors}
        path = tmp_path / "tau"
        sha256 = write_vector(path, base, tuned)
        blob = store.blob(hospital, sha256)
        blob.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blob)
        return DataVector(
            metadata=Metadata(name=f"{hospital}-{sha256[:10]}"),
            spec=VectorSpec(
                hospital=hospital,
                base_model_ref=base.digest,
                sequence=sequence,
                artifact=Artifact(digest=f"sha256:{sha256}", size=base.vector_layout.size),
                sample_count=images,
            ),
            status=VectorStatus(stored_at=utc_now()),
        )

    return put


def _nudged(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return values * (1 + np.float32(0.01) * random.random(values.shape, dtype=np.float32))


@pytest.fixture
def space(cluster: Cluster, crds: Any, namespace: str) -> Namespace:
    return Namespace(cluster, namespace)


@pytest.fixture
def store(tmp_path: Path, small_base: BaseModel) -> Store:
    made = Store(tmp_path / "store")
    made.import_base(small_base.path)
    return made


@pytest.fixture
def start_operator(space: Namespace, store: Store, tmp_path: Path) -> Iterator[Callable[..., RunningOperator]]:
    kubeconfig = space.grant("operator")
    with ExitStack() as stack:

        def start(**settings: Any) -> RunningOperator:
            operator = RunningOperator(kubeconfig, space, store.root, tmp_path / "operator.log", **settings)
            stack.callback(operator.close)
            return operator

        yield start
    log = tmp_path / "operator.log"
    assert not log.exists() or "Traceback" not in log.read_text()


@pytest.fixture
def arrive(space, store, deliver):
    """Stores hospitals' vectors and makes their objects: `arrive(base, "north", "south")`."""

    def put(base: BaseModel, *hospitals: str, sequence: int = 1) -> None:
        for hospital in hospitals:
            record(space, deliver(store, base, hospital, sequence=sequence))

    return put


@pytest.fixture
def site(
    cluster: Cluster, crds: Any, namespace: str, small_base: BaseModel, authority: Path, tmp_path: Path
) -> Iterator[ClusterSite]:
    """A namespace with a base model and a policy, in which a test starts receivers."""
    store = Store(tmp_path / "store")
    store.import_base(small_base.path)
    with ExitStack() as running:
        made = ClusterSite(cluster, namespace, small_base, store, authority, tmp_path, running)
        made.prepare()
        yield made
