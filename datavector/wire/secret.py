"""A certificate as a Kubernetes Secret, of the form that cert-manager writes too."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import Any

import yaml

from datavector.errors import UsageError, WrongHospital
from datavector.wire.certs import AGGREGATOR, read_credentials


def tls_secret(authority: Path, hospital: str | None, *, name: str | None = None, namespace: str | None = None) -> str:
    """The certificate that `datavector certs` wrote for a hospital, or for the aggregator where that is None.

    Args:
        authority: folder of the authority.
        name: of the Secret; `<hospital>-tls` or `aggregator-tls` where absent.
        namespace: that the Secret names; none where absent.
    Returns:
        A Secret of the type kubernetes.io/tls with ca.crt, tls.crt and tls.key, as YAML. It holds the private key.

    Raises:
        UsageError: there is no such certificate.
        CertificateError, WrongHospital: it cannot be used.
    """
    stem = hospital or AGGREGATOR
    certificate, key, ca = authority / f"{stem}.crt", authority / f"{stem}.key", authority / "ca.crt"
    if absent := next((path for path in (ca, certificate, key) if not path.is_file()), None):
        if absent == ca or (hospital is None and not certificate.exists()):
            command = f"init --output {authority} --server-name HOST"
        else:
            command = f"issue --authority {authority} " + (f"--hospital {hospital}" if hospital else "--aggregator")
        raise UsageError(f"{absent} is not there", remedy=f"make it first: datavector certs {command}")
    credentials = read_credentials(certificate, key, ca)
    if credentials.report.hospital != hospital:
        raise WrongHospital(certificate=credentials.report.hospital or "the aggregator", claimed=stem)
    metadata = {"name": name or f"{stem}-tls"} | ({"namespace": namespace} if namespace else {})
    content: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": metadata,
        "data": {
            "ca.crt": b64encode(credentials.ca).decode(),
            "tls.crt": b64encode(credentials.certificate).decode(),
            "tls.key": b64encode(credentials.key).decode(),
        },
    }
    text: str = yaml.safe_dump(content, sort_keys=False, width=float("inf"))
    return text
