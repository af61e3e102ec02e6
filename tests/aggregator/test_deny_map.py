"""Hospitals that a ConfigMap denies: cut off at once, and let in again by nothing but the list."""

from __future__ import annotations

import time

import pytest

from datavector.errors import Denied
from tests.cluster.roles import RECEIVER, rule
from tests.integration.processes import until

NAME = "denied"
SETTING = {"DATAVECTOR_RECEIVER_DENY_LIST_CONFIG_MAP": NAME}
READ_LIST = {**rule("configmaps", "get list watch", group=""), "resourceNames": [NAME]}  # of this one alone


@pytest.fixture
def site(site):
    site.allow([*RECEIVER, READ_LIST])
    return site


def write(site, text: str | None) -> None:
    content = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": NAME}}
    site.kubectl("apply", "-f", "-", input={**content, "data": {} if text is None else {"denied": text}})


def is_denied(client, match: str = "deny list") -> bool:
    try:
        client.describe()
    except Denied as error:
        return match in str(error)
    return False


def test_a_hospital_is_denied_within_seconds_and_let_in_again(site, connect):
    write(site, "# nobody\n")
    receiver = site.start(**SETTING)
    north, south = connect(receiver.address), connect(receiver.address, "south")
    assert north.describe().hospital == "north"
    write(site, "north  # left the trial\n")
    began = time.monotonic()
    until(lambda: is_denied(north), "the denial")
    assert time.monotonic() - began < 10
    assert south.describe().hospital == "south"
    receiver.process.wait_for("denied are: north")
    write(site, f"{south.report.fingerprint}\n")
    until(lambda: is_denied(south), "the denial of a certificate")
    assert north.describe().hospital == "north"
    assert receiver.process.terminate() == 0
    assert "Traceback" not in receiver.process.output


def test_without_the_list_or_its_key_everybody_is_denied(site, connect):
    receiver = site.start(**SETTING)
    client = connect(receiver.address)
    assert is_denied(client, "cannot tell whom to deny")
    receiver.process.wait_for(f"the ConfigMap {NAME} of namespace {site.namespace} is not there; EVERYBODY is denied")
    write(site, "")
    until(lambda: not is_denied(client, ""), "the list")
    write(site, None)
    until(lambda: is_denied(client, "cannot tell whom to deny"), "the loss of the key")
    receiver.process.wait_for("has no key 'denied'; EVERYBODY is denied")
    write(site, "south")
    until(lambda: not is_denied(client, ""), "the list again")
    site.kubectl("delete", "configmap", NAME)
    until(lambda: is_denied(client, "cannot tell whom to deny"), "the loss of the list")


def test_it_listens_only_once_the_list_has_been_read(site, connect):
    site.allow(RECEIVER)
    write(site, "north")
    receiver = site.start(**SETTING)
    receiver.process.wait_for("not allowed to GET configmaps")
    receiver.process.wait_for(f"to list the deny list {NAME} of namespace")
    assert "listening" not in receiver.process.output
    site.allow([*RECEIVER, READ_LIST])
    assert is_denied(connect(receiver.address))


def test_an_outage_keeps_the_last_list_and_what_changed_meanwhile_counts_after_it(site, connect):
    write(site, "north")
    link = site.link()
    receiver = site.start(url=f"https://{link.address}", **SETTING)
    north, south = connect(receiver.address), connect(receiver.address, "south")
    assert is_denied(north)
    link.set("refuse")
    receiver.process.wait_for("Connection refused); this is tried again until it is")
    assert is_denied(north)
    assert south.describe().hospital == "south"
    write(site, "south")
    link.set("open")
    until(lambda: is_denied(south), "the new list")
    assert north.describe().hospital == "north"
