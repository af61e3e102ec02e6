"""The record of everything that left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

from agent.ledger import Ledger, read_ledger
from datavector.errors import AlreadyWithdrawn, UnreadableData


def test_a_line_is_on_disk_before_anything_is_sent_and_another_after(tmp_path):
    ledger = Ledger(tmp_path / "state" / "ledger.jsonl")
    with ledger.sending("vector", to="here", bytes=3, sha256="ab", base="sha256:cd"):
        assert [entry.state for entry in read_ledger(ledger.path)] == ["sending"]
    before, after = read_ledger(ledger.path)
    assert (after.state, after.what, after.bytes, after.sha256, after.base) == ("sent", "vector", 3, "ab", "sha256:cd")
    assert before.time <= after.time
    assert before.time.endswith("Z")


def test_a_failure_leaves_an_unconfirmed_line(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(ConnectionError), ledger.sending("visit", to="here"):
        raise ConnectionError
    assert [entry.state for entry in read_ledger(ledger.path)] == ["sending", "unconfirmed"]


def test_size_and_digest_that_only_the_end_shows_are_in_the_last_line(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with ledger.sending("meeting", to="here", version="v1") as sending:
        sending.measured(bytes=7, sha256="ef")
    assert [(entry.bytes, entry.sha256) for entry in read_ledger(ledger.path)] == [(0, ""), (7, "ef")]


def test_a_kill_while_sending_hides_nothing(tmp_path):
    path = tmp_path / "ledger.jsonl"
    script = (
        "import os, signal, sys; from pathlib import Path; from agent.ledger import Ledger\n"
        "with Ledger(Path(sys.argv[1])).sending('vector', to='here', bytes=5): os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = subprocess.run([sys.executable, "-c", script, str(path)])
    assert process.returncode == -signal.SIGKILL
    assert [(entry.state, entry.bytes) for entry in read_ledger(path)] == [("sending", 5)]


def test_a_torn_last_line_is_left_out_and_swallows_no_later_line(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with ledger.sending("vector", to="here"):
        pass
    with ledger.path.open("ab") as file:
        file.write(b'{"time": "2031')
    with ledger.sending("visit", to="here"):
        pass
    assert [entry.what for entry in read_ledger(ledger.path)] == ["vector", "vector", "visit", "visit"]


def test_lines_are_only_appended_and_only_the_owner_reads_them(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with ledger.sending("vector", to="here"):
        first = ledger.path.read_bytes()
    assert ledger.path.read_bytes().startswith(first)
    assert ledger.path.stat().st_mode & 0o777 == 0o600
    assert all(json.loads(line) for line in ledger.path.read_text().splitlines())


def test_a_withdrawal_holds_for_its_base_until_the_hospital_rejoins(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.demand_consent("sha256:a")
    ledger.decide("withdrawal", "sha256:a")
    ledger.demand_consent("sha256:b")
    with pytest.raises(AlreadyWithdrawn, match="datavector rejoin"), ledger.sending("visit", to="x", base="sha256:a"):
        pass
    with ledger.sending("withdrawal", to="here", base="sha256:a"):
        pass
    ledger.decide("rejoin")
    ledger.demand_consent("sha256:a")


def test_a_withdrawal_from_everything_holds_for_every_base(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.decide("withdrawal")
    ledger.decide("rejoin", "sha256:a")
    ledger.demand_consent("sha256:a")
    with pytest.raises(AlreadyWithdrawn):
        ledger.demand_consent("sha256:b")


@pytest.mark.parametrize("stage", ["sending", "unconfirmed"])
def test_a_withdrawal_that_nobody_has_confirmed_holds_all_the_same(tmp_path, stage):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with contextlib.suppress(ConnectionError), ledger.sending("withdrawal", to="here"):
        if stage == "unconfirmed":
            raise ConnectionError
        with pytest.raises(AlreadyWithdrawn):
            ledger.demand_consent("sha256:a")
    with pytest.raises(AlreadyWithdrawn):
        ledger.demand_consent("sha256:a")


def test_no_ledger_is_an_empty_one_and_an_unreadable_one_is_an_error(tmp_path):
    assert read_ledger(tmp_path / "absent") == []
    with pytest.raises(UnreadableData, match=os.fspath(tmp_path)):
        read_ledger(tmp_path)


def test_what_is_on_its_way_sees_a_withdrawal_that_another_process_records(tmp_path):
    ledger, other = Ledger(tmp_path / "ledger.jsonl"), Ledger(tmp_path / "ledger.jsonl")
    with ledger.sending("vector", to="here", base="sha256:a") as sending:
        assert sending.consented
        other.decide("withdrawal", "sha256:b")
        assert sending.consented
        other.decide("withdrawal", "sha256:a")
        assert not sending.consented
        with pytest.raises(AlreadyWithdrawn):
            sending.demand_consent()
        other.decide("rejoin")
        sending.demand_consent()


def test_asking_for_consent_again_reads_the_ledger_only_when_it_has_changed(tmp_path, monkeypatch):
    ledger, reads = Ledger(tmp_path / "ledger.jsonl"), []
    monkeypatch.setattr("agent.ledger.read_ledger", lambda path: reads.append(path) or read_ledger(path))
    with ledger.sending("vector", to="here") as sending:
        assert all(sending.consented for _ in range(9))
        assert len(reads) == 2  # before its line and after it
