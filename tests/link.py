"""A TCP proxy in this process that can be cut, refused, reset, stalled and hung up: a hospital's bad link."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from pathlib import Path
from typing import Literal

Mode = Literal["open", "refuse", "reset", "freeze"]

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Link:
    """Forwards connections to `target` (host:port) from `address`.

    Attributes:
        sent: bytes forwarded towards the target so far.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._lock = threading.Lock()
        self._mode: Mode = "open"
        self._open: set[socket.socket] = set()
        self._frozen: set[socket.socket] = set()
        self._cut_at: int | None = None
        self._then: Mode = "open"
        self._hang_ups = 0
        self._tls: ssl.SSLContext | None = None
        self.sent = 0
        self.was_cut = threading.Event()
        self._listener = self._listen(0)
        self.address = f"localhost:{self._listener.getsockname()[1]}"

    def cut_at(self, sent: int, *, then: Mode) -> None:
        """Cuts once `sent` bytes have been forwarded in all, and behaves as `then` from there on."""
        self._cut_at, self._then = sent, then

    def hang_up(self, times: int, certificates: Path, *, then: Mode = "open") -> None:
        """Ends the next connections right after a TLS handshake as the aggregator, then behaves as `then`."""
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificates / "aggregator.crt", certificates / "aggregator.key")
        self._tls.load_verify_locations(certificates / "ca.crt")
        self._tls.verify_mode = ssl.CERT_REQUIRED
        self._tls.set_alpn_protocols(["h2"])
        self._hang_ups, self._then = times, then

    def set(self, mode: Mode) -> None:
        """open: forwards. refuse: nobody listens. reset: accepts, then resets. All three cut what is connected.

        freeze: what is connected stays so but carries nothing more, as behind a firewall that forgot it; what connects
        from now on is forwarded.
        """
        with self._lock:
            self._mode = mode
            if mode == "freeze":
                self._frozen |= self._open
            else:
                self._drop()
            if mode == "refuse" and self._listener.fileno() >= 0:
                self._close_listener()
            if mode != "refuse" and self._listener.fileno() < 0:
                self._listener = self._listen(int(self.address.rpartition(":")[2]))

    def close(self) -> None:
        with self._lock:
            self._close_listener()
            self._drop()

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), backlog=16)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _close_listener(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                if self._mode == "reset":
                    _reset(near)
                    continue
                if self._tls and self._hang_ups:
                    with contextlib.suppress(OSError), self._tls.wrap_socket(near, server_side=True):
                        self._hang_ups -= 1
                    if not self._hang_ups:
                        self.set(self._then)
                    continue
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    _reset(near)
                    continue
                with self._lock:
                    self._open |= {near, far}
                threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if upwards and self._cut_at is not None and self.sent + len(data) > self._cut_at:
                    self._cut_at = None
                    self.set(self._then)
                    self.was_cut.set()
                if source in self._frozen:
                    return
                sink.sendall(data)
                self.sent += len(data) if upwards else 0
        if source not in self._frozen:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

    def _drop(self) -> None:
        for end in self._open:
            _reset(end)
        self._open.clear()


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
