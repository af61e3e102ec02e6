"""The operator while the API server is away: it stays, and afterwards everything follows."""

from __future__ import annotations

import json
import os
import time

from tests.aggregator.objects import policy
from tests.cluster.aggregation import CLAIM, RunningOperator, in_phase, manifest, phases, record

OUTAGE_SECONDS = float(os.environ.get("DATAVECTOR_TEST_OUTAGE_SECONDS", "10"))


def hospitals(space, version: str) -> set[str]:
    return {each["hospital"] for each in space.get(f"mv/{version}")["spec"]["inputs"]}


def test_after_an_outage_of_the_api_server_in_the_middle_of_a_job_everything_follows(
    control_plane, space, store, start_kubelet, start_operator, arrive, deliver, small_base
):
    node = start_kubelet(volumes={CLAIM: store.root})
    operator = start_operator()
    node.hold()
    space.apply(manifest(policy(base="small", quiet=0, mode="visit")))
    arrive(small_base, "north", "south")
    running = "--output=jsonpath={.items[*].status.phase}"
    space.until(lambda: space.kubectl("get", "pods", running) == "Running", why=operator.tail)
    (first,) = phases(space)
    pid = operator.pid
    control_plane.stop_api_server()
    node.let_go()  # the Job's process ends while nobody can be told
    third = deliver(store, small_base, "west")
    time.sleep(OUTAGE_SECONDS)
    control_plane.start_api_server()
    space.until(lambda: phases(space).get(first) == "Calibrating", why=operator.tail)
    record(space, third)
    second = space.until(lambda: [name for name in in_phase(space, "Calibrating") if name != first], why=operator.tail)
    assert hospitals(space, second[0]) == {"north", "south", "west"}
    assert operator.pid == pid
    assert operator.running
    complaints = [
        line for line in operator.log.read_text().splitlines() if "will retry" in line or "escalating" in line
    ]
    assert len(complaints) <= 2 + OUTAGE_SECONDS / 5


def test_what_was_deleted_while_the_operator_was_cut_off_is_noticed_when_it_is_back(
    control_plane, space, store, start_kubelet, start_operator, arrive, small_base, cut_link, tmp_path
):
    start_kubelet(volumes={CLAIM: store.root})
    link = cut_link(control_plane.url.removeprefix("https://"))
    kubeconfig = space.cluster.kubeconfig_of(space.name, "datavector-operator")
    way = json.loads(kubeconfig.read_text())
    way["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{link.address.rpartition(':')[2]}"
    kubeconfig.write_text(json.dumps(way))
    operator = RunningOperator(kubeconfig, space, store.root, tmp_path / "operator.log")
    try:
        space.apply(manifest(policy(base="small", quiet=0, mode="visit")))
        arrive(small_base, "north", "south", "west")
        (first,) = space.until(lambda: in_phase(space, "Calibrating"), why=operator.tail)
        link.set("refuse")
        (gone,) = (each for each in space.items("datavectors") if each["spec"]["hospital"] == "west")
        space.kubectl("delete", f"dv/{gone['metadata']['name']}")
        control_plane.stop_api_server()
        control_plane.forget_history()
        control_plane.start_api_server()
        link.set("open")
        back = time.monotonic()
        (second,) = space.until(lambda: phases(space).keys() - {first}, why=operator.tail)
        assert time.monotonic() - back < 30
        assert hospitals(space, second) == {"north", "south"}
        assert "datavectors are listed again" in operator.log.read_text()
    finally:
        operator.close()
