"""Certificates as Kubernetes Secrets."""

from __future__ import annotations

from base64 import b64decode
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from datavector.cli import app
from datavector.errors import CertificateError, UsageError
from datavector.wire.certs import check_certificate, issue_hospital
from datavector.wire.secret import tls_secret


def printed(*arguments: str | Path) -> dict:
    shown = CliRunner().invoke(app, ["certs", "secret", *map(str, arguments)])
    assert shown.exit_code == 0
    return yaml.safe_load(shown.output)


@pytest.mark.parametrize(("who", "hospital"), [(("--hospital", "north"), "north"), (("--aggregator",), None)])
def test_a_secret_holds_the_certificate_its_key_and_the_authority(authority, tmp_path, who, hospital):
    secret = printed("--authority", authority, *who)
    assert (secret["apiVersion"], secret["kind"], secret["type"]) == ("v1", "Secret", "kubernetes.io/tls")
    assert secret["metadata"] == {"name": f"{hospital or 'aggregator'}-tls"}
    assert sorted(secret["data"]) == ["ca.crt", "tls.crt", "tls.key"]
    for name, content in secret["data"].items():
        (tmp_path / name).write_bytes(b64decode(content, validate=True))
    report = check_certificate(tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "ca.crt")
    assert report.hospital == hospital


def test_its_name_and_namespace_can_be_given(authority):
    secret = printed("--authority", authority, "--hospital", "north", "--name", "tls", "--namespace", "datavector")
    assert secret["metadata"] == {"name": "tls", "namespace": "datavector"}


def test_where_there_is_no_certificate_the_command_that_makes_one_is_named(authority, tmp_path):
    with pytest.raises(UsageError, match=r"east\.crt is not there; .* datavector certs issue .* --hospital east"):
        tls_secret(authority, "east")
    with pytest.raises(UsageError, match=r"ca\.crt is not there; .* datavector certs init --output"):
        tls_secret(tmp_path, None)


def test_a_certificate_that_nobody_would_take_is_not_printed(authority, tmp_path):
    for name in ("ca.crt", "ca.key"):
        (tmp_path / name).write_bytes((authority / name).read_bytes())
    issue_hospital(tmp_path, "north", days=-1)
    with pytest.raises(CertificateError, match="expired on"):
        tls_secret(tmp_path, "north")


def test_a_secret_is_for_a_hospital_or_the_aggregator():
    for arguments in ([], ["--aggregator", "--hospital", "north"]):
        assert isinstance(CliRunner().invoke(app, ["certs", "secret", *arguments]).exception, UsageError)
