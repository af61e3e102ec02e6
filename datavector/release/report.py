"""`report.html`: how a release came about, on one page that needs nothing else.

Made from `release.json` alone, so the same release gives the same page. No script, no font, no address: it opens from a
disk. What is missing is left out, and a sentence says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np

from datavector.console import listed
from datavector.metrics import Confusion, calibration_error, per_class
from datavector.release.charts import length_bar, reliability_diagram, spread_strip
from datavector.release.markup import Html, element, html, join
from datavector.release.scores import best_single, cells, columns, listed_singles, model_name, notes, range_of
from datavector.release.style import POLICY, STYLE

Release = Mapping[str, Any]

MOST_CLASSES = 25  # that a confusion matrix shows; of more the most frequent confusions are listed
MOST_COSINES = 25  # hospitals that a heat map shows; of more those least like the others are listed
MOST_HOSPITALS = 40  # that the table of hospitals names
DENSE = 12  # more columns than this get small figures
LISTED = 20  # rows of a list that stands for something longer
VERSION = "datavector-version"  # the page's meta element with the version's name


def report_page(release: Release) -> str:
    """The page of a release, from the content of its `release.json`."""
    sections = [
        _hospitals(release),
        _similarity(release),
        _candidates(release),
        _head(release),
        _statistics(release),
        _confusion(release),
        _reliability(release),
        _lineage(release),
        _limits(),
    ]
    unvalidated = "" if release["evaluation"].get("validated") else " (unvalidated)"
    head = element(
        "head",
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{html(POLICY)}">'),
        Html(f'<meta name="{VERSION}" content="{html(release["version"])}">'),
        element("title", f"Merge report: {release['version']}{unvalidated}"),
        element("style", Html(STYLE)),
    )
    body = element("body", element("main", _opening(release), *sections))
    return f"<!doctype html>\n{element('html', head, Html(chr(10)), body, lang='en')}\n"


def version_on(page: str) -> str | None:
    """The version that a page says it is of; None where it says none."""
    reader = _VersionReader()
    reader.feed(page)
    return reader.version


class _VersionReader(HTMLParser):
    version: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "meta" and found.get("name") == VERSION and self.version is None:
            self.version = found.get("content")


# --- Sections, in their order on the page ---------------------------------------------------------------------


def _opening(release: Release) -> Html:
    base, images = release["base"], sum(entry["sampleCount"] for entry in release["inputs"])
    made = (
        f"Made on {release['created']} from the data vectors of {_count(len(release['inputs']), 'hospital')}, trained "
        f"on {_count(images, 'image')}, for {_count(len(release['classes']), 'class', 'classes')}. "
        f"Base model: {base['name']} ({base['architecture']})."
    )
    return element(
        "header",
        element("p", "Merge report", class_="kicker"),
        element("h1", release["version"]),
        element("p", made, class_="soft"),
        _verdict(release["evaluation"]),
        _figures(release["evaluation"]),
    )


def _verdict(evaluation: Mapping[str, Any]) -> Html:
    """Whether the version may be relied on, before anything else."""
    advice = "Evaluate it on your own images before any use."
    if not evaluation:
        return _box("warn", "Unvalidated", f"The policy asks for no evaluation. {advice}")
    reason = evaluation["reason"]
    if not evaluation["validated"]:
        return _box("warn", "Unvalidated", f"{_sentence(reason.removeprefix('unvalidated: '))} {advice}")
    if worse := evaluation["worseThan"]:
        told = f"{_sentence(reason)} But {worse}'s own model has a better accuracy or balanced accuracy there."
        return _box("bad", f"Worse than the own model of {worse}", told)
    return _box("good", f"Validated by {_count(len(evaluation['hospitals']), 'hospital')}", _sentence(reason))


def _figures(evaluation: Mapping[str, Any]) -> Html:
    """The few numbers that matter most; none where nobody evaluated."""
    if not evaluation.get("validated"):
        return Html()
    chosen = next(each for each in evaluation["candidates"] if each["name"] == evaluation["chosen"])
    low, high = range_of(chosen)
    figures = [
        ("balanced accuracy", _percent(chosen["balancedAccuracy"]), f"margin of error {evaluation['margin']:.1%}"),
        ("by hospital", f"{low:.0%} to {high:.0%}", "balanced accuracy, lowest to highest"),
        ("accuracy", _percent(chosen["accuracy"]), f"on {_count(chosen['images'], 'validation image')}"),
    ]
    if single := best_single(evaluation):
        figures.append(("best single hospital", _percent(single["balancedAccuracy"]), model_name(single)))
    tiles = (
        element("div", element("dt", name), element("dd", value, class_="figure"), element("dd", note, class_="soft"))
        for name, value, note in figures
    )
    return element("dl", *tiles, class_="tiles")


def _hospitals(release: Release) -> Html:
    inputs, cohort = release["inputs"], release["cohort"]
    norms = dict(zip(cohort.get("hospitals", ()), cohort.get("norms", ()), strict=True))
    shown = sorted(inputs, key=lambda entry: (-entry["sampleCount"], entry["hospital"]))[:MOST_HOSPITALS]
    largest = max(norms.values(), default=0) or 1
    rows = []
    for entry in sorted(shown, key=lambda entry: entry["hospital"]):
        norm = norms.get(entry["hospital"])
        length = () if norm is None else (_number(f"{norm:#.3g}"), element("td", length_bar(norm / largest)))
        rows.append(_row(_name(entry["hospital"]), _number(entry["sampleCount"]), *length))
    heads = [_head_cell("hospital"), _head_cell("training images", number=True)]
    text = [
        element("p", "Each hospital trained the base model on its own images, and sent what it learnt: its vector.")
    ]
    if norms:
        heads += [element("th", "norm of its vector", scope="col", colspan=2)]
        text.append(element("p", "The norm says how far a hospital's training moved the weights."))
    else:
        text.append(_absent("Norms are left out: the merge did not report them."))
    if len(shown) < len(inputs):
        text.append(
            element("p", f"The {len(shown)} with the most images are listed; release.json has all {len(inputs)}.")
        )
    return _section("Hospitals", *text, _table("Hospitals and their vectors", heads, rows))


def _similarity(release: Release) -> Html:
    title, cohort = "How alike the vectors are", release["cohort"]
    hospitals = list(cohort.get("hospitals", ()))
    if not hospitals:
        return _section(title, _absent("Left out: the merge did not report how the vectors lie to each other."))
    if len(hospitals) < 2:
        return _section(title, _absent("Left out: there is only one vector."))
    if len(hospitals) > MOST_COSINES:
        return _section(title, *_least_alike(hospitals, np.array(cohort["cosine"])))
    text = (
        "The cosine of each pair of vectors: 1 is the same direction, 0 nothing in common, below 0 (orange) against "
        "each other. A hospital that is unlike all others deserves a look at its data."
    )
    rows = [[(f"{cosine:.2f}", cosine) for cosine in row] for row in cohort["cosine"]]
    return _section(title, element("p", text), _heat_map("Cosines of pairs of vectors", hospitals, rows))


def _least_alike(hospitals: Sequence[str], cosines: np.ndarray[Any, np.dtype[np.float64]]) -> list[Html]:
    means = (cosines.sum(axis=1) - np.diag(cosines)) / (len(hospitals) - 1)
    rows = [
        _row(_name(hospitals[place]), _number(f"{means[place]:.2f}"), element("td", length_bar(means[place])))
        for place in np.argsort(means, kind="stable")[:LISTED]
    ]
    text = (
        f"The {LISTED} vectors that are least like the {len(hospitals)} of this version, by the mean cosine with the "
        f"others. The median over all hospitals is {np.median(means):.2f}."
    )
    heads = [_head_cell("hospital"), element("th", "mean cosine", scope="col", colspan=2)]
    return [element("p", text), _table("Vectors that are least like the others", heads, rows)]


def _candidates(release: Release) -> Html:
    title, evaluation = "What was tried, and what each scored", release["evaluation"]
    if not evaluation.get("validated"):
        return _section(title, _absent(_why_not_shown(evaluation)))
    single = best_single(evaluation)
    mark = None if single is None else single["balancedAccuracy"]
    groups = [("candidates", evaluation["candidates"])]
    if single is not None:
        groups.append(("hospitals' own models", listed_singles(evaluation)))
    headings = columns(evaluation)
    bodies = []
    for group, scores in groups:
        heading = element("th", group, scope="rowgroup", colspan=4 + len(headings), class_="group")
        bodies.append(
            element("tbody", element("tr", heading), *(_score_row(each, evaluation, mark) for each in scores))
        )
    heads = [
        _head_cell("model"),
        _head_cell("balanced accuracy", number=True),
        element("th", element("span", "0% to 100%", class_="soft"), scope="col"),
        _head_cell("accuracy", number=True),
        *(_head_cell(name, number=True) for name in headings),
    ]
    text = [
        element("p", element("strong", "Why: "), _sentence(evaluation["reason"])),
        element(
            "p",
            "Each hospital evaluated every model on its own validation images, and sent counts. A name is the merge "
            "method; .head stands for the closed-form head. Columns of hospitals are balanced accuracies. Dot: on all "
            "images; line: from the lowest to the highest hospital"
            + ("." if single is None else f"; dashed: the best single hospital ({model_name(single)})."),
        ),
        element("ul", *(element("li", note) for note in notes(evaluation))),
    ]
    if single is None:
        text.append(_absent("Hospitals' own models are left out: the policy does not ask for their evaluation."))
    return _section(title, *text, _table("Scores of each model", heads, bodies, grouped=True))


def _score_row(score: Mapping[str, Any], evaluation: Mapping[str, Any], mark: float | None) -> Html:
    chosen = score["name"] == evaluation["chosen"]
    label = (model_name(score), " ", element("span", "chosen", class_="pill")) if chosen else (model_name(score),)
    strip = spread_strip(score["balancedAccuracy"], *range_of(score), beside=mark)
    return element(
        "tr",
        element("th", *label, scope="row"),
        _number(_percent(score["balancedAccuracy"])),
        element("td", strip),
        _number(_percent(score["accuracy"])),
        *(_number(_percent(share)) for share in cells(score, evaluation)),
        class_="chosen" if chosen else None,
    )


def _head(release: Release) -> Html:
    title, head = "How the head was made", release["head"]
    if not head:
        return _section(title, _absent("Left out: the merge did not report it."))
    if head["kind"] == "closed-form":
        text = (
            "Closed-form: the last layer is the merged one, corrected by sums of the merged network's features over "
            f"{_count(head['images'], 'image')} of {listed(head['hospitals'], LISTED)}."
        )
    else:
        text = "Merged: the last layer is a merge of the hospitals' own, as all others are."
    return _section(title, element("p", text + _note(head)))


def _statistics(release: Release) -> Html:
    title, calibration = "BatchNorm calibration", release["calibration"]
    how = {
        "none": "The statistics of BatchNorm layers were not measured anew.",
        "uploaded": "Statistics are pooled from those of each hospital's own fine-tuned model: the least exact way.",
        "visit": "Hospitals came back one by one, and measured the merged model's statistics on their images.",
        "meeting": "Hospitals were connected at once, and measured the merged model's statistics together.",
    }
    text = element("p", how.get(calibration["mode"], "") + _note(calibration))
    facts = {"mode": calibration["mode"]}
    if calibration["hospitals"]:
        facts |= {"hospitals": listed(calibration["hospitals"], LISTED), "images": str(calibration["images"])}
    return _section(title, text, _facts(facts))


def _confusion(release: Release) -> Html:
    title, counts = "Right and wrong answers", release["evaluation"].get("confusion")
    if not counts:
        return _section(title, _absent(_why_not_shown(release["evaluation"])))
    classes, confusion = release["classes"], np.array(counts, dtype=np.int64)
    picture = _most_confused(classes, confusion) if len(classes) > MOST_CLASSES else _matrix(classes, confusion)
    return _section(title, *picture, *_by_class(classes, confusion))


def _matrix(classes: Sequence[str], confusion: Confusion) -> list[Html]:
    rows = []
    for place, counts in enumerate(confusion):
        strengths = np.sqrt(counts / max(counts.sum(), 1))  # so that single errors show
        strengths[np.arange(len(classes)) != place] *= -1  # the colour of wrong answers
        rows.append([(str(count), float(strength)) for count, strength in zip(counts, strengths, strict=True)])
    text = (
        "The chosen model on all validation images together. A row is a class, a column what its images were taken "
        "for: right answers blue, wrong ones orange, stronger for a larger share of the row."
    )
    caption = "Images by class (rows) and answer (columns)"
    return [element("p", text), _heat_map(caption, classes, rows, corner="class, taken for")]


def _most_confused(classes: Sequence[str], confusion: Confusion) -> list[Html]:
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    rows = []
    for place in np.argsort(-wrong, axis=None, kind="stable")[:LISTED]:
        label, taken = divmod(int(place), len(classes))
        if wrong[label, taken]:
            images = (_number(wrong[label, taken]), _number(confusion[label].sum()))
            rows.append(_row(_name(classes[label]), element("td", classes[taken]), *images))
    if not rows:
        return [element("p", f"No image of {len(classes)} classes was taken for another class.")]
    text = f"The most frequent confusions among {len(classes)} classes, by the chosen model on all validation images."
    heads = [
        *(_head_cell(name) for name in ("class", "taken for")),
        *(_head_cell(name, number=True) for name in ("images", "of the class's")),
    ]
    return [element("p", text), _table("Most frequent confusions", heads, rows)]


def _by_class(classes: Sequence[str], confusion: Confusion) -> list[Html]:
    found = list(zip(classes, per_class(confusion), np.diag(confusion), strict=True))
    text = (
        "Sensitivity: the share of a class's images that was recognised. Specificity: the share of all other images "
        "that was not taken for it. Few images make either uncertain."
    )
    if len(found) > MOST_CLASSES:
        present = [each for each in found if each[1].support]
        absent = len(found) - len(present)
        found = sorted(present, key=lambda each: each[1].sensitivity)[:LISTED]
        text += f" Of {len(classes)} classes the {len(found)} with the lowest sensitivity are listed."
        text += f" {_count(absent, 'class', 'classes')} had no validation image." if absent else ""
    rows = [
        _row(
            _name(label),
            _number(f"{hits} of {metric.support}"),
            _number(_percent(metric.sensitivity)),
            _number(_percent(metric.specificity)),
        )
        for label, metric, hits in found
    ]
    names = ("recognised", "sensitivity", "specificity")
    heads = [_head_cell("class"), *(_head_cell(name, number=True) for name in names)]
    return [element("h3", "By class"), element("p", text), _table("Sensitivity and specificity by class", heads, rows)]


def _reliability(release: Release) -> Html:
    title = "How sure, and how right"
    bins = np.array(release["evaluation"].get("bins") or np.zeros((0, 3)), dtype=np.float64)
    if not bins[:, 0].sum():
        return _section(title, _absent(_why_not_shown(release["evaluation"])))
    error = calibration_error(bins)
    rows = []
    for place, (images, recognised, confidence) in enumerate(bins):
        if images:
            steps = f"{place / len(bins):.0%} to {(place + 1) / len(bins):.0%}"
            shares = (_number(_percent(confidence / images)), _number(_percent(recognised / images)))
            rows.append(_row(_name(steps), _number(int(images)), *shares))
    names = ("images", "mean confidence", "recognised")
    heads = [_head_cell("confidence"), *(_head_cell(name, number=True) for name in names)]
    text = (
        "Bars: how often the chosen model was right when it was so sure. On the dashed line it would be as sure as it "
        "is right; bars below it: too sure, above: not sure enough. Expected calibration error: "
    )
    diagram = reliability_diagram(
        bins,
        title=f"Reliability diagram: expected calibration error {error:.1%}",
        description="Share of recognised images by confidence; the table beside has the same figures.",
    )
    paragraph = element("p", text, element("strong", f"{error:.1%}"), ".")
    table = _table("Figures of the diagram", heads, rows)
    return _section(title, paragraph, element("div", diagram, table, class_="pair"))


def _lineage(release: Release) -> Html:
    method, parity = release["method"], release["parity"]
    parameters = ", ".join(f"{key} = {value:g}" for key, value in method["parameters"].items())
    facts = {
        "version": release["version"],
        "made on": release["created"],
        "merge method": method["name"],
        "parameters": parameters or "the method's defaults",
        "base model": f"{release['base']['name']} ({release['base']['architecture']})",
        "base digest": _code(release["base"]["digest"]),
        "hash of the inputs": _code(release["inputsHash"]),
        "merged weights": _code(f"sha256:{release['weights_sha256']}"),
        "released weights": _code(f"sha256:{release['calibrated_sha256']}"),
        "ONNX opset": str(release["opset"]),
        "ONNX against torch": f"{parity['max_abs_difference']:.1e} at most in a logit, whose standard deviation over "
        f"the probes is {parity['logit_spread']:.2g} or more",
    }
    inputs = sorted(release["inputs"], key=lambda entry: entry["hospital"])
    rows = [_row(_name(entry["vector"]), element("td", _code(entry["digest"]))) for entry in inputs[:MOST_HOSPITALS]]
    text = []
    if len(inputs) > MOST_HOSPITALS:
        text.append(element("p", f"The first {MOST_HOSPITALS} of {len(inputs)} vectors; release.json has all."))
    vectors = _table("Vectors that were merged", [_head_cell("vector"), _head_cell("digest")], rows)
    return _section("Where it comes from", _facts(facts), element("h3", "Vectors"), *text, vectors)


def _limits() -> Html:
    limits = (
        "This is not a medical device. No authority has approved it, and it must not decide about a patient.",
        "It is for images like those that the hospitals above trained on; on others its answers may be wrong and sure "
        "of themselves.",
        "Weights carry traces of the images that they were trained on: nothing here claims that the model or its data "
        "are anonymous or de-identified.",
        "A hospital may withdraw. Ask whoever gave you this release whether the version is revoked.",
    )
    return _section("What it is not", element("ul", *(element("li", limit) for limit in limits)))


# --- Parts of a page ------------------------------------------------------------------------------------------


def _section(title: str, *content: Html) -> Html:
    return join((Html("\n"), element("section", element("h2", title), *content)))


def _box(kind: str, title: str, text: str) -> Html:
    return element("div", element("strong", title), element("p", text), class_=f"box {kind}")


def _absent(text: str) -> Html:
    return element("p", text, class_="absent")


def _table(
    caption: str, heads: Iterable[Html], rows: Iterable[Html], *, grouped: bool = False, kind: str | None = None
) -> Html:
    """A table in a frame of its own that scrolls, by keyboard too, where the page is narrower.

    Args:
        rows: or, where `grouped`, whole bodies.
        kind: "dense" for small figures.
    """
    bodies = rows if grouped else [element("tbody", *rows)]
    table = element("table", element("caption", caption), element("thead", element("tr", *heads)), *bodies, class_=kind)
    return element("div", table, class_="wide", role="region", aria_label=caption, tabindex=0)


def _heat_map(
    caption: str, names: Sequence[str], rows: Iterable[Sequence[tuple[str, float]]], *, corner: str = "hospital"
) -> Html:
    """A square table; a cell is its text and its strength from -1 to 1."""
    heads = [_head_cell(corner), *(element("th", element("span", name), scope="col", class_="tall") for name in names)]
    lines = []
    for name, row in zip(names, rows, strict=True):
        shades = (
            element(
                "td", text, class_="heat against" if strength < 0 else "heat", style=f"--strength: {abs(strength):.2f}"
            )
            for text, strength in row
        )
        lines.append(_row(_name(name), *shades))
    return _table(caption, heads, lines, kind="dense" if len(names) > DENSE else None)


def _facts(facts: Mapping[str, object]) -> Html:
    pairs = (element("div", element("dt", name), element("dd", value)) for name, value in facts.items())
    return element("dl", *pairs, class_="facts")


def _row(*entries: Html) -> Html:
    return element("tr", *entries)


def _name(text: str) -> Html:
    return element("th", text, scope="row")


def _number(value: object) -> Html:
    return element("td", value, class_="n")


def _head_cell(text: str, *, number: bool = False) -> Html:
    return element("th", text, scope="col", class_="n" if number else None)


def _code(text: str) -> Html:
    return element("code", text)


# --- Words ----------------------------------------------------------------------------------------------------


def _why_not_shown(evaluation: Mapping[str, Any]) -> str:
    if not evaluation:
        return "Left out: nobody evaluated this version."
    if not evaluation["validated"]:
        return "Left out: too few hospitals evaluated this version."
    return "Left out: the evaluation has no such counts."


def _percent(share: float) -> str:
    return "no images" if share != share else f"{share:.1%}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _sentence(text: str) -> str:
    return f"{text.rstrip('.')}."


def _note(part: Mapping[str, Any]) -> str:
    return f" Note: {_sentence(part['note'])}" if part["note"] else ""
