"""The `helm` of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest


# TO BE REPLACED by the fixture of tests/cluster/fixtures.py: remove this one when that is there.
@pytest.fixture(scope="session")
def helm() -> Path:
    """The helm program; where there is none, the test is skipped."""
    program = Path("/tmp/node/dir/bin/helm")
    if not program.is_file():
        pytest.skip(f"{program} is not there")
    return program
