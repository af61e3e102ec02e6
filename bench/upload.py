"""Uploads: cost against Python's ssl, memory of the receiver, and what a cut link costs."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from agent.client import Client, Credentials
from agent.ledger import Ledger
from agent.upload import upload
from datavector.model import BaseModel
from datavector.wire.certs import init_authority, issue_aggregator, issue_hospital
from datavector.wire.chunks import CHUNK
from tests.link import Link, Mode
from tests.serving import ROOT, announce, make_base, make_store, start_process, write_tau

SIZE = 350 << 20
CUT_AT = 200 << 20
OUTAGE_SECONDS = 10
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        bench.against_ssl()
        for outage, words in (("refuse", "refused"), ("reset", "accepted, then reset")):
            bench.cut(outage, words)


class Bench:
    """A vector of 350 MiB, certificates, and a fresh receiver process for every measurement."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificates = folder / "certificates"
        init_authority(self.certificates)
        issue_aggregator(self.certificates, server_names=["localhost"])
        issue_hospital(self.certificates, "north")
        self.base: BaseModel = make_base(folder / "base", elements=SIZE // 4)
        self.vector = write_tau(folder / "vector", self.base)
        self.info = announce(self.vector, self.base)

    def against_ssl(self) -> None:
        """One upload, and the same bytes over Python's ssl, each three times in turn; the cheapest of each counts."""
        plain, stored, ours, peaks = [], [], [], []
        for turn in range(3):
            plain.append(self._over_ssl())
            stored.append(self._over_ssl(store=self.folder / "stored"))
            cost, peak = self._over_grpc(f"store-{turn}")
            ours.append(cost)
            peaks.append(peak)
        gib, (cpu, wall) = SIZE / 2**30, min(ours)
        print(
            f"{'350 MiB over loopback, mutual TLS 1.3':<44}{'CPU-s per GiB':>14}{'ratio':>7}{'wall s':>8}{'ratio':>7}"
        )
        for name, (base_cpu, base_wall) in (
            ("Python ssl", min(plain)),
            ("Python ssl, SHA-256, file, fsync", min(stored)),
            ("upload (checked, committed)", (cpu, wall)),
        ):
            print(f"{name:<44}{base_cpu / gib:>14.2f}{cpu / base_cpu:>7.2f}{base_wall:>8.2f}{wall / base_wall:>7.2f}")
        print(f"receiver peak RSS {max(peaks) / 1024:.0f} MiB")

    def cut(self, outage: Mode, words: str) -> None:
        """One upload whose link is cut at 200 MiB and comes back ten seconds later."""
        store = make_store(self.folder / f"store-{outage}", self.base)
        process, address = start_process(store.root, self.certificates)
        link = Link(address)
        link.cut_at(CUT_AT, then=outage)
        back: list[float] = []

        def come_back() -> None:
            link.was_cut.wait()
            time.sleep(OUTAGE_SECONDS)
            link.set("open")
            back.append(time.monotonic())

        threading.Thread(target=come_back, daemon=True).start()
        handed = self._upload(link.address, outage)
        seconds = time.monotonic() - back[0]
        process.kill()
        process.wait()
        link.close()
        stored = store.blob("north", self.info.sha256).stat().st_size
        print(
            f"cut at 200 MiB, {words + ' for 10 s:':<30} {(handed - stored) / CHUNK:.1f} chunks handed over again, "
            f"{(link.sent - stored) / CHUNK:.1f} MiB more on the wire, done {seconds:.1f} s after the link came back"
        )

    def _over_grpc(self, store: str) -> tuple[tuple[float, float], int]:
        """CPU and wall seconds of one upload, and the receiver's peak RSS in KiB."""
        process, address = start_process(make_store(self.folder / store, self.base).root, self.certificates)
        cost = _cost(process.pid, lambda: self._upload(address, store))
        peak = int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[0])
        process.kill()
        process.wait()
        for path in (self.folder / store / "blobs").rglob("*"):
            if path.is_file():
                path.unlink()
        return cost, peak

    def _upload(self, address: str, name: str) -> int:
        """Uploads, and returns the bytes that were handed to gRPC."""
        credentials = Credentials(*(self.certificates / file for file in ("north.crt", "north.key", "ca.crt")))
        handed = [0, 0]

        def count(done: int, _total: int) -> None:
            handed[0] += CHUNK if done > handed[1] + CHUNK or done <= handed[1] else done - handed[1]
            handed[1] = done

        with Client(address, credentials, ledger=Ledger(self.folder / f"{name}.jsonl")) as client:
            upload(client, self.vector, self.info, on_progress=count)
        return handed[0]

    def _over_ssl(self, *, store: Path | None = None) -> tuple[float, float]:
        """CPU and wall seconds of the same bytes over mutual TLS 1.3; hashed and stored, or dropped."""
        sink = subprocess.Popen(
            [sys.executable, "-m", "bench.upload", str(self.certificates), *([str(store)] if store else [])],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert sink.stdout
        port = int(sink.stdout.readline())
        context = ssl.create_default_context(cafile=str(self.certificates / "ca.crt"))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.certificates / "north.crt", self.certificates / "north.key")

        def send() -> None:
            with (
                context.wrap_socket(socket.create_connection(("localhost", port)), server_hostname="localhost") as link,
                self.vector.open("rb", buffering=0) as file,
            ):
                while block := file.read(CHUNK):
                    link.sendall(block)
                link.recv(1)

        cost = _cost(sink.pid, send)
        sink.kill()
        sink.wait()
        return cost


def _cost(server: int, work: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of this process and of `server` during `work`, and wall seconds."""
    cpu, wall = time.process_time() + _cpu(server), time.monotonic()
    work()
    return time.process_time() + _cpu(server) - cpu, time.monotonic() - wall


def _cpu(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def _sink(certificates: Path, store: Path | None) -> None:
    """Takes the bytes of one connection, and answers with one byte."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificates / "ca.crt")
    context.load_cert_chain(certificates / "aggregator.crt", certificates / "aggregator.key")
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        (store or Path(os.devnull)).open("wb", buffering=0) as file,
    ):
        print(listener.getsockname()[1], flush=True)
        with context.wrap_socket(listener.accept()[0], server_side=True) as link:
            buffer, taken, digest = memoryview(bytearray(CHUNK)), 0, hashlib.sha256()
            while taken < SIZE and (count := link.recv_into(buffer)):
                taken += count
                if store:
                    digest.update(buffer[:count])
                    file.write(buffer[:count])
            if store:
                os.fsync(file.fileno())
            link.send(b".")
            time.sleep(60)


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    _sink(paths[0], paths[1] if len(paths) > 1 else None) if paths else main()
