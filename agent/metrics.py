"""Prometheus metrics of the agent; served on a port of their own if the settings name one."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from datavector.monitoring import certificate_expiry


class Metrics:
    """Names follow https://prometheus.io/docs/practices/naming/: base units, `_total` for counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.certificate_expiry = certificate_expiry(self.registry)
        self.epoch = Gauge("datavector_agent_epoch", "Epochs finished of this run.", registry=self.registry)
        self.loss = Gauge("datavector_agent_loss", "Mean training loss of the last epoch.", registry=self.registry)
        self.validation = Gauge(
            "datavector_agent_validation_balanced_accuracy_ratio",
            "Balanced accuracy on the validation images after the last epoch.",
            registry=self.registry,
        )
        self.corrupt_images = Gauge(
            "datavector_agent_corrupt_images", "Images that could not be decoded.", ["split"], registry=self.registry
        )
        self.sent_bytes = Counter(
            "datavector_agent_sent_bytes", "Bytes of vectors and of statistics sent.", registry=self.registry
        )
        self.uploads = Counter("datavector_agent_uploads", "Uploads by outcome.", ["outcome"], registry=self.registry)
        self.tasks = Counter(
            "datavector_agent_tasks", "Tasks by kind and outcome.", ["kind", "outcome"], registry=self.registry
        )
        self.retries = Counter(
            "datavector_agent_retries",
            "Calls that are tried again because the aggregator cannot be reached.",
            registry=self.registry,
        )
