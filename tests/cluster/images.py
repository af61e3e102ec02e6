"""Builds container images from this repository's Dockerfiles: with Docker where its engine runs, else with buildah.

Without a registry the Dockerfiles' base image is made from Debian's packages, under a name of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datavector.files import locked
from tests.cluster.build import CannotBuild, cache
from tests.cluster.node import Node
from tests.cluster.registry import local_registry

PROJECT = Path(__file__).parents[2]
BASE = "docker.io/library/python:3.11-slim-bookworm"
MADE_HERE = "localhost/python:3.11-slim-bookworm"

# What a package client needs to know of this machine, lent to the build and never copied into an image.
_CLIENT_SETTINGS = ("/etc/ssl/certs", "/usr/local/share/ca-certificates", "/etc/pip.conf")
_LEFT_OUT = ("var/cache/apt", "var/lib/apt/lists", *(f"usr/share/{each}" for each in ("doc", "man", "info", "locale")))
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_INDEXES = {"PACKAGE_INDEX": ("UV_DEFAULT_INDEX", "PIP_INDEX_URL"), "TORCH_INDEX": ("TORCH_INDEX",)}


class BuildFailed(Exception):
    """A program that builds or moves images failed: no reason to skip tests, but to fail."""


@dataclass(frozen=True)
class Image:
    """An image, by the Dockerfile and the stage that it is built from.

    Attributes:
        folder: the context of the build, below the project.
    """

    name: str
    dockerfile: str
    target: str = ""
    folder: str = "."

    @property
    def tag(self) -> str:
        return f"localhost/{self.name}:0.1.0"


CONTROL = Image("datavector-control", "Dockerfile.aggregator", "control")
JOB = Image("datavector-job", "Dockerfile.aggregator", "job")
AGENT = Image("datavector-agent", "Dockerfile.agent", "agent")
CLIENT = Image("inference-client", "Dockerfile", folder="tests/e2e/client")
IMAGES = (CONTROL, JOB, AGENT, CLIENT)


def docker_runs() -> bool:
    """Whether there is a Docker engine."""
    return bool(shutil.which("docker")) and subprocess.run(["docker", "info"], capture_output=True).returncode == 0


def build_images(images: Sequence[Image] = IMAGES) -> None:
    """Builds what has changed.

    Raises:
        CannotBuild: neither Docker nor buildah is here.
        BuildFailed: a build failed.
    """
    build = _docker if docker_runs() else _buildah
    with locked(cache() / "images.lock"):
        for image in images:
            build(image)


def load_into_node(node: Node, images: Sequence[Image] = IMAGES) -> None:
    """Brings what buildah has built to a node that does not have it; layers that it has are not sent again."""
    record = cache() / "containerd" / "images.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    inspect = ("buildah", "inspect", "--format", "{{.FromImageID}}")
    built = {image.tag: _run(*inspect, image.tag).strip() for image in images}
    there = node.ctr("images", "ls", "-q").split()
    wanted = [tag for tag, digest in built.items() if tag not in there or known.get(tag) != digest]
    if wanted:
        with local_registry() as registry:
            for tag in wanted:
                pulled = f"{registry}/{tag.partition('/')[2]}"
                _run("buildah", "push", "--quiet", "--tls-verify=false", tag, f"docker://{pulled}")
                node.ctr("images", "pull", "--plain-http", pulled)
                node.ctr("images", "tag", "--force", pulled, tag)
    record.write_text(json.dumps(built))


def load_into_kind(name: str, images: Sequence[Image] = IMAGES) -> None:
    """Brings what Docker has built to a kind cluster."""
    _run("kind", "load", "docker-image", "--name", name, *(image.tag for image in images))


def size(image: Image) -> str:
    """Of an image's layers, uncompressed, for a person."""
    program = "docker" if docker_runs() else "buildah"
    return _run(program, "images", "--format", "{{.Size}}", image.tag).strip()


# --- Builders


def _docker(image: Image) -> None:
    _run(
        "docker", "build", *_arguments(image), "--tag", image.tag, str(PROJECT / image.folder),
        environment={"DOCKER_BUILDKIT": "1"},
    )  # fmt: skip


def _buildah(image: Image) -> None:
    if not shutil.which("buildah"):
        raise CannotBuild("Images are built with Docker or buildah, and neither runs here.")
    base = _find_base()
    lent = [f"--volume={path}:{path}:ro" for path in _CLIENT_SETTINGS if Path(path).exists()]
    _run(
        "buildah", "build", "--isolation=chroot", "--network=host", "--layers", *lent, *_arguments(image),
        "--build-arg", f"PYTHON={base}",
        "--tag", image.tag, str(PROJECT / image.folder),
    )  # fmt: skip


def _arguments(image: Image) -> list[str]:
    arguments = ["--file", str(PROJECT / image.folder / image.dockerfile)]
    if image.target:
        arguments += ["--target", image.target]
    for name, variables in _INDEXES.items():
        if value := next((os.environ[each] for each in variables if os.environ.get(each)), ""):
            arguments += ["--build-arg", f"{name}={value}"]
    return arguments


def _find_base() -> str:
    """The base image's name, once it is pulled, or made from Debian's packages."""
    for name in (BASE, MADE_HERE):
        if subprocess.run(["buildah", "inspect", "--type=image", name], capture_output=True).returncode == 0:
            return name
    if subprocess.run(["buildah", "pull", "--quiet", BASE], capture_output=True).returncode == 0:
        return BASE
    if not shutil.which("debootstrap"):
        raise CannotBuild("No registry answers, and debootstrap is not here to make the base image from packages.")
    with tempfile.TemporaryDirectory(prefix="base-") as folder:
        packages = "python3,python3-venv,ca-certificates"
        _run("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", folder)
        for path in _LEFT_OUT:
            shutil.rmtree(Path(folder) / path, ignore_errors=True)
        (Path(folder) / "usr/bin/python").symlink_to("python3")
        with _mounted() as (container, root):
            _run("cp", "--archive", f"{folder}/.", root)
            _run("buildah", "config", "--env", f"PATH={_PATH}", container)
            _run("buildah", "commit", "--quiet", container, MADE_HERE)
    return MADE_HERE


@contextmanager
def _mounted() -> Iterator[tuple[str, str]]:
    """A new, empty container: its name, and where its root is."""
    container = _run("buildah", "from", "scratch").strip()
    try:
        yield container, _run("buildah", "mount", container).strip()
    finally:
        _run("buildah", "rm", container)


def _run(*command: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-12:])
        raise BuildFailed(f"{' '.join(command[:2])} failed:\n{last}")
    return done.stdout
