"""The oldest Kubernetes takes what the charts make, in a namespace that allows only restricted Pods."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.charts.rendering import (
    AGENT,
    AGGREGATOR,
    CHARTS,
    NAMESPACE,
    SET_IDS,
    SETS,
    Json,
    find,
    pod_of,
    render,
    run_helm,
)
from tests.cluster.client import Cluster
from tests.cluster.control_plane import ControlPlane
from tests.cluster.fixtures import establish_definitions

LEVELS = ("enforce", "warn")  # only Pods are refused; for what makes them there is a warning
FOREIGN = ("cert-manager.io/v1", "monitoring.coreos.com/v1")  # not known to this server


@pytest.fixture(scope="module")
def site(floor: ControlPlane) -> Cluster:
    """The oldest Kubernetes with the definitions, a restricted namespace, and what the sets of values name."""
    establish_definitions(floor)
    restricted = {f"pod-security.kubernetes.io/{level}": "restricted" for level in LEVELS}
    for each in (
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": restricted}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": NAMESPACE}},
        {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "low"}, "value": -1},
        {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nvidia"}, "handler": "nvidia"},
    ):
        floor.kubectl("apply", "-f", "-", input=each)
    return floor


def dry_run(cluster: Cluster, objects: list[Json]) -> None:
    """Asks the API server whether it would take objects; unknown fields and warnings are failures."""
    answer = subprocess.run(
        [
            cluster.program, f"--kubeconfig={cluster.kubeconfig}", "apply", "--dry-run=server", "--validate=strict",
            "--warnings-as-errors", f"--namespace={NAMESPACE}", "--filename=-",
        ],
        input=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}),
        capture_output=True,
        text=True,
    )  # fmt: skip
    if answer.returncode or answer.stderr:
        pytest.fail(answer.stderr)


@pytest.mark.parametrize(("chart", "name", "values"), SETS, ids=SET_IDS)
def test_the_server_takes_every_object_and_every_pod_without_a_warning(
    helm: Path, site: Cluster, chart: str, name: str, values: Json
):
    objects = [each for each in render(helm, chart, values) if each["apiVersion"] not in FOREIGN]
    for account in (each for each in objects if each["kind"] == "ServiceAccount"):
        site.kubectl("apply", "-f", "-", input=account)  # a Pod needs its account
    dry_run(site, objects)
    pods = [(each["metadata"]["name"], pod_of(each)) for each in objects]
    dry_run(site, [bare(f"{name}-{at}", pod) for at, (name, pod) in enumerate(pods) if pod])


def test_the_definitions_are_taken_and_stay_when_their_chart_is_removed(helm: Path, site: Cluster):
    dry_run(site, render(helm, "crds", {}))
    notes = run_helm(
        helm, "install", "definitions", str(CHARTS / "crds"), "--take-ownership", f"--namespace={NAMESPACE}",
        kubeconfig=site.kubeconfig,
    )  # fmt: skip
    assert "kubectl explain" in notes
    run_helm(helm, "uninstall", "definitions", f"--namespace={NAMESPACE}", kubeconfig=site.kubeconfig)
    kept = site.kubectl("get", "crd", "--output=name")
    assert all(f"{kind}.datavector.dev" in kept for kind in ("basemodels", "datavectors", "mergepolicies"))


def bare(name: str, template: Json) -> Json:
    """A Pod as a workload makes it."""
    pod = copy.deepcopy(template)
    pod["metadata"] = {**pod["metadata"], "name": name}
    pod["spec"].setdefault("restartPolicy", "Always")
    return {"apiVersion": "v1", "kind": "Pod", **pod}


def test_a_pod_that_is_not_restricted_would_have_been_refused(helm: Path, site: Cluster):
    pod = bare("root", pod_of(find(render(helm, "agent", AGENT), "Deployment")) or {})
    pod["spec"]["securityContext"]["runAsNonRoot"] = False
    with pytest.raises(pytest.fail.Exception, match="violates PodSecurity"):
        dry_run(site, [pod])


@pytest.fixture
def release(helm: Path, site: Cluster) -> Callable[..., str]:
    """helm with that cluster: `release("upgrade", "agent", values)`."""

    def run(verb: str, chart: str, values: Json) -> str:
        return run_helm(
            helm, verb, f"real-{chart}", str(CHARTS / chart), f"--namespace={NAMESPACE}",
            values=values, kubeconfig=site.kubeconfig,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("chart", "before", "after"),
    [
        ("agent", AGENT, {**AGENT, "training": {"epochs": 3}, "data": {"hostPath": "/srv/other"}}),
        ("agent", {**AGENT, "mode": "job"}, {**AGENT, "mode": "job", "training": {"epochs": 3}}),
        ("agent", {**AGENT, "mode": "job"}, {**AGENT, "mode": "cronjob"}),
        ("aggregator", AGGREGATOR, {**AGGREGATOR, "denied": ["south"], "service": {"type": "NodePort"}}),
    ],
    ids=["another folder", "another Job", "another mode", "another Service"],
)
def test_a_release_is_upgraded_and_rolled_back(
    helm: Path, site: Cluster, release: Callable[..., str], chart: str, before: Json, after: Json
):
    release("install", chart, before)
    made = objects_of(helm, site, chart)
    release("upgrade", chart, after)
    let_go(site)
    assert objects_of(helm, site, chart) != made
    run_helm(helm, "rollback", f"real-{chart}", "1", f"--namespace={NAMESPACE}", kubeconfig=site.kubeconfig)
    assert objects_of(helm, site, chart) == made
    run_helm(helm, "uninstall", f"real-{chart}", f"--namespace={NAMESPACE}", kubeconfig=site.kubeconfig)
    let_go(site)
    kept = {"agent": "state", "aggregator": "store"}[chart]
    assert f"real-{chart}-{kept}" in site.kubectl("get", "pvc", f"--namespace={NAMESPACE}", "--output=name")


def let_go(site: Cluster) -> None:
    """Lets deleted volumes and claims go, as controllers do once no Pod uses them; this server has none."""
    for each in site.get("pv,pvc", f"--namespace={NAMESPACE}")["items"]:
        if "deletionTimestamp" in each["metadata"]:
            name = f"{each['kind'].lower()}/{each['metadata']['name']}"
            free = '{"metadata": {"finalizers": null}}'
            site.kubectl("patch", name, f"--namespace={NAMESPACE}", "--type=merge", f"--patch={free}")


def objects_of(helm: Path, site: Cluster, chart: str) -> str:
    """The manifest of the installed release."""
    return run_helm(helm, "get", "manifest", f"real-{chart}", f"--namespace={NAMESPACE}", kubeconfig=site.kubeconfig)


def test_notes_name_what_is_missing_and_the_value_to_change(release: Callable[..., str]):
    agent = release("install", "agent", {**AGENT, "data": {"existingClaim": "images"}})
    assert "no Secret north-tls (value tls.secret)" in agent
    assert "no PersistentVolumeClaim images (value data.existingClaim)" in agent
    aggregator = release("install", "aggregator", AGGREGATOR)
    assert "no Secret aggregator-tls (value tls.secret)" in aggregator
    assert "datavector-crds" not in aggregator  # they are there
