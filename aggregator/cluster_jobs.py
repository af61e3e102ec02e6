"""Jobs in a cluster: each stage is a Kubernetes Job, whose state and Pods watches keep current."""

from __future__ import annotations

import threading
from collections.abc import Mapping
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
PATIENCE = timedelta(seconds=10)  # in which a new Job should have made its Pod

_NO_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
_STUCK = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff"}
_TURNS = {"ErrImagePull": "ImagePullBackOff"}  # a kubelet's answer alternates between the two


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
        self._gone: dict[Kind, dict[str, int]] = {JOBS: {}, PODS: {}}  # since the last list: name and resource version
        self._counted: set[str] = set()

    def load(self) -> None:
        """Lists Jobs and Pods anew; what the watches have told meanwhile stays."""
        for kind in (JOBS, PODS):
            found: list[Object] = []
            listed_at = int(self._api.list(kind, found.append, selector=SELECTOR))
            with self._lock:
                known = self._objects[kind]
                names = {content["metadata"]["name"] for content in found}
                for name in [name for name in known if name not in names and _revision(known[name]) <= listed_at]:
                    del known[name]
            for content in found:
                self.observe(kind, content)
            with self._lock:
                self._gone[kind].clear()

    def observe(self, kind: Kind, content: Object, *, gone: bool = False) -> bool:
        """Takes note of a Job's or a Pod's newest state.

        Returns:
            Whether that is news.
        """
        name, version = content["metadata"]["name"], _revision(content)
        with self._lock:
            known = self._objects[kind].get(name)
            newest = _revision(known) if known else self._gone[kind].get(name, 0)
            if newest >= version:
                return False
            if gone:
                self._objects[kind].pop(name, None)
                self._gone[kind][name] = version
            else:
                self._objects[kind][name] = content
                if kind == JOBS and (result := _result(content)):
                    self._count(content, result)
            return True

    def running(self) -> frozenset[str]:
        unfinished = (job for job in self._jobs() if _result(job) is None or _ending(job))
        return frozenset(_version(job) for job in unfinished if not self._replaceable(job)) | self._outlived()

    def stopping(self) -> frozenset[str]:
        return frozenset(_version(job) for job in self._jobs() if _ending(job)) | self._outlived()

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
            if condition is None or _ending(job) or self._stale(job):
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
            if _result(job) is None and not _ending(job) and not self._stale(job) and (trouble := self._trouble(job))
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
        own = [pod for pod in pods if job["metadata"]["uid"] in _owners(pod)]
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

    def _version_of(self, job: Object) -> ModelVersion | None:
        return next((each for each in self._registry.versions() if each.name == _version(job)), None)

    def _stale(self, job: Object) -> bool:
        """Whether a Job is of a version that was deleted, though one of that name is there again."""
        version = self._version_of(job)
        return version is not None and version.metadata.uid not in _owners(job)

    def _outlived(self) -> frozenset[str]:
        """Versions with a Pod that has not ended though its Job is gone: kubectl deletes Jobs before their Pods."""
        here = {job["metadata"]["uid"] for job in self._jobs()}
        with self._lock:
            pods = [pod for pod in self._objects[PODS].values() if VERSION in pod["metadata"].get("labels", {})]
        alive = (pod for pod in pods if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed"))
        return frozenset(_version(pod) for pod in alive if not here & _owners(pod))

    def _replaceable(self, job: Object) -> bool:
        """Whether a Job comes to nothing, and one as its policy is now would be another."""
        if _result(job) or _ending(job) or self._stale(job) or not self._trouble(job):
            return False
        version = self._version_of(job)
        if version is None or not version.status.phase.unfinished:  # it is to be stopped
            return False
        if any(pod.get("status", {}).get("phase") == "Running" for pod in self._pods(job)):
            return False
        stage = job["metadata"]["labels"][STAGE]
        wanted = merge_job(version, stage, self._settings(version.spec.policy_ref), self.defaults)
        return bool(wanted["metadata"]["annotations"] != job["metadata"].get("annotations"))

    def _failure(self, job: Object, condition: Object, at: datetime) -> Failure:
        ended = [_why(each) for each in map(_terminated, self._pods(job)) if each]
        said = (ended[-1] if ended else "") or condition["message"]
        if condition.get("reason") == "PodFailurePolicy":
            again = f"to have it made again then, delete the ModelVersion {_version(job)}"
            return Failure(f"{said}; {again}", passing=False, at=at, tries=ATTEMPTS)
        return Failure(said, passing=True, at=at)

    def _trouble(self, job: Object) -> tuple[str, str] | None:
        """Why a Job that has not ended does not run."""
        name = job["metadata"]["name"]
        pods = self._pods(job)
        if not pods:
            if utc_now() - _created(job) < PATIENCE:
                return None
            return "NoPod", f"the Job {name} has made no Pod; kubectl describe job {name} says why"
        newest = pods[-1]
        look = f"kubectl describe pod {newest['metadata']['name']} says why"
        for status in newest.get("status", {}).get("containerStatuses", ()):
            waiting = status.get("state", {}).get("waiting") or {}
            reason = _TURNS.get(waiting.get("reason", ""), waiting.get("reason"))
            if reason in _NO_IMAGE:
                image = newest["spec"]["containers"][0]["image"]
                return reason, f"the node cannot get the image {image}; {look}; set job.image in the policy to another"
            if reason in _STUCK:
                return reason, f"the container cannot start: {waiting.get('message') or reason}; {look}"
        for condition in newest.get("status", {}).get("conditions", ()):
            if (condition["type"], condition["status"]) == ("PodScheduled", "False"):
                text = condition.get("message", "no node takes it")
                return condition.get("reason", "Unschedulable"), f"the Pod of {name} waits for a node: {text}"
        failed = [each for each in (_terminated(pod) for pod in pods if not _lost(pod)) if each and each["exitCode"]]
        if failed:
            return "PodFailed", f"{_why(failed[-1]) or 'the Pod failed'}; Kubernetes tries again"
        return None

    def _count(self, job: Object, result: Object) -> None:
        """Counts the result of a Job once."""
        if job["metadata"]["uid"] not in self._counted:
            self._counted.add(job["metadata"]["uid"])
            reason = result.get("reason") or result["type"]
            self._metrics.jobs.labels(job["metadata"].get("labels", {}).get(STAGE, ""), result["type"], reason).inc()


def _version(job: Object) -> str:
    return str(job["metadata"]["labels"][VERSION])


def _revision(content: Object) -> int:
    return int(content["metadata"]["resourceVersion"])


def _owners(content: Object) -> set[str]:
    """The uids of an object's owners."""
    return {owner["uid"] for owner in content["metadata"].get("ownerReferences", ())}


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


def _terminated(pod: Object) -> Object | None:
    """How a Pod's container has ended, or None while it has not."""
    for status in pod.get("status", {}).get("containerStatuses", ()):
        if status["name"] == CONTAINER and (ended := status.get("state", {}).get("terminated")):
            return dict(ended)
    return None


def _lost(pod: Object) -> bool:
    """Whether a Pod ended with its node, or for another reason that is not its own."""
    return any(
        (each["type"], each["status"]) == ("DisruptionTarget", "True")
        for each in pod.get("status", {}).get("conditions", ())
    )


def _why(ended: Object) -> str:
    """What a container said when it ended; empty where it said nothing."""
    if ended.get("reason") == "OOMKilled":
        return "the Job was killed for want of memory; raise job.resources.limits.memory in the policy"
    return str(ended.get("message") or "").strip().rpartition("\n")[2]
