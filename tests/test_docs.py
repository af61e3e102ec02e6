"""The documentation keeps up with the program: its commands and flags exist, and every error is explained."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from datavector import errors
from datavector.cli import app
from datavector.errors import DataVectorError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FAMILIES = {"DataVectorError"}  # never raised itself


def test_every_error_that_a_user_can_see_is_explained():
    text = (ROOT / "docs" / "errors.md").read_text()
    classes = {
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, DataVectorError) and name not in FAMILIES
    }
    assert {name for name in classes if f"`{name}`" not in text} == set()


def test_every_error_that_is_explained_exists():
    text = (ROOT / "docs" / "errors.md").read_text()
    named = set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)+)`", text)) | {"Refused", "Denied"}
    known = {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
    assert named - known == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_shows_exists_with_its_flags(page: Path):
    for line in commands(page.read_text()):
        demand(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_that_a_page_links_to_exists(page: Path):
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    targets = [link for link in links if "://" not in link]
    assert [link for link in targets if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_heading_that_a_page_links_to_exists(page: Path):
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text())
    assert [link for link in links if link[1] not in anchors((page.parent / link[0]) if link[0] else page)] == []


def anchors(page: Path) -> set[str]:
    """What a link may name of a page: its headings, in lower case, with hyphens and without punctuation."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[str]:
    """What follows `datavector ` in code spans, and in lines of code blocks (after a prompt, or a path to it)."""
    blocks = [block for _, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    in_blocks = [line for line in lines if re.match(r"(?:\$ )?(?:\S*/)?datavector (?!\w+\()", line)]
    spans = re.findall(r"`((?:\S*/)?datavector [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M))
    return [re.split(r"(?:^|/|\s)datavector ", line, maxsplit=1)[1] for line in [*in_blocks, *spans]]


def demand(line: str) -> None:
    """Follows a command line down the tree of commands, then looks for its flags."""
    command: click.Command = typer.main.get_command(app)
    words = shlex.split(line, comments=True)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    assert command.name not in (None, "datavector"), f"there is no command `datavector {line}`"
    below = getattr(command, "commands", {})
    assert not below or not words or words[0].startswith("-"), f"there is no command `datavector {line}`"
    flags = {flag for parameter in command.params for flag in parameter.opts} | {"--help"}
    shown = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert shown <= flags, f"`datavector {line}` has no {', '.join(sorted(shown - flags))}"
