"""What is checked, and put right, before anything is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent import preflight
from tests.agent.conftest import settings_of


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_the_state_folder_is_its_owners_alone(tmp_path):
    settings = settings_of(tmp_path / "deep" / "state")
    preflight.state(settings)
    assert mode(settings.state) == 0o700
    settings.state.chmod(0o755)
    preflight.state(settings)
    assert mode(settings.state) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_state_folder_of_somebody_else_stays_as_it_is(tmp_path):
    settings = settings_of(tmp_path / "state")
    settings.state.mkdir()
    settings.state.chmod(0o2775)
    os.chown(settings.state, 12345, 12345)
    preflight.state(settings)
    assert mode(settings.state) == 0o2775
