"""The agent's side of the exchange: every call to the aggregator, over mutual TLS, patient while it cannot be reached.

Everything that leaves the building goes through this module: no vector, moment or withdrawal before the server has
shown that it is the aggregator and the ledger has its line.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from agent.ledger import WITHDRAWAL, Ledger, Sending
from agent.proxy import dial, split_address
from datavector.choice import Counts
from datavector.errors import (
    CertificateError,
    DataVectorError,
    Interrupted,
    ProtocolError,
    TryAgain,
    Unreachable,
    WrongDigest,
    WrongHospital,
)
from datavector.files import disk_full_at, fsync, sha256_file
from datavector.merge.batchnorm import Moments
from datavector.merge.head import FeatureMoments
from datavector.wire.certs import CertificateReport, Identity
from datavector.wire.chunks import MAX_MESSAGE
from datavector.wire.counts import to_counts_message
from datavector.wire.features import to_rows
from datavector.wire.moments import from_message, to_message
from datavector.wire.renewal import Renewable
from datavector.wire.status import read_error
from datavector.wire.v1.exchange_pb2 import (
    BeginUploadReply,
    BeginVisitRequest,
    DescribeReleaseReply,
    DescribeReleaseRequest,
    DescribeReply,
    DescribeRequest,
    EvaluateReply,
    EvaluateRequest,
    FetchRequest,
    FileInfo,
    ListTasksReply,
    ListTasksRequest,
    MeetDone,
    MeetJoin,
    MeetReply,
    MeetRequest,
    StatisticsInfo,
    Task,
    UploadReply,
    VectorInfo,
    VisitFinal,
    VisitOpen,
    VisitReply,
    VisitRequest,
    WithdrawReply,
    WithdrawRequest,
)
from datavector.wire.v1.exchange_pb2_grpc import ExchangeStub

FIRST_DELAY, LONGEST_DELAY = 0.5, 2.5  # seconds between tries
CALL_SECONDS = 60.0
SLOWEST = 1 << 15  # bytes a second: of a link that is still worth waiting for
CONNECT_SECONDS = 5
HANG_UPS = 3  # in a row, each right after the handshake, that are a refusal: fewer are chance, a server that stops

Result = TypeVar("Result")
Progress = Callable[[int, int], None]
"""Takes bytes done and bytes in all."""

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", CONNECT_SECONDS * 1000),
    ("grpc.initial_reconnect_backoff_ms", int(FIRST_DELAY * 1000)),
    ("grpc.max_reconnect_backoff_ms", int(LONGEST_DELAY * 1000)),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]


@dataclass(frozen=True)
class Credentials:
    """Files of a hospital's mutual TLS."""

    certificate: Path
    key: Path
    ca: Path


class Client:
    """A hospital's connection to an aggregator. Calls are made from one thread; `interrupt` from any.

    The files of its certificate are looked at before every call, and renewed ones count at once. Those that cannot be
    used are logged, and those before them go on.

    Args:
        address: host:port.
        hospital: if given, the certificate must be this hospital's.
        ledger: where everything that leaves is recorded; without one, nothing can be sent.
        on_waiting: takes a sentence whenever the aggregator cannot be reached and a new try is due.
        patience_seconds: how long calls keep trying, from the last sign of life on; None for ever, 0 for a single try.
        proxy: the HTTP proxy through which the address is dialled, as `find_proxy` gives it; None for none, whatever
            the environment says.
        keepalive_seconds: a silent link is asked for a sign of life after that, and given up after half as long again;
            an upload that does not move at all is given up after three times that.

    Raises:
        CertificateError: a file is missing, unreadable, expired, or does not fit the others.
        WrongHospital: the certificate is another hospital's.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        *,
        hospital: str | None = None,
        ledger: Ledger | None = None,
        on_waiting: Callable[[str], None] | None = None,
        patience_seconds: float | None = None,
        proxy: str | None = None,
        keepalive_seconds: float = 10,
    ) -> None:
        self.address = address
        self.credentials = credentials
        self.ledger = ledger
        self._expected = hospital
        self._files = Renewable(credentials.certificate, credentials.key, credentials.ca, self._demand_own)
        self.hospital = self._expected = self.report.hospital or ""
        self._on_waiting = on_waiting or (lambda _: None)
        self._patience = patience_seconds
        self._proxy = proxy
        self._stall_seconds = 3 * keepalive_seconds
        self._options = [
            *_OPTIONS,
            ("grpc.http_proxy", proxy) if proxy else ("grpc.enable_http_proxy", 0),
            ("grpc.keepalive_time_ms", int(keepalive_seconds * 1000)),
            ("grpc.keepalive_timeout_ms", int(keepalive_seconds * 500)),
        ]
        self._channel: grpc.Channel | None = None
        self._active: set[Any] = set()
        self._stopping = threading.Event()
        self._answered = False
        self._server = ""

    @property
    def report(self) -> CertificateReport:
        """Of the certificate in use."""
        return self._files.current.report

    def expiry(self) -> float:
        """When that certificate expires, in Unix time."""
        return self.report.not_after.timestamp()

    # --- What agents ask

    def describe(self) -> DescribeReply:
        """Who the aggregator takes this hospital for, and which base models it merges."""
        return self.patiently(lambda: self.unary("Describe", DescribeRequest(), DescribeReply))

    def list_tasks(self) -> ListTasksReply:
        """What waits for this hospital, and when to ask again."""
        return self.patiently(lambda: self.unary("ListTasks", ListTasksRequest(), ListTasksReply))

    def describe_release(self, policy: str = "") -> DescribeReleaseReply:
        """The newest Ready release of a policy (of the only one where empty).

        Raises:
            NotReady: there is none.
        """
        return self.patiently(
            lambda: self.unary("DescribeRelease", DescribeReleaseRequest(policy=policy), DescribeReleaseReply)
        )

    def fetch(
        self,
        info: FileInfo,
        target: Path,
        *,
        base_digest: str | None = None,
        task_id: str | None = None,
        release: str | None = None,
        on_progress: Progress | None = None,
    ) -> Path:
        """Downloads one file of a base model, a task or a release; goes on where an earlier try ended.

        Raises:
            WrongDigest: what arrived is not what was announced; the next try starts from nothing.
            DiskFull: no space is left; what arrived is kept for the next try.
        """
        if target.is_file() and target.stat().st_size == info.size and sha256_file(target) == info.sha256:
            return target
        request = FetchRequest(base_digest=base_digest, task_id=task_id, release=release, file=info.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{info.sha256[:16]}.part")
        with disk_full_at(target, needed=info.size):
            self.patiently(lambda: self._fetch_rest(request, info, partial, on_progress))
        found = sha256_file(partial)
        if found != info.sha256:
            partial.unlink()
            raise WrongDigest(
                f"{info.name} arrived with SHA-256 {found}, announced was {info.sha256}",
                remedy="run it again; if it persists, the aggregator's copy is altered",
            )
        partial.replace(target)
        fsync(target.parent)
        return target

    def _fetch_rest(self, request: FetchRequest, info: FileInfo, partial: Path, on_progress: Progress | None) -> None:
        with partial.open("ab") as file:
            request.offset = file.tell()
            if request.offset < info.size:
                with self.streaming(self._stub().Fetch(request)) as call:
                    for chunk in call:
                        file.write(chunk.data)
                        self._answered = True
                        if on_progress:
                            on_progress(file.tell(), info.size)
            file.flush()
            os.fsync(file.fileno())

    # --- What leaves

    def withdraw(self, base_digest: str = "", *, reason: str = "") -> WithdrawReply:
        """Takes back this hospital's vectors of one base model, or of all. One way."""
        request = WithdrawRequest(base_digest=base_digest, reason=reason)
        content = request.SerializeToString()
        with self._sending(WITHDRAWAL, content=content, base=base_digest):
            return self.patiently(lambda: self.unary("Withdraw", request, WithdrawReply))

    def begin_visit(self, task: Task) -> dict[str, Moments]:
        """What other hospitals left for this task, pooled, by layer; empty for the first visitor."""

        def attempt() -> dict[str, Moments]:
            with self.streaming(self._stub().BeginVisit(BeginVisitRequest(task_id=task.id))) as call:
                return {message.layer: from_message(message) for message in call}

        return self.patiently(attempt)

    def complete_visit(
        self,
        task: Task,
        moments: Mapping[str, Moments],
        features: Mapping[str, FeatureMoments] | None = None,
        *,
        images: int,
    ) -> VisitReply:
        """Leaves this hospital's own moments, as a whole or not at all.

        Args:
            moments: by `<merge>/<layer>`.
            features: by merge.
        """
        parts = [VisitRequest(layer=to_message(layer, values)) for layer, values in moments.items()]
        for merge, sums in (features or {}).items():
            parts += [VisitRequest(features=rows) for rows in to_rows(merge, sums)]
        opening, final = VisitOpen(task_id=task.id), VisitFinal(images=images, layers=len(parts))
        messages = [VisitRequest(open=opening), *parts, VisitRequest(final=final)]
        content = b"".join(message.SerializeToString(deterministic=True) for message in messages)
        patience = CALL_SECONDS + len(content) / SLOWEST
        with self._sending("visit", content=content, base=task.base_digest, version=task.version) as sending:
            return self.patiently(
                lambda: self.result(self._stub().CompleteVisit.future(iter(messages), timeout=patience), VisitReply),
                sending,
            )

    def evaluate(self, task: Task, counts: Mapping[str, Counts]) -> EvaluateReply:
        """Tells what this hospital found for each model of the task."""
        models = [to_counts_message(name, each) for name, each in counts.items()]
        request = EvaluateRequest(task_id=task.id, models=models)
        content = request.SerializeToString(deterministic=True)
        with self._sending("evaluation", content=content, base=task.base_digest, version=task.version) as sending:
            return self.patiently(lambda: self.unary("Evaluate", request, EvaluateReply), sending)

    @contextmanager
    def meet(self, task: Task, *, images: int, wait_seconds: int = 0) -> Iterator[Meeting]:
        """Joins a meeting, waits until it starts, and ends it properly when the block ends.

        Args:
            wait_seconds: longest wait for the quorum; 0 for as long as the version wants its calibration.
        Raises:
            TryAgain: too few hospitals came in time or are left; join again.
            Unreachable: the connection broke; join again.
            NotFound: the meeting took place without this hospital.
        """
        with self._sending("meeting", base=task.base_digest, version=task.version) as sending:
            requests: SimpleQueue[MeetRequest | None] = SimpleQueue()
            call = self._stub().Meet(iter(requests.get, None))
            try:
                with self.streaming(call):
                    meeting = Meeting(call, requests, sending)
                    meeting.join(MeetJoin(task_id=task.id, images=images, wait_seconds=wait_seconds))
                    yield meeting
                    meeting.finish()
            finally:
                requests.put(None)

    def begin_upload(self, info: VectorInfo) -> BeginUploadReply:
        """The durable offset from which `send_upload` goes on. One try."""
        return self.unary("BeginUpload", info, BeginUploadReply)

    def begin_statistics(self, info: StatisticsInfo) -> BeginUploadReply:
        """The durable offset from which `send_statistics` goes on. One try."""
        return self.unary("BeginStatistics", info, BeginUploadReply)

    def send_upload(self, messages: Iterator[bytes]) -> UploadReply:
        """Sends serialised UploadRequests of a vector: open, chunk*, final. One try."""
        return self._send_file("Upload", messages)

    def send_statistics(self, messages: Iterator[bytes]) -> UploadReply:
        """Sends serialised UploadRequests of statistics: open, chunk*, final. One try."""
        return self._send_file("SendStatistics", messages)

    def _send_file(self, method: str, messages: Iterator[bytes]) -> UploadReply:
        """Sends a file as serialised UploadRequests. One try.

        gRPC's keepalive waits behind a write that does not end, so that a link which takes nothing more is noticed
        here: by messages that gRPC no longer asks for.
        """
        moved = time.monotonic()

        def noting() -> Iterator[bytes]:
            nonlocal moved
            for message in messages:
                moved = time.monotonic()
                yield message

        send = self._connected().stream_unary(
            f"/datavector.v1.Exchange/{method}", response_deserializer=UploadReply.FromString
        )
        with self.streaming(send.future(noting())) as call:
            while time.monotonic() - moved < self._stall_seconds:
                with suppress(grpc.FutureTimeoutError):
                    reply: UploadReply = call.result(timeout=self._stall_seconds / 10)
                    return reply
        raise self._unreachable("it takes no more bytes")

    def announcing(self, info: VectorInfo) -> AbstractContextManager[Sending]:
        """The ledger's lines around a vector's announcement, which tells its digest and the number of images."""
        return self._sending("announcement", content=info.SerializeToString(deterministic=True), base=info.base_digest)

    def sending_vector(self, info: VectorInfo) -> AbstractContextManager[Sending]:
        """The ledger's lines around an upload."""
        return self._sending("vector", bytes=info.size, sha256=info.sha256, base=info.base_digest)

    def sending_statistics(self, task: Task, info: StatisticsInfo) -> AbstractContextManager[Sending]:
        """The ledger's lines around statistics on their way."""
        return self._sending("statistics", bytes=info.size, sha256=info.sha256, base=task.base_digest)

    def _sending(
        self, what: str, *, content: bytes = b"", bytes: int = 0, sha256: str = "", base: str = "", version: str = ""
    ) -> AbstractContextManager[Sending]:
        if self.ledger is None:
            raise ProtocolError(f"no ledger is there to record the {what}", remedy="give the agent a state folder")
        if content:
            bytes, sha256 = len(content), hashlib.sha256(content).hexdigest()
        to = f"{self.address} ({self.server_identity()})"
        return self.ledger.sending(what, to=to, bytes=bytes, sha256=sha256, base=base, version=version)

    # --- One call

    def unary(self, method: str, request: Any, _reply: type[Result]) -> Result:
        """One try of a call with one request and one reply."""
        return self.result(getattr(self._stub(), method).future(request, timeout=CALL_SECONDS), _reply)

    def result(self, call: Any, _reply: type[Result]) -> Result:
        """The reply of a running call, or its error as one of ours."""
        with self.streaming(call):
            reply: Result = call.result()
        return reply

    @contextmanager
    def streaming(self, call: Any) -> Iterator[Any]:
        """Turns the errors of a running call into ours, lets `interrupt` end it, and cancels it when left early."""
        self._active.add(call)
        try:
            if self._stopping.is_set():
                raise Interrupted("stopped", remedy="start it again to go on")
            yield call
            self._answered = True
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            raise self._translate(call) from error
        finally:
            self._active.discard(call)
            call.cancel()

    def _translate(self, call: Any) -> DataVectorError:
        if self._stopping.is_set():
            return Interrupted("stopped", remedy="start it again to go on")
        details = call.details() or ""
        translated = read_error(call.code(), details, call.trailing_metadata())
        if not isinstance(translated, Unreachable):
            self._answered = True
            return translated
        return _handshake_refusal(self.address, details) or self._unreachable(_reason(details))

    def _unreachable(self, reason: str) -> Unreachable:
        return Unreachable(
            f"the aggregator at {self.address} is not reachable ({reason})",
            remedy="check the address, the network, and whether the aggregator runs",
            reason=reason,
        )

    def patiently(self, attempt: Callable[[], Result], sending: Sending | None = None) -> Result:
        """Tries until it works, with growing pauses, while the reason is one that passes.

        Args:
            sending: what leaves with a try, for which the hospital's consent is then asked before each.
        Raises:
            AlreadyWithdrawn: the hospital has withdrawn since `sending` began.
            Unreachable, TryAgain: patience is at its end.
            Interrupted: `interrupt` was called.
            DataVectorError: the aggregator refuses, or the certificates do not fit; these are not tried again.
        """
        began, since, delay = time.monotonic(), datetime.now(UTC), FIRST_DELAY
        while True:
            self._answered = False
            if sending is not None:
                sending.demand_consent()
            try:
                return attempt()
            except (Unreachable, TryAgain) as error:
                if self._answered:  # it worked in between: a new outage
                    since, delay = datetime.now(UTC), FIRST_DELAY
                    if isinstance(error, Unreachable):
                        began = time.monotonic()
                else:
                    with suppress(Unreachable):
                        self._handshake()  # raises what gRPC does not tell: that a certificate is refused
                if self._patience is not None and time.monotonic() - began + delay > self._patience:
                    raise
                pause = delay * random.uniform(0.75, 1)  # noqa: S311  many agents must not come back in step
                what, reason = error.message, ""
                if isinstance(error, Unreachable):
                    what, reason = "not reachable", f" ({error.reason})"
                self._on_waiting(f"{self.address}: {what} since {since:%H:%M:%S}Z{reason}; next try in {pause:.1f} s")
            self._disconnect()
            if self._stopping.wait(pause):
                raise Interrupted("stopped while waiting for the aggregator", remedy="start it again to go on")
            delay = min(2 * delay, LONGEST_DELAY)

    # --- The connection

    def server_identity(self) -> str:
        """The SPIFFE ID in the server's certificate, which must be that of this collaboration's aggregator.

        Raises:
            CertificateError: it is anyone else's.
        """
        self._renew()
        if not self._server:
            names = self.patiently(self._handshake)
            expected = Identity(self.report.identity.trust_domain, None).uri
            if expected not in names:
                raise _foreign_server(self.address, f"it names {', '.join(names) or 'nobody'}, not {expected}")
            self._server = expected
        return self._server

    def interrupt(self) -> None:
        """Ends the running call and every later one with Interrupted. For signal handlers."""
        self._stopping.set()
        for call in list(self._active):
            call.cancel()

    def close(self) -> None:
        self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stub(self) -> ExchangeStub:
        return ExchangeStub(self._connected())  # type: ignore[no-untyped-call]

    def _connected(self) -> grpc.Channel:
        self._renew()
        if self._channel is None:
            current = self._files.current
            credentials = grpc.ssl_channel_credentials(current.ca, current.key, current.certificate)
            self._channel = grpc.secure_channel(self.address, credentials, options=self._options)
        return self._channel

    def _renew(self) -> None:
        """Drops the channel where the files of mutual TLS were renewed; not under a call that is running."""
        if not self._active and self._files.renew():
            self._disconnect()
            self._server = ""

    def _demand_own(self, report: CertificateReport) -> None:
        demand_hospital(report, self._expected)

    def _disconnect(self) -> None:
        """Drops the channel: the next call dials at once, without the channel's own pause."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _handshake(self) -> list[str]:
        """Makes TLS handshakes apart from gRPC, which does not tell a refused certificate from an absent aggregator.

        Returns:
            The URIs that the aggregator's certificate names.

        Raises:
            CertificateError: either side refuses the other's certificate.
            Unreachable: nobody answers.
        """
        for hang_ups in range(HANG_UPS):
            if hang_ups and self._stopping.wait(FIRST_DELAY):
                raise Interrupted("stopped while waiting for the aggregator", remedy="start it again to go on")
            names = self._names_shown()
            if names is not None:
                return names
        raise _refused_client("closes the connection on seeing it")

    def _names_shown(self) -> list[str] | None:
        """What one handshake shows; None where the server hangs up right after it."""
        host, _ = split_address(self.address)
        try:
            with (
                dial(self.address, self._proxy, timeout=CONNECT_SECONDS) as plain,
                self._tls().wrap_socket(plain, server_hostname=host) as secure,
            ):
                if secure.version() is None:  # it was gone before the handshake, which Python then leaves out
                    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
                # In TLS 1.3 this side is done before the server has judged its certificate. A server that takes it
                # sends HTTP/2 settings; one built on BoringSSL closes without an alert if it does not.
                return _uris(secure.getpeercert() or {}) if secure.recv(1) else None
        except ssl.SSLCertVerificationError as error:
            raise _foreign_server(self.address, error.verify_message) from error
        except OSError as error:
            tls_reason = error.reason if isinstance(error, ssl.SSLError) else None
            if tls_reason and (refusal := _handshake_refusal(self.address, tls_reason)):
                raise refusal from error
            raise self._unreachable(tls_reason or error.strerror or str(error)) from error

    def _tls(self) -> ssl.SSLContext:
        """What gRPC demands, too."""
        context = ssl.create_default_context(cafile=str(self.credentials.ca))
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # Python's default since 3.13, which gRPC does not share
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.credentials.certificate, self.credentials.key)
        context.set_alpn_protocols(["h2"])
        return context


class Meeting:
    """A forward pass that this hospital makes together with others.

    Attributes:
        hospitals: who is there at the start.
        done: who was there until the last layer, and over how many images; set once the block of `meet` has ended.
    """

    def __init__(self, call: Any, requests: SimpleQueue[MeetRequest | None], sending: Sending) -> None:
        self._call = call
        self._requests = requests
        self._sending = sending
        self._digest = hashlib.sha256()
        self._bytes = 0
        self.hospitals: tuple[str, ...] = ()
        self.done: MeetDone | None = None

    def join(self, join: MeetJoin) -> None:
        self._send(MeetRequest(join=join))
        self.hospitals = tuple(self._receive("start").start.hospitals)

    def pool(self, layer: str, moments: Moments) -> Moments:
        """This hospital's moments of a layer's input go out, those of everybody present come back, pooled.

        Raises:
            TryAgain: too few hospitals are left; join again.
            AlreadyWithdrawn: the hospital has withdrawn meanwhile; nothing is sent.
        """
        self._send(MeetRequest(layer=to_message(layer, moments)))
        pooled = self._receive("pooled").pooled
        if pooled.layer != layer:
            raise ProtocolError(f"asked for {layer!r}, got {pooled.layer!r}", remedy="use a matching version")
        return from_message(pooled)

    def finish(self) -> None:
        self.done = self._receive("done").done

    def _send(self, message: MeetRequest) -> None:
        self._sending.demand_consent()
        content = message.SerializeToString(deterministic=True)
        self._digest.update(content)
        self._bytes += len(content)
        self._sending.measured(bytes=self._bytes, sha256=self._digest.hexdigest())
        self._requests.put(message)

    def _receive(self, part: str) -> MeetReply:
        reply: MeetReply | None = next(self._call, None)
        if reply is None or reply.WhichOneof("part") != part:
            raise ProtocolError(f"the meeting did not answer with {part!r}", remedy="use a matching version")
        return reply


def demand_hospital(report: CertificateReport, expected: str | None) -> None:
    """
    Raises:
        WrongHospital: the certificate is no hospital's, or not that of the expected one, if one is.
    """
    if report.hospital is None or expected not in (None, report.hospital):
        raise WrongHospital(certificate=report.hospital or "the aggregator", claimed=expected or "a hospital")


def inside(folder: Path, name: str) -> Path:
    """The path of a file that the aggregator names, in `folder`: what it says must not reach anything else here.

    Raises:
        ProtocolError: the name is absolute, leads upwards, or is not made of plain parts joined by "/".
    """
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name:
        raise ProtocolError(f"the aggregator names a file {name!r}", remedy="do not trust it: ask the aggregation site")
    return folder / name


_CLIENT_REFUSED = re.compile(r"ALERT_(UNKNOWN_CA|CERTIFICATE_\w+|BAD_CERTIFICATE|DECRYPT_ERROR|ACCESS_DENIED)", re.I)


def _handshake_refusal(address: str, details: str) -> CertificateError | None:
    """The certificate error that a TLS library's text stands for, if it is one."""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return _foreign_server(address, "certificate verify failed")
    if match := _CLIENT_REFUSED.search(details):
        return _refused_client(match[1].lower().replace("_", " "))
    return None


def _refused_client(reason: str) -> CertificateError:
    return CertificateError(
        f"the aggregator refuses this hospital's certificate ({reason})",
        remedy="use one that the aggregator's own authority issued, and ask the aggregation site whether it holds",
    )


def _foreign_server(address: str, reason: str) -> CertificateError:
    return CertificateError(
        f"the server at {address} shows a certificate that is not to be trusted ({reason})",
        remedy="check the address, and that tls.ca is the authority that signed the aggregator's certificate",
    )


def _uris(certificate: Mapping[str, Any]) -> list[str]:
    """The URIs that a certificate names, in the form of `ssl.SSLSocket.getpeercert`."""
    return [str(name) for kind, name in certificate.get("subjectAltName", ()) if kind == "URI"]


def _reason(details: str) -> str:
    """The last cause in gRPC's text, without the addresses that it tried."""
    return details.rpartition("last error: ")[2].rpartition(": ")[2].rstrip("]") or "no answer"
