"""Prometheus' tools, and the site of the integration tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import empty_site, new_site

__all__ = ["empty_site", "new_site"]

RULES = Path(__file__).parent.parent.parent / "charts" / "aggregator" / "rules.yaml"


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Finds Prometheus' programs: `tool("promtool")`."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"there is no {name} here; Debian's package prometheus has it")
        return path

    return find
