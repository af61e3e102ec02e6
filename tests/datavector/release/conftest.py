"""Releases of small networks, exported once a session; tests that alter one work on a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from datavector.model import BaseModel
from datavector.networks import build, create_base
from datavector.release import write_release
from tests.datavector.release.samples import CLASSES, lineage, settle, tiny, tiny_base


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of Tiny; never changed."""
    folder = tmp_path_factory.mktemp("tiny")
    return write_release(folder / "release", network=tiny(), base=tiny_base(folder / "base"), lineage=lineage())


@pytest.fixture
def altered(tiny_release: Path, tmp_path: Path) -> Path:
    """A copy of it, for a test to alter."""
    return Path(shutil.copytree(tiny_release, tmp_path / "release"))


@pytest.fixture(scope="session")
def real_release(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, nn.Module, BaseModel]]:
    """A release of a real architecture with random weights, with the network and base that it came from."""
    made: dict[str, tuple[Path, nn.Module, BaseModel]] = {}

    def make(architecture: str) -> tuple[Path, nn.Module, BaseModel]:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            base = create_base(folder / "base", architecture=architecture, classes=CLASSES, size=64, seed=1)
            network = settle(build(base), 64)
            made[architecture] = (
                write_release(folder / "release", network=network, base=base, lineage=lineage()),
                network,
                base,
            )
        return made[architecture]

    return make
