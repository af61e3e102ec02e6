"""The control plane and the stand-in for a node do what tests of the operator rely on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.client import Cluster, KubectlFailed
from tests.cluster.control_plane import ControlPlane

FAIL_ON_ONE = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1]}}
IGNORE_LOST_NODES = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def job(namespace: str, script: str, *, claim: str | None = None, **spec: Any) -> dict[str, Any]:
    """A Job named "work" with a restricted Pod that runs a Python script."""
    container = {
        "name": "work",
        "image": "example.org/work:1",
        "command": ["python", "-c", script],
        "env": [{"name": "TERMINATION_LOG", "value": "/dev/termination-log"}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    pod: dict[str, Any] = {"restartPolicy": "Never", "containers": [container]}
    if claim:
        container["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
        pod["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "work", "namespace": namespace},
        "spec": {"backoffLimit": 3, "template": {"spec": pod}, **spec},
    }


def pods(cluster: Cluster, namespace: str) -> list[dict[str, Any]]:
    return cluster.get("pods", f"--namespace={namespace}")["items"]


def wait_until(holds: Callable[[], Any], *, seconds: float = 60) -> Any:
    """Polls until something is true, and returns it."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return found


def running_pod(cluster: Cluster, namespace: str, *, but: str = "") -> str:
    """The name of the namespace's running Pod, once there is one."""

    def find() -> str | None:
        for pod in pods(cluster, namespace):
            if pod["status"]["phase"] == "Running" and pod["metadata"]["name"] != but:
                return pod["metadata"]["name"]
        return None

    return wait_until(find)


def wait_for_job(cluster: Cluster, namespace: str, condition: str) -> None:
    cluster.kubectl("wait", f"--for=condition={condition}", "job/work", f"--namespace={namespace}", "--timeout=60s")


def test_it_is_ready_and_says_its_version(control_plane: ControlPlane):
    assert control_plane.kubectl("get", "--raw=/readyz") == "ok"
    versions = json.loads(control_plane.kubectl("version", "--output=json"))
    assert versions["serverVersion"]["gitVersion"].startswith("v1.34.")
    assert versions["clientVersion"]["gitVersion"] == versions["serverVersion"]["gitVersion"]


def test_the_floor_is_the_oldest_kubernetes(floor: ControlPlane):
    assert floor.kubectl("get", "--raw=/readyz") == "ok"
    assert json.loads(floor.kubectl("get", "--raw=/version"))["gitVersion"].startswith("v1.32.")


def test_a_job_runs_in_a_restricted_namespace_to_its_end(cluster, namespace, start_kubelet, tmp_path: Path):
    start_kubelet(volumes={"store": tmp_path / "store"})
    (tmp_path / "store").mkdir()
    cluster.kubectl("create", "-f", "-", input=job(namespace, "open('/data/done', 'w')", claim="store"))
    wait_for_job(cluster, namespace, "Complete")
    assert (tmp_path / "store" / "done").exists()
    (pod,) = pods(cluster, namespace)
    assert pod["status"]["phase"] == "Succeeded"
    assert pod["status"]["containerStatuses"][0]["state"]["terminated"]["reason"] == "Completed"


def test_a_pod_that_is_not_restricted_is_refused(cluster, namespace):
    with pytest.raises(KubectlFailed, match='violates PodSecurity "restricted:latest"'):
        cluster.kubectl("run", "loose", "--image=example.org/work:1", f"--namespace={namespace}")


def test_a_failure_that_no_retry_helps_fails_the_job_and_leaves_its_message(cluster, namespace, start_kubelet):
    start_kubelet()
    script = "import os, sys; open(os.environ['TERMINATION_LOG'], 'w').write('no vectors'); sys.exit(1)"
    cluster.kubectl("create", "-f", "-", input=job(namespace, script, podFailurePolicy={"rules": [FAIL_ON_ONE]}))
    wait_for_job(cluster, namespace, "Failed")
    (pod,) = pods(cluster, namespace)
    ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"], ended["message"]) == (1, "Error", "no vectors")


def test_a_failure_without_a_message_leaves_the_end_of_its_output(cluster, namespace, start_kubelet):
    start_kubelet()
    failing = job(namespace, "raise SystemExit('no space left')", backoffLimit=0)
    failing["spec"]["template"]["spec"]["containers"][0]["terminationMessagePolicy"] = "FallbackToLogsOnError"
    cluster.kubectl("create", "-f", "-", input=failing)
    wait_for_job(cluster, namespace, "Failed")
    (pod,) = pods(cluster, namespace)
    assert "no space left" in pod["status"]["containerStatuses"][0]["state"]["terminated"]["message"]


def test_a_lost_node_is_no_failure_of_the_job(cluster, namespace, start_kubelet):
    kubelet = start_kubelet()
    rules = {"podFailurePolicy": {"rules": [IGNORE_LOST_NODES]}, "backoffLimit": 0}
    cluster.kubectl("create", "-f", "-", input=job(namespace, "import time; time.sleep(600)", **rules))
    first = running_pod(cluster, namespace)
    kubelet.lose_node(first)
    assert running_pod(cluster, namespace, but=first) != first
    assert cluster.get("job", "work", f"--namespace={namespace}")["status"].get("failed", 0) == 0


def test_a_killed_process_has_exit_code_137(cluster, namespace, start_kubelet):
    kubelet = start_kubelet()
    cluster.kubectl("create", "-f", "-", input=job(namespace, "import time; time.sleep(600)", backoffLimit=0))
    kubelet.kill(running_pod(cluster, namespace), reason="OOMKilled")
    wait_for_job(cluster, namespace, "Failed")
    ended = pods(cluster, namespace)[0]["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (137, "OOMKilled")


def test_the_process_of_a_deleted_job_ends(cluster, namespace, start_kubelet):
    kubelet = start_kubelet()
    stop = "signal.signal(signal.SIGTERM, lambda *_: sys.exit('asked to end'))"
    script = f"import signal, sys, time; {stop}; print('up', flush=True); time.sleep(600)"
    cluster.kubectl("create", "-f", "-", input=job(namespace, script))
    pod = running_pod(cluster, namespace)
    wait_until(lambda: "up" in kubelet.log(pod))
    cluster.kubectl("delete", "job", "work", f"--namespace={namespace}", "--timeout=60s")
    wait_until(lambda: not pods(cluster, namespace))
    assert "asked to end" in kubelet.log(pod)


def test_a_missing_image_keeps_a_pod_waiting(cluster, namespace, start_kubelet):
    start_kubelet(images_missing={"example.org/work:1"})
    cluster.kubectl("create", "-f", "-", input=job(namespace, "pass"))

    def waiting() -> Any:
        statuses = [pod["status"].get("containerStatuses") for pod in pods(cluster, namespace)]
        return statuses and statuses[0] and statuses[0][0]["state"]["waiting"]["reason"]

    assert wait_until(waiting) == "ImagePullBackOff"
    cluster.kubectl("delete", "job", "work", f"--namespace={namespace}", "--timeout=60s")
    wait_until(lambda: not pods(cluster, namespace))


def test_a_namespace_ends_with_its_pods(cluster, namespace, start_kubelet):
    start_kubelet()
    cluster.kubectl("create", "-f", "-", input=job(namespace, "import time; time.sleep(600)"))
    running_pod(cluster, namespace)
    cluster.kubectl("delete", "namespace", namespace, "--timeout=60s")
    cluster.kubectl("create", "namespace", namespace)


def test_no_more_processes_run_than_allowed(cluster, namespace, start_kubelet):
    kubelet = start_kubelet(at_most=1)
    script = "import time; time.sleep(600)"
    cluster.kubectl("create", "-f", "-", input=job(namespace, script, completions=2, parallelism=2))
    running_pod(cluster, namespace)
    wait_until(lambda: len(pods(cluster, namespace)) == 2)
    assert sorted(pod["status"]["phase"] for pod in pods(cluster, namespace)) == ["Pending", "Running"]
    kubelet.restrict(2)
    wait_until(lambda: {pod["status"]["phase"] for pod in pods(cluster, namespace)} == {"Running"})


def test_what_a_deleted_object_owned_is_collected(cluster, namespace):
    cluster.kubectl("create", "configmap", "owner", f"--namespace={namespace}")
    owner = cluster.get("configmap", "owner", f"--namespace={namespace}")["metadata"]
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner["uid"]}
    owned = {"name": "owned", "namespace": namespace, "ownerReferences": [reference]}
    cluster.kubectl("create", "-f", "-", input={"apiVersion": "v1", "kind": "ConfigMap", "metadata": owned})
    cluster.kubectl("delete", "configmap", "owner", f"--namespace={namespace}")
    cluster.kubectl("wait", "--for=delete", "configmap/owned", f"--namespace={namespace}", "--timeout=60s")


def test_objects_outlast_an_outage_of_the_api_server(control_plane: ControlPlane, namespace):
    control_plane.kubectl("create", "configmap", "kept", f"--namespace={namespace}")
    control_plane.stop_api_server()
    with pytest.raises(KubectlFailed, match="refused"):
        control_plane.kubectl("get", "configmap", "kept", f"--namespace={namespace}")
    control_plane.start_api_server()
    assert "kept" in control_plane.kubectl("get", "configmap", "kept", f"--namespace={namespace}")


def test_the_end_of_a_process_in_an_outage_is_reported_after_it(
    control_plane: ControlPlane, namespace, start_kubelet, tmp_path: Path
):
    start_kubelet(volumes={"store": tmp_path})
    script = "import pathlib, time\nwhile not pathlib.Path('/data/go').exists(): time.sleep(0.05)"
    control_plane.kubectl("create", "-f", "-", input=job(namespace, script, claim="store"))
    running_pod(control_plane, namespace)
    control_plane.stop_api_server()
    (tmp_path / "go").touch()
    control_plane.start_api_server()
    wait_for_job(control_plane, namespace, "Complete")


def test_a_service_account_may_do_only_what_it_was_given(cluster, namespace, tmp_path: Path):
    cluster.kubectl("create", "serviceaccount", "modest", f"--namespace={namespace}")
    cluster.kubectl("create", "role", "reader", "--verb=list", "--resource=pods", f"--namespace={namespace}")
    binding = ("rolebinding", "reader", "--role=reader", f"--serviceaccount={namespace}:modest")
    cluster.kubectl("create", *binding, f"--namespace={namespace}")
    modest = Cluster(cluster.kubeconfig_of(namespace, "modest"), tmp_path, kubectl=cluster.program)
    assert modest.get("pods")["items"] == []
    with pytest.raises(KubectlFailed, match="Forbidden"):
        modest.kubectl("get", "secrets")
