"""What the aggregator tells Prometheus (https://prometheus.io/docs/practices/naming)."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from aggregator.reconcile import Vectors, World
from aggregator.resources import Consent, DataVector, MergePolicy, ModelVersion, Phase
from datavector.monitoring import certificate_expiry


class Metrics:
    """Metrics of one aggregator, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.received_bytes = self._counter(
            "received_bytes", "Bytes of vectors and of statistics that arrived, repeated ones included."
        )
        self.resumed_bytes = self._counter("resumed_bytes", "Bytes that were here already when an upload went on.")
        self.fetched_bytes = self._counter("fetched_bytes", "Bytes of bases, merged weights and releases sent out.")
        self.uploads = self._counter("uploads", "Upload streams by how they ended.", "outcome")
        self.visits = self._counter("visits", "Calibration moments of hospitals that were stored, by mode.", "mode")
        self.refused_calls = self._counter("refused_calls", "Calls that ended with an error, by its class.", "reason")
        self.running_calls = Gauge(
            "datavector_receiver_running_calls", "Calls that are running now.", ("method",), registry=self.registry
        )
        self.outbox = Gauge(
            "datavector_receiver_outbox", "Vectors that the Kubernetes API does not have yet.", registry=self.registry
        )
        self.certificate_expiry = certificate_expiry(self.registry)
        self.vectors = Gauge("datavector_vectors", "Vectors by consent.", ("consent",), registry=self.registry)
        self.versions = Gauge("datavector_versions", "Model versions by phase.", ("phase",), registry=self.registry)

    def count_objects(self, vectors: Iterable[DataVector], versions: Iterable[ModelVersion]) -> None:
        """Sets the gauges of objects to what there is now."""
        consents = Tally(vector.spec.consent for vector in vectors)
        phases = Tally(version.status.phase for version in versions)
        for consent in Consent:
            self.vectors.labels(consent.value).set(consents[consent])
        for phase in Phase:
            self.versions.labels(phase.value).set(phases[phase])

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"datavector_receiver_{name}", text, labels, registry=self.registry)


@dataclass
class Outcome:
    """How a round of reconciliation ended."""

    faults: int = 0


class ReconcileMetrics:
    """Metrics of one reconciliation, embedded or the operator's."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self._seconds = Histogram(
            "datavector_reconcile_seconds",
            "Duration of rounds of reconciliation.",
            buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60),
            registry=registry,
        )
        self._rounds = Counter(
            "datavector_reconcile_rounds", "Rounds by how they ended.", ("outcome",), registry=registry
        )
        self._queue_age = Gauge(
            "datavector_queue_age_seconds",
            "Age of the oldest vector that is in no version of its policy yet.",
            ("policy",),
            registry=registry,
        )

    @contextmanager
    def round(self) -> Iterator[Outcome]:
        """Counts and times a round."""
        outcome, ended = Outcome(), "failed"
        try:
            with self._seconds.time():
                yield outcome
            ended = "faults" if outcome.faults else "settled"
        finally:
            self._rounds.labels(ended).inc()

    def waiting(self, worlds: Iterable[World], now: datetime) -> None:
        """Sets for each policy how long its oldest vector has waited."""
        self._queue_age.clear()
        for world in worlds:
            age = max((now - world.queued_since).total_seconds(), 0) if world.queued_since else 0
            self._queue_age.labels(world.policy.name).set(age)


class OperatorMetrics(ReconcileMetrics):
    """Metrics of the operator, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        super().__init__(self.registry)
        self.jobs = self._counter("jobs", "Jobs that have ended, by how.", "stage", "result", "reason")
        self.requests = self._counter("api_requests", "Requests to the Kubernetes API, but kopf's watches.")
        self._objects = self._gauge("objects", "Objects by kind and state.", "kind", "state")
        self.outdated = self._gauge("definitions_outdated", "1 while the cluster's definitions of objects are too old.")
        self._counted_requests = 0

    def count(
        self, vectors: Iterable[DataVector], versions: Iterable[ModelVersion], policies: Iterable[MergePolicy]
    ) -> None:
        """Sets the gauges of objects to what there is now."""
        vectors = Vectors.of(vectors)
        waiting = {vector.name for vector in vectors.quarantined}
        states = Tally(
            ("DataVector", "Quarantined" if vector.name in waiting else _state(vector)) for vector in vectors
        )
        states.update(("ModelVersion", version.status.phase.value) for version in versions)
        states.update(("MergePolicy", "Suspended" if policy.spec.suspend else "Active") for policy in policies)
        self._objects.clear()
        for (kind, state), number in states.items():
            self._objects.labels(kind, state).set(number)

    def requests_so_far(self, number: int) -> None:
        self.requests.inc(number - self._counted_requests)
        self._counted_requests = number

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"datavector_operator_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"datavector_operator_{name}", text, labels, registry=self.registry)


def _state(vector: DataVector) -> str:
    if vector.status.erased_at:
        return "Erased"
    if not vector.granted:
        return "Withdrawn"
    return "Stored" if vector.status.stored_at else "Missing"
