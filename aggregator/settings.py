"""What an aggregation site sets: aggregator.toml, DATAVECTOR_AGGREGATOR_* environment variables, flags.

The receiver of a cluster has settings of its own: receiver.toml, DATAVECTOR_RECEIVER_*.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from datavector.config import Section
from datavector.wire.certs import TRUST_DOMAIN

PREFIX = "DATAVECTOR_AGGREGATOR_"
RECEIVER_PREFIX = "DATAVECTOR_RECEIVER_"


class Tls(Section):
    """Mutual TLS: the aggregator's certificate and key, and the authority that signed the hospitals'.

    Attributes:
        trust_domain: hospitals' certificates must name it: spiffe://<trust_domain>/hospital/<name>.
        deny_list: file of hospital names or SHA-256 certificate fingerprints, one a line, re-read when it changes.
    """

    certificate: Path
    key: Path
    ca: Path
    trust_domain: str = TRUST_DOMAIN
    deny_list: Path | None = None


class Limits(Section):
    """What hospitals may use, and how long they are waited for.

    Attributes:
        vectors_per_hospital: kept at once.
        uploads_per_hospital: open at once.
        calls_per_hospital: running at once.
        calls: running at once, of all hospitals together.
        idle_timeout_seconds: how long a stream may be silent, or not take what it asked for.
        max_connection_age_seconds: after that a connection takes no new calls, so that a rotated or withdrawn
            certificate is noticed; running calls have as long again.
        poll_seconds: how often agents are told to ask for tasks.
        meeting_grace_seconds: how long a meeting with a full quorum waits for the rest.
    """

    vectors_per_hospital: int = Field(default=16, ge=1)
    uploads_per_hospital: int = Field(default=2, ge=1)
    calls_per_hospital: int = Field(default=16, ge=1)
    calls: int = Field(default=256, ge=1)
    idle_timeout_seconds: float = Field(default=30, gt=0)
    max_connection_age_seconds: float = Field(default=600, gt=0)
    poll_seconds: float = Field(default=15, gt=0)
    meeting_grace_seconds: float = Field(default=3, ge=0)


class ReceiverSettings(Section):
    """What a receiver needs to know.

    Attributes:
        listen: address:port of the exchange service; port 0 takes a free one.
    """

    tls: Tls
    listen: str = "0.0.0.0:8443"
    limits: Limits = Limits()


OPERATOR_PREFIX = "DATAVECTOR_OPERATOR_"


class OperatorSettings(Section):
    """Everything the operator needs to know; environment variables DATAVECTOR_OPERATOR_* set it.

    Attributes:
        store: folder of base models, vectors, versions and releases, shared with the receiver and the Jobs.
        store_claim: the PersistentVolumeClaim that Jobs mount as that folder.
        job_image: image of Jobs whose policy names none.
        job_service_account: of Jobs' Pods, which get no token of it.
        namespace: that it looks after; its own where absent.
        metrics_port: of Prometheus metrics; 0 serves none.
        poll_seconds: how often hospitals' visits are looked for in the store.
        grace_seconds: after which files that no object names are erased.
    """

    store: Path
    store_claim: str
    job_image: str
    job_service_account: str = "default"
    namespace: str | None = None
    metrics_port: int = Field(default=0, ge=0, le=65535)
    poll_seconds: float = Field(default=5, gt=0)
    grace_seconds: float = Field(default=86400, ge=0)


class AggregatorSettings(ReceiverSettings):
    """Everything the embedded aggregator needs to know.

    Attributes:
        store: folder of base models, vectors, versions, releases and the registry.
        policy: YAML file with MergePolicy documents.
        base: base model artifact to import into the store at start.
        metrics_port: of Prometheus metrics; 0 serves none.
    """

    store: Path
    policy: Path
    base: Path | None = None
    metrics_port: int = Field(default=0, ge=0, le=65535)


class ClusterReceiverSettings(ReceiverSettings):
    """Everything the receiver needs to know where it is a process of its own in a cluster.

    Attributes:
        store: folder that it shares with the operator and the jobs.
        namespace: of the objects; its own, or that of the kubeconfig's default, where absent.
        deny_list_config_map: a ConfigMap of the namespace, whose key `denied` holds a deny list, beside tls.deny_list.
        metrics_port: of Prometheus metrics; 0 serves none.
    """

    store: Path
    namespace: str | None = None
    deny_list_config_map: str | None = None
    metrics_port: int = Field(default=0, ge=0, le=65535)
