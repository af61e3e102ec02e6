"""Certificates that are renewed while the receiver runs, as in a Kubernetes Secret that is mounted."""

from __future__ import annotations

import shutil
import socket
import ssl
from datetime import timedelta
from pathlib import Path

import pytest

from agent.client import Client, Credentials
from aggregator.resources import utc_now
from datavector.errors import CertificateError
from datavector.wire.certs import init_authority, issue_aggregator, issue_hospital
from tests.integration.processes import until
from tests.serving import Serving

SECRET = {"tls.crt": "aggregator.crt", "tls.key": "aggregator.key", "ca.crt": "ca.crt"}


class Mount:
    """A mounted Secret: files are links into a folder that one more link names; an update turns that one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        folder.mkdir()
        for name in SECRET:
            (folder / name).symlink_to(f"..data/{name}")

    def update(self, authority: Path, **instead: Path) -> None:
        """Puts the aggregator's files of an authority there, but for those of `instead`."""
        self._count += 1
        version = self.folder / f"..{self._count}"
        version.mkdir()
        for name, file in SECRET.items():
            shutil.copy(instead.get(name.removeprefix("tls."), authority / file), version / name)
        turned = self.folder / "..data_tmp"
        turned.symlink_to(version.name)
        turned.replace(self.folder / "..data")


@pytest.fixture
def old(tmp_path):
    return make_authority(tmp_path / "old")


@pytest.fixture
def new(tmp_path):
    return make_authority(tmp_path / "new")


@pytest.fixture
def mount(tmp_path, old):
    made = Mount(tmp_path / "tls")
    made.update(old)
    return made


@pytest.fixture
def receiver(mount, start_receiver, small_base) -> Serving:
    files = {"certificate": mount.folder / "tls.crt", "key": mount.folder / "tls.key", "ca": mount.folder / "ca.crt"}
    return start_receiver(small_base, **files)


def make_authority(folder: Path) -> Path:
    init_authority(folder)
    issue_aggregator(folder, server_names=["localhost"])
    issue_hospital(folder, "north")
    return folder


def asked(receiver: Serving, authority: Path, *, trusting: Path | None = None) -> str:
    """The hospital that the receiver takes a certificate of this authority for, on a new connection."""
    ca = (trusting or authority) / "ca.crt"
    with Client(
        receiver.address, Credentials(authority / "north.crt", authority / "north.key", ca), patience_seconds=0
    ) as client:
        return client.describe().hospital


def shown(receiver: Serving, authority: Path) -> bytes:
    """The certificate that the receiver shows."""
    context = ssl.create_default_context(cafile=str(authority / "ca.crt"))
    context.set_alpn_protocols(["h2"])
    host, port = receiver.address.split(":")
    with socket.create_connection((host, int(port))) as plain:
        return context.wrap_socket(plain, server_hostname=host).getpeercert(binary_form=True) or b""


def der(certificate: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate.read_text())


def test_a_renewed_certificate_is_shown_without_a_restart(receiver, mount, old):
    before = der(old / "aggregator.crt")
    assert shown(receiver, old) == before
    issue_aggregator(old, server_names=["localhost"])
    assert shown(receiver, old) == before
    mount.update(old)
    assert shown(receiver, old) == der(old / "aggregator.crt") != before
    assert asked(receiver, old) == "north"


@pytest.fixture
def both(tmp_path, old, new) -> Path:
    """A folder with both authorities' certificates, as `ca.crt`."""
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "ca.crt").write_bytes((old / "ca.crt").read_bytes() + (new / "ca.crt").read_bytes())
    return folder


def test_hospitals_of_an_authority_that_is_no_longer_there_are_refused(receiver, mount, old, new, both):
    assert asked(receiver, old) == "north"
    mount.update(new)
    with pytest.raises(CertificateError, match="refuses this hospital's certificate"):
        asked(receiver, old, trusting=both)
    assert asked(receiver, new) == "north"


def test_hospitals_of_both_authorities_get_in_while_one_takes_the_others_place(receiver, mount, old, new, both):
    mount.update(new, **{"ca.crt": both / "ca.crt"})
    assert asked(receiver, old, trusting=both) == asked(receiver, new) == "north"


def unlike(kind: str, old: Path, new: Path, folder: Path) -> dict[str, Path]:
    """Files that are no good: the certificate (crt) or the key of a Secret."""
    if kind == "half":
        return {"key": new / "aggregator.key"}
    if kind == "garbled":
        (folder / "garbled").write_text("-----BEGIN CERTIFICATE-----\n")
        return {"crt": folder / "garbled"}
    if kind == "expired":
        issue_aggregator(old, server_names=["localhost"], days=-1)
        return {}
    if kind == "a hospital's":
        return {"crt": old / "north.crt", "key": old / "north.key"}
    other = folder / "other"
    init_authority(other, trust_domain="other.example")
    issue_aggregator(other, server_names=["localhost"])
    return {"crt": other / "aggregator.crt", "key": other / "aggregator.key"}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("half", "is not the key of"),
        ("garbled", "holds no readable certificate"),
        ("expired", "expired on"),
        ("a hospital's", "is the certificate of hospital 'north'"),
        ("another authority's", "was issued by"),
    ],
)
def test_what_cannot_be_used_is_logged_once_and_what_was_there_stays(
    receiver, mount, old, new, tmp_path, caplog, kind, reason
):
    before = der(old / "aggregator.crt")
    instead = unlike(kind, old, new, tmp_path)
    mount.update(old)
    if instead:
        mount.update(old, **instead)
    for _ in range(3):
        assert shown(receiver, old) == before
        assert asked(receiver, old) == "north"
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1
    assert reason in said[0]
    assert "those before them stay in use" in said[0]
    issue_aggregator(old, server_names=["localhost"])
    mount.update(old)
    assert shown(receiver, old) == der(old / "aggregator.crt")


def test_another_trust_domain_is_not_taken(receiver, mount, old, tmp_path, caplog):
    other = tmp_path / "other"
    init_authority(other, trust_domain="other.example")
    issue_aggregator(other, server_names=["localhost"])
    before = der(old / "aggregator.crt")
    mount.update(other)
    assert shown(receiver, old) == before
    assert "is of the trust domain 'other.example'" in caplog.text


def test_files_that_are_gone_change_nothing_for_those_who_connect(receiver, mount, old, caplog):
    (mount.folder / "..data").unlink()
    assert asked(receiver, old) == asked(receiver, old) == "north"
    assert caplog.text.count("cannot be read") == 1


def test_a_certificate_that_expires_soon_is_told_of_before(start_receiver, small_base, old, caplog):
    certificate = issue_aggregator(old, server_names=["localhost"], days=13.5)
    receiver = start_receiver(
        small_base, certificate=certificate, key=certificate.with_suffix(".key"), ca=old / "ca.crt"
    )
    until(lambda: f"{certificate} expires on" in caplog.text, "the warning")
    registry = receiver.receiver.metrics.registry
    value = registry.get_sample_value("datavector_certificate_expiry_timestamp_seconds")
    assert value == pytest.approx((utc_now() + timedelta(days=13.5)).timestamp(), abs=60)
    issue_aggregator(old, server_names=["localhost"])
    assert asked(receiver, old) == "north"
    value = registry.get_sample_value("datavector_certificate_expiry_timestamp_seconds")
    assert value == pytest.approx((utc_now() + timedelta(days=365)).timestamp(), abs=60)
