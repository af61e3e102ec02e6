"""The aggregator without a cluster: receiver, SQLite registry and reconciliation in one process, jobs in children.

The loop observes, plans and carries out without awaiting anything, so a withdrawal (which the receiver records in
the same thread) is never overwritten by an older state.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from aggregator.reconcile import (
    EXIT_PASSING,
    Action,
    Base,
    CreateVersion,
    EraseBlob,
    EraseVersion,
    RunJob,
    Save,
    Stage,
    StopJob,
    WakeAt,
    World,
    abandon,
    eligible,
    explain,
    job_failed,
    plan,
    sweep,
)
from aggregator.registry import Registry
from aggregator.resources import MergePolicy, ModelVersion, utc_now
from aggregator.store import Store, find_bases
from datavector.errors import DataVectorError

log = logging.getLogger(__name__)

STAGES: tuple[Stage, ...] = ("merge", "release")
SETTLE_ROUNDS = 100
PAUSE = timedelta(seconds=10)  # after a full disk or the like
JOBS_AT_ONCE = 2  # a release takes a core and some GB for some seconds
ORPHANS = "versions without a policy"


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
        self._free_to_run = asyncio.Semaphore(JOBS_AT_ONCE)
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
                    _log_fault(error)
                    next_time = utc_now() + PAUSE
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
        """Plans and carries out until settled. A fault stops what it concerns, and is logged; all else goes on.

        Returns:
            When to look again though nothing changes; None for never.
        """
        faults: dict[str, Exception] = {}
        for _ in range(SETTLE_ROUNDS):
            tracks = self._tracks(faults)
            todo = {name: [action for action in actions if self._is_due(action)] for name, actions in tracks.items()}
            if not any(todo.values()):
                self._settle(faults)
                times = [action.time for actions in tracks.values() for action in actions if isinstance(action, WakeAt)]
                return min([*times, *(utc_now() + PAUSE for _ in faults)], default=None)
            for name, actions in todo.items():
                try:
                    for action in actions:
                        self._carry_out(action)
                except Exception as error:
                    faults[name] = error
        raise RuntimeError(f"still not settled after {SETTLE_ROUNDS} rounds: {todo}")

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
        )

    # --- Parts of a round

    def _tracks(self, faults: dict[str, Exception]) -> dict[str, list[Action]]:
        """What is to be done now, in parts that do not depend on each other, each under a name.

        Erasing comes first: it may make the room that the rest needs.

        Args:
            faults: of the parts that failed, which are left out; those of policies that cannot be observed are added.
        """
        now, policies, versions = utc_now(), self.registry.policies(), self.registry.versions()
        worlds = []
        for policy in policies:
            try:
                worlds.append(self.observe(policy))
            except Exception as error:
                faults[policy.name] = error
        tracks: dict[str, list[Action]] = {}
        if len(worlds) == len(policies):  # else nobody knows what is still wanted
            wanted = frozenset(vector.name for world in worlds for vector in eligible(world))
            running, on_disk = frozenset(self._jobs), self._on_disk(versions)
            erasing = sweep(versions, self.registry.vectors(), wanted, running=running, on_disk=on_disk, now=now)
            tracks |= {_subject(action): [action] for action in erasing}
        names = {policy.name for policy in policies}
        tracks[ORPHANS] = abandon((version for version in versions if version.spec.policy_ref not in names), now)
        tracks |= {world.policy.name: plan(world, now) for world in worlds}
        return {name: actions for name, actions in tracks.items() if name not in faults}

    def _is_due(self, action: Action) -> bool:
        """Whether there is something to do; a job that was stopped counts as running until its process has ended."""
        stopping = isinstance(action, StopJob) and self._jobs[action.version].cancelling() > 0
        return not stopping and not isinstance(action, WakeAt)

    def _settle(self, faults: Mapping[str, Exception]) -> None:
        """Logs what went wrong, and tells what the policies wait for."""
        for error in faults.values():
            _log_fault(error)
        self.on_settled(
            {
                policy.name: f"stopped by an error: {faults[policy.name]}"
                if policy.name in faults
                else self.explain(policy)
                for policy in self.registry.policies()
            }
        )

    def _on_disk(self, versions: Iterable[ModelVersion]) -> frozenset[str]:
        return frozenset(version.name for version in versions if self.store.has_version(version.name))

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
            case EraseVersion(version):
                self.store.erase_version(version)
            case EraseBlob(vector):
                self.store.erase_blob(vector.spec.hospital, vector.spec.artifact.digest)
                self.registry.save(vector)
                log.info("%s: erased", vector.name)

    # --- Jobs

    def _start_job(self, name: str, stage: Stage) -> None:
        self.store.write_version(name, self._version(name).dump())
        self._jobs[name] = asyncio.create_task(self._run_job(name, stage), name=f"{stage} {name}")
        self._jobs[name].add_done_callback(lambda _: self._job_ended(name))

    async def _run_job(self, name: str, stage: Stage) -> None:
        try:
            async with self._free_to_run:
                failure = await run_job(self.store.root, name, stage)
            if failure:
                self._record_failure(name, stage, failure)
        except Exception:  # the failure is not on record, so nothing else keeps the job from starting again at once
            log.exception("%s: %s could not be run; trying again in %d seconds", name, stage, PAUSE.seconds)
            await asyncio.sleep(PAUSE.seconds)

    def _job_ended(self, name: str) -> None:
        del self._jobs[name]
        self.wake()

    def _record_failure(self, name: str, stage: Stage, failure: Failure) -> None:
        log.warning("%s: %s failed: %s", name, stage, failure.message)
        version = self._version(name)
        if version.status.phase.unfinished:
            self.registry.save(job_failed(version, failure.message, passing=failure.passing, now=utc_now()))

    def _version(self, name: str) -> ModelVersion:
        return next(version for version in self.registry.versions() if version.name == name)


@dataclass(frozen=True)
class Failure:
    """Why a job failed, as a sentence, and whether for a reason that may pass by itself."""

    message: str
    passing: bool


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
        return Failure(f"the {stage} process was killed by signal {-code}", passing=True)
    output = errors.decode(errors="replace").strip()
    log.debug("%s of %s wrote:\n%s", stage, version, output)
    message = output.rpartition("\n")[2] or f"the {stage} process ended with {code}"
    return Failure(message, passing=code == EXIT_PASSING)


def _subject(action: Action) -> str:
    """What an erasing action is about, as the name of its part of a round."""
    match action:
        case EraseBlob(vector):
            return f"the blob of {vector.name}"
        case StopJob(version) | EraseVersion(version):
            return f"the files of {version}"
    raise TypeError(f"{action} erases nothing")


def _log_fault(error: Exception) -> None:
    foreseen = isinstance(error, (DataVectorError, OSError))
    log.error("%s; trying again in %d seconds", error, PAUSE.seconds, exc_info=None if foreseen else error)
