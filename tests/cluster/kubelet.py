"""A stand-in for a node: runs Pods' containers as processes on this machine, and reports on them as a kubelet does.

It knows one container per Pod and never restarts it (restartPolicy Never). It isolates nothing: no image, user, limit
or read-only mount means anything here; what a Pod may ask for is the API server's to check.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import urllib3
from kubernetes import client, config

from tests.cluster.container import Container, NoSuchVolume
from tests.cluster.status import Object, now, pod_status, waits_because

NODE = "stand-in"
POLL_SECONDS = 0.1

_FAILURES = (client.ApiException, urllib3.exceptions.HTTPError, OSError)  # the API server is away, or has moved on


class Kubelet:
    """Runs the Pods of a cluster that has no node, in a thread, until it is closed.

    While the API server is away the processes go on; their ends are reported when it is back.
    """

    def __init__(
        self,
        kubeconfig: Path,
        folder: Path,
        *,
        namespaces: Collection[str] | None = None,
        volumes: Mapping[str, Path] | None = None,
        entrypoint: Sequence[str] = (),
        images_missing: Collection[str] = (),
        modules: Mapping[str, str] | None = None,
        at_most: int | None = None,
    ) -> None:
        """Args:
        folder: for the containers' logs, temporary files and termination messages.
        namespaces: whose Pods to run; all, if not given.
        volumes: the local folder of each PersistentVolumeClaim.
        entrypoint: what every image runs where a Pod names no command.
        images_missing: images that cannot be pulled.
        modules: Python modules that run in place of those that a command names.
        at_most: how many processes may run at once; see `restrict`.
        """
        self._api = client.CoreV1Api(config.new_client_from_config(str(kubeconfig)))
        self._folder = folder
        self._namespaces = namespaces
        self._volumes = dict(volumes or {})
        self._entrypoint = tuple(entrypoint)
        self.images_missing = set(images_missing)
        self._modules = dict(modules or {})
        self._at_most = at_most
        self._holding = False
        self._containers: dict[str, Container] = {}  # by the Pod's uid
        self._lost: set[str] = set()
        self._killed_because: dict[str, str] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kubelet", daemon=True)
        self._thread.start()

    def restrict(self, at_most: int | None) -> None:
        """Lets at most so many processes run at once: further Pods stay Pending."""
        self._at_most = at_most

    def hold(self) -> None:
        """Lets processes that start from now on stand still, as slow ones would, until `let_go`."""
        self._holding = True

    def let_go(self) -> None:
        """Lets what was held go on."""
        self._holding = False
        for container in list(self._containers.values()):
            container.send(signal.SIGCONT)

    def kill(self, pod: str, sig: int = signal.SIGKILL, *, reason: str = "Error") -> None:
        """Sends a Pod's process a signal; `reason` is what its status will give, as "OOMKilled" after lack of memory.

        Raises:
            LookupError: no such Pod runs here.
        """
        container = self._running(pod)
        self._killed_because[container.uid] = reason
        container.send(sig)

    def lose_node(self, pod: str) -> None:
        """Kills a Pod's process as if its node were drained: the Pod fails with the condition DisruptionTarget.

        Raises:
            LookupError: no such Pod runs here.
        """
        container = self._running(pod)
        self._lost.add(container.uid)
        container.send(signal.SIGKILL)

    def log(self, pod: str) -> str:
        """What a Pod's process has printed, both streams.

        Raises:
            LookupError: no such Pod has run here.
        """
        for container in list(self._containers.values()):
            if container.pod == pod:
                return container.log.read_text(errors="replace")
        raise LookupError(f"no Pod {pod!r} has run here")

    def close(self) -> None:
        """Stops reporting and kills what runs."""
        self._closing.set()
        self._thread.join()
        for container in self._containers.values():
            container.kill()

    def _running(self, pod: str) -> Container:
        for container in list(self._containers.values()):
            if container.pod == pod and container.exit_code is None:
                return container
        raise LookupError(f"no Pod {pod!r} runs here")

    def _run(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            try:
                pods = self._list()
            except _FAILURES:
                continue
            for pod in pods:
                try:
                    self._observe(pod)
                except _FAILURES:
                    continue  # the next round sees it as it is then
            here = {pod["metadata"]["uid"] for pod in pods}
            for uid, container in self._containers.items():
                if uid not in here:
                    container.kill()

    def _list(self) -> list[Object]:
        answer = self._api.list_pod_for_all_namespaces(_preload_content=False, _request_timeout=10)
        pods: list[Object] = json.loads(answer.data)["items"]
        return [pod for pod in pods if self._namespaces is None or pod["metadata"]["namespace"] in self._namespaces]

    def _observe(self, pod: Object) -> None:
        container = self._containers.get(pod["metadata"]["uid"])
        if pod["status"].get("phase") in ("Succeeded", "Failed"):
            return
        if container is None:
            if "deletionTimestamp" in pod["metadata"]:
                self._remove(pod)
            else:
                self._begin(pod)
        elif (code := container.exit_code) is not None:
            self._report_end(pod, container, code)
        elif "deletionTimestamp" in pod["metadata"]:
            self._end(pod, container)
        elif pod["status"].get("phase") != "Running":
            self._report(pod, "Running", {"running": {"startedAt": container.started_at}}, ready=True)

    def _begin(self, pod: Object) -> None:
        busy = sum(container.exit_code is None for container in self._containers.values())
        if self._at_most is not None and busy >= self._at_most:
            return None
        self._bind(pod)
        image = pod["spec"]["containers"][0]["image"]
        if image in self.images_missing:
            return self._report_waiting(pod, "ImagePullBackOff", f'Back-off pulling image "{image}"')
        try:
            container = Container(
                pod, self._folder, volumes=self._volumes, entrypoint=self._entrypoint, modules=self._modules
            )
        except NoSuchVolume as error:
            return self._report_waiting(pod, "CreateContainerConfigError", str(error))
        except OSError as error:
            ended = {"exitCode": 128, "reason": "StartError", "message": str(error), "finishedAt": now()}
            return self._report(pod, "Failed", {"terminated": ended}, ready=False)
        self._containers[container.uid] = container
        if self._holding:
            container.send(signal.SIGSTOP)
        return self._report(pod, "Running", {"running": {"startedAt": container.started_at}}, ready=True)

    def _end(self, pod: Object, container: Container) -> None:
        """Ends the process of a deleted Pod: asks it, and kills it when the Pod's grace is over."""
        container.send(signal.SIGTERM, once=True)
        if time.time() > datetime.fromisoformat(pod["metadata"]["deletionTimestamp"]).timestamp():
            container.send(signal.SIGKILL)

    def _report_end(self, pod: Object, container: Container, code: int) -> None:
        policy = pod["spec"]["containers"][0].get("terminationMessagePolicy")
        terminated = {
            "exitCode": code,
            "reason": "Completed" if code == 0 else self._killed_because.get(container.uid, "Error"),
            "message": container.message(from_log=code != 0 and policy == "FallbackToLogsOnError"),
            "startedAt": container.started_at,
            "finishedAt": now(),
        }
        lost = container.uid in self._lost
        phase = "Failed" if code or lost else "Succeeded"
        self._report(pod, phase, {"terminated": terminated}, ready=False, lost=lost)
        if "deletionTimestamp" in pod["metadata"]:
            self._remove(pod)

    def _report_waiting(self, pod: Object, reason: str, message: str) -> None:
        if waits_because(pod) != reason:
            self._report(pod, "Pending", {"waiting": {"reason": reason, "message": message}}, ready=False)

    def _report(self, pod: Object, phase: str, state: Object, *, ready: bool, lost: bool = False) -> None:
        status = pod_status(pod, phase, state, ready=ready, lost=lost)
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        self._api.patch_namespaced_pod_status(name, namespace, {"status": status}, _request_timeout=10)

    def _bind(self, pod: Object) -> None:
        """Puts the Pod on this node, so that its deletion waits for the process."""
        if not pod["spec"].get("nodeName"):
            name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
            binding = {"metadata": {"name": name}, "target": {"kind": "Node", "name": NODE}}
            self._api.create_namespaced_pod_binding(name, namespace, binding, _preload_content=False)

    def _remove(self, pod: Object) -> None:
        """Lets a deleted Pod go: no process of it runs any more."""
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        self._api.delete_namespaced_pod(name, namespace, grace_period_seconds=0, _request_timeout=10)
