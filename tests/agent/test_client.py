"""The connection itself: what a probe tells, and what a patient agent lives through."""

from __future__ import annotations

import pytest

from datavector.errors import CertificateError, Unreachable

IDENTITY = "spiffe://datavector.local/aggregator"


def test_a_connection_that_is_closed_once_is_no_refusal(receiver, connect, cut_link, authority):
    link = cut_link(receiver.address)
    link.hang_up(1, authority)
    assert connect(link.address).server_identity() == IDENTITY


def test_a_patient_agent_waits_for_an_aggregator_that_stops_while_it_is_asked(receiver, connect, cut_link, authority):
    link = cut_link(receiver.address)
    link.hang_up(2, authority, then="refuse")  # gRPC's connection, and the first that asks why
    waited = []

    def back_again(sentence):
        waited.append(sentence)
        link.set("open")

    client = connect(link.address, patience_seconds=None, on_waiting=back_again)
    assert client.describe().hospital == "north"
    assert waited
    assert "not reachable since" in waited[0]


def test_a_patient_agent_that_asks_who_the_server_is_waits_for_it_too(receiver, connect, cut_link, authority):
    link = cut_link(receiver.address)
    link.hang_up(1, authority, then="refuse")
    client = connect(link.address, patience_seconds=None, on_waiting=lambda _: link.set("open"))
    assert client.server_identity() == IDENTITY


def test_an_aggregator_that_hangs_up_again_and_again_refuses_the_certificate(receiver, connect, cut_link, authority):
    link = cut_link(receiver.address)
    link.hang_up(100, authority)
    with pytest.raises(CertificateError, match="the aggregator refuses this hospital's certificate"):
        connect(link.address, patience_seconds=None).server_identity()


def test_an_absent_aggregator_has_no_identity(connect):
    with pytest.raises(Unreachable, match=r"localhost:1 is not reachable \(Connection refused\)"):
        connect("localhost:1").server_identity()
