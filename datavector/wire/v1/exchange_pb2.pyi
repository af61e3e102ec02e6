from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TaskKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_KIND_UNSPECIFIED: _ClassVar[TaskKind]
    TASK_KIND_RECALIBRATE_VISIT: _ClassVar[TaskKind]
    TASK_KIND_RECALIBRATE_MEETING: _ClassVar[TaskKind]
    TASK_KIND_EVALUATE: _ClassVar[TaskKind]
    TASK_KIND_STATISTICS: _ClassVar[TaskKind]
TASK_KIND_UNSPECIFIED: TaskKind
TASK_KIND_RECALIBRATE_VISIT: TaskKind
TASK_KIND_RECALIBRATE_MEETING: TaskKind
TASK_KIND_EVALUATE: TaskKind
TASK_KIND_STATISTICS: TaskKind

class FileInfo(_message.Message):
    __slots__ = ("name", "size", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("hospital", "policies")
    HOSPITAL_FIELD_NUMBER: _ClassVar[int]
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    hospital: str
    policies: _containers.RepeatedCompositeFieldContainer[PolicyInfo]
    def __init__(self, hospital: _Optional[str] = ..., policies: _Optional[_Iterable[_Union[PolicyInfo, _Mapping]]] = ...) -> None: ...

class PolicyInfo(_message.Message):
    __slots__ = ("name", "base_digest", "base_files", "waiting_for", "ready_version", "last_sequence")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_FILES_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    READY_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    base_digest: str
    base_files: _containers.RepeatedCompositeFieldContainer[FileInfo]
    waiting_for: str
    ready_version: str
    last_sequence: int
    def __init__(self, name: _Optional[str] = ..., base_digest: _Optional[str] = ..., base_files: _Optional[_Iterable[_Union[FileInfo, _Mapping]]] = ..., waiting_for: _Optional[str] = ..., ready_version: _Optional[str] = ..., last_sequence: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("base_digest", "task_id", "release", "file", "offset")
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    base_digest: str
    task_id: str
    release: str
    file: str
    offset: int
    def __init__(self, base_digest: _Optional[str] = ..., task_id: _Optional[str] = ..., release: _Optional[str] = ..., file: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class VectorInfo(_message.Message):
    __slots__ = ("base_digest", "sha256", "size", "sequence", "sample_count")
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    base_digest: str
    sha256: str
    size: int
    sequence: int
    sample_count: int
    def __init__(self, base_digest: _Optional[str] = ..., sha256: _Optional[str] = ..., size: _Optional[int] = ..., sequence: _Optional[int] = ..., sample_count: _Optional[int] = ...) -> None: ...

class BeginUploadReply(_message.Message):
    __slots__ = ("offset", "committed", "vector")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    offset: int
    committed: bool
    vector: str
    def __init__(self, offset: _Optional[int] = ..., committed: bool = ..., vector: _Optional[str] = ...) -> None: ...

class UploadRequest(_message.Message):
    __slots__ = ("open", "chunk", "final")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    open: UploadOpen
    chunk: bytes
    final: UploadFinal
    def __init__(self, open: _Optional[_Union[UploadOpen, _Mapping]] = ..., chunk: _Optional[bytes] = ..., final: _Optional[_Union[UploadFinal, _Mapping]] = ...) -> None: ...

class UploadOpen(_message.Message):
    __slots__ = ("vector", "offset", "statistics")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_FIELD_NUMBER: _ClassVar[int]
    vector: VectorInfo
    offset: int
    statistics: StatisticsInfo
    def __init__(self, vector: _Optional[_Union[VectorInfo, _Mapping]] = ..., offset: _Optional[int] = ..., statistics: _Optional[_Union[StatisticsInfo, _Mapping]] = ...) -> None: ...

class UploadFinal(_message.Message):
    __slots__ = ("size", "sha256")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    size: int
    sha256: str
    def __init__(self, size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class UploadReply(_message.Message):
    __slots__ = ("vector",)
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    vector: str
    def __init__(self, vector: _Optional[str] = ...) -> None: ...

class WithdrawRequest(_message.Message):
    __slots__ = ("base_digest", "reason")
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    base_digest: str
    reason: str
    def __init__(self, base_digest: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class WithdrawReply(_message.Message):
    __slots__ = ("vectors", "revoked_versions")
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    REVOKED_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    vectors: _containers.RepeatedScalarFieldContainer[str]
    revoked_versions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, vectors: _Optional[_Iterable[str]] = ..., revoked_versions: _Optional[_Iterable[str]] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("id", "kind", "version", "base_digest", "weights", "round", "class_floor", "statistics", "vector_sha256")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLASS_FLOOR_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_FIELD_NUMBER: _ClassVar[int]
    VECTOR_SHA256_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: TaskKind
    version: str
    base_digest: str
    weights: _containers.RepeatedCompositeFieldContainer[FileInfo]
    round: int
    class_floor: int
    statistics: str
    vector_sha256: str
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[_Union[TaskKind, str]] = ..., version: _Optional[str] = ..., base_digest: _Optional[str] = ..., weights: _Optional[_Iterable[_Union[FileInfo, _Mapping]]] = ..., round: _Optional[int] = ..., class_floor: _Optional[int] = ..., statistics: _Optional[str] = ..., vector_sha256: _Optional[str] = ...) -> None: ...

class ListTasksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTasksReply(_message.Message):
    __slots__ = ("tasks", "poll_seconds")
    TASKS_FIELD_NUMBER: _ClassVar[int]
    POLL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    tasks: _containers.RepeatedCompositeFieldContainer[Task]
    poll_seconds: int
    def __init__(self, tasks: _Optional[_Iterable[_Union[Task, _Mapping]]] = ..., poll_seconds: _Optional[int] = ...) -> None: ...

class LayerMoments(_message.Message):
    __slots__ = ("layer", "count", "mean", "variance")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    VARIANCE_FIELD_NUMBER: _ClassVar[int]
    layer: str
    count: int
    mean: _containers.RepeatedScalarFieldContainer[float]
    variance: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, layer: _Optional[str] = ..., count: _Optional[int] = ..., mean: _Optional[_Iterable[float]] = ..., variance: _Optional[_Iterable[float]] = ...) -> None: ...

class BeginVisitRequest(_message.Message):
    __slots__ = ("task_id",)
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    def __init__(self, task_id: _Optional[str] = ...) -> None: ...

class VisitRequest(_message.Message):
    __slots__ = ("open", "layer", "final", "features")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    open: VisitOpen
    layer: LayerMoments
    final: VisitFinal
    features: FeatureRows
    def __init__(self, open: _Optional[_Union[VisitOpen, _Mapping]] = ..., layer: _Optional[_Union[LayerMoments, _Mapping]] = ..., final: _Optional[_Union[VisitFinal, _Mapping]] = ..., features: _Optional[_Union[FeatureRows, _Mapping]] = ...) -> None: ...

class FeatureRows(_message.Message):
    __slots__ = ("merge", "first", "rows", "counts")
    MERGE_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    merge: str
    first: int
    rows: bytes
    counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, merge: _Optional[str] = ..., first: _Optional[int] = ..., rows: _Optional[bytes] = ..., counts: _Optional[_Iterable[int]] = ...) -> None: ...

class VisitOpen(_message.Message):
    __slots__ = ("task_id",)
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    def __init__(self, task_id: _Optional[str] = ...) -> None: ...

class VisitFinal(_message.Message):
    __slots__ = ("images", "layers")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    images: int
    layers: int
    def __init__(self, images: _Optional[int] = ..., layers: _Optional[int] = ...) -> None: ...

class VisitReply(_message.Message):
    __slots__ = ("waiting_for",)
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    waiting_for: str
    def __init__(self, waiting_for: _Optional[str] = ...) -> None: ...

class StatisticsInfo(_message.Message):
    __slots__ = ("task_id", "sha256", "size")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    sha256: str
    size: int
    def __init__(self, task_id: _Optional[str] = ..., sha256: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class EvaluateRequest(_message.Message):
    __slots__ = ("task_id", "models")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    models: _containers.RepeatedCompositeFieldContainer[ModelCounts]
    def __init__(self, task_id: _Optional[str] = ..., models: _Optional[_Iterable[_Union[ModelCounts, _Mapping]]] = ...) -> None: ...

class ModelCounts(_message.Message):
    __slots__ = ("name", "labels", "predictions", "images", "bin_images", "bin_recognised", "bin_confidence")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    BIN_IMAGES_FIELD_NUMBER: _ClassVar[int]
    BIN_RECOGNISED_FIELD_NUMBER: _ClassVar[int]
    BIN_CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    labels: _containers.RepeatedScalarFieldContainer[int]
    predictions: _containers.RepeatedScalarFieldContainer[int]
    images: _containers.RepeatedScalarFieldContainer[int]
    bin_images: _containers.RepeatedScalarFieldContainer[int]
    bin_recognised: _containers.RepeatedScalarFieldContainer[int]
    bin_confidence: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., labels: _Optional[_Iterable[int]] = ..., predictions: _Optional[_Iterable[int]] = ..., images: _Optional[_Iterable[int]] = ..., bin_images: _Optional[_Iterable[int]] = ..., bin_recognised: _Optional[_Iterable[int]] = ..., bin_confidence: _Optional[_Iterable[float]] = ...) -> None: ...

class EvaluateReply(_message.Message):
    __slots__ = ("waiting_for",)
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    waiting_for: str
    def __init__(self, waiting_for: _Optional[str] = ...) -> None: ...

class MeetRequest(_message.Message):
    __slots__ = ("join", "layer")
    JOIN_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    join: MeetJoin
    layer: LayerMoments
    def __init__(self, join: _Optional[_Union[MeetJoin, _Mapping]] = ..., layer: _Optional[_Union[LayerMoments, _Mapping]] = ...) -> None: ...

class MeetJoin(_message.Message):
    __slots__ = ("task_id", "images", "wait_seconds")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    images: int
    wait_seconds: int
    def __init__(self, task_id: _Optional[str] = ..., images: _Optional[int] = ..., wait_seconds: _Optional[int] = ...) -> None: ...

class MeetReply(_message.Message):
    __slots__ = ("start", "pooled", "done")
    START_FIELD_NUMBER: _ClassVar[int]
    POOLED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    start: MeetStart
    pooled: LayerMoments
    done: MeetDone
    def __init__(self, start: _Optional[_Union[MeetStart, _Mapping]] = ..., pooled: _Optional[_Union[LayerMoments, _Mapping]] = ..., done: _Optional[_Union[MeetDone, _Mapping]] = ...) -> None: ...

class MeetStart(_message.Message):
    __slots__ = ("hospitals",)
    HOSPITALS_FIELD_NUMBER: _ClassVar[int]
    hospitals: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, hospitals: _Optional[_Iterable[str]] = ...) -> None: ...

class MeetDone(_message.Message):
    __slots__ = ("hospitals", "images")
    HOSPITALS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    hospitals: _containers.RepeatedScalarFieldContainer[str]
    images: int
    def __init__(self, hospitals: _Optional[_Iterable[str]] = ..., images: _Optional[int] = ...) -> None: ...

class DescribeReleaseRequest(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: str
    def __init__(self, policy: _Optional[str] = ...) -> None: ...

class DescribeReleaseReply(_message.Message):
    __slots__ = ("version", "files")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    version: str
    files: _containers.RepeatedCompositeFieldContainer[FileInfo]
    def __init__(self, version: _Optional[str] = ..., files: _Optional[_Iterable[_Union[FileInfo, _Mapping]]] = ...) -> None: ...
