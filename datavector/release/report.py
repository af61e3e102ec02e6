"""`report.html`: how a release came about, on one page that needs nothing else.

Made from `release.json` alone, so the same release gives the same page. No script, no font, no address: it opens from a
disk. Every text that came from somewhere is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from datavector.choice import SINGLE
from datavector.metrics import ClassMetrics, calibration_error, per_class

MOST_CLASSES = 25  # that a confusion matrix shows; of more the most frequent confusions are listed
MOST_HOSPITALS = 40  # that a heat map shows
LISTED = 20
WIDTH, HEIGHT = 320, 240  # of the reliability diagram

STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5b6b7a; --line: #d5dde5; --paper: #ffffff; --wash: #f4f7f9;
  --mark: #14684c; --bar: #6d9bc3; --warn: #8a4b00; --warnwash: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaf0; --soft: #9fb0c0; --line: #35424e; --paper: #14191e;
  --wash: #1d242b; --mark: #6fd0a8; --bar: #4f7ea6; --warn: #ffc773; --warnwash: #33270f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); } code { font-size: .85em; }
.box { border-left: .3rem solid var(--mark); background: var(--wash); padding: .6rem 1rem; }
.warn { border-color: var(--warn); background: var(--warnwash); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tr.chosen td { font-weight: 600; color: var(--mark); }
td.cell { text-align: center; min-width: 3rem; font-variant-numeric: tabular-nums; border: 1px solid var(--paper); }
.meter { display: inline-block; height: .7rem; background: var(--bar); border-radius: .2rem; vertical-align: middle; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .axis { stroke: var(--soft); }
svg .bar { fill: var(--bar); } svg .ideal { stroke: var(--soft); stroke-dasharray: 4 4; }
@media print { body { max-width: none; } h2 { break-after: avoid; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def report_page(release: Mapping[str, Any]) -> str:
    """The page of a release, from the content of its `release.json`."""
    title = f"Merge report: {release['version']}"
    sections = [
        _verdict(release),
        _hospitals(release),
        _similarity(release["cohort"]),
        _candidates(release["evaluation"]),
        _confusion(release),
        _reliability(release["evaluation"]),
        _restoration(release),
        _lineage(release),
        _limits(),
    ]
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="soft">Made on {escape(release["created"])} from {len(release["inputs"])} hospitals' data vectors.</p>
{"".join(sections)}</main>
</body>
</html>
"""


def _verdict(release: Mapping[str, Any]) -> str:
    evaluation = release["evaluation"]
    if not evaluation:
        text = "Unvalidated: the policy asks for no evaluation. Evaluate it on your own images before any use."
        return _box(text, warn=True)
    if not evaluation["validated"]:
        reason = evaluation["reason"]
        return _box(f"{reason[:1].upper()}{reason[1:]}. Evaluate it on your own images before any use.", warn=True)
    worse = evaluation.get("worseThan", "")
    if worse:
        return _box(f"Worse than the own model of {worse}: {evaluation['reason']}.", warn=True)
    return _box(f"Validated by {', '.join(evaluation['hospitals'])}: {evaluation['reason']}.")


def _hospitals(release: Mapping[str, Any]) -> str:
    cohort = release["cohort"]
    norms = dict(zip(cohort.get("hospitals", ()), cohort.get("norms", ()), strict=True))
    largest = max(norms.values(), default=0) or 1
    rows = []
    for entry in sorted(release["inputs"], key=lambda entry: entry["hospital"]):
        norm = norms.get(entry["hospital"])
        bar = "" if norm is None else f"{_meter(norm / largest)} {norm:.3g}"
        rows.append(
            f'<tr><td>{escape(entry["hospital"])}</td><td class="n">{entry["sampleCount"]}</td>'
            f"<td>{bar}</td><td><code>{escape(entry['digest'][:19])}…</code></td></tr>"
        )
    head = '<th>hospital</th><th class="n">training images</th><th>norm of its vector</th><th>vector</th>'
    return _section("Hospitals", _table(head, rows))


def _similarity(cohort: Mapping[str, Any]) -> str:
    hospitals = list(cohort.get("hospitals", ()))
    if len(hospitals) < 2:
        return ""
    if len(hospitals) > MOST_HOSPITALS:
        cosines = np.array(cohort["cosine"])
        means = (cosines.sum(axis=1) - 1) / (len(hospitals) - 1)
        order = np.argsort(means)[:LISTED]
        rows = [f'<tr><td>{escape(hospitals[at])}</td><td class="n">{means[at]:.3f}</td></tr>' for at in order]
        text = f"<p>The {LISTED} vectors that are least like the {len(hospitals)} others, by mean cosine.</p>"
        head = '<th>hospital</th><th class="n">mean cosine</th>'
        return _section("How alike the vectors are", text + _table(head, rows))
    numbers = "".join(f'<th class="n">{number}</th>' for number in range(1, len(hospitals) + 1))
    rows = [
        f"<tr><td>{number} {escape(name)}</td>{''.join(_shade(cosine) for cosine in row)}</tr>"
        for number, (name, row) in enumerate(zip(hospitals, cohort["cosine"], strict=True), start=1)
    ]
    text = (
        "<p>Cosine of each pair of data vectors: 1 is the same direction, 0 nothing in common, below 0 against it.</p>"
    )
    return _section("How alike the vectors are", text + _table(f"<th>hospital</th>{numbers}", rows))


def _candidates(evaluation: Mapping[str, Any]) -> str:
    if not evaluation.get("candidates"):
        return ""
    hospitals = list(evaluation["hospitals"])
    rows = [
        _score_row(score, hospitals, chosen=score["name"] == evaluation["chosen"]) for score in evaluation["candidates"]
    ]
    rows += [_score_row(score, hospitals, chosen=False) for score in evaluation.get("singles", ())]
    columns = "".join(f'<th class="n">{escape(name)}</th>' for name in hospitals)
    head = f'<th>model</th><th class="n">balanced accuracy</th><th class="n">accuracy</th>{columns}'
    text = (
        "<p>Each hospital evaluated every model on its own validation images, and sent counts. Columns of hospitals "
        f"show balanced accuracy there. Margin of error of the highest: {evaluation['margin']:.1%}.</p>"
    )
    return _section("What was tried", text + _table(head, rows))


def _score_row(score: Mapping[str, Any], hospitals: Sequence[str], *, chosen: bool) -> str:
    name = score["name"]
    label = f"own model of {name.removeprefix(SINGLE)}" if name.startswith(SINGLE) else name
    each = "".join(
        f'<td class="n">{score["hospitals"][hospital]["balancedAccuracy"]:.1%}</td>' for hospital in hospitals
    )
    mark = " (chosen)" if chosen else ""
    return (
        f"<tr{' class=chosen' if chosen else ''}><td>{escape(label)}{mark}</td>"
        f'<td class="n">{score["balancedAccuracy"]:.1%}</td><td class="n">{score["accuracy"]:.1%}</td>{each}</tr>'
    )


def _confusion(release: Mapping[str, Any]) -> str:
    counts = release["evaluation"].get("confusion")
    if not counts:
        return ""
    classes, confusion = release["classes"], np.array(counts, dtype=np.int64)
    metrics = per_class(confusion)
    if len(classes) > MOST_CLASSES:
        return _section("Right and wrong answers", _most_confused(classes, confusion))
    rows = []
    for label, row, metric in zip(classes, confusion, metrics, strict=True):
        cells = "".join(_shade(count / max(row.sum(), 1), str(count)) for count in row)
        rows.append(f"<tr><td>{escape(label)}</td>{cells}{_class_cells(metric)}</tr>")
    columns = "".join(f'<th class="n">{escape(label)}</th>' for label in classes)
    head = f'<th>class, taken for:</th>{columns}<th class="n">sensitivity</th><th class="n">specificity</th>'
    text = (
        "<p>The chosen model on all validation images together: images of each class by what they were taken for.</p>"
    )
    return _section("Right and wrong answers", text + _table(head, rows))


def _class_cells(metric: ClassMetrics) -> str:
    values = (metric.sensitivity, metric.specificity)
    return "".join(f'<td class="n">{"–" if value != value else f"{value:.1%}"}</td>' for value in values)  # noqa: RUF001


def _most_confused(classes: Sequence[str], confusion: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None, kind="stable")[::-1][:LISTED]
    rows = []
    for place in order:
        label, taken = divmod(int(place), len(classes))
        if wrong[label, taken]:
            names = f"<td>{escape(classes[label])}</td><td>{escape(classes[taken])}</td>"
            rows.append(f'<tr>{names}<td class="n">{wrong[label, taken]}</td></tr>')
    text = f"<p>The most frequent confusions among {len(classes)} classes, on all validation images together.</p>"
    return text + _table('<th>class</th><th>taken for</th><th class="n">images</th>', rows)


def _reliability(evaluation: Mapping[str, Any]) -> str:
    bins = np.array(evaluation.get("bins") or np.zeros((0, 3)))
    if not len(bins) or not bins[:, 0].sum():
        return ""
    step = WIDTH / len(bins)
    bars = []
    for number, (images, recognised, _) in enumerate(bins):
        if images:
            height = HEIGHT * recognised / images
            bars.append(
                f'<rect class="bar" x="{40 + number * step + 2:.1f}" y="{10 + HEIGHT - height:.1f}" '
                f'width="{step - 4:.1f}" height="{height:.1f}"><title>{int(images)} images, {recognised / images:.0%} '
                "recognised</title></rect>"
            )
    error = calibration_error(bins)
    picture = (
        f'<svg role="img" viewBox="0 0 {WIDTH + 60} {HEIGHT + 50}" width="{WIDTH + 60}" style="max-width:100%">'
        f"<title>Reliability diagram: expected calibration error {error:.1%}</title>"
        f'<line class="axis" x1="40" y1="{HEIGHT + 10}" x2="{WIDTH + 40}" y2="{HEIGHT + 10}"/>'
        f'<line class="axis" x1="40" y1="10" x2="40" y2="{HEIGHT + 10}"/>{"".join(bars)}'
        f'<line class="ideal" x1="40" y1="{HEIGHT + 10}" x2="{WIDTH + 40}" y2="10"/>'
        f'<text x="4" y="18">100%</text><text x="16" y="{HEIGHT + 14}">0%</text>'
        f'<text x="40" y="{HEIGHT + 28}">0%</text><text x="{WIDTH + 12}" y="{HEIGHT + 28}">100%</text>'
        f'<text x="{WIDTH / 2 - 30}" y="{HEIGHT + 44}">confidence</text></svg>'
    )
    text = (
        "<p>How often the chosen model was right (bars) when it was so sure. On the dashed line it would be as sure as "
        f"it is right; expected calibration error: {error:.1%}.</p>"
    )
    return _section("How sure, and how right", text + picture)


def _restoration(release: Mapping[str, Any]) -> str:
    calibration, head = release["calibration"], release["head"]
    who = ", ".join(calibration["hospitals"]) or "nobody"
    statistics = f"{calibration['mode']}, by {who}, over {calibration['images']} images{_note(calibration)}"
    text = f"<p>BatchNorm statistics: {escape(statistics)}.</p>"
    if head:
        kind = head["kind"]
        if head["hospitals"]:
            kind += f", solved from the features of {head['images']} images of {', '.join(head['hospitals'])}"
        text += f"<p>Classification head: {escape(kind + _note(head))}.</p>"
    return _section("What was restored", text)


def _note(part: Mapping[str, Any]) -> str:
    return f" ({part['note']})" if part["note"] else ""


def _lineage(release: Mapping[str, Any]) -> str:
    method = release["method"]
    parameters = ", ".join(f"{key} = {value:g}" for key, value in method["parameters"].items())
    facts = {
        "merge method": method["name"] + (f" ({parameters})" if parameters else ""),
        "base model": f"{release['base']['name']} ({release['base']['architecture']})",
        "base digest": release["base"]["digest"],
        "hash of the inputs": release["inputsHash"],
        "merged weights": release["weights_sha256"],
        "released weights": release["calibrated_sha256"],
        "ONNX opset": str(release["opset"]),
        "largest difference to torch": f"{release['parity'].get('max_abs_difference', 0):.1e} in a logit",
    }
    rows = [f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>" for name, value in facts.items()]
    return _section("Where it comes from", _table("<th>what</th><th>value</th>", rows))


def _limits() -> str:
    return _section(
        "What it is not",
        "<p>This is not a medical device. No authority has approved it, and it must not decide about a patient. "
        "Weights carry traces of the images that they were trained on: nothing here claims that the model is anonymous."
        " A hospital may withdraw; ask whoever gave you this release whether the version is revoked.</p>",
    )


# --- Parts of a page ------------------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>\n"


def _table(head: str, rows: Iterable[str]) -> str:
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide" tabindex="0"><table>{body}</table></div>'


def _box(text: str, *, warn: bool = False) -> str:
    return f'<p class="box{" warn" if warn else ""}">{escape(text)}</p>\n'


def _meter(share: float) -> str:
    return f'<span class="meter" style="width:{8 * max(share, 0):.2f}rem"></span>'


def _shade(value: float, text: str | None = None) -> str:
    """A cell of a heat map: green above 0, red below."""
    strength = min(abs(value), 1.0)
    colour = "20, 104, 76" if value >= 0 else "166, 58, 36"
    shown = f"{value:.2f}" if text is None else text
    light = "; color: #ffffff" if strength > 0.6 else ""
    return f'<td class="cell" style="background: rgba({colour}, {strength:.2f}){light}">{shown}</td>'
