"""Out of the building through an HTTP proxy, and past it."""

from __future__ import annotations

import shutil
from base64 import b64encode

import pytest

from agent import site
from agent.proxy import dial, find_proxy
from agent.settings import AgentSettings, Tls
from agent.upload import upload
from datavector.errors import Unreachable, UsageError
from datavector.wire.certs import issue_aggregator
from tests.serving import announce, write_tau
from tests.tunnel import Tunnel

OUTSIDE = "merge.example:8443"  # no name server knows it: only the tunnel leads there


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Sets the environment's proxies, and nothing else: `environment(https_proxy=...)`."""
    names = ("grpc_proxy", "https_proxy", "http_proxy", "no_proxy", "no_grpc_proxy")
    for name in (*names, *map(str.upper, names)):
        monkeypatch.delenv(name, raising=False)

    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.fixture
def outside(start_receiver, small_base, authority, tmp_path):
    """An aggregator whose certificate names OUTSIDE."""
    shutil.copytree(authority, tmp_path / "certificates")
    issue_aggregator(tmp_path / "certificates", server_names=["merge.example"])
    files = {
        "certificate": tmp_path / "certificates" / "aggregator.crt",
        "key": tmp_path / "certificates" / "aggregator.key",
    }
    return start_receiver(small_base, **files)


@pytest.fixture
def tunnel():
    """Makes tunnels: `tunnel(target, credentials=...)`."""
    tunnels = []

    def make(target, **options):
        tunnels.append(Tunnel(target, **options))
        return tunnels[-1]

    yield make
    for each in tunnels:
        each.close()


def settings_of(authority, address, state):
    tls = Tls(certificate=authority / "north.crt", key=authority / "north.key", ca=authority / "ca.crt")
    return AgentSettings(hospital="north", aggregator=address, state=state, tls=tls)


def test_a_vector_leaves_through_the_only_way_out(outside, tunnel, connect, small_base, tmp_path):
    secret = "Basic " + b64encode(b"north:p@ss").decode()
    way = tunnel(outside.address, credentials=secret)
    client = connect(OUTSIDE, proxy=way.url.replace("http://", "http://north:p%40ss@"))
    path = write_tau(tmp_path / "tau", small_base)
    upload(client, path, announce(path, small_base))
    assert [vector.spec.hospital for vector in outside.registry.vectors()] == ["north"]
    assert len(way.asked) >= 2  # gRPC, and the handshake that asks who the server is
    assert set(way.asked) == {OUTSIDE}


def test_an_agent_takes_the_proxy_of_its_environment(outside, tunnel, authority, tmp_path, environment):
    way = tunnel(outside.address)
    environment(https_proxy=way.url)
    with site.connect(settings_of(authority, OUTSIDE, tmp_path), patience_seconds=0) as client:
        assert client.describe().hospital == "north"
        assert client.server_identity() == "spiffe://datavector.local/aggregator"
    assert set(way.asked) == {OUTSIDE}


def test_an_aggregator_on_this_machine_is_dialled_past_any_proxy(receiver, authority, tmp_path, environment):
    environment(https_proxy="http://127.0.0.1:1", http_proxy="http://127.0.0.1:1")
    with site.connect(settings_of(authority, receiver.address, tmp_path), patience_seconds=0) as client:
        assert client.describe().hospital == "north"
        assert client.server_identity()


def test_a_proxy_that_refuses_is_named_as_the_reason(outside, tunnel, connect):
    way = tunnel(outside.address, credentials="Basic other")
    with pytest.raises(Unreachable, match=r"merge\.example:8443 is not reachable \(Tunnel connection failed: 407"):
        connect(OUTSIDE, proxy=way.url).server_identity()


def test_a_proxy_that_is_none_is_named_as_the_reason(receiver):
    with pytest.raises(OSError, match="the proxy does not answer as one"):
        dial(OUTSIDE, f"http://{receiver.address}", timeout=5)


@pytest.mark.parametrize(
    ("variables", "proxy"),
    [
        ({}, None),
        ({"https_proxy": "http://out:3128", "http_proxy": "http://other:3128"}, "http://out:3128"),
        ({"http_proxy": "http://out:3128"}, "http://out:3128"),
        ({"HTTPS_PROXY": "http://out:3128/"}, "http://out:3128"),
        ({"grpc_proxy": "http://out:3128", "https_proxy": "http://other:3128"}, "http://out:3128"),
        ({"https_proxy": "out:3128"}, "http://out:3128"),
        ({"https_proxy": "http://out"}, "http://out:80"),
        ({"https_proxy": "http://a:b@out:3128"}, "http://a:b@out:3128"),
        ({"https_proxy": ""}, None),
    ],
)
def test_the_environment_names_the_proxy(environment, variables, proxy):
    environment(**variables)
    assert find_proxy(OUTSIDE) == proxy


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:1", "127.8.8.8:1", "[::1]:1"])
def test_loopback_has_no_proxy(environment, address):
    environment(https_proxy="http://out:3128")
    assert find_proxy(address) is None


@pytest.mark.parametrize(
    ("address", "no_proxy"),
    [
        (OUTSIDE, "merge.example"),
        (OUTSIDE, "other.org, .example"),
        (OUTSIDE, "*"),
        ("10.1.2.3:8443", "10.1.2.3"),
        ("10.1.2.3:8443", "192.168.0.0/16,10.0.0.0/8"),
        ("[fd00::7]:8443", "fd00::/8"),
    ],
)
def test_what_no_proxy_lists_has_none(environment, address, no_proxy):
    environment(https_proxy="http://out:3128")
    assert find_proxy(address) == "http://out:3128"
    environment(no_proxy=no_proxy)
    assert find_proxy(address) is None


@pytest.mark.parametrize("proxy", ["https://me:secret@out:3128", "socks5://out:1080", "http://out:port", "http://"])
def test_a_proxy_that_cannot_be_used_is_told_without_its_password(environment, proxy):
    environment(https_proxy=proxy)
    with pytest.raises(UsageError, match=r"set https_proxy to http://\[user:password@\]host:port") as caught:
        find_proxy(OUTSIDE)
    assert "secret" not in str(caught.value)
