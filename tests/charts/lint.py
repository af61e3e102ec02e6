"""`helm lint --strict` of every chart, each with the values that it needs: `python -m tests.charts.lint`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.charts.rendering import AGENT, AGGREGATOR, CHARTS, FLOOR, HelmFailed, run_helm
from tests.cluster.build import HELM, CannotBuild, build

REQUIRED = {"agent": AGENT, "aggregator": AGGREGATOR, "crds": {}}


def main() -> None:
    try:
        helm = Path(shutil.which("helm") or build(HELM) / "helm")
    except CannotBuild as error:
        print(f"charts are not linted: {error}")
        return
    for chart, values in REQUIRED.items():
        try:
            run_helm(helm, "lint", "--strict", f"--kube-version={FLOOR}", str(CHARTS / chart), values=values)
        except HelmFailed as error:
            sys.exit(f"charts/{chart}: {error}")
    print(f"charts are linted: {', '.join(REQUIRED)}")


if __name__ == "__main__":
    main()
