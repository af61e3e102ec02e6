"""The whole job on a real cluster, as people do it: Helm, kubectl, real Pods, real training.

Each test goes on from the one before it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image, ImageOps

from tests.cluster.aggregation import condition
from tests.e2e.conftest import LOGS, stage
from tests.e2e.site import HOSPITALS, Hospital, Images, Site, make_images
from tests.monitoring.conftest import tool
from tests.monitoring.test_prometheus import prometheus, rules, target

pytestmark = pytest.mark.timeout(1200)
__all__ = ["tool"]  # a fixture

TRAINING = {"epochs": 6, "batchSize": 16, "learningRate": 0.001}
POLICY = {
    "method": {"name": "auto"},
    "evaluation": {"quorum": 2, "allowWorse": True},
    "trigger": {"minHospitals": 2, "quietPeriodSeconds": 20},
    "calibration": {"mode": "visit"},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return make_images(tmp_path_factory.mktemp("images"), each=60, test=48)


@pytest.fixture(scope="module")
def watched() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def site(spaces: Any, charts: Any, images: Any, tmp_path_factory: pytest.TempPathFactory, watched: ExitStack) -> Site:
    site = Site(spaces("hub"), charts, images, tmp_path_factory.mktemp("site"))
    with stage("aggregation site installed"):
        site.install()
    for kind in ("dv", "mp", "mv"):
        watched.callback(watch(site, kind))
    return site


@pytest.fixture(scope="module")
def hospitals(site: Site, spaces: Any, pictures: Images) -> dict[str, Hospital]:
    local = site.space.cluster.is_local
    return {
        name: Hospital(site, spaces(name), name, folder, by_path=local and name == "north")
        for name, folder in pictures.hospitals.items()
    }


def test_an_installed_site_passes_helm_test_and_says_what_to_do_next(site: Site):
    printed = site.charts("test", "site", "--namespace=hub", "--logs")
    assert "Phase:          Succeeded" in printed
    record("helm-test.txt", printed)
    assert "datavector base import" in site.charts("get", "notes", "site", "--namespace=hub")


def test_a_base_model_and_a_policy_are_brought_in(site: Site, pictures: Images):
    base = site.bring_base(site.make_base("efficientnet_lite0", size=128, classes=pictures.classes))
    site.set_policy("brain-mri", {**POLICY, "baseModelRef": base})
    site.space.wait(f"bm/{base}", "condition=Available")
    site.space.until(lambda: "waiting for 2 more" in site.explain(), why=site.explain)


def test_a_hospital_trains_and_delivers_and_stays(hospitals: dict[str, Hospital]):
    hospitals["north"].install(training=TRAINING)
    with stage("north trains and delivers"):
        vector = hospitals["north"].delivered()
    assert vector["spec"]["sampleCount"] > 0
    ledger = hospitals["north"].run("datavector", "agent", "ledger")
    assert " vector " in ledger
    record("ledger.txt", ledger)
    printed = hospitals["north"].site.charts("test", "north", "--namespace=north", "--logs")
    assert "ready" in printed


def test_a_second_one_comes_later_as_a_job_and_a_third_as_a_cronjob(hospitals: dict[str, Hospital]):
    south, east = hospitals["south"], hospitals["east"]
    south.install("job", training=TRAINING)
    with stage("south trains and delivers"):
        south.delivered()
    east.install("cronjob", training=TRAINING, cronjob={"suspend": True})
    east.space.kubectl("create", "job", "now", "--from=cronjob/east")
    with stage("east trains and delivers"):
        east.delivered()
    east.space.wait("job/now", "condition=Complete")
    (south_job,) = south.space.items("jobs")
    south.space.wait(f"job/{south_job['metadata']['name']}", "condition=Complete")


def test_hospitals_that_come_back_make_the_model_ready(site: Site, hospitals: dict[str, Hospital]):
    hospitals["south"].install("deployment", training=TRAINING)  # from now on it stays
    site.space.until(lambda: calibrating(site), why=site.explain)
    hospitals["east"].space.kubectl("create", "job", "later", "--from=cronjob/east")
    with stage("calibration and release"):
        version = site.ready(*HOSPITALS, seconds=600)
    record("ready.txt", site.space.kubectl("get", "bm,dv,mp,mv,jobs,pods", "--output=wide"))
    record("describe.txt", site.space.kubectl("describe", f"mv/{version['metadata']['name']}"))
    evaluation = version["status"]["evaluation"]
    assert evaluation["validated"]
    assert {"north", "south"} <= set(evaluation["hospitals"])
    assert {"mean", "mean.head", "sum"} < {score["name"] for score in evaluation["candidates"]}


def test_merge_jobs_ran_under_restricted_pod_security_and_without_a_token(site: Site):
    def ended() -> list[Any]:
        pods = site.space.pods("app.kubernetes.io/managed-by=datavector")
        return pods if {pod["status"]["phase"] for pod in pods} == {"Succeeded"} else []

    pods = site.space.until(ended, why=site.explain)
    assert {pod["metadata"]["labels"]["datavector.dev/stage"] for pod in pods} == {"merge", "restore", "release"}
    for pod in pods:
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_release_answers_alike_at_a_hospital_and_in_a_pod_of_onnxruntime_alone(
    site: Site, hospitals: dict[str, Hospital], pictures: Images, tmp_path: Path
):
    version = site.ready(*HOSPITALS)["metadata"]["name"]
    printed = hospitals["north"].run("datavector", "release", "fetch", "--output", "/tmp/model")
    assert "FAIL" not in printed
    record("fetch.txt", printed)
    (pod,) = hospitals["north"].space.pods("app.kubernetes.io/component=agent")
    hospitals["north"].space.kubectl("cp", f"{pod['metadata']['name']}:/tmp/model", str(tmp_path / "model"))

    files = [f"--from-file={number:03}{path.suffix}={path}" for number, path in enumerate(pictures.test)]
    site.space.kubectl("create", "configmap", "test-images", *files)
    site.space.run(
        "client", site.images["client"], claims={"/store": "site-store"}, maps={"/images": "test-images"},
        command=["python", "/classify.py", f"/store/releases/{version}/1/model.onnx", "/images"],
    )  # fmt: skip
    answers = list(json.loads(site.space.answer("client")).values())

    assert answers == classify(tmp_path / "model" / "1" / "model.onnx", list(pictures.test))
    right = np.mean([answer == label for answer, label in zip(answers, pictures.test.values(), strict=True)])
    record("accuracy.txt", f"{version}: {right:.1%} of {len(answers)} test images\n")
    assert right > 1.5 / len(pictures.classes), "no better than chance"


def test_prometheus_scrapes_all_three_and_no_alert_fires(
    site: Site, hospitals: dict[str, Hospital], tool: Callable[[str], str], tmp_path: Path
):
    if not site.space.cluster.is_local:
        pytest.skip("the addresses of this cluster's Pods cannot be reached from here")
    names = ("datavector-receiver", "datavector-operator", "datavector-agent")
    targets = []
    for name, space in zip(names, (site.space, site.space, hospitals["north"].space), strict=True):
        running = [
            each for each in space.pods(f"app.kubernetes.io/name={name}") if each["status"]["phase"] == "Running"
        ]
        targets += [target(9090, name=name, host=pod["status"]["podIP"]) for pod in running]
    assert len(targets) == len(names)
    with prometheus(tool("prometheus"), tmp_path / "prometheus", targets) as ask:

        def up() -> dict[str, str]:
            return {each["metric"]["job"]: each["value"][1] for each in ask("query?query=up")["result"]}

        site.space.until(lambda: up() == dict.fromkeys(names, "1"), why=lambda: str(up()))
        site.space.until(lambda: all(rule["health"] == "ok" for rule in rules(ask)), why=lambda: str(rules(ask)))
        states = [f"{rule['name']}: {rule['state']}" for rule in rules(ask)]
        record("prometheus.txt", "\n".join([*(f"up {name}: {value}" for name, value in up().items()), *states]))
        assert [rule["name"] for rule in rules(ask) if rule["state"] == "firing"] == []


def test_service_accounts_may_do_what_they_need_and_no_more(site: Site):
    for account in ("receiver", "operator", "job"):
        listed = site.space.kubectl("auth", "can-i", "--list", f"--as=system:serviceaccount:hub:site-{account}")
        record(f"can-i-{account}.txt", listed)
        rows = [line for line in listed.splitlines()[1:] if not line.startswith(" ")]
        rights = {row.split()[0]: set(row.rpartition("[")[2].rstrip("] ").split()) for row in rows}
        assert {what: verbs for what, verbs in rights.items() if what not in EVERYBODY} == MAY[account], listed


def test_a_withdrawal_revokes_and_the_next_model_never_had_the_vector(site: Site, hospitals: dict[str, Hospital]):
    first = site.ready(*HOSPITALS)["metadata"]["name"]
    vector = site.vectors()["east"]
    blob = f"/store/blobs/east/{vector['spec']['artifact']['digest'].removeprefix('sha256:')}"
    site.in_receiver("test", "-f", blob)
    site.space.kubectl(
        "patch", "dv", vector["metadata"]["name"], "--type=merge", "--patch", '{"spec":{"consent":"Withdrawn"}}'
    )
    site.space.wait(f"mv/{first}", "condition=Revoked")
    with stage("the next version after a withdrawal"):
        second = site.ready("north", "south")
    site.space.until(lambda: site.vectors()["east"]["status"].get("erasedAt"), why=site.explain)
    assert site.in_receiver("sh", "-c", f"test -e {blob} || echo gone").strip() == "gone"
    assert site.in_receiver("sh", "-c", f"test -e /store/releases/{first} || echo gone").strip() == "gone"
    assert condition(second, "Ready")["status"] == "True"
    record("withdrawn.txt", site.space.kubectl("get", "dv,mp,mv"))


def test_every_process_ended_its_logs_without_a_traceback(site: Site, hospitals: dict[str, Hospital]):
    logs = {name: hospital.log() for name, hospital in hospitals.items()}
    logs |= {part: site.space.logs(f"deploy/site-{part}") for part in ("receiver", "operator")}
    for name, text in logs.items():
        record(f"{name}.log", text)
        assert "Traceback" not in text


# --- Parts

EVERYBODY = {
    "selfsubjectreviews.authentication.k8s.io",
    "selfsubjectaccessreviews.authorization.k8s.io",
    "selfsubjectrulesreviews.authorization.k8s.io",
}
OBJECTS = [f"{kind}.datavector.dev" for kind in ("basemodels", "datavectors", "mergepolicies", "modelversions")]
READ = {"get", "list", "watch"}
MAY: dict[str, dict[str, set[str]]] = {
    "receiver": {
        **dict.fromkeys(OBJECTS, READ),
        "datavectors.datavector.dev": READ | {"create", "patch"},
        "configmaps": READ,
    },
    "operator": {
        **dict.fromkeys(OBJECTS, READ),
        "modelversions.datavector.dev": READ | {"create"},
        **{f"{kind}/status": {"patch"} for kind in OBJECTS},
        "jobs.batch": READ | {"create", "delete"},
        "pods": {"list", "watch"},
        "events": {"create"},
    },
    "job": {},
}


def calibrating(site: Site) -> bool:
    return any(each.get("status", {}).get("phase") == "Calibrating" for each in site.space.items("modelversions"))


def classify(model: Path, images: list[Path]) -> list[str]:
    """The labels that this machine's ONNX Runtime gives."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
    answers = []
    for path in images:
        image = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))[None]
        answers.append(labels[int(session.run(["probabilities"], {"images": image})[0][0].argmax())])
    return answers


def record(name: str, text: str) -> None:
    """Keeps a transcript."""
    (LOGS / "story").mkdir(parents=True, exist_ok=True)
    (LOGS / "story" / name).write_text(text)


def watch(site: Site, kind: str) -> Any:
    """`kubectl get KIND --watch` into a transcript; what ends it."""
    record(f"watch-{kind}.txt", f"$ kubectl get {kind} --watch\n")
    cluster = site.space.cluster
    kubectl = [cluster.program, f"--kubeconfig={cluster.kubeconfig}", f"--namespace={site.space.name}"]
    with (LOGS / "story" / f"watch-{kind}.txt").open("a") as output:
        process = subprocess.Popen([*kubectl, "get", kind, "--watch"], stdout=output, stderr=subprocess.STDOUT)

    def end() -> None:
        process.terminate()
        process.wait()

    return end
