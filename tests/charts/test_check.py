"""What `helm test` of an aggregation site says, with a real receiver before it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from datavector.wire.certs import init_authority
from tests.charts.rendering import AGGREGATOR, CHARTS, environment, find, render
from tests.cluster.control_plane import free_ports
from tests.serving import Serving

SCRIPT = CHARTS / "aggregator" / "files" / "check.py"


@pytest.fixture(scope="module")
def metrics_port() -> Iterator[int]:
    """A port at which the metrics of a receiver and of an operator are shown."""
    registry = CollectorRegistry()
    for process in ("receiver", "operator"):
        Gauge(f"datavector_{process}_something", "for this test", registry=registry)
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    yield server.server_port
    server.shutdown()
    thread.join()


@pytest.fixture
def check(receiver: Serving, authority: Path, metrics_port: int) -> Callable[..., tuple[int, list[str]]]:
    """Runs the script: `check(names=["localhost"])`; its exit code and the first line of each answer."""

    def run(
        *, names: list[str], ca: Path = authority / "ca.crt", port: int | None = None, metrics: int = metrics_port
    ) -> tuple[int, list[str]]:
        exchange = {
            "host": "localhost",
            "port": port or int(receiver.address.rpartition(":")[2]),
            "names": names,
            "authority": str(ca),
        }
        settings = {"exchange": exchange, "metrics": {"name": "127.0.0.1", "port": metrics}}
        answer = subprocess.run(
            [sys.executable, str(SCRIPT)],
            env={"CHECK_PATIENCE": "0", "CHECK": json.dumps(settings)},
            capture_output=True,
            text=True,
        )
        assert answer.stderr == ""
        return answer.returncode, answer.stdout.splitlines()

    return run


def test_a_site_that_is_right_is_ready(check: Callable[..., tuple[int, list[str]]]):
    code, lines = check(names=["north-receiver.site.svc", "localhost"])
    assert code == 0
    assert lines[0].startswith("ok    certificate          fits localhost, and the authority")
    assert [line[:25].rstrip() for line in lines[1:3]] == ["ok    receiver's metrics", "ok    operator's metrics"]
    assert lines[-1] == "ready"


def test_a_certificate_for_another_name_is_told_with_what_to_do(check: Callable[..., tuple[int, list[str]]]):
    code, lines = check(names=["merge.example.org"])
    assert code == 1
    assert lines[0].startswith("FAIL  certificate          Hostname mismatch")
    assert "set the value tls.serverName" in lines[1]
    assert lines[-1] == "not ready: see above"


def test_a_certificate_of_another_authority_is_told(check: Callable[..., tuple[int, list[str]]], tmp_path: Path):
    code, lines = check(names=["localhost"], ca=init_authority(tmp_path / "other"))
    assert code == 1
    assert "FAIL  certificate" in lines[0]
    assert "unable to get local issuer certificate" in lines[0] or "verify failed" in lines[0]


def test_a_receiver_or_metrics_that_do_not_answer_are_told(check: Callable[..., tuple[int, list[str]]]):
    nobody, nothing = free_ports(2)
    code, lines = check(names=["localhost"], port=nobody, metrics=nothing)
    assert code == 1
    assert [line.split()[0] for line in lines[:-1]] == ["FAIL"] * 3
    assert "is the receiver ready?" in lines[0]
    assert "is the operator running?" in lines[2]


def test_the_pod_asks_the_script_for_the_services_of_the_release(helm: Path):
    objects = render(helm, "aggregator", {**AGGREGATOR, "service": {"port": 443}})
    pod = find(objects, "Pod")
    asked = json.loads(environment(pod)["CHECK"])
    assert asked["exchange"]["host"] == find(objects, "Service", "north-receiver")["metadata"]["name"]
    assert asked["exchange"]["port"] == 443
    assert "north-receiver.site.svc" in asked["exchange"]["names"]
    assert asked["metrics"]["name"] == find(objects, "Service", "north-metrics")["metadata"]["name"]
    assert find(objects, "ConfigMap", "north-test")["data"]["check.py"] == SCRIPT.read_text()
