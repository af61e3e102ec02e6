"""Merges that read what hospitals measure beside their vectors: with real agents and certificates."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.conftest import HOSPITALS, VISIT
from tests.integration.processes import Site

METHODS = {"name": "auto", "candidates": [{"name": "fisher"}, {"name": "regmean"}, {"name": "mean"}]}
POLICY = {
    **VISIT,
    "method": METHODS,
    "head": {"mode": "merged"},
    "calibration": {"mode": "uploaded"},
    "evaluation": {"allowWorse": True, "singles": False, "deadlineSeconds": 600},
    "trigger": {"minHospitals": 2, "quietPeriodSeconds": 0},
}


def test_hospitals_send_what_a_method_reads_and_take_it_back(site: Site, tmp_path: Path):
    aggregator = site.aggregator(POLICY)
    store = site.folder / "aggregator" / "store"
    aggregator.wait_for("Measuring", *HOSPITALS)
    refused = site.agent("west", aggregator.address, "--tasks-only", tasks={"statistics": False}).succeed()
    assert "skipped (switched off in the settings)" in refused
    served = site.agent("north", aggregator.address, "--tasks-only").succeed()
    for kind in ("fisher", "regmean"):
        assert f".{kind}: statistics of its vector with" in served
    waiting = site.start("status", "--store", store, log="status").succeed()
    assert "waiting for the fisher and regmean statistics of south-" in waiting

    site.agent("south", aggregator.address, "--tasks-only").succeed()
    site.run("west", "withdraw").succeed()
    aggregator.wait_for("Evaluating", "north", "south")
    for hospital in ("north", "south"):
        site.agent(hospital, aggregator.address, "--tasks-only", tasks={"statistics": False}).succeed()
    version = aggregator.wait_for("Ready", "north", "south")
    assert version.status.candidates == ("fisher", "regmean", "mean")
    site.run("north", "release", "fetch", "--output", tmp_path / "release").succeed()
    release = json.loads((tmp_path / "release" / "release.json").read_text())
    assert {"fisher", "regmean"} == set(release["inputs"][0]["statistics"])
    assert "statistics" in site.run("north", "agent", "ledger").succeed()
    assert len(list((store / "statistics").glob("*/*"))) == 4

    site.run("north", "withdraw").succeed()
    aggregator.wait_for("Revoked", "north", "south")
    assert {path.parent.name for path in (store / "statistics").glob("*/*")} == {"south"}
