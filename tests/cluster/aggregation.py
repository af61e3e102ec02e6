"""The operator in a test's namespace: a process of its own, under its own service account, that may be killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from aggregator.resources import DataVector, MergePolicy
from aggregator.store import Store
from tests.cluster.client import Cluster, KubectlFailed
from tests.cluster.processes import Process

ROOT = Path(__file__).parents[2]
ROLES = ROOT / "charts" / "aggregator" / "roles"
IMAGE, CLAIM = "datavector-job:test", "store"
SECONDS = 120  # for anything that is waited for
POLL_SECONDS = 0.1


class Namespace:
    """One namespace of a cluster, with kubectl for it."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name

    def kubectl(self, *args: str, **options: Any) -> str:
        return self.cluster.kubectl(*args, f"--namespace={self.name}", **options)

    def get(self, *args: str) -> dict[str, Any]:
        return self.cluster.get(*args, f"--namespace={self.name}")

    def items(self, kind: str) -> list[dict[str, Any]]:
        """All objects of a kind, sorted by name."""
        found: list[dict[str, Any]] = self.get(kind)["items"]
        return sorted(found, key=lambda item: item["metadata"]["name"])

    def apply(self, *contents: dict[str, Any]) -> None:
        for content in contents:
            self.kubectl("apply", "--filename=-", input=content)

    def grant(self, account: str) -> Path:
        """Makes a service account with its Role; returns its kubeconfig."""
        role = yaml.safe_load((ROLES / f"{account}.yaml").read_text())
        self.kubectl("create", "serviceaccount", f"datavector-{account}")
        self.apply(role)
        self.kubectl(
            "create", "rolebinding", f"datavector-{account}", f"--role={role['metadata']['name']}",
            f"--serviceaccount={self.name}:datavector-{account}",
        )  # fmt: skip
        return self.cluster.kubeconfig_of(self.name, f"datavector-{account}")

    def until(
        self, condition: Callable[[], Any], *, why: Callable[[], str] = lambda: "", seconds: float = SECONDS
    ) -> Any:
        """Waits until something is so, and returns it; an API server that is away counts as not yet."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if found := condition():
                    return found
            except KubectlFailed as error:
                if "connection refused" not in str(error).lower() and "ServiceUnavailable" not in str(error):
                    raise
            assert time.monotonic() < deadline, why() or "this took too long"
            time.sleep(POLL_SECONDS)


class RunningOperator:
    """`kopf run -m aggregator.operator`, which may be killed and started again."""

    def __init__(
        self, kubeconfig: Path, namespace: Namespace, store: Path, log: Path, *, liveness_port: int = 0, **settings: Any
    ) -> None:
        self.log = log
        self._namespace = namespace
        self._liveness_port = liveness_port
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DATAVECTOR_")},
            "KUBECONFIG": str(kubeconfig),
            "PYTHONPATH": str(ROOT),
            "DATAVECTOR_OPERATOR_STORE": str(store),
            "DATAVECTOR_OPERATOR_STORE_CLAIM": CLAIM,
            "DATAVECTOR_OPERATOR_JOB_IMAGE": IMAGE,
            "DATAVECTOR_OPERATOR_NAMESPACE": namespace.name,
            "DATAVECTOR_OPERATOR_POLL_SECONDS": "0.5",
            "PYTHONUNBUFFERED": "1",
            **{f"DATAVECTOR_OPERATOR_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self._process: Process | None = None
        self.start()

    def start(self) -> None:
        command = [
            sys.executable, "-m", "kopf", "run", "-m", "aggregator.operator", "--standalone",
            f"--namespace={self._namespace.name}",
            *([f"--liveness=http://127.0.0.1:{self._liveness_port}/healthz"] if self._liveness_port else []),
        ]  # fmt: skip
        self._process = Process(command, self.log, environment=self._environment)

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    def kill(self) -> None:
        if self.running:
            os.kill(self.pid, signal.SIGKILL)
        assert self._process
        self._process.wait()

    def close(self) -> None:
        if self._process is not None:
            self._process.end()

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])


def manifest(resource: MergePolicy | DataVector) -> dict[str, Any]:
    """An object as a person would apply it."""
    content = resource.dump()
    content.pop("status", None)
    content["metadata"] = {"name": resource.name}
    return content


def record(namespace: Namespace, vector: DataVector) -> None:
    """Makes a vector's object, as the receiver does once the file is in the store."""
    namespace.kubectl("create", "--filename=-", input=manifest(vector))


def merged_digest(store: Store, version: str) -> str:
    report = store.report(version, "merge")
    assert report, f"{version} was not merged"
    return str(report["weights_sha256"])


def condition(item: dict[str, Any], kind: str) -> dict[str, Any]:
    """A condition of an object; an empty one where it has none of that type."""
    found = [each for each in item.get("status", {}).get("conditions", ()) if each["type"] == kind]
    return found[0] if found else {}


def phases(space: Namespace) -> dict[str, str]:
    return {item["metadata"]["name"]: item.get("status", {}).get("phase", "") for item in space.items("modelversions")}


def in_phase(space: Namespace, phase: str) -> list[str]:
    return [name for name, each in phases(space).items() if each == phase]


def waiting_for(space: Namespace, name: str = "brain") -> str:
    return str(space.get(f"mergepolicy/{name}").get("status", {}).get("waitingFor", ""))


def as_json(content: Any) -> str:
    return json.dumps(content, indent=1, sort_keys=True)
