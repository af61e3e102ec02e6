"""The embedded reconciliation in tests: in this process, or in one of its own that can be killed.

`python -m tests.aggregator.reconciling STORE` reconciles a store until it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from aggregator.embedded import ChildJobs
from aggregator.reconciler import Reconciler
from aggregator.registry import SqliteRegistry
from aggregator.resources import ModelVersion, Phase
from aggregator.store import Store


class Running:
    """A running reconciliation; `until` waits for what it is expected to bring about."""

    def __init__(self, store: Store, registry: SqliteRegistry) -> None:
        self.waiting: dict[str, str] = {}
        self.registry = registry
        self.jobs = ChildJobs(store.root)
        self.reconciler = Reconciler(store, registry, self.jobs, self._on_settled)
        self.jobs.wake = self.reconciler.wake
        self._settled = asyncio.Event()

    def _on_settled(self, waiting: dict[str, str]) -> None:
        self.waiting = waiting
        self._settled.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        self.reconciler.wake()
        while not condition():
            self._settled.clear()
            await self._settled.wait()

    def in_phase(self, phase: Phase) -> list[ModelVersion]:
        return [version for version in self.registry.versions() if version.status.phase is phase]


@contextlib.asynccontextmanager
async def reconciling(store: Store, registry: SqliteRegistry) -> AsyncIterator[Running]:
    running = Running(store, registry)
    task = asyncio.create_task(running.reconciler.run())
    task.add_done_callback(lambda _: running._settled.set())
    try:
        yield running
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await running.jobs.close()


def wait_for_merge(store: Store, *, besides: frozenset[Path] = frozenset()) -> None:
    """Returns when a merge has begun to write (or has just ended), told by files other than `besides`."""
    while set(merging(store)) <= besides:
        time.sleep(0.001)


def merging(store: Store) -> frozenset[Path]:
    return frozenset(store.root.glob("versions/*/merged/*.safetensors*"))


async def _serve(root: str) -> None:
    store = Store(Path(root))
    jobs = ChildJobs(store.root)
    reconciler = Reconciler(store, SqliteRegistry(store.root / "registry.sqlite"), jobs)
    jobs.wake = reconciler.wake
    await reconciler.run()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
