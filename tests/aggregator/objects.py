"""Small builders of the aggregator's objects; times are seconds since a fixed start."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

from aggregator.reconcile import Base, World, desired_version, eligible
from aggregator.resources import (
    Artifact,
    Calibration,
    CalibrationMode,
    DataVector,
    MergePolicy,
    Metadata,
    Method,
    ModelVersion,
    Phase,
    PolicyMetadata,
    PolicySpec,
    Trigger,
    VectorSpec,
    VectorStatus,
)

START = datetime(2030, 1, 1, tzinfo=UTC)
BASE = Base("sha256:" + "b" * 64, has_batchnorm=True)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def policy(
    name: str = "brain",
    *,
    min_hospitals: int = 2,
    quiet: float = 60,
    max_wait: float = 3600,
    mode: str = "uploaded",
    method: str = "sum",
    history: int = 5,
    suspend: bool = False,
    base: str = BASE.digest,
    **calibration: Any,
) -> MergePolicy:
    return MergePolicy(
        metadata=PolicyMetadata(name=name),
        spec=PolicySpec(
            base_model_ref=base,
            method=Method(name=method),
            trigger=Trigger(min_hospitals=min_hospitals, quiet_period_seconds=quiet, max_wait_seconds=max_wait),
            calibration=Calibration(mode=CalibrationMode(mode), **calibration),
            history_limit=history,
            suspend=suspend,
        ),
    )


def vector(
    hospital: str,
    sequence: int = 1,
    *,
    at: float = 0,
    withdrawn: bool = False,
    base: str = BASE.digest,
    content: str | None = None,
    images: int = 100,
) -> DataVector:
    """Named `hospital-sequence` unless its content is given."""
    content = content or f"{hospital}-{sequence}"
    return DataVector(
        metadata=Metadata(name=content),
        spec=VectorSpec(
            hospital=hospital,
            base_model_ref=base,
            sequence=sequence,
            artifact=Artifact(digest="sha256:" + hashlib.sha256(content.encode()).hexdigest(), size=1000),
            sample_count=images,
            consent="Withdrawn" if withdrawn else "Granted",
        ),
        status=VectorStatus(
            stored_at=START + timedelta(seconds=at), withdrawn_at=START + timedelta(seconds=at) if withdrawn else None
        ),
    )


def version(
    of: MergePolicy, *vectors: DataVector, phase: Phase = Phase.PENDING, at: float = 0, **changes: Any
) -> ModelVersion:
    """The version that `of` makes of the newest granted ones of `vectors`, in a phase that it entered then."""
    world = World(of, BASE, vectors)
    time = START + timedelta(seconds=at)
    if phase is Phase.READY:
        changes.setdefault("ready_at", time)
    if phase is Phase.CALIBRATING:
        changes.setdefault("calibration_started_at", time)
    return desired_version(world, eligible(world)).with_phase(phase, now=time, **changes)
