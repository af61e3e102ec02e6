"""The aggregator without a cluster: receiver, SQLite registry and reconciliation in one process, jobs in children.

The loop observes, plans and carries out without awaiting anything, so a withdrawal (which the receiver records in
the same thread) is never overwritten by an older state.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path

from aggregator.reconcile import (
    Action,
    AskHospitals,
    Base,
    CreateVersion,
    EraseBlob,
    EraseVersion,
    RunJob,
    Save,
    Stage,
    StopAsking,
    StopJob,
    WakeAt,
    World,
    erasures,
    explain,
    plan,
    sweep,
)
from aggregator.registry import Registry
from aggregator.resources import MergePolicy, ModelVersion, utc_now
from aggregator.store import OpenCalibration, Store, find_bases
from datavector.errors import DataVectorError

log = logging.getLogger(__name__)

STAGES: tuple[Stage, ...] = ("merge", "release")
SETTLE_ROUNDS = 100
PAUSE_SECONDS = 10  # after a full disk or the like


class Reconciler:
    """Keeps planning and carrying out until nothing is left but waiting.

    Args:
        on_settled: called with the registry's policies and what each waits for, whenever that may have changed.
    """

    def __init__(self, store: Store, registry: Registry, on_settled: Callable[[dict[str, str]], None]) -> None:
        self.store = store
        self.registry = registry
        self.on_settled = on_settled
        self._changed = asyncio.Event()
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._bases = store.bases()

    def wake(self) -> None:
        """Something changed: look again soon."""
        self._changed.set()

    async def run(self) -> None:
        """Reconciles until cancelled; running jobs end with it."""
        try:
            while True:
                self._changed.clear()
                try:
                    next_time = self.reconcile()
                except Exception as error:  # withdrawals must still arrive, so nothing here ends the receiver
                    foreseen = isinstance(error, (DataVectorError, OSError))
                    log.error("%s; trying again in %d seconds", error, PAUSE_SECONDS, exc_info=not foreseen)
                    next_time = utc_now() + timedelta(seconds=PAUSE_SECONDS)
                timeout = None if next_time is None else max((next_time - utc_now()).total_seconds(), 0.0)
                try:
                    await asyncio.wait_for(self._changed.wait(), timeout)
                except TimeoutError:
                    continue
        finally:
            jobs = list(self._jobs.values())
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    def reconcile(self) -> datetime | None:
        """Plans and carries out until settled.

        Returns:
            When to look again though nothing changes; None for never.
        """
        for _ in range(SETTLE_ROUNDS):
            now = utc_now()
            worlds = [self.observe(policy) for policy in self.registry.policies()]
            actions = [action for world in worlds for action in plan(world, now)]
            actions += sweep(worlds, self.registry.vectors(), now)
            actions += self._clear_orphans()
            todo = [action for action in actions if not isinstance(action, WakeAt) and not self._is_stopping(action)]
            if not todo:
                self.on_settled({world.policy.name: explain(world, now) for world in worlds})
                return min((action.time for action in actions if isinstance(action, WakeAt)), default=None)
            for action in todo:
                self._carry_out(action)
        raise RuntimeError(f"still not settled after {SETTLE_ROUNDS} rounds: {todo}")

    def _clear_orphans(self) -> list[Action]:
        """What is to be erased of versions whose policy is gone: a withdrawal reaches them too."""
        policies = {policy.name for policy in self.registry.policies()}
        orphans = [version for version in self.registry.versions() if version.spec.policy_ref not in policies]
        return erasures(orphans, running=frozenset(self._jobs), on_disk=self._on_disk(orphans))

    def _on_disk(self, versions: Iterable[ModelVersion]) -> frozenset[str]:
        return frozenset(version.name for version in versions if self.store.has_version(version.name))

    def explain(self, policy: MergePolicy) -> str:
        """What a policy waits for now, as a sentence."""
        return explain(self.observe(policy), utc_now())

    def observe(self, policy: MergePolicy) -> World:
        """What the store and the registry say about a policy now."""
        versions = tuple(version for version in self.registry.versions() if version.spec.policy_ref == policy.name)
        names = [version.name for version in versions if version.status.phase.unfinished]
        reports = {(name, stage): self.store.report(name, stage) for name in names for stage in STAGES}
        return World(
            policy=policy,
            base=self._base(policy),
            vectors=tuple(self.registry.vectors()),
            versions=versions,
            reports={key: report for key, report in reports.items() if report is not None},
            visits={name: self.store.rounds(name) for name in names},
            running=frozenset(self._jobs),
            on_disk=self._on_disk(versions),
        )

    def _base(self, policy: MergePolicy) -> Base | None:
        match find_bases(self._bases, policy.spec.base_model_ref):
            case [base]:
                return Base(base.digest, has_batchnorm=bool(base.batchnorm_layers))
        return None

    def _carry_out(self, action: Action) -> None:
        match action:
            case CreateVersion(version):
                self.registry.add_version(version)
                log.info("%s: merging the vectors of %s", version.name, ", ".join(version.hospitals))
            case Save(resource):
                self.registry.save(resource)
                if isinstance(resource, ModelVersion):
                    status = resource.status
                    log.info("%s: %s%s", resource.name, status.phase.value, status.message and f" ({status.message})")
            case RunJob(version, stage):
                self._start_job(version, stage)
            case StopJob(version):
                self._jobs[version].cancel()
            case AskHospitals(version, quorum):
                self.store.open_calibration(_calibration(version, quorum))
            case StopAsking(version):
                self.store.close_calibration(version)
            case EraseVersion(version):
                self.store.erase_version(version)
            case EraseBlob(vector):
                self.store.erase_blob(vector.spec.hospital, vector.spec.artifact.digest)
                log.info("%s: erased", vector.name)

    # --- Jobs

    def _start_job(self, name: str, stage: Stage) -> None:
        self.store.write_version(name, self._version(name).dump())
        self._jobs[name] = asyncio.create_task(self._run_job(name, stage), name=f"{stage} {name}")
        self._jobs[name].add_done_callback(lambda _: self._job_ended(name))

    async def _run_job(self, name: str, stage: Stage) -> None:
        try:
            if message := await run_job(self.store.root, name, stage):
                self._record_failure(name, stage, message)
        except Exception:  # the failure is not on record, so nothing else keeps the job from starting again at once
            log.exception("%s: %s could not be run; trying again in %d seconds", name, stage, PAUSE_SECONDS)
            await asyncio.sleep(PAUSE_SECONDS)

    def _job_ended(self, name: str) -> None:
        del self._jobs[name]
        self.wake()

    def _is_stopping(self, action: Action) -> bool:
        """Whether an action is done but for its process's end, until which the version counts as running."""
        return isinstance(action, StopJob) and self._jobs[action.version].cancelling() > 0

    def _record_failure(self, name: str, stage: Stage, message: str) -> None:
        log.warning("%s: %s failed: %s", name, stage, message)
        version = self._version(name)
        if not version.status.phase.unfinished:
            return
        attempts = version.status.attempts + 1
        retry_at = utc_now() + timedelta(seconds=2.0**attempts)
        status = version.status.model_copy(update={"attempts": attempts, "message": message, "retry_at": retry_at})
        self.registry.save(version.model_copy(update={"status": status}))

    def _version(self, name: str) -> ModelVersion:
        return next(version for version in self.registry.versions() if version.name == name)


async def run_job(store: Path, version: str, stage: Stage) -> str:
    """Runs one stage of a version's job in a child process that never outlives this one.

    Returns:
        "" when it is done, else why it failed, as a sentence.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "aggregator.job", "--end-with-parent", str(store), version, stage,
        stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stderr  # noqa: S101  it is a pipe
        # communicate() would close stdin, which tells the child that its parent is gone.
        errors = await process.stderr.read()
        await process.wait()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode == 0:
        return ""
    if process.returncode is not None and process.returncode < 0:
        return f"the {stage} process was killed by signal {-process.returncode}"
    output = errors.decode(errors="replace").strip()
    log.debug("%s of %s wrote:\n%s", stage, version, output)
    return output.rpartition("\n")[2] or f"the {stage} process ended with {process.returncode}"


def _calibration(version: ModelVersion, quorum: int) -> OpenCalibration:
    spec = version.spec.calibration
    return OpenCalibration(
        version=version.name,
        base_digest=version.spec.base_model_ref,
        mode=spec.mode.value,
        hospitals=version.hospitals,
        quorum=quorum,
        rounds=spec.visits,
    )
