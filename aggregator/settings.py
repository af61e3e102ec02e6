"""What an aggregation site sets: aggregator.toml, DATAVECTOR_AGGREGATOR_* environment variables, flags."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from datavector.config import Section

PREFIX = "DATAVECTOR_AGGREGATOR_"


class Tls(Section):
    """Mutual TLS: the aggregator's certificate and key, and the authority that signed the hospitals'.

    Attributes:
        trust_domain: hospitals' certificates must name it: spiffe://<trust_domain>/hospital/<name>.
        deny_list: file of hospital names or SHA-256 certificate fingerprints, one a line, re-read when it changes.
    """

    certificate: Path
    key: Path
    ca: Path
    trust_domain: str = "datavector.local"
    deny_list: Path | None = None


class Limits(Section):
    """What one hospital may use, and how long a silent connection is kept."""

    vectors_per_hospital: int = Field(default=16, ge=1)
    uploads_per_hospital: int = Field(default=2, ge=1)
    idle_timeout_seconds: float = Field(default=30, gt=0)
    max_connection_age_seconds: float = Field(default=600, gt=0)
    poll_seconds: int = Field(default=15, ge=1)


class AggregatorSettings(Section):
    """Everything the embedded aggregator needs to know.

    Attributes:
        store: folder of base models, vectors, versions, releases and the registry.
        policy: YAML file with MergePolicy documents.
        base: base model artifact to import into the store at start.
        listen: address:port of the exchange service; port 0 takes a free one.
        metrics_port: of Prometheus metrics; 0 serves none.
    """

    store: Path
    policy: Path
    tls: Tls
    base: Path | None = None
    listen: str = "0.0.0.0:8443"
    limits: Limits = Limits()
    metrics_port: int = Field(default=0, ge=0, le=65535)
