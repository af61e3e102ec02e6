"""What is checked, and put right, before anything is started."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from agent import preflight
from agent.settings import AgentSettings, Tls
from datavector.errors import CertificateError, DiskFull, UsageError, WrongHospital
from tests.agent.conftest import CLASSES, settings_of


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_the_state_folder_is_its_owners_alone(tmp_path):
    settings = settings_of(tmp_path / "deep" / "state")
    preflight.state(settings)
    assert mode(settings.state) == 0o700
    settings.state.chmod(0o755)
    preflight.state(settings)
    assert mode(settings.state) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_state_folder_of_somebody_else_stays_as_it_is(tmp_path):
    settings = settings_of(tmp_path / "state")
    settings.state.mkdir()
    settings.state.chmod(0o2775)
    os.chown(settings.state, 12345, 12345)
    preflight.state(settings)
    assert mode(settings.state) == 0o2775


def test_a_folder_with_other_files_is_no_state_folder_and_stays_as_it_is(tmp_path):
    settings = settings_of(tmp_path / "home")
    settings.state.mkdir(mode=0o755)
    (settings.state / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"holds other files \(notes.txt\)"):
        preflight.state(settings)
    assert mode(settings.state) == 0o755
    assert [path.name for path in settings.state.iterdir()] == ["notes.txt"]


@pytest.fixture
def images(tmp_path):
    """40 images, which nobody has decoded yet."""
    for label in CLASSES[:2]:
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "images" / label / f"{number}.png").touch()
    return tmp_path / "images"


def test_a_state_folder_without_room_for_a_file_is_a_full_disk_and_no_wrong_setting(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(preflight, "claim_folder", full)
    with pytest.raises(DiskFull) as refusal:
        preflight.state(settings_of(tmp_path))
    assert refusal.value.exit_code == 1  # with 2 a Job would not try again


def test_images_that_do_not_fit_once_they_are_decoded_are_noticed_before_they_are(base, images, tmp_path, small_disk):
    settings = settings_of(tmp_path / "disk" / "state", images)
    small_disk(tmp_path / "disk", 1)
    preflight.state(settings)
    records, _ = preflight.data(settings, base)
    assert sorted(record.path for record in records) == sorted(images.rglob("*.png"))
    decoded = 40 * 3 * base.input.size**2
    (tmp_path / "disk" / "other").write_bytes(bytes((1 << 20) - decoded // 2))
    with pytest.raises(DiskFull, match=f"on the disk of {settings.state}"):
        preflight.data(settings, base)


def test_decoded_images_that_are_no_longer_needed_count_as_room(base, images, tmp_path, small_disk):
    settings = settings_of(tmp_path / "disk" / "state", images)
    small_disk(tmp_path / "disk", 1)
    preflight.state(settings)
    (settings.state / preflight.IMAGES).mkdir()
    (settings.state / preflight.IMAGES / f"{0:064}.pixels").write_bytes(bytes((1 << 20) - 8192))
    preflight.data(settings, base)


def test_without_a_name_the_hospital_is_the_certificates(authority, receiver, connect, tmp_path):
    tls = Tls(certificate=authority / "south.crt", key=authority / "south.key", ca=authority / "ca.crt")
    settings = AgentSettings(aggregator=receiver.address, tls=tls, policy="small", state=tmp_path)
    assert preflight.certificate(settings).startswith("speaks for south, valid for")
    policy, _ = preflight.aggregator(settings, connect(receiver.address, "south"))
    assert policy.name == "small"


def test_the_aggregators_certificate_is_no_hospitals(authority, tmp_path):
    tls = Tls(certificate=authority / "aggregator.crt", key=authority / "aggregator.key", ca=authority / "ca.crt")
    with pytest.raises(WrongHospital, match="speaks for 'the aggregator', but the call is for 'a hospital'"):
        preflight.certificate(AgentSettings(aggregator="localhost:1", tls=tls, state=tmp_path))


def test_a_check_that_fails_names_the_settings_it_is_about(tmp_path):
    lines: list[str] = []
    checks = preflight.Preflight(lines.append)
    checks.check("certificate", lambda: preflight.certificate(settings_of(tmp_path)))
    assert lines[0].startswith("FAIL  certificate  ")
    with pytest.raises(CertificateError, match=r"tls\.certificate, tls\.key, tls\.ca"):
        checks.demand()
