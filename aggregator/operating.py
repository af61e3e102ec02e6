"""What the operator does with news from the cluster: keeps a cache, reconciles beside it, tells of it in Events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from aggregator.cluster import Cache, ClusterRegistry
from aggregator.cluster_jobs import ClusterJobs
from aggregator.crds import missing_fields
from aggregator.kube import EVENTS, Api, Kind, Object
from aggregator.manifests import JobDefaults
from aggregator.metrics import OperatorMetrics
from aggregator.reconcile import policy_fault
from aggregator.reconciler import Reconciler, log_event
from aggregator.resources import API_VERSION, GROUP, KINDS, DataVector, MergePolicy, ModelVersion, Resource, utc_now
from aggregator.settings import OperatorSettings
from aggregator.store import Store
from datavector.console import listed
from datavector.errors import ApiUnavailable, ClusterError, CrdOutdated, ObjectMissing
from datavector.monitoring import serve_metrics

log = logging.getLogger(__name__)

Event = Mapping[str, Any]  # of a watch: type (None for what was listed) and object

RETRY_SECONDS = 10.0  # between tries to reach the API server, and looks at outdated definitions
CHECK_SECONDS = 60.0  # between comparisons of the cache with the API
RELIST_SECONDS = 1.0  # from news of kopf's that it has listed something to such a comparison
COALESCE_SECONDS = 0.1  # in which changes that come together are planned for at once
NOTE = 1024  # characters that an Event may have
NOTES = {  # of steps that say nothing themselves
    "Measuring": "hospitals that come back are asked for the statistics that the method reads",
    "Calibrating": "merged; hospitals that come back are asked for BatchNorm statistics",
    "Releasing": "BatchNorm statistics are restored, and the release is exported",
    "Ready": "the release can be fetched",
    "Erased": "its file is erased from the store",
}
COMPONENT = "datavector-operator"


class Operator:
    """Reconciles one namespace."""

    def __init__(self, settings: OperatorSettings) -> None:
        """
        Raises:
            ConfigError: there is no way to an API server.
            UsageError: the store holds other files, or the metrics' port is taken.
        """
        self.metrics = OperatorMetrics()
        self._api = Api(settings.namespace)
        self._cache = Cache()
        self._store = Store(settings.store, read_only=True)  # one that is not there is no new one: see Store.check
        self._registry = ClusterRegistry(self._api, self._cache)
        defaults = JobDefaults(settings.job_image, settings.store_claim, settings.job_service_account)
        self._jobs = ClusterJobs(self._api, self._registry, self._store, defaults, self.metrics)
        self._reconciler = Reconciler(
            self._store,
            self._registry,
            self._jobs,
            self._on_settled,
            tell=self._tell,
            metrics=self.metrics,
            poll=timedelta(seconds=settings.poll_seconds),
            grace=timedelta(seconds=settings.grace_seconds),
        )
        self._said: dict[str, str] = {}
        self._settled_at = utc_now()
        self._relisted = asyncio.Event()
        if settings.metrics_port:
            serve_metrics(self.metrics.registry, settings.metrics_port)

    @property
    def seconds_since_settled(self) -> float:
        return (utc_now() - self._settled_at).total_seconds()

    async def start(self) -> None:
        """Lists everything once, so that nothing is planned from a part of it.

        Raises:
            ClusterError: the definitions are not there, or may not be read.
        """
        while True:
            try:
                await asyncio.to_thread(self._load)
                return
            except ApiUnavailable as error:
                log.warning("%s", error)
                await asyncio.sleep(RETRY_SECONDS)

    async def run(self) -> None:
        """Reconciles until cancelled."""
        self._loop = asyncio.get_running_loop()
        await self._until_definitions_fit()
        checking = asyncio.create_task(self._keep_checking(), name="compare the cache with the API")
        try:
            await self._reconciler.run(in_thread=True, coalesce=COALESCE_SECONDS)
        finally:
            checking.cancel()

    def observe(self, kind: type[Resource], event: Event) -> None:
        """Takes note of an object's newest state."""
        self._notice_list(event)
        if self._cache.observe(kind, event["object"], gone=event["type"] == "DELETED"):
            self._reconciler.wake()

    def observe_job(self, kind: Kind, event: Event) -> None:
        """Takes note of a Job's or a Pod's newest state."""
        self._notice_list(event)
        if self._jobs.observe(kind, event["object"], gone=event["type"] == "DELETED"):
            self._reconciler.wake()

    # --- Parts

    def _load(self) -> None:
        for kind in KINDS:
            self._cache.load(self._api, kind)
        self._jobs.load()

    def _notice_list(self, event: Event) -> None:
        """kopf lists a kind again after an outage, and is silent about what was deleted meanwhile."""
        if event["type"] is None:
            self._relisted.set()

    async def _until_definitions_fit(self) -> None:
        """Says what is wrong, and changes nothing, while the cluster's definitions lack what would be written."""
        said = ""
        while True:
            try:
                missing = missing_fields(await asyncio.to_thread(self._api.schema))
                self.metrics.outdated.set(bool(missing))
                if not missing:
                    return
                problem: ClusterError = CrdOutdated(listed(missing))
                await asyncio.to_thread(self._refuse, problem)
            except ClusterError as error:
                problem = error
            if str(problem) != said:
                said = str(problem)
                log.error("%s", said)
            await asyncio.sleep(RETRY_SECONDS)

    def _refuse(self, problem: ClusterError) -> None:
        """Says on every policy why nothing is done."""
        for policy in self._registry.policies():
            status = policy_fault(policy, problem, utc_now())
            conditions = [each.model_dump(mode="json", by_alias=True, exclude_none=True) for each in status.conditions]
            if status.conditions != policy.status.conditions:
                answer = self._api.patch(
                    Kind.of(MergePolicy), policy.name, {"status": {"conditions": conditions}}, part="status"
                )
                self._cache.observe(MergePolicy, answer)

    async def _keep_checking(self) -> None:
        """Lists a kind again where the cache has another number of objects: a watch that broke may miss deletions."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_SECONDS):
                    await self._relisted.wait()
            await asyncio.sleep(RELIST_SECONDS)
            self._relisted.clear()
            try:
                for kind in KINDS:
                    await asyncio.to_thread(self._compare, kind)
                await asyncio.to_thread(self._jobs.load)
                self._reconciler.wake()
            except ClusterError as error:
                log.warning("%s", error)
                self._relisted.set()
                await asyncio.sleep(RETRY_SECONDS)

    def _compare(self, kind: type[Resource]) -> None:
        if self._api.count(Kind.of(kind)) != self._cache.size(kind):
            log.info("%s are listed again", kind.plural)
            self._cache.load(self._api, kind)
            self._loop.call_soon_threadsafe(self._reconciler.wake)

    def _on_settled(self, sentences: dict[str, str]) -> None:
        self._settled_at = utc_now()
        self.metrics.count(self._cache.all(DataVector), self._cache.all(ModelVersion), self._cache.all(MergePolicy))
        self.metrics.requests_so_far(self._api.requests)
        for name, sentence in sentences.items():
            if self._said.get(name) != sentence:
                log.info("%s: %s", name, sentence)
        self._said = sentences

    def _tell(self, resource: Resource, reason: str, message: str) -> None:
        log_event(resource, reason, message)
        try:
            self._api.create(EVENTS, event(resource, reason, message or NOTES.get(reason, reason), self._api.namespace))
        except (ApiUnavailable, ObjectMissing) as error:
            log.debug("%s", error)
        except ClusterError as error:
            log.warning("%s", error)


def event(resource: Resource, reason: str, message: str, namespace: str) -> Object:
    """An Event about an object, for `kubectl describe`."""
    now = utc_now().isoformat(timespec="seconds").replace("+00:00", "Z")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{resource.name[:50].rstrip('.-')}-", "namespace": namespace},
        "type": "Warning" if reason in ("Failed", "Revoked") else "Normal",
        "reason": reason,
        "message": message[:NOTE],
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
        "source": {"component": COMPONENT},
        "involvedObject": {
            "apiVersion": f"{GROUP}/{API_VERSION}",
            "kind": resource.kind_name,
            "name": resource.name,
            "namespace": namespace,
            "uid": resource.metadata.uid,
            "resourceVersion": resource.metadata.resource_version,
        },
    }
