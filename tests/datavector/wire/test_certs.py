"""The small authority, and checks before anybody dials."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from datavector.errors import CertificateError, UsageError
from datavector.wire.certs import (
    Identity,
    check_certificate,
    init_authority,
    issue_aggregator,
    issue_hospital,
    read_report,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("authority")
    init_authority(folder, trust_domain="trial.example")
    issue_hospital(folder, "north", days=90)
    issue_aggregator(folder, server_names=["merge.example", "10.0.0.7"])
    return folder


def check(folder, name="north", **changes):
    paths = {"certificate": folder / f"{name}.crt", "key": folder / f"{name}.key", "ca": folder / "ca.crt"}
    now = changes.pop("now", None)
    return check_certificate(**{**paths, **changes}, now=now)


def test_a_hospitals_certificate_names_it_in_the_trust_domain(folder):
    identity = read_report((folder / "north.crt").read_bytes()).identity
    assert identity == Identity("trial.example", "north")
    assert identity.uri == "spiffe://trial.example/hospital/north"


def test_the_aggregators_certificate_names_no_hospital(folder):
    assert read_report((folder / "aggregator.crt").read_bytes()).identity == Identity("trial.example", None)


def test_a_good_certificate_is_reported_with_its_days(folder):
    report = check(folder)
    assert report.hospital == "north"
    assert report.days_left() == 89


def test_private_keys_are_the_owners_only(folder):
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.key")} == {0o600}


@pytest.mark.parametrize("name", ["", "-north", "North", "no/rth", "..", "north.", "a" * 64, "ca", "aggregator"])
def test_a_name_that_could_be_a_path_or_another_file_is_refused(folder, name):
    with pytest.raises(UsageError):
        issue_hospital(folder, name)


def test_an_authority_is_never_overwritten(folder):
    with pytest.raises(UsageError, match="has an authority already"):
        init_authority(folder)


def test_issuing_without_an_authority_says_so(tmp_path):
    with pytest.raises(CertificateError, match=r"ca\.crt cannot be read"):
        issue_hospital(tmp_path, "north")


def test_an_expired_certificate_says_since_when(folder):
    with pytest.raises(CertificateError, match=r"expired on \d{4}-.*new certificate"):
        check(folder, now=datetime.now(UTC) + timedelta(days=91))


def test_a_certificate_of_the_future_points_at_the_clock(folder):
    with pytest.raises(CertificateError, match=r"valid only from.*clock"):
        check(folder, now=datetime.now(UTC) - timedelta(days=1))


def test_a_foreign_authority_is_told_apart(folder, tmp_path):
    init_authority(tmp_path, trust_domain="trial.example")
    with pytest.raises(CertificateError, match="not the authority in"):
        check(folder, ca=tmp_path / "ca.crt")


def test_another_certificates_key_is_told_apart(folder):
    with pytest.raises(CertificateError, match="is not the key of"):
        check(folder, key=folder / "aggregator.key")


@pytest.mark.parametrize("part", ["certificate", "key", "ca"])
def test_a_missing_or_unreadable_file_is_named(folder, tmp_path, part):
    with pytest.raises(CertificateError, match="cannot be read"):
        check(folder, **{part: tmp_path / "absent.pem"})
    (tmp_path / "garbage.pem").write_text("garbage")
    with pytest.raises(CertificateError, match=r"garbage\.pem holds no readable"):
        check(folder, **{part: tmp_path / "garbage.pem"})


def test_a_certificate_that_names_nobody_is_refused(folder):
    with pytest.raises(CertificateError, match="URI SAN"):
        read_report((folder / "ca.crt").read_bytes())
