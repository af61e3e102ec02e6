"""The demo's sites: one aggregator and several hospitals, each a process of its own, as they are in real life."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datavector.errors import SiteFailed

LISTENING = "listening on "
START_SECONDS = 120


class Sites:
    """Starts the demo's processes; what they print goes to `folder`/<name>.log."""

    def __init__(self, folder: Path, certificates: Path) -> None:
        self.folder = folder
        self.certificates = certificates
        self.address = ""

    @contextmanager
    def aggregator(self, base: Path, policy: Mapping[str, Any]) -> Iterator[Path]:
        """Runs the embedded aggregator on a free loopback port; yields its store."""
        folder = self.folder / "aggregator"
        folder.mkdir(parents=True, exist_ok=True)
        # JSON is YAML: the policy file needs no other writer.
        (folder / "policy.yaml").write_text(json.dumps(policy, indent=2))
        write_toml(
            folder / "aggregator.toml",
            {
                "store": folder / "store",
                "policy": folder / "policy.yaml",
                "base": base,
                "listen": "127.0.0.1:0",
                "tls": self._tls("aggregator"),
                "limits": {"poll_seconds": 1},
            },
        )
        log = self.folder / "aggregator.log"
        arguments = ["aggregator", "--config", str(folder / "aggregator.toml")]
        with log.open("w") as output:
            process = subprocess.Popen([*_COMMAND, *arguments], stdout=output, stderr=subprocess.STDOUT)
        try:
            self.address = _wait_for_address(process, log)
            yield folder / "store"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def write_agent(self, hospital: str, data: Path, training: Mapping[str, Any]) -> Path:
        """Writes a hospital's agent.toml."""
        path = self.folder / hospital / "agent.toml"
        write_toml(
            path,
            {
                "hospital": hospital,
                "aggregator": self.address,
                "state": path.parent / "state",
                "tls": self._tls(hospital),
                "data": {"path": data},
                "training": dict(training),
            },
        )
        return path

    def agent(self, hospital: str, *flags: str) -> None:
        """Runs a hospital's agent until it leaves."""
        self.run(hospital, "agent", *flags)

    def run(self, hospital: str, *command: str) -> None:
        """Runs a command of a hospital with its configuration.

        Raises:
            SiteFailed: it ended with an error.
        """
        config = self.folder / hospital / "agent.toml"
        log = self.folder / f"{hospital}.log"
        arguments = [*_COMMAND, *command, "--config", str(config)]
        with log.open("a") as output:
            done = subprocess.run(arguments, stdout=output, stderr=subprocess.STDOUT, check=False)
        if done.returncode != 0:
            last = " ".join(log.read_text().strip().splitlines()[-3:])
            raise SiteFailed(f"{hospital}: `{' '.join(command)}` failed: {last}", remedy=f"see {log}")

    def _tls(self, name: str) -> dict[str, Path]:
        return {
            "certificate": self.certificates / f"{name}.crt",
            "key": self.certificates / f"{name}.key",
            "ca": self.certificates / "ca.crt",
        }


_COMMAND = (sys.executable, "-m", "datavector")


def write_toml(path: Path, content: Mapping[str, Any]) -> None:
    """Writes settings with at most one level of tables. A JSON text or number is also a TOML one."""
    plain = [f"{key} = {_toml(value)}" for key, value in content.items() if not isinstance(value, Mapping)]
    for key, table in content.items():
        if isinstance(table, Mapping):
            plain += ["", f"[{key}]", *(f"{name} = {_toml(value)}" for name, value in table.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(plain) + "\n")


def _toml(value: Any) -> str:
    return json.dumps(str(value.resolve()) if isinstance(value, Path) else value, ensure_ascii=False)


def _wait_for_address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if LISTENING in line:
                return line.partition(LISTENING)[2].split()[0]
        time.sleep(0.05)
    last = log.read_text().strip().splitlines()[-3:]
    raise SiteFailed(f"the aggregator did not start: {' '.join(last)}", remedy=f"see {log}")
