"""Files are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from datavector.errors import DiskFull, UsageError
from datavector.files import (
    atomic_write,
    canonical_json,
    claim_folder,
    disk_full_at,
    remove_leftovers,
    sha256_file,
    write_json,
)


def test_a_file_replaces_the_one_before_it(tmp_path):
    path = tmp_path / "deep" / "down" / "file"
    for content in (b"first", b"second"):
        with atomic_write(path) as file:
            file.write(content)
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_while_writing_leaves_the_one_before_it_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def write_half() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_while_writing_leaves_the_one_before_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    script = (
        "import sys; from pathlib import Path; from datavector.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); print('written', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_file_has_the_mode_that_was_asked_for(tmp_path, mode):
    write_json(tmp_path / "file", {}, mode=mode)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    killed = """
import os, pathlib
from datavector.files import atomic_write
open_files = [atomic_write(pathlib.Path(name)) for name in ("state.json", "deep/model.pt")]
for file in open_files:
    file.__enter__()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", killed], cwd=tmp_path, check=True, env={"PYTHONPATH": str(Path.cwd())})
    others = {".hidden", ".bashrc.20240101", ".model.onnx.0123456789abcdef.part", "state.json", "deep"}
    for name in others - {"deep"}:
        (tmp_path / name).write_bytes(b"x")
    assert len(list(tmp_path.rglob(".*.*"))) == 4
    remove_leftovers(tmp_path, recursive=False)
    assert {path.name for path in tmp_path.iterdir()} == others
    assert len(list((tmp_path / "deep").iterdir())) == 1
    remove_leftovers(tmp_path)
    assert list((tmp_path / "deep").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == others


def test_a_folder_is_claimed_while_it_is_empty_and_then_belongs_to_its_owner(tmp_path):
    (tmp_path / "lost+found").mkdir()
    claim_folder(tmp_path, "agent")
    (tmp_path / "ledger").touch()
    claim_folder(tmp_path, "agent")
    with pytest.raises(
        UsageError, match=r"holds other files \(\.datavector-agent\), and was not made by the aggregator"
    ):
        claim_folder(tmp_path, "aggregator")


def test_where_no_folder_is_nothing_is_left_over(tmp_path):
    remove_leftovers(tmp_path / "absent")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_left_is_an_error_for_people(tmp_path, code):
    with (
        pytest.raises(DiskFull, match=r"no space left for 3 MiB on the disk of"),
        disk_full_at(tmp_path, needed=3 << 20),
    ):
        raise OSError(code, os.strerror(code))


def test_another_error_of_the_disk_stays_what_it_is(tmp_path):
    with pytest.raises(PermissionError), disk_full_at(tmp_path):
        raise PermissionError(errno.EACCES, "no")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_device_is_a_full_disk():
    with pytest.raises(DiskFull), disk_full_at(Path("/dev/full")), Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"x")


def test_the_digest_of_a_file(tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_one_json_text_per_value():
    assert (
        canonical_json({"b": [1, 2.5], "a": "é"})
        == canonical_json({"a": "é", "b": [1, 2.5]})
        == ('{"a":"é","b":[1,2.5]}'.encode())
    )
