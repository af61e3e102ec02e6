"""The objects that the aggregator reconciles: group datavector.dev/v1alpha1.

The same objects in the embedded mode (rows of SQLite) and in Kubernetes (custom resources); a policy file has the
shape of the MergePolicy resource. Field names are camelCase outside and snake_case here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel as Schema
from pydantic import ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from datavector.errors import ConfigError

# Names of objects as Kubernetes limits them; a hospital's or a policy's is part of longer ones, and of labels.
ObjectName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]
PolicyName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,50}[a-z0-9])?$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Seconds = Annotated[float, Field(ge=0, le=10 * 365 * 86400)]

MOST_IMAGES = 10**9  # that a hospital may say it used


class Part(Schema):
    """A piece of a resource: camelCase outside, unknown fields are errors, values do not change."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, allow_inf_nan=False
    )


class Metadata(Part):
    name: ObjectName
    creation_timestamp: datetime | None = None


class PolicyMetadata(Metadata):
    name: PolicyName  # a version's name is this one, a hyphen and ten digits, and has to fit a label


class Resource(Part):
    """What every object has. `kind` is the class's name."""

    kind_name: ClassVar[str]

    api_version: Literal["datavector.dev/v1alpha1"] = "datavector.dev/v1alpha1"
    metadata: Metadata

    @property
    def name(self) -> str:
        return self.metadata.name

    def dump(self) -> dict[str, Any]:
        """The object as JSON data, with `kind`."""
        return {"kind": self.kind_name, **self.model_dump(mode="json", by_alias=True, exclude_none=True)}

    @classmethod
    def parse(cls, content: dict[str, Any]) -> Self:
        """The object of JSON data, with or without `kind`; only camelCase names are fields.

        Raises:
            pydantic.ValidationError: an unknown field, or a wrong value.
        """
        fields = {key: value for key, value in content.items() if key != "kind"}
        return cls.model_validate(fields, by_alias=True, by_name=False)


class Condition(Part):
    """A standard Kubernetes condition; `message` is a sentence for people."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    last_transition_time: datetime


# --- DataVector -----------------------------------------------------------------------------------------------


class Consent(StrEnum):
    GRANTED = "Granted"
    WITHDRAWN = "Withdrawn"


class Artifact(Part):
    digest: Digest
    size: int = Field(gt=0, description="bytes")


class VectorSpec(Part):
    hospital: Name
    base_model_ref: Digest
    sequence: int = Field(ge=1, description="the newest of a hospital counts")
    artifact: Artifact
    sample_count: int = Field(ge=1, le=MOST_IMAGES, description="training images")
    consent: Consent = Consent.GRANTED


class VectorStatus(Part):
    stored_at: datetime
    withdrawn_at: datetime | None = None
    erased_at: datetime | None = None


class DataVector(Resource):
    kind_name: ClassVar[str] = "DataVector"
    spec: VectorSpec
    status: VectorStatus

    @property
    def granted(self) -> bool:
        return self.spec.consent is Consent.GRANTED


def last_sequence(vectors: Iterable[DataVector], hospital: str, base_digest: str) -> int:
    """The highest sequence of a hospital's vectors of a base model; 0 if there are none."""
    specs = [vector.spec for vector in vectors]
    return max(
        (spec.sequence for spec in specs if (spec.hospital, spec.base_model_ref) == (hospital, base_digest)), default=0
    )


# --- MergePolicy ----------------------------------------------------------------------------------------------


class Method(Part):
    """A merge method of datavector.merge, by name, with its parameters."""

    name: str = "sum"
    parameters: dict[str, float] = {}


class Trigger(Part):
    """When arrivals become a version: enough hospitals, then quiet for a while, but never longer than the maximum."""

    min_hospitals: int = Field(default=2, ge=1)
    quiet_period_seconds: Seconds = 60
    max_wait_seconds: Seconds = 3600

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_wait_seconds < self.quiet_period_seconds:
            raise ValueError("maxWaitSeconds is shorter than quietPeriodSeconds")
        return self


class CalibrationMode(StrEnum):
    """How BatchNorm statistics are restored after a merge; see docs/batchnorm.md."""

    VISIT = "visit"
    MEETING = "meeting"
    UPLOADED = "uploaded"
    NONE = "none"


class CalibrationMethod(Part):
    """What of a calibration shapes the result.

    Attributes:
        visits: rounds of visits; the second refines the first.
    """

    mode: CalibrationMode = CalibrationMode.VISIT
    visits: int = Field(default=1, ge=1, le=5)


class Calibration(CalibrationMethod):
    """Which hospitals' statistics a version needs, and for how long it waits for them.

    Attributes:
        quorum: hospitals that must have taken part; all of the version's where absent.
        deadline_seconds: after that the `uploaded` statistics are used, and the release says so.
    """

    quorum: int | None = Field(default=None, ge=1)
    deadline_seconds: Seconds = 7 * 86400


class Export(Part):
    opset: int = Field(default=20, ge=18, le=21)


class PolicySpec(Part):
    base_model_ref: str = Field(description="name or digest of a base model in the store")
    method: Method = Method()
    trigger: Trigger = Trigger()
    calibration: Calibration = Calibration()
    export: Export = Export()
    history_limit: int = Field(default=5, ge=1)
    suspend: bool = False


class MergePolicy(Resource):
    kind_name: ClassVar[str] = "MergePolicy"
    metadata: PolicyMetadata
    spec: PolicySpec


# --- ModelVersion ---------------------------------------------------------------------------------------------


class Phase(StrEnum):
    """Where a version stands. The order is the order of work; the last four are final."""

    PENDING = "Pending"
    CALIBRATING = "Calibrating"
    RELEASING = "Releasing"
    READY = "Ready"
    SUPERSEDED = "Superseded"
    FAILED = "Failed"
    REVOKED = "Revoked"

    @property
    def unfinished(self) -> bool:
        return self in (Phase.PENDING, Phase.CALIBRATING, Phase.RELEASING)


class VersionInput(Part):
    data_vector: ObjectName
    hospital: Name
    digest: Digest
    sample_count: int


class VersionSpec(Part):
    policy_ref: Name
    base_model_ref: Digest
    inputs: tuple[VersionInput, ...] = Field(description="sorted by digest")
    inputs_hash: str
    method: Method
    calibration: CalibrationMethod
    export: Export


class VersionStatus(Part):
    """What came of a version.

    Attributes:
        attempts: tries of the current job that failed for a reason of its inputs; the next one waits until `retry_at`.
        weights_sha256: of the merged weights, before calibration.
        quorum: hospitals that had to take part in the calibration, once that has ended.
        calibration: mode used, hospitals, images, note.
        release_sha256: of the release's SHA256SUMS file.
    """

    phase: Phase = Phase.PENDING
    attempts: int = 0
    retry_at: datetime | None = None
    message: str = ""
    calibration_started_at: datetime | None = None
    quorum: int = 0
    weights_sha256: str = ""
    calibration: dict[str, Any] = {}
    release_sha256: str = ""
    ready_at: datetime | None = None
    conditions: tuple[Condition, ...] = ()


class ModelVersion(Resource):
    kind_name: ClassVar[str] = "ModelVersion"
    spec: VersionSpec
    status: VersionStatus = VersionStatus()

    @property
    def hospitals(self) -> tuple[str, ...]:
        return tuple(sorted(entry.hospital for entry in self.spec.inputs))

    @property
    def vectors(self) -> frozenset[str]:
        return frozenset(entry.data_vector for entry in self.spec.inputs)

    def with_phase(self, phase: Phase, *, now: datetime, message: str = "", **changes: Any) -> ModelVersion:
        """This version in another phase, with the conditions of that phase.

        A condition keeps the time at which its status last changed.
        """
        changes = {"phase": phase, "message": message, "attempts": 0, "retry_at": None, **changes}
        conditions = {condition.type: condition for condition in self.status.conditions}
        for kind, value in _CONDITIONS[phase].items():
            known = conditions.get(kind)
            since = known.last_transition_time if known and known.status == value else now
            conditions[kind] = Condition(
                type=kind, status=value, reason=phase.value, message=message, last_transition_time=since
            )
        status = self.status.model_copy(update={**changes, "conditions": tuple(conditions.values())})
        return self.model_copy(update={"status": status})


_CONDITIONS: dict[Phase, dict[str, Literal["True", "False", "Unknown"]]] = {
    Phase.PENDING: {"Merged": "False", "Calibrated": "False", "Exported": "False", "Ready": "False"},
    Phase.CALIBRATING: {"Merged": "True", "Ready": "False"},
    Phase.RELEASING: {"Merged": "True", "Calibrated": "True", "Ready": "False"},
    Phase.READY: {"Exported": "True", "Ready": "True"},
    Phase.SUPERSEDED: {"Ready": "False"},
    Phase.FAILED: {"Ready": "False"},
    Phase.REVOKED: {"Revoked": "True", "Ready": "False"},
}


def utc_now() -> datetime:
    return datetime.now(UTC)


# --- Policy files ---------------------------------------------------------------------------------------------


def load_policies(path: Path) -> tuple[MergePolicy, ...]:
    """Reads the MergePolicy documents of a YAML file.

    Raises:
        ConfigError: not YAML, another kind, an unknown field (the nearest valid one is named), a wrong value, two
            policies of one name.
    """
    try:
        documents = [document for document in yaml.safe_load_all(path.read_text()) if document is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", remedy="give a YAML file with a MergePolicy") from error
    policies = tuple(_policy(path, document) for document in documents)
    names = [policy.name for policy in policies]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"{path} names the policies {names}", remedy="write at least one, each name once")
    return policies


def _policy(path: Path, document: Any) -> MergePolicy:
    if not isinstance(document, dict) or document.get("kind") != MergePolicy.kind_name:
        kind = document.get("kind") if isinstance(document, dict) else document
        raise ConfigError(
            f"{path} holds {kind!r}", remedy="write kind: MergePolicy, apiVersion: datavector.dev/v1alpha1"
        )
    try:
        return MergePolicy.parse(document)
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(_sentences(error))}", remedy="see docs/policy.md") from error


def _sentences(error: ValidationError) -> Sequence[str]:
    return [_sentence(detail["loc"], detail["msg"], detail["type"]) for detail in error.errors()]


def _sentence(location: tuple[int | str, ...], message: str, kind: str) -> str:
    where = ".".join(str(part) for part in location)
    if kind != "extra_forbidden":
        message = message.removeprefix("Value error, ")
        return f"{where}: {message[0].lower()}{message[1:]}"
    return f"{where} is no field here; did you mean {_nearest(where)}?"


def _nearest(unknown: str) -> str:
    """The field that an unknown one stands for: of the same name elsewhere, or of a similar name in the same part."""
    known = list(_field_paths(MergePolicy))
    part, _, name = unknown.rpartition(".")
    elsewhere = [path for path in known if path.rpartition(".")[2] == name]
    siblings = [path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == part]
    return (elsewhere or difflib.get_close_matches(name, siblings, n=1, cutoff=0))[0]


def _field_paths(schema: type[Schema], part: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        path = f"{part}{field.alias or name}"
        yield path
        if isinstance(field.annotation, type) and issubclass(field.annotation, Schema):
            yield from _field_paths(field.annotation, f"{path}.")
