"""A Pod's container as a process of this machine: its paths are local folders, its log a file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.cluster.status import Object, now

PROJECT = Path(__file__).parents[2]
MESSAGE_BYTES = 4096


class NoSuchVolume(Exception):
    """A Pod mounts a claim that the test gave no folder for, or a kind of volume that is not known here."""


class Container:
    """The process of a Pod's first container, started when this is made.

    A mount path, and the path of the termination log, are replaced by local paths in the command, the arguments and
    the environment. A command that begins with "python" runs this Python with the project on its path.

    Attributes:
        pod, uid: the Pod's.
        started_at: as Kubernetes writes times.
        log: what it prints.
    """

    def __init__(
        self,
        pod: Object,
        folder: Path,
        *,
        volumes: Mapping[str, Path],
        entrypoint: Sequence[str],
        modules: Mapping[str, str] | None = None,
    ) -> None:
        """Raises:
        NoSuchVolume: a volume has no local folder.
        OSError: the command cannot be run.
        """
        spec = pod["spec"]["containers"][0]
        self.pod: str = pod["metadata"]["name"]
        self.uid: str = pod["metadata"]["uid"]
        self._folder = folder / pod["metadata"]["namespace"] / f"{self.pod}-{self.uid[:8]}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.log = self._folder / "log"
        self._termination_log = self._folder / "termination-log"
        self._signalled: set[int] = set()
        self._lock = threading.Lock()

        mounts = self._mounts(pod, volumes)
        temporary = mounts.get("/tmp") or _made(self._folder / "tmp")
        paths = {**mounts, spec.get("terminationMessagePath", "/dev/termination-log"): self._termination_log}
        command = [_local(each, paths) for each in (*spec.get("command", entrypoint), *spec.get("args", []))]
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(temporary),
            "TMPDIR": str(temporary),
            "PYTHONPATH": str(PROJECT),
        }
        environment |= {each["name"]: _local(_value(each, pod), paths) for each in spec.get("env", [])}
        if command and re.fullmatch(r"python[\d.]*", command[0]):
            command[0] = sys.executable
            command = [(modules or {}).get(each, each) for each in command]
        if not command:
            raise OSError("the Pod names no command, and no entrypoint is known for its image")
        self.started_at = now()
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=temporary,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """As a container's: 128 + the signal that ended it. None while it runs."""
        with self._lock:
            code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def send(self, sig: int, *, once: bool = False) -> None:
        """Signals the process and its children; with `once` only if it has not had this signal."""
        with self._lock:
            if not (once and sig in self._signalled) and self._process.poll() is None:
                self._signalled.add(sig)
                os.killpg(self._process.pid, sig)

    def kill(self) -> None:
        """Kills it and waits for its end."""
        self.send(signal.SIGKILL)
        self._process.wait()

    def message(self, *, from_log: bool) -> str:
        """What it left as its termination message; with `from_log` the end of its log, if it left none."""
        left = self._termination_log.read_bytes() if self._termination_log.exists() else b""
        if not left and from_log:
            left = self.log.read_bytes()[-MESSAGE_BYTES // 2 :]
        return left[:MESSAGE_BYTES].decode(errors="replace")

    def _mounts(self, pod: Object, volumes: Mapping[str, Path]) -> dict[str, Path]:
        """The local folder of each mount path."""
        sources = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        found = {}
        for mount in pod["spec"]["containers"][0].get("volumeMounts", []):
            local = self._local_folder(sources[mount["name"]], volumes)
            if local:
                found[mount["mountPath"].rstrip("/")] = local / mount.get("subPath", "")
        return found

    def _local_folder(self, volume: Object, volumes: Mapping[str, Path]) -> Path | None:
        if "persistentVolumeClaim" in volume:
            claim = volume["persistentVolumeClaim"]["claimName"]
            if claim not in volumes:
                raise NoSuchVolume(f'persistentvolumeclaim "{claim}" not found')
            return volumes[claim]
        if "emptyDir" in volume:
            return _made(self._folder / "volumes" / volume["name"])
        if "projected" in volume:
            return None  # the service account's token: no process here asks for it
        raise NoSuchVolume(f'volume "{volume["name"]}" is of a kind that is not known here')


def _local(text: str, paths: Mapping[str, Path]) -> str:
    """Replaces container paths, and paths below them, by local ones; in one pass, for local paths may look alike."""
    longest_first = "|".join(re.escape(path) for path in sorted(paths, key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])(?:{longest_first})(?![\w.-])", lambda found: str(paths[found[0]]), text)


def _value(variable: Object, pod: Object) -> str:
    """A variable's value, from the Pod's own name, namespace or uid where it says so."""
    field = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
    if field.startswith("metadata."):
        return str(pod["metadata"][field.removeprefix("metadata.")])
    return str(variable.get("value", ""))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
