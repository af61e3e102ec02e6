"""A store with hospitals' vectors in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aggregator.resources import Artifact, DataVector, Metadata, VectorSpec, VectorStatus, utc_now
from aggregator.store import Store
from datavector.model import BaseModel
from datavector.vector import write_vector

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
