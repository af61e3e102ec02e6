"""A Kubernetes control plane on this machine's loopback: etcd, an API server, and the controllers that Jobs need."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.cluster.certificates import Authority
from tests.cluster.client import Cluster, write_kubeconfig
from tests.cluster.processes import Process

SECONDS_TO_START = 90
POLL_SECONDS = 0.1
SERVICES, API_SERVICE = "10.96.0.0/16", "10.96.0.1"  # addresses of Services, and of the API server's own

CONTROLLERS = (
    "garbage-collector-controller",
    "job-controller",
    "namespace-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
    "ttl-after-finished-controller",
)


class ControlPlaneFailed(Exception):
    """A component did not come up; the message has the end of its log."""


class ControlPlane(Cluster):
    """A control plane without a node: Pods run only where a Kubelet of ours is started beside it.

    Each has its own ports, certificates and data, so any number of them run at once.
    """

    runs_pods = False

    def __init__(
        self,
        folder: Path,
        *,
        components: Path,
        api_server: Path | None = None,
        controllers: bool = True,
        address: str = "127.0.0.1",
    ) -> None:
        """Starts it and waits until it is ready.

        Args:
            folder: for its data, certificates and logs; made here, removed by `close`.
            components: the folder with etcd, kube-apiserver, kube-controller-manager and kubectl.
            api_server: another kube-apiserver.
            controllers: without them no Job makes a Pod, nothing is garbage-collected, no namespace ends, and no
                namespace has a default service account.
            address: of the API server.

        Raises:
            ControlPlaneFailed: a component ended or was not ready in time.
        """
        folder.mkdir(parents=True)
        self.address = address
        self._components = components
        self._api_server_program = api_server or components / "kube-apiserver"
        self._etcd_port, self._peer_port, self._port, self._controllers_port = free_ports(4)
        self._running: dict[str, Process] = {}
        authority = Authority(folder / "pki")
        authority.issue("server", common_name="kube-apiserver", addresses=(address, API_SERVICE))
        authority.issue("admin", common_name="admin", organization="system:masters")
        authority.key_pair("accounts")
        self._authority = authority
        self._pki = authority.folder
        self._root = folder
        with ExitStack() as stack:
            stack.callback(self.close)
            super().__init__(self._write_kubeconfig(), folder, kubectl=str(components / "kubectl"))
            self._start_etcd()
            self.start_api_server()
            if controllers:
                self._start_controllers()
            stack.pop_all()

    @property
    def pids(self) -> dict[str, int]:
        """The running components' process ids."""
        return {name: process.pid for name, process in self._running.items()}

    def start_api_server(self) -> None:
        """Starts the API server, on the same port and data as before, and waits until it is ready."""
        self._run(
            "kube-apiserver",
            self._api_server_program,
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            f"--bind-address={self.address}",
            f"--advertise-address={self.address}",
            f"--secure-port={self._port}",
            f"--service-cluster-ip-range={SERVICES}",
            f"--client-ca-file={self._pki}/ca.crt",
            f"--tls-cert-file={self._pki}/server.crt",
            f"--tls-private-key-file={self._pki}/server.key",
            f"--service-account-key-file={self._pki}/accounts.pub",
            f"--service-account-signing-key-file={self._pki}/accounts.key",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--profiling=false",
            *self.api_server_flags(),
        )
        self._wait("kube-apiserver", f"{self.url}/readyz")

    def api_server_flags(self) -> tuple[str, ...]:
        """What a cluster with a node does otherwise."""
        return ("--authorization-mode=RBAC", "--endpoint-reconciler-type=none")

    def controller_flags(self) -> tuple[str, ...]:
        """What a cluster with a node does otherwise."""
        return (f"--controllers={','.join(CONTROLLERS)}",)

    def stop_api_server(self) -> None:
        """Ends the API server as an outage does: at once, with its connections."""
        self._running.pop("kube-apiserver").end(seconds=0)

    def forget_history(self) -> None:
        """Lets etcd forget what was before now, as it does every few minutes: no watch goes on from there."""
        now = self._ask_etcd("kv/range", {"key": base64.b64encode(b"/").decode()})["header"]["revision"]
        self._ask_etcd("kv/compaction", {"revision": now, "physical": True})

    def close(self) -> None:
        """Ends every component and removes the folder."""
        for name in ("kube-controller-manager", "kube-apiserver", "etcd"):
            if name in self._running:
                self._running.pop(name).end()
        shutil.rmtree(self._root, ignore_errors=True)

    def _ask_etcd(self, what: str, content: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._etcd_port}/v3/{what}", data=json.dumps(content).encode()
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
            return dict(json.loads(answer.read()))

    def _start_etcd(self) -> None:
        client, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{self._peer_port}"
        self._run(
            "etcd",
            self._components / "etcd",
            f"--data-dir={self._root}/etcd",
            "--unsafe-no-fsync",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--log-level=warn",
        )
        self._wait("etcd", f"{client}/health")

    def _start_controllers(self) -> None:
        self._run(
            "kube-controller-manager",
            self._components / "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig}",
            f"--service-account-private-key-file={self._pki}/accounts.key",
            f"--root-ca-file={self._pki}/ca.crt",
            *self.controller_flags(),
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._controllers_port}",
            f"--tls-cert-file={self._pki}/server.crt",
            f"--tls-private-key-file={self._pki}/server.key",
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
        )
        self._wait("kube-controller-manager", f"https://127.0.0.1:{self._controllers_port}/healthz")

    def _run(self, name: str, *command: object) -> None:
        self._running[name] = Process([str(each) for each in command], self._root / f"{name}.log")

    def _wait(self, name: str, url: str) -> None:
        """Polls a health address until it answers 200."""
        process = self._running[name]
        deadline = time.monotonic() + SECONDS_TO_START
        while not self._healthy(url):
            if not process.running or time.monotonic() > deadline:
                happened = "was not ready in time" if process.running else "ended"
                raise ControlPlaneFailed(f"{name} {happened}:\n{process.tail()}")
            time.sleep(POLL_SECONDS)

    def _healthy(self, url: str) -> bool:
        context = ssl.create_default_context(cafile=str(self._pki / "ca.crt"))
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _write_kubeconfig(self) -> Path:
        user = {
            "client-certificate-data": base64.b64encode((self._pki / "admin.crt").read_bytes()).decode(),
            "client-key-data": base64.b64encode((self._pki / "admin.key").read_bytes()).decode(),
        }
        url = f"https://{self.address}:{self._port}"
        return write_kubeconfig(self._root / "kubeconfig", url=url, ca=self._pki / "ca.crt", user=user)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]
