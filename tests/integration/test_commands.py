"""The command line as a tree of commands: each explains itself, and none takes what it does not know."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
import typer
from typer.testing import CliRunner

from datavector.cli import app


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of a command and everything below it."""
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


PATHS = sorted(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_it_explains_itself(path: tuple[str, ...]):
    shown = CliRunner().invoke(app, [*path, "--help"])
    assert shown.exit_code == 0
    assert " ".join(("Usage:", "datavector", *path)) in shown.output
    assert "--help" in shown.output


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_it_takes_no_flag_that_it_does_not_know(path: tuple[str, ...]):
    shown = CliRunner().invoke(app, [*path, "--no-such-flag"])
    assert shown.exit_code == 2
    assert "No such option: --no-such-flag" in shown.output
