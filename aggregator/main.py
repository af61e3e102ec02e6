"""The embedded aggregator as a process: `datavector aggregator`, and `datavector status` beside it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from pathlib import Path

from rich.console import Console
from rich.table import Table

from aggregator.embedded import ChildJobs
from aggregator.lock import alone
from aggregator.metrics import Metrics, ReconcileMetrics
from aggregator.policy_file import load_policies
from aggregator.receiver import Receiver
from aggregator.reconciler import Reconciler
from aggregator.registry import SqliteRegistry
from aggregator.resources import ModelVersion, Phase
from aggregator.settings import AggregatorSettings
from aggregator.store import Store
from datavector.console import say
from datavector.errors import UsageError
from datavector.files import remove_leftovers
from datavector.monitoring import serve_metrics

STOP_SECONDS = 5.0
REGISTRY = "registry.sqlite"


def run(settings: AggregatorSettings) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        ConfigError: the policy file is wrong, or names an unknown merge method.
        BaseModelError: the base model to import is missing or altered.
        CertificateError: the aggregator's own certificate cannot be used.
        UsageError: another aggregator uses the store, or it holds other files.
    """
    logging.getLogger("aggregator").setLevel(logging.INFO)
    policies = load_policies(settings.policy)
    for policy in policies:
        policy.spec.method.check()
    store = Store(settings.store)
    with alone(store.root):
        remove_leftovers(store.root)
        if settings.base is not None:
            store.import_base(settings.base)
        for policy in policies:
            store.base(policy.spec.base_model_ref)
        registry = SqliteRegistry(store.root / REGISTRY)
        registry.set_policies(policies)
        try:
            asyncio.run(_serve(settings, store, registry))
        finally:
            registry.close()


async def _serve(settings: AggregatorSettings, store: Store, registry: SqliteRegistry) -> None:
    metrics = Metrics()
    said: dict[str, str] = {}

    def settled(sentences: dict[str, str]) -> None:
        metrics.count_objects(registry.vectors(), registry.versions())
        for name, sentence in sentences.items():
            if said.get(name) != sentence:
                say(f"{name}: {sentence}")
        said.update(sentences)

    jobs = ChildJobs(store.root)
    reconciler = Reconciler(store, registry, jobs, settled, metrics=ReconcileMetrics(metrics.registry))
    jobs.wake = reconciler.wake
    receiver = Receiver(store, registry, settings, reconciler.wake, metrics=metrics)
    if settings.metrics_port:
        serve_metrics(metrics.registry, settings.metrics_port)
    address = await receiver.start()
    say(f"listening on {address} (mutual TLS 1.3, trust domain {settings.tls.trust_domain})")
    reconciling = asyncio.create_task(reconciler.run(), name="reconcile")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    stopping = asyncio.create_task(stop.wait(), name="wait for a signal")
    await asyncio.wait((reconciling, stopping), return_when=asyncio.FIRST_COMPLETED)
    await receiver.stop(STOP_SECONDS)
    stopping.cancel()
    if reconciling.done():
        reconciling.result()
    reconciling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reconciling
    await jobs.close()
    say("stopped; starting again goes on from here")


SHOWN = (Phase.RELEASING, Phase.READY, Phase.REJECTED)  # phases of versions whose evaluation is told


def print_status(root: Path) -> None:
    """Prints vectors, versions and what the policies wait for, from the store of a running or stopped aggregator.

    Nothing is written. Vectors and versions come in the order in which they were recorded.

    Raises:
        UsageError: there is no registry in that folder.
        TryAgain: the registry cannot be read.
    """
    if not (root / REGISTRY).is_file():
        raise UsageError(
            f"{root} holds no {REGISTRY}", remedy="give the folder that `datavector aggregator --store` has"
        )
    store, registry = Store(root, read_only=True), SqliteRegistry(root / REGISTRY, read_only=True)
    console = Console()
    vectors = Table("vector", "hospital", "sequence", "images", "stored", "consent", "erased", title="Data vectors")
    for vector in registry.vectors():
        spec, status = vector.spec, vector.status
        vectors.add_row(
            vector.name, spec.hospital, str(spec.sequence), str(spec.sample_count),
            f"{vector.arrived_at:%Y-%m-%d %H:%M:%SZ}", spec.consent.value, "yes" if status.erased_at else "no",
        )  # fmt: skip
    versions = Table("version", "hospitals", "method", "phase", "calibration", "message", title="Model versions")
    for version in registry.versions():
        versions.add_row(*_version_row(version))
    console.print(vectors, versions)
    reconciler = Reconciler(store, registry, ChildJobs(store.root))
    for version in registry.versions():
        if (report := version.status.evaluation) is not None and version.status.phase in SHOWN:
            console.print(f"{version.name}: {report.reason}")
    for vector in registry.vectors():
        if vector.granted and vector.quarantine:
            release = f"datavector release-quarantine {vector.name} --store {root}"
            console.print(f"{vector.name} is quarantined: {vector.quarantine}; to merge it all the same: {release}")
    for policy in registry.policies():
        console.print(f"{policy.name}: {reconciler.explain(policy)}")
    registry.close()


def _version_row(version: ModelVersion) -> tuple[str, ...]:
    status = version.status
    calibration = f"{report.mode.value}, {report.images} images" if (report := status.calibration) else ""
    return (
        version.name, ", ".join(version.hospitals), version.spec.method.name, status.phase.value, calibration,
        status.message,
    )  # fmt: skip
