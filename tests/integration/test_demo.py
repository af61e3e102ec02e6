"""The demo from its first line to its report, small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.conftest import draw_images
from tests.integration.processes import Process


@pytest.mark.slow
def test_the_demo_ends_with_a_verified_release_and_its_report(tmp_path: Path):
    write_images(tmp_path / "images")
    demo = Process(
        ["demo", "--data", "images", "--split-column", "site", "--images", "24", "--epochs", "1", "--with-controls",
         "--output", "out"],
        tmp_path / "log",
    )  # fmt: skip
    try:
        printed = demo.succeed()
    finally:
        demo.clear()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [hospital["name"] for hospital in report["hospitals"]] == ["north", "south"]
    for hospital in report["hospitals"]:
        assert set(hospital) >= {"name", "images", "accuracy"}
        assert hospital["images"] == 24
        assert 0 <= hospital["accuracy"] <= 1
        assert f"{hospital['name']}: trains on 24 images, sends its vector, and is gone" in printed
    accuracies = [hospital["accuracy"] for hospital in report["hospitals"]]
    assert report["mean_single"] == pytest.approx(sum(accuracies) / 2)
    assert report["best_single"] == max(accuracies)
    assert set(report["merged"]) >= {"method", "accuracy", "balanced_accuracy", "calibration"}
    assert report["merged"]["method"] in ("iso-c", "ties", "sum", "mean")
    assert report["merged"]["calibration"]["mode"] == "visit"
    assert set(report["controls"]) == {"pooled", "random", "random_body", "no_restoration"}
    assert all(0 <= accuracy <= 1 for accuracy in report["controls"].values())
    assert report["seconds"]
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    release = tmp_path / report["release"]
    assert (release / "1" / "model.onnx").is_file()
    assert (tmp_path / "out" / "report.png").stat().st_size > 1000
    assert "fetched and verified the release" in printed
    assert "Traceback" not in "".join(log.read_text() for log in tmp_path.rglob("*log"))


def write_images(folder: Path) -> None:
    """Images of two sites and a common test set, with a manifest that names the site of each training image."""
    lines = ["file,label,split,site"]
    for seed, place in enumerate(("north", "south", "test")):
        draw_images(folder / place, seed=seed)
        split, site = ("test", "") if place == "test" else ("train", place)
        for image in sorted((folder / place).rglob("*.png")):
            lines.append(f"{image.relative_to(folder)},{image.parent.name},{split},{site}")
    (folder / "manifest.csv").write_text("\n".join(lines))
