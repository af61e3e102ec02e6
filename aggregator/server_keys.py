"""The receiver's certificate, its key, and the authorities of hospitals; renewed files count for new connections."""

from __future__ import annotations

import asyncio
import logging

import grpc

from aggregator.settings import Tls
from datavector.errors import CertificateError
from datavector.wire.certs import CertificateReport, Credentials
from datavector.wire.renewal import Renewable

log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0  # between looks at the files while nobody connects
WARN_DAYS = 14


class ServerKeys:
    """
    Raises:
        CertificateError: a file cannot be used, or the certificate is not the aggregator's of the trust domain.
    """

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._files = Renewable(tls.certificate, tls.key, tls.ca, self._demand_own)
        self._served = self._files.current

    def expiry(self) -> float:
        """When the certificate in use expires, in Unix time."""
        return self._files.current.report.not_after.timestamp()

    @property
    def _end(self) -> str:
        return f"{self._files.current.report.not_after:%Y-%m-%d %H:%M}Z"

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC, which asks before each handshake whether there are newer ones."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._served), self._newer, require_client_authentication=True
        )

    async def watch(self) -> None:
        """Keeps looking at the files, and says once a day that the certificate expires soon."""
        warned = None
        while True:
            self._renew()
            days = self._files.current.report.days_left()
            if days < WARN_DAYS and days != warned:
                log.warning(
                    "%s expires on %s; renew it: new files are taken without a restart",
                    self._tls.certificate,
                    self._end,
                )
                warned = days
            await asyncio.sleep(LOOK_SECONDS)

    def _newer(self) -> grpc.ServerCertificateConfiguration | None:
        """Called in gRPC's own threads, one at a time."""
        self._renew()
        if (current := self._files.current) is self._served:
            return None
        self._served = current
        return _configuration(current)

    def _renew(self) -> None:
        if self._files.renew():
            log.info("renewed certificate files are in use; the certificate is valid until %s", self._end)

    def _demand_own(self, report: CertificateReport) -> None:
        certificate, trust_domain = self._tls.certificate, self._tls.trust_domain
        if report.hospital is not None:
            raise CertificateError(
                f"{certificate} is the certificate of hospital {report.hospital!r}",
                remedy="use the one for the aggregator that `datavector certs init` makes",
            )
        if report.identity.trust_domain != trust_domain:
            raise CertificateError(
                f"{certificate} is of the trust domain {report.identity.trust_domain!r}, "
                f"tls.trust_domain is {trust_domain!r}",
                remedy="set tls.trust_domain to the certificates' (--trust-domain)",
            )


def _configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
    pair = (credentials.key, credentials.certificate)
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=credentials.ca)
