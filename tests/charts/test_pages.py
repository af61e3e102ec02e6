"""What the pages for hospitals and platform teams show of helm and kubectl exists: charts, values, flags, sections."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from tests.charts.rendering import CHARTS, FLOOR, run_helm
from tests.e2e.pages import ROOT, page, section, steps

PAGES = (
    "docs/kubernetes.md",
    "docs/hospital.md",
    "README.md",
    *(f"charts/{chart}/README.md" for chart in ("agent", "aggregator", "crds")),
)
RENDERING = {"install", "upgrade", "template"}


@pytest.mark.parametrize("name", PAGES)
def test_every_helm_command_that_a_page_shows_renders_a_chart(helm: Path, name: str, tmp_path: Path):
    text = page(name)
    for file, content in steps(text):
        if file:
            (tmp_path / file).write_text(content)
    for line in commands(text, "helm"):
        command, *words = shlex.split(line, comments=True)
        known = set(re.findall(r"--[a-z-]+", run_helm(helm, command, "--help")))
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= known, f"`helm {line}` has no {', '.join(sorted(flags - known))}"
        charts = [word for word in words if word.startswith("charts/")]
        assert len(charts) == (command in RENDERING), line
        if charts and "--reset-then-reuse-values" not in flags:  # else what was set before is not in the line
            run_helm(
                helm, "template", "north", str(ROOT / charts[0]), f"--kube-version={FLOOR}", *values(words, tmp_path)
            )


def test_an_upgrade_on_the_hospitals_page_takes_values_that_the_chart_has(helm: Path):
    shown = page("docs/hospital.md")
    (install,) = (line for line in commands(shown, "helm") if line.startswith("install"))
    before = values(shlex.split(install), Path())
    upgrades = [line for line in commands(shown, "helm") if line.startswith("upgrade")]
    assert upgrades
    for line in upgrades:
        set_now = values(shlex.split(line), Path())
        run_helm(helm, "template", "north", str(CHARTS / "agent"), f"--kube-version={FLOOR}", *before, *set_now)


@pytest.mark.parametrize(("name", "chart"), [("docs/kubernetes.md", "aggregator"), ("docs/hospital.md", "agent")])
def test_every_value_that_a_page_names_is_one_of_the_chart(name: str, chart: str):
    """A value is named as `group.name`, or set as `group.name=...`, in a code span."""
    listed = (CHARTS / chart / "README.md").read_text()
    known = set(re.findall(r"^\| `([\w.]+)` \|", listed, re.MULTILINE))
    groups = {value.partition(".")[0] for value in known if "." in value}
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page(name), flags=re.DOTALL | re.MULTILINE))
    named = {found[1] for span in spans if (found := re.match(r"(?:--set )?([a-z]\w*(?:\.[a-zA-Z]+)+)(?:=|$|:)", span))}
    of_the_chart = {each for each in named if each.partition(".")[0] in groups and "_" not in each}
    assert len(of_the_chart) > 5
    assert of_the_chart - known - OTHERS == set()


def test_a_page_is_followed_in_its_order_with_the_files_that_it_names():
    text = section(page("docs/kubernetes.md", {"--size 128": "--size 32"}), "Set up")
    done = list(steps(text))
    files = [name for name, _ in done if name]
    assert files == ["site.yaml", "policy.yaml"]
    lines = [line for name, line in done if not name]
    assert lines[0] == "datavector certs init --server-name merge.example.org"
    assert any("--size 32" in line for line in lines)
    assert not any(line.startswith("docker") for line in lines), "images are built beforehand"


def test_a_section_ends_where_the_next_of_its_rank_begins_and_a_comment_in_a_block_is_none():
    text = "# One\na\n```sh\n# Two\n```\n## Below\nb\n# Two\nc\n"
    assert section(text, "One") == "\na\n```sh\n# Two\n```\n## Below\nb\n"
    assert section(text, "Two") == "\nc\n"
    assert section(text, "Below") == "\nb\n"


# --- Parts

OTHERS = {"job.image", "job.nodeSelector", "tls.crt", "tls.key"}  # fields of a policy, and of a Secret


def commands(text: str, program: str) -> list[str]:
    """The lines of a page's blocks and code spans that run a program, without its name."""
    in_blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    lines = [line.removeprefix("$ ") for line in in_blocks.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    found = {line for line in lines if re.match(rf"{program} [a-z]+ .*[\w/]", line) and not re.search(r"<\w+>", line)}
    return [line.removeprefix(f"{program} ") for line in sorted(found)]


def values(words: list[str], folder: Path) -> list[str]:
    """The flags of a command that set values."""
    taken: list[str] = []
    for flag, value in pairwise(words):
        if flag == "--set":
            taken += [flag, value]
        elif flag == "--values":
            taken += [flag, str(folder / value)]
    return taken
