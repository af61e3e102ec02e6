"""What an operator that cannot start says, and its exit code; needs no cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.integration.processes import ROOT


def start(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DATAVECTOR_", "KUBE"))}
    environment |= {f"DATAVECTOR_OPERATOR_{name.upper()}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "kopf", "run", "-m", "aggregator.operator", "--standalone", "--namespace=any"]
    environment |= {"PYTHONPATH": str(ROOT), "KUBECONFIG": str(folder / "absent")}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def test_missing_settings_are_named(tmp_path):
    ended = start(tmp_path)
    assert ended.returncode == 2
    assert "settings are missing or wrong: store (DATAVECTOR_OPERATOR_STORE): field required; " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_where_there_is_no_cluster_it_says_what_to_set(tmp_path):
    ended = start(tmp_path, store=str(tmp_path / "store"), store_claim="store", job_image="job")
    assert ended.returncode == 2
    assert "there is no way to a Kubernetes API server" in ended.stderr
    assert "set KUBECONFIG" in ended.stderr
    assert "Traceback" not in ended.stderr
