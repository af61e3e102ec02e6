"""What goes wrong in a cluster is said where people look, with a next step, and goes on by itself once it is mended."""

from __future__ import annotations

import json
import signal
import time
import urllib.request
from typing import Any

import pytest
import yaml

from tests.aggregator.objects import policy, vector
from tests.cluster.aggregation import (
    CLAIM,
    IMAGE,
    ROLES,
    Namespace,
    condition,
    in_phase,
    manifest,
    phases,
    record,
    waiting_for,
)
from tests.cluster.control_plane import free_ports
from tests.cluster.fixtures import DEFINITIONS

QUICK = {"aggregator.job": "tests.aggregator.quick_job"}


def wanted(*, base: str = "small", mode: str = "visit", job: dict[str, Any] | None = None, **more: Any) -> Any:
    """A policy's manifest that merges at once; by default its versions stop where hospitals are asked."""
    content = manifest(policy(base=base, quiet=0, mode=mode, **more))
    content["spec"]["job"] |= job or {}
    return content


def said(space: Namespace, what: str, kind: str) -> tuple[str, str, str]:
    """A condition's status, reason and message."""
    found = condition(space.get(what), kind)
    return found.get("status", ""), found.get("reason", ""), found.get("message", "")


def ready_says(space: Namespace) -> tuple[str, str, str]:
    """The Ready condition of the only version."""
    names = list(phases(space))
    return said(space, f"mv/{names[0]}", "Ready") if names else ("", "", "")


def patch(space: Namespace, what: str, spec: str) -> None:
    space.kubectl("patch", what, "--type=merge", f'--patch={{"spec":{spec}}}')


def pods(space: Namespace, *, running: bool = False) -> list[str]:
    """Names of the Jobs' Pods."""
    items = [each for each in space.items("pods") if not running or each.get("status", {}).get("phase") == "Running"]
    return [each["metadata"]["name"] for each in items]


@pytest.fixture
def node(start_kubelet, store):
    return start_kubelet(volumes={CLAIM: store.root}, modules=QUICK)


# --- Objects --------------------------------------------------------------------------------------------------


def test_a_policy_whose_base_is_missing_says_so_and_goes_on_when_it_is_imported(
    space, store, node, start_operator, arrive, large_base
):
    operator = start_operator()
    space.apply(wanted(base="large"))
    arrive(large_base, "north", "south")
    status, reason, message = space.until(
        lambda: (found := said(space, "mp/brain", "Accepted"))[0] and found, why=operator.tail
    )
    assert (status, reason) == ("False", "BaseModelMissing")
    assert "'large' is not in the store; import it" in message
    (first, _) = (each["metadata"]["name"] for each in space.items("datavectors"))
    space.until(lambda: said(space, f"dv/{first}", "Validated")[1] == "UnknownBaseModel", why=operator.tail)
    store.import_base(large_base.path)
    space.until(lambda: in_phase(space, "Calibrating"), why=operator.tail)
    assert said(space, "mp/brain", "Accepted")[0] == said(space, f"dv/{first}", "Validated")[0] == "True"


def test_vectors_that_cannot_be_merged_say_why_and_the_others_are_merged(
    space, store, node, start_operator, arrive, deliver, small_base
):
    operator = start_operator()
    space.apply(wanted())
    wrong = deliver(store, small_base, "west")
    size = wrong.spec.artifact.model_copy(update={"size": 7})
    record(space, wrong.model_copy(update={"spec": wrong.spec.model_copy(update={"artifact": size})}))
    record(space, vector("alien", base="sha256:" + "d" * 64))
    record(space, vector("empty", base=small_base.digest))
    record(space, vector("north", 9, base=small_base.digest))  # newer than what arrives now, and without a file
    arrive(small_base, "north", "south")
    (version,) = space.until(lambda: in_phase(space, "Calibrating"), why=operator.tail)
    merged = [each["hospital"] for each in space.get(f"mv/{version}")["spec"]["inputs"]]
    assert sorted(merged) == ["north", "south"]
    assert said(space, "dv/alien-1", "Validated")[:2] == ("False", "UnknownBaseModel")
    assert said(space, "dv/empty-1", "Stored")[:2] == ("False", "FileMissing")
    assert "let the hospital send it, or delete this" in said(space, "dv/north-9", "Stored")[2]
    assert said(space, f"dv/{wrong.name}", "Validated")[:2] == ("False", "WrongSize")
    assert len(phases(space)) == 1


def test_a_hospitals_next_vector_never_makes_a_version_without_the_hospital(
    space, store, node, start_operator, arrive, small_base
):
    operator = start_operator()
    space.apply(wanted())
    arrive(small_base, "north", "south", "west")
    space.until(lambda: in_phase(space, "Calibrating"), why=operator.tail)
    arrive(small_base, "north", sequence=2)
    space.until(lambda: in_phase(space, "Superseded") and in_phase(space, "Calibrating"), why=operator.tail)
    made = [[each["hospital"] for each in version["spec"]["inputs"]] for version in space.items("modelversions")]
    assert all({"north", "south"} <= set(hospitals) for hospitals in made)


def test_a_deleted_vector_is_out_of_the_next_version_and_its_file_goes_after_the_grace_period(
    space, store, node, start_operator, arrive, small_base
):
    operator = start_operator(grace_seconds=5)
    space.apply(wanted())
    arrive(small_base, "north", "south", "west")
    space.until(lambda: in_phase(space, "Calibrating"), why=operator.tail)
    (gone,) = (each for each in space.items("datavectors") if each["spec"]["hospital"] == "west")
    blob = store.blob("west", gone["spec"]["artifact"]["digest"])
    space.kubectl("delete", f"dv/{gone['metadata']['name']}")
    deleted = time.monotonic()
    space.until(lambda: in_phase(space, "Superseded") and in_phase(space, "Calibrating"), why=operator.tail)
    (version,) = in_phase(space, "Calibrating")
    assert {each["hospital"] for each in space.get(f"mv/{version}")["spec"]["inputs"]} == {"north", "south"}
    space.until(lambda: not blob.exists(), why=operator.tail)
    assert time.monotonic() - deleted >= 5
    assert len(list(store.root.glob("blobs/*/*"))) == 2


# --- Jobs -----------------------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_pulled_is_named_and_another_one_in_the_policy_is_taken(
    space, store, start_kubelet, start_operator, arrive, small_base
):
    start_kubelet(volumes={CLAIM: store.root}, images_missing={"registry.example/typo:1"})
    operator = start_operator()
    space.apply(wanted(job={"image": "registry.example/typo:1"}))
    arrive(small_base, "north", "south")
    space.until(lambda: ready_says(space)[1] == "ImagePullBackOff", why=operator.tail)
    message = ready_says(space)[2]
    assert "registry.example/typo:1" in message
    assert "set job.image in the policy" in message
    assert "registry.example/typo:1" in waiting_for(space)
    patch(space, "mp/brain", f'{{"job":{{"image":"{IMAGE}"}}}}')
    space.until(lambda: in_phase(space, "Calibrating"), why=operator.tail)
    assert len(phases(space)) == 1


def test_a_job_whose_pods_are_refused_says_where_to_look_and_goes_on_when_the_policy_is_mended(
    space, store, node, start_operator, arrive, small_base
):
    operator = start_operator()
    space.apply(wanted(job={"priorityClassName": "nonexistent"}))
    arrive(small_base, "north", "south")
    space.until(lambda: ready_says(space)[1] == "NoPod", why=operator.tail)
    (job,) = (each["metadata"]["name"] for each in space.items("jobs"))
    assert f"kubectl describe job {job}" in ready_says(space)[2]
    assert "no PriorityClass" in space.kubectl("describe", f"job/{job}")
    patch(space, "mp/brain", '{"job":{"priorityClassName":null}}')
    space.until(lambda: in_phase(space, "Calibrating"), why=operator.tail)


def test_an_altered_vector_fails_its_version_at_once_with_what_to_do(
    space, store, node, start_operator, arrive, small_base
):
    arrive(small_base, "north", "south")
    blob = next(store.root.glob("blobs/north/*"))
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    operator = start_operator()
    space.apply(wanted())
    (version,) = space.until(lambda: in_phase(space, "Failed"), why=operator.tail)
    message = ready_says(space)[2]
    assert "missing or altered; restore the store's volume" in message
    assert f"delete the ModelVersion {version}" in message
    assert len(pods(space)) == 1
    blob.write_bytes(content)
    space.kubectl("delete", f"mv/{version}")
    space.until(lambda: in_phase(space, "Calibrating") == [version], why=operator.tail)


def test_a_full_store_keeps_a_version_pending_and_it_ends_well_when_there_is_space(
    space, store, start_kubelet, start_operator, arrive, small_disk, large_base
):
    small_disk(store.root / "versions", 24)
    store.import_base(large_base.path)
    filler = store.root / "versions" / "filler"
    filler.write_bytes(bytes(20 << 20))
    start_kubelet(volumes={CLAIM: store.root})
    operator = start_operator()
    space.apply(wanted(base="large", job={"backoffLimit": 0}))
    arrive(large_base, "north", "south")
    space.until(lambda: ready_says(space)[1] == "JobFailed", why=operator.tail)
    assert "no space left on the disk" in ready_says(space)[2]
    assert list(phases(space).values()) == ["Pending"]
    assert "the last try failed" in space.until(lambda: waiting_for(space), why=operator.tail)
    filler.unlink()
    space.until(lambda: in_phase(space, "Calibrating"), why=operator.tail)


def test_a_job_that_was_killed_for_memory_names_the_limit_and_one_that_lost_its_node_does_not_count(
    space, store, node, start_operator, arrive, small_base
):
    operator = start_operator()
    node.hold()
    space.apply(wanted())
    arrive(small_base, "north", "south")
    (first,) = space.until(lambda: pods(space, running=True), why=operator.tail)
    node.kill(first, signal.SIGKILL, reason="OOMKilled")
    space.until(lambda: "job.resources.limits.memory" in ready_says(space)[2], why=operator.tail)
    (second,) = space.until(lambda: pods(space, running=True), why=operator.tail)
    node.lose_node(second)
    space.until(lambda: pods(space, running=True) not in ([], [second]), why=operator.tail)
    assert space.items("jobs")[0]["status"].get("failed", 0) <= 2
    node.let_go()
    space.until(lambda: in_phase(space, "Calibrating"), why=operator.tail)
    assert len(pods(space)) == 3


# --- What is deleted by hand ----------------------------------------------------------------------------------


def test_a_version_or_a_job_that_is_deleted_by_hand_comes_again_and_never_two_at_once(
    space, store, node, start_operator, arrive, small_base
):
    operator = start_operator()
    node.hold()
    space.apply(wanted(mode="none"))
    arrive(small_base, "north", "south")
    alive: list[int] = []

    def next_pod(*before: str) -> str:
        running = pods(space, running=True)
        alive.append(len(running))
        return next(iter(set(running) - set(before)), "")

    first = space.until(next_pod, why=operator.tail)
    (version,) = phases(space)
    space.kubectl("delete", f"job/{version}-merge", "--wait=false")
    space.kubectl("delete", f"pod/{first}", "--wait=false", "--grace-period=3")  # it stands still until it is killed
    second = space.until(lambda: next_pod(first), why=operator.tail)
    space.kubectl("delete", f"mv/{version}", "--wait=false")
    space.until(lambda: "deletionTimestamp" in space.get(f"pod/{second}")["metadata"], why=operator.tail)
    space.kubectl("delete", f"pod/{second}", "--wait=false", "--grace-period=3")
    space.until(lambda: next_pod(first, second), why=operator.tail)
    node.let_go()
    space.until(lambda: in_phase(space, "Ready") == [version], why=operator.tail)
    uid = space.get(f"mv/{version}")["metadata"]["uid"]
    space.kubectl("delete", f"mv/{version}")
    space.until(lambda: in_phase(space, "Ready") == [version], why=operator.tail)
    assert space.get(f"mv/{version}")["metadata"]["uid"] != uid
    assert max(alive) == 1


# --- The store, the definitions, the Role ---------------------------------------------------------------------


def test_without_its_store_nothing_is_concluded_and_all_goes_on_when_it_is_back(
    space, store, node, start_operator, arrive, small_base
):
    operator = start_operator(grace_seconds=0)
    space.apply(wanted(mode="none"))
    arrive(small_base, "north", "south")
    (version,) = space.until(lambda: in_phase(space, "Ready"), why=operator.tail)
    aside = store.root.rename(store.root.with_name("aside"))
    files = {path for path in aside.rglob("*") if path.is_file()}
    store.root.mkdir()  # as a mount point is without its volume
    patch(space, "mp/brain", '{"historyLimit":4}')
    _, reason, message = space.until(
        lambda: (found := said(space, "mp/brain", "Reconciled"))[0] == "False" and found, why=operator.tail
    )
    assert reason == "StoreMissing"
    assert "mount the store's volume again" in message
    (north, _) = (each["metadata"]["name"] for each in space.items("datavectors"))
    patch(space, f"dv/{north}", '{"consent":"Withdrawn"}')
    space.until(lambda: phases(space) == {version: "Revoked"}, why=operator.tail)
    assert not condition(space.get(f"dv/{north}"), "Erased")
    assert list(store.root.iterdir()) == []
    assert {path for path in aside.rglob("*") if path.is_file()} == files
    store.root.rmdir()
    aside.rename(store.root)
    space.until(lambda: said(space, f"dv/{north}", "Erased")[0] == "True", why=operator.tail)
    space.until(lambda: said(space, "mp/brain", "Reconciled")[0] == "True", why=operator.tail)
    assert operator.log.read_text().count("is not there, or has lost its mark") <= 4


def test_definitions_that_are_too_old_are_named_and_nothing_is_changed_until_they_are_applied(
    space, store, node, start_operator, arrive, small_base
):
    definition = yaml.safe_load((DEFINITIONS / "mergepolicies.yaml").read_text())
    (served,) = definition["spec"]["versions"]
    del served["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]["waitingFor"]
    served["additionalPrinterColumns"] = [
        each for each in served["additionalPrinterColumns"] if "waitingFor" not in each["jsonPath"]
    ]
    (port,) = free_ports(1)
    try:
        space.kubectl("apply", "--filename=-", input=definition)
        space.until(lambda: "waitingFor" not in space.kubectl("explain", "mp.status"))
        operator = start_operator(metrics_port=port)
        space.apply(wanted())
        arrive(small_base, "north", "south")
        space.until(lambda: said(space, "mp/brain", "Reconciled")[1] == "CrdOutdated", why=operator.tail)
        message = said(space, "mp/brain", "Reconciled")[2]
        assert "waitingFor" in message
        assert "kubectl apply --server-side -f charts/crds/templates" in message
        assert "datavector_operator_definitions_outdated 1.0" in page(port, "metrics")
        assert phases(space) == {}
        assert not any(each.get("status") for each in space.items("datavectors"))
    finally:
        space.kubectl("apply", f"--filename={DEFINITIONS}")
    space.until(lambda: in_phase(space, "Calibrating"), why=operator.tail)
    assert "datavector_operator_definitions_outdated 0.0" in page(port, "metrics")


def test_a_right_that_the_role_lacks_is_named_and_used_once_it_is_granted(
    space, store, node, start_operator, arrive, small_base
):
    role = yaml.safe_load((ROLES / "operator.yaml").read_text())
    for rule in role["rules"]:
        if rule["resources"] == ["jobs"]:
            rule["verbs"] = ["get", "list", "watch"]
    operator = start_operator()
    space.apply(role)
    space.apply(wanted())
    arrive(small_base, "north", "south")
    space.until(lambda: said(space, "mp/brain", "Reconciled")[1] == "ApiForbidden", why=operator.tail)
    message = said(space, "mp/brain", "Reconciled")[2]
    assert "jobs.batch" in message
    assert "give the service account the Role of charts/aggregator" in message
    space.apply(yaml.safe_load((ROLES / "operator.yaml").read_text()))
    space.until(lambda: in_phase(space, "Calibrating"), why=operator.tail)


# --- What a policy asks for -----------------------------------------------------------------------------------


def test_suspended_nothing_starts_old_versions_go_and_below_min_hospitals_none_is_ready(
    space, store, node, start_operator, arrive, small_base
):
    port, liveness = free_ports(2)
    operator = start_operator(metrics_port=port, liveness_port=liveness)
    space.apply(wanted(mode="none", suspend=True, history=1))
    arrive(small_base, "north", "south")
    space.until(lambda: waiting_for(space) == "suspended: set suspend to false to go on", why=operator.tail)
    assert phases(space) == {}
    patch(space, "mp/brain", '{"suspend":false}')
    (first,) = space.until(lambda: in_phase(space, "Ready"), why=operator.tail)
    arrive(small_base, "west")
    space.until(lambda: in_phase(space, "Superseded") == [first], why=operator.tail)
    space.until(lambda: in_phase(space, "Ready"), why=operator.tail)
    space.until(lambda: not store.has_version(first), why=operator.tail)
    assert 'datavector_operator_objects{kind="ModelVersion",state="Ready"} 1.0' in page(port, "metrics")
    assert float(json.loads(page(liveness, "healthz"))["secondsSinceReconciled"]) < 60
    for each in space.items("datavectors")[:2]:
        patch(space, f"dv/{each['metadata']['name']}", '{"consent":"Withdrawn"}')
    space.until(lambda: waiting_for(space) == "1 of 2 hospitals; waiting for one more", why=operator.tail)
    assert in_phase(space, "Ready") == []
    assert said(space, "mp/brain", "Ready")[:2] == ("False", "NoReadyVersion")
    space.until(lambda: not any(store.has_version(name) for name in phases(space)), why=operator.tail)


def page(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
        return str(answer.read().decode())
