"""A Kubernetes cluster as a test sees it: a kubeconfig and kubectl."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any


class KubectlFailed(Exception):
    """kubectl ended with an error; the message is what it printed."""


class Cluster:
    """A cluster that runs already.

    Attributes:
        kubeconfig: the way in as an administrator.
        url: where its API server answers.
        ca: the certificate of the authority that signed the API server's.
        program: its kubectl.
        runs_pods: whether it has nodes of its own, or needs a Kubelet from here.
        is_local: whether this machine is its node.
    """

    runs_pods = True
    is_local = False

    def __init__(self, kubeconfig: Path, folder: Path, *, kubectl: str = "kubectl") -> None:
        """Args:
        folder: for kubeconfigs made here and kubectl's cache.
        kubectl: the program.
        """
        self.kubeconfig = kubeconfig
        self._folder = folder
        self.program = kubectl
        view = json.loads(self.kubectl("config", "view", "--raw", "--flatten", "--minify", "--output=json"))
        server = view["clusters"][0]["cluster"]
        self.url: str = server["server"]
        self.ca = folder / "server-ca.crt"
        self.ca.write_bytes(base64.b64decode(server["certificate-authority-data"]))

    def kubectl(self, *args: str, input: str | dict[str, Any] | None = None, check: bool = True) -> str:
        """Runs kubectl.

        Args:
            input: what it reads with `-f -`; an object is sent as JSON.

        Returns:
            What it printed; without `check` also what it printed as its error.

        Raises:
            KubectlFailed: it failed, and `check` is set.
        """
        answer = subprocess.run(
            [self.program, f"--kubeconfig={self.kubeconfig}", *args],
            input=json.dumps(input) if isinstance(input, dict) else input,
            env={**os.environ, "KUBECACHEDIR": str(self._folder / "kubectl")},
            capture_output=True,
            text=True,
        )
        if answer.returncode == 0:
            return answer.stdout
        if check:
            raise KubectlFailed(f"kubectl {' '.join(args)}: {answer.stderr.strip()}")
        return answer.stdout + answer.stderr

    def get(self, *args: str) -> dict[str, Any]:
        """An object, or a list of objects, as `kubectl get` shows it."""
        found: dict[str, Any] = json.loads(self.kubectl("get", *args, "--output=json"))
        return found

    def kubeconfig_of(self, namespace: str, service_account: str) -> Path:
        """A kubeconfig that speaks for a service account, for an hour."""
        token = self.kubectl("create", "token", service_account, f"--namespace={namespace}").strip()
        path = self._folder / f"{namespace}.{service_account}.kubeconfig"
        return write_kubeconfig(path, url=self.url, ca=self.ca, user={"token": token}, namespace=namespace)


def write_kubeconfig(path: Path, *, url: str, ca: Path, user: dict[str, str], namespace: str = "default") -> Path:
    """Writes a kubeconfig with one cluster and one user; JSON, which is YAML too."""
    server = {"server": url, "certificate-authority-data": base64.b64encode(ca.read_bytes()).decode()}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "cluster", "cluster": server}],
        "users": [{"name": "user", "user": user}],
        "contexts": [{"name": "context", "context": {"cluster": "cluster", "user": "user", "namespace": namespace}}],
        "current-context": "context",
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=1))
    return path
