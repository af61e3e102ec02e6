"""The merge report, also as a real browser shows it."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datavector.release.card import model_card
from datavector.release.lineage import describe, model_metadata
from datavector.release.markup import element
from datavector.release.report import report_page, version_on
from tests.datavector.release.browser import CHROMIUM, Browser, browser
from tests.datavector.release.samples import lineage, tiny_base

HOSPITALS = ("north", "south")
SECTIONS = [
    "Hospitals",
    "How alike the vectors are",
    "What was tried, and what each scored",
    "How the head was made",
    "BatchNorm calibration",
    "Right and wrong answers",
    "How sure, and how right",
    "Where it comes from",
    "What it is not",
]
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium here; Debian's package chromium has it"
)


def score(name: str, share: float, hospitals: tuple[str, ...] = HOSPITALS) -> dict[str, Any]:
    each = {"images": 20, "accuracy": share, "balancedAccuracy": share}
    return {"name": name, **each, "images": 20 * len(hospitals), "hospitals": dict.fromkeys(hospitals, each)}


EVALUATION = {
    "validated": True,
    "chosen": "sum.head",
    "reason": "sum.head has a balanced accuracy of 92.5%",
    "margin": 0.021,
    "hospitals": list(HOSPITALS),
    "candidates": [score("mean", 0.8), score("sum.head", 0.925)],
    "singles": [score("hospital.north", 0.7), score("hospital.south", 0.65)],
    "worseThan": "",
    "confusion": [[18, 2], [1, 19]],
    "bins": [[0, 0, 0.0]] * 5 + [[10, 6, 5.5], [0, 0, 0], [10, 9, 7.5], [0, 0, 0], [20, 20, 19.0]],
}
UNVALIDATED = {
    "validated": False,
    "chosen": "mean",
    "reason": "unvalidated: 1 of 2 hospitals evaluated the candidates, so it is mean",
    "margin": 0,
    "hospitals": [],
    "candidates": [],
    "singles": [],
    "worseThan": "",
}
COHORT = {"hospitals": list(HOSPITALS), "norms": [6.4, 5.9], "cosine": [[1.0, -0.14], [-0.14, 1.0]]}
HEAD = {"kind": "closed-form", "hospitals": list(HOSPITALS), "images": 200, "note": ""}


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A release.json without an evaluation."""
    base = tiny_base(tmp_path_factory.mktemp("base") / "base")
    return describe(lineage(), base, opset=20, parity={"max_abs_difference": 1e-6, "logit_spread": 1.0})


@pytest.fixture(scope="module")
def evaluated(described: dict[str, Any]) -> dict[str, Any]:
    content = described | {"evaluation": EVALUATION, "cohort": COHORT, "head": HEAD, "classes": ["nevus", "melanoma"]}
    return dict(json.loads(json.dumps(content)))


def crowd(described: dict[str, Any], hospitals: int, classes: int) -> dict[str, Any]:
    """A release of many hospitals and classes; the last class has no image."""
    names = tuple(f"hospital-{number:03}" for number in range(hospitals))
    confusion = np.diag(np.arange(classes, 0, -1) + 3)
    confusion[0, 1] = 9
    confusion[-1] = 0
    cosine = np.full((hospitals, hospitals), 0.1)
    cosine[5] = cosine[:, 5] = -0.2
    np.fill_diagonal(cosine, 1)
    inputs = [
        {"vector": f"{name}-1", "hospital": name, "digest": f"sha256:{'c' * 64}", "sampleCount": 100 + number}
        for number, name in enumerate(names)
    ]
    evaluation = EVALUATION | {
        "hospitals": list(names),
        "candidates": [score("mean", 0.8, names), score("sum.head", 0.925, names)],
        "singles": [score(f"hospital.{name}", 0.3 + number / 1000, names) for number, name in enumerate(names)],
        "confusion": confusion.tolist(),
    }
    return described | {
        "classes": [f"class {number}" for number in range(classes)],
        "inputs": inputs,
        "head": HEAD | {"hospitals": list(names)},
        "calibration": described["calibration"] | {"hospitals": list(names)},
        "cohort": {"hospitals": list(names), "norms": [1.0] * hospitals, "cosine": cosine.tolist()},
        "evaluation": evaluation,
    }


def text_of(page: str) -> str:
    """What a page says, without its markup."""
    return " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)).split())


# --- What it says ---------------------------------------------------------------------------------------------


def test_a_page_shows_what_was_tried_what_each_scored_and_what_was_chosen(evaluated):
    text = text_of(report_page(evaluated))
    for told in (
        "Validated by 2 hospitals sum.head has a balanced accuracy of 92.5%.",
        "balanced accuracy 92.5% margin of error 2.1%",
        "best single hospital 70.0% own model of north",
        "sum.head chosen 92.5%",
        "own model of south 65.0%",
        "Why: sum.head has a balanced accuracy of 92.5%.",
        "these are a little too good",
        "-0.14",
    ):
        assert told in text
    assert "mean chosen" not in text


def test_a_page_shows_where_the_head_the_statistics_and_the_weights_come_from(evaluated):
    text = text_of(report_page(evaluated))
    assert "corrected by sums of the merged network's features over 200 images of north, south" in text
    assert "mode visit hospitals north, south images 200" in text
    assert "parameters scale = 1" in text
    assert "ONNX opset 20 ONNX against torch 1.0e-06 at most" in text
    for digest in (evaluated["base"]["digest"], evaluated["inputsHash"], "1" * 64, "2" * 64, "a" * 64, "b" * 64):
        assert digest in text


def test_a_page_shows_each_classs_sensitivity_and_specificity_and_the_calibration_error(evaluated):
    text = text_of(report_page(evaluated))
    assert "nevus 18 of 20 90.0% 95.0%" in text
    assert "melanoma 19 of 20 95.0% 90.0%" in text
    assert "Expected calibration error: 7.5%" in text
    assert "50% to 60% 10 55.0% 60.0%" in text


def test_a_page_without_an_evaluation_says_so_first_and_says_why_parts_are_missing(described):
    text = text_of(report_page(described))
    assert text.index("Unvalidated The policy asks for no evaluation.") < text.index("Each hospital trained")
    assert "(unvalidated)" in text
    assert text.count("Left out: nobody evaluated this version.") == 3
    assert "Norms are left out: the merge did not report them." in text
    assert "Left out: the merge did not report how the vectors lie to each other." in text
    assert "<svg" not in report_page(described)


def test_too_few_evaluators_are_told_first(evaluated):
    text = text_of(report_page(evaluated | {"evaluation": UNVALIDATED}))
    assert "Unvalidated 1 of 2 hospitals evaluated the candidates, so it is mean. Evaluate it on your own" in text
    assert text.count("Left out: too few hospitals evaluated this version.") == 3


def test_a_model_that_is_worse_than_a_hospitals_own_is_not_called_validated(evaluated):
    worse = evaluated | {"evaluation": EVALUATION | {"worseThan": "north"}}
    assert "Worse than the own model of north" in text_of(report_page(worse))
    assert "Validated by" not in text_of(report_page(worse))
    assert "**Worse than the own model of north.**" in model_card(worse)


def test_a_page_without_hospitals_own_models_says_that_nobody_asked_for_them(evaluated):
    text = text_of(report_page(evaluated | {"evaluation": EVALUATION | {"singles": []}}))
    assert "Hospitals' own models are left out" in text
    assert "best single hospital" not in text


def test_every_page_says_what_the_model_is_not(described, evaluated):
    for release in (described, evaluated):
        text = text_of(report_page(release))
        assert "This is not a medical device." in text
        assert "nothing here claims that the model or its data are anonymous or de-identified" in text


def test_the_model_card_tells_the_same(evaluated):
    card = model_card(evaluated)
    assert "| sum.head (chosen) | 92.5% | 92.5% | 92.5% | 92.5% |" in card
    assert "The best single hospital: own model of north, 70.0%." in card
    assert "a little too good" in card


def test_the_model_file_says_whether_it_is_validated_and_how_good_it_is(described, evaluated):
    unvalidated = evaluated | {"evaluation": UNVALIDATED}
    found = [json.loads(model_metadata(each)["evaluation"]) for each in (described, unvalidated, evaluated)]
    assert found == [
        {"validated": False},
        {"validated": False, "chosen": "mean"},
        {"validated": True, "chosen": "sum.head", "balancedAccuracy": 0.925},
    ]


# --- What it withstands ---------------------------------------------------------------------------------------

EVIL = "<script>alert('1')</script>\"&<img src=x onerror=alert(2)>"


def test_no_name_writes_markup(evaluated):
    text = json.dumps(evaluated)
    for name in ("north", "nevus", "brain-0123456789", "sum.head", "tiny", "visit", "closed-form"):
        text = text.replace(name, json.dumps(EVIL)[1:-1])
    page = report_page(json.loads(text))
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") > 10
    assert version_on(page) == EVIL


@given(text=st.text(), value=st.text())
def test_an_element_is_one_element_whatever_its_texts(text: str, value: str):
    made = element("td", text, title=value)
    assert (made.count("<"), made.count(">"), made.count('"')) == (2, 2, 2)


def test_the_same_release_gives_the_same_page_in_another_process(evaluated, tmp_path):
    (tmp_path / "release.json").write_text(json.dumps(evaluated), encoding="utf-8")
    program = (
        "import json, sys; from datavector.release.report import report_page;"
        "sys.stdout.buffer.write(report_page(json.load(open(sys.argv[1], encoding='utf-8'))).encode())"
    )
    run = [sys.executable, "-c", program, str(tmp_path / "release.json")]
    assert subprocess.run(run, capture_output=True, check=True).stdout.decode() == report_page(evaluated)


def test_many_hospitals_and_classes_stay_readable(described):
    release = crowd(described, hospitals=200, classes=1000)
    page = report_page(release)
    text = text_of(page)
    assert "The most frequent confusions among 1000 classes" in text
    assert "class 0 class 1 9 1012" in text
    assert "1 class had no validation image." in text
    assert "mean cosine hospital-005 -0.20" in text
    assert "lowest hospital highest hospital" in text
    assert "Of the hospitals' own models the best 8 are listed; 192 more are in release.json." in text
    assert len(page) < 100_000
    assert max(len(line) for line in model_card(release).splitlines() if line.startswith("| mean")) < 100


def test_a_page_names_its_version():
    assert version_on('<meta name="other" content="x"><meta name="datavector-version" content="a&amp;b">') == "a&b"
    assert version_on("<p>no version</p>") is None


# --- As a browser shows it ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium") / "profile") as running:
        yield running


@pytest.fixture(scope="module")
def pages(
    described: dict[str, Any], evaluated: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Reports on the disk, by what is special about them."""
    evil = json.dumps(evaluated).replace("north", json.dumps(EVIL * 3)[1:-1]).replace("nevus", "n" * 300)
    releases = {
        "evaluated": evaluated,
        "unevaluated": described,
        "unvalidated": evaluated | {"evaluation": UNVALIDATED},
        "worse": evaluated | {"evaluation": EVALUATION | {"worseThan": "north"}},
        "evil": json.loads(evil),
        "many": crowd(described, hospitals=200, classes=1000),
        "widest": crowd(described, hospitals=25, classes=25),
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, release in releases.items():
        (folder / f"{name}.html").write_text(report_page(release), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in releases}


PAGES = ("evaluated", "unevaluated", "unvalidated", "worse", "evil", "many", "widest")
SHOWN = "[...document.querySelectorAll('h2')].filter(e => e.checkVisibility() && e.offsetHeight).map(e => e.innerText)"
# The smallest contrast of a text with what lies behind it (WCAG 2.2, success criterion 1.4.3), and that text.
CONTRAST = """
(() => {
  const rgba = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const over = (top, below) => [0, 1, 2].map(i => top[i] * (top[3] ?? 1) + below[i] * (1 - (top[3] ?? 1)));
  const behind = e => {
    if (!e) return [255, 255, 255];
    const colour = rgba(getComputedStyle(e).backgroundColor);
    return (colour[3] ?? 1) === 1 ? colour : over(colour, behind(e.parentElement));
  };
  const light = c => c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, style = getComputedStyle(e);
    if (!walk.currentNode.data.trim() || !e.checkVisibility() || ['title', 'desc'].includes(e.localName)) continue;
    const ground = behind(e), ink = over(rgba(e.closest('svg') ? style.fill : style.color), ground);
    const [low, high] = [light(ground), light(ink)].sort((a, b) => a - b);
    found.push([(high + .05) / (low + .05), walk.currentNode.data]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
})()
"""


@in_a_browser
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_every_section_without_a_complaint_or_a_request(chromium, pages, name, width):
    chromium.open(pages[name], width=width)
    assert chromium.evaluate(SHOWN) == SECTIONS
    assert chromium.complaints() == []
    assert chromium.requests() == [pages[name].as_uri()]
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    with Image.open(io.BytesIO(chromium.screenshot())) as picture:
        assert picture.width == width
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50, "a page, not a blank sheet"


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_text_stands_out_from_what_is_behind_it(chromium, pages, name, scheme):
    chromium.open(pages[name], width=1280, scheme=scheme)
    contrast, text = chromium.evaluate(CONTRAST)
    assert math.isfinite(contrast)
    assert contrast >= 4.5, text
    paper = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is (scheme == "light")


@in_a_browser
def test_what_the_keyboard_and_a_screen_reader_meet_has_a_name(chromium, pages):
    chromium.open(pages["evaluated"], width=1280)
    nodes = chromium.call("Accessibility.getFullAXTree")["nodes"]
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")
    ]
    assert ("image", "Reliability diagram: expected calibration error 7.5%") in found
    assert ("columnheader", "balanced accuracy") in found
    assert ("rowheader", "sum.head chosen") in found
    assert [role for role, name in found if role in ("image", "region", "table") and not name] == []
    narrow = "[...document.querySelectorAll('table')].every(e => e.closest('[role=region][tabindex=\"0\"]'))"
    assert chromium.evaluate(narrow)


@in_a_browser
@pytest.mark.parametrize("name", ["evaluated", "widest"])
def test_nothing_is_cut_off_on_paper(chromium, pages, name):
    chromium.open(pages[name], width=680)  # an A4 page within its margins
    chromium.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert chromium.evaluate("document.documentElement.scrollWidth") <= 680
        assert chromium.pdf().startswith(b"%PDF")
    finally:
        chromium.call("Emulation.setEmulatedMedia", media="")


@in_a_browser
def test_a_script_that_gets_into_a_page_does_not_run(chromium, pages, tmp_path):
    """What the policy in the page is for, if escaping ever failed."""
    page = tmp_path / "broken.html"
    injected = "<script>document.title = 'taken'</script><img src='http://127.0.0.1:9/x'></main>"
    page.write_text(pages["evaluated"].read_text(encoding="utf-8").replace("</main>", injected), encoding="utf-8")
    chromium.open(page, width=1280)
    assert chromium.evaluate("document.title") == "Merge report: brain-0123456789"
    assert len(chromium.complaints()) >= 2
