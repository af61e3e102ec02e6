"""What a hospital sets: agent.toml, DATAVECTOR_AGENT_* environment variables, flags. docs/agent.md lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from datavector.config import Section

PREFIX = "DATAVECTOR_AGENT_"

_LABEL = "[A-Za-z0-9_-]{1,63}"  # between the dots of a host's name
_PORT = "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"


class Tls(Section):
    """Mutual TLS: the hospital's certificate and key, and the authority that signed the aggregator's."""

    certificate: Path
    key: Path
    ca: Path


class Data(Section):
    """The hospital's images.

    Attributes:
        path: a folder in the ImageFolder layout, or a CSV manifest `file,label[,split][,group]`.
        validation: share of the training images kept for choosing the best epoch, where no split says so.
        max_corrupt: share of images that may be unreadable before the agent stops.
    """

    path: Path
    validation: float = Field(default=0.15, gt=0, lt=1)
    max_corrupt: float = Field(default=0.05, ge=0, le=1)


class Training(Section):
    """How the base model is fine-tuned; the defaults suit a few hundred to some ten thousand images.

    Attributes:
        device: "auto" takes every GPU that is there.
        processes: 0 takes one for each GPU.
    """

    epochs: int = Field(default=16, ge=1)
    batch_size: int = Field(default=16, ge=2)
    learning_rate: float = Field(default=5e-4, gt=0, le=1e-3)
    weight_decay: float = Field(default=0.01, ge=0)
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: int = Field(default=0, ge=0)


class Tasks(Section):
    """Which tasks of the aggregator this hospital serves.

    Attributes:
        recalibrate: BatchNorm moments of a merged model (docs/batchnorm.md), and sums of its features by class.
        evaluate: counts of right and wrong answers of merged models on the validation images.
        statistics: what some merge methods read beside the vector, measured on the training images.
        max_images: most images used for it.
        meeting_wait_seconds: how long `--tasks-only` waits in a meeting for the quorum.
    """

    recalibrate: bool = True
    evaluate: bool = True
    statistics: bool = True
    max_images: int = Field(default=1024, ge=1)
    meeting_wait_seconds: int = Field(default=600, ge=1, le=86400)


class AgentSettings(Section):
    """Everything the agent needs to know.

    Attributes:
        hospital: its name, which must be the certificate's; the certificate's, whoever that is, where absent.
        aggregator: host:port.
        data: needed for training and for tasks, not for withdraw, fetch or the ledger.
        state: folder for the base model, checkpoints, the vector and the ledger; survives restarts.
        base: digest of the base model, to pin it; whatever the aggregator's policy merges where absent.
        policy: name of the policy, where the aggregator has several.
        metrics_port: of Prometheus metrics; 0 serves none.
    """

    hospital: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        description="lower-case letters, digits and hyphens",
    )
    aggregator: str = Field(
        pattern=rf"^({_LABEL}(\.{_LABEL})*\.?|\[[0-9a-fA-F:.]+\]):({_PORT})$",
        description="host:port, such as merge.example.org:8443",
    )
    state: Path = Path("datavector-state")
    tls: Tls
    data: Data | None = None
    training: Training = Training()
    tasks: Tasks = Tasks()
    base: str | None = Field(
        default=None, pattern=r"^sha256:[0-9a-f]{64}$", description="sha256: and 64 hexadecimal digits"
    )
    policy: str | None = None
    metrics_port: int = Field(default=0, ge=0, le=65535)
