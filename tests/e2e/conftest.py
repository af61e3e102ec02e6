"""What end-to-end tests stand on: one real cluster with nodes for the whole run, our images in it, helm.

KUBECONFIG names a file: that cluster. Else kind, where Docker runs; else a node built from sources, where this machine
allows it. Else the tests are skipped, and say why. All that is made before the first test, so no time limit counts it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from datavector.files import locked
from tests.cluster.build import CONTROL_PLANE, HELM, NODE, CannotBuild, build, cache
from tests.cluster.client import Cluster
from tests.cluster.images import (
    AGENT,
    CLIENT,
    CONTROL,
    IMAGES,
    JOB,
    BuildFailed,
    build_images,
    docker_runs,
    load_into_kind,
    load_into_node,
    size,
)
from tests.cluster.node import Node, demand_node
from tests.e2e.space import Helm, Space

LOGS = Path(__file__).parents[2] / "e2e-logs"
KIND = "datavector-e2e"

_stages: list[tuple[str, float]] = []
_ready: Cluster | str = "no test asked for a cluster"  # or why there is none
_closing = ExitStack()


class Kind(Cluster):
    """A kind cluster, made for this run."""

    def __init__(self, folder: Path) -> None:
        kubeconfig = folder / "kubeconfig"
        image = [f"--image={os.environ['KIND_NODE_IMAGE']}"] if os.environ.get("KIND_NODE_IMAGE") else []
        create = ["kind", "create", "cluster", f"--name={KIND}", f"--kubeconfig={kubeconfig}", "--wait=180s", *image]
        subprocess.run(create, check=True)
        super().__init__(kubeconfig, folder)

    def close(self) -> None:
        subprocess.run(["kind", "delete", "cluster", f"--name={KIND}"], check=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    global _ready
    wanted = any("cluster" in getattr(item, "fixturenames", ()) for item in session.items)
    if not wanted or session.config.option.collectonly:
        return
    with session.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        try:
            _ready = _prepare()
        except CannotBuild as error:
            _ready = str(error)
        except BuildFailed as error:
            pytest.exit(str(error), returncode=1)


def pytest_unconfigure() -> None:
    _closing.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("wall time by stage")
    for name, seconds in _stages:
        terminalreporter.write_line(f"{seconds:7.1f} s  {name}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        _stages.append((report.nodeid.partition("::")[2], report.duration))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Keeps what every Pod said where a test has failed, before its namespaces go."""
    report = yield
    if report.failed and isinstance(_ready, Cluster):
        with stage("logs kept"):
            keep_logs(_ready, LOGS / item.name)
    return report


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    if isinstance(_ready, str):
        pytest.skip(_ready)
    return _ready


@pytest.fixture
def node(cluster: Cluster) -> Node:
    """The cluster, where its node is this machine and may be disturbed."""
    if not isinstance(cluster, Node):
        pytest.skip("this cluster's node is not ours to disturb")
    return cluster


@pytest.fixture(scope="session")
def images(cluster: Cluster) -> dict[str, str]:
    """The images' names, which the cluster's nodes have."""
    return {"control": CONTROL.tag, "job": JOB.tag, "agent": AGENT.tag, "client": CLIENT.tag}


@pytest.fixture(scope="session")
def helm(cluster: Cluster) -> Path:
    """The helm program."""
    return Path(shutil.which("helm") or build(HELM) / "helm")


@pytest.fixture(scope="session")
def charts(cluster: Cluster, helm: Path) -> Helm:
    """helm for that cluster; the definitions are installed."""
    charts = Helm(helm, cluster)
    charts.install("datavector-crds", "crds", namespace="default")
    return charts


@pytest.fixture(scope="module")
def spaces(cluster: Cluster) -> Iterator[Spaces]:
    """Makes namespaces that allow only restricted Pods: `spaces("north")`; they are gone after the module."""
    made = Spaces(cluster)
    yield made
    made.remove()


class Spaces:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._names: list[str] = []

    def __call__(self, name: str) -> Space:
        space = Space.make(self._cluster, name)
        self._names.append(name)
        return space

    def remove(self) -> None:
        if self._names:
            self._cluster.kubectl("delete", "namespace", *self._names, "--wait=false")


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Notes how long a part takes, for the summary."""
    started = time.monotonic()
    yield
    _stages.append((name, time.monotonic() - started))


def keep_logs(cluster: Cluster, folder: Path) -> None:
    """Writes objects, events, and what every container has said, now and before its last restart."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = "pods,jobs,deployments,pvc,pv,services"
    (folder / "objects.txt").write_text(cluster.kubectl("get", kinds, "--all-namespaces", "--output=wide", check=False))
    ours = cluster.kubectl("get", "bm,dv,mp,mv", "--all-namespaces", "--output=yaml", check=False)
    (folder / "datavector.yaml").write_text(ours)
    events = cluster.kubectl("get", "events", "--all-namespaces", "--sort-by=.lastTimestamp", check=False)
    (folder / "events.txt").write_text(events)
    for pod in cluster.get("pods", "--all-namespaces")["items"]:
        meta, spec = pod["metadata"], pod["spec"]
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            for previous in (False, True):
                said = cluster.kubectl(
                    "logs", meta["name"], f"--namespace={meta['namespace']}", f"--container={container['name']}",
                    f"--previous={str(previous).lower()}", check=False,
                )  # fmt: skip
                name = f"{meta['namespace']}.{meta['name']}.{container['name']}{'.previous' if previous else ''}.log"
                if not said.startswith("Error from server"):
                    (folder / name).write_text(said)


def _prepare() -> Cluster:
    """
    Raises:
        CannotBuild: there can be no cluster here.
    """
    shutil.rmtree(LOGS, ignore_errors=True)
    given = Path(os.environ.get("KUBECONFIG", ""))
    if given.is_file():
        return Cluster(given, Path(_closing.enter_context(tempfile.TemporaryDirectory(prefix="e2e-"))))
    if shutil.which("kind") and docker_runs():
        with stage("images built"):
            build_images()
        with stage("kind cluster up"):
            kind = Kind(Path(_closing.enter_context(tempfile.TemporaryDirectory(prefix="e2e-"))))
            _closing.callback(kind.close)
        with stage("images loaded"):
            load_into_kind(KIND)
        return kind
    demand_node()
    with stage("Kubernetes and helm built"):
        programs = build(CONTROL_PLANE), build(NODE)
        build(HELM)
    with stage("images built"):
        build_images()
    _closing.enter_context(locked(cache() / "running-node.lock"))
    with stage("node up"):
        node = Node(components=programs[0], node=programs[1])
        _closing.callback(node.close)
    with stage("images loaded"):
        load_into_node(node)
    for image in IMAGES:
        _stages.append((f"({image.tag}: {size(image)})", 0.0))
    return node
