"""Wrong values on a real cluster: the Pod, its events or helm say which value to change, and nothing runs in circles.

All that is wrong is installed first, side by side in one namespace; then each test looks at what a person would see.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from datavector.wire.certs import issue_hospital
from tests.charts.rendering import HelmFailed
from tests.cluster.node import RUN, Node
from tests.e2e.conftest import LOGS, stage
from tests.e2e.site import Hospital, Site
from tests.e2e.space import Space, datavector
from tests.integration.conftest import CLASSES, draw_images

pytestmark = pytest.mark.timeout(600)

HUB = "wrong-hub"
POLICY = {
    "trigger": {"minHospitals": 1, "quietPeriodSeconds": 0},
    "calibration": {"mode": "none"},
    "job": {"image": "localhost/no-such-job:1"},
}
JOB = {"mode": "job"}
CUDA = {"training": {"epochs": 1, "device": "cuda"}}
EXPIRED = {"tls": {"secret": "expired-tls"}}

# What is wrong in each release, and what its last lines say: what is wrong, and which value to change.
ENDING: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "expired": (EXPIRED, ("/tls/tls.crt expired on ", "ask the aggregation site", "tls.secret")),
    "expired-job": (EXPIRED | JOB, ("/tls/tls.crt expired on ", "tls.secret")),
    "other-hospital": ({"hospital": "south"}, ("this certificate speaks for 'north'", "set hospital = 'north'")),
    "key-lacking": ({"tls": {"secret": "lacking-tls"}}, ("/tls/ca.crt cannot be read", "tls.secret")),
    "name-not-certified": ({}, ("shows a certificate that is not to be trusted", "set by: aggregator")),
    "no-images": ({"data": {"existingClaim": "empty"}}, ("/data holds no image", "data.existingClaim")),
    "no-such-path": (
        {"data": {"existingClaim": "images", "path": "brain"}}, ("/data/brain does not exist", "data.path"),
    ),
    "no-gpu-visible": (CUDA, ("training.device is cuda, but no GPU is visible", "gpu.count", "or set training.device")),
    "no-gpu-visible-job": (CUDA | JOB, ("training.device is cuda", "gpu.count", "or set training.device")),
    "small-state": ({"state": {"existingClaim": "small-state"}}, ("no space left for ", "state.existingClaim")),
}  # fmt: skip

# What `kubectl describe pod` says of a Pod that cannot start, and what helm has said of it.
WAITING: dict[str, tuple[dict[str, Any], str, str]] = {
    "no-secret": ({"tls": {"secret": "absent"}}, 'secret "absent" not found', "no Secret absent (value tls.secret)"),
    "no-claim": (
        {"data": {"existingClaim": "absent"}}, 'persistentvolumeclaim "absent" not found',
        "absent (value data.existingClaim)",
    ),
    "no-state-claim": (
        {"state": {"existingClaim": "absent"}}, 'persistentvolumeclaim "absent" not found',
        "absent (value state.existingClaim)",
    ),
    "no-folder": (
        {"data": {"hostPath": "/nowhere/images"}}, "hostPath type check failed: /nowhere/images is not a directory",
        "/nowhere/images (value data.hostPath) must be on the Pod's node",
    ),
    "no-image": ({"image": {"tag": "no-such"}}, "/datavector-agent:no-such", ""),
    "no-image-here": ({"image": {"tag": "no-such", "pullPolicy": "Never"}}, "/datavector-agent:no-such", ""),
    "no-gpu": ({"gpu": {"count": 1}}, "Insufficient nvidia.com/gpu", ""),
}  # fmt: skip

LOCAL = {"small-state", "no-folder"}  # need a node that is this machine


@dataclass
class Wrong:
    """A namespace full of wrong releases.

    Attributes:
        notes: what helm printed, by release.
    """

    site: Site
    space: Space
    notes: dict[str, str] = field(default_factory=dict)

    def install(self, release: str, **values: Any) -> None:
        content = {
            "aggregator": self.site.address,
            "data": {"existingClaim": "images"},
            "tls": {"secret": "north-tls"},
            "training": {"epochs": 1},
            "resources": {"requests": {"cpu": "10m", "memory": "100Mi"}},
            "state": {"size": "1Gi"},
        }
        content["image"] = {"repository": self.site.images["agent"].rpartition(":")[0]} | values.pop("image", {})
        content |= values
        self.notes[release] = self.site.charts.install(release, "agent", namespace=self.space.name, values=content)

    def pods(self, release: str) -> list[dict[str, Any]]:
        return self.space.pods(f"app.kubernetes.io/instance={release},app.kubernetes.io/component=agent")

    def describe(self, release: str) -> str:
        return self.space.kubectl("describe", "pod", f"--selector=app.kubernetes.io/instance={release}")

    def last_words(self, release: str) -> str:
        """What the state of a Pod that has ended holds: its last lines; empty where none has ended.

        Output and errors come through two pipes, so that a line before an error may be after it.
        """
        for pod in self.pods(release):
            for container in pod["status"].get("containerStatuses", ()):
                for state in (container["state"], container.get("lastState", {})):
                    if message := state.get("terminated", {}).get("message"):
                        return "\n".join(message.strip().splitlines()[-4:])
        return ""

    def until_ended(self, release: str) -> str:
        """Waits until a Pod has ended; its last words."""
        said = str(self.space.until(lambda: self.last_words(release), why=lambda: self.describe(release)))
        record(release, said)
        return said

    def until_waiting(self, release: str, address: str) -> None:
        """Waits until the last line of a release's newest Pod says that nobody answers at an address."""

        def look() -> str:
            pods = self.pods(release)
            line = self.space.logs(f"pod/{pods[-1]['metadata']['name']}", "--tail=1") if pods else ""
            return line if f"aggregator {address}: not reachable since " in line else ""

        record(release, self.space.until(look, why=lambda: self.describe(release)))

    def job(self, release: str) -> dict[str, Any]:
        (found,) = self.space.get("jobs", f"--selector=app.kubernetes.io/instance={release}")["items"]
        return dict(found)


@pytest.fixture(scope="module")
def volumes() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def site(spaces: Any, charts: Any, images: Any, volumes: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """An aggregation site with a policy whose job.image is wrong; on this machine its store is a small volume."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    datavector(
        "base", "create", "--architecture", "mobilenet_v3_small", "--size", "32", "--name", "tiny",
        "--classes", folder / "classes.txt", "--output", folder / "base",
    )  # fmt: skip
    site = Site(spaces(HUB), charts, images, folder)
    store = {}
    if site.space.cluster.is_local:
        make_small_volume(site.space, "store", 64, volumes)
        store = {"store": {"existingClaim": "store"}}
    with stage("aggregation site installed"):
        site.install(**store)
    base = site.bring_base(folder / "base")
    site.set_policy("brain-mri", {**POLICY, "baseModelRef": base})
    site.space.wait(f"bm/{base}", "condition=Available")
    return site


@pytest.fixture(scope="module")
def north(site: Site, spaces: Any, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    """A hospital that is right, with images in a volume."""
    images = tmp_path_factory.mktemp("images") / "north"
    draw_images(images, seed=0)
    return Hospital(site, spaces("wrong"), "north", images, by_path=False)


@pytest.fixture(scope="module", autouse=True)
def wrong(site: Site, north: Hospital, volumes: ExitStack) -> Wrong:
    wrong, space, certificates = Wrong(site, north.space), north.space, site.certificates
    local = space.cluster.is_local
    if local:  # nobody can bring anything
        site.in_receiver("sh", "-c", "cat /dev/zero > /store/ballast || true")
    north.install(training={"epochs": 1})
    issue_hospital(certificates, "late", days=-1)
    make_secret(space, "expired-tls", certificates / "late.crt", certificates / "late.key", certificates / "ca.crt")
    make_secret(space, "lacking-tls", certificates / "north.crt", certificates / "north.key")
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "10Mi"}}}
    space.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "empty"}, "spec": claim})
    address = site.space.get("service/site-receiver")["spec"]["clusterIP"]
    host = f"[{address}]" if ":" in address else address
    if local:
        make_small_volume(space, "small-state", 8, volumes)
        made = "--selector=app.kubernetes.io/instance=no-folder"
        volumes.callback(space.kubectl, "delete", "pv", made, "--wait=false")
    with stage("wrong agents installed"):
        for release, (values, *_) in (ENDING | WAITING).items():
            if local or release not in LOCAL:
                dialled = {"aggregator": f"{host}:8443"} if release == "name-not-certified" else {}
                wrong.install(release, **values | dialled)
        wrong.install("no-such-name", aggregator="merge.invalid:8443")
        wrong.install("closed-port", aggregator=f"{site.server}:9443")
        values = {"tls": {"secret": "absent"}, "image": {"repository": site.images["control"].rpartition(":")[0]}}
        wrong.notes["lost"] = site.charts.install("lost", "aggregator", namespace=space.name, values=values)
    return wrong


@pytest.mark.parametrize(
    ("value", "named"),
    [("aggregator=merge.example.org", "aggregator is"), ("trainig.epochs=3", "trainig"), ("gpu.count=all", "count")],
)
def test_helm_refuses_a_value_by_its_name_and_installs_nothing(wrong: Wrong, value: str, named: str):
    needed = "aggregator=a:1,tls.secret=north-tls,data.existingClaim=images"
    flags = ["--set", needed, "--set", value]
    with pytest.raises(HelmFailed, match=named):
        wrong.site.charts.install("refused", "agent", *flags, namespace=wrong.space.name)
    assert "refused" not in wrong.site.charts("list", "--all", f"--namespace={wrong.space.name}")


@pytest.mark.parametrize("release", ENDING)
def test_the_last_lines_of_an_agent_that_ended_say_which_value_to_change(wrong: Wrong, release: str):
    if release not in wrong.notes:
        pytest.skip("the node is not this machine")
    said = wrong.until_ended(release)
    for part in ENDING[release][1]:
        assert part in said


@pytest.mark.parametrize("release", WAITING)
def test_the_events_of_an_agent_that_cannot_start_name_what_is_missing(wrong: Wrong, release: str):
    if release not in wrong.notes:
        pytest.skip("the node is not this machine")
    _, event, note = WAITING[release]
    wrong.space.until(lambda: event in events(wrong.describe(release)), why=lambda: wrong.describe(release))
    record(release, events(wrong.describe(release)))
    assert note in wrong.notes[release]
    (pod,) = wrong.pods(release)
    assert pod["status"]["phase"] == "Pending"


def test_an_image_that_no_node_gets_shows_in_the_status(wrong: Wrong):
    expected = {"no-image": {"ErrImagePull", "ImagePullBackOff"}, "no-image-here": {"ErrImageNeverPull"}}
    for release, reasons in expected.items():
        (pod,) = wrong.pods(release)
        assert pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] in reasons


@pytest.mark.parametrize("release", ["no-such-name", "closed-port"])
def test_an_agent_whom_nobody_answers_keeps_trying_and_says_where(wrong: Wrong, release: str):
    address = {"no-such-name": "merge.invalid:8443", "closed-port": f"{wrong.site.server}:9443"}[release]
    wrong.until_waiting(release, address)
    (pod,) = wrong.pods(release)
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 0


def test_an_aggregator_without_its_secret_waits_for_it(wrong: Wrong):
    assert "no Secret absent (value tls.secret)" in wrong.notes["lost"]
    missing = 'secret "absent" not found'
    wrong.space.until(lambda: missing in events(wrong.describe("lost")), why=lambda: wrong.describe("lost"))


def test_a_full_store_refuses_a_vector_and_takes_it_once_there_is_room(node: Node, wrong: Wrong, north: Hospital):
    said = wrong.until_ended("north")
    assert "the aggregator's disk is full; nothing of this call was kept" in said
    assert "tell the aggregation site" in said
    (receiver,) = wrong.site.space.pods("app.kubernetes.io/name=datavector-receiver")
    assert receiver["status"]["containerStatuses"][0]["restartCount"] == 0
    wrong.site.in_receiver("rm", "/store/ballast")
    north.delivered()


def test_a_policy_whose_image_no_node_gets_says_so_at_the_version(wrong: Wrong, north: Hospital):
    north.delivered()

    def told() -> str:
        versions = wrong.site.space.items("modelversions")
        conditions = [each for version in versions for each in version.get("status", {}).get("conditions", ())]
        return next((each["message"] for each in conditions if "job.image" in each.get("message", "")), "")

    said = wrong.site.space.until(told, why=wrong.site.explain)
    record("job-image", said)
    assert "the node cannot get the image localhost/no-such-job:1" in said
    assert "set job.image in the policy to another" in said
    assert len(wrong.site.space.pods("app.kubernetes.io/managed-by=datavector")) == 1


def test_a_job_with_a_wrong_setting_fails_at_once_with_one_pod(wrong: Wrong):
    def failed() -> dict[str, Any] | None:
        conditions = wrong.job("no-gpu-visible-job").get("status", {}).get("conditions", ())
        return next((each for each in conditions if each["type"] == "Failed"), None)

    assert wrong.space.until(failed)["reason"] == "PodFailurePolicy"
    assert len(wrong.pods("no-gpu-visible-job")) == 1


def test_a_job_whose_state_folder_is_still_in_use_tries_again_until_it_is_free(wrong: Wrong):
    address = f"{wrong.site.server}:9443"
    wrong.until_waiting("closed-port", address)
    wrong.install("second", **JOB, aggregator=address, state={"existingClaim": "closed-port-state"})
    assert "another agent uses the state folder /state" in wrong.until_ended("second")
    wrong.site.charts("uninstall", "closed-port", f"--namespace={wrong.space.name}")
    wrong.until_waiting("second", address)
    assert not wrong.job("second")["status"].get("conditions")


def test_what_fails_again_is_tried_again_ever_more_rarely(wrong: Wrong):
    now, restarts = datetime.now(UTC), {}
    for pod in wrong.space.pods("app.kubernetes.io/component=agent"):
        age = now - datetime.fromisoformat(pod["metadata"]["creationTimestamp"])
        for container in pod["status"].get("containerStatuses", ()):
            restarts[pod["metadata"]["name"]] = container["restartCount"]
            assert container["restartCount"] <= tries(age.total_seconds())
    record("restarts", "\n".join(f"{count:3} {name}" for name, count in restarts.items()))
    assert max(restarts.values()) > 0
    job = wrong.job("expired-job")
    age = now - datetime.fromisoformat(job["metadata"]["creationTimestamp"])
    assert len(wrong.pods("expired-job")) <= tries(age.total_seconds())


# --- Parts


def tries(seconds: float) -> float:
    """How often something is tried at most, with pauses of 10, 20, 40 ... seconds."""
    return 2 + math.log2(1 + seconds / 10)


def events(described: str) -> str:
    return described.partition("\nEvents:")[2]


def record(name: str, text: str) -> None:
    """Keeps a transcript."""
    (LOGS / "bad-input").mkdir(parents=True, exist_ok=True)
    (LOGS / "bad-input" / f"{name}.txt").write_text(text)


def make_secret(space: Space, name: str, certificate: Path, key: Path, ca: Path | None = None) -> None:
    """A Secret as people make it with kubectl."""
    files = {"tls.crt": certificate, "tls.key": key} | ({"ca.crt": ca} if ca else {})
    space.kubectl("create", "secret", "generic", name, *(f"--from-file={key}={path}" for key, path in files.items()))


def make_small_volume(space: Space, name: str, size: int, volumes: ExitStack) -> None:
    """A claim of a file system in memory, of so many MiB, on this machine; it is gone when the stack is."""
    folder = RUN / "small" / f"{space.name}-{name}"  # where the next node finds what a killed run left
    folder.mkdir(parents=True)
    options = f"size={size}m,uid=10001,gid=10001,mode=0770"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "datavector", str(folder)], check=True)
    volumes.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
    volume = f"{space.name}-{name}"
    spec: dict[str, Any] = {"accessModes": ["ReadWriteOnce"], "storageClassName": ""}
    owner = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": space.name, "name": name}
    path = {"path": str(folder), "type": "Directory"}
    source = {"capacity": {"storage": f"{size}Mi"}, "claimRef": owner, "hostPath": path}
    space.apply(
        {
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume},
            "spec": {**spec, **source, "persistentVolumeReclaimPolicy": "Retain"},
        },
        {
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
            "spec": {**spec, "volumeName": volume, "resources": {"requests": {"storage": f"{size}Mi"}}},
        },
    )  # fmt: skip
    volumes.callback(space.cluster.kubectl, "delete", "pv", volume, "--wait=false")
