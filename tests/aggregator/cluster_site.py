"""A receiver in a cluster: a namespace with a policy, an account, a store, and the process."""

from __future__ import annotations

import json
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregator.resources import BaseModelResource, BaseModelSpec, Metadata, ModelVersion, Resource
from aggregator.store import Store
from datavector.model import BaseModel
from tests.cluster.client import Cluster, write_kubeconfig
from tests.cluster.roles import RECEIVER, Rules, make_account
from tests.integration.processes import Process, free_port, until
from tests.link import Link
from tests.serving import policy_of

ACCOUNT = "receiver"


@dataclass
class ClusterSite:
    """A namespace with the BaseModel `pretrained` and the policy `small`, which names it.

    Attributes:
        running: ends every process and link that is started here.
    """

    cluster: Cluster
    namespace: str
    base: BaseModel
    store: Store
    certificates: Path
    folder: Path
    running: ExitStack

    def prepare(self) -> None:
        """Makes the account and the objects that a person makes."""
        self.allow(RECEIVER)
        spec = BaseModelSpec(
            architecture="handmade", classes=("a", "b"), input_size=8, artifact_digest=self.base.digest
        )
        self.create(BaseModelResource(metadata=Metadata(name="pretrained"), spec=spec))
        self.create(policy_of(self.base, baseModelRef="pretrained"))

    # --- The cluster

    def kubectl(self, *args: str, **options: Any) -> str:
        return self.cluster.kubectl(*args, f"--namespace={self.namespace}", **options)

    def allow(self, rules: Rules) -> None:
        """Gives the receiver's account these rights, and no others."""
        make_account(self.cluster, self.namespace, ACCOUNT, rules)

    def create(self, resource: Resource) -> None:
        content = resource.dump()
        content["metadata"] = {"name": resource.name}
        self.kubectl("create", "-f", "-", input=content)

    def patch(self, kind: str, name: str, content: dict[str, Any], *flags: str) -> None:
        self.kubectl("patch", kind, name, "--type=merge", f"--patch={json.dumps(content)}", *flags)

    def vectors(self) -> dict[str, dict[str, Any]]:
        """The DataVector objects, by name."""
        items = self.cluster.get("datavectors", f"--namespace={self.namespace}")["items"]
        return {item["metadata"]["name"]: item for item in items}

    def release(self, version: ModelVersion) -> None:
        """Makes a version that is Ready, with one file, as the operator does."""
        folder = self.store.release(version.name)
        folder.mkdir()
        (folder / "labels.txt").write_text("a\nb\n")
        self.create(version)
        self.patch("modelversions", version.name, {"status": version.dump()["status"]}, "--subresource=status")

    def kubeconfig(self, url: str = "") -> Path:
        """A kubeconfig of the receiver's account, that finds the API server elsewhere if `url` is given."""
        own = self.cluster.kubeconfig_of(self.namespace, ACCOUNT)
        if not url:
            return own
        token = json.loads(own.read_text())["users"][0]["user"]
        path = self.folder / "elsewhere.kubeconfig"
        return write_kubeconfig(path, url=url, ca=self.cluster.ca, user=token, namespace=self.namespace)

    def link(self) -> Link:
        """A way to the API server that can be cut; its address is `localhost:port`."""
        link = Link(self.cluster.url.removeprefix("https://"))
        self.running.callback(link.close)
        return link

    # --- The receiver

    def start(self, *, url: str = "", name: str = "receiver", **environment: str) -> Receiving:
        """Starts a receiver, which may still wait for the API when this returns."""
        port = free_port()
        arguments = (
            "receiver", "--store", self.store.root, "--namespace", self.namespace, "--listen", "127.0.0.1:0",
            "--certificate", self.certificates / "aggregator.crt", "--key", self.certificates / "aggregator.key",
            "--ca", self.certificates / "ca.crt", "--metrics-port", str(port),
        )  # fmt: skip
        process = Process(arguments, self.folder / f"{name}.log", KUBECONFIG=str(self.kubeconfig(url)), **environment)
        self.running.callback(process.clear)
        return Receiving(process, port)

    def outbox(self) -> dict[str, dict[str, Any]]:
        """What waits for the API, by file name."""
        return {path.name: json.loads(path.read_text()) for path in (self.store.root / "outbox").glob("*.json")}


@dataclass
class Receiving:
    """A receiver's process."""

    process: Process
    metrics_port: int

    @property
    def address(self) -> str:
        """Where it listens, once it does."""
        return self.process.wait_for("listening on ").split()[0].replace("127.0.0.1", "localhost")

    def metric(self, name: str) -> float:
        """The value of a line of its metrics, labels included in the name."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), -1.0)

    def until_metric(self, name: str, value: float) -> None:
        until(lambda: self.metric(name) == value, f"{name} {value}", process=self.process)
