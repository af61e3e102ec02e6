"""Builds Kubernetes' binaries from their Go modules, once for each state of a module, into a cache outside the tree.

By hand, so that no test waits for it: `python -m tests.cluster.build`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from datavector.files import locked

HERE = Path(__file__).parent
OLDEST_GO = (1, 24)

_VERSION = "k8s.io/component-base/version"


class CannotBuild(Exception):
    """The binaries cannot be built here; the message is one sentence that says why."""


@dataclass(frozen=True)
class Module:
    """What is built from a folder with main.go, go.mod and go.sum.

    Attributes:
        name: the folder's name, and that of the binary made from its main.go.
        packages: commands to build beside it.
        links: the names that the binary goes by; without any, only the packages are built.
        minutes: how long a build may take on two cores with nothing cached.
    """

    name: str
    minutes: int
    links: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        return ((".",) if self.links else ()) + self.packages

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(HERE / self.name / file for file in ("main.go", "go.mod", "go.sum"))


CONTROL_PLANE = Module(
    "control-plane",
    links=("etcd", "kube-apiserver", "kube-controller-manager"),
    packages=("k8s.io/kubernetes/cmd/kubectl",),
    minutes=10,
)
FLOOR = Module("floor", links=("kube-apiserver",), minutes=6)
NODE = Module(
    "node",
    links=("kubelet", "kube-proxy", "kube-scheduler"),
    packages=("github.com/coredns/coredns",),
    minutes=8,
)
HELM = Module("node", packages=("helm.sh/helm/v3/cmd/helm",), minutes=3)


def build(module: Module) -> Path:
    """Builds a module, or finds it built.

    Returns:
        The folder with the binaries.

    Raises:
        CannotBuild: Go is missing or too old, or it failed.
    """
    go = _go_version()
    folder = cache() / _digest(module, go)
    with locked(cache() / f"{module.name}.lock"):
        if not folder.exists():
            print(f"building {_what(module)}: up to {module.minutes} minutes, once", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=cache(), prefix="building-") as unfinished:
                _compile(module, Path(unfinished) / "bin")
                (Path(unfinished) / "bin").rename(folder)
    return folder


def _compile(module: Module, folder: Path) -> None:
    folder.mkdir()
    version = _kubernetes_version(module)
    flags = {"gitVersion": version, "gitMajor": "1", "gitMinor": version.split(".")[1]}
    linker = " ".join(["-s -w", *(f"-X {_VERSION}.{name}={value}" for name, value in flags.items())])
    answer = subprocess.run(
        ["go", "build", "-buildvcs=false", "-ldflags", linker, "-o", f"{folder}/", *module.targets],
        cwd=HERE / module.name,
        env={**os.environ, "CGO_ENABLED": "0"},
        capture_output=True,
        text=True,
    )
    if answer.returncode:
        last = (answer.stderr.strip() or f"exit code {answer.returncode}").splitlines()[-1]
        raise CannotBuild(f"{_what(module)} could not be built: {last}")
    for name in module.links:
        (folder / name).symlink_to(module.name)


def _what(module: Module) -> str:
    if module.links:
        return f"Kubernetes ({module.name})"
    return ", ".join(package.rpartition("/")[2] for package in module.packages)


def _kubernetes_version(module: Module) -> str:
    found = re.search(r"^\s*(?:require )?k8s\.io/kubernetes (v\S+)", (HERE / module.name / "go.mod").read_text(), re.M)
    assert found, f"{module.name}/go.mod names no k8s.io/kubernetes"
    return found[1]


def _go_version() -> str:
    if not shutil.which("go"):
        raise CannotBuild("Kubernetes is built from source, and there is no Go here.")
    version = subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True, check=True).stdout.strip()
    numbers = re.match(r"go(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_GO:
        raise CannotBuild(f"Kubernetes needs Go {'.'.join(map(str, OLDEST_GO))} or newer, and here is {version}.")
    return version


def _digest(module: Module, go: str) -> str:
    digest = hashlib.sha256(repr((module, go)).encode())
    for file in module.files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def cache() -> Path:
    """Where everything is kept from run to run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "datavector" / "cluster"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    for each in (CONTROL_PLANE, FLOOR, HELM, NODE):
        print(build(each))
