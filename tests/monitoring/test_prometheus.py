"""A real Prometheus scrapes a real aggregator and a real agent, and evaluates the alerts on what they say."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from aggregator.metrics import OperatorMetrics
from tests.cluster.processes import Process
from tests.integration.conftest import VISIT
from tests.integration.processes import ROOT, Site, free_port, policy_file, until
from tests.monitoring.conftest import RULES

PAGE = ROOT / "docs" / "metrics.md"


@pytest.mark.slow
def test_prometheus_reads_aggregator_and_agent_and_evaluates_every_alert(
    new_site: Site, tool: Callable[[str], str], tmp_path: Path
):
    ports = {"datavector-receiver": free_port(), "datavector-agent": free_port()}
    address = start_aggregator(new_site, ports["datavector-receiver"])
    new_site.agent("north", address, metrics_port=ports["datavector-agent"])
    targets = [
        *(target(port, name=name) for name, port in ports.items()),
        target(1, name="datavector-agent", pod_phase="Succeeded"),
        target(2, name="datavector-receiver", pod_container_port_name="exchange"),
        target(3, name="somebody-else"),
    ]
    with prometheus(tool("prometheus"), tmp_path / "prometheus", targets) as ask:

        def value(query: str) -> float:
            result = ask(f"query?query={query}")["result"]
            return float(result[0]["value"][1]) if result else 0

        until(lambda: all(value(f'up{{job="{job}",namespace="dv"}}') for job in ports), "both to be scraped")
        assert value("count(up)") == len(ports)
        until(lambda: value('datavector_receiver_uploads_total{outcome="committed"}'), "an upload to be counted")
        until(lambda: value('datavector_agent_uploads_total{outcome="committed"}'), "the agent to count it, too")
        assert value("datavector_receiver_received_bytes_total") == value("datavector_agent_sent_bytes_total") > 0

        until(lambda: all(rule["health"] != "unknown" for rule in rules(ask)), "every alert to be evaluated")
        assert [(rule["name"], rule["lastError"]) for rule in rules(ask) if rule["health"] != "ok"] == []
        alarmed = {"DataVectorOperatorDown"}  # an aggregator without a cluster has no operator
        until(lambda: {rule["name"] for rule in rules(ask) if rule["state"] != "inactive"} == alarmed, str(alarmed))
    for port in ports.values():
        lint(tool("promtool"), page(port))


def test_the_operators_metrics_are_named_as_prometheus_asks(tool: Callable[[str], str]):
    metrics = OperatorMetrics()
    metrics.jobs.labels("merge", "Complete", "Complete").inc()
    with metrics.round():
        pass
    lint(tool("promtool"), generate_latest(metrics.registry))


def start_aggregator(site: Site, metrics_port: int) -> str:
    """Starts an aggregator with metrics; its address."""
    policy = site.folder / "policy.yaml"
    policy.write_text(policy_file(VISIT))
    process = site.start(
        "aggregator", "--store", site.folder / "store", "--base", site.base, "--policy", policy,
        "--listen", "127.0.0.1:0", "--metrics-port", str(metrics_port),
        "--certificate", site.certificates / "aggregator.crt", "--key", site.certificates / "aggregator.key",
        "--ca", site.certificates / "ca.crt", log="aggregator",
    )  # fmt: skip
    return process.wait_for("listening on ").split()[0]


@contextmanager
def prometheus(program: str, folder: Path, targets: list[dict[str, Any]]) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Runs a Prometheus that scrapes targets every second; gives a function that asks its API."""
    folder.mkdir()
    every_second = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration = {"global": every_second, "rule_files": [str(RULES)], **scraping(targets)}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    process = Process(
        [
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ],
        folder / "log",
    )

    def ask(question: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://{address}/api/v1/{question}", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)["data"]
        return found

    try:
        until(lambda: not process.running or answers(f"http://{address}/-/ready"), "Prometheus")
        assert process.running, process.tail()
        yield ask
    finally:
        process.end()


def scraping(targets: list[dict[str, Any]]) -> dict[str, Any]:
    """The page's configuration, but with targets labelled as Kubernetes' discovery does it: Debian's build has none."""
    (shown,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    configuration: dict[str, Any] = yaml.safe_load(shown)
    (job,) = configuration["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    job["static_configs"] = targets
    return configuration


def target(port: int, *, name: str, host: str = "127.0.0.1", **changes: str) -> dict[str, Any]:
    """A port of a Pod, as Kubernetes' discovery labels it."""
    labels = {
        "pod_label_app_kubernetes_io_name": name,
        "pod_container_port_name": "metrics",
        "pod_phase": "Running",
        "pod_name": f"{name}-0",
        "namespace": "dv",
        **changes,
    }
    return {
        "targets": [f"{host}:{port}"],
        "labels": {f"__meta_kubernetes_{label}": value for label, value in labels.items()},
    }


def rules(ask: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Every alert, as Prometheus sees it."""
    return [{"lastError": "", **rule} for group in ask("rules")["groups"] for rule in group["rules"]]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except OSError:
        return False


def page(port: int) -> bytes:
    """What a process tells Prometheus."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        content: bytes = answer.read()
    return content


def lint(promtool: str, content: bytes) -> None:
    """Demands that names, units and help texts follow Prometheus' conventions."""
    done = subprocess.run([promtool, "check", "metrics"], input=content, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
