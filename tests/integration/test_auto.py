"""Several merges are tried, the hospitals evaluate them, and one is chosen: with real agents and certificates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from agent.client import Client, Credentials
from agent.ledger import Ledger
from datavector.choice import SINGLE, Counts
from tests.integration.conftest import HOSPITALS, VISIT
from tests.integration.processes import Site

AUTO = {
    **VISIT,
    "method": {"name": "auto"},
    "head": {"floor": 3},
    "trigger": {"minHospitals": 3, "quietPeriodSeconds": 0},
}
BODIES = ("iso-c-scale1.25", "ties-scale2", "sum", "mean")


def test_hospitals_calibrate_all_candidates_in_one_visit_and_evaluate_them_in_another(site: Site, tmp_path: Path):
    aggregator = site.aggregator({**AUTO, "evaluation": {"allowWorse": True}})
    for hospital in HOSPITALS:
        assert "visit for 4 models of trial-" in site.agent(hospital, aggregator.address, "--tasks-only").succeed()
    waiting = aggregator.wait_for("Evaluating", *HOSPITALS)
    names = [f"{body}{head}" for body in BODIES for head in (".head", "")]
    assert list(waiting.status.candidates) == names
    for hospital in HOSPITALS:
        assert (
            "evaluation for 11 models of trial-" in site.agent(hospital, aggregator.address, "--tasks-only").succeed()
        )
    version = aggregator.wait_for("Ready", *HOSPITALS)

    report = version.status.evaluation
    assert report.validated
    assert report.hospitals == HOSPITALS
    assert [score.name for score in report.candidates] == names
    assert [score.name for score in report.singles] == [f"hospital.{name}" for name in HOSPITALS]
    best = max(report.candidates, key=lambda score: score.balanced_accuracy)
    (chosen,) = [score for score in report.candidates if score.name == report.chosen]
    assert chosen.balanced_accuracy >= best.balanced_accuracy - report.margin
    assert chosen.images == sum(score.images for score in chosen.hospitals.values())

    site.run("north", "release", "fetch", "--output", tmp_path / "release").succeed()
    release = json.loads((tmp_path / "release" / "release.json").read_text())
    assert release["evaluation"]["chosen"] == report.chosen
    assert sum(map(sum, release["evaluation"]["confusion"])) == chosen.images
    assert release["head"]["kind"] == ("closed-form" if report.chosen.endswith(".head") else "merged")
    assert release["cohort"]["hospitals"] == list(HOSPITALS)
    ledger = site.run("north", "agent", "ledger").succeed()
    assert "evaluation" in ledger


def test_a_hospital_may_leave_evaluation_to_the_others(site: Site):
    aggregator = site.aggregator({**AUTO, "evaluation": {"allowWorse": True, "quorum": 2, "singles": False}})
    for hospital in HOSPITALS:
        site.agent(hospital, aggregator.address, "--tasks-only").succeed()
    aggregator.wait_for("Evaluating", *HOSPITALS)
    refused = site.agent("west", aggregator.address, "--tasks-only", tasks={"evaluate": False}).succeed()
    assert "skipped (switched off in the settings)" in refused
    for hospital in ("north", "south"):
        assert "evaluation for 8 models" in site.agent(hospital, aggregator.address, "--tasks-only").succeed()
    version = aggregator.wait_for("Ready", *HOSPITALS)
    assert version.status.evaluation.hospitals == ("north", "south")
    assert version.status.evaluation.singles == ()


def test_a_merge_that_is_worse_than_a_single_hospital_is_not_ready(site: Site):
    one = {"method": {"name": "sum"}, "evaluation": {}, "head": {"mode": "merged"}}
    aggregator = site.aggregator({**AUTO, **one, "calibration": {"mode": "uploaded"}})
    aggregator.wait_for("Evaluating", *HOSPITALS)
    for hospital in HOSPITALS:
        find_singles_better(site, hospital, aggregator.address)
    version = aggregator.wait_for("Rejected", *HOSPITALS)
    assert version.status.evaluation.worse_than
    assert "allowWorse" in version.status.message


def find_singles_better(site: Site, hospital: str, address: str) -> None:
    """Evaluates as a hospital that finds every hospital's own model right, and what was merged of them wrong."""
    files = (site.certificates / name for name in (f"{hospital}.crt", f"{hospital}.key", "ca.crt"))
    with Client(address, Credentials(*files), ledger=Ledger(site.folder / f"{hospital}.jsonl")) as client:
        (task,) = client.list_tasks().tasks
        models = [file.name.removesuffix(".safetensors") for file in task.weights]
        client.evaluate(task, {name: found(right=name.startswith(SINGLE)) for name in models})


def found(*, right: bool) -> Counts:
    """Of two images of each of three classes, with a confidence of 0.95."""
    confusion = 2 * np.eye(3, dtype=np.int64)
    bins = np.zeros((10, 3))
    bins[9] = 6, 6 * right, 6 * 0.95
    return Counts(confusion if right else np.roll(confusion, 1, axis=1), bins)
