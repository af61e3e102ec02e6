"""Carries out what `aggregator.reconcile` plans, with whatever registry and whatever runs jobs.

A round observes, plans and carries out without awaiting anything. In the embedded mode that is also how a withdrawal
(which the receiver records in the same thread) is never overwritten by an older state; in a cluster it is each
object's resource version.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Protocol

from aggregator.garbage import collect_garbage
from aggregator.metrics import Outcome, ReconcileMetrics
from aggregator.reconcile import (
    Action,
    Base,
    CreateVersion,
    EraseBlob,
    EraseVersion,
    Failure,
    RunJob,
    Save,
    Stage,
    StopJob,
    WakeAt,
    World,
    abandon,
    base_state,
    eligible,
    explain,
    job_failed,
    on_record,
    plan,
    policy_fault,
    policy_status,
    revocations,
    sweep,
    vector_state,
)
from aggregator.registry import Registry
from aggregator.resources import DataVector, MergePolicy, ModelVersion, Phase, Resource, utc_now
from aggregator.store import Store, find_bases
from datavector.errors import ApiConflict, ConfigError, DataVectorError, StoreMissing
from datavector.merge import choose
from datavector.model import BaseModel

log = logging.getLogger(__name__)

STAGES: tuple[Stage, ...] = ("merge", "release")
SETTLE_ROUNDS = 100
PAUSE = timedelta(seconds=10)  # after a full disk or the like
ORPHANS = "versions without a policy"
OBJECTS = "what the objects say"
GRACE = timedelta(days=1)  # for files without an object
COLLECT_EVERY = timedelta(minutes=10)

_LONG_AGO = datetime.min.replace(tzinfo=UTC)


class Jobs(Protocol):
    """What runs the stages of versions."""

    def running(self) -> Collection[str]:
        """Versions with a job that has not ended, one that is being stopped included."""

    def stopping(self) -> Collection[str]:
        """Those of them whose job was told to end."""

    def start(self, version: ModelVersion, stage: Stage) -> None:
        """Runs a stage, unless it runs already."""

    def stop(self, version: str) -> None:
        """Tells a version's job to end."""

    def failures(self) -> Mapping[str, Failure]:
        """Why jobs have failed, by version; until the next start."""

    def troubles(self) -> Mapping[str, tuple[str, str]]:
        """Why running jobs come to nothing, by version: a reason and a sentence."""

    def next_look(self) -> datetime | None:
        """When there may be trouble though nothing happens."""


def log_event(resource: Resource, reason: str, message: str) -> None:
    """Tells of something that a person wants to see."""
    log.info("%s: %s%s", resource.name, reason, message and f" ({message})")


class Reconciler:
    """Keeps planning and carrying out until nothing is left but waiting.

    Args:
        on_settled: called with the registry's policies and what each waits for, whenever that may have changed.
        tell: called for every step that a person wants to see.
        poll: how often hospitals' visits are looked for, where another process stores them.
    """

    def __init__(
        self,
        store: Store,
        registry: Registry,
        jobs: Jobs,
        on_settled: Callable[[dict[str, str]], None] = lambda _: None,
        *,
        tell: Callable[[Resource, str, str], None] = log_event,
        metrics: ReconcileMetrics | None = None,
        poll: timedelta | None = None,
        grace: timedelta = GRACE,
    ) -> None:
        self.store = store
        self.registry = registry
        self.jobs = jobs
        self.on_settled = on_settled
        self._tell = tell
        self._metrics = metrics or ReconcileMetrics()
        self._poll = poll
        self._grace = grace
        self._changed = asyncio.Event()
        self._bases: list[BaseModel] = []
        self._collect_at = _LONG_AGO
        self._logged: dict[str, datetime] = {}

    def wake(self) -> None:
        """Something changed: look again soon."""
        self._changed.set()

    async def run(self, *, in_thread: bool = False, coalesce: float = 0) -> None:
        """Reconciles until cancelled.

        Args:
            in_thread: rounds run beside the event loop, since they wait for a network.
            coalesce: seconds that the first of several changes waits for the others.
        """
        while True:
            self._changed.clear()
            try:
                next_time = await asyncio.to_thread(self.reconcile) if in_thread else self.reconcile()
            except Exception as error:  # withdrawals must still arrive, so nothing here ends the receiver
                self._log_fault(error)
                next_time = utc_now() + PAUSE
            timeout = None if next_time is None else max((next_time - utc_now()).total_seconds(), 0.0)
            try:
                async with asyncio.timeout(timeout):  # wait_for of Python 3.11 may lose a cancellation
                    await self._changed.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(coalesce)

    def reconcile(self) -> datetime | None:
        """Plans and carries out until settled. A fault stops what it concerns, and is logged; all else goes on.

        Returns:
            When to look again though nothing changes; None for never.
        """
        with self._metrics.round() as outcome:
            faults: dict[str, Exception] = {}
            try:
                self.store.check()
            except StoreMissing as error:
                return self._without_store(error, outcome)
            self._bases = self.store.bases()
            for _ in range(SETTLE_ROUNDS):
                worlds = self._observe_all(faults)
                tracks = self._tracks(worlds, faults)
                todo = {name: [each for each in actions if self._is_due(each)] for name, actions in tracks.items()}
                if not any(todo.values()):
                    self._settle(worlds, faults)
                    outcome.faults = len(faults)
                    return self._next_time(tracks, faults)
                for name, actions in todo.items():
                    try:
                        for action in actions:
                            self._carry_out(action)
                    except ApiConflict as error:  # the newer state is planned with in the next round
                        log.debug("%s: %s", name, error)
                    except Exception as error:
                        faults[name] = error
            raise RuntimeError(f"still not settled after {SETTLE_ROUNDS} rounds: {todo}")

    def explain(self, policy: MergePolicy) -> str:
        """What a policy waits for now, as a sentence."""
        self._bases = self.store.bases()
        return explain(self.observe(policy, self.registry.vectors(), self.registry.versions()), utc_now())

    def observe(self, policy: MergePolicy, vectors: Iterable[DataVector], versions: Iterable[ModelVersion]) -> World:
        """What the store and the registry say about a policy now.

        Args:
            vectors: those of its base model, at least.
            versions: those of the policy, at least.
        """
        own = tuple(version for version in versions if version.spec.policy_ref == policy.name)
        names = [version.name for version in own if version.status.phase.unfinished]
        reports = {(name, stage): self.store.report(name, stage) for name in names for stage in STAGES}
        return World(
            policy=policy,
            base=self._base(policy.spec.base_model_ref),
            vectors=tuple(vectors),
            versions=own,
            reports={key: report for key, report in reports.items() if report is not None},
            visits={name: self.store.rounds(name) for name in names},
            running=frozenset(self.jobs.running()),
            refused=_refusal(policy),
        )

    # --- Parts of a round

    def _without_store(self, error: StoreMissing, outcome: Outcome) -> datetime:
        """Revokes what was withdrawn, for which objects suffice, and says on every policy why nothing else is done."""
        for version in revocations(self.registry.vectors(), self.registry.versions(), utc_now()):
            self._carry_out(Save(version))
        faults: dict[str, Exception] = {OBJECTS: error}
        self._settle([], faults)
        outcome.faults = len(faults)
        return utc_now() + PAUSE

    def _observe_all(self, faults: dict[str, Exception]) -> list[World]:
        """The worlds of all policies; what keeps one from being observed becomes a fault of it."""
        by_base, by_policy, worlds = defaultdict(list), defaultdict(list), []
        for vector in self.registry.vectors():
            by_base[vector.spec.base_model_ref].append(vector)
        for version in self.registry.versions():
            by_policy[version.spec.policy_ref].append(version)
        for policy in self.registry.policies():
            try:
                base = self._base(policy.spec.base_model_ref)
                vectors = by_base[base.digest] if base else []
                worlds.append(self.observe(policy, vectors, by_policy[policy.name]))
            except Exception as error:
                faults[policy.name] = error
        return worlds

    def _tracks(self, worlds: list[World], faults: Mapping[str, Exception]) -> dict[str, list[Action]]:
        """What is to be done now, in parts that do not depend on each other, each under a name.

        What objects say comes before what follows from it, and erasing comes early: it may make the room that the
        rest needs.

        Args:
            faults: of the parts that failed, which are left out.
        """
        now, vectors, versions = utc_now(), self.registry.vectors(), self.registry.versions()
        tracks: dict[str, list[Action]] = {OBJECTS: self._states(vectors, versions, now)}
        if all(world.policy.name not in faults for world in worlds) and len(worlds) == len(self.registry.policies()):
            tracks |= self._erasing(worlds, vectors, versions, now)
        names = {policy.name for policy in self.registry.policies()}
        tracks[ORPHANS] = abandon((version for version in versions if version.spec.policy_ref not in names), now)
        for world in worlds:
            tracks[world.policy.name] = self._news_of_jobs(world, now) or plan(world, now)
        return {name: actions for name, actions in tracks.items() if name not in faults}

    def _states(self, vectors: list[DataVector], versions: list[ModelVersion], now: datetime) -> list[Action]:
        """Saves what vectors and base models do not say of themselves yet."""
        merged_in = defaultdict(list)
        for version in versions:
            if version.status.phase is Phase.READY:
                for entry in version.spec.inputs:
                    merged_in[entry.data_vector].append(version.name)
        bases = {base.digest: _base_of(base) for base in self._bases}
        changed: list[Resource] = []
        for vector in vectors:
            size = vector.spec.artifact.size if vector.status.stored_at else self.store.blob_size(vector)
            state = vector_state(
                vector, bases.get(vector.spec.base_model_ref), size, tuple(sorted(merged_in[vector.name])), now
            )
            if state is not vector:
                changed.append(state)
        for base in self.registry.base_models():
            available = base_state(base, available=base.spec.artifact_digest in bases, now=now)
            if available is not base:
                changed.append(available)
        return [Save(resource) for resource in changed]

    def _erasing(
        self, worlds: list[World], vectors: list[DataVector], versions: list[ModelVersion], now: datetime
    ) -> dict[str, list[Action]]:
        wanted = frozenset(vector.name for world in worlds for vector in eligible(world))
        on_disk = frozenset(version.name for version in versions if self.store.has_version(version.name))
        erasing = sweep(versions, vectors, wanted, running=self.jobs.running(), on_disk=on_disk, now=now)
        return {_subject(action): [action] for action in erasing}

    def _news_of_jobs(self, world: World, now: datetime) -> list[Action]:
        """Saves what became of jobs, which decides what is planned next."""
        failures, troubles = self.jobs.failures(), self.jobs.troubles()
        news = []
        for version in world.versions:
            failure = failures.get(version.name)
            reason, message = troubles.get(version.name, ("", ""))
            if failure and not on_record(version, failure):
                log.warning("%s: its job failed: %s", version.name, failure.message)
                news.append(job_failed(version, failure))
            elif message and version.status.phase.unfinished and version.status.message != message:
                news.append(version.with_message(reason, message, now=now))
            elif not message and self._is_over(version):
                news.append(version.with_message(version.status.phase.value, "", now=now))
        return [Save(version) for version in news]

    def _is_over(self, version: ModelVersion) -> bool:
        """Whether a trouble of a version's job has passed; what is said of a failed one stays until the next."""
        status = version.status
        going = version.name in self.jobs.running() and version.name not in self.jobs.stopping()
        return bool(going and status.phase.unfinished and status.message and status.retry_at is None)

    def _is_due(self, action: Action) -> bool:
        """Whether there is something to do; a job that was stopped counts as running until it has ended."""
        stopping = isinstance(action, StopJob) and action.version in self.jobs.stopping()
        return not stopping and not isinstance(action, WakeAt)

    def _settle(self, worlds: list[World], faults: dict[str, Exception]) -> None:
        """Writes down and tells what the policies wait for, logs what went wrong, and collects garbage in its time."""
        now, sentences = utc_now(), {}
        statuses = {world.policy.name: policy_status(world, now) for world in worlds}
        self._metrics.waiting(worlds, now)
        for policy in self.registry.policies():
            if fault := faults.get(policy.name, faults.get(OBJECTS)):
                statuses[policy.name] = policy_fault(policy, fault, now)
            status = statuses[policy.name]
            sentences[policy.name] = status.waiting_for
            if status != policy.status:
                try:
                    self.registry.save(policy.model_copy(update={"status": status}))
                except ApiConflict:
                    self.wake()
                except DataVectorError as error:
                    faults[policy.name] = error
        for each in faults.values():
            self._log_fault(each)
        self.on_settled(sentences)
        if now >= self._collect_at and not faults and self.registry.complete():
            vectors, versions = self.registry.vectors(), self.registry.versions()
            for name in collect_garbage(self.store, vectors, versions, self._grace, now):
                log.info("%s: erased, as no object names it", name)
            self._collect_at = now + min(COLLECT_EVERY, max(self._grace, timedelta(seconds=1)))

    def _next_time(self, tracks: Mapping[str, list[Action]], faults: Mapping[str, Exception]) -> datetime | None:
        now = utc_now()
        times = [action.time for actions in tracks.values() for action in actions if isinstance(action, WakeAt)]
        times += [now + PAUSE for _ in faults]
        times += [self._collect_at] if self._collect_at > now else []
        times += [time for time in [self.jobs.next_look()] if time]
        if self._lacks_files():
            times.append(now + (self._poll or PAUSE))
        if self._poll and any(version.status.phase is Phase.CALIBRATING for version in self.registry.versions()):
            times.append(now + self._poll)
        return min(times, default=None)

    def _lacks_files(self) -> bool:
        """Whether an object waits for a file of the store, which nobody tells of."""
        policies, vectors = self.registry.policies(), self.registry.vectors()
        without_base = any(self._base(policy.spec.base_model_ref) is None for policy in policies)
        return without_base or any(vector.granted and vector.status.stored_at is None for vector in vectors)

    def _base(self, reference: str) -> Base | None:
        match find_bases(self._bases, self.registry.base_reference(reference)):
            case [base]:
                return _base_of(base)
        return None

    def _carry_out(self, action: Action) -> None:
        match action:
            case CreateVersion(version):
                added = self.registry.add_version(version)
                self._tell(added, "Created", f"merging the vectors of {', '.join(version.hospitals)}")
            case Save(resource):
                self.registry.save(resource)
                if isinstance(resource, ModelVersion):
                    self._tell(resource, resource.status.phase.value, resource.status.message)
            case RunJob(name, stage):
                version = self._version(name)
                self.store.write_version(name, version.dump())
                self.jobs.start(version, stage)
            case StopJob(name):
                self.jobs.stop(name)
            case EraseVersion(name):
                self.store.erase_version(name)
            case EraseBlob(vector):
                self.store.erase_blob(vector.spec.hospital, vector.spec.artifact.digest)
                self.registry.save(vector)
                self._tell(vector, "Erased", "")

    def _version(self, name: str) -> ModelVersion:
        return next(version for version in self.registry.versions() if version.name == name)

    def _log_fault(self, error: Exception) -> None:
        """Logs a fault, and the same one again only when it was tried again in its time."""
        now, foreseen = utc_now(), isinstance(error, (DataVectorError, OSError))
        if now - self._logged.get(str(error), _LONG_AGO) >= 0.9 * PAUSE:
            self._logged = {text: at for text, at in self._logged.items() if now - at < PAUSE} | {str(error): now}
            log.error("%s; trying again in %d seconds", error, PAUSE.seconds, exc_info=None if foreseen else error)


def _base_of(base: BaseModel) -> Base:
    return Base(base.digest, has_batchnorm=bool(base.batchnorm_layers), vector_size=base.vector_layout.size)


def _refusal(policy: MergePolicy) -> str:
    try:
        choose(policy.spec.method.name, policy.spec.method.parameters)
    except ConfigError as error:
        return str(error)
    return ""


def _subject(action: Action) -> str:
    """What an erasing action is about, as the name of its part of a round."""
    match action:
        case EraseBlob(vector):
            return f"the blob of {vector.name}"
        case StopJob(version) | EraseVersion(version):
            return f"the files of {version}"
    raise TypeError(f"{action} erases nothing")
