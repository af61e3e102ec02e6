"""A hospital without Kubernetes: the `docker run` of docs/hospital.md, typed; by podman where no Docker engine runs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from datavector.demo.sites import write_toml
from tests.cluster.images import AGENT, docker_runs
from tests.e2e.conftest import LOGS
from tests.e2e.pages import blocks, page, section
from tests.integration.conftest import VISIT, empty_site
from tests.integration.processes import Site, until

pytestmark = pytest.mark.timeout(600)
__all__ = ["empty_site"]  # a fixture

# Without CAP_SYS_RESOURCE the limits that podman would set may not be set.
PODMAN = "podman run --ulimit nofile=1024:1024 --ulimit nproc=4096:4096"


@pytest.fixture
def site(empty_site: Site, images: dict[str, str], tmp_path: Path) -> Iterator[Site]:
    """An aggregator on loopback, and the hospital's folders, which belong to the container's user."""
    with ExitStack() as running:
        yield replace(empty_site, folder=tmp_path, running=running)


@pytest.fixture
def engine(site: Site) -> Callable[[str], str]:
    """Types commands of the page: `engine("docker logs north")`."""
    if not docker_runs() and not shutil.which("podman"):
        pytest.skip("no Docker engine runs here, and there is no podman")
    if os.geteuid() != 0:
        pytest.skip("only root may give files to the container's user")

    def type_in(command: str) -> str:
        if not docker_runs():
            command = command.replace("docker run", PODMAN).replace("docker ", "podman ")
        done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    site.running.callback(lambda: type_in("docker rm --force --volumes north || true"))
    return type_in


def test_the_docker_run_of_the_page_delivers_a_vector_and_stops_in_order(site: Site, engine: Callable[[str], str]):
    aggregator = site.aggregator(VISIT)
    config, state = site.folder / "config", site.folder / "state"
    give_files(site, config, state, aggregator.address)
    shown = commands()

    started = next(command for command in shown if command.startswith("docker run"))
    for text, instead in {
        "/srv/datavector/config": str(config),
        "/srv/datavector/state": str(state),
        "/srv/images": str(site.data / "north"),
        "registry.example.org/datavector-agent:0.1.0": AGENT.tag,
        "--gpus all ": "",  # this machine has none: the same image computes on the CPU
        "docker run ": "docker run --network host ",  # the aggregator listens on loopback
    }.items():
        assert text in started
        started = started.replace(text, instead)
    engine(started)
    until(lambda: aggregator.vectors(), "the vector", process=aggregator.process)

    for command in shown[shown.index(next(each for each in shown if each.startswith("docker logs"))) :]:
        if command.startswith("docker logs"):
            until(lambda: "delivered" in engine("docker logs north"), "the log's last line")
            (LOGS / "docker").mkdir(parents=True, exist_ok=True)
            (LOGS / "docker" / "north.log").write_text(engine("docker logs north"))
        elif "ledger" in command:
            assert " vector " in engine(command)
        else:
            engine(command)
    assert aggregator.vectors()[0].spec.consent.value == "Withdrawn"
    assert engine("docker inspect --format '{{.State.ExitCode}}' north").strip() == "0"


def give_files(site: Site, config: Path, state: Path, address: str) -> None:
    """What the page puts into the folders, for the user of the container."""
    (toml,) = (content for language, content in blocks(without_kubernetes()) if language == "toml")
    assert "merge.example.org:8443" in toml
    config.mkdir()
    state.mkdir(mode=0o700)
    here = address.replace("127.0.0.1", "localhost")
    write_toml(config / "training.toml", {"training": dict(site.training)})
    quick = (config / "training.toml").read_text()
    (config / "agent.toml").write_text(f"{toml.replace('merge.example.org:8443', here)}\n{quick}")
    for name in ("north.crt", "north.key", "ca.crt"):
        shutil.copy(site.certificates / name, config / name)
    for path in (config, *config.iterdir(), state):
        os.chown(path, 10001, 10001)
    for path in (site.data / "north", *(site.data / "north").rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def without_kubernetes() -> str:
    return section(page("docs/hospital.md"), "Without Kubernetes")


def commands() -> list[str]:
    """The section's commands, each on one line."""
    text = "".join(content for language, content in blocks(without_kubernetes()) if language == "sh")
    return [" ".join(shlex.split(line, comments=True)) for line in text.replace("\\\n", " ").splitlines() if line]
