"""Fixtures of all tests: certificates, a running receiver, a hospital's client, its bad link and its small disk."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

from agent.client import Client, Credentials
from agent.ledger import Ledger
from datavector.model import BaseModel
from datavector.wire.certs import init_authority, issue_aggregator, issue_hospital
from tests.link import Link
from tests.serving import Serving, make_base, make_settings, make_store, serve

pytest_plugins = ["tests.cluster.fixtures"]

HOSPITALS = ("north", "south", "west")

# On top of Hypothesis's own profiles: the one that it takes where CI is set draws the same examples every time.
settings.register_profile("datavector", parent=settings.default, deadline=None)
settings.load_profile("datavector")


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority, the aggregator's certificate, and those of the hospitals north, south and west."""
    folder = tmp_path_factory.mktemp("certificates")
    init_authority(folder)
    issue_aggregator(folder, server_names=["localhost", "127.0.0.1"])
    for hospital in HOSPITALS:
        issue_hospital(folder, hospital)
    return folder


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A base model of 4 kB with two BatchNorm layers."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def large_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A base model of 16 MiB: some chunks long."""
    return make_base(tmp_path_factory.mktemp("large"), name="large", elements=4 << 20)


@pytest.fixture
def start_receiver(authority: Path, tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    """Starts receivers: `start_receiver(*bases, **settings)`; all on the same store."""
    with ExitStack() as stack:

        def start(*bases: BaseModel, store: Path = tmp_path / "store", **settings: object) -> Serving:
            return stack.enter_context(serve(make_store(store, *bases), make_settings(authority, **settings)))

        yield start


@pytest.fixture
def receiver(start_receiver: Callable[..., Serving], small_base: BaseModel, large_base: BaseModel) -> Serving:
    """A running receiver with the policies `small` and `large`."""
    return start_receiver(small_base, large_base)


@pytest.fixture
def connect(authority: Path, tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Makes clients of a hospital: `connect(address, "north")`. By default a call is tried once."""
    with ExitStack() as stack:

        def make(address: str, hospital: str = "north", **options: object) -> Client:
            credentials = Credentials(
                authority / f"{hospital}.crt", authority / f"{hospital}.key", authority / "ca.crt"
            )
            options = {"patience_seconds": 0, "ledger": Ledger(tmp_path / f"{hospital}.jsonl"), **options}
            return stack.enter_context(Client(address, credentials, **options))  # type: ignore[arg-type]

        yield make


@pytest.fixture
def cut_link() -> Iterator[Callable[[str], Link]]:
    """Makes links to an address that can be cut."""
    links: list[Link] = []

    def make(target: str) -> Link:
        links.append(Link(target))
        return links[-1]

    yield make
    for link in links:
        link.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path, int], None]]:
    """Mounts file systems of a few MiB: `small_disk(folder, mebibytes)`."""
    mounted: list[Path] = []

    def mount(folder: Path, mebibytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a small file system")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
