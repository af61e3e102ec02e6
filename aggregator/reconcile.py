"""What should happen next: a pure function of the objects and the time. No I/O, no clock, no Kubernetes.

`plan` looks at one policy's objects and returns actions, `sweep` says what of all of them may be erased; whoever
carries the actions out asks again until nothing but waiting is left. Asking twice, or again after a crash, gives the
same objects: names are deterministic and every action may be repeated.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Literal

from aggregator.resources import (
    AUTO,
    FALLBACK,
    JOB_FAILED,
    QUARANTINED,
    BaseModelResource,
    Calibration,
    CalibrationMethod,
    CalibrationMode,
    CalibrationReport,
    Condition,
    ConditionStatus,
    Consent,
    DataVector,
    Evaluation,
    EvaluationMethod,
    EvaluationReport,
    HeadMode,
    HeadReport,
    HospitalScore,
    MergePolicy,
    Metadata,
    ModelScore,
    ModelVersion,
    Phase,
    PolicyStatus,
    Resource,
    VersionInput,
    VersionSpec,
    with_condition,
)
from datavector.choice import FEWEST, HEAD, Choice, Evaluations, Score, choose_candidate
from datavector.files import canonical_json

Stage = Literal["merge", "restore", "release"]

_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)

ATTEMPTS = 4
EXIT_PASSING = 3  # a job's exit code after a failure that may pass by itself
PAUSE = timedelta(seconds=30)  # after such a failure
SKEW = timedelta(minutes=5)  # between the clocks that write times


@dataclass(frozen=True)
class Base:
    """What reconciliation needs to know of a base model.

    Attributes:
        vector_size: bytes of each of its vectors.
        has_head: whether its head is a linear layer, which can be solved in closed form.
    """

    digest: str
    has_batchnorm: bool
    vector_size: int = 0
    has_head: bool = False


class Vectors(tuple[DataVector, ...]):
    """Vectors that find out once what follows from them alone, for all the policies and rounds that share them."""

    @classmethod
    def of(cls, vectors: Iterable[DataVector]) -> Vectors:
        return vectors if isinstance(vectors, cls) else cls(vectors)

    @cached_property
    def newest(self) -> frozenset[str]:
        """Names of the newest vector of each hospital and base model, of those that count."""
        return frozenset(vector.name for vector in _newest(vector for vector in self if _counts(vector)))

    @cached_property
    def usable(self) -> dict[str, tuple[DataVector, ...]]:
        """By base model what a version may be made of; see `eligible`."""
        found = defaultdict(list)
        for vector in self:
            usable = vector.granted and vector.status.stored_at and not vector.quarantine
            if usable and vector.name in self.newest:
                found[vector.spec.base_model_ref].append(vector)
        return {base: tuple(sorted(vectors, key=_content)) for base, vectors in found.items()}

    @cached_property
    def quarantined(self) -> tuple[DataVector, ...]:
        """Those that a person is to look at: newer ones of the same hospital would have taken their places."""
        waiting = (vector for vector in self if vector.granted and vector.quarantine)
        return tuple(vector for vector in waiting if vector.name in self.newest)

    @cached_property
    def withdrawn(self) -> frozenset[str]:
        """Names of those without consent."""
        return frozenset(vector.name for vector in self if not vector.granted)

    @cached_property
    def granted_by_age(self) -> tuple[DataVector, ...]:
        """Those with consent, in the order of each hospital's `_seniority`."""
        return tuple(sorted((vector for vector in self if vector.granted), key=_seniority))


@dataclass(frozen=True)
class World:
    """Everything that decides about one policy.

    Attributes:
        base: the policy's base model, or None while the store lacks it.
        reports: what finished job stages reported, by version and stage.
        visits: rounds done, by version and hospital.
        evaluations: what hospitals found, by version, of those that are being evaluated.
        statistics: where the policy's method reads any, the kinds that hospitals have sent beside their vectors.
        running: versions with a running job.
        refused: why the policy cannot be carried out as it is written, as a sentence; empty where it can.
    """

    policy: MergePolicy
    base: Base | None
    vectors: tuple[DataVector, ...] = ()
    versions: tuple[ModelVersion, ...] = ()
    reports: Mapping[tuple[str, Stage], Mapping[str, Any]] = field(default_factory=dict)
    visits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    evaluations: Mapping[str, Evaluations] = field(default_factory=dict)
    statistics: Mapping[str, Collection[str]] = field(default_factory=dict)
    running: frozenset[str] = frozenset()
    refused: str = ""

    @cached_property
    def wanted(self) -> ModelVersion:
        """The version of the vectors that are eligible; there must be some."""
        return desired_version(self, eligible(self))

    @cached_property
    def merged(self) -> frozenset[str]:
        """Names of the vectors that a version of the policy has."""
        return frozenset(name for version in self.versions for name in version.vectors)

    @cached_property
    def arrivals(self) -> tuple[DataVector, ...]:
        """The eligible vectors that no version of the policy has."""
        return tuple(vector for vector in eligible(self) if vector.name not in self.merged)

    @cached_property
    def queued_since(self) -> datetime | None:
        """When the first of the arrivals came."""
        return min((vector.arrived_at for vector in self.arrivals), default=None)

    @cached_property
    def arrived(self) -> list[datetime]:
        """When the arrivals came, sorted."""
        return sorted(vector.arrived_at for vector in self.arrivals)

    @cached_property
    def arrivals_wait_since(self) -> list[datetime]:
        """Since when the hospitals of the arrivals wait, sorted."""
        return sorted(self._waiting_since.get(_sender(vector), vector.arrived_at) for vector in self.arrivals)

    @cached_property
    def hospitals_wait_since(self) -> list[datetime]:
        """Since when the hospitals of the eligible vectors wait, or are there, sorted."""
        return sorted(self._waiting_since.get(_sender(vector), vector.arrived_at) for vector in eligible(self))

    @cached_property
    def _waiting_since(self) -> dict[tuple[str, str], datetime]:
        """By hospital and base model when the first vector came that none of the hospital's merged ones has replaced.

        So a hospital that keeps sending does not put off the others for longer than maxWaitSeconds.
        """
        since: dict[tuple[str, str], datetime] = {}
        for vector in Vectors.of(self.vectors).granted_by_age:
            if vector.name in self.merged:
                since.pop(_sender(vector), None)
            else:
                since[_sender(vector)] = min(since.get(_sender(vector), vector.arrived_at), vector.arrived_at)
        return since


# --- Actions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CreateVersion:
    version: ModelVersion


@dataclass(frozen=True)
class Save:
    """Replaces an object by its next state."""

    resource: Resource


@dataclass(frozen=True)
class RunJob:
    version: str
    stage: Stage


@dataclass(frozen=True)
class StopJob:
    version: str


@dataclass(frozen=True)
class EraseVersion:
    """Removes a version's files; its object stays."""

    version: str


@dataclass(frozen=True)
class EraseBlob:
    """Removes a vector's file, then saves the vector, which says so."""

    vector: DataVector


@dataclass(frozen=True)
class WakeAt:
    time: datetime


Action = CreateVersion | Save | RunJob | StopJob | EraseVersion | EraseBlob | WakeAt


def plan(world: World, now: datetime) -> list[Action]:
    """The next actions for one policy, in the order in which they must be carried out.

    A withdrawal comes before everything else: as long as a version with a withdrawn vector is not Revoked, nothing
    but its revocation is planned. Then comes the version that the policy wants, then the work on those there are.
    """
    if revoked := revocations(world.vectors, world.versions, now):
        return [Save(version) for version in revoked]
    newer = _next_version(world, now)
    if newer and not isinstance(newer[0], WakeAt):
        return newer
    return [*newer, *_progress(world, now), *_over_limit(world, now)]


def sweep(
    versions: Iterable[ModelVersion],
    vectors: Sequence[DataVector],
    *,
    running: Collection[str],
    on_disk: Collection[str],
    now: datetime,
) -> list[Action]:
    """Erases what nobody may or need use any more, each action independent of the others.

    Of versions that have ended: first their job, then their files. Of vectors that were withdrawn or replaced: the
    blob, unless a version is being made of it. A version that is Ready needs it no more.

    Args:
        versions: all there are, also those whose policy is gone.
        running: versions with a running job.
        on_disk: versions with files in the store.
    """
    needed, actions = set[str](), list[Action]()
    for version in versions:
        if version.status.phase.unfinished or version.name in running:
            needed |= version.vectors
        if version.status.phase in (Phase.REVOKED, Phase.SUPERSEDED, Phase.FAILED):
            if version.name in running:
                actions.append(StopJob(version.name))
            elif version.name in on_disk:
                actions.append(EraseVersion(version.name))
    vectors = Vectors.of(vectors)
    for vector in vectors:
        unwanted = not vector.granted or (_counts(vector) and vector.name not in vectors.newest)
        if unwanted and vector.name not in needed and vector.status.erased_at is None:
            actions.append(EraseBlob(_erased(vector, now)))
    return actions


def abandon(versions: Iterable[ModelVersion], now: datetime) -> list[Action]:
    """Ends the unfinished versions of a policy that is gone."""
    return [
        Save(version.with_phase(Phase.SUPERSEDED, now=now, message="its policy is gone"))
        for version in versions
        if version.status.phase.unfinished
    ]


@dataclass(frozen=True)
class Failure:
    """What became of a version's job that did not finish.

    Attributes:
        message: why, as a sentence.
        passing: for a reason that may pass by itself (a full disk, a lost machine): tried again without end. Any other
            is tried ATTEMPTS times.
        at: when it failed.
        tries: of those that this failure was.
    """

    message: str
    passing: bool
    at: datetime
    tries: int = 1


def on_record(version: ModelVersion, failure: Failure) -> bool:
    """Whether a failure of a version's job needs no more writing down."""
    retry_at = version.status.retry_at
    return not version.status.phase.unfinished or (retry_at is not None and retry_at > failure.at)


def job_failed(version: ModelVersion, failure: Failure) -> ModelVersion:
    """A version after its job failed."""
    attempts = version.status.attempts + (0 if failure.passing else failure.tries)
    if attempts >= ATTEMPTS:
        return version.with_phase(Phase.FAILED, now=failure.at, message=failure.message)
    retry_at = failure.at + (PAUSE if failure.passing else timedelta(seconds=2.0**attempts))
    changes = {"attempts": attempts, "retry_at": retry_at}
    return version.with_message(JOB_FAILED, failure.message, now=failure.at, **changes)


def revocations(vectors: Iterable[DataVector], versions: Iterable[ModelVersion], now: datetime) -> list[ModelVersion]:
    """Versions that contain a withdrawn vector and are not Revoked yet, as Revoked."""
    if not (withdrawn := Vectors.of(vectors).withdrawn):
        return []
    return [
        version.with_phase(
            Phase.REVOKED, now=now, message=f"{', '.join(sorted(version.vectors & withdrawn))} was withdrawn"
        )
        for version in versions
        if version.status.phase is not Phase.REVOKED and version.vectors & withdrawn
    ]


def withdraw(
    vectors: Iterable[DataVector],
    versions: Iterable[ModelVersion],
    hospital: str,
    base_digest: str | None,
    now: datetime,
) -> tuple[list[DataVector], list[ModelVersion]]:
    """A hospital's vectors (of one base, or all) as Withdrawn, and the versions that contain one as Revoked."""
    taken_back = [
        _withdrawn(vector, now)
        for vector in vectors
        if vector.spec.hospital == hospital and base_digest in (None, vector.spec.base_model_ref)
    ]
    names = {vector.name for vector in taken_back}
    versions = [version for version in versions if version.vectors & names]
    already = [version for version in versions if version.status.phase is Phase.REVOKED]
    return taken_back, [*already, *revocations(taken_back, versions, now)]


def eligible(world: World) -> tuple[DataVector, ...]:
    """The newest vector of each hospital for the policy's base, where consent stands and the file is here; sorted by
    digest.

    A hospital whose newest vector is withdrawn is out: an older one does not take its place. One without a file that
    fits does not count, and neither does one whose statistics a version has waited for in vain, until they come.
    """
    if world.base is None:
        return ()
    usable, missed = Vectors.of(world.vectors).usable.get(world.base.digest, ()), _missed(world)
    return tuple(vector for vector in usable if vector.name not in missed) if missed else usable


def _missed(world: World) -> list[str]:
    """The vectors whose statistics have not come in time, and are still not here; sorted."""
    return sorted(
        {
            name
            for version in world.versions
            if version.status.unmeasured and version.spec.method.statistics == world.policy.spec.method.statistics
            for name in _unmeasured_inputs(version, world)
            if name in version.status.unmeasured
        }
    )


def desired_version(world: World, vectors: tuple[DataVector, ...]) -> ModelVersion:
    """The version that merges `vectors` as the policy says; equal inputs and settings have equal names."""
    assert world.base  # noqa: S101  the caller has vectors of it
    spec = world.policy.spec
    calibration = CalibrationMethod(mode=spec.calibration.mode, visits=spec.calibration.visits)
    method, evaluation = spec.method.resolved, _evaluation_method(world.policy)
    inputs = tuple(
        VersionInput(
            data_vector=vector.name,
            hospital=vector.spec.hospital,
            digest=vector.spec.artifact.digest,
            sample_count=vector.spec.sample_count,
        )
        for vector in vectors
    )
    content = {
        "base": world.base.digest,
        "inputs": [entry.model_dump(mode="json") for entry in inputs],
        "settings": [part.model_dump(mode="json") for part in (method, calibration, spec.head, spec.export)],
        "evaluation": evaluation and evaluation.model_dump(mode="json"),
    }
    inputs_hash = hashlib.sha256(canonical_json(content)).hexdigest()
    return ModelVersion(
        metadata=Metadata(name=f"{world.policy.name}-{inputs_hash[:10]}"),
        spec=VersionSpec(
            policy_ref=world.policy.name,
            base_model_ref=world.base.digest,
            inputs=inputs,
            inputs_hash=inputs_hash,
            method=method,
            calibration=calibration,
            head=spec.head,
            evaluation=evaluation,
            export=spec.export,
        ),
    )


def due(world: World, now: datetime) -> datetime | None:
    """When the eligible vectors are to be merged: None for at once.

    Arrivals wait for quiet, at most maxWaitSeconds after there were enough hospitals. A withdrawal or a changed
    policy brings nothing new to wait for, and a withdrawal that left no version does not wait for arrivals either.
    """
    trigger, arrivals = world.policy.spec.trigger, len(world.arrivals)
    bereft = all(version.status.phase in (Phase.REVOKED, Phase.SUPERSEDED) for version in world.versions)
    if not arrivals or (bereft and len(eligible(world)) - arrivals >= trigger.min_hospitals):
        return None
    first = _credible_at(world.arrivals_wait_since, 0, now)
    enough = _credible_at(world.hospitals_wait_since, trigger.min_hospitals - 1, now)
    last = _credible_at(world.arrived, arrivals - 1, now)
    return min(
        last + timedelta(seconds=trigger.quiet_period_seconds),
        max(first, enough) + timedelta(seconds=trigger.max_wait_seconds),
    )


def quorum(wanted: Calibration | Evaluation, version: ModelVersion) -> int:
    """How many hospitals a calibration or an evaluation needs: never more than the version has."""
    return min(wanted.quorum or len(version.hospitals), len(version.hospitals))


def policy_status(world: World, now: datetime) -> PolicyStatus:
    """What a policy's object says of it."""
    latest = newest_ready(world.versions)
    sentence = explain(world, now)
    if world.base is None:
        accepted: _Values = ("False", "BaseModelMissing", sentence)
    elif world.refused:
        accepted = ("False", "InvalidMethod", sentence)
    else:
        accepted = ("True", "Accepted", "")
    ready: _Values = ("True", "Ready", latest.name) if latest else ("False", "NoReadyVersion", sentence)
    values = {"Accepted": accepted, "Reconciled": ("True", "Reconciled", ""), "Ready": ready}
    return _policy_status(world.policy, sentence, latest.name if latest else None, values, now)


def policy_fault(policy: MergePolicy, error: Exception, now: datetime) -> PolicyStatus:
    """What a policy's object says while an error keeps it from being carried out."""
    status = policy.status
    sentence = f"stopped by an error: {error}"
    values: dict[str, _Values] = {"Reconciled": ("False", type(error).__name__, str(error))}
    return _policy_status(policy, sentence, status.latest_version, values, now)


def vector_state(
    vector: DataVector, base: Base | None, size: int | None, merged_in: tuple[str, ...], now: datetime
) -> DataVector:
    """A vector whose object says what is known of it; the same one where it says so already.

    Args:
        base: its base model, or None where the store lacks it.
        size: bytes of its file in the store, or None where there is none.
        merged_in: Ready versions that contain it.
    """
    spec, status = vector.spec, vector.status
    changes: dict[str, Any] = {"merged_in": merged_in or None}
    if not vector.granted and status.withdrawn_at is None:
        changes["withdrawn_at"] = now
    if status.erased_at is None:
        stored: _Values = ("True", "FileStored", f"{size} bytes")
        valid: _Values = ("True", "FitsBaseModel", "")
        if size is None:
            stored = ("False", "FileMissing", "the store has no file of it: let the hospital send it, or delete this")
        if base is None:
            message = f"the store has no base model {spec.base_model_ref}: import it, or delete this"
            valid = ("False", "UnknownBaseModel", message)
        elif size is None:
            valid = ("False", "FileMissing", "")
        elif not size == spec.artifact.size == base.vector_size:
            message = f"the file has {size} bytes, the object says {spec.artifact.size}, the base {base.vector_size}"
            valid = ("False", "WrongSize", message)
        elif status.stored_at is None:
            changes["stored_at"] = vector.metadata.creation_timestamp or now
        changes["conditions"] = _conditions(status.conditions, {"Stored": stored, "Validated": valid}, vector, now)
    if all(getattr(status, name) == value for name, value in changes.items()):
        return vector
    return vector.model_copy(update={"status": status.model_copy(update=changes)})


def base_state(base: BaseModelResource, *, available: bool, now: datetime) -> BaseModelResource:
    """A BaseModel that says whether the store has it; the same one where it says so already."""
    values: _Values = ("True", "InStore", "")
    if not available:
        message = f"the store has no {base.spec.artifact_digest}; import it: datavector base import DIR --store STORE"
        values = ("False", "NotInStore", message)
    conditions = _conditions(base.status.conditions, {"Available": values}, base, now)
    if conditions == base.status.conditions:
        return base
    return base.model_copy(update={"status": base.status.model_copy(update={"conditions": conditions})})


def newest_ready(versions: Iterable[ModelVersion]) -> ModelVersion | None:
    """The version that clients get: the one that became Ready last."""
    ready = [version for version in versions if version.status.phase is Phase.READY]
    return max(ready, key=lambda version: (version.status.ready_at or _LONG_AGO, version.name), default=None)


def explain(world: World, now: datetime) -> str:
    """What the policy is waiting for, as a sentence."""
    spec = world.policy.spec
    if spec.suspend:
        return "suspended: set suspend to false to go on"
    if world.base is None:
        return f"base model {spec.base_model_ref!r} is not in the store; import it: datavector base import"
    if world.refused:
        return world.refused
    vectors, left_out = eligible(world), _unmeasured(world) + _quarantined(world)
    if len(vectors) < spec.trigger.min_hospitals:
        missing = spec.trigger.min_hospitals - len(vectors)
        more = "one" if missing == 1 else missing
        return f"{len(vectors)} of {spec.trigger.min_hospitals} hospitals; waiting for {more} more{left_out}"
    wanted = world.wanted
    version = {version.name: version for version in world.versions}.get(wanted.name)
    if version is None or version.status.phase is Phase.SUPERSEDED:
        time = due(world, now)
        when = f"at {_clock(time)} unless another arrives" if time and time > now else "now"
        return f"{len(vectors)} hospitals; merging {when}{left_out}"
    match version.status.phase:
        case Phase.MEASURING:
            return f"{version.name}: {_missing_statistics(version, world, now)}"
        case Phase.CALIBRATING:
            return f"{version.name}: {_missing_visits(version, world, now)}"
        case Phase.EVALUATING:
            return f"{version.name}: {_missing_evaluations(version, world, now)}"
        case Phase.READY:
            return f"{version.name} is Ready{left_out}"
        case Phase.REJECTED:
            return f"{version.name} is not Ready: {version.status.message}"
        case Phase.FAILED:
            return f"{version.name} failed: {version.status.message}"
        case phase:
            trouble = f"; the last try failed: {version.status.message}" if version.status.message else ""
            return f"{version.name} is {phase.value}{trouble}{left_out}"


# --- Parts of the plan ----------------------------------------------------------------------------------------


def _next_version(world: World, now: datetime) -> list[Action]:
    """Creates the version of the eligible vectors once it is due, or revives it; unfinished others give way to it."""
    vectors = eligible(world)
    if world.refused or world.policy.spec.suspend or len(vectors) < world.policy.spec.trigger.min_hospitals:
        return []
    wanted = world.wanted
    known = {version.name: version for version in world.versions}.get(wanted.name)
    if known is not None and known.status.phase is not Phase.SUPERSEDED:
        return [*_give_way(known, world, now), *_newest_ready(known, world, now)]
    time = due(world, now)
    if time is not None and now < time:
        return [WakeAt(time)]
    start: Action = CreateVersion(wanted) if known is None else Save(known.with_phase(Phase.PENDING, now=now))
    return [*_give_way(wanted, world, now), start]


def _give_way(wanted: ModelVersion, world: World, now: datetime) -> list[Action]:
    """Supersedes the unfinished others. One that is being released may finish, unless what is wanted is Ready."""
    giving = {Phase.PENDING, Phase.MEASURING, Phase.CALIBRATING, Phase.RESTORING, Phase.EVALUATING, Phase.REJECTED}
    if wanted.status.phase is Phase.READY:
        giving.add(Phase.RELEASING)
    return [
        Save(version.with_phase(Phase.SUPERSEDED, now=now, message=f"gave way to {wanted.name}"))
        for version in world.versions
        if version.name != wanted.name and version.status.phase in giving
    ]


def _newest_ready(wanted: ModelVersion, world: World, now: datetime) -> list[Action]:
    """Clients take the version that became Ready last: makes it the wanted one after a policy was changed back."""
    ready = {version.name: version.status.ready_at for version in world.versions if version.status.phase is Phase.READY}
    own = ready.pop(wanted.name, None)
    latest = max((ready_at for ready_at in ready.values() if ready_at), default=None)
    if own is None or latest is None or own > latest:
        return []
    return [Save(wanted.with_phase(Phase.READY, now=now, ready_at=max(now, latest + timedelta(microseconds=1))))]


def _progress(world: World, now: datetime) -> list[Action]:
    """Moves each unfinished version one phase on, where it can be."""
    return [action for version in world.versions for action in _progress_of(version, world, now)]


def _progress_of(version: ModelVersion, world: World, now: datetime) -> list[Action]:
    if version.status.phase.unfinished and world.base and version.spec.base_model_ref != world.base.digest:
        message = "the policy has another base model now"
        return [Save(version.with_phase(Phase.SUPERSEDED, now=now, message=message))]
    match version.status.phase:
        case Phase.PENDING:
            if _unmeasured_inputs(version, world):
                return [Save(version.with_phase(Phase.MEASURING, now=now, measuring_started_at=now))]
            if (report := world.reports.get((version.name, "merge"))) is None:
                return _run(version, "merge", world, now)
            return _after_merge(version, report, world, now)
        case Phase.MEASURING:
            return _await_statistics(version, world, now)
        case Phase.CALIBRATING:
            return _await_hospitals(version, world, now)
        case Phase.RESTORING:
            if (report := world.reports.get((version.name, "restore"))) is None:
                return _run(version, "restore", world, now)
            candidates = tuple(report["candidates"])
            return [
                Save(version.with_phase(Phase.EVALUATING, now=now, candidates=candidates, evaluation_started_at=now))
            ]
        case Phase.EVALUATING:
            return _await_evaluations(version, world, now)
        case Phase.REJECTED if _evaluation(world.policy).allow_worse:
            return [Save(version.with_phase(Phase.RELEASING, now=now))]
        case Phase.RELEASING:
            if (report := world.reports.get((version.name, "release"))) is None:
                return _run(version, "release", world, now)
            return [Save(version.with_phase(Phase.READY, now=now, ready_at=now, **_release_report(report)))]
    return []


def _release_report(report: Mapping[str, Any]) -> dict[str, Any]:
    parsed: dict[str, Any] = {"calibration": CalibrationReport.model_validate(report["calibration"])}
    if "head" in report:
        parsed["head"] = HeadReport.model_validate(report["head"])
    return {**report, **parsed}


def _run(version: ModelVersion, stage: Stage, world: World, now: datetime) -> list[Action]:
    if version.name in world.running:
        return []
    retry_at = version.status.retry_at
    if retry_at and now < _credible(retry_at, now):
        return [WakeAt(retry_at)]
    return [RunJob(version.name, stage)]


def _after_merge(version: ModelVersion, report: Mapping[str, Any], world: World, now: datetime) -> list[Action]:
    changes = {"weights_sha256": report["weights_sha256"]}
    if quarantined := _out_of_line(report.get("outliers", {}), world, now):
        names = ", ".join(vector.name for vector in quarantined)
        message = f"{names} is out of line with the others and waits for a person"
        return [*map(Save, quarantined), Save(version.with_phase(Phase.SUPERSEDED, now=now, message=message))]
    if world.base and _wants_hospitals(version, world.base):
        return [Save(version.with_phase(Phase.CALIBRATING, now=now, calibration_started_at=now, **changes))]
    return [Save(version.with_phase(_after_calibration(version), now=now, **changes))]


def _wants_hospitals(version: ModelVersion, base: Base) -> bool:
    """Whether hospitals are asked for anything before the release."""
    if version.spec.head.mode is HeadMode.CLOSED_FORM and version.asks_features and base.has_head:
        return True
    return base.has_batchnorm and version.spec.calibration.mode in (CalibrationMode.VISIT, CalibrationMode.MEETING)


def _after_calibration(version: ModelVersion) -> Phase:
    return Phase.RESTORING if version.spec.evaluation else Phase.RELEASING


def _out_of_line(outliers: Mapping[str, str], world: World, now: datetime) -> list[DataVector]:
    """The vectors that a merge found to be out of line, as Quarantined, but for those that a person has released."""
    return [
        _with_conditions(vector, {QUARANTINED: ("True", "OutOfLine", outliers[vector.name])}, now)
        for vector in world.vectors
        if vector.name in outliers and not vector.spec.released
    ]


def _unmeasured_inputs(version: ModelVersion, world: World) -> tuple[str, ...]:
    """The vectors of a version whose statistics, which its method reads, are still to come; sorted."""
    kinds = version.spec.method.statistics
    return tuple(sorted(name for name in version.vectors if kinds - set(world.statistics.get(name, ()))))


def _await_statistics(version: ModelVersion, world: World, now: datetime) -> list[Action]:
    """Waits for what hospitals send beside their vectors; after the deadline the next version is without the others."""
    if not (missing := _unmeasured_inputs(version, world)):
        return [Save(version.with_phase(Phase.PENDING, now=now))]
    if now < (deadline := _deadline(version, world, now)):
        return [WakeAt(deadline)]
    message = f"the statistics of {', '.join(missing)} did not come in time"
    return [Save(version.with_phase(Phase.SUPERSEDED, now=now, message=message, unmeasured=missing))]


def _await_hospitals(version: ModelVersion, world: World, now: datetime) -> list[Action]:
    needed = quorum(world.policy.spec.calibration, version)
    if len(_visitors(version, world)) < needed and now < (deadline := _deadline(version, world, now)):
        return [WakeAt(deadline)]
    return [Save(version.with_phase(_after_calibration(version), now=now, quorum=needed))]


def _await_evaluations(version: ModelVersion, world: World, now: datetime) -> list[Action]:
    """Waits for the hospitals' evaluations, then chooses; one hospital alone is not waited for."""
    evaluation, found = _evaluation(world.policy), world.evaluations.get(version.name, {})
    needed = quorum(evaluation, version)
    deadline = _deadline(version, world, now)
    if len(found) < needed and len(version.hospitals) >= FEWEST and now < deadline:
        return [WakeAt(deadline)]
    candidates = version.status.candidates
    fallback = _fallback(version)
    enough = needed if len(found) >= needed else FEWEST  # the deadline has passed: those count that have come
    choice = choose_candidate(found, candidates, version.singles, fallback=fallback, needed=enough)
    evaluated = version.evaluated(_evaluation_report(choice), now=now)
    if choice.worse_than and not evaluation.allow_worse:
        message = (
            f"{choice.chosen} is worse than the own model of {choice.worse_than}; to release it all the same, set "
            "evaluation.allowWorse in the policy"
        )
        return [Save(evaluated.with_phase(Phase.REJECTED, now=now, message=message))]
    return [Save(evaluated.with_phase(Phase.RELEASING, now=now))]


def _fallback(version: ModelVersion) -> str:
    """The candidate that is taken where too few hospitals evaluate."""
    candidates = version.status.candidates
    if version.spec.method.name != AUTO:
        return candidates[0]
    return FALLBACK if FALLBACK in candidates else f"{FALLBACK}{HEAD}"


def _evaluation(policy: MergePolicy) -> Evaluation:
    return policy.spec.evaluation or Evaluation()


def _evaluation_method(policy: MergePolicy) -> EvaluationMethod | None:
    if policy.spec.evaluation is None and policy.spec.method.name != AUTO:
        return None
    return EvaluationMethod(singles=_evaluation(policy).singles)


def _evaluation_report(choice: Choice) -> EvaluationReport:
    return EvaluationReport(
        validated=choice.validated,
        chosen=choice.chosen,
        reason=choice.reason,
        margin=choice.margin,
        hospitals=choice.hospitals,
        candidates=tuple(map(_model_score, choice.scores)),
        singles=tuple(map(_model_score, choice.singles)),
        worse_than=choice.worse_than,
    )


def _model_score(score: Score) -> ModelScore:
    return ModelScore(
        name=score.name,
        hospitals={name: HospitalScore(**vars(result)) for name, result in score.hospitals.items()},
        **vars(score.all),
    )


def _over_limit(world: World, now: datetime) -> list[Action]:
    """Ends Ready versions over the history limit."""
    newest_first = sorted(
        (version for version in world.versions if version.status.phase is Phase.READY),
        key=lambda version: (version.status.ready_at or now, version.name),
        reverse=True,
    )
    return [
        Save(version.with_phase(Phase.SUPERSEDED, now=now, message="older than historyLimit"))
        for version in newest_first[world.policy.spec.history_limit :]
    ]


def _newest(vectors: Iterable[DataVector]) -> list[DataVector]:
    """The newest vector of each hospital and base model, in whatever order they come."""
    newest: dict[tuple[str, str], DataVector] = {}
    for vector in vectors:
        known = newest.get(_sender(vector))
        if known is None or _seniority(known) < _seniority(vector):
            newest[_sender(vector)] = vector
    return list(newest.values())


def _counts(vector: DataVector) -> bool:
    """Whether a vector speaks for its hospital: its file is here and fits, or it is withdrawn."""
    return not vector.granted or vector.status.stored_at is not None


def _sender(vector: DataVector) -> tuple[str, str]:
    """Whose vectors replace each other: a hospital's, of one base model."""
    return vector.spec.hospital, vector.spec.base_model_ref


def _seniority(vector: DataVector) -> tuple[int, datetime, str]:
    """Orders the vectors of a hospital: the sequence decides, and the rest only between equal ones."""
    return vector.spec.sequence, vector.arrived_at, vector.name


def _content(vector: DataVector) -> tuple[str, str]:
    return vector.spec.artifact.digest, vector.name


def _withdrawn(vector: DataVector, now: datetime) -> DataVector:
    if not vector.granted:
        return vector
    return vector.model_copy(
        update={
            "spec": vector.spec.model_copy(update={"consent": Consent.WITHDRAWN}),
            "status": vector.status.model_copy(update={"withdrawn_at": now}),
        }
    )


def _visitors(version: ModelVersion, world: World) -> list[str]:
    """Hospitals that have done all their rounds; a meeting is one."""
    calibration, rounds = version.spec.calibration, world.visits.get(version.name, {})
    wanted = calibration.visits if calibration.mode is CalibrationMode.VISIT else 1
    return [name for name in version.hospitals if rounds.get(name, 0) >= wanted]


def _deadline(version: ModelVersion, world: World, now: datetime) -> datetime:
    """Until when a version that asks hospitals for something waits for them."""
    status, wait = version.status, world.policy.spec.calibration.deadline_seconds
    if status.phase is Phase.EVALUATING:
        started, wait = status.evaluation_started_at, _evaluation(world.policy).deadline_seconds
    else:
        started = status.measuring_started_at if status.phase is Phase.MEASURING else status.calibration_started_at
    assert started  # noqa: S101  set on entering the phase
    return _credible(started, now) + timedelta(seconds=wait)


def _missing_evaluations(version: ModelVersion, world: World, now: datetime) -> str:
    found = world.evaluations.get(version.name, {})
    missing = ", ".join(name for name in version.hospitals if name not in found)
    return (
        f"{len(found)} of {quorum(_evaluation(world.policy), version)} hospitals evaluated its "
        f"{len(version.status.candidates)} candidates; waiting for {missing} or until "
        f"{_clock(_deadline(version, world, now))}"
    )


def _quarantined(world: World) -> str:
    """Which vectors wait for a person, as the end of a sentence; empty where none does."""
    waiting = Vectors.of(world.vectors).quarantined
    if not waiting:
        return ""
    told = "; ".join(f"{vector.name} is quarantined: {vector.quarantine}" for vector in waiting)
    return f"; {told}; release it with spec.released: true, or withdraw it"


def _unmeasured(world: World) -> str:
    """Whose statistics have not come in time, as the end of a sentence; empty where nobody's."""
    missed = ", ".join(_missed(world))
    return f"; left out until they come: the statistics of {missed}" if missed else ""


def _missing_statistics(version: ModelVersion, world: World, now: datetime) -> str:
    missing = ", ".join(_unmeasured_inputs(version, world))
    return (
        f"waiting for the {' and '.join(sorted(version.spec.method.statistics))} statistics of {missing}, which agents "
        f"send when they look for tasks, or until {_clock(_deadline(version, world, now))}"
    )


def _missing_visits(version: ModelVersion, world: World, now: datetime) -> str:
    visitors = _visitors(version, world)
    missing = ", ".join(name for name in version.hospitals if name not in visitors)
    return (
        f"{len(visitors)} of {quorum(world.policy.spec.calibration, version)} hospitals came back to calibrate it; "
        f"waiting for {missing} or until {_clock(_deadline(version, world, now))}"
    )


def _credible(time: datetime, now: datetime) -> datetime:
    """A time that was written, or the distant past where a clock that was ahead has written it: nobody waits for it."""
    return time if time <= now + SKEW else _LONG_AGO


def _credible_at(times: list[datetime], index: int, now: datetime) -> datetime:
    """What would be at that index if each of the times, which are sorted, were `_credible` and then sorted again."""
    ahead = len(times) - bisect_right(times, now + SKEW)
    return _LONG_AGO if index < ahead else times[index - ahead]


def _with_conditions(vector: DataVector, values: Mapping[str, _Values], now: datetime) -> DataVector:
    conditions = _conditions(vector.status.conditions, values, vector, now)
    return vector.model_copy(update={"status": vector.status.model_copy(update={"conditions": conditions})})


def _erased(vector: DataVector, now: datetime) -> DataVector:
    values: dict[str, _Values] = {"Stored": ("False", "Erased", ""), "Erased": ("True", "Erased", "")}
    erased = _with_conditions(vector, values, now)
    return erased.model_copy(update={"status": erased.status.model_copy(update={"erased_at": now})})


_Values = tuple[ConditionStatus, str, str]  # of a condition: status, reason, message


def _conditions(
    conditions: tuple[Condition, ...], values: Mapping[str, _Values], of: Resource, now: datetime
) -> tuple[Condition, ...]:
    generation = of.metadata.generation
    said = {each.type: (each.status, each.reason, each.message, each.observed_generation) for each in conditions}
    for kind, (status, reason, message) in values.items():
        if said.get(kind) != (status, reason, message, generation):
            conditions = with_condition(conditions, kind, status, reason, message, generation, now)
    return conditions


def _policy_status(
    policy: MergePolicy, sentence: str, latest: str | None, values: Mapping[str, _Values], now: datetime
) -> PolicyStatus:
    return PolicyStatus(
        observed_generation=policy.metadata.generation,
        latest_version=latest,
        waiting_for=sentence,
        conditions=_conditions(policy.status.conditions, values, policy, now),
    )


def _clock(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ")
