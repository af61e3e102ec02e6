"""Serving Prometheus metrics; what is measured stands in agent.metrics and aggregator.metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from datavector.errors import UsageError


def serve_metrics(registry: CollectorRegistry, port: int) -> None:
    """Serves a registry over HTTP on every address, in a thread of its own.

    Raises:
        UsageError: the port is taken.
    """
    try:
        start_http_server(port, registry=registry)
    except OSError as error:
        raise UsageError(
            f"metrics cannot be served on port {port} ({error.strerror})", remedy="set metrics_port to a free port"
        ) from error


def certificate_expiry(registry: CollectorRegistry) -> Gauge:
    """The metric that the agent and the aggregator have in common; not a number until it is set."""
    gauge = Gauge(
        "datavector_certificate_expiry_timestamp_seconds",
        "When the own certificate that is in use expires, in Unix time.",
        registry=registry,
    )
    gauge.set(float("nan"))
    return gauge
