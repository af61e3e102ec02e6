"""DataVector as people run it: `python -m datavector ...` in processes of their own, on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from aggregator.main import REGISTRY
from aggregator.registry import SqliteRegistry
from aggregator.resources import DataVector, ModelVersion
from aggregator.store import Store
from datavector.demo.sites import write_toml

ROOT = Path(__file__).parent.parent.parent
PATIENCE_SECONDS = 300.0
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("DATAVECTOR_")},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "200",
}

Found = TypeVar("Found")


def until(look: Callable[[], Found | None], what: str, *, process: Process | None = None) -> Found:
    """Looks again and again until there is something to see; gives up when the process that should cause it ends."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        ended = process is not None and process.ended
        if found := look():
            return found
        if ended:
            break
        time.sleep(0.005)
    raise AssertionError(f"waited in vain for {what}\n{process.output if process else ''}")


class Process:
    """A running `datavector` command; what it prints goes to a file.

    Args:
        arguments: of the command line, after `datavector`.
        log: where standard output and standard error go, together.
        environment: variables beside those of this process.
    """

    def __init__(self, arguments: Sequence[str | Path], log: Path, **environment: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "datavector", *map(str, arguments)]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=ENVIRONMENT | environment, cwd=log.parent, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait_for(self, text: str) -> str:
        """The rest of the line after `text`, once it is printed."""
        return until(lambda: _rest_of_line(self.output, text), f"{text!r}", process=self)[0]

    def wait(self) -> int:
        """The exit code, once it has ended."""
        until(lambda: self.ended, "its end", process=self)
        return self._process.returncode

    def succeed(self) -> str:
        """What it printed, once it has ended well."""
        code = self.wait()
        assert code == 0, f"ended with {code}:\n{self.output}"
        return self.output

    def kill(self) -> None:
        """kill -9 of this process alone."""
        self._process.kill()
        self._process.wait()

    def clear(self) -> None:
        """Ends it and whatever it has started, if they still run."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def work_on(self, seconds: float) -> None:
        """Waits until it has computed for as long again."""
        goal = cpu_seconds(self.pid) + seconds
        until(lambda: self.ended or cpu_seconds(self.pid) >= goal, f"{seconds} CPU-s more", process=self)


@dataclass
class Aggregator:
    """A running aggregator and its store."""

    process: Process
    store: Store
    address: str

    def vectors(self) -> list[DataVector]:
        return self._read(SqliteRegistry.vectors)

    def versions(self) -> dict[str, ModelVersion]:
        return {version.name: version for version in self._read(SqliteRegistry.versions)}

    def wait_for(self, phase: str, *hospitals: str) -> ModelVersion:
        """The version of exactly these hospitals, once it is in that phase."""

        def look() -> ModelVersion | None:
            for version in self.versions().values():
                if version.hospitals == tuple(sorted(hospitals)):
                    assert version.status.phase.value != "Failed", version.status.message
                    if version.status.phase.value == phase:
                        return version
            return None

        return until(look, f"{phase} for {', '.join(hospitals)}", process=self.process)

    def job(self, stage: str) -> int:
        """The process that runs a stage of a version's job, once there is one."""

        def look() -> int | None:
            return next((pid for pid in children(self.process.pid) if stage in command_line(pid)), None)

        return until(look, f"a {stage} job", process=self.process)

    def _read(self, ask: Callable[[SqliteRegistry], Found]) -> Found:
        registry = SqliteRegistry(self.store.root / REGISTRY)
        try:
            return ask(registry)
        finally:
            registry.close()


@dataclass
class Site:
    """Everything that one story has on disk, and what runs of it.

    Attributes:
        folder: `<hospital>/state`, `aggregator/store`, configuration files and logs.
        certificates: what `datavector certs` wrote.
        data: the hospitals' images, `<hospital>/<class>/*.png`.
        running: ends every process that was started.
    """

    folder: Path
    certificates: Path
    base: Path
    data: Path
    training: Mapping[str, Any]
    running: ExitStack

    def start(self, *arguments: str | Path, log: str) -> Process:
        """Starts a command that is killed at the story's end, if it still runs then."""
        process = Process(arguments, self.folder / f"{log}.log")
        self.running.callback(process.clear)
        return process

    def aggregator(self, policy: Mapping[str, Any], *, name: str = "aggregator", port: int = 0) -> Aggregator:
        """Starts an aggregator (again, on the same store) with one policy, whose `spec` is given."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "policy.yaml").write_text(policy_file(policy))
        write_toml(
            folder / "aggregator.toml",
            {
                "store": folder / "store",
                "policy": folder / "policy.yaml",
                "base": self.base,
                "listen": f"127.0.0.1:{port}",
                "tls": self._tls("aggregator") | {"deny_list": self.folder / "denied"},
                "limits": {"poll_seconds": 1},
            },
        )
        (self.folder / "denied").touch()
        process = self.start("aggregator", "--config", folder / "aggregator.toml", log=name)
        return Aggregator(process, Store(folder / "store"), process.wait_for("listening on ").split()[0])

    def config(self, hospital: str, address: str, **changes: Any) -> Path:
        """Writes a hospital's agent.toml."""
        path = self.folder / hospital / "agent.toml"
        settings = {
            "hospital": hospital,
            "aggregator": address,
            "state": self.folder / hospital / "state",
            "tls": self._tls(hospital),
            "data": {"path": self.data / hospital},
            "training": self.training,
        }
        write_toml(path, settings | changes)
        return path

    def agent(self, hospital: str, address: str, *flags: str | Path, **changes: Any) -> Process:
        """Starts a hospital's agent."""
        config = self.config(hospital, address, **changes)
        return self.start("agent", "--config", config, *flags, log=f"{hospital}-agent")

    def run(self, hospital: str, *command: str | Path) -> Process:
        """Runs another command of a hospital with its configuration, to its end."""
        config = self.folder / hospital / "agent.toml"
        process = self.start(*command, "--config", config, log=f"{hospital}-{command[0]}")
        process.wait()
        return process

    def _tls(self, name: str) -> dict[str, Path]:
        return {
            "certificate": self.certificates / f"{name}.crt",
            "key": self.certificates / f"{name}.key",
            "ca": self.certificates / "ca.crt",
        }


def policy_file(spec: Mapping[str, Any], name: str = "trial") -> str:
    """The YAML text of a MergePolicy."""
    return yaml.safe_dump(
        {
            "apiVersion": "datavector.dev/v1alpha1",
            "kind": "MergePolicy",
            "metadata": {"name": name},
            "spec": dict(spec),
        }
    )


def free_port() -> int:
    """A port of loopback on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# --- Processes of this machine, from /proc ----------------------------------------------------------------------


def running() -> Iterator[int]:
    """All processes."""
    return (int(path.name) for path in Path("/proc").glob("[0-9]*"))


def children(parent: int) -> Iterator[int]:
    """The processes that a process has started."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == parent:
            yield int(path.parent.name)


def command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far; infinite for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rest_of_line(text: str, begin: str) -> list[str]:
    """What follows `begin` up to the end of its line, in a list; an empty list where it is not there in full."""
    _, found, rest = text.partition(begin)
    line, newline, _ = rest.partition("\n")
    return [line] if found and newline else []
