"""Everything that can go wrong for a user, as one tree.

DataVectorError                     exit code 1
├── UsageError                      exit code 2: used wrongly, nothing was started
│   └── ConfigError
├── DataError                       a hospital's images
│   ├── NoImages, OneClassOnly, UnknownClass, UnreadableData, CorruptImages
├── ArtifactError                   a file is not what its digest or format says
│   ├── BaseModelError, WrongDigest, WrongLayout, NotFinite, ReleaseError
├── CertificateError                expired, foreign or unreadable
├── Refused                         the aggregator said no; the same call will be refused again
│   ├── WrongHospital, Denied, QuotaExceeded, AlreadyWithdrawn, ProtocolError, NotReady, NotFound
├── Unreachable                     no aggregator at that address now; worth trying again
├── TryAgain                        given up for a reason that passes
├── InternalError                   the aggregator failed for a reason of its own
├── DiskFull                        nothing half-stored stays
├── StoreMissing                    the aggregator's store is not where it was
├── TrainingFailed                  one of several training processes ended
├── SiteFailed                      one of the demo's processes ended
├── MergeError
├── ClusterError                    the Kubernetes API did not do what was asked
│   ├── ApiUnavailable, ApiConflict, ApiForbidden, ApiRejected, ObjectMissing, CrdOutdated
└── Interrupted                     stopped by a signal; starting again goes on from where it was

Every error says what is wrong and where (the message) and what to do next (the remedy). `status` is the gRPC
status code (by name, so that nothing here imports grpc) that carries the error over the wire.
"""

from __future__ import annotations

from pathlib import Path


class DataVectorError(Exception):
    """An error for the person who runs DataVector: no traceback is shown for it."""

    exit_code = 1
    status = "INTERNAL"

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}"


class UsageError(DataVectorError):
    """A command or a setting that cannot be carried out as given."""

    exit_code = 2
    status = "INVALID_ARGUMENT"


class ConfigError(UsageError):
    """A configuration file, environment variable or flag that is unknown or has a wrong value."""


class DataError(DataVectorError):
    """A hospital's images cannot be used as they are."""


class NoImages(DataError):
    """A data folder or manifest holds no image."""


class OneClassOnly(DataError):
    """Every image has the same label, so there is nothing to learn."""


class UnknownClass(DataError):
    """A label that the base model does not have."""


class UnreadableData(DataError):
    """A data folder or manifest cannot be opened or parsed."""


class CorruptImages(DataError):
    """More images than the allowed share cannot be decoded."""


class ArtifactError(DataVectorError):
    """A file is not what its digest or its format says."""

    status = "INVALID_ARGUMENT"


class BaseModelError(ArtifactError):
    """A base model that is unknown, incomplete or altered."""


class WrongDigest(ArtifactError):
    """The bytes at hand are not the bytes that were announced."""


class WrongLayout(ArtifactError):
    """A vector whose header is not the one that its base model determines."""


class NotFinite(ArtifactError):
    """A vector that contains NaN or an infinity."""


class ReleaseError(ArtifactError):
    """A release that cannot be made, or does not verify."""


class CertificateError(DataVectorError):
    """A certificate or key that is missing, unreadable, expired or of another authority."""

    status = "UNAUTHENTICATED"


class Refused(DataVectorError):
    """The aggregator refuses a call, and would refuse it again."""

    status = "FAILED_PRECONDITION"


class WrongHospital(Refused):
    """A certificate acted for a hospital that it does not name."""

    status = "PERMISSION_DENIED"

    def __init__(self, *, certificate: str, claimed: str) -> None:
        super().__init__(
            f"this certificate speaks for {certificate!r}, but the call is for {claimed!r}",
            remedy=f"use the certificate of {claimed!r}, or set hospital = {certificate!r}",
        )


class Denied(Refused):
    """A hospital or certificate that is on the deny list."""

    status = "PERMISSION_DENIED"


class QuotaExceeded(Refused):
    """A hospital has as many vectors or open uploads as it may have."""

    status = "RESOURCE_EXHAUSTED"


class AlreadyWithdrawn(Refused):
    """A vector that was taken back cannot be sent again: consent goes one way."""


class ProtocolError(Refused):
    """A message that does not belong where it came."""

    status = "INVALID_ARGUMENT"


class NotReady(Refused):
    """There is no Ready version (yet, or no more)."""


class NotFound(Refused):
    """The aggregator has nothing of that name."""

    status = "NOT_FOUND"


class Unreachable(DataVectorError):
    """No aggregator answers at the configured address; trying again may help.

    Attributes:
        reason: the network's, if it gave one.
    """

    status = "UNAVAILABLE"

    def __init__(self, message: str, *, remedy: str, reason: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.reason = reason


class TryAgain(DataVectorError):
    """Given up for a reason that passes: a stalled stream, a meeting without quorum, an agent that is still ending."""

    status = "ABORTED"


class InternalError(DataVectorError):
    """The aggregator failed on a call for a reason of its own, which only its log tells."""


class DiskFull(DataVectorError):
    """No space is left where something had to be written; what was half-written is gone."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, path: Path, *, needed: int | None = None) -> None:
        what = f" for {needed / 2**20:.0f} MiB" if needed else ""
        super().__init__(f"no space left{what} on the disk of {path}", remedy="free space there, then run it again")


class StoreMissing(DataVectorError):
    """The folder of the aggregator's store is not there, or is another: nothing is concluded from what it lacks."""

    status = "UNAVAILABLE"

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"the store {path} is not there, or has lost its mark",
            remedy="mount the store's volume again; all goes on by itself then",
        )


class TrainingFailed(DataVectorError):
    """A training process ended for a reason of its own."""


class SiteFailed(DataVectorError):
    """A process of the demo ended with an error; its log has the cause."""


class MergeError(DataVectorError):
    """Vectors that cannot be merged together."""


class Interrupted(DataVectorError):
    """Stopped by a signal before its end; the next start goes on from there."""


def recreate(name: str, message: str, remedy: str) -> DataVectorError:
    """An error that another process told of, by the name of its class; that class's own arguments are not needed."""
    kind: type[DataVectorError] = globals()[name]
    error = kind.__new__(kind)
    DataVectorError.__init__(error, message, remedy=remedy)
    return error


class ClusterError(DataVectorError):
    """The Kubernetes API did not do what was asked of it."""

    status = "UNAVAILABLE"


class ApiUnavailable(ClusterError):
    """The API server does not answer, or cannot serve now; worth trying again."""

    def __init__(self, server: str, reason: str) -> None:
        super().__init__(
            f"the Kubernetes API at {server} is not available ({reason})", remedy="this is tried again until it is"
        )


class ApiConflict(ClusterError):
    """An object has changed since it was read, or there is already one of that name; read it and try again."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what} has changed meanwhile ({reason})", remedy="read it and try again")


class ApiForbidden(ClusterError):
    """The service account may not do that."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(
            f"not allowed to {what} ({reason})",
            remedy="give the service account the Role of charts/aggregator: run helm upgrade with that of this version",
        )


class ApiRejected(ClusterError):
    """The API server refuses an object's content."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(
            f"the API server refuses {what} ({reason})",
            remedy="if it does not know a field, run helm upgrade with charts/crds of this version",
        )


class ObjectMissing(ClusterError):
    """An object, or a whole kind of objects, is not there."""

    def __init__(self, kind: str, name: str, reason: str) -> None:
        super().__init__(
            f"{kind} {name} is not there ({reason})".replace("  ", " "),
            remedy="if the kind is unknown, run helm install with charts/crds; an object may have been deleted by hand",
        )


class CrdOutdated(ClusterError):
    """The cluster's custom resource definitions lack what this version writes."""

    def __init__(self, missing: str) -> None:
        super().__init__(
            f"the cluster's CustomResourceDefinitions are older than this program: they lack {missing}",
            remedy="run helm upgrade with charts/crds of this version (or kubectl apply --server-side -f "
            "charts/crds/templates); the operator then goes on",
        )
