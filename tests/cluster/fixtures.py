"""Fixtures of tests that talk to Kubernetes.

A plugin of tests/conftest.py. The binaries are built before the first test, so that no
test's time limit counts the minutes that this can take.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from tests.cluster.build import CONTROL_PLANE, FLOOR, HELM, CannotBuild, Module, build
from tests.cluster.client import Cluster
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet

DEFINITIONS = Path(__file__).parents[2] / "charts" / "crds" / "templates"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds what the chosen tests need."""
    needed = {name for item in session.items for name in _fixtures_of(item)}
    modules = []
    if "floor" in needed or ("cluster" in needed and not _given()):
        modules.append(CONTROL_PLANE)
    if "floor" in needed:
        modules.append(FLOOR)
    if "helm" in needed and not shutil.which("helm"):
        modules.append(HELM)
    if modules and not session.config.option.collectonly:
        with session.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            for module in modules:
                _build(module)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster of KUBECONFIG if that names a file, else a control plane on loopback."""
    if given := _given():
        yield Cluster(given, tmp_path_factory.mktemp("cluster"))
        return
    plane = ControlPlane(tmp_path_factory.mktemp("cluster") / "control-plane", components=_built(CONTROL_PLANE))
    yield plane
    plane.close()


@pytest.fixture
def control_plane(cluster: Cluster) -> Iterator[ControlPlane]:
    """The cluster, where its API server can be stopped; started again after the test."""
    if not isinstance(cluster, ControlPlane):
        pytest.skip("the API server of the cluster in KUBECONFIG is not ours to stop")
    yield cluster
    if "kube-apiserver" not in cluster.pids:
        cluster.start_api_server()


@pytest.fixture(scope="session")
def floor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server of the oldest Kubernetes that DataVector works with, without controllers."""
    components, oldest = _built(CONTROL_PLANE), _built(FLOOR) / "kube-apiserver"
    folder = tmp_path_factory.mktemp("floor") / "control-plane"
    plane = ControlPlane(folder, components=components, api_server=oldest, controllers=False)
    yield plane
    plane.close()


@pytest.fixture(scope="session")
def helm() -> Path:
    """The helm of this machine, else one that is built here."""
    found = shutil.which("helm")
    return Path(found) if found else _built(HELM) / "helm"


@pytest.fixture(scope="session")
def crds(cluster: Cluster) -> tuple[str, ...]:
    """The custom resource definitions, established in the cluster; their names. They hold for the whole cluster."""
    return establish_definitions(cluster)


@pytest.fixture(scope="session", params=["cluster", "floor"])
def served(request: pytest.FixtureRequest) -> Cluster:
    """The cluster, and then the oldest one, with the custom resource definitions."""
    cluster: Cluster = request.getfixturevalue(request.param)
    establish_definitions(cluster)
    return cluster


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A fresh namespace that allows only restricted Pods."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl(
        "create", "-f", "-",
        input={"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}},
    )  # fmt: skip
    cluster.kubectl("wait", "--for=create", "serviceaccount/default", f"--namespace={name}", "--timeout=120s")
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")
    if not cluster.runs_pods:  # no kubelet will let them go
        cluster.kubectl("delete", "pods", "--all", "--force", "--wait=false", f"--namespace={name}")


@pytest.fixture
def start_kubelet(cluster: Cluster, namespace: str, tmp_path: Path) -> Iterator[Callable[..., Kubelet]]:
    """Starts what runs the namespace's Pods: `start_kubelet(volumes={"store": path})`; see Kubelet."""
    if cluster.runs_pods:
        pytest.skip("the cluster in KUBECONFIG has nodes of its own")
    with ExitStack() as stack:

        def start(**options: object) -> Kubelet:
            folder = tmp_path / "node"
            kubelet = Kubelet(cluster.kubeconfig, folder, namespaces={namespace}, **options)  # type: ignore[arg-type]
            stack.callback(kubelet.close)
            return kubelet

        yield start


def _fixtures_of(item: pytest.Item) -> set[str]:
    """The fixtures that a test names, and the cluster that `served` stands for in it."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return {*getattr(item, "fixturenames", ()), parameters.get("served", "")}


def establish_definitions(cluster: Cluster) -> tuple[str, ...]:
    """Applies the committed custom resource definitions, waits until they serve, and returns their names."""
    names = tuple(cluster.kubectl("apply", f"--filename={DEFINITIONS}", "--output=name").split())
    cluster.kubectl("wait", "--for=condition=Established", *names, "--timeout=60s")
    return names


def _given() -> Path | None:
    """The kubeconfig of a cluster to use instead of one from here."""
    path = Path(os.environ.get("KUBECONFIG", ""))
    return path if path.is_file() else None


@cache
def _build(module: Module) -> Path | CannotBuild:
    """Tries once: what failed is not tried again for the next test."""
    try:
        return build(module)
    except CannotBuild as error:
        return error


def _built(module: Module) -> Path:
    """The folder with a module's binaries; where they cannot be built, the test is skipped."""
    folder = _build(module)
    if isinstance(folder, CannotBuild):
        pytest.skip(str(folder))
    return folder
