"""Which Jobs count as running: those that are left alone, replaced, or stopped."""

from __future__ import annotations

import pytest

from aggregator.cluster import Cache, ClusterRegistry
from aggregator.cluster_jobs import ClusterJobs
from aggregator.kube import JOBS, PODS
from aggregator.manifests import JobDefaults, merge_job
from aggregator.metrics import OperatorMetrics
from aggregator.resources import JobSettings, MergePolicy, ModelVersion, Phase
from aggregator.store import Store
from tests.aggregator.objects import policy, vector, version

NO_IMAGE = {"name": "job", "state": {"waiting": {"reason": "ImagePullBackOff"}}}
AT = {"creationTimestamp": "2030-01-01T00:00:00Z"}


@pytest.mark.parametrize(("phase", "running"), [(Phase.PENDING, False), (Phase.REVOKED, True), (Phase.FAILED, True)])
def test_a_stuck_job_is_replaced_by_one_of_the_new_settings_only_while_its_version_is_wanted(tmp_path, phase, running):
    brain = policy()
    north = version(brain, vector("north"), vector("south"), phase=phase)
    cache, defaults = Cache(), JobDefaults("new-image", "store")
    for kind, resource in ((MergePolicy, brain), (ModelVersion, north)):
        content = resource.dump()
        content["metadata"] |= {"uid": "u", "resourceVersion": "1"}
        cache.observe(kind, content)
    jobs = ClusterJobs(None, ClusterRegistry(None, cache), Store(tmp_path), defaults, OperatorMetrics())
    job = merge_job(cache.get(ModelVersion, north.name), "merge", JobSettings(image="old-image"), defaults)
    job["metadata"] |= {"uid": "j", "resourceVersion": "2", **AT}
    owner = {"uid": "j"}
    pod = {"name": "p", "uid": "p", "resourceVersion": "3", "ownerReferences": [owner], **AT}
    spec = {"containers": [{"image": "old-image"}]}
    jobs.observe(JOBS, job)
    jobs.observe(PODS, {"metadata": pod, "spec": spec, "status": {"containerStatuses": [NO_IMAGE]}})
    assert jobs.running() == ({north.name} if running else frozenset())


@pytest.mark.parametrize(("stage", "pods", "shared"), [("merge", 3, True), ("merge", 1, False), ("release", 3, False)])
def test_only_a_merge_is_shared_and_its_pods_know_of_how_many_they_are_one(stage, pods, shared):
    made = version(policy(), vector("north"), vector("south"))
    job = merge_job(made, stage, JobSettings(parallelism=pods), JobDefaults("image", "store"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert ("--share-of=3" in container["args"]) == shared
    indexed = {"completionMode": "Indexed", "completions": 3, "parallelism": 3}
    assert {key: job["spec"][key] for key in indexed if key in job["spec"]} == (indexed if shared else {})
