"""The objects that the aggregator reconciles: group datavector.dev/v1alpha1.

The same objects in the embedded mode (rows of SQLite) and in Kubernetes (custom resources, whose definitions
`aggregator.crds` makes of these classes). Field names are camelCase outside and snake_case here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel as Schema
from pydantic import ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

from datavector.choice import SINGLE
from datavector.merge import body_id, choose, find, methods

GROUP, API_VERSION = "datavector.dev", "v1alpha1"

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
    """What an object's metadata has here; `uid`, `resource_version` and `generation` come from Kubernetes."""

    name: ObjectName
    creation_timestamp: datetime | None = None
    uid: str | None = None
    resource_version: str | None = None
    generation: int | None = None


class PolicyMetadata(Metadata):
    name: PolicyName  # a version's name is this one, a hyphen and ten digits, and has to fit a label


class Resource(Part):
    """What every object has. `kind` is the class's name."""

    kind_name: ClassVar[str]
    plural: ClassVar[str]

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


ConditionStatus = Literal["True", "False", "Unknown"]


class Condition(Part):
    """A standard Kubernetes condition (https://kubernetes.io/docs/reference/using-api/, "Conditions")."""

    type: str = Field(description="What the condition is about, such as Ready.")
    status: ConditionStatus = Field(description="Whether it holds.")
    reason: str = Field(description="Why, as one word for programs.")
    message: str = Field(default="", description="Why, as a sentence for people, with what to do next.")
    observed_generation: int | None = Field(default=None, description="The metadata.generation that this was said of.")
    last_transition_time: datetime = Field(description="When the status last changed.")


def with_condition(
    conditions: Iterable[Condition],
    kind: str,
    status: ConditionStatus,
    reason: str,
    message: str,
    generation: int | None,
    now: datetime,
) -> tuple[Condition, ...]:
    """Conditions with one replaced or added; it keeps the time at which its status last changed."""
    known = {condition.type: condition for condition in conditions}
    before = known.get(kind)
    since = before.last_transition_time if before and before.status == status else now
    changed = Condition(
        type=kind,
        status=status,
        reason=reason,
        message=message,
        observed_generation=generation,
        last_transition_time=since,
    )
    return tuple({**known, kind: changed}.values())


class Artifact(Part):
    digest: Digest = Field(description="SHA-256 of the content, as sha256:<hex>.")
    size: int = Field(gt=0, description="Bytes.")


# --- BaseModel ------------------------------------------------------------------------------------------------


class BaseModelSpec(Part):
    architecture: str = Field(description="Name of the network, such as efficientnet_lite0.", min_length=1)
    classes: tuple[str, ...] = Field(description="Label of each output, in order.", min_length=2)
    input_size: int = Field(description="Height and width of the input in pixels.", ge=1)
    artifact_digest: Digest = Field(description="Digest of the base model in the store.")


class BaseModelStatus(Part):
    conditions: tuple[Condition, ...] = Field(default=(), description="Available: whether the store has it.")


class BaseModelResource(Resource):
    """A pretrained classifier that hospitals start from; its files are in the aggregator's store."""

    kind_name: ClassVar[str] = "BaseModel"
    plural: ClassVar[str] = "basemodels"
    spec: BaseModelSpec
    status: BaseModelStatus = BaseModelStatus()


# --- DataVector -----------------------------------------------------------------------------------------------


QUARANTINED = "Quarantined"


class Consent(StrEnum):
    GRANTED = "Granted"
    WITHDRAWN = "Withdrawn"


class VectorSpec(Part):
    hospital: Name = Field(description="Who sent it: the name in the certificate.")
    base_model_ref: Digest = Field(description="Digest of the base model that it was trained from.")
    sequence: int = Field(ge=1, description="Number of the hospital's vector; the highest counts.")
    artifact: Artifact = Field(description="The vector's file in the store.")
    sample_count: int = Field(ge=1, le=MOST_IMAGES, description="Training images.")
    released: bool = Field(
        default=False, description="true: a person has looked at it, and it is merged though it is out of line."
    )
    consent: Consent = Field(
        default=Consent.GRANTED, description="Withdrawn takes the vector out of every model; there is no way back."
    )


class VectorStatus(Part):
    stored_at: datetime | None = Field(
        default=None, description="Since when it may be merged: its file is here, and fits."
    )
    withdrawn_at: datetime | None = Field(default=None, description="When its consent was withdrawn.")
    erased_at: datetime | None = Field(default=None, description="When its file was erased from the store.")
    merged_in: tuple[str, ...] | None = Field(default=None, description="Ready versions that contain it.")
    conditions: tuple[Condition, ...] = Field(default=(), description="Stored, Validated, Quarantined and Erased.")


class DataVector(Resource):
    """What one hospital's fine-tuning changed: theta_ft - theta_pre, and whether it may be used."""

    kind_name: ClassVar[str] = "DataVector"
    plural: ClassVar[str] = "datavectors"
    spec: VectorSpec
    status: VectorStatus = VectorStatus()

    @property
    def granted(self) -> bool:
        return self.spec.consent is Consent.GRANTED

    @property
    def quarantine(self) -> str:
        """Why it is not merged until a person releases it; empty where it may be."""
        if self.spec.released:
            return ""
        found = (each for each in self.status.conditions if (each.type, each.status) == (QUARANTINED, "True"))
        return next((each.message for each in found), "")

    @property
    def arrived_at(self) -> datetime:
        """When it was stored, as far as anybody has written it down."""
        return self.status.stored_at or self.metadata.creation_timestamp or datetime(1970, 1, 1, tzinfo=UTC)


def last_sequence(vectors: Iterable[DataVector], hospital: str, base_digest: str) -> int:
    """The highest sequence of a hospital's vectors of a base model; 0 if there are none."""
    specs = [vector.spec for vector in vectors]
    return max(
        (spec.sequence for spec in specs if (spec.hospital, spec.base_model_ref) == (hospital, base_digest)), default=0
    )


# --- MergePolicy ----------------------------------------------------------------------------------------------


Parameters = dict[str, float]

AUTO = "auto"  # a method's name: several are tried, and the hospitals' evaluation decides
FALLBACK = "mean"  # what is taken where too few hospitals evaluate


class Candidate(Part):
    name: str = Field(description="Merge method.")
    parameters: Parameters = Field(default={}, description="The method's numbers by name, such as scale.")

    @property
    def body(self) -> str:
        return body_id(self.name, self.parameters)


DEFAULT_CANDIDATES = (  # in this order by docs/measurements.md
    Candidate(name="iso-c", parameters={"scale": 1.25}),
    Candidate(name="ties", parameters={"scale": 2}),
    Candidate(name="sum"),
    Candidate(name=FALLBACK),
)


class Method(Part):
    name: str = Field(
        default="sum", description="Merge method, or auto to let the hospitals' evaluation choose among candidates."
    )
    parameters: Parameters = Field(default={}, description="The method's numbers by name, such as scale.")
    candidates: tuple[Candidate, ...] = Field(
        default=(),
        max_length=16,
        description="Of auto: what is tried, the preferred first; iso-c, ties, sum and mean where absent. The mean is "
        "always among them, for the case that too few hospitals evaluate.",
    )

    @property
    def resolved(self) -> Method:
        """The same with every candidate named."""
        if self.name != AUTO:
            return self
        candidates = self.candidates or DEFAULT_CANDIDATES
        if FALLBACK not in {each.body for each in candidates}:
            candidates = (*candidates, Candidate(name=FALLBACK))
        return self.model_copy(update={"candidates": candidates})

    @property
    def bodies(self) -> dict[str, Candidate]:
        """What is merged, by a plain name, in the order of preference."""
        only = Candidate(name=self.name, parameters=self.parameters)
        return {each.body: each for each in (self.resolved.candidates if self.name == AUTO else (only,))}

    @property
    def statistics(self) -> frozenset[str]:
        """What hospitals must send beside their vectors (datavector.merge.statistics); nothing for unknown methods."""
        known = [each.name for each in self.bodies.values() if each.name in methods()]
        return frozenset(find(name).statistics for name in known) - {""}

    def check(self) -> None:
        """Raises ConfigError where a method is unknown, or one of its parameters."""
        for candidate in self.bodies.values():
            choose(candidate.name, candidate.parameters)


class HeadMode(StrEnum):
    """Where a merged model's classification head comes from; see docs/merging.md."""

    AUTO = "auto"
    MERGED = "merged"
    CLOSED_FORM = "closed-form"


class Head(Part):
    mode: HeadMode = Field(
        default=HeadMode.AUTO,
        description="merged: as merged. closed-form: corrected by sums of features that hospitals give in a visit. "
        "auto: closed-form where hospitals visit for BatchNorm anyway.",
    )
    floor: int = Field(
        default=5, ge=2, description="Images of a class below which a hospital leaves it out of its sums of features."
    )
    strength: float = Field(
        default=5.0, ge=0.001, le=1000, description="How strongly the closed-form head is held at the merged one."
    )


class EvaluationMethod(Part):
    """What of an evaluation shapes the result."""

    singles: bool = Field(
        default=True,
        description="Hospitals also evaluate each other's own models, so that a merged one that is worse is noticed.",
    )


class Evaluation(EvaluationMethod):
    """Which hospitals' evaluations a version needs, and what is done with a bad result."""

    quorum: int | None = Field(
        default=None, ge=2, description="Hospitals that must evaluate; all of the version's where absent."
    )
    deadline_seconds: Seconds = Field(
        default=7 * 86400, description="After that those count that have evaluated, if they are two or more."
    )
    allow_worse: bool = Field(
        default=False, description="A version may be Ready though the best single hospital's own model is better."
    )


class Trigger(Part):
    min_hospitals: int = Field(default=2, ge=1, description="Fewer hospitals than this make no version.")
    quiet_period_seconds: Seconds = Field(
        default=60, description="A version is made when nothing arrived for this long."
    )
    max_wait_seconds: Seconds = Field(
        default=3600,
        description="A version is made no later than this after there were enough hospitals; at least "
        "quietPeriodSeconds.",
    )

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
    """What of a calibration shapes the result."""

    mode: CalibrationMode = Field(
        default=CalibrationMode.VISIT,
        description="How BatchNorm statistics are restored: each hospital in a visit of its own, all in one meeting, "
        "from those uploaded with the vectors, or none.",
    )
    visits: int = Field(default=1, ge=1, le=5, description="Rounds of visits; the second refines the first.")


class Calibration(CalibrationMethod):
    """Which hospitals' statistics a version needs, and for how long it waits for them."""

    quorum: int | None = Field(
        default=None, ge=1, description="Hospitals that must take part; all of the version's where absent."
    )
    deadline_seconds: Seconds = Field(
        default=7 * 86400, description="After that the uploaded statistics are used, and the release says so."
    )


class Export(Part):
    opset: int = Field(default=20, ge=18, le=21, description="ONNX operator set of the release.")


Quantities = Annotated[dict[str, Annotated[str, Field(max_length=32)]], Field(max_length=16)]


class Resources(Part):
    requests: Quantities = Field(default={}, description="What is kept free for the container, such as cpu: 500m.")
    limits: Quantities = Field(default={}, description="The most that the container may use, such as memory: 4Gi.")


class Toleration(Part):
    key: str | None = Field(default=None, description="Taint that is tolerated; every taint where absent.")
    operator: Literal["Equal", "Exists"] = Field("Equal", description="How the taint's value is compared.")
    value: str | None = Field(default=None, description="The taint's value, for Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect that is tolerated; every effect where absent."
    )
    toleration_seconds: int | None = Field(default=None, ge=0, description="For how long NoExecute is tolerated.")


class JobSettings(Part):
    image: str | None = Field(
        default=None, min_length=1, description="Image of merge Jobs; the operator's default if absent."
    )
    image_pull_secrets: tuple[Name, ...] = Field(default=(), description="Names of Secrets for a private registry.")
    resources: Resources = Field(
        default=Resources(
            requests={"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "256Mi"}, limits={"memory": "4Gi"}
        ),
        description="Resources of a Job's container; exporting a model takes the most memory.",
    )
    node_selector: dict[str, str] = Field(default={}, description="Labels that a Job's node must have.")
    tolerations: tuple[Toleration, ...] = Field(
        default=(), max_length=32, description="Taints that a Job's Pod tolerates."
    )
    priority_class_name: str | None = Field(default=None, description="PriorityClass of a Job's Pod.")
    parallelism: int = Field(
        default=1, ge=1, le=64, description="Pods that share a merge; more than one is worth it for very large models."
    )
    backoff_limit: int = Field(default=3, ge=0, le=20, description="Failed Pods of a Job after which it has failed.")
    ttl_seconds_after_finished: int = Field(
        default=86400, ge=60, le=10 * 365 * 86400, description="How long a finished Job and its logs are kept."
    )


class PolicySpec(Part):
    base_model_ref: str = Field(min_length=1, description="Name or sha256: digest of a base model in the store.")
    method: Method = Field(default=Method(), description="How vectors become one.")
    trigger: Trigger = Field(default=Trigger(), description="When arrivals become a version.")
    calibration: Calibration = Field(default=Calibration(), description="How BatchNorm statistics are restored.")
    head: Head = Field(default=Head(), description="Where the classification head comes from.")
    evaluation: Evaluation | None = Field(
        default=None, description="How hospitals evaluate a version; where absent, only method auto is evaluated."
    )
    export: Export = Field(default=Export(), description="How the release is written.")
    job: JobSettings = Field(default=JobSettings(), description="How Jobs run; of no meaning without Kubernetes.")
    history_limit: int = Field(default=5, ge=1, description="Ready versions that are kept.")
    suspend: bool = Field(default=False, description="true: no new version is started.")


class PolicyStatus(Part):
    observed_generation: int | None = Field(
        default=None, description="The metadata.generation that this status is about."
    )
    latest_version: str | None = Field(default=None, description="The version that became Ready last.")
    waiting_for: str = Field(default="", description="What the policy waits for, as a sentence.")
    conditions: tuple[Condition, ...] = Field(
        default=(),
        description="Accepted: whether the policy can be carried out. Ready: whether there is a Ready version.",
    )


class MergePolicy(Resource):
    """When and how the vectors of a base model are merged."""

    kind_name: ClassVar[str] = "MergePolicy"
    plural: ClassVar[str] = "mergepolicies"
    metadata: PolicyMetadata
    spec: PolicySpec
    status: PolicyStatus = PolicyStatus()


# --- ModelVersion ---------------------------------------------------------------------------------------------


class Phase(StrEnum):
    """Where a version stands. The order is the order of work; from Ready on they are final."""

    PENDING = "Pending"
    MEASURING = "Measuring"
    CALIBRATING = "Calibrating"
    RESTORING = "Restoring"
    EVALUATING = "Evaluating"
    RELEASING = "Releasing"
    READY = "Ready"
    SUPERSEDED = "Superseded"
    REJECTED = "Rejected"
    FAILED = "Failed"
    REVOKED = "Revoked"

    @property
    def unfinished(self) -> bool:
        return self in (
            Phase.PENDING,
            Phase.MEASURING,
            Phase.CALIBRATING,
            Phase.RESTORING,
            Phase.EVALUATING,
            Phase.RELEASING,
        )


class VersionInput(Part):
    data_vector: ObjectName = Field(description="Name of the DataVector.")
    hospital: Name = Field(description="Who sent it.")
    digest: Digest = Field(description="Digest of its file.")
    sample_count: int = Field(description="Training images.")


class VersionSpec(Part):
    policy_ref: Name = Field(description="Name of the MergePolicy that asked for it.")
    base_model_ref: Digest = Field(description="Digest of the base model.")
    inputs: tuple[VersionInput, ...] = Field(min_length=1, description="The vectors that are merged, sorted by digest.")
    inputs_hash: str = Field(description="SHA-256 of the inputs and of every setting that shapes the result.")
    method: Method = Field(description="How the vectors become one.")
    calibration: CalibrationMethod = Field(description="How BatchNorm statistics are restored.")
    head: Head = Field(default=Head(mode=HeadMode.MERGED), description="Where the classification head comes from.")
    evaluation: EvaluationMethod | None = Field(
        default=None, description="What hospitals evaluate; nothing where absent."
    )
    export: Export = Field(description="How the release is written.")


class CalibrationReport(Part):
    """What the release says of its BatchNorm statistics."""

    mode: CalibrationMode = Field(description="How they were restored.")
    hospitals: tuple[str, ...] = Field(description="Whose statistics they are.")
    images: int = Field(description="Images that they were measured on.")
    note: str = Field(default="", description="Why in this way.")


class HospitalScore(Part):
    images: int = Field(description="Validation images.")
    accuracy: float = Field(description="Share of them that was recognised.")
    balanced_accuracy: float = Field(description="Mean over the classes of the share that was recognised.")


class ModelScore(HospitalScore):
    name: str = Field(description="Of a candidate, or `hospital.` and the name of the hospital whose own model it is.")
    hospitals: dict[str, HospitalScore] = Field(description="On each hospital's validation images.")


class EvaluationReport(Part):
    """What the hospitals' evaluation showed."""

    validated: bool = Field(description="Whether enough hospitals evaluated every candidate.")
    chosen: str = Field(description="The candidate that the release is of.")
    reason: str = Field(description="Why it, as a sentence.")
    margin: float = Field(default=0, description="Margin of error of the highest balanced accuracy.")
    hospitals: tuple[str, ...] = Field(default=(), description="Who evaluated.")
    candidates: tuple[ModelScore, ...] = Field(default=(), description="What was tried.")
    singles: tuple[ModelScore, ...] = Field(default=(), description="The hospitals' own models.")
    worse_than: str = Field(default="", description="The hospital whose own model is better than what was chosen.")


class HeadReport(Part):
    """What the release says of its classification head."""

    kind: Literal["merged", "closed-form"] = Field(description="Where it comes from.")
    hospitals: tuple[str, ...] = Field(default=(), description="Whose features corrected it.")
    images: int = Field(default=0, description="Images that they were measured on.")
    note: str = Field(default="", description="Why in this way.")


class VersionStatus(Part):
    phase: Phase = Field(default=Phase.PENDING, description="Where the version stands.")
    attempts: int = Field(default=0, description="Tries of the current job that failed for a reason of its inputs.")
    retry_at: datetime | None = Field(default=None, description="When the current job is tried again.")
    message: str = Field(default="", description="Why it stands there, as a sentence.")
    measuring_started_at: datetime | None = Field(
        default=None, description="Since when hospitals are asked for the statistics that the method reads."
    )
    unmeasured: tuple[str, ...] = Field(
        default=(), description="Vectors whose statistics did not come in time: left out until they come."
    )
    calibration_started_at: datetime | None = Field(
        default=None, description="Since when hospitals are asked to calibrate."
    )
    quorum: int = Field(
        default=0, description="Hospitals that had to take part in the calibration, once that has ended."
    )
    weights_sha256: str = Field(default="", description="SHA-256 of the merged weights, before calibration.")
    calibration: CalibrationReport | None = Field(default=None, description="How BatchNorm statistics were restored.")
    candidates: tuple[str, ...] = Field(default=(), description="What hospitals are asked to evaluate.")
    evaluation_started_at: datetime | None = Field(
        default=None, description="Since when hospitals are asked to evaluate."
    )
    evaluation: EvaluationReport | None = Field(default=None, description="What the hospitals' evaluation showed.")
    head: HeadReport | None = Field(default=None, description="Where the classification head comes from.")
    release_sha256: str = Field(default="", description="SHA-256 of the release's SHA256SUMS file.")
    ready_at: datetime | None = Field(default=None, description="When it became Ready.")
    conditions: tuple[Condition, ...] = Field(
        default=(),
        description="Merged, Calibrated, Evaluated, Exported, Ready and Revoked; Ready is what to wait for.",
    )


class ModelVersion(Resource):
    """One merged model: which vectors are in it, and how far it has come."""

    kind_name: ClassVar[str] = "ModelVersion"
    plural: ClassVar[str] = "modelversions"
    spec: VersionSpec
    status: VersionStatus = VersionStatus()

    @property
    def hospitals(self) -> tuple[str, ...]:
        return tuple(sorted(entry.hospital for entry in self.spec.inputs))

    @property
    def bodies(self) -> dict[str, Candidate]:
        """What is merged, by a plain name, in the order of preference."""
        return self.spec.method.bodies

    @property
    def asks_features(self) -> bool:
        """Whether visitors are asked for sums of features; a meeting brings none."""
        return self.spec.head.mode is not HeadMode.MERGED and self.spec.calibration.mode is CalibrationMode.VISIT

    @property
    def singles(self) -> tuple[str, ...]:
        """The hospitals' own models that are evaluated beside the candidates."""
        shown = self.spec.evaluation is not None and self.spec.evaluation.singles
        return tuple(f"{SINGLE}{hospital}" for hospital in self.hospitals) if shown else ()

    @property
    def vectors(self) -> frozenset[str]:
        return frozenset(entry.data_vector for entry in self.spec.inputs)

    def with_phase(self, phase: Phase, *, now: datetime, message: str = "", **changes: Any) -> ModelVersion:
        """This version in another phase, with the conditions of that phase."""
        changes = {"phase": phase, "message": message, "attempts": 0, "retry_at": None, **changes}
        return self._with(_CONDITIONS[phase], phase.value, message, now, changes)

    def evaluated(self, report: EvaluationReport, *, now: datetime) -> ModelVersion:
        """This version with what its evaluation showed, as a condition, too."""
        status: ConditionStatus = "True" if report.validated else "False"
        reason = "Validated" if report.validated else "Unvalidated"
        return self._with({"Evaluated": status}, reason, report.reason, now, {"evaluation": report})

    def with_message(self, reason: str, message: str, *, now: datetime, **changes: Any) -> ModelVersion:
        """This version in the phase it is in, with a reason why it goes no further."""
        return self._with({"Ready": "False"}, reason, message, now, {"message": message, **changes})

    def _with(
        self, values: Mapping[str, ConditionStatus], reason: str, message: str, now: datetime, changes: dict[str, Any]
    ) -> ModelVersion:
        conditions = self.status.conditions
        for kind, value in values.items():
            conditions = with_condition(conditions, kind, value, reason, message, self.metadata.generation, now)
        status = self.status.model_copy(update={**changes, "conditions": conditions})
        return self.model_copy(update={"status": status})


JOB_FAILED = "JobFailed"

_CONDITIONS: dict[Phase, dict[str, ConditionStatus]] = {
    Phase.PENDING: {"Merged": "False", "Calibrated": "False", "Exported": "False", "Ready": "False"},
    Phase.MEASURING: {"Merged": "False", "Ready": "False"},
    Phase.CALIBRATING: {"Merged": "True", "Ready": "False"},
    Phase.RESTORING: {"Merged": "True", "Calibrated": "True", "Ready": "False"},
    Phase.EVALUATING: {"Merged": "True", "Calibrated": "True", "Evaluated": "False", "Ready": "False"},
    Phase.RELEASING: {"Merged": "True", "Calibrated": "True", "Ready": "False"},
    Phase.REJECTED: {"Evaluated": "True", "Ready": "False"},
    Phase.READY: {"Exported": "True", "Ready": "True"},
    Phase.SUPERSEDED: {"Ready": "False"},
    Phase.FAILED: {"Ready": "False"},
    Phase.REVOKED: {"Revoked": "True", "Ready": "False"},
}


KINDS: tuple[type[Resource], ...] = (BaseModelResource, DataVector, MergePolicy, ModelVersion)


def utc_now() -> datetime:
    return datetime.now(UTC)
