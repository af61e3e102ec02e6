"""An HTTP proxy in this process that makes tunnels (CONNECT) and nothing else: a hospital's only way out."""

from __future__ import annotations

import contextlib
import socket
import threading
from socketserver import StreamRequestHandler, ThreadingTCPServer


class Tunnel(ThreadingTCPServer):
    """Connects whoever asks for whatever host to `target` (host:port); `url` leads to it.

    Args:
        credentials: what `Proxy-Authorization` must say.
    Attributes:
        asked: the host:port of each CONNECT.
    """

    daemon_threads = True

    def __init__(self, target: str, *, credentials: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        host, _, port = target.rpartition(":")
        self.target = host, int(port)
        self.credentials = credentials
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Connection(StreamRequestHandler):
    rbufsize = 0  # what follows the request is the tunnel's
    server: Tunnel

    def handle(self) -> None:
        method, address, _ = self.rfile.readline().decode().split()
        headers = dict(line.split(": ", 1) for line in iter(lambda: self.rfile.readline().decode().strip(), ""))
        self.server.asked.append(address)
        if method != "CONNECT" or headers.get("Proxy-Authorization", "") != self.server.credentials:
            self.wfile.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            return
        with socket.create_connection(self.server.target) as far:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_pump, args=(far, self.connection), daemon=True)
            back.start()
            _pump(self.connection, far)
            back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
