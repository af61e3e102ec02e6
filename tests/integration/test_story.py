"""The whole job as hospitals and an aggregation site live through it, one command after the other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from agent.client import Client, Credentials
from agent.ledger import Ledger
from agent.upload import upload
from datavector.files import sha256_file
from datavector.model import BaseModel
from tests.integration.conftest import HOSPITALS, VISIT
from tests.integration.processes import ENVIRONMENT, ROOT, Aggregator, Site
from tests.serving import announce


def test_three_hospitals_that_never_meet_make_a_model_and_one_takes_its_part_back(site: Site, tmp_path: Path):
    aggregator = site.aggregator(VISIT)
    for hospital in HOSPITALS:
        assert "visit for trial-" in site.agent(hospital, aggregator.address, "--tasks-only").succeed()
    first = aggregator.wait_for("Ready", *HOSPITALS)

    printed = site.run("north", "release", "fetch", "--output", tmp_path / "release").succeed()
    assert first.name in printed
    assert "FAIL" not in printed
    lineage = json.loads((tmp_path / "release" / "release.json").read_text())
    assert lineage["calibration"]["mode"] == "visit"
    assert lineage["calibration"]["hospitals"] == list(HOSPITALS)
    assert_the_readmes_client_agrees_with_predict(site, tmp_path / "release", tmp_path)
    refused = site.run("north", "release", "fetch", "--output", site.data)
    assert refused.wait() == 2
    assert "holds other files" in refused.output

    # south takes its part back: the version is revoked before anything else, nobody can fetch it, its blob is erased
    (of_south,) = [vector for vector in aggregator.vectors() if vector.spec.hospital == "south"]
    printed = site.run("south", "withdraw", "--reason", "a trial").succeed()
    assert f"withdrawn: {of_south.name}" in printed
    assert f"revoked: {first.name}" in printed
    assert aggregator.versions()[first.name].status.phase.value == "Revoked"
    refused = site.run("north", "release", "fetch", "--output", tmp_path / "revoked")
    assert refused.wait() == 1
    assert "has no Ready version" in refused.output
    second = aggregator.wait_for("Calibrating", "north", "west")
    assert not aggregator.store.blob("south", of_south.spec.artifact.digest).exists()
    assert not aggregator.store.version(first.name).exists()
    assert not aggregator.store.release(first.name).exists()

    # and the version without it is, bit for bit, that of an aggregator which never had it
    ours = sha256_file(aggregator.store.merged(second.name, "sum"))
    assert ours == sha256_file(merged_without_south(site, aggregator, tmp_path))

    visitors = [site.agent(hospital, aggregator.address, "--tasks-only") for hospital in ("north", "west")]
    assert all("visit for trial-" in visitor.succeed() for visitor in visitors)
    assert aggregator.wait_for("Ready", "north", "west").status.weights_sha256 == ours
    (tmp_path / ".release.partial").mkdir()
    (tmp_path / ".release.partial" / "rest.txt").write_text("of a download that was cut off")
    printed = site.run("north", "release", "fetch", "--output", tmp_path / "release").succeed()
    assert second.name in printed
    assert json.loads((tmp_path / "release" / "release.json").read_text())["version"] == second.name
    assert not list(tmp_path.rglob("rest.txt"))
    assert not list(tmp_path.glob(".release.*"))

    with (tmp_path / "release" / "labels.txt").open("a") as labels:
        labels.write("wart\n")
    altered = site.start("verify", tmp_path / "release", log="verify")
    assert altered.wait() == 1
    assert "FAIL  files" in altered.output
    assert "altered: labels.txt" in altered.output
    assert "does not verify" in altered.output

    # one more is one too many: fewer than minHospitals are left, so there is no model any more
    site.run("west", "withdraw").succeed()
    refused = site.run("north", "release", "fetch", "--output", tmp_path / "none")
    assert refused.wait() == 1
    assert "policy 'trial' has no Ready version (1 of 2 hospitals; waiting for one more)" in refused.output
    status = site.start("status", "--store", aggregator.store.root, log="status").succeed()
    assert status.count("Revoked") == 2
    assert "Withdrawn" in status
    assert "trial: 1 of 2 hospitals; waiting for one more" in status

    # nothing leaves after a withdrawal, and after taking part again what was withdrawn is not taken
    refused = site.agent("west", aggregator.address, "--once")
    assert refused.wait() == 1
    assert "FAIL  consent      this hospital withdrew on" in refused.output
    assert "takes part again" in site.run("west", "rejoin").succeed()
    refused = site.agent("west", aggregator.address, "--once")
    assert refused.wait() == 1
    assert re.search(r"error: west-\w+ was withdrawn at", refused.output)
    assert "Traceback" not in refused.output
    printed = site.agent("west", aggregator.address, "--once", training={**site.training, "seed": 1}).succeed()
    assert "(sequence 2" in printed


def test_everything_that_left_is_in_the_ledger_with_the_bytes_that_arrived(site: Site):
    aggregator = site.aggregator(VISIT)
    (vector,) = [vector for vector in aggregator.vectors() if vector.spec.hospital == "north"]
    site.config("north", aggregator.address)
    printed = site.run("north", "agent", "ledger", "--json").succeed()
    entries = [json.loads(line) for line in printed.splitlines()]
    assert [(entry["what"], entry["state"]) for entry in entries] == [
        ("announcement", "sending"), ("announcement", "sent"), ("vector", "sending"), ("vector", "sent"),
    ]  # fmt: skip
    entries = entries[2:]
    blob = aggregator.store.blob("north", vector.spec.artifact.digest)
    for entry in entries:
        assert entry["bytes"] == blob.stat().st_size
        assert entry["sha256"] == sha256_file(blob)
        assert entry["to"].endswith("(spiffe://datavector.local/aggregator)")
    table = site.run("north", "agent", "ledger").succeed()
    assert f"{blob.stat().st_size:,} bytes" in table


def assert_the_readmes_client_agrees_with_predict(site: Site, release: Path, folder: Path) -> None:
    """Runs the code that README.md shows, as it stands there but for the paths."""
    image = folder / "on its side.png"
    orientation = Image.Exif()
    orientation[ExifTags.Base.Orientation] = 6
    with Image.open(next((site.data / "south" / "melanoma").glob("*.png"))) as upright:
        upright.save(image, exif=orientation)
    code = re.search(r"```python\n(import json.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code
    program = code[1].replace('"demo-out/release/', f'"{release}/').replace('"image.jpg"', f'"{image}"')
    assert str(release) in program
    assert str(image) in program
    clean = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=clean, cwd=folder
    )
    theirs = eval(shown.stdout)  # a printed dictionary of label to probability
    ours = json.loads(site.start("predict", release, image, log="predict").succeed())
    assert theirs == pytest.approx(ours["probabilities"], abs=1e-6)
    assert max(theirs, key=theirs.__getitem__) == ours["label"]


def merged_without_south(site: Site, aggregator: Aggregator, folder: Path) -> Path:
    """The merged weights of another aggregator, which has only ever seen the vectors of north and west."""
    other = site.aggregator(VISIT, name="other")
    base = BaseModel.load(site.base)
    for vector in aggregator.vectors():
        hospital = vector.spec.hospital
        if hospital == "south":
            continue
        certificates = site.certificates
        credentials = Credentials(
            certificates / f"{hospital}.crt", certificates / f"{hospital}.key", certificates / "ca.crt"
        )
        blob = aggregator.store.blob(hospital, vector.spec.artifact.digest)
        with Client(other.address, credentials, ledger=Ledger(folder / "other.jsonl"), patience_seconds=60) as client:
            upload(client, blob, announce(blob, base))
    version = other.wait_for("Calibrating", "north", "west")
    return other.store.merged(version.name, "sum")
