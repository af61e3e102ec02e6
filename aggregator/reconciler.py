"""Carries out what `aggregator.reconcile` plans, with whatever registry and whatever runs jobs.

A round observes, plans and carries out without awaiting anything. In the embedded mode that is also how a withdrawal
(which the receiver records in the same thread) is never overwritten by an older state; in a cluster it is each
object's resource version.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from operator import is_
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
    Vectors,
    WakeAt,
    World,
    abandon,
    base_state,
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
from datavector.model import BaseModel

log = logging.getLogger(__name__)

STAGES: tuple[Stage, ...] = ("merge", "restore", "release")
SETTLE_ROUNDS = 100
PAUSE = timedelta(seconds=10)  # after a full disk or the like
_NONE = Vectors()
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
        self._facts: dict[str, Base] = {}
        self._vectors = Vectors()
        self._by_base: dict[str, Vectors] = {}
        self._worlds: dict[str, World] = {}
        self._silent: dict[str, DataVector] = {}
        self._silent_while: object = None
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
            self._look_for_bases()
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
        self._look_for_bases()
        vectors, versions, running = self.registry.vectors(), self.registry.versions(), self.jobs.running()
        return explain(self._observe(policy, vectors, versions, running), utc_now())

    # --- Parts of a round

    def _without_store(self, error: StoreMissing, outcome: Outcome) -> datetime:
        """Revokes what was withdrawn, for which objects suffice, and says on every policy why nothing else is done."""
        faults: dict[str, Exception] = {OBJECTS: error}
        for version in revocations(self.registry.vectors(), self.registry.versions(), utc_now()):
            try:
                self._carry_out(Save(version))
            except Exception as reason:
                faults[_revocation(version)] = reason
        self._settle([], faults)
        outcome.faults = len(faults)
        return utc_now() + PAUSE

    def _look_for_bases(self) -> None:
        self._bases = self.store.bases()
        self._facts = {base.digest: _base_of(base) for base in self._bases}

    def _list_vectors(self) -> None:
        """Lists the vectors, and keeps those of a base model that are the same as before with all that they know."""
        listed = self.registry.vectors()
        if _same(self._vectors, listed):
            return
        self._vectors = Vectors(listed)
        grouped = defaultdict(list)
        for vector in listed:
            grouped[vector.spec.base_model_ref].append(vector)
        known = self._by_base
        self._by_base = {
            base: known[base] if _same(known.get(base, ()), vectors) else Vectors(vectors)
            for base, vectors in grouped.items()
        }

    def _observe_all(self, faults: dict[str, Exception]) -> list[World]:
        """The worlds of all policies; what keeps one from being observed becomes a fault of it.

        A world in which nothing has changed is the one of before, with all that it knows.
        """
        self._list_vectors()
        by_policy, worlds, running = defaultdict(list), [], self.jobs.running()
        for version in self.registry.versions():
            by_policy[version.spec.policy_ref].append(version)
        for policy in self.registry.policies():
            try:
                base = self._base(policy.spec.base_model_ref)
                vectors = self._by_base.get(base.digest, _NONE) if base else _NONE
                world = self._observe(policy, vectors, by_policy[policy.name], running)
                known = self._worlds.get(policy.name)
                worlds.append(known if known and known.vectors is vectors and known == world else world)
            except Exception as error:
                faults[policy.name] = error
        self._worlds = {world.policy.name: world for world in worlds}
        return worlds

    def _observe(
        self,
        policy: MergePolicy,
        vectors: Iterable[DataVector],
        versions: Iterable[ModelVersion],
        running: Collection[str],
    ) -> World:
        """What the store and the registry say about a policy now.

        Args:
            vectors: those of its base model, at least.
            versions: those of the policy, at least.
            running: versions with a running job.
        """
        base, vectors = self._base(policy.spec.base_model_ref), Vectors.of(vectors)
        own = tuple(version for version in versions if version.spec.policy_ref == policy.name)
        names = [version.name for version in own if version.status.phase.unfinished]
        reports = {(name, stage): self.store.report(name, stage) for name in names for stage in STAGES}
        return World(
            policy=policy,
            base=base,
            vectors=vectors,
            versions=own,
            reports={key: report for key, report in reports.items() if report is not None},
            visits={name: self.store.rounds(name) for name in names},
            evaluations={
                version.name: self.store.evaluations(version.name)
                for version in own
                if version.status.phase is Phase.EVALUATING
            },
            statistics=self._statistics(policy, base, vectors),
            running=frozenset(running),
            refused=_refusal(policy),
        )

    def _statistics(self, policy: MergePolicy, base: Base | None, vectors: Vectors) -> dict[str, list[str]]:
        """Kinds that are here of the vectors that may be merged, where the policy's method reads more than those."""
        if base is None or not policy.spec.method.statistics:
            return {}
        return {
            vector.name: sorted(self.store.statistics(vector.spec.hospital, vector.spec.artifact.digest))
            for vector in vectors.usable.get(base.digest, ())
        }

    def _tracks(self, worlds: list[World], faults: Mapping[str, Exception]) -> dict[str, list[Action]]:
        """What is to be done now, in parts that do not depend on each other, each under a name.

        What objects say comes before what follows from it, and erasing comes early: it may make the room that the
        rest needs.

        Args:
            faults: of the parts that failed, which are left out.
        """
        now, versions = utc_now(), self.registry.versions()
        # Whatever became of their policies: nothing else is done before it was tried to revoke each of them.
        revoked = {_revocation(version): version for version in revocations(self._vectors, versions, now)}
        if untried := {name: version for name, version in revoked.items() if name not in faults}:
            return {name: [Save(version)] for name, version in untried.items()}
        tracks: dict[str, list[Action]] = {OBJECTS: self._states(versions, now)}
        if all(world.policy.name not in faults for world in worlds) and len(worlds) == len(self.registry.policies()):
            tracks |= self._erasing(versions, now)
        names = {policy.name for policy in self.registry.policies()}
        tracks[ORPHANS] = abandon((version for version in versions if version.spec.policy_ref not in names), now)
        failures, troubles = self.jobs.failures(), self.jobs.troubles()
        for world in worlds:
            planned = _news_of_jobs(world, failures, troubles, now) or plan(world, now)
            tracks[world.policy.name] = [each for each in planned if not _makes(each, revoked.values())]
        return {name: actions for name, actions in tracks.items() if name not in faults}

    def _states(self, versions: list[ModelVersion], now: datetime) -> list[Action]:
        """Saves what vectors and base models do not say of themselves yet."""
        changed: list[Resource] = [*self._states_of_vectors(versions, now)]
        for base in self.registry.base_models():
            available = base_state(base, available=base.spec.artifact_digest in self._facts, now=now)
            if available is not base:
                changed.append(available)
        return [Save(resource) for resource in changed]

    def _states_of_vectors(self, versions: list[ModelVersion], now: datetime) -> Iterator[DataVector]:
        """Vectors that do not say of themselves what is known.

        One that was silent, and whose file is not to be looked for, stays so as long as nothing has changed.
        """
        merged_in = defaultdict(list)
        for version in versions:
            if version.status.phase is Phase.READY:
                for entry in version.spec.inputs:
                    merged_in[entry.data_vector].append(version.name)
        context = self._facts, merged_in
        before = self._silent if context == self._silent_while else {}
        self._silent, self._silent_while = {}, context
        for vector in self._vectors:
            if before.get(vector.name) is not vector:
                base, stored = self._facts.get(vector.spec.base_model_ref), vector.status.stored_at
                size = vector.spec.artifact.size if stored else self.store.blob_size(vector)
                state = vector_state(vector, base, size, tuple(sorted(merged_in.get(vector.name, ()))), now)
                if state is not vector:
                    yield state
                if state is not vector or not stored:
                    continue
            self._silent[vector.name] = vector

    def _erasing(self, versions: list[ModelVersion], now: datetime) -> dict[str, list[Action]]:
        on_disk = frozenset(version.name for version in versions if self.store.has_version(version.name))
        erasing = sweep(versions, self._vectors, running=self.jobs.running(), on_disk=on_disk, now=now)
        return {_subject(action): [action] for action in erasing}

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
            if policy.name not in statuses:  # it has come since
                self.wake()
                continue
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
        if self._lacks_files() or self._vectors.quarantined:  # a person may release one
            times.append(now + (self._poll or PAUSE))
        asking = (Phase.MEASURING, Phase.CALIBRATING, Phase.EVALUATING)
        asked = any(version.status.phase in asking or version.status.unmeasured for version in self.registry.versions())
        if self._poll and asked:
            times.append(now + self._poll)
        return min(times, default=None)

    def _lacks_files(self) -> bool:
        """Whether an object waits for a file of the store, which nobody tells of."""
        without_base = any(self._base(policy.spec.base_model_ref) is None for policy in self.registry.policies())
        return without_base or any(vector.granted and vector.status.stored_at is None for vector in self._vectors)

    def _base(self, reference: str) -> Base | None:
        match find_bases(self._bases, self.registry.base_reference(reference)):
            case [base]:
                return self._facts[base.digest]
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
        found = next((version for version in self.registry.versions() if version.name == name), None)
        if found is None:  # since the plan was made
            raise ApiConflict(f"{ModelVersion.kind_name} {name}", "it was deleted")
        return found

    def _log_fault(self, error: Exception) -> None:
        """Logs a fault, and the same one again only when it was tried again in its time."""
        now, foreseen = utc_now(), isinstance(error, (DataVectorError, OSError))
        if now - self._logged.get(str(error), _LONG_AGO) >= 0.9 * PAUSE:
            self._logged = {text: at for text, at in self._logged.items() if now - at < PAUSE} | {str(error): now}
            log.error("%s; trying again in %d seconds", error, PAUSE.seconds, exc_info=None if foreseen else error)


def _base_of(base: BaseModel) -> Base:
    return Base(
        base.digest,
        has_batchnorm=bool(base.batchnorm_layers),
        vector_size=base.vector_layout.size,
        has_head=base.head is not None,
    )


def _same(before: Collection[DataVector], now: Collection[DataVector]) -> bool:
    """Whether both are the very same objects."""
    return len(before) == len(now) and all(map(is_, before, now))


def _news_of_jobs(
    world: World, failures: Mapping[str, Failure], troubles: Mapping[str, tuple[str, str]], now: datetime
) -> list[Action]:
    """Saves what became of jobs, which decides what is planned next."""
    news = []
    for version in world.versions:
        failure = failures.get(version.name)
        reason, message = troubles.get(version.name, ("", ""))
        if failure and not on_record(version, failure):
            log.warning("%s: its job failed: %s", version.name, failure.message)
            news.append(job_failed(version, failure))
        elif message and version.status.phase.unfinished and version.status.message != message:
            news.append(version.with_message(reason, message, now=now))
        elif not message and version.name in world.running and _is_over(version):
            news.append(version.with_message(version.status.phase.value, "", now=now))
    return [Save(version) for version in news]


def _is_over(version: ModelVersion) -> bool:
    """Whether a trouble that a version tells of has passed, now that its job runs; a failure stays until the next."""
    status = version.status
    return status.phase.unfinished and bool(status.message) and status.retry_at is None


def _refusal(policy: MergePolicy) -> str:
    try:
        policy.spec.method.check()
    except ConfigError as error:
        return str(error)
    return ""


def _makes(action: Action, versions: Collection[ModelVersion]) -> bool:
    return isinstance(action, RunJob) and action.version in {version.name for version in versions}


def _revocation(version: ModelVersion) -> str:
    return f"the revocation of {version.name}"


def _subject(action: Action) -> str:
    """What an erasing action is about, as the name of its part of a round."""
    match action:
        case EraseBlob(vector):
            return f"the blob of {vector.name}"
        case StopJob(version) | EraseVersion(version):
            return f"the files of {version}"
    raise TypeError(f"{action} erases nothing")
