"""The way out of the building: directly, or through the HTTP proxy that the environment names."""

from __future__ import annotations

import socket
from base64 import b64encode
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from ipaddress import ip_address, ip_network
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from datavector.errors import UsageError


def find_proxy(address: str) -> str | None:
    """The proxy through which host:port is dialled, as the environment says; None where it is dialled directly.

    The first of grpc_proxy, https_proxy and http_proxy counts, but neither for loopback addresses nor for what no_proxy
    lists: names, domains, addresses, networks, or "*".

    Returns:
        http://[user:password@]host:port

    Raises:
        UsageError: it is no such URL.
    """
    host, _ = split_address(address)
    proxies = getproxies_environment()
    proxy = proxies.get("grpc") or proxies.get("https") or proxies.get("http")
    no_proxy = proxies.get("no", "")
    if not proxy or _is_loopback(host) or proxy_bypass_environment(address, proxies) or _is_within(host, no_proxy):
        return None
    with suppress(ValueError):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if parts.scheme == "http" and parts.hostname:
            return f"http://{parts.netloc}" if parts.port else f"http://{parts.netloc}:80"
    raise UsageError(
        f"the proxy in the environment, {proxy.rpartition('@')[2]!r}, cannot be used",
        remedy="set https_proxy to http://[user:password@]host:port, or no_proxy to the aggregator's name",
    )


def dial(address: str, proxy: str | None, *, timeout: float) -> socket.socket:
    """A TCP connection to host:port, by a proxy's CONNECT where one is given.

    Raises:
        OSError: nobody answers, or the proxy refuses.
    """
    host, port = split_address(address)
    if proxy is None:
        return socket.create_connection((host, port), timeout)
    parts = urlsplit(proxy)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    connection.set_tunnel(host, port, headers=_credentials(parts))
    try:
        connection.connect()
    except HTTPException as error:
        connection.close()
        raise OSError(f"the proxy does not answer as one ({error})") from error
    except OSError:
        connection.close()
        raise
    return connection.sock


def split_address(address: str) -> tuple[str, int]:
    """Host and port of host:port; an IPv6 address loses its brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _credentials(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(pair.encode()).decode()}"}


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def _is_within(host: str, no_proxy: str) -> bool:
    """Whether no_proxy lists a network that an address is in: gRPC reads it so, Python's own function does not."""
    for entry in no_proxy.split(","):
        with suppress(ValueError):
            if ip_address(host) in ip_network(entry.strip(), strict=False):
                return True
    return False
