"""Errors on the wire: a DataVectorError as gRPC status and trailing metadata, and back.

The status code and `details` (message and remedy) are for every client. Three trailers let DataVector's own agent
raise the same class with the same message and remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import grpc

from datavector import errors
from datavector.errors import CertificateError, DataVectorError, Denied, Refused, TryAgain, Unreachable, recreate

KIND, MESSAGE, REMEDY = "datavector-error", "datavector-message-bin", "datavector-remedy-bin"

_WITHOUT_TRAILERS: dict[grpc.StatusCode, type[DataVectorError]] = {
    grpc.StatusCode.UNAVAILABLE: Unreachable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unreachable,
    # The aggregator's own faults come with trailers: without them, these are a connection's or a proxy's.
    grpc.StatusCode.CANCELLED: Unreachable,
    grpc.StatusCode.UNKNOWN: Unreachable,
    grpc.StatusCode.INTERNAL: Unreachable,
    grpc.StatusCode.ABORTED: TryAgain,
    grpc.StatusCode.UNAUTHENTICATED: CertificateError,
    grpc.StatusCode.PERMISSION_DENIED: Denied,
}


def status_code(error: DataVectorError) -> grpc.StatusCode:
    return grpc.StatusCode[error.status]


def trailers(error: DataVectorError) -> tuple[tuple[str, str | bytes], ...]:
    """Trailing metadata that carries an error's class, message and remedy."""
    return (
        (KIND, type(error).__name__),
        (MESSAGE, error.message.encode()),
        (REMEDY, error.remedy.encode()),
    )


def read_error(
    code: grpc.StatusCode, details: str, metadata: Iterable[tuple[str, str | bytes]] | None
) -> DataVectorError:
    """The error that a failed call stands for; one without DataVector's trailers is judged by its status code."""
    found = dict(metadata or ())
    name, message, remedy = (_text(found.get(key, "")) for key in (KIND, MESSAGE, REMEDY))
    kind = _KINDS.get(name)
    if kind is None:
        kind = _WITHOUT_TRAILERS.get(code, Refused)
        message, remedy = f"the call ended with {code.name}: {details}", "see the aggregator's log"
    return recreate(kind.__name__, message, remedy)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _tree(kind: type[DataVectorError]) -> Iterator[type[DataVectorError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)


_KINDS = {kind.__name__: kind for kind in _tree(DataVectorError) if kind.__module__ == errors.__name__}
