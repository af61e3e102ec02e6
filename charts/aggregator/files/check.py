"""`helm test`: the receiver's certificate fits a name that hospitals dial, and both processes show their metrics."""

import json
import os
import socket
import ssl
import sys
import time
import urllib.request

SECONDS = 10
PATIENCE = float(os.environ.get("CHECK_PATIENCE", "30"))  # seconds: a Service's way to a new Pod may take some
PROCESSES = ("receiver", "operator")


def certificate(host: str, port: int, names: list[str], authority: str) -> str:
    """A TLS handshake with the Service, in which the certificate must be of the authority, for one of the names."""
    problem = ""
    for name in names:
        context = ssl.create_default_context(cafile=authority)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["h2"])
        try:
            with socket.create_connection((host, port), SECONDS) as link:
                context.wrap_socket(link, server_hostname=name).close()
        except ssl.SSLCertVerificationError as error:
            problem = error.verify_message
        except OSError as error:
            raise ValueError(f"{host}:{port} does not answer ({error}); is the receiver ready?") from error
        else:
            return f"fits {name}, and the authority in {authority}"
    raise ValueError(
        f"{problem}\n      have the certificate issued for the name that hospitals dial, by the authority of ca.crt; "
        "if that is another name, set the value tls.serverName to it"
    )


def metrics(name: str, port: int, process: str) -> str:
    """One of the processes behind the name shows this one's metrics."""
    try:
        addresses = sorted({each[4][0] for each in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)})
    except OSError as error:
        raise ValueError(f"{name} has no address ({error}); is any Pod of the release running?") from error
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for address in addresses:
        host = f"[{address}]" if ":" in address else address
        try:
            with direct.open(f"http://{host}:{port}/metrics", timeout=SECONDS) as answer:
                if f"datavector_{process}_" in answer.read().decode():
                    return f"at {host}:{port}"
        except OSError:
            continue  # the other process may be at the next address
    raise ValueError(f"nobody at {', '.join(addresses)}, port {port}, shows them; is the {process} running?")


def patiently(check, deadline: float) -> str:
    """Tries a check again and again until a time."""
    while True:
        try:
            return check()
        except (OSError, ValueError):
            if time.monotonic() >= deadline:
                raise
            time.sleep(1)


def main() -> int:
    deadline = time.monotonic() + PATIENCE
    settings = json.loads(os.environ["CHECK"])
    checks = {"certificate": lambda: certificate(**settings["exchange"])}
    for process in PROCESSES:
        checks[f"{process}'s metrics"] = lambda process=process: metrics(**settings["metrics"], process=process)
    failed = False
    for name, check in checks.items():
        try:
            print(f"ok    {name:<20} {patiently(check, deadline)}", flush=True)
        except (OSError, ValueError) as error:
            failed = True
            print(f"FAIL  {name:<20} {error}", flush=True)
    print("not ready: see above" if failed else "ready")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
