"""A whole Kubernetes with one node on this machine: real Pods in containerd. Needs root, and Debian's packages.

One at a time: it has a bridge, a packet filter table and a folder of fixed names. What a killed run left is removed by
the next. No NetworkPolicy controller runs: policies are accepted, and not enforced.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.build import CannotBuild, cache
from tests.cluster.control_plane import POLL_SECONDS, SECONDS_TO_START, ControlPlane, ControlPlaneFailed
from tests.cluster.volumes import STORAGE_CLASS, Volumes

PACKAGES = (
    "containerd", "runc", "containernetworking-plugins", "nftables", "iproute2", "busybox-static", "buildah",
    "docker-registry", "debootstrap",
)  # fmt: skip
PROGRAMS = ("containerd", "ctr", "runc", "nft", "ip", "busybox", "buildah", "docker-registry")

RUN = Path("/run/datavector-node")
SOCKET = RUN / "containerd.sock"
BRIDGE, GATEWAY, PODS = "dv-pods", "10.244.0.1", "10.244.0.0/24"
PAUSE = "localhost/pause:1"
NAME = "node"
FOREIGN = "foreign-network-namespaces"  # file with those that were there before
COMPONENTS = ("etcd", "kube", "containerd", "coredns")

_CTR = ("--address", str(SOCKET), "--namespace", "k8s.io")

_KUBELET = """
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: unix://{socket}
authentication: {{anonymous: {{enabled: false}}, webhook: {{enabled: true}}, x509: {{clientCAFile: {pki}/ca.crt}}}}
authorization: {{mode: Webhook}}
tlsCertFile: {pki}/node.crt
tlsPrivateKeyFile: {pki}/node.key
clusterDNS: [{gateway}]
clusterDomain: cluster.local
evictionHard: {{nodefs.available: "1%", imagefs.available: "1%", memory.available: "100Mi"}}
imageGCHighThresholdPercent: 100
"""

# restrict_oom_score_adj: without CAP_SYS_RESOURCE runc may not lower the score of the pause container, and dies.
_CONTAINERD = """
version = 2
root = "{root}"
state = "{state}"
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{folder}/cni"
"""

_COREDNS = """
.:53 {{
  bind {gateway}
  kubernetes cluster.local {{
    kubeconfig {kubeconfig}
  }}
}}
"""


def demand_node() -> None:
    """
    Raises:
        CannotBuild: a node cannot run here; the message is one sentence that says why.
    """
    if os.geteuid() != 0:
        raise CannotBuild("A Kubernetes node needs root.")
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        raise CannotBuild(f"A Kubernetes node needs {', '.join(missing)}: apt-get install {' '.join(PACKAGES)}")


class Node(ControlPlane):
    """The control plane, and beside it scheduler, containerd, kubelet, kube-proxy and CoreDNS."""

    runs_pods = True
    is_local = True

    def __init__(self, *, components: Path, node: Path) -> None:
        """Starts it and waits until the node is Ready, with a StorageClass.

        Args:
            components: the folder with etcd, kube-apiserver, kube-controller-manager and kubectl.
            node: the folder with kubelet, kube-proxy, kube-scheduler and coredns.

        Raises:
            CannotBuild: another cluster's kube-proxy is at work here.
            ControlPlaneFailed: a component ended or was not ready in time.
        """
        self._volumes: Volumes | None = None
        remove_leftovers()
        if _command("nft", "list", "table", "ip", "kube-proxy", check=False):
            raise CannotBuild("Another kube-proxy has its rules on this machine, so no node of ours can run here.")
        RUN.mkdir(mode=0o700)
        (RUN / FOREIGN).write_text("\n".join(_network_namespaces()))
        folder = RUN / "cluster"  # below RUN, so that a later run knows the processes by their command lines
        super().__init__(folder, components=components, address=_own_address())
        try:
            self._start_node(folder, node)
        except BaseException:
            self.close()
            raise

    def api_server_flags(self) -> tuple[str, ...]:
        return (
            "--authorization-mode=Node,RBAC",
            "--allow-privileged",
            f"--kubelet-client-certificate={self._pki}/admin.crt",
            f"--kubelet-client-key={self._pki}/admin.key",
            "--kubelet-preferred-address-types=InternalIP",
        )

    def controller_flags(self) -> tuple[str, ...]:
        return ()

    def ctr(self, *args: str) -> str:
        """Runs containerd's own client on the node's containers; what it printed."""
        return _ctr(*args)

    def slow_down(self, address: str, rate: str) -> None:
        """Lets a Pod receive no faster than, say, "80mbit", until it is gone."""
        entries = json.loads(_command("ip", "-json", "neighbour", "show", address, "dev", BRIDGE))
        table = json.loads(_command("bridge", "-json", "fdb", "show", "br", BRIDGE))
        (veth,) = {each["ifname"] for each in table if each["mac"] == entries[0]["lladdr"]}
        _command("tc", "qdisc", "add", "dev", veth, "root", "tbf", "rate", rate, "burst", "256kb", "latency", "400ms")

    def restart_containerd(self) -> None:
        """Kills containerd, whose containers go on, and starts it again."""
        self._running.pop("containerd").end(seconds=0)
        self._start_containerd()

    def kill_container(self, pod_uid: str, container: str) -> None:
        """Kills a container's process, as lack of memory does.

        Raises:
            LookupError: it does not run.
        """
        found = self.ctr(
            "containers", "ls", "-q",
            f'labels."io.kubernetes.pod.uid"=={pod_uid},labels."io.kubernetes.container.name"=={container}',
        ).split()  # fmt: skip
        if not found:
            raise LookupError(f"no container {container} of the Pod {pod_uid} runs here")
        self.ctr("tasks", "kill", "--signal", "SIGKILL", found[-1])

    def close(self) -> None:
        if self._volumes:
            self._volumes.close()
        for name in ("kubelet", "kube-proxy", "coredns", "kube-scheduler"):
            if name in self._running:
                self._running.pop(name).end()
        _remove_containers()
        _forget_replaced_images()
        if "containerd" in self._running:
            self._running.pop("containerd").end()
        super().close()
        remove_leftovers()

    # --- Parts

    def _start_node(self, folder: Path, programs: Path) -> None:
        self._authority.issue("node", common_name=f"system:node:{NAME}", addresses=(self.address,))
        self._run(
            "kube-scheduler", programs / "kube-scheduler", f"--kubeconfig={self.kubeconfig}", "--leader-elect=false",
            "--secure-port=0",
        )  # fmt: skip
        self._make_network(folder)
        self._start_containerd()
        self._import_pause()
        (folder / "kubelet.yaml").write_text(_KUBELET.format(socket=SOCKET, pki=self._pki, gateway=GATEWAY))
        self._run(
            "kubelet", programs / "kubelet", f"--config={folder}/kubelet.yaml", f"--kubeconfig={self.kubeconfig}",
            f"--root-dir={RUN}/kubelet", f"--hostname-override={NAME}", f"--node-ip={self.address}",
        )  # fmt: skip
        self._run(
            "kube-proxy", programs / "kube-proxy", f"--kubeconfig={self.kubeconfig}", f"--hostname-override={NAME}",
            f"--cluster-cidr={PODS}", "--proxy-mode=nftables",
        )  # fmt: skip
        (folder / "Corefile").write_text(_COREDNS.format(gateway=GATEWAY, kubeconfig=self.kubeconfig))
        self._run("coredns", programs / "coredns", "-conf", folder / "Corefile")
        self.kubectl("create", "-f", "-", input=STORAGE_CLASS)
        self._volumes = Volumes(self.kubeconfig, RUN / "volumes")
        self.kubectl("wait", "--for=create", f"node/{NAME}", "--timeout=60s")
        self.kubectl("wait", "--for=condition=Ready", f"node/{NAME}", "--timeout=60s")

    def _start_containerd(self) -> None:
        content = _CONTAINERD.format(
            root=containerd_root(), state=RUN / "containerd", socket=SOCKET, pause=PAUSE, folder=self._root
        )
        (self._root / "containerd.toml").write_text(content)
        self._run("containerd", "containerd", "-c", self._root / "containerd.toml")
        deadline = time.monotonic() + SECONDS_TO_START
        while not _answers():
            if not self._running["containerd"].running or time.monotonic() > deadline:
                raise ControlPlaneFailed(f"containerd did not start:\n{self._running['containerd'].tail()}")
            time.sleep(POLL_SECONDS)

    def _make_network(self, folder: Path) -> None:
        _command("ip", "link", "add", BRIDGE, "type", "bridge")
        _command("ip", "address", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        _command("ip", "link", "set", BRIDGE, "up")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        bridge = {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": str(RUN / "ipam"),
                "ranges": [[{"subnet": PODS}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        (folder / "cni").mkdir()
        network = {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]}
        (folder / "cni" / "10-pods.conflist").write_text(json.dumps(network))

    def _import_pause(self) -> None:
        archive = RUN / "pause.tar"
        archive.write_bytes(_pause_image())
        self.ctr("images", "import", str(archive))


def containerd_root() -> Path:
    """Where images are kept from run to run."""
    return cache() / "containerd"


def remove_leftovers() -> None:
    """Ends and removes what a killed run left: processes, mounts, the bridge, packet filter rules."""
    if not RUN.exists():
        return
    for pid, command in _processes():
        if "containerd-shim" not in command:
            _kill(pid, signal.SIGTERM)
    _remove_containers()
    for pid, _ in _processes():
        _kill(pid, signal.SIGKILL)
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted(mounts, reverse=True):
        if mount.startswith((f"{RUN}/", f"{containerd_root()}/")):
            _command("umount", "--lazy", mount, check=False)
    foreign = (RUN / FOREIGN).read_text().split() if (RUN / FOREIGN).exists() else _network_namespaces()
    for name in _network_namespaces().difference(foreign):
        _command("umount", "--lazy", f"/run/netns/{name}", check=False)
        _command("ip", "netns", "del", name, check=False)
    _command("ip", "link", "del", BRIDGE, check=False)
    for family in ("ip", "ip6"):
        _command("nft", "delete", "table", family, "kube-proxy", check=False)
    shutil.rmtree(RUN, ignore_errors=True)


def _forget_replaced_images() -> None:
    """Lets containerd erase images that have lost their names; it keeps each by its digest, too."""
    if not _answers():
        return
    digests = [each for each in _ctr("images", "ls", "-q", check=False).split() if each.startswith("sha256:")]
    if digests:
        _ctr("images", "rm", "--sync", *digests, check=False)


def _network_namespaces() -> set[str]:
    """Names of Pods' network namespaces, also of other clusters on this machine."""
    return {path.name for path in Path("/run/netns").glob("cni-*")}


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _remove_containers() -> None:
    """Kills and removes every container of the node, if its containerd answers."""
    if not _answers():
        return
    tasks = _ctr("tasks", "ls", "-q", check=False).split()
    for task in tasks:
        _ctr("tasks", "kill", "--signal", "SIGKILL", task, check=False)
    for container in _ctr("containers", "ls", "-q", check=False).split():
        _ctr("tasks", "rm", "--force", container, check=False)
        _ctr("containers", "rm", container, check=False)


def _processes() -> Iterator[tuple[int, str]]:
    """Processes that were started with a path of the node's on their command line."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        name = Path(command.partition(" ")[0]).name
        if str(RUN) in command and name.startswith(COMPONENTS):
            yield int(folder.name), command


def _answers() -> bool:
    return SOCKET.exists() and "Version" in _ctr("version", check=False)


def _ctr(*args: str, check: bool = True) -> str:
    return _command("ctr", *_CTR, *args, check=check)


def _command(*args: str, check: bool = True) -> str:
    """Raises ControlPlaneFailed, with what it printed, if it fails and `check` is set."""
    done = subprocess.run(args, capture_output=True, text=True)
    if check and done.returncode:
        raise ControlPlaneFailed(f"{' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


def _own_address() -> str:
    """This machine's address on the way out; Pods reach the API server at it. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


def _pause_image() -> bytes:
    """A container image that only sleeps: what holds a Pod's namespaces open."""
    busybox = shutil.which("busybox")
    assert busybox
    layer = _tar({"bin/busybox": (Path(busybox).read_bytes(), 0o755)})
    digest = hashlib.sha256(layer).hexdigest()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/bin/busybox", "sleep", "2147483647"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [PAUSE], "Layers": [f"{digest}/layer.tar"]}]
    return _tar(
        {
            "config.json": (json.dumps(config).encode(), 0o644),
            f"{digest}/layer.tar": (layer, 0o644),
            "manifest.json": (json.dumps(manifest).encode(), 0o644),
        }
    )


def _tar(files: dict[str, tuple[bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, (content, mode) in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
