"""A container registry on loopback, from Debian's packages, that hands images to the node."""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import yaml

from tests.cluster.build import CannotBuild, cache
from tests.cluster.control_plane import POLL_SECONDS, SECONDS_TO_START
from tests.cluster.processes import Process

ADDRESS = "127.0.0.1:15000"  # the same in every run: clients remember by it which layers a registry has


@contextmanager
def local_registry() -> Iterator[str]:
    """Runs it; its address. What was pushed stays from run to run.

    Raises:
        CannotBuild: it does not start.
    """
    folder = cache() / "registry"
    folder.mkdir(exist_ok=True)
    config = {"version": "0.1", "storage": {"filesystem": {"rootdirectory": str(folder)}}, "http": {"addr": ADDRESS}}
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    process = Process(["docker-registry", "serve", str(folder / "config.yml")], folder / "log")
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not _answers():
            if not process.running or time.monotonic() > deadline:
                raise CannotBuild(f"the registry did not start: {process.tail()}")
            time.sleep(POLL_SECONDS)
        yield ADDRESS
    finally:
        process.end()
        collect = ["docker-registry", "garbage-collect", "--delete-untagged", str(folder / "config.yml")]
        subprocess.run(collect, check=True, capture_output=True)  # what newer images have replaced


def _answers() -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://{ADDRESS}/v2/", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
