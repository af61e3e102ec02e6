"""docs/kubernetes.md and then docs/hospital.md can be typed as they stand, on a real cluster."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.client import Cluster, KubectlFailed
from tests.e2e.conftest import LOGS, stage
from tests.e2e.pages import Terminal, page, section
from tests.e2e.space import PATIENCE, Space
from tests.integration.conftest import CLASSES, draw_images
from tests.integration.processes import ENVIRONMENT

pytestmark = pytest.mark.timeout(1200)

SITE, HOSPITAL = "datavector", "north"  # the namespaces, as the pages name them
QUICK = "--set training.epochs=1 --set state.size=1Gi --set resources.requests.cpu=100m,resources.requests.memory=500Mi"
TLS_FILES = ("north.crt", "north.key", "ca.crt")


def test_both_pages_can_be_typed_from_an_empty_cluster_to_a_withdrawal(
    cluster: Cluster,
    places: dict[str, Space],
    platform: Terminal,
    hospital: Terminal,
    images: dict[str, str],
    tmp_path: Path,
):
    site, north = places[SITE], places[HOSPITAL]
    names = {
        "registry.example.org/": f"{images['agent'].partition('/')[0]}/",
        "merge.example.org": "site-receiver.datavector.svc",
    }
    shown = page(
        "docs/kubernetes.md",
        {
            **names,
            "--size 128": "--size 32",
            "glioma meningioma notumor pituitary": " ".join(CLASSES),
            "helm install datavector-crds": "helm upgrade --install --take-ownership datavector-crds",  # may be there
        },
    )
    with stage("docs/kubernetes.md typed"):
        printed = platform.follow(section(shown, "Set up"))
    assert "Phase:          Succeeded" in one(printed, "helm test site")
    assert "efficientnet-lite0" in one(printed, "get bm,mp")
    site.wait("mp/brain-mri", "condition=Accepted")

    for name in TLS_FILES:  # over a channel that keeps the key private
        shutil.copy(platform.folder / "certs" / name, hospital.folder)
    drawn = tmp_path / "images"
    draw_images(drawn, seed=0)
    data = f"data.hostPath={drawn}" if cluster.is_local else "data.existingClaim=images"
    shown = page(
        "docs/hospital.md",
        {
            **names,
            "--set data.hostPath=/srv/images": f"--set {data} {QUICK}",
            " --follow\n": "\n",
        },
    )
    hospital.follow(section(shown, "The certificate"))
    if not cluster.is_local:
        north.fill_claim("images", drawn, images["control"])
    with stage("docs/hospital.md typed"):
        printed = hospital.follow(section(shown, "Install"))
        assert "ready" in one(printed, "helm test north")
        first = delivered(site, sequence=1)
        north.until(lambda: "delivered: " in north.logs("deployment/north"), why=lambda: north.logs("deployment/north"))
        printed = hospital.follow(section(shown, "Watch")) | hospital.follow(section(shown, "What left the building"))
        assert "delivered: " in one(printed, "logs deployment/north")
        assert " vector " in one(printed, "datavector agent ledger")

        printed = hospital.follow(section(shown, "Take it back"))
        assert f"withdrawn: {first}" in one(printed, "datavector withdraw")
        site.wait(f"dv/{first}", "jsonpath={.spec.consent}=Withdrawn")
        assert "takes part again" in one(printed, "datavector rejoin")
        second = delivered(site, sequence=2)
        assert second != first
        assert site.get("dv", second)["spec"]["consent"] == "Granted"

        hospital.follow(section(shown, "Upgrade, roll back"))
        printed = hospital.follow(section(shown, "Uninstall"))
    assert '"what": "withdrawal"' in (hospital.folder / "north-ledger.jsonl").read_text()
    assert "north-state" in north.kubectl("get", "pvc", "--output=name")


def test_the_aggregation_site_is_upgraded_renewed_and_uninstalled_as_its_page_says(
    places: dict[str, Space], platform: Terminal
):
    if not (platform.folder / "site.yaml").exists():
        pytest.skip("the site was not set up")
    shown = page("docs/kubernetes.md", {"merge.example.org": "site-receiver.datavector.svc"})
    printed = platform.follow(section(shown, "Change, upgrade, roll back"))
    assert "deployed" in one(printed, "helm history site")
    platform.follow(section(shown, "New certificates"))
    platform.follow(section(shown, "Uninstall"))
    kept = places[SITE].kubectl("get", "pvc,mp,dv", "--output=name")
    assert "site-store" in kept
    assert "brain-mri" in kept
    assert "north-" in kept


# --- Parts


@pytest.fixture(scope="module")
def places(cluster: Cluster) -> Iterator[dict[str, Space]]:
    """The pages' namespaces, which the pages make themselves; gone afterwards."""
    ending = cluster.kubectl("get", "namespace", "--field-selector=status.phase=Terminating", "--output=name").split()
    if ending:  # those of earlier tests
        cluster.kubectl("wait", "--for=delete", *ending, "--timeout=180s")
    there = cluster.kubectl("get", "namespace", SITE, HOSPITAL, "--ignore-not-found", "--output=name").split()
    if there:
        pytest.skip(f"the cluster has {' and '.join(there)} already, and these are not ours to remove")
    yield {name: Space(cluster, name) for name in (SITE, HOSPITAL)}
    with suppress(KubectlFailed):  # a volume of a folder belongs to no namespace
        cluster.kubectl("delete", "pv", "--selector=app.kubernetes.io/instance=north", "--wait=false")
    cluster.kubectl("delete", "namespace", SITE, HOSPITAL, "--ignore-not-found", "--timeout=180s", check=False)


@pytest.fixture(scope="module")
def programs(cluster: Cluster, helm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a reader: `kubectl`, `helm` and `datavector` on the path, and the cluster."""
    folder = tmp_path_factory.mktemp("bin")
    ours = Path(sys.prefix) / "bin" / "datavector"
    for name, program in {"kubectl": shutil.which(cluster.program), "helm": helm, "datavector": ours}.items():
        assert program, f"there is no {name}"
        (folder / name).symlink_to(Path(program).absolute())
    return {**ENVIRONMENT, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "KUBECONFIG": str(cluster.kubeconfig)}


@pytest.fixture(scope="module")
def platform(programs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    return terminal("platform", programs, tmp_path_factory)


@pytest.fixture(scope="module")
def hospital(programs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    return terminal("hospital", programs, tmp_path_factory)


def terminal(name: str, programs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    """A shell in a folder that holds the charts, as a checkout does."""
    folder = tmp_path_factory.mktemp(name)
    (folder / "charts").symlink_to(Path(__file__).parents[2] / "charts")
    (LOGS / "pages").mkdir(parents=True, exist_ok=True)
    transcript = LOGS / "pages" / f"{name}.txt"
    transcript.unlink(missing_ok=True)
    return Terminal(folder, programs, transcript)


def one(printed: dict[str, str], part: str) -> str:
    """What the one command with that part printed."""
    (found,) = (said for line, said in printed.items() if part in line)
    return found


def delivered(site: Space, *, sequence: int) -> str:
    """Waits until a vector of the hospital is an object; its name."""

    def look() -> str | None:
        found = (each for each in site.items("datavectors") if each["spec"]["sequence"] == sequence)
        return next((str(each["metadata"]["name"]) for each in found), None)

    return str(site.until(look, seconds=PATIENCE, why=lambda: site.kubectl("get", "dv,mp,pods", check=False)))
