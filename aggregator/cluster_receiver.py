"""The receiver as a process of its own in a cluster: `datavector receiver`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Sequence

from aggregator.cluster import Cache, Feed
from aggregator.deny_map import DenyMap
from aggregator.kube import Api
from aggregator.lock import alone
from aggregator.metrics import Metrics
from aggregator.outbox import OutboxRegistry
from aggregator.receiver import Receiver
from aggregator.resources import KINDS
from aggregator.settings import ClusterReceiverSettings
from aggregator.store import Store
from datavector.console import LINE_SECONDS, say
from datavector.files import remove_leftovers
from datavector.monitoring import serve_metrics

STOP_SECONDS = 5.0
COUNT_SECONDS = 1.0  # between two counts of the objects, for metrics


def run(settings: ClusterReceiverSettings) -> None:
    """Serves until SIGTERM or SIGINT. It listens once every kind of objects, and the deny list, has been read.

    Raises:
        ConfigError: there is no way to an API server.
        CertificateError: the aggregator's own certificate cannot be used.
        UsageError: the store holds other files.
    """
    logging.getLogger("aggregator").setLevel(logging.INFO)
    api, store = Api(settings.namespace), Store(settings.store)
    with alone(store.root, patient=True):  # of the Pod whose place this one takes
        _remove_leftovers(store)
        asyncio.run(_serve(settings, api, store))


def _remove_leftovers(store: Store) -> None:
    """Removes what a killed receiver left. Elsewhere in the store the operator and its Jobs may be writing."""
    visits = (store.root / "versions").glob("*/visits*")
    for folder in (store.root / "uploads", store.root / "outbox", *visits):
        remove_leftovers(folder)


async def _serve(settings: ClusterReceiverSettings, api: Api, store: Store) -> None:
    loop, stop, changed = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def notice() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(changed.set)

    cache, metrics = Cache(), Metrics()
    registry = OutboxRegistry(api, cache, store.root / "outbox")
    feed = Feed(api, cache, KINDS, notice)
    name = settings.deny_list_config_map
    deny_maps = [DenyMap(api, name, notice)] if name else []
    receiver = Receiver(store, registry, settings, changed.set, metrics, deny_maps)
    metrics.outbox.set_function(lambda: len(registry.waiting()))
    if settings.metrics_port:
        serve_metrics(metrics.registry, settings.metrics_port)

    followers: list[Feed | DenyMap] = [feed, *deny_maps]

    async def work() -> None:
        await _until_listed(followers, changed, api)
        address = await receiver.start()
        say(f"listening on {address} (mutual TLS 1.3, trust domain {settings.tls.trust_domain})")
        await _keep_counting(registry, changed, metrics)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    for follower in followers:
        follower.start()
    registry.start()
    working = asyncio.create_task(work(), name="listen, then count")
    stopping = asyncio.create_task(stop.wait(), name="wait for a signal")
    await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    working.cancel()
    try:
        await working
    except asyncio.CancelledError:
        say("stopped; starting again goes on from here")
    finally:
        await receiver.stop(STOP_SECONDS)
        for follower in followers:
            follower.stop()
        registry.stop()


async def _until_listed(followers: Sequence[Feed | DenyMap], changed: asyncio.Event, api: Api) -> None:
    """Waits until all that is followed has been listed once, and says now and then what is missing."""
    loop, waits = asyncio.get_running_loop(), f"waiting for the Kubernetes API at {api.server} to list"
    line_at = loop.time() + 1
    while missing := [each for follower in followers for each in follower.missing]:
        try:
            async with asyncio.timeout_at(line_at):
                await changed.wait()
            changed.clear()
        except TimeoutError:
            say(f"{waits} {', '.join(missing)} of namespace {api.namespace}")
            line_at = loop.time() + LINE_SECONDS


async def _keep_counting(registry: OutboxRegistry, changed: asyncio.Event, metrics: Metrics) -> None:
    """Keeps the metrics of objects current."""
    while True:
        changed.clear()
        metrics.count_objects(registry.vectors(), registry.versions())
        await asyncio.sleep(COUNT_SECONDS)
        await changed.wait()
