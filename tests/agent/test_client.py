"""The connection itself: what a probe tells, and what a patient agent lives through."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import struct
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from agent.client import Client, Credentials
from agent.ledger import read_ledger
from datavector.errors import AlreadyWithdrawn, CertificateError, Denied, Unreachable
from datavector.merge.batchnorm import Moments
from datavector.wire.certs import init_authority, issue_hospital

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
    assert re.match(rf"{link.address}: not reachable since \d\d:\d\d:\d\dZ \(.+\); next try in ", waited[0])


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


def test_a_name_that_nobody_has_is_told_as_such(connect):
    with pytest.raises(Unreachable, match=r"is not reachable \([^][()]+\);"):
        connect("aggregator.invalid:1").describe()


def test_a_server_of_another_authority_is_named(receiver, tmp_path):
    init_authority(tmp_path)
    certificate = issue_hospital(tmp_path, "north")
    credentials = Credentials(certificate, certificate.with_suffix(".key"), tmp_path / "ca.crt")
    client = Client(receiver.address, credentials, patience_seconds=0)
    with client, pytest.raises(CertificateError, match=f"the server at {receiver.address} shows a certificate"):
        client.describe()


def test_patience_ends_that_long_after_the_last_sign_of_life(connect, monkeypatch):
    client = connect("localhost:1", patience_seconds=60)
    monkeypatch.setattr(client._stopping, "wait", lambda _: False)
    clock, calls = [0.0], []
    monkeypatch.setattr("agent.client.time.monotonic", lambda: clock[0])

    def attempt():
        client._answered = len(calls) == 1  # in the second call something arrives before the link is cut
        clock[0] += 50
        calls.append(clock[0])
        raise client._unreachable("Connection refused")

    with pytest.raises(Unreachable):
        client.patiently(attempt)
    assert calls == [50, 100, 150, 200]


def test_a_visit_that_waits_for_the_link_is_not_left_after_a_withdrawal(receiver, connect, cut_link, small_base):
    receiver.calibrate(small_base, "small-1", "north", mode="visit", quorum=1, visits=1)
    link = cut_link(receiver.address)

    def withdraw_and_back_again(_sentence):
        client.ledger.decide("withdrawal")
        link.set("open")

    client = connect(link.address, patience_seconds=None, on_waiting=withdraw_and_back_again)
    (task,) = client.list_tasks().tasks
    client.server_identity()
    link.set("refuse")
    with pytest.raises(AlreadyWithdrawn):
        client.complete_visit(task, {"sum/bn0": moments(2), "sum/bn1": moments(3)}, images=1)
    assert receiver.store.visits("small-1") == []


def test_a_meeting_gets_no_layer_after_a_withdrawal(receiver, connect, small_base):
    receiver.calibrate(small_base, "small-1", "north", mode="meeting", quorum=1, visits=1)
    client = connect(receiver.address)
    left = []

    def meet():
        (task,) = client.list_tasks().tasks
        with client.meet(task, images=1) as meeting:
            meeting.pool("sum/bn0", moments(2))
            left.append(meeting._sending.entry.bytes)
            client.ledger.decide("withdrawal", task.base_digest)
            meeting.pool("sum/bn1", moments(3))

    with pytest.raises(AlreadyWithdrawn):
        meet()
    last = read_ledger(client.ledger.path)[-1]
    assert (last.what, last.state, [last.bytes]) == ("meeting", "unconfirmed", left)


def moments(channels):
    return Moments(9, np.zeros(channels), np.ones(channels))


def test_an_authority_that_only_a_strict_reading_refuses_is_taken_as_grpc_takes_it(
    start_receiver, small_base, connect, authority, tmp_path, monkeypatch
):
    """Python reads strictly from 3.13 on; here every version does."""
    usual = ssl.create_default_context

    def strict(**options):
        context = usual(**options)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)
    shutil.copytree(authority, tmp_path / "old")
    without_key_identifier(tmp_path / "old", "aggregator")
    receiver = start_receiver(small_base, certificate=tmp_path / "old" / "aggregator.crt")
    client = connect(receiver.address)
    assert client.describe().hospital == "north"
    assert client.server_identity() == IDENTITY


def without_key_identifier(folder: Path, name: str) -> None:
    """Issues a certificate again without the extension that names its authority's key, as old authorities do."""
    leaf = x509.load_pem_x509_certificate((folder / f"{name}.crt").read_bytes())
    builder = x509.CertificateBuilder(
        leaf.issuer,
        leaf.subject,
        leaf.public_key(),
        leaf.serial_number,
        leaf.not_valid_before_utc,
        leaf.not_valid_after_utc,
    )
    for extension in leaf.extensions:
        if not isinstance(extension.value, x509.AuthorityKeyIdentifier):
            builder = builder.add_extension(extension.value, extension.critical)
    key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    (folder / f"{name}.crt").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))


def test_a_link_that_is_gone_before_the_handshake_refuses_nobody(connect, monkeypatch):
    @contextmanager
    def gone(*_args, **_more):
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
            far, _ = server.accept()
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            far.close()
            near.settimeout(5)
            with suppress(OSError):
                near.recv(1)  # returns once the reset has come
            yield near

    monkeypatch.setattr("agent.client.dial", gone)
    with pytest.raises(Unreachable, match="reset by peer"):
        connect("localhost:1").server_identity()


# --- Renewed certificates -------------------------------------------------------------------------------------


@pytest.fixture
def files(authority, tmp_path) -> Credentials:
    """North's certificate, key and authority, which a test may replace."""
    folder = tmp_path / "tls"
    folder.mkdir()
    for name in ("ca.crt", "ca.key", "north.crt", "north.key"):
        shutil.copy(authority / name, folder)
    return Credentials(folder / "north.crt", folder / "north.key", folder / "ca.crt")


def test_a_renewed_certificate_is_used_from_the_next_call_on(start_receiver, small_base, files, tmp_path):
    denied = tmp_path / "denied"
    denied.touch()
    receiver = start_receiver(small_base, deny_list=denied)
    with Client(receiver.address, files, patience_seconds=0) as client:
        client.describe()
        denied.write_text(client.report.fingerprint)
        with pytest.raises(Denied):
            client.describe()
        issue_hospital(files.ca.parent, "north", days=10)
        assert client.describe().hospital == "north"
        assert client.report.days_left() == 9


def test_a_running_call_is_not_cut_by_a_renewal(receiver, files, large_base):
    with Client(receiver.address, files, patience_seconds=0) as client:
        announced = next(policy for policy in client.describe().policies if policy.base_digest == large_base.digest)
        info = announced.base_files[-1]
        renewed = []

        def renew(done, total):
            if not renewed:
                issue_hospital(files.ca.parent, "north", days=10)
                renewed.append(client.report.days_left())

        client.fetch(info, files.ca.parent / "fetched", base_digest=large_base.digest, on_progress=renew)
        assert renewed == [364]
        client.describe()
        assert client.report.days_left() == 9


@pytest.mark.parametrize("kind", ["another hospital's", "without its key", "gone"])
def test_renewed_files_that_cannot_be_used_leave_the_old_ones_in_use(receiver, files, authority, caplog, kind):
    with Client(receiver.address, files, patience_seconds=0) as client:
        client.describe()
        if kind == "gone":
            files.certificate.unlink()
        else:
            shutil.copy(authority / "south.crt", files.certificate)
        if kind == "another hospital's":
            shutil.copy(authority / "south.key", files.key)
        for _ in range(3):
            assert client.describe().hospital == "north"
        assert caplog.text.count("those before them stay in use") == 1
        issue_hospital(files.ca.parent, "north", days=10)
        client.describe()
        assert client.report.days_left() == 9
