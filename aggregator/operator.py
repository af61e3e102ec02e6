"""The operator: `kopf run -m aggregator.operator --standalone --namespace NAMESPACE`.

kopf's handlers take note of what changed and wake the reconciliation; `aggregator.operating` does the rest.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from typing import Any

import kopf

from aggregator.kube import JOBS, PODS
from aggregator.manifests import OWN
from aggregator.operating import Operator
from aggregator.resources import API_VERSION, GROUP, BaseModelResource, DataVector, MergePolicy, ModelVersion
from aggregator.settings import OPERATOR_PREFIX, OperatorSettings
from datavector.config import load_settings
from datavector.errors import DataVectorError

log = logging.getLogger(__name__)

PAGE = 100  # objects of one answer to a LIST
OUTAGE_TRIES = 120  # of kopf to reach the API server, 5 seconds apart
SELDOM_SECONDS = 10.0


class Seldom(logging.Filter):
    """Lets through one line in a while: in an outage each of kopf's watches has one for each try."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR or record.created < self._next:
            return record.levelno < logging.ERROR
        self._next = record.created + SELDOM_SECONDS
        return True


class NoDiffs(kopf.DiffBaseStorage):
    """Spares kopf a copy of each object, which it would compare with the next for handlers that we do not have."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: Any) -> None:
        pass


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
    gc.freeze()  # what is there now stays, and need not be looked through again and again
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # it has a line for each piece of news
    settings.scanning.disabled = True  # a Role knows neither namespaces nor definitions
    settings.posting.enabled = False  # events are ours, about steps, not about handlers
    settings.watching.connect_timeout = 5
    settings.watching.chunk_size = PAGE  # a list's objects are in memory page by page,
    settings.queueing.idle_timeout = 0.01  # and each of them no longer than its handler runs
    settings.persistence.diffbase_storage = NoDiffs()
    settings.networking.error_backoffs = [0.5, 1, 2, *[5] * OUTAGE_TRIES]  # then kopf ends, and the Pod begins anew
    logging.getLogger("kopf._cogs.clients.watching").addFilter(Seldom())
    try:
        memo.operator = Operator(load_settings(OperatorSettings, None, {}, prefix=OPERATOR_PREFIX))
        await memo.operator.start()
    except (DataVectorError, OSError) as error:  # an OSError is the store's
        log.error("%s", error)
        raise SystemExit(getattr(error, "exit_code", 1)) from None  # kopf would show its own traceback
    gc.freeze()
    memo.reconciling = asyncio.create_task(memo.operator.run(), name="reconcile")
    memo.reconciling.add_done_callback(end_where_failed)


def end_where_failed(task: asyncio.Task[None]) -> None:
    """Ends the process if its reconciliation has ended by an error, so that the Pod begins anew."""
    if not task.cancelled() and (error := task.exception()):
        log.error("the reconciliation has ended: %s", error, exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)


@kopf.on.cleanup()
async def stop(memo: kopf.Memo, **_: Any) -> None:
    if task := memo.get("reconciling"):  # none, where the start failed
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@kopf.on.event(GROUP, API_VERSION, BaseModelResource.plural)
async def base_model(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    memo.operator.observe(BaseModelResource, event)


@kopf.on.event(GROUP, API_VERSION, DataVector.plural)
async def vector(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    memo.operator.observe(DataVector, event)


@kopf.on.event(GROUP, API_VERSION, MergePolicy.plural)
async def policy(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    memo.operator.observe(MergePolicy, event)


@kopf.on.event(GROUP, API_VERSION, ModelVersion.plural)
async def version(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    memo.operator.observe(ModelVersion, event)


@kopf.on.event("batch", "v1", "jobs", labels=OWN)
async def job(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    memo.operator.observe_job(JOBS, event)


@kopf.on.event("", "v1", "pods", labels=OWN)
async def pod(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    memo.operator.observe_job(PODS, event)


@kopf.on.probe(id="secondsSinceReconciled")
def reconciled(memo: kopf.Memo, **_: Any) -> float:
    return float(memo.operator.seconds_since_settled)
