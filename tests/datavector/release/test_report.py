"""The merge report, also as a real browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datavector.release.lineage import describe
from datavector.release.report import report_page
from tests.datavector.release.samples import lineage, tiny_base

HOSPITALS = ("north", "south")
CHROMIUM = shutil.which("chromium")
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium here; Debian's package chromium has it"
)


def score(name: str, share: float) -> dict[str, Any]:
    each = {"images": 20, "accuracy": share, "balancedAccuracy": share}
    return {"name": name, **each, "images": 40, "hospitals": dict.fromkeys(HOSPITALS, each)}


EVALUATION = {
    "validated": True,
    "chosen": "sum.head",
    "reason": "sum.head has a balanced accuracy of 90.0%",
    "margin": 0.021,
    "hospitals": list(HOSPITALS),
    "candidates": [score("mean", 0.8), score("sum.head", 0.9)],
    "singles": [score("hospital.north", 0.7)],
    "worseThan": "",
    "confusion": [[18, 2], [1, 19]],
    "bins": [[0, 0, 0.0]] * 5 + [[10, 6, 5.5], [0, 0, 0], [10, 9, 7.5], [0, 0, 0], [20, 20, 19.0]],
}
COHORT = {"hospitals": list(HOSPITALS), "norms": [6.4, 5.9], "cosine": [[1.0, 0.14], [0.14, 1.0]]}
HEAD = {"kind": "closed-form", "hospitals": list(HOSPITALS), "images": 200, "note": ""}


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A release.json without an evaluation."""
    base = tiny_base(tmp_path_factory.mktemp("base") / "base")
    return describe(lineage(), base, opset=20, parity={"max_abs_difference": 1e-6, "logit_spread": 1.0})


@pytest.fixture(scope="module")
def evaluated(described: dict[str, Any]) -> dict[str, Any]:
    content = described | {"evaluation": EVALUATION, "cohort": COHORT, "head": HEAD, "classes": ["nevus", "melanoma"]}
    return json.loads(json.dumps(content))


def test_a_page_shows_what_was_tried_and_what_was_chosen(evaluated):
    page = report_page(evaluated)
    for text in ("Validated by north, south", "sum.head (chosen)", "own model of north", "90.0%", "2.1%", "0.14"):
        assert text in page
    assert "closed-form, solved from the features of 200 images of north, south" in page
    assert "expected calibration error: 7.5%" in page
    assert evaluated["inputsHash"] in page
    assert report_page(evaluated) == page


def test_a_page_without_an_evaluation_says_so_and_leaves_out_what_there_is_not(described):
    page = report_page(described)
    assert "Unvalidated" in page
    for heading in ("What was tried", "Right and wrong answers", "How sure, and how right"):
        assert heading not in page


def test_a_worse_model_and_too_few_evaluators_are_told_first(evaluated):
    worse = report_page(evaluated | {"evaluation": EVALUATION | {"worseThan": "north"}})
    assert "Worse than the own model of north" in worse
    alone = {
        "validated": False,
        "chosen": "mean",
        "reason": "unvalidated: 1 of 2 hospitals",
        "margin": 0,
        "hospitals": [],
    }
    page = report_page(evaluated | {"evaluation": alone | {"candidates": [], "singles": [], "worseThan": ""}})
    assert "Unvalidated: 1 of 2 hospitals" in page


def test_no_name_writes_markup(evaluated):
    evil = "<script>alert(1)</script>"
    text = json.dumps(evaluated).replace("north", evil).replace("nevus", evil).replace("brain-0123456789", evil)
    page = report_page(json.loads(text))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_many_classes_and_hospitals_stay_short(evaluated):
    classes = [f"class {number}" for number in range(200)]
    confusion = [[0] * 200 for _ in classes]
    confusion[3][5], confusion[7][7] = 9, 4
    many = [f"h{number}" for number in range(100)]
    cosine = [[1.0 if row == column else 0.1 for column in range(100)] for row in range(100)]
    content = evaluated | {
        "classes": classes,
        "evaluation": EVALUATION | {"confusion": confusion},
        "cohort": {"hospitals": many, "norms": [1.0] * 100, "cosine": cosine},
    }
    page = report_page(content)
    assert "most frequent confusions among 200 classes" in page
    assert "least like the 100 others" in page
    assert len(page) < 60_000


def browse(page: Path, *flags: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *flags]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []
    return done.stdout


@in_a_browser
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_every_section_without_a_complaint(evaluated, tmp_path, width):
    page, picture = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_text(report_page(evaluated), encoding="utf-8")
    shown = browse(page, "--dump-dom")
    headings = re.findall(r"<h2>(.*?)</h2>", shown)
    assert headings == [
        "Hospitals", "How alike the vectors are", "What was tried", "Right and wrong answers",
        "How sure, and how right", "What was restored", "Where it comes from", "What it is not",
    ]  # fmt: skip
    browse(page, f"--screenshot={picture}", f"--window-size={width},1600", "--hide-scrollbars")
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20, "a page, not a blank sheet"


@in_a_browser
def test_nothing_is_asked_of_any_network(evaluated, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(report_page(evaluated), encoding="utf-8")
    log = tmp_path / "net.json"
    browse(page, "--dump-dom", f"--log-net-log={log}", "--host-resolver-rules=MAP * ~NOTFOUND")
    assert not re.search(r"(?:src|href)=", page.read_text())
    assert "default-src 'none'" in page.read_text()
