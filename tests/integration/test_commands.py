"""The command line as a tree of commands: each explains itself, and none takes what it does not know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from cryptography import x509
from typer.testing import CliRunner

from datavector.cli import app
from datavector.wire.certs import check_certificate


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


def test_a_server_name_that_is_none_leaves_no_authority_behind(tmp_path: Path):
    command = ["certs", "init", "--output", str(tmp_path / "certs"), "--server-name"]
    assert CliRunner().invoke(app, [*command, "bücher.example"]).exit_code == 1
    assert CliRunner().invoke(app, [*command, "xn--bcher-kva.example"]).exit_code == 0


def test_the_aggregators_certificate_is_renewed_by_the_same_authority(tmp_path: Path):
    folder = tmp_path / "certs"
    assert CliRunner().invoke(app, ["certs", "init", "--output", str(folder)]).exit_code == 0
    authority, before = (folder / "ca.crt").read_bytes(), (folder / "aggregator.crt").read_bytes()
    command = ["certs", "issue", "--aggregator", "--authority", str(folder), "--days", "30"]
    shown = CliRunner().invoke(app, [*command, "--server-name", "merge.example"])
    assert shown.exit_code == 0
    assert "speaks for the aggregator (localhost, 127.0.0.1, merge.example), valid for 30 days" in shown.output
    assert (folder / "ca.crt").read_bytes() == authority
    renewed = folder / "aggregator.crt"
    assert renewed.read_bytes() != before
    report = check_certificate(renewed, folder / "aggregator.key", folder / "ca.crt")
    assert (report.hospital, report.days_left()) == (None, 29)
    names = x509.load_pem_x509_certificate(renewed.read_bytes()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["localhost", "merge.example"]
