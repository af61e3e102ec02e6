"""What the pages show can be typed as it stands: settings are valid, and "By hand" in README.md ends in a release."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from agent.settings import AgentSettings
from aggregator.policy_file import load_policies
from aggregator.settings import AggregatorSettings
from aggregator.store import Store
from datavector.config import load_settings
from tests.e2e.pages import blocks, typed
from tests.integration.conftest import draw_images
from tests.integration.processes import ENVIRONMENT, ROOT, Aggregator, Process, free_port

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = {"yaml": "policy.yaml", "toml": "north/agent.toml"}  # where a reader of "By hand" puts a block
HOSPITALS = ("north", "south")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_policy_and_every_configuration_file_that_a_page_shows_is_valid(page: Path, tmp_path: Path):
    for language, text in blocks(page.read_text()):
        file = tmp_path / f"shown.{language}"
        file.write_text(text)
        if language == "yaml":
            kinds = {document.get("kind") for document in yaml.safe_load_all(text)}  # also for Prometheus or Kubernetes
            assert "MergePolicy" not in kinds or load_policies(file)
        elif language == "toml":
            kind = AggregatorSettings if re.search("^store", text, re.MULTILINE) else AgentSettings
            load_settings(kind, file, {}, prefix="", environment={})


def test_the_readmes_policy_and_commands_name_the_same_base_model(tmp_path: Path):
    text = by_hand()
    (policy,) = [block for language, block in blocks(text) if language == "yaml"]
    (tmp_path / "policy.yaml").write_text(policy)
    (shown,) = load_policies(tmp_path / "policy.yaml")
    assert f"--architecture {shown.spec.base_model_ref} " in text


@pytest.mark.slow
def test_the_readmes_steps_by_hand_end_in_a_release(tmp_path: Path, running: ExitStack):
    for number, hospital in enumerate(HOSPITALS):
        give_images(tmp_path / "demo-out", hospital, seed=number)
    folder, port, printed = tmp_path, free_port(), {}
    aggregator: Aggregator | None = None
    for language, text in blocks(quick(by_hand(), port)):
        if language in FILES:
            (folder / FILES[language]).write_text(text)
            continue
        for line in typed(text):
            words = shlex.split(line, comments=True)
            if words[0] != "datavector":
                folder = shell(line, folder)
                continue
            if words[1:3] == ["release", "fetch"]:
                assert aggregator is not None
                aggregator.wait_for("Ready", *HOSPITALS)
            process = Process(words[1:], folder / f"{len(printed)}.log")
            running.callback(process.clear)
            if words[1] == "aggregator":
                process.wait_for("listening on ")
                aggregator = Aggregator(process, Store(folder / "store"), f"localhost:{port}")
                continue
            printed[" ".join(words[1:])] = process.succeed()
            if "--once" in words and "south" in line:
                assert aggregator is not None
                aggregator.wait_for("Calibrating", *HOSPITALS)

    assert "Calibrating" in printed["status --store store"]
    assert "FAIL" not in printed["release fetch --config north/agent.toml --output model"]
    assert (folder / "model" / "1" / "model.onnx").exists()
    assert "vector" in printed["agent ledger --config north/agent.toml"]
    assert "revoked: trial-" in printed["withdraw --config south/agent.toml"]
    assert "takes part again" in printed["rejoin --config south/agent.toml"]


@pytest.fixture
def running() -> Iterator[ExitStack]:
    """Ends what was started."""
    with ExitStack() as stack:
        yield stack


def by_hand() -> str:
    """The section's text."""
    _, heading, rest = (ROOT / "README.md").read_text().partition("\n## By hand")
    assert heading
    return rest.partition("\n## ")[0]


def quick(text: str, port: int) -> str:
    """The section with less to compute and to wait for, and on a port that is free."""
    for shown, instead in {
        "--size 128": "--size 32",
        "--once": "--once --epochs 1",
        "quietPeriodSeconds: 10": "quietPeriodSeconds: 0",
        "localhost:8443": f"localhost:{port}",
        "datavector aggregator ": f"datavector aggregator --listen 127.0.0.1:{port} ",
    }.items():
        assert shown in text
        text = text.replace(shown, instead)
    return text


def shell(line: str, folder: Path) -> Path:
    """Runs a command that is not ours; returns where it leads."""
    done = subprocess.run(
        ["bash", "-ec", f"{line}\npwd"], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    return Path(done.stdout.splitlines()[-1])


def give_images(demo: Path, hospital: str, *, seed: int) -> None:
    """A hospital's images and manifest, where the demo leaves them."""
    images, manifest = demo / "images" / hospital, demo / "sites" / hospital / "manifest.csv"
    draw_images(images, seed=seed)
    manifest.parent.mkdir(parents=True)
    with manifest.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(("file", "label"))
        lines.writerows((image, image.parent.name) for image in sorted(images.rglob("*.png")))
