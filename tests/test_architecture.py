"""What each process imports: the receiver stays small, prediction stays light."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIGHT = [
    "aggregator.receiver", "aggregator.cluster_receiver", "aggregator.embedded",
    "aggregator.reconciler", "aggregator.reconcile", "aggregator.registry", "aggregator.store",
    "aggregator.job", "aggregator.main", "datavector.vector", "datavector.model", "datavector.merge", "datavector.cli",
]  # fmt: skip


def imported_by(module: str) -> set[str]:
    """Top-level packages in memory after importing a module in a fresh process."""
    script = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return set(answer.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_process_never_imports_torch(module):
    assert not imported_by(module) & {"torch", "torchvision", "onnx", "onnxruntime", "onnxscript"}


def test_the_decisions_need_neither_network_nor_database():
    assert not imported_by("aggregator.reconcile") & {"grpc", "sqlite3", "kubernetes", "kopf"}


def test_the_command_line_answers_help_without_the_heavy_parts():
    assert not imported_by("datavector.cli") & {"numpy", "grpc", "aggregator", "agent", "pydantic"}


def test_the_runtime_of_releases_reports_nothing_to_its_makers(tmp_path: Path):
    script = "import datavector.release.verify, time; time.sleep(0.5)"  # it would make itself an identity in HOME
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent, env=environment)
    assert list(tmp_path.rglob("*")) == []
