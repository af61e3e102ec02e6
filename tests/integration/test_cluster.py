"""The whole job in a cluster: agents, receiver, operator and Jobs as processes of their own, kubectl in between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import yaml

from aggregator.store import Store
from datavector.files import sha256_file
from datavector.merge import merge_vectors
from datavector.model import BaseModel
from tests.cluster.aggregation import CLAIM, Namespace, RunningOperator, condition
from tests.cluster.client import Cluster
from tests.integration.conftest import HOSPITALS, VISIT
from tests.integration.processes import Process, Site, policy_file


@pytest.fixture
def space(cluster: Cluster, crds: Any, namespace: str) -> Namespace:
    return Namespace(cluster, namespace)


@pytest.fixture
def store(site: Site) -> Store:
    return Store(site.folder / "cluster" / "store")


@pytest.fixture
def operator(space: Namespace, store: Store, site: Site) -> Iterator[RunningOperator]:
    with ExitStack() as running:
        started = RunningOperator(space.grant("operator"), space, store.root, site.folder / "operator.log")
        running.callback(started.close)
        yield started


@pytest.fixture
def receiver(space: Namespace, store: Store, site: Site) -> str:
    """The address of a receiver in the cluster's way."""
    certificates = site.certificates
    arguments = (
        "receiver", "--store", store.root, "--namespace", space.name, "--listen", "127.0.0.1:0",
        "--certificate", certificates / "aggregator.crt", "--key", certificates / "aggregator.key",
        "--ca", certificates / "ca.crt",
    )  # fmt: skip
    process = Process(
        arguments,
        site.folder / "receiver.log",
        KUBECONFIG=str(space.grant("receiver")),
        DATAVECTOR_RECEIVER_LIMITS__POLL_SECONDS="1",
    )
    site.running.callback(process.clear)
    return process.wait_for("listening on ").split()[0]


@pytest.mark.slow
def test_three_hospitals_make_a_model_and_one_takes_its_part_back(
    site, space, store, operator, receiver, start_kubelet, tmp_path
):
    start_kubelet(volumes={CLAIM: store.root})
    base = yaml.safe_load(site.start("base", "import", site.base, "--store", store.root, log="import").succeed())
    rules = VISIT | {"baseModelRef": "tiny", "trigger": {"minHospitals": 2, "quietPeriodSeconds": 1}}
    space.apply(base, yaml.safe_load(policy_file(rules)))
    space.kubectl("wait", "--for=condition=Available", "bm/tiny", "--timeout=60s")

    for hospital in HOSPITALS:
        assert "delivered: " in site.agent(hospital, receiver, "--once").succeed()
    vectors = {item["spec"]["hospital"]: item for item in space.items("datavectors")}
    assert set(vectors) == set(HOSPITALS)

    def calibrating(count: int) -> str:
        found = [each for each in space.items("mv") if each.get("status", {}).get("phase") == "Calibrating"]
        return next((each["metadata"]["name"] for each in found if len(each["spec"]["inputs"]) == count), "")

    first = space.until(lambda: calibrating(3), why=operator.tail)
    assert "came back to calibrate it" in space.get("mp/trial")["status"]["waitingFor"]
    for hospital in HOSPITALS:
        assert "visit for trial-" in site.agent(hospital, receiver, "--tasks-only").succeed()
    space.kubectl("wait", "--for=condition=Ready", f"mv/{first}", "--timeout=120s")
    printed = site.run("north", "release", "fetch", "--output", tmp_path / "release").succeed()
    assert first in printed
    assert "FAIL" not in printed
    lineage = json.loads((tmp_path / "release" / "release.json").read_text())
    assert lineage["calibration"]["hospitals"] == list(HOSPITALS)
    assert space.get(f"mv/{first}")["status"]["releaseSha256"] == sha256_file(tmp_path / "release" / "SHA256SUMS")

    south = vectors["south"]["metadata"]["name"]
    space.kubectl("patch", "dv", south, "--type=merge", '--patch={"spec":{"consent":"Withdrawn"}}')
    space.kubectl("wait", "--for=condition=Revoked", f"mv/{first}", "--timeout=30s")
    assert "has no Ready version" in site.run("north", "release", "fetch", "--output", tmp_path / "none").output
    space.kubectl("wait", "--for=condition=Erased", f"dv/{south}", "--timeout=60s")
    assert not store.blob("south", vectors["south"]["spec"]["artifact"]["digest"]).exists()

    second = space.until(lambda: calibrating(2), why=operator.tail)
    for hospital in ("north", "west"):
        assert "visit for trial-" in site.agent(hospital, receiver, "--tasks-only").succeed()
    space.kubectl("wait", "--for=condition=Ready", f"mv/{second}", "--timeout=120s")
    assert space.get("mp/trial")["status"]["latestVersion"] == second
    assert condition(space.get("mp/trial"), "Ready")["status"] == "True"
    left = [store.blob(name, vectors[name]["spec"]["artifact"]["digest"]) for name in ("north", "west")]
    expected = tmp_path / "expected.safetensors"
    merge_vectors(BaseModel.load(site.base), left, "sum", {}, expected)
    assert sha256_file(store.merged(second, "sum")) == sha256_file(expected), "as if south had never been there"
    assert not store.has_version(first)
    ledger = site.run("south", "agent", "ledger").succeed()
    assert "vector" in ledger
