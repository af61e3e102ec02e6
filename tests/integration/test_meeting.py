"""BatchNorm statistics when hospitals happen to be there together, and when nobody comes back at all."""

from __future__ import annotations

import json

import torch

from agent.settings import Data
from datavector.data.images import load_images
from datavector.data.records import assign_splits, read_records
from datavector.model import BaseModel
from datavector.networks import batchnorm_modules, build, load_file, preprocess
from tests.integration.conftest import HOSPITALS, VISIT
from tests.integration.processes import Aggregator, Site


def test_hospitals_that_meet_get_what_one_pass_over_all_their_images_gives(site: Site, record_property):
    aggregator = site.aggregator(VISIT | {"calibration": {"mode": "meeting"}})
    alone = site.agent("north", aggregator.address, "--tasks-only", tasks={"meeting_wait_seconds": 1})
    assert alone.wait() == 1
    assert "1 of 3 hospitals came within 1 s; agree on a time" in alone.output
    assert "error: not served: trial-" in alone.output
    agents = [site.agent(hospital, aggregator.address) for hospital in HOSPITALS]
    for agent in agents:
        agent.wait_for("meeting for trial-")
        assert agent.terminate() == 0
        assert "stopped while waiting for tasks" in agent.output
    version = aggregator.wait_for("Ready", *HOSPITALS)
    calibration = lineage(aggregator, version.name)["calibration"]
    images = pooled_images(site)
    assert calibration["mode"] == "meeting"
    assert calibration["hospitals"] == list(HOSPITALS)
    assert calibration["images"] == len(images)

    base = BaseModel.load(site.base)
    network = build(base)
    load_file(network, aggregator.store.merged(version.name, "sum"), base.layout)
    for layer in batchnorm_modules(network).values():
        layer.train()
    inputs = preprocess(images, base.input)
    with torch.no_grad():
        in_one_batch = network(inputs)
    load_file(network, aggregator.store.version(version.name) / "calibrated.safetensors", base.layout)
    with torch.no_grad():
        restored = network.eval()(inputs)
    largest = (restored - in_one_batch).abs().max().item()
    record_property("largest_logit_difference", largest)
    print(f"largest logit difference {largest:.2g}, logits' standard deviation {in_one_batch.std():.2g}")
    assert in_one_batch.std() > 0.1
    assert largest <= 1e-4


def test_when_nobody_comes_back_before_the_deadline_the_release_says_so(site: Site):
    aggregator = site.aggregator(VISIT | {"calibration": {"mode": "visit", "deadlineSeconds": 0.5}})
    version = aggregator.wait_for("Ready", *HOSPITALS)
    calibration = lineage(aggregator, version.name)["calibration"]
    assert calibration["mode"] == "uploaded"
    assert calibration["note"] == "last resort: 0 of 3 hospitals took part in a visit before the deadline"
    card = (aggregator.store.release(version.name) / "MODEL_CARD.md").read_text()
    assert "last resort" in card
    assert "uploaded" in site.start("status", "--store", aggregator.store.root, log="status").succeed()


def lineage(aggregator: Aggregator, version: str) -> dict:
    return json.loads((aggregator.store.release(version) / "release.json").read_text())


def pooled_images(site: Site) -> torch.Tensor:
    """Everybody's training images, as each agent chose its own: uint8, shape (images, 3, size, size)."""
    base = BaseModel.load(site.base)
    pooled = []
    for hospital in HOSPITALS:
        share = Data.model_fields["validation"].default
        records = assign_splits(read_records(site.data / hospital), validation=share, seed=0)
        chosen = [record for record in records if record.split == "train"]
        pooled.append(load_images(chosen, base.classes, base.input.size).images)
    return torch.cat(pooled)
