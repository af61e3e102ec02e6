"""An aggregation site and hospitals, installed with Helm as their people would."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from datavector.data.synthetic import synthesise
from tests.cluster.aggregation import condition
from tests.e2e.space import PATIENCE, Helm, Space, datavector

REAL_IMAGES = Path(__file__).parents[3] / "shared" / "data" / "brain-mri"
RELEASE = "site"
HOSPITALS = ("north", "south", "east")


class Site:
    """The aggregation site: charts/aggregator in a namespace of its own, certificates from an authority in a folder."""

    def __init__(self, space: Space, charts: Helm, images: dict[str, str], folder: Path) -> None:
        self.space, self.charts, self.images = space, charts, images
        self.certificates = folder / "certs"
        self.folder = folder
        self.server = f"{RELEASE}-receiver.{space.name}.svc"
        datavector("certs", "init", "--output", self.certificates, "--server-name", self.server)
        self.give_secret(space, "aggregator-tls", "--aggregator")

    @property
    def address(self) -> str:
        return f"{self.server}:8443"

    def give_secret(self, space: Space, name: str, *whose: str) -> None:
        """A certificate as a Secret, as `datavector certs secret` prints it."""
        secret = datavector("certs", "secret", "--authority", self.certificates, "--name", name, *whose)
        space.kubectl("apply", "-f", "-", input=secret)

    def install(self, **values: Any) -> str:
        """Installs or upgrades the chart; its notes."""
        control, job = (self.images[each].rpartition(":")[0] for each in ("control", "job"))
        quick = {
            "tls": {"secret": "aggregator-tls"},
            "store": {"size": "1Gi"},
            "image": {"repository": control},
            "jobImage": {"repository": job},
            "limits": {"pollSeconds": 2},
            "networkPolicy": {"metricsNamespaces": ["monitoring"]},
        }
        notes = self.charts.install(RELEASE, "aggregator", namespace=self.space.name, values=quick | values)
        for part in ("receiver", "operator"):
            self.space.rolled_out(f"{RELEASE}-{part}")
        return notes

    def make_base(self, architecture: str, *, size: int, classes: list[str]) -> Path:
        """A base model, as a folder on this machine."""
        labels, base = self.folder / "classes.txt", self.folder / "base"
        labels.write_text("\n".join(classes))
        datavector(
            "base", "create", "--architecture", architecture, "--size", str(size), "--classes", labels, "--output", base
        )
        return base

    def bring_base(self, base: Path) -> str:
        """Copies a base model into the store as the chart's notes say; its object's name."""
        (pod,) = self.space.pods("app.kubernetes.io/name=datavector-receiver")
        self.space.kubectl("cp", str(base), f"{pod['metadata']['name']}:/tmp/base", "--no-preserve=true")
        printed = self.in_receiver("datavector", "base", "import", "/tmp/base", "--store", "/store")
        self.space.kubectl("apply", "-f", "-", input=printed)
        return str(yaml.safe_load(printed)["metadata"]["name"])

    def in_receiver(self, *command: str) -> str:
        return self.space.kubectl("exec", f"deploy/{RELEASE}-receiver", "--", *command)

    def set_policy(self, name: str, spec: dict[str, Any]) -> None:
        self.space.apply(
            {"apiVersion": "datavector.dev/v1alpha1", "kind": "MergePolicy", "metadata": {"name": name}, "spec": spec}
        )

    def vectors(self) -> dict[str, dict[str, Any]]:
        """The newest vector of each hospital."""
        found = sorted(self.space.items("datavectors"), key=lambda each: each["spec"]["sequence"])
        return {each["spec"]["hospital"]: each for each in found}

    def ready(self, *hospitals: str, seconds: float = PATIENCE) -> dict[str, Any]:
        """Waits for a Ready version of exactly these hospitals' vectors."""

        def look() -> dict[str, Any] | None:
            for version in self.space.items("modelversions"):
                names = {each["hospital"] for each in version["spec"]["inputs"]}
                if names == set(hospitals) and condition(version, "Ready").get("status") == "True":
                    return version
            return None

        return dict(self.space.until(look, seconds=seconds, why=self.explain))

    def explain(self) -> str:
        policies = [each.get("status", {}).get("waitingFor") for each in self.space.items("mergepolicies")]
        return json.dumps(policies) + "\n" + self.space.kubectl("get", "dv,mv,jobs,pods", "--output=wide")


class Hospital:
    """One hospital: charts/agent in a namespace of its own."""

    def __init__(self, site: Site, space: Space, name: str, images: Path, *, by_path: bool) -> None:
        """Args:
        images: its images, an ImageFolder.
        by_path: they are on the node, at that path; else they are copied into a volume.
        """
        self.site, self.space, self.name = site, space, name
        datavector("certs", "issue", "--authority", site.certificates, "--hospital", name)
        site.give_secret(space, f"{name}-tls", "--hospital", name)
        self._data = {"hostPath": str(images)} if by_path else {"existingClaim": "images"}
        if not by_path:
            space.fill_claim("images", images, site.images["control"])

    def install(self, mode: str = "deployment", **values: Any) -> str:
        """Installs or upgrades the chart; its notes."""
        content = {
            "aggregator": self.site.address,
            "mode": mode,
            "data": self._data,
            "tls": {"secret": f"{self.name}-tls"},
            "image": {"repository": self.site.images["agent"].rpartition(":")[0]},
            "resources": {"requests": {"cpu": "100m", "memory": "500Mi"}},
            "state": {"size": "1Gi"},
            "networkPolicy": {"metricsNamespaces": ["monitoring"]},
        }
        return self.site.charts.install(self.name, "agent", namespace=self.space.name, values=content | values)

    def delivered(self, *, seconds: float = PATIENCE) -> dict[str, Any]:
        """Waits until its vector is an object at the aggregation site."""
        return dict(
            self.site.space.until(
                lambda: self.site.vectors().get(self.name),
                seconds=seconds,
                why=lambda: self.log() + self.site.explain(),
            )
        )

    def log(self) -> str:
        return self.space.logs("--selector=app.kubernetes.io/component=agent", "--all-containers", "--tail=-1")

    def run(self, *command: str) -> str:
        """Runs a command beside the staying agent."""
        return self.space.kubectl("exec", f"deploy/{self.name}", "--", *command)


# --- Images


@dataclass(frozen=True)
class Images:
    """What hospitals train on, and what nobody has seen.

    Attributes:
        classes: in the order of the model's outputs.
        hospitals: an ImageFolder of each.
        test: images and their labels.
    """

    classes: list[str]
    hospitals: dict[str, Path]
    test: dict[Path, str]


def make_images(folder: Path, *, each: int, test: int) -> Images:
    """Images of three hospitals: real brain MRI where it is present, drawn skin lesions elsewhere."""
    real = REAL_IMAGES / "manifest.csv"
    if real.is_file():
        return _divide(real, "hospital_iid", folder, each, test)
    drawn = synthesise(folder / "drawn", hospitals=len(HOSPITALS), images=each, test_images=test)
    return _divide(drawn, "hospital", folder, each, test)


def _divide(manifest: Path, column: str, folder: Path, each: int, test: int) -> Images:
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    hospitals = {}
    for name in HOSPITALS:
        for row in _spread([row for row in rows if row["split"] == "train" and row[column] == name], each):
            target = folder / name / row["label"] / Path(row["file"]).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(manifest.parent / row["file"], target)
        hospitals[name] = folder / name
    unseen = _spread([row for row in rows if row["split"] == "test"], test)
    labels = {manifest.parent / row["file"]: row["label"] for row in unseen}
    return Images(sorted({row["label"] for row in rows}), hospitals, labels)


def _spread(rows: list[dict[str, str]], most: int) -> list[dict[str, str]]:
    """So many rows, from all over the list, which is sorted by class."""
    return [rows[number * len(rows) // most] for number in range(most)] if len(rows) > most else rows
