"""Who may call, what they get, and how they are refused."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agent.client import Client, Credentials, inside
from agent.ledger import Ledger, read_ledger
from agent.upload import upload
from aggregator.resources import ModelVersion, PolicyStatus
from datavector.errors import (
    CertificateError,
    Denied,
    InternalError,
    NotFound,
    NotReady,
    ProtocolError,
    QuotaExceeded,
    TryAgain,
    Unreachable,
    UsageError,
    WrongDigest,
    WrongHospital,
)
from datavector.files import sha256_file
from datavector.wire.certs import init_authority, issue_aggregator, issue_hospital, read_report
from datavector.wire.chunks import CHUNK, frame_chunk
from datavector.wire.v1.exchange_pb2 import FetchRequest, FileInfo, UploadOpen, UploadRequest
from tests.integration.processes import until
from tests.serving import announce, make_settings, make_store, policy_of, serve, write_tau


def version(policy, base, *, phase, name="small-0123456789", ready_at=None):
    north = {"dataVector": "north-1", "hospital": "north", "digest": f"sha256:{'0' * 64}", "sampleCount": 1}
    return ModelVersion.parse(
        {
            "metadata": {"name": name},
            "spec": {
                "policyRef": policy, "baseModelRef": base.digest, "inputs": [north], "inputsHash": "0" * 64,
                "method": {}, "calibration": {}, "export": {},
            },
            "status": {"phase": phase, "readyAt": ready_at},
        }
    )  # fmt: skip


# --- Identity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hospital", ["north", "south"])
def test_the_caller_is_the_hospital_that_its_certificate_names(receiver, connect, hospital):
    assert connect(receiver.address, hospital).describe().hospital == hospital


def test_an_agent_of_b_with_the_certificate_of_a_stops_before_it_dials(connect, authority):
    credentials = Credentials(authority / "north.crt", authority / "north.key", authority / "ca.crt")
    with pytest.raises(WrongHospital, match="speaks for 'north', but the call is for 'south'"):
        Client("localhost:1", credentials, hospital="south")


def test_what_a_sends_is_as_even_where_it_meant_b(receiver, connect, small_base, tmp_path):
    path = write_tau(tmp_path / "tau", small_base)
    delivery = upload(connect(receiver.address, "north"), path, announce(path, small_base))
    assert delivery.vector.startswith("north-")
    assert connect(receiver.address, "south").withdraw().vectors == []
    assert receiver.registry.vectors()[0].granted


def foreign_client(tmp_path, authority, receiver, *, trust_domain="datavector.local"):
    """A client whose certificate is another authority's, though it trusts the right one."""
    foreign = tmp_path / "foreign"
    init_authority(foreign, trust_domain=trust_domain)
    issue_hospital(foreign, "north")
    both = tmp_path / "both.crt"
    both.write_bytes((authority / "ca.crt").read_bytes() + (foreign / "ca.crt").read_bytes())
    return Client(receiver.address, Credentials(foreign / "north.crt", foreign / "north.key", both), patience_seconds=0)


def test_a_certificate_of_a_foreign_authority_is_told_apart_from_an_absent_aggregator(receiver, tmp_path, authority):
    with (
        foreign_client(tmp_path, authority, receiver) as client,
        pytest.raises(CertificateError, match="refuses this hospital"),
    ):
        client.describe()


def test_an_aggregator_of_a_foreign_authority_is_told_apart_from_an_absent_one(receiver, tmp_path):
    init_authority(tmp_path / "foreign")
    issue_hospital(tmp_path / "foreign", "north")
    credentials = Credentials(*(tmp_path / "foreign" / name for name in ("north.crt", "north.key", "ca.crt")))
    client = Client(receiver.address, credentials, patience_seconds=0)
    with client, pytest.raises(CertificateError, match="not to be trusted"):
        client.describe()


def test_nobody_listening_is_unreachable(connect):
    with pytest.raises(Unreachable, match="localhost:1 is not reachable"):
        connect("localhost:1").describe()


def test_an_expired_certificate_is_refused_here_and_there(receiver, tmp_path, authority):
    for name in ("ca.crt", "ca.key"):
        (tmp_path / name).write_bytes((authority / name).read_bytes())
    issue_hospital(tmp_path, "north", days=-1)
    with pytest.raises(CertificateError, match="expired on"):
        Client(receiver.address, Credentials(tmp_path / "north.crt", tmp_path / "north.key", tmp_path / "ca.crt"))
    assert is_turned_away(receiver, tmp_path, "north")
    assert not is_turned_away(receiver, authority, "north")


def test_another_trust_domain_of_the_same_authority_is_refused(
    start_receiver, small_base, connect, authority, tmp_path, monkeypatch
):
    other = shutil.copytree(authority, tmp_path / "other")
    monkeypatch.setattr("datavector.wire.certs._authority_domain", lambda *_: "other.example")
    certificate = issue_aggregator(other, server_names=["localhost"])
    tls = {"certificate": certificate, "key": certificate.with_suffix(".key")}
    receiver = start_receiver(small_base, trust_domain="other.example", **tls)
    with pytest.raises(CertificateError, match=r"trust domain 'datavector\.local'"):
        connect(receiver.address).describe()


def test_an_aggregator_of_another_trust_domain_than_its_settings_does_not_start(authority, tmp_path, small_base):
    settings = make_settings(authority, trust_domain="other.example")
    with (
        pytest.raises(CertificateError, match=r"set tls\.trust_domain"),
        serve(make_store(tmp_path / "2", small_base), settings),
    ):
        pass


def test_the_aggregators_own_certificate_is_no_hospitals(receiver, authority):
    def describe(name):
        with grpc.secure_channel(receiver.address, channel_credentials(authority, name)) as channel:
            return channel.unary_unary("/datavector.v1.Exchange/Describe")(b"", timeout=10)

    assert b"north" in describe("north")
    with pytest.raises(grpc.RpcError) as caught:
        describe("aggregator")
    assert caught.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE)


def test_a_hospitals_certificate_cannot_pose_as_the_aggregator(authority, tmp_path, small_base):
    store = make_store(tmp_path, small_base)
    settings = make_settings(authority, certificate=authority / "north.crt", key=authority / "north.key")
    with pytest.raises(CertificateError, match="hospital 'north'"), serve(store, settings):
        pass


def test_nothing_leaves_for_a_server_that_is_not_this_collaborations_aggregator(
    start_receiver, small_base, connect, authority, tmp_path
):
    foreign = tmp_path / "foreign"
    init_authority(foreign, trust_domain="other.example")
    issue_aggregator(foreign, server_names=["localhost"])
    both = tmp_path / "both.crt"
    both.write_bytes((authority / "ca.crt").read_bytes() + (foreign / "ca.crt").read_bytes())
    tls = {"certificate": foreign / "aggregator.crt", "key": foreign / "aggregator.key", "ca": both}
    receiver = start_receiver(small_base, trust_domain="other.example", **tls)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    credentials = Credentials(authority / "north.crt", authority / "north.key", both)
    path = write_tau(tmp_path / "tau", small_base)
    with Client(receiver.address, credentials, ledger=ledger, patience_seconds=0) as client:
        for send in (client.withdraw, lambda: upload(client, path, announce(path, small_base))):
            with pytest.raises(CertificateError, match=r"names spiffe://other\.example/aggregator"):
                send()
    assert read_ledger(ledger.path) == []
    assert receiver.registry.vectors() == []


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "..", "a\\..\\b", "C:\\x", "a\0b"]
)
def test_a_name_from_the_aggregator_never_leads_out_of_its_folder(tmp_path, name):
    with pytest.raises(ProtocolError, match="names a file"):
        inside(tmp_path, name)


def test_plain_names_from_the_aggregator_are_joined(tmp_path):
    assert inside(tmp_path, "1/model.onnx") == tmp_path / "1" / "model.onnx"


def channel_credentials(authority, name):
    return grpc.ssl_channel_credentials(
        *((authority / file).read_bytes() for file in ("ca.crt", f"{name}.key", f"{name}.crt"))
    )


# --- TLS ------------------------------------------------------------------------------------------------------


def dial(receiver, authority, *, highest=ssl.TLSVersion.TLSv1_3, hospital="north"):
    """A TLS connection without gRPC."""
    context = ssl.create_default_context(cafile=str(authority / "ca.crt"))
    context.maximum_version = highest
    if hospital:
        context.load_cert_chain(authority / f"{hospital}.crt", authority / f"{hospital}.key")
    context.set_alpn_protocols(["h2"])
    host, port = receiver.address.split(":")
    return context.wrap_socket(socket.create_connection((host, int(port)), timeout=10), server_hostname=host)


def is_turned_away(receiver, authority, hospital):
    """Whether the receiver ends a connection without a byte of HTTP/2."""
    with dial(receiver, authority, hospital=hospital) as link:
        try:
            return link.recv(1) == b""
        except (ssl.SSLError, ConnectionResetError):
            return True


def frame(kind, flags, stream, payload):
    """An HTTP/2 frame: RFC 9113, section 4.1."""
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def field(name, value):
    """A literal header field without indexing: RFC 7541, section 6.2.2."""
    return b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value


def describe_by_hand(link):
    """Calls Describe with nothing but a socket, and returns what the server says until it ends the stream."""
    headers = b"".join(
        field(name, value)
        for name, value in [
            (b":method", b"POST"), (b":scheme", b"https"), (b":path", b"/datavector.v1.Exchange/Describe"),
            (b":authority", b"localhost"), (b"te", b"trailers"), (b"content-type", b"application/grpc"),
        ]
    )  # fmt: skip
    link.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
    link.sendall(frame(1, 4, 1, headers) + frame(0, 1, 1, bytes(5)))
    said = b""
    while True:
        header = read(link, 9)
        payload = read(link, int.from_bytes(header[:3]))
        if int.from_bytes(header[5:]) == 1:
            said += payload
            if header[4] & 1:
                return said


def read(link, count):
    data = b""
    while len(data) < count:
        data += link.recv(count - len(data))
    return data


def test_tls_1_3_is_served(receiver, authority):
    with dial(receiver, authority) as link:
        assert link.version() == "TLSv1.3"
        assert b"north" in describe_by_hand(link)


def test_tls_1_2_is_refused(receiver, authority):
    with dial(receiver, authority, highest=ssl.TLSVersion.TLSv1_2) as link:
        assert link.version() == "TLSv1.2"
        said = describe_by_hand(link)
    assert b"connect with TLS 1.3" in said
    assert b"north" not in said
    assert receiver.metric("refused_calls_total", reason="CertificateError") == 1


def test_without_a_certificate_nobody_gets_in(receiver, authority):
    assert is_turned_away(receiver, authority, None)
    assert not is_turned_away(receiver, authority, "north")


# --- The deny list --------------------------------------------------------------------------------------------


def test_the_deny_list_is_read_again_when_it_changes(start_receiver, small_base, connect, tmp_path, authority):
    denied = tmp_path / "denied"
    denied.write_text("# nobody yet\n")
    receiver = start_receiver(small_base, deny_list=denied)
    client = connect(receiver.address)
    client.describe()
    denied.write_text("north  # left the trial\n")
    with pytest.raises(Denied, match="deny list"):
        client.describe()
    assert connect(receiver.address, "south").describe().hospital == "south"
    fingerprint = read_report((authority / "south.crt").read_bytes()).fingerprint
    denied.write_text(":".join(fingerprint[at : at + 2] for at in range(0, 64, 2)).upper())
    assert client.describe().hospital == "north"
    with pytest.raises(Denied):
        connect(receiver.address, "south").describe()


def test_a_line_of_the_deny_list_that_means_nobody_is_logged(start_receiver, small_base, connect, tmp_path, caplog):
    denied = tmp_path / "denied"
    denied.write_text("sha256 Fingerprint=AB:CD\n")
    connect(start_receiver(small_base, deny_list=denied).address).describe()
    assert "neither a hospital nor 64 hexadecimal digits" in caplog.text


def test_a_deny_list_that_is_gone_lets_nobody_in(start_receiver, small_base, connect, tmp_path):
    receiver = start_receiver(small_base, deny_list=tmp_path / "absent")
    with pytest.raises(Denied, match="cannot tell whom to deny"):
        connect(receiver.address).describe()


def test_an_upload_of_a_hospital_that_is_denied_meanwhile_ends_within_seconds(
    start_receiver, large_base, connect, tmp_path
):
    denied = tmp_path / "denied"
    denied.touch()
    client = connect(start_receiver(large_base, deny_list=denied).address)
    client.describe()
    denied_at = []

    def endless():
        info = announce(path, large_base)
        yield UploadRequest(open=UploadOpen(vector=info)).SerializeToString()
        with path.open("rb") as file:
            yield frame_chunk(file.read(CHUNK))
        denied.write_text("north")
        denied_at.append(time.monotonic())
        time.sleep(20)  # nothing more comes

    path = write_tau(tmp_path / "tau", large_base)
    with pytest.raises(Denied, match="'north' or its certificate is on the deny list"):
        client.send_upload(endless())
    assert time.monotonic() - denied_at[0] < 5


def test_a_meeting_goes_on_without_a_hospital_that_is_denied_while_it_waits(
    start_receiver, small_base, connect, tmp_path
):
    denied = tmp_path / "denied"
    denied.touch()
    receiver = start_receiver(small_base, deny_list=denied)
    receiver.calibrate(small_base, "v", "north", "south", mode="meeting", quorum=2)
    client = connect(receiver.address)
    (task,) = client.list_tasks().tasks
    threading.Timer(0.5, denied.write_text, ["north"]).start()
    with pytest.raises(Denied), client.meet(task, images=1):
        pass
    until(lambda: receiver.metric("running_calls", method="Meet") == 0, "the end of the call")


# --- What there is to get -------------------------------------------------------------------------------------


def test_describe_names_policies_bases_and_what_they_wait_for(receiver, connect, small_base):
    waiting = policy_of(small_base).model_copy(update={"status": PolicyStatus(waiting_for="2 hospitals")})
    receiver.registry.set_policies([waiting])
    policy = next(policy for policy in connect(receiver.address).describe().policies if policy.name == "small")
    assert policy.base_digest == small_base.digest
    assert policy.waiting_for == "2 hospitals"
    assert {info.name: info.sha256 for info in policy.base_files} == {
        path.name: sha256_file(path) for path in small_base.path.iterdir()
    }


def test_a_base_is_downloaded_and_verified(receiver, connect, large_base, tmp_path):
    client = connect(receiver.address)
    policy = next(policy for policy in client.describe().policies if policy.name == "large")
    for info in policy.base_files:
        target = client.fetch(info, tmp_path / info.name, base_digest=policy.base_digest)
        assert target.read_bytes() == (large_base.path / info.name).read_bytes()
    assert receiver.metric("fetched_bytes_total") == sum(info.size for info in policy.base_files)


def test_a_download_goes_on_where_it_was_cut(receiver, connect, large_base, tmp_path):
    client = connect(receiver.address)
    policy = next(policy for policy in client.describe().policies if policy.name == "large")
    info = next(info for info in policy.base_files if info.name.endswith("tensors"))
    part = tmp_path / f".weights.{info.sha256[:16]}.part"
    part.write_bytes((large_base.path / info.name).read_bytes()[:1000])
    client.fetch(info, tmp_path / "weights", base_digest=large_base.digest)
    assert sha256_file(tmp_path / "weights") == info.sha256
    assert receiver.metric("fetched_bytes_total") == info.size - 1000
    assert not part.exists()


def test_a_download_that_is_not_what_was_announced_leaves_nothing(receiver, connect, small_base, tmp_path):
    size = (small_base.path / "base.json").stat().st_size
    info = FileInfo(name="base.json", size=size, sha256="0" * 64)
    with pytest.raises(WrongDigest):
        connect(receiver.address).fetch(info, tmp_path / "target", base_digest=small_base.digest)
    assert not [path for path in tmp_path.iterdir() if "target" in path.name]


@pytest.mark.parametrize("name", ["../../registry.sqlite", "/etc/passwd", "", "base.safetensors/../base.json"])
def test_only_files_of_an_artifact_are_handed_out(receiver, connect, small_base, tmp_path, name):
    info = FileInfo(name=name, size=1, sha256="0" * 64)
    with pytest.raises(NotFound, match="no file"):
        connect(receiver.address).fetch(info, tmp_path / "target", base_digest=small_base.digest)


@pytest.mark.parametrize("digest", ["", "sha256:" + "0" * 64, "../bases"])
def test_an_unknown_base_is_not_found(receiver, connect, tmp_path, digest):
    with pytest.raises(NotFound):
        connect(receiver.address).fetch(FileInfo(name="base.json", size=1), tmp_path / "x", base_digest=digest)


def test_an_offset_behind_the_end_is_refused(receiver, connect, small_base):
    client = connect(receiver.address)
    request = FetchRequest(base_digest=small_base.digest, file="base.json", offset=1 << 40)
    with pytest.raises(ProtocolError), client.streaming(client._stub().Fetch(request)) as call:
        list(call)


def test_only_a_ready_release_is_handed_out_and_the_newest_is_named(receiver, connect, small_base, tmp_path):
    client = connect(receiver.address)
    with pytest.raises(NotReady, match="no Ready version"):
        client.describe_release("small")
    for number, phase in enumerate(["Ready", "Ready", "Releasing"]):
        name = f"small-{number}"
        release = receiver.store.release(name)
        (release / "1").mkdir(parents=True)
        (release / "1" / "model.onnx").write_bytes(b"onnx" + bytes((number,)))
        ready_at = datetime(2031, 1, 3 - number, tzinfo=UTC).isoformat()
        receiver.registry.add_version(version("small", small_base, phase=phase, name=name, ready_at=ready_at))
    reply = client.describe_release("small")
    assert reply.version == "small-0"
    (info,) = reply.files
    assert info.name == "1/model.onnx"
    assert client.fetch(info, tmp_path / "model", release="small-0").read_bytes() == b"onnx\0"
    with pytest.raises(NotReady):
        client.fetch(info, tmp_path / "other", release="small-2")
    assert next(policy for policy in client.describe().policies if policy.name == "small").ready_version == "small-0"


def test_several_policies_want_one_named(receiver, connect):
    with pytest.raises(NotFound, match="large, small"):
        connect(receiver.address).describe_release()


def test_merged_weights_are_only_for_the_hospitals_of_that_version(receiver, connect, small_base, tmp_path):
    receiver.calibrate(small_base, "small-1", "north")
    (task,) = connect(receiver.address).list_tasks().tasks
    north, south = connect(receiver.address), connect(receiver.address, "south")
    assert north.fetch(task.weights[0], tmp_path / "north", task_id=task.id).read_bytes() == b"weights"
    with pytest.raises(NotFound, match="does not wait for 'south'"):
        south.fetch(task.weights[0], tmp_path / "south", task_id=task.id)


def test_a_task_whose_version_was_just_erased_is_left_out_of_the_list(receiver, connect, small_base):
    for name in ("small-1", "small-2"):
        receiver.calibrate(small_base, name, "north")
    receiver.store.merged("small-1", "sum").unlink()
    assert [task.version for task in connect(receiver.address).list_tasks().tasks] == ["small-2"]


def test_a_release_that_is_erased_while_it_is_read_is_not_ready(start_receiver, small_base, connect):
    receiver = start_receiver(small_base)
    folder = receiver.store.release("small-1")
    folder.mkdir(parents=True)
    (folder / "a.onnx").touch()
    os.truncate(folder / "a.onnx", 1 << 29)  # the receiver reads this first, for a while
    (folder / "b.onnx").write_bytes(b"onnx")
    ready_at = datetime(2031, 1, 1, tzinfo=UTC).isoformat()
    receiver.registry.add_version(version("small", small_base, phase="Ready", name="small-1", ready_at=ready_at))
    client = connect(receiver.address)
    with ThreadPoolExecutor(1) as executor:
        asking = executor.submit(client.describe_release, "small")
        while not is_open(folder / "a.onnx"):
            pass
        (folder / "b.onnx").unlink()
        assert isinstance(asking.exception(), NotReady)


def is_open(path):
    """Whether this process, which the receiver shares, reads a file."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(descriptor.readlink())
    return path in links


# --- Service --------------------------------------------------------------------------------------------------


def test_the_health_service_answers_whom_it_knows(receiver, authority):
    with grpc.secure_channel(receiver.address, channel_credentials(authority, "north")) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "datavector.v1.Exchange"):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_a_hospital_has_only_so_many_calls_at_once(start_receiver, small_base, connect):
    receiver = start_receiver(small_base, calls_per_hospital=2)
    begun, release = threading.Barrier(3), threading.Event()

    def hold_open(client):
        def messages():
            begun.wait()
            release.wait()
            yield b""

        with pytest.raises(ProtocolError):
            client.send_upload(messages())

    with ThreadPoolExecutor(2) as executor:
        held = [executor.submit(hold_open, connect(receiver.address)) for _ in range(2)]
        begun.wait()
        while receiver.metric("running_calls", method="Upload") < 2:
            pass
        with pytest.raises(QuotaExceeded, match="'north' has 2 calls running"):
            connect(receiver.address).describe()
        assert connect(receiver.address, "south").describe().hospital == "south"
        release.set()
        for each in held:
            each.result()
    assert connect(receiver.address).describe().hospital == "north"


def test_an_internal_fault_is_told_without_its_text_and_the_receiver_goes_on(receiver, connect, caplog):
    receiver.registry._connection.execute("ALTER TABLE objects RENAME TO gone")
    client = connect(receiver.address)
    with pytest.raises(TryAgain, match="its log has the cause") as caught:
        client.describe()
    assert "objects" not in str(caught.value)
    assert "no such table" in caplog.text
    receiver.registry._connection.execute("ALTER TABLE gone RENAME TO objects")
    assert client.describe().hospital == "north"


def test_a_mistake_of_the_receiver_is_told_without_its_text(receiver, connect, caplog, monkeypatch):
    def failing():
        raise ValueError("a mistake")

    monkeypatch.setattr(receiver.registry, "policies", failing)
    with pytest.raises(InternalError, match="its log has the cause") as caught:
        connect(receiver.address).describe()
    assert "a mistake" not in str(caught.value)
    assert "a mistake" in caplog.text


def test_a_taken_address_says_so(receiver, authority, tmp_path, small_base):
    settings = make_settings(authority, listen=f"127.0.0.1:{receiver.address.rpartition(':')[2]}")
    with (
        pytest.raises(UsageError, match="cannot be listened on"),
        serve(make_store(tmp_path / "2", small_base), settings),
    ):
        pass


def test_an_old_connection_ends_and_the_next_call_opens_another(start_receiver, small_base, connect):
    receiver = start_receiver(small_base, max_connection_age_seconds=0.2)
    client = connect(receiver.address, patience_seconds=None)
    channel = client._connected()
    ended = threading.Event()

    def watch(state):
        if state is grpc.ChannelConnectivity.IDLE and client._answered:
            ended.set()

    channel.subscribe(watch)
    client.describe()
    ended.wait()
    assert client.describe().hospital == "north"


def test_the_receiver_never_imports_torch():
    code = "import sys, aggregator.receiver; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == os.EX_OK
