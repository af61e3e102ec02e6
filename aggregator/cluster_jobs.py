"""Jobs in a cluster: each stage is a Kubernetes Job, whose state and Pods watches keep current."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta

from aggregator.cluster import ClusterRegistry
from aggregator.kube import JOBS, PODS, Api, Kind, Object
from aggregator.manifests import CONTAINER, OWN, STAGE, VERSION, JobDefaults, job_name, merge_job
from aggregator.metrics import OperatorMetrics
from aggregator.reconcile import ATTEMPTS, Failure, Stage
from aggregator.resources import JobSettings, ModelVersion, utc_now
from aggregator.store import Store
from datavector.errors import ApiConflict, ObjectMissing

SELECTOR = ",".join(f"{key}={value}" for key, value in OWN.items())
PATIENCE = timedelta(seconds=30)  # in which a new Job should have made its Pod

_STUCK = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError"}
_STUCK |= {"CreateContainerError", "RunContainerError", "RegistryUnavailable", "CrashLoopBackOff"}


class ClusterJobs:
    """The Jobs of one namespace. Threads may share it.

    Attributes:
        defaults: what Jobs need besides their policy.
    """

    def __init__(
        self, api: Api, registry: ClusterRegistry, store: Store, defaults: JobDefaults, metrics: OperatorMetrics
    ) -> None:
        self.defaults = defaults
        self._api = api
        self._registry = registry
        self._store = store
        self._metrics = metrics
        self._lock = threading.Lock()
        self._objects: dict[Kind, dict[str, Object]] = {JOBS: {}, PODS: {}}
        self._counted: set[str] = set()

    def load(self) -> None:
        """Lists Jobs and Pods anew."""
        for kind in (JOBS, PODS):
            found: dict[str, Object] = {}
            self._api.list(kind, lambda content, into=found: into.update({content["metadata"]["name"]: content}),  # type: ignore[misc]
                           selector=SELECTOR)  # fmt: skip
            with self._lock:
                self._objects[kind] = found

    def observe(self, kind: Kind, content: Object, *, gone: bool = False) -> bool:
        """Takes note of a Job's or a Pod's newest state.

        Returns:
            Whether that is news.
        """
        name, version = content["metadata"]["name"], int(content["metadata"]["resourceVersion"])
        with self._lock:
            known = self._objects[kind].get(name)
            if known and int(known["metadata"]["resourceVersion"]) >= version:
                return False
            if gone:
                self._objects[kind].pop(name, None)
            else:
                self._objects[kind][name] = content
                if kind == JOBS and (result := _result(content)):
                    self._count(content, result)
            return True

    def running(self) -> frozenset[str]:
        unfinished = (job for job in self._jobs() if _result(job) is None or _ending(job))
        return frozenset(_version(job) for job in unfinished if not self._replaceable(job))

    def stopping(self) -> frozenset[str]:
        return frozenset(_version(job) for job in self._jobs() if _ending(job))

    def start(self, version: ModelVersion, stage: Stage) -> None:
        """Creates the Job of a stage; one that has failed, or cannot start as it was made, is deleted first."""
        name = job_name(version.name, stage)
        known = self._objects[JOBS].get(name)
        if known is None:
            self._create(version, stage)
        elif not _ending(known):
            self._delete(name)

    def stop(self, version: str) -> None:
        for job in self._jobs():
            if _version(job) == version and not _ending(job):
                self._delete(job["metadata"]["name"])

    def failures(self) -> Mapping[str, Failure]:
        found = {}
        for job in self._jobs():
            name, stage = _version(job), job["metadata"]["labels"][STAGE]
            condition = _result(job)
            if condition is None or _ending(job):
                continue
            at = datetime.fromisoformat(condition["lastTransitionTime"])
            if condition["type"] == "Failed":
                found[name] = self._failure(job, condition, at)
            elif self._store.report(name, stage) is None:
                message = f"the Job {job['metadata']['name']} has completed, but the store has no report of it"
                found[name] = Failure(f"{message}; mount the operator's store in its Pods", passing=True, at=at)
        return found

    def troubles(self) -> Mapping[str, tuple[str, str]]:
        return {
            _version(job): trouble
            for job in self._jobs()
            if _result(job) is None and not _ending(job) and (trouble := self._trouble(job))
        }

    def next_look(self) -> datetime | None:
        """When a Job that has made no Pod yet becomes a trouble."""
        waiting = [_created(job) + PATIENCE for job in self._jobs() if _result(job) is None and not self._pods(job)]
        return min((time for time in waiting if time > utc_now()), default=None)

    # --- Parts

    def _jobs(self) -> list[Object]:
        with self._lock:
            return [job for job in self._objects[JOBS].values() if VERSION in job["metadata"].get("labels", {})]

    def _pods(self, job: Object) -> list[Object]:
        with self._lock:
            pods = list(self._objects[PODS].values())
        uid = job["metadata"]["uid"]
        own = [pod for pod in pods if any(owner["uid"] == uid for owner in pod["metadata"].get("ownerReferences", ()))]
        return sorted(own, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))

    def _create(self, version: ModelVersion, stage: Stage) -> None:
        manifest = merge_job(version, stage, self._settings(version.spec.policy_ref), self.defaults)
        try:
            answer = self._api.create(JOBS, manifest)
        except ApiConflict:
            answer = self._api.get(JOBS, manifest["metadata"]["name"])
        self.observe(JOBS, answer)

    def _delete(self, name: str) -> None:
        try:
            self.observe(JOBS, self._api.delete(JOBS, name))
        except ObjectMissing:
            with self._lock:
                self._objects[JOBS].pop(name, None)

    def _settings(self, policy: str) -> JobSettings:
        for each in self._registry.policies():
            if each.name == policy:
                return each.spec.job
        return JobSettings()

    def _replaceable(self, job: Object) -> bool:
        """Whether a Job comes to nothing, and one as its policy is now would be another."""
        if _result(job) or _ending(job) or not self._trouble(job):
            return False
        name, stage = _version(job), job["metadata"]["labels"][STAGE]
        version = next((each for each in self._registry.versions() if each.name == name), None)
        if version is None:
            return False
        wanted = merge_job(version, stage, self._settings(version.spec.policy_ref), self.defaults)
        return bool(wanted["metadata"]["annotations"] != job["metadata"].get("annotations"))

    def _failure(self, job: Object, condition: Object, at: datetime) -> Failure:
        terminated = list(_terminated(self._pods(job)))
        said = terminated[-1].get("message", "").strip().rpartition("\n")[2] if terminated else ""
        if condition.get("reason") == "PodFailurePolicy":
            return Failure(said or condition["message"], passing=False, at=at, tries=ATTEMPTS)
        if terminated and terminated[-1].get("reason") == "OOMKilled":
            said = "the Job was killed for want of memory; raise job.resources.limits.memory in the policy"
        return Failure(said or condition["message"], passing=True, at=at)

    def _trouble(self, job: Object) -> tuple[str, str] | None:
        """Why a Job that has not ended does not run."""
        name = job["metadata"]["name"]
        pods = self._pods(job)
        if not pods:
            if utc_now() - _created(job) < PATIENCE:
                return None
            return "NoPod", f"the Job {name} has made no Pod; kubectl describe job {name} says why"
        newest = pods[-1]
        for status in newest.get("status", {}).get("containerStatuses", ()):
            waiting = status.get("state", {}).get("waiting") or {}
            if waiting.get("reason") in _STUCK:
                text = waiting.get("message") or "the container cannot start"
                image = newest["spec"]["containers"][0]["image"]
                return waiting["reason"], f"{image}: {text}; set job.image in the policy to one that the node can get"
        for condition in newest.get("status", {}).get("conditions", ()):
            if (condition["type"], condition["status"]) == ("PodScheduled", "False"):
                text = condition.get("message", "no node takes it")
                return condition.get("reason", "Unschedulable"), f"the Pod of {name} waits for a node: {text}"
        return None

    def _count(self, job: Object, result: Object) -> None:
        """Counts the result of a Job once."""
        if job["metadata"]["uid"] not in self._counted:
            self._counted.add(job["metadata"]["uid"])
            reason = result.get("reason") or result["type"]
            self._metrics.jobs.labels(job["metadata"].get("labels", {}).get(STAGE, ""), result["type"], reason).inc()


def _version(job: Object) -> str:
    return str(job["metadata"]["labels"][VERSION])


def _created(job: Object) -> datetime:
    return datetime.fromisoformat(job["metadata"]["creationTimestamp"])


def _ending(job: Object) -> bool:
    return "deletionTimestamp" in job["metadata"]


def _result(job: Object) -> Object | None:
    """The condition that says how a Job has ended, or None while it runs."""
    for condition in job.get("status", {}).get("conditions", ()):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return dict(condition)
    return None


def _terminated(pods: list[Object]) -> Iterator[Object]:
    for pod in pods:
        for status in pod.get("status", {}).get("containerStatuses", ()):
            if status["name"] == CONTAINER and (ended := status.get("state", {}).get("terminated")):
                yield ended
