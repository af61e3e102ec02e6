"""Taking back, taking part again, and fetching a release, as a person asks for them."""

from __future__ import annotations

import os
import re
import signal

import pytest

from agent import preflight, site
from agent.ledger import Ledger, read_ledger
from agent.settings import AgentSettings, Tls
from datavector.errors import AlreadyWithdrawn, CertificateError, Interrupted, TryAgain, Unreachable, UsageError

DIGEST = f"sha256:{'a' * 64}"


@pytest.fixture
def settings_for(authority, tmp_path):
    """Settings of north for an aggregator's address; its state folder is there. Signals are handled as before."""
    (tmp_path / "state").mkdir()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def make(address, state=tmp_path / "state"):
        tls = Tls(certificate=authority / "north.crt", key=authority / "north.key", ca=authority / "ca.crt")
        return AgentSettings(hospital="north", aggregator=address, state=state, tls=tls)

    yield make
    for number, handler in handlers.items():
        signal.signal(number, handler)


def decisions(settings):
    entries = read_ledger(settings.state / site.LEDGER)
    return [(entry.what, entry.base) for entry in entries if entry.state == "decided"]


@pytest.mark.parametrize("base", ["dermatology", DIGEST.upper(), DIGEST[:-1], DIGEST + "\n", DIGEST[7:]])
def test_what_is_no_digest_of_a_base_is_refused_before_anything_is_decided(settings_for, base):
    settings = settings_for("localhost:1")
    with pytest.raises(UsageError, match=f"--base {re.escape(base)} is no digest"):
        site.withdraw(settings, base_digest=base, reason="")
    with pytest.raises(UsageError, match="leave --base out"):
        site.rejoin(settings.state, base_digest=base)
    assert decisions(settings) == []


def test_a_withdrawal_names_the_base_that_it_is_about(receiver, settings_for, capsys):
    settings = settings_for(receiver.address)
    site.withdraw(settings, base_digest=DIGEST, reason="")
    assert f"nothing for {DIGEST} leaves from here any more" in capsys.readouterr().out
    site.rejoin(settings.state, base_digest=DIGEST)
    assert f"takes part again for {DIGEST};" in capsys.readouterr().out
    site.withdraw(settings, base_digest="", reason="")
    assert "nothing leaves from here any more" in capsys.readouterr().out
    assert decisions(settings) == [("withdrawal", DIGEST), ("rejoin", DIGEST), ("withdrawal", "")]


def test_a_withdrawal_from_a_folder_with_other_files_is_refused(settings_for):
    settings = settings_for("localhost:1")
    (settings.state / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"holds other files \(notes.txt\)"):
        site.withdraw(settings, base_digest="", reason="")
    assert [path.name for path in settings.state.iterdir()] == ["notes.txt"]


def test_after_a_withdrawal_from_an_empty_folder_it_is_the_agents(receiver, settings_for):
    settings = settings_for(receiver.address)
    site.withdraw(settings, base_digest="", reason="")
    preflight.state(settings)


def test_a_withdrawal_from_a_folder_that_is_not_there_is_refused_and_makes_none(receiver, settings_for, tmp_path):
    settings = settings_for(receiver.address, state=tmp_path / "typo")
    with pytest.raises(UsageError, match=f"{tmp_path}/typo is no folder; give the agent's own with --state"):
        site.withdraw(settings, base_digest="", reason="")
    assert not settings.state.exists()


def test_a_withdrawal_that_nobody_answers_gives_up_and_says_what_holds_and_what_does_not(settings_for, monkeypatch):
    monkeypatch.setattr(site, "WITHDRAW_SECONDS", 0)
    settings = settings_for("localhost:1")
    with pytest.raises(Unreachable, match=r"nothing leaves from here any more, but .* NOT been told") as caught:
        site.withdraw(settings, base_digest="", reason="")
    assert caught.value.exit_code == 1
    assert caught.value.remedy.startswith("check the address")
    assert "run `datavector withdraw` again" in caught.value.remedy
    with pytest.raises(AlreadyWithdrawn):
        Ledger(settings.state / site.LEDGER).demand_consent(DIGEST)


def test_a_withdrawal_that_is_interrupted_or_refused_says_so_too(settings_for, cut_link, authority, monkeypatch):
    monkeypatch.setattr(site, "say", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"NOT been told yet.*; run `datavector withdraw` again"):
        site.withdraw(settings_for("localhost:1"), base_digest="", reason="")
    link = cut_link("localhost:1")
    link.hang_up(100, authority)
    with pytest.raises(CertificateError, match="NOT been told yet"):
        site.withdraw(settings_for(link.address), base_digest="", reason="")


def test_fetching_a_release_that_nobody_gives_ends(settings_for, tmp_path, monkeypatch):
    monkeypatch.setattr(site, "FETCH_SECONDS", 0)
    with pytest.raises(Unreachable, match="localhost:1 is not reachable"):
        site.fetch_release(settings_for("localhost:1"), tmp_path / "release", verify=lambda _: None)


def test_a_second_agent_on_a_state_folder_is_to_try_again_for_the_first_may_be_ending(tmp_path):
    with site.only_agent(tmp_path):
        with pytest.raises(TryAgain, match="another agent uses the state folder") as refusal, site.only_agent(tmp_path):
            pytest.fail("two agents work in one folder")
        assert refusal.value.exit_code == 1  # 2 would fail a Job for good
    with site.only_agent(tmp_path):
        pass
