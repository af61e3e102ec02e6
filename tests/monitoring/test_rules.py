"""The alerts: valid, on metrics that exist, firing when they should, silent when they should, and explained."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from agent.metrics import Metrics as AgentMetrics
from aggregator.metrics import Metrics, OperatorMetrics
from tests.monitoring.conftest import RULES

ROOT = RULES.parent.parent.parent
SITUATIONS = Path(__file__).parent / "rules_test.yaml"
ALERTS: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
]
NAMES = [alert["alert"] for alert in ALERTS]
OTHERS = {"kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"}


def test_prometheus_takes_the_rules(tool: Callable[[str], str]):
    run(tool("promtool"), "check", "rules", "--lint-fatal", RULES)


def test_every_alert_fires_where_it_should_and_nowhere_else(tool: Callable[[str], str]):
    run(tool("promtool"), "test", "rules", SITUATIONS)


@pytest.mark.parametrize("name", NAMES)
def test_every_alert_is_tried_in_a_situation_where_it_fires_and_in_one_where_it_does_not(name: str):
    expected = [
        bool(question["exp_samples"])
        for situation in yaml.safe_load(SITUATIONS.read_text())["tests"]
        for question in situation["promql_expr_test"]
        if f'"{name}"' in question["expr"]
    ]
    assert set(expected) == {True, False}


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_every_alert_reads_metrics_that_exist(alert: dict[str, Any]):
    used = set(re.findall(r"\b(?:datavector|kubelet)_\w+", alert["expr"]))
    assert used - exported(Metrics().registry, OperatorMetrics().registry, AgentMetrics().registry) - OTHERS == set()


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_every_alert_says_how_bad_it_is_what_it_means_and_what_to_do(alert: dict[str, Any]):
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    page, _, section = alert["annotations"]["runbook"].partition("#")
    assert section in sections(ROOT / page)


def test_the_page_of_metrics_lists_every_alert_with_its_severity():
    listed = dict(re.findall(r"^\| `(DataVector\w+)` \| (\w+) \|", (ROOT / "docs" / "metrics.md").read_text(), re.M))
    assert listed == {alert["alert"]: alert["labels"]["severity"] for alert in ALERTS}


def exported(*registries: CollectorRegistry) -> set[str]:
    """Names as Prometheus sees them: counters end in `_total`."""
    return {
        family.name + ("_total" if family.type == "counter" else "")
        for registry in registries
        for family in registry.collect()
    }


def sections(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run(*command: str | Path) -> None:
    """Runs a program that must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
