"""Everything goes wrong once on a real node, and the story ends the same. Each test goes on from the one before it."""

from __future__ import annotations

import re
import ssl
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aggregator.reconcile import Stage
from aggregator.store import Store
from datavector.files import sha256_file
from datavector.merge import merge_vectors
from datavector.wire.certs import read_report
from tests.cluster.control_plane import ControlPlaneFailed
from tests.cluster.node import RUN, Node
from tests.e2e.conftest import LOGS, stage
from tests.e2e.site import RELEASE, Hospital, Site
from tests.e2e.space import Space, datavector
from tests.integration.conftest import CLASSES, draw_images

pytestmark = pytest.mark.timeout(900)

LARGE = {"epochs": 1, "batchSize": 8}  # training; the vector has 90 MiB
LONG = {"epochs": 12, "batchSize": 8}
POLICY = {
    "method": {"name": "sum"},
    "trigger": {"minHospitals": 3, "quietPeriodSeconds": 0},
    "calibration": {"mode": "uploaded"},
}
HALFWAY = 8 << 20  # bytes of a vector


@pytest.fixture(scope="module")
def site(cluster: Any, spaces: Any, charts: Any, images: Any, tmp_path_factory: pytest.TempPathFactory) -> Site:
    if not isinstance(cluster, Node):
        pytest.skip("this cluster's node is not ours to disturb")
    site = Site(spaces("faults"), charts, images, tmp_path_factory.mktemp("faults"))
    site.install()
    base = site.bring_base(site.make_base("resnet50", size=32, classes=list(CLASSES)))
    site.set_policy("all", {**POLICY, "baseModelRef": base, "suspend": True})  # until all three have delivered
    return site


@pytest.fixture(scope="module")
def store(site: Site) -> Store:
    """The site's volume, which is a folder of this machine."""
    volume = site.space.get("pvc", f"{RELEASE}-store")["spec"]["volumeName"]
    return Store(RUN / "volumes" / volume, read_only=True)


@pytest.fixture(scope="module")
def join(site: Site, spaces: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Hospital]:
    """A hospital with drawn images, not installed yet: `join("alpha")`."""

    def make(name: str) -> Hospital:
        folder = tmp_path_factory.mktemp(name)
        draw_images(folder / "images", seed=len(name))
        return Hospital(site, spaces(name), name, folder / "images", by_path=True)

    return make


def test_an_upload_goes_on_where_its_receiver_was_deleted(site: Site, node: Node, store: Store, join: Any):
    before = receiver(site)
    node.slow_down(before["status"]["podIP"], "80mbit")
    alpha = join("alpha")
    alpha.install("job", training=LARGE)
    alpha.site.space.until(lambda: arrived(store, "alpha") > HALFWAY, seconds=300, why=alpha.log)
    site.space.kubectl("delete", "pod", before["metadata"]["name"], "--wait=false")
    with stage("an upload whose receiver was deleted"):
        alpha.delivered()
    after = receiver(site)
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    resumed = metric(after, "datavector_receiver_resumed_bytes_total")
    assert resumed >= HALFWAY
    record(f"upload: the receiver was deleted after {HALFWAY:,} bytes; it went on after {resumed:,.0f}")


@pytest.mark.parametrize(("name", "mode"), [("beta", "deployment"), ("gamma", "job")])
def test_training_goes_on_where_its_pod_was_evicted(site: Site, node: Node, join: Any, name: str, mode: str):
    hospital = join(name)
    hospital.install(mode, training=LONG)
    first = trains(hospital)
    evict(hospital.space, first)
    second = hospital.space.until(lambda: next((each for each in agents(hospital) if each != first), None), seconds=120)
    began = hospital.space.until(lambda: epochs(hospital.space, second), seconds=300)
    assert min(began) > 1, "training began anew"
    record(f"{mode}: evicted in epoch 2, went on with epoch {min(began)}")

    uid = pod(hospital.space, second)["metadata"]["uid"]
    node.restart_containerd()
    hospital.delivered()
    if mode == "deployment":
        assert pod(hospital.space, second)["metadata"]["uid"] == uid
        assert restarts(pod(hospital.space, second)) == 0, "the agent did not live through the restart of containerd"
    else:
        (job,) = hospital.space.items("jobs")
        hospital.space.wait(f"job/{job['metadata']['name']}", "condition=Complete")


def test_a_version_becomes_ready_though_the_operator_and_both_jobs_were_killed(site: Site, node: Node, store: Store):
    site.space.kubectl("patch", "mp", "all", "--type=merge", "--patch", '{"spec":{"suspend":false}}')
    kill_job(site, node, "merge")
    operator = site.space.pods("app.kubernetes.io/name=datavector-operator")[0]["metadata"]["name"]
    site.space.kubectl("delete", "pod", operator, "--wait=false")
    kill_job(site, node, "release")
    with stage("a version whose operator and jobs were killed"):
        version = site.ready("alpha", "beta", "gamma")
    name = version["metadata"]["name"]
    for part in ("merge", "release"):
        site.space.until(lambda part=part: phases(site, part) == ["Failed", "Succeeded"], why=site.explain)
    assert sha256_file(store.merged(name, "sum")) == merged_here(store, version, site.folder)
    assert len(site.space.items("modelversions")) == 1


def test_a_denied_hospital_is_refused_within_a_minute_and_may_come_back(site: Site):
    beta = Space(site.space.cluster, "beta")

    def fetch(folder: str) -> str:
        command = ("datavector", "release", "fetch", "--output", f"/tmp/{folder}")
        return beta.kubectl("exec", "deploy/beta", "--", *command, check=False)

    assert "parity" in fetch("first")
    started = time.monotonic()
    deny(site, "beta")
    beta.until(lambda: "deny list" in fetch("second"))
    record(f"denied: refused after {time.monotonic() - started:.1f} s")
    assert time.monotonic() - started < 60
    deny(site, "")
    beta.until(lambda: "parity" in fetch("third"))


def test_a_renewed_certificate_is_shown_without_a_restart(site: Site):
    before = receiver(site)
    shown = fingerprint(before)
    datavector("certs", "issue", "--authority", site.certificates, "--aggregator", "--server-name", site.server)
    site.give_secret(site.space, "aggregator-tls", "--aggregator")
    started = time.monotonic()
    site.space.until(lambda: fingerprint(before) != shown, seconds=180)
    record(f"certificate: the renewed one was shown after {time.monotonic() - started:.0f} s")
    after = receiver(site)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert restarts(after) == restarts(before)
    renewed = read_report((site.certificates / "aggregator.crt").read_bytes())
    assert fingerprint(after) == renewed.fingerprint


# --- Parts


def receiver(site: Site) -> dict[str, Any]:
    """The receiver's Pod, once it is ready."""
    site.space.rolled_out(f"{RELEASE}-receiver")
    (found,) = site.space.pods("app.kubernetes.io/name=datavector-receiver")
    return found


def arrived(store: Store, hospital: str) -> int:
    """Bytes of a hospital's vector that are in the store and not committed yet."""
    return max((part.stat().st_size for part in (store.root / "uploads" / hospital).glob("*/part")), default=0)


def metric(pod: dict[str, Any], name: str) -> float:
    with urllib.request.urlopen(f"http://{pod['status']['podIP']}:9090/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def pod(space: Space, name: str) -> dict[str, Any]:
    return space.get("pod", name)


def agents(hospital: Hospital) -> list[str]:
    """Names of the agent's Pods that are not being deleted."""
    return [each["metadata"]["name"] for each in hospital.space.pods("app.kubernetes.io/component=agent")]


def epochs(space: Space, pod: str) -> list[int]:
    """The epochs that a Pod's log tells of."""
    return [int(number) for number in re.findall(r"epoch (\d+) of", space.logs(pod))]


def trains(hospital: Hospital) -> str:
    """The agent's Pod, once it has ended its second epoch and goes on training."""

    def look() -> str:
        for name in agents(hospital):
            done = epochs(hospital.space, name)
            assert max(done, default=0) < LONG["epochs"], "training was over too early to be disturbed"
            if max(done, default=0) >= 2:
                return name
        return ""

    return str(hospital.space.until(look, seconds=300, why=hospital.log))


def evict(space: Space, pod: str) -> None:
    content = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": space.name}}
    space.cluster.kubectl(
        "create", "--raw", f"/api/v1/namespaces/{space.name}/pods/{pod}/eviction", "-f", "-", input=content
    )


def restarts(pod: dict[str, Any]) -> int:
    return sum(int(each["restartCount"]) for each in pod["status"]["containerStatuses"])


def kill_job(site: Site, node: Node, part: Stage) -> None:
    """Kills the container of a stage's Job while it works."""

    def kill() -> bool:
        for each in site.space.pods(f"datavector.dev/stage={part}"):
            try:
                node.kill_container(each["metadata"]["uid"], "job")
            except (LookupError, ControlPlaneFailed):  # it has not begun, or has ended
                continue
            return True
        return False

    site.space.until(kill, seconds=300, why=site.explain)


def phases(site: Site, part: str) -> list[str]:
    """Of the Pods of a stage's Job."""
    return sorted(each["status"]["phase"] for each in site.space.pods(f"datavector.dev/stage={part}"))


def merged_here(store: Store, version: dict[str, Any], folder: Path) -> str:
    """The digest of what a direct merge of the same vectors gives."""
    spec = version["spec"]
    base = store.base(spec["baseModelRef"])
    vectors = [store.blob(each["hospital"], each["digest"]) for each in spec["inputs"]]
    merge_vectors(base, vectors, "sum", {}, folder / "merged.safetensors")
    return sha256_file(folder / "merged.safetensors")


def deny(site: Site, text: str) -> None:
    site.space.kubectl(
        "patch", "configmap", f"{RELEASE}-denied", "--type=merge", "--patch", f'{{"data":{{"denied":"{text}"}}}}'
    )


def fingerprint(pod: dict[str, Any]) -> str:
    """SHA-256 of the certificate that a receiver shows."""
    pem = ssl.get_server_certificate((pod["status"]["podIP"], 8443), timeout=10)
    return read_report(pem.encode()).fingerprint


def record(line: str) -> None:
    """Keeps a figure."""
    (LOGS / "faults").mkdir(parents=True, exist_ok=True)
    with (LOGS / "faults" / "figures.txt").open("a") as file:
        file.write(f"{line}\n")
