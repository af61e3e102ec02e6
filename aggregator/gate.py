"""The gate that every call to the receiver passes: who calls, may they, and how errors leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc

from aggregator.deny_list import DenyFile, DenyList
from aggregator.metrics import Metrics
from aggregator.resources import utc_now
from aggregator.settings import Limits, Tls
from datavector.errors import (
    CertificateError,
    DataVectorError,
    Denied,
    DiskFull,
    InternalError,
    QuotaExceeded,
    TryAgain,
)
from datavector.wire.certs import CertificateReport, read_report
from datavector.wire.status import status_code, trailers

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between looks at whose running calls must end

Behaviour = Callable[[Any, "Call"], Awaitable[Any]]


class Call:
    """A call of a hospital that has passed the gate.

    Args:
        idle_timeout_seconds: how long the hospital may neither send nor take a message.
    """

    def __init__(self, hospital: str, context: grpc.aio.ServicerContext, idle_timeout_seconds: float) -> None:
        self.hospital = hospital
        self._context = context
        self._idle_timeout = idle_timeout_seconds

    async def read(self) -> Any:
        """The next message of the request stream, or None when the stream is closed.

        Raises:
            TryAgain: none came in time.
        """
        with self._impatience("nothing arrived"):
            async with asyncio.timeout(self._idle_timeout):
                message = await self._context.read()
        return None if message is grpc.aio.EOF else message

    async def write(self, message: Any) -> None:
        """
        Raises:
            TryAgain: nobody took the message in time.
        """
        with self._impatience("no answer was taken"):
            async with asyncio.timeout(self._idle_timeout):
                await self._context.write(message)

    @contextmanager
    def _impatience(self, what: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise TryAgain(
                f"{what} for {self._idle_timeout:g} seconds", remedy="what arrived is kept: run it again to go on"
            ) from None


class Gate:
    """Wraps behaviours `(request, call) -> reply` for gRPC.

    Every call must come over TLS 1.3, with a certificate of the trust domain that is valid now, names a hospital, and
    is on no deny list; a hospital has only so many calls at once. While `watch` runs, a call ends within seconds of its
    hospital's denial. Errors for people leave with message and remedy;
    any other is logged and leaves as INTERNAL without its text.
    """

    def __init__(self, tls: Tls, limits: Limits, metrics: Metrics, deny_lists: Iterable[DenyList] = ()) -> None:
        self._trust_domain = tls.trust_domain
        self._deny_lists = [*deny_lists, *([DenyFile(tls.deny_list)] if tls.deny_list else [])]
        self._ends: dict[asyncio.Timeout, CertificateReport] = {}  # of running calls
        self._limits = limits
        self._metrics = metrics
        self._running: Counter[str] = Counter()

    def __call__(self, method: str, behaviour: Behaviour) -> Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]:
        async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
            with self._metrics.running_calls.labels(method).track_inprogress():
                try:
                    peer, hospital = self._admit(context.auth_context())
                    with self._counted(hospital):
                        call = Call(hospital, context, self._limits.idle_timeout_seconds)
                        return await self._until_denied(peer, behaviour(request, call))
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    await self._refuse(method, error, context)

        return guarded

    async def watch(self) -> None:
        """Keeps ending the running calls of those who have been denied since they began."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            denied = {peer for peer in set(self._ends.values()) if self._is_denied(peer)}
            for end, peer in self._ends.items():
                if peer in denied:
                    with contextlib.suppress(RuntimeError):  # it is ending already
                        end.reschedule(0)

    async def _until_denied(self, peer: CertificateReport, behaviour: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(None) as end:
                self._ends[end] = peer
                try:
                    return await behaviour
                finally:
                    del self._ends[end]
        except TimeoutError:
            if end.expired():
                raise _denied(peer) from None
            raise

    def _is_denied(self, peer: CertificateReport) -> bool:
        try:
            return any(deny_list.names(peer) for deny_list in self._deny_lists)
        except Denied:
            return True

    def _admit(self, session: dict[str, list[bytes]]) -> tuple[CertificateReport, str]:
        """The certificate at the other end of a TLS session, and its hospital."""
        if session.get("ssl_tls_version") != [b"TLSv1.3"]:
            version = b"".join(session.get("ssl_tls_version", [b"an unknown version"])).decode()
            raise CertificateError(f"this connection uses {version}", remedy="connect with TLS 1.3")
        peer = _report(session["x509_pem_cert"][0])
        if peer.identity.trust_domain != self._trust_domain:
            raise CertificateError(
                f"this certificate is of the trust domain {peer.identity.trust_domain!r}, here is "
                f"{self._trust_domain!r}",
                remedy="use a certificate of this collaboration",
            )
        if utc_now() >= peer.not_after:
            raise CertificateError("this certificate has expired", remedy="ask the aggregation site for a new one")
        if peer.hospital is None:
            raise CertificateError("this certificate is the aggregator's own", remedy="use a hospital's certificate")
        if any(deny_list.names(peer) for deny_list in self._deny_lists):
            raise _denied(peer)
        return peer, peer.hospital

    @contextmanager
    def _counted(self, hospital: str) -> Iterator[str]:
        most = self._limits.calls_per_hospital
        if self._running[hospital] >= most:
            raise QuotaExceeded(f"{hospital!r} has {most} calls running", remedy="let one end first")
        self._running[hospital] += 1
        try:
            yield hospital
        finally:
            self._running[hospital] -= 1

    async def _refuse(self, method: str, error: Exception, context: grpc.aio.ServicerContext) -> None:
        outward = _outward(method, error)
        self._metrics.refused_calls.labels(type(outward).__name__).inc()
        await context.abort(status_code(outward), str(outward), trailers(outward))


def _denied(peer: CertificateReport) -> Denied:
    return Denied(f"{peer.hospital!r} or its certificate is on the deny list", remedy="ask the aggregation site")


def _outward(method: str, error: Exception) -> DataVectorError:
    """What the caller is told: nothing about this machine."""
    if isinstance(error, DiskFull):
        log.error("%s: %s", method, error)
        outward = DiskFull(Path())
        outward.args = ("the aggregator's disk is full; nothing of this call was kept",)
        outward.message, outward.remedy = outward.args[0], "tell the aggregation site, and run it again later"
        return outward
    if isinstance(error, DataVectorError) and not isinstance(error.__cause__, sqlite3.Error):
        log.info("%s refused: %s", method, error)
        return error
    log.error("%s failed", method, exc_info=error)
    kind = TryAgain if isinstance(error, TryAgain) else InternalError
    return kind("the aggregator failed on this call", remedy="tell the aggregation site; its log has the cause")


@lru_cache(maxsize=1024)
def _report(certificate: bytes) -> CertificateReport:
    return read_report(certificate)
