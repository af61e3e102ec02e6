"""A collaboration of three hospitals as real processes: certificates, a base model, images, and trained agents."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.processes import Site

HOSPITALS = ("north", "south", "west")
CLASSES = ("keratosis", "melanoma", "nevus")
COLOURS = {"keratosis": (150, 110, 70), "melanoma": (70, 45, 40), "nevus": (190, 130, 120)}
IMAGES = 12  # of each class
TRAINING = {"epochs": 3, "batch_size": 2}
VISIT = {
    "baseModelRef": "tiny",
    "trigger": {"minHospitals": 2, "quietPeriodSeconds": 0},
    "calibration": {"mode": "visit"},
}


@pytest.fixture(scope="session")
def empty_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Certificates, a base model of 6 MB and images, all made by the command line; nothing has happened yet."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    for number, hospital in enumerate(HOSPITALS):
        draw_images(folder / "data" / hospital, seed=number)
    with ExitStack() as running:
        site = Site(folder, folder / "certs", folder / "base", folder / "data", TRAINING, running)
        base = site.start(
            "base", "create", "--architecture", "mobilenet_v3_small", "--size", "32", "--name", "tiny",
            "--classes", folder / "classes.txt", "--output", site.base, log="base",
        )  # fmt: skip
        site.start("certs", "init", "--output", site.certificates, log="certs").succeed()
        for hospital in HOSPITALS:
            site.start("certs", "issue", "--authority", site.certificates, "--hospital", hospital, log="cert").succeed()
        base.succeed()
        yield site


@pytest.fixture(scope="session")
def trained_site(empty_site: Site) -> Site:
    """Each hospital has trained and sent its vector, and was gone before the next one started; so is the aggregator."""
    aggregator = empty_site.aggregator({**VISIT, "trigger": {"minHospitals": 3, "quietPeriodSeconds": 0}})
    for hospital in HOSPITALS:
        printed = empty_site.agent(hospital, aggregator.address, "--once").succeed()
        assert "delivered: " in printed
    aggregator.wait_for("Calibrating", *HOSPITALS)
    assert aggregator.process.terminate() == 0
    return empty_site


@pytest.fixture
def new_site(empty_site: Site, tmp_path: Path) -> Iterator[Site]:
    """A place for a story that begins from nothing."""
    with ExitStack() as running:
        yield replace(empty_site, folder=tmp_path, running=running)


@pytest.fixture
def site(new_site: Site, trained_site: Site) -> Site:
    """A place for a story that begins after the hospitals have trained: a copy of all that is on their disks."""
    for name in ("aggregator", *HOSPITALS):
        shutil.copytree(trained_site.folder / name, new_site.folder / name)
    return new_site


def draw_images(folder: Path, *, seed: int) -> None:
    """Discs of a class's colour on skin, 40 x 40 pixels: a folder for each class."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:40, :40]
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        for number in range(IMAGES):
            image = np.full((40, 40, 3), (225, 185, 165), dtype=float)
            row, column, radius = random.uniform((14, 14, 7), (26, 26, 13))
            image[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = colour
            noisy = image * random.uniform(0.85, 1.1) + random.normal(0, 6, image.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / label / f"{number:02}.png")
