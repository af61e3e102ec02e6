"""A namespace of the cluster as a person with kubectl and helm sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.charts.rendering import CHARTS, run_helm
from tests.cluster.aggregation import Namespace
from tests.cluster.client import Cluster
from tests.cluster.fixtures import RESTRICTED

OURS = "e2e.datavector.dev"  # label of the namespaces that tests made, and may remove
PATIENCE = 300.0  # seconds, for whatever a Pod does

_CONFINED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
_USER = {
    "runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001,
    "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip


class Helm:
    """helm with one cluster and the charts of this repository."""

    def __init__(self, program: Path, cluster: Cluster) -> None:
        self._program = program
        self._cluster = cluster

    def __call__(self, *args: str, **options: Any) -> str:
        """Raises HelmFailed, with what it printed."""
        return run_helm(self._program, *args, kubeconfig=self._cluster.kubeconfig, **options)

    def install(
        self, release: str, chart: str, *args: str, namespace: str, values: dict[str, Any] | None = None
    ) -> str:
        """Installs or upgrades a release; what helm printed, which ends with the chart's notes."""
        place = f"--namespace={namespace}"
        return self("upgrade", "--install", release, str(CHARTS / chart), place, *args, values=values or {})


class Space(Namespace):
    """One namespace, with what a test wants of its Pods."""

    @classmethod
    def make(cls, cluster: Cluster, name: str) -> Space:
        """A fresh namespace that allows only restricted Pods. One of that name is removed if an earlier run made it."""
        cluster.kubectl("delete", "namespace", f"--field-selector=metadata.name={name}", f"--selector={OURS}")
        meta = {"name": name, "labels": {**RESTRICTED, OURS: "true"}}
        cluster.kubectl("create", "-f", "-", input={"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
        cluster.kubectl("wait", "--for=create", "serviceaccount/default", f"--namespace={name}", "--timeout=120s")
        return cls(cluster, name)

    def pods(self, selector: str) -> list[dict[str, Any]]:
        """Pods by labels, oldest first; those that are being deleted left out."""
        found = self.get("pods", f"--selector={selector}")["items"]
        living = [each for each in found if "deletionTimestamp" not in each["metadata"]]
        return sorted(living, key=lambda each: each["metadata"]["creationTimestamp"])

    def logs(self, of: str, *args: str) -> str:
        return self.kubectl("logs", of, *args, check=False)

    def wait(self, what: str, condition: str, *, seconds: float = PATIENCE) -> str:
        """As `kubectl wait --for=condition=...`."""
        return self.kubectl("wait", f"--for={condition}", what, f"--timeout={seconds:.0f}s")

    def answer(self, pod: str) -> str:
        """What a Pod that runs once has printed, once it has ended well."""

        self.until(lambda: self.get("pod", pod)["status"]["phase"] in ("Succeeded", "Failed"), seconds=PATIENCE)
        said = self.logs(pod)
        assert self.get("pod", pod)["status"]["phase"] == "Succeeded", said
        return said

    def rolled_out(self, deployment: str) -> None:
        self.kubectl("rollout", "status", f"deploy/{deployment}", f"--timeout={PATIENCE:.0f}s")

    def run(
        self,
        name: str,
        image: str,
        *,
        command: list[str],
        claims: dict[str, str] | None = None,
        maps: dict[str, str] | None = None,
    ) -> None:
        """Makes a restricted Pod that runs a command once.

        Args:
            claims: of PersistentVolumeClaims, by where they are mounted.
            maps: of ConfigMaps, by where they are mounted.
        """
        sources = {path: {"persistentVolumeClaim": {"claimName": claim}} for path, claim in (claims or {}).items()}
        sources |= {path: {"configMap": {"name": name}} for path, name in (maps or {}).items()}
        volumes = [{"name": f"volume-{number}", **source} for number, source in enumerate(sources.values())]
        mounts = [{"name": f"volume-{number}", "mountPath": path} for number, path in enumerate(sources)]
        container = {
            "name": "main", "image": image, "imagePullPolicy": "IfNotPresent", "command": command,
            "securityContext": _CONFINED,
            "volumeMounts": [*mounts, {"name": "tmp", "mountPath": "/tmp"}],
        }  # fmt: skip
        spec = {
            "restartPolicy": "Never", "automountServiceAccountToken": False, "securityContext": _USER,
            "containers": [container],
            "volumes": [*volumes, {"name": "tmp", "emptyDir": {}}], "terminationGracePeriodSeconds": 1,
        }  # fmt: skip
        self.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})

    def fill_claim(self, name: str, folder: Path, image: str, *, size: str = "100Mi") -> None:
        """Makes a PersistentVolumeClaim with the files of a folder."""
        self.apply(
            {
                "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
                "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}},
            }
        )  # fmt: skip
        loader = f"fill-{name}"
        self.run(loader, image, command=["sleep", "3600"], claims={"/data": name})
        self.wait(f"pod/{loader}", "condition=Ready")
        self.copy_in(folder, loader, "/data")
        self.kubectl("delete", "pod", loader, "--wait=true")

    def copy_in(self, folder: Path, pod: str, target: str) -> None:
        """The content of a folder into a folder of a Pod, whatever of it may be written there."""
        self.kubectl("cp", f"{folder}/.", f"{pod}:{target}", "--no-preserve=true")


def datavector(*args: str | Path) -> str:
    """Runs our own command line on this machine; what it printed."""
    command = [sys.executable, "-m", "datavector", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
