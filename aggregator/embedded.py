"""Jobs without a cluster: each stage in a child process of the aggregator."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from aggregator.reconcile import EXIT_PASSING, Failure, Stage
from aggregator.resources import ModelVersion, utc_now

log = logging.getLogger(__name__)

AT_ONCE = 2  # a release takes a core and some GB for some seconds


class ChildJobs:
    """Runs stages in child processes, two at once.

    Attributes:
        wake: called when a job has ended; whoever waits for that sets it.
    """

    def __init__(self, store: Path) -> None:
        self.wake: Callable[[], None] = lambda: None
        self._store = store
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, Failure] = {}
        self._free_to_run = asyncio.Semaphore(AT_ONCE)

    def running(self) -> frozenset[str]:
        return frozenset(self._tasks)

    def stopping(self) -> frozenset[str]:
        return frozenset(name for name, task in self._tasks.items() if task.cancelling())

    def failures(self) -> Mapping[str, Failure]:
        return self._failures

    def troubles(self) -> Mapping[str, tuple[str, str]]:
        return {}

    def next_look(self) -> None:
        return None

    def start(self, version: ModelVersion, stage: Stage) -> None:
        name = version.name
        self._failures.pop(name, None)
        self._tasks[name] = asyncio.create_task(self._run(name, stage), name=f"{stage} {name}")
        self._tasks[name].add_done_callback(lambda _: self._ended(name))

    def stop(self, version: str) -> None:
        self._tasks[version].cancel()

    async def close(self) -> None:
        """Ends running jobs."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, name: str, stage: Stage) -> None:
        try:
            async with self._free_to_run:
                failure = await run_job(self._store, name, stage)
        except OSError as error:
            log.error("%s: %s could not be run: %s", name, stage, error)
            failure = Failure(f"the {stage} process could not be started ({error})", passing=True, at=utc_now())
        if failure:
            self._failures[name] = failure

    def _ended(self, name: str) -> None:
        del self._tasks[name]
        self.wake()


async def run_job(store: Path, version: str, stage: Stage) -> Failure | None:
    """Runs one stage of a version's job in a child process that never outlives this one.

    Returns:
        None when it is done.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "aggregator.job", "--end-with-parent", str(store), version, stage,
        stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stderr  # noqa: S101  it is a pipe
        # communicate() would close stdin, which tells the child that its parent is gone.
        errors = await process.stderr.read()
        code = await process.wait()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if code == 0:
        return None
    if code < 0:
        return Failure(f"the {stage} process was killed by signal {-code}", passing=True, at=utc_now())
    output = errors.decode(errors="replace").strip()
    log.debug("%s of %s wrote:\n%s", stage, version, output)
    message = output.rpartition("\n")[2] or f"the {stage} process ended with {code}"
    return Failure(message, passing=code == EXIT_PASSING, at=utc_now())
