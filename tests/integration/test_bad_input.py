"""Whatever is wrong gets one clear message and an exit code, no traceback, and loses nothing: see docs/errors.md."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest

from datavector.files import claim_folder, sha256_file
from datavector.wire.certs import init_authority, issue_hospital
from datavector.wire.v1.exchange_pb2 import (
    DescribeReleaseReply,
    DescribeReleaseRequest,
    DescribeReply,
    DescribeRequest,
    FileInfo,
    PolicyInfo,
)
from datavector.wire.v1.exchange_pb2_grpc import ExchangeServicer, add_ExchangeServicer_to_server
from tests.integration.conftest import VISIT
from tests.integration.processes import Aggregator, Process, Site, free_port, policy_file

WORKERS = 2


@dataclass(frozen=True)
class Bad:
    """A case of bad input.

    Attributes:
        code: the exit code that it must get.
        words: what its output must say.
        prepare: makes the case in a folder of its own and gives the command line.
    """

    code: int
    words: tuple[str, ...]
    prepare: Callable[[Place], list[str | Path]]


@dataclass(frozen=True)
class Place:
    """Where a case lives: a folder of its own, beside a running aggregator that all cases share."""

    folder: Path
    site: Site
    address: str
    store: Path

    def agent(self, *flags: str | Path, hospital: str = "north", **settings: object) -> list[str | Path]:
        """A command line of an agent with a state folder of its own; `--preflight` where no flag is given."""
        settings = {"state": self.folder / "state", **settings}
        config = Site(
            self.folder, self.site.certificates, self.site.base, self.site.data, {"epochs": 1}, self.site.running
        ).config(hospital, self.address, **settings)
        return ["agent", "--config", config, *(flags or ["--preflight"])]

    def with_data(self, images: Mapping[str, int]) -> list[str | Path]:
        """An agent with so many images of each class."""
        source = sorted((self.site.data / "north").rglob("*.png"))
        for label, count in images.items():
            (self.folder / "images" / label).mkdir(parents=True)
            for image in source[:count]:
                shutil.copy(image, self.folder / "images" / label)
        return self.agent(data={"path": self.folder / "images"})

    def with_manifest(self, text: str) -> list[str | Path]:
        (self.folder / "manifest.csv").write_text(text)
        return self.agent(data={"path": self.folder / "manifest.csv"})

    def with_certificate(self, certificate: Path, ca: Path, *, key: Path | None = None) -> list[str | Path]:
        return self.agent(tls={"certificate": certificate, "key": key or certificate.with_suffix(".key"), "ca": ca})

    def foreign(self) -> tuple[Path, Path]:
        """A certificate of another authority for north, and that authority."""
        ca = init_authority(self.folder / "foreign")
        return issue_hospital(self.folder / "foreign", "north"), ca

    def aggregator(self, policy: str | None = None, **settings: object) -> list[str | Path]:
        """A command line of a second aggregator, with a store of its own."""
        (self.folder / "policy.yaml").write_text(policy or policy_file(VISIT))
        names = {"store": "store", "policy": "policy.yaml", "listen": "127.0.0.1:0", **settings}
        tls = {"certificate": "aggregator.crt", "key": "aggregator.key", "ca": "ca.crt"}
        flags: list[str | Path] = ["aggregator", "--base", self.site.base]
        for name in ("certificate", "key", "ca"):
            flags += [f"--{name}", self.site.certificates / str(names.pop(name, tls[name]))]
        for name, value in names.items():
            flags += [f"--{name}", str(value) if name == "listen" else self.folder / str(value)]
        return flags


def corrupt(place: Place) -> list[str | Path]:
    place.with_data({"nevus": 6, "melanoma": 6})
    for image in (place.folder / "images" / "nevus").glob("*0.png"):
        image.write_bytes(b"no image")
    return place.agent("--once", data={"path": place.folder / "images"})


def expired(place: Place) -> list[str | Path]:
    authority = place.folder / "certs"
    shutil.copytree(place.site.certificates, authority)
    return place.with_certificate(issue_hospital(authority, "north", days=-1), authority / "ca.crt")


def trusted_here_only(place: Place) -> list[str | Path]:
    """A foreign certificate that passes this side's checks, as both authorities are trusted here."""
    certificate, ca = place.foreign()
    both = place.folder / "both.crt"
    both.write_bytes(ca.read_bytes() + (place.site.certificates / "ca.crt").read_bytes())
    return place.with_certificate(certificate, both)


def altered_base(place: Place) -> list[str | Path]:
    cached = place.site.folder / "north" / "state" / "bases"
    (place.folder / "state").mkdir()
    claim_folder(place.folder / "state", "agent")
    shutil.copytree(cached, place.folder / "state" / "bases")
    with next(place.folder.glob("state/bases/*/base.safetensors")).open("r+b") as file:
        file.seek(5000)
        file.write(b"altered")
    return place.agent()


def written(place: Place, name: str, text: str) -> Path:
    path = place.folder / name
    path.write_text(text)
    return path


CASES: dict[str, Bad] = {
    # a hospital's images
    "no images": Bad(1, ("holds no image in a folder per class",), lambda at: at.with_data({"nevus": 0})),
    "one class only": Bad(1, ("all 3 training images have the label 'nevus'",), lambda at: at.with_data({"nevus": 3})),
    "a class the base lacks": Bad(
        1,
        ("the base model has no class 'naevus'", "rename 'naevus' to 'nevus'"),
        lambda at: at.with_data({"naevus": 2, "melanoma": 2}),
    ),
    "no such folder": Bad(1, ("does not exist",), lambda at: at.agent(data={"path": at.folder / "absent"})),
    "a manifest that names absent files": Bad(
        1, ("manifest.csv, line 2", "no readable file"), lambda at: at.with_manifest("file,label\nabsent.png,nevus\n")
    ),
    "a manifest without labels": Bad(
        1, ("column 'label' is missing",), lambda at: at.with_manifest("file,diagnosis\nabsent.png,nevus\n")
    ),
    "too many corrupt images": Bad(1, ("of 12 images cannot be decoded, more than 5%",), corrupt),
    # base models
    "a base that is not the pinned one": Bad(1, ("is pinned here",), lambda at: at.agent(base=f"sha256:{'0' * 64}")),
    "an altered base": Bad(1, ("base.safetensors is missing or altered",), altered_base),
    "an unknown architecture": Bad(
        2,
        ("unknown architecture 'resnet19'", "did you mean 'resnet18'"),
        lambda at: [
            "base",
            "create",
            "--architecture",
            "resnet19",
            "--output",
            at.folder / "base",
            "--classes",
            written(at, "classes.txt", "a\nb\n"),
        ],
    ),
    "a base of one class": Bad(
        1,
        ("give at least two classes",),
        lambda at: [
            "base",
            "create",
            "--architecture",
            "resnet18",
            "--output",
            at.folder / "base",
            "--size",
            "32",
            "--classes",
            written(at, "classes.txt", "a\n"),
        ],
    ),
    # certificates
    "an expired certificate": Bad(
        1, ("FAIL certificate", "expired on", "ask the aggregation site for a new certificate"), expired
    ),
    "a foreign certificate": Bad(
        1,
        ("which is not the authority in",),
        lambda at: at.with_certificate(at.foreign()[0], at.site.certificates / "ca.crt"),
    ),
    "a foreign certificate that only the aggregator can tell": Bad(
        1, ("the aggregator refuses this",), trusted_here_only
    ),
    "a foreign aggregator": Bad(
        1, ("shows a certificate that is not to be trusted",), lambda at: at.with_certificate(*at.foreign())
    ),
    "a certificate of another hospital": Bad(
        1,
        ("this certificate speaks for 'south', but the call is for 'north'",),
        lambda at: at.with_certificate(at.site.certificates / "south.crt", at.site.certificates / "ca.crt"),
    ),
    "a key of another certificate": Bad(
        1,
        ("is not the key of",),
        lambda at: at.with_certificate(
            at.site.certificates / "north.crt",
            at.site.certificates / "ca.crt",
            key=at.site.certificates / "south.key",
        ),
    ),
    "a hospital on the deny list": Bad(
        1, ("'west' or its certificate is on the deny list",), lambda at: at.agent(hospital="west")
    ),
    "an authority twice": Bad(
        2, ("has an authority already",), lambda at: ["certs", "init", "--output", at.site.certificates]
    ),
    "a server name that is none": Bad(
        2,
        ("'bücher.example' is neither a DNS name nor an address", "give e.g. --server-name"),
        lambda at: ["certs", "init", "--output", at.folder / "certs", "--server-name", "bücher.example"],
    ),
    "a certificate for nobody": Bad(
        2,
        ("give --hospital or --aggregator",),
        lambda at: ["certs", "issue", "--authority", at.site.certificates],
    ),
    "a certificate for two": Bad(
        2,
        ("give --hospital or --aggregator",),
        lambda at: ["certs", "issue", "--hospital", "north", "--aggregator", "--authority", at.site.certificates],
    ),
    "a hospital with a server name": Bad(
        2,
        ("a hospital's certificate has no server name",),
        lambda at: [
            "certs",
            "issue",
            "--hospital",
            "north",
            "--server-name",
            "a.example",
            "--authority",
            at.site.certificates,
        ],
    ),
    "a name that is none": Bad(
        2,
        ("'North_1' is no hospital's name",),
        lambda at: ["certs", "issue", "--hospital", "North_1", "--authority", at.site.certificates],
    ),
    # settings and flags
    "an unknown key in agent.toml": Bad(
        2, ("unknown setting 'epoch'", "did you mean 'epochs'?"), lambda at: at.agent(training={"epoch": 3})
    ),
    "a wrong value in agent.toml": Bad(
        2, ("training.epochs: input should be greater than or equal to 1",), lambda at: at.agent(training={"epochs": 0})
    ),
    "no settings at all": Bad(
        2,
        (
            "settings are missing or wrong",
            "aggregator (DATAVECTOR_AGENT_AGGREGATOR): field required",
            "tls.certificate (DATAVECTOR_AGENT_TLS__CERTIFICATE), tls.key (",
        ),
        lambda at: ["agent"],
    ),
    "flags that exclude each other": Bad(2, ("exclude each other",), lambda at: at.agent("--once", "--tasks-only")),
    "an unknown flag": Bad(2, ("No such option: --epoch",), lambda at: at.agent("--epoch", "3")),
    "an unknown command": Bad(2, ("No such command 'blend'",), lambda at: ["blend"]),
    "a policy that there is not": Bad(
        2, ("the aggregator has these policies: trial",), lambda at: at.agent(policy="another")
    ),
    "an unknown field in a policy": Bad(
        2,
        ("spec.trigger.minHospital is no field here; did you mean minHospitals?",),
        lambda at: at.aggregator(policy_file(VISIT | {"trigger": {"minHospital": 2}})),
    ),
    "a wrong value in a policy": Bad(
        2,
        ("spec.calibration.mode: input should be 'visit', 'meeting', 'uploaded' or 'none'",),
        lambda at: at.aggregator(policy_file(VISIT | {"calibration": {"mode": "visits"}})),
    ),
    "an unknown merge method": Bad(
        2,
        ("unknown merge method 'summ'", "did you mean 'sum'?"),
        lambda at: at.aggregator(policy_file(VISIT | {"method": {"name": "summ"}})),
    ),
    "an unknown key in aggregator.toml": Bad(
        2,
        ("unknown setting 'stor'", "did you mean 'store'?"),
        lambda at: ["aggregator", "--config", written(at, "aggregator.toml", "stor = 'x'\n")],
    ),
    "a policy of a base that is not there": Bad(
        1, ("the store has 0 base models 'other'",), lambda at: at.aggregator(policy_file({"baseModelRef": "other"}))
    ),
    "an aggregator with a hospital's certificate": Bad(
        1,
        ("is the certificate of hospital 'south'",),
        lambda at: at.aggregator(certificate="south.crt", key="south.key"),
    ),
    "a port that is taken": Bad(2, ("cannot be listened on",), lambda at: at.aggregator(listen=at.address)),
    "a port of metrics that is taken": Bad(
        2,
        ("metrics cannot be served on port", "Address already in use"),
        lambda at: at.agent("--once", metrics_port=int(at.address.rpartition(":")[2])),
    ),
    "a preflight while the aggregator is away": Bad(
        1, ("FAIL aggregator", "is not reachable"), lambda at: at.agent(aggregator=f"127.0.0.1:{free_port()}")
    ),
    "a path that cannot be": Bad(
        1, ("error: /proc/certs", "check the path"), lambda at: ["certs", "init", "--output", "/proc/certs"]
    ),
    "a second aggregator on one store": Bad(
        2, ("another aggregator uses the store",), lambda at: at.aggregator(store=at.store)
    ),
    # asking for what is not there
    "no Ready release": Bad(
        1,
        ("policy 'trial' has no Ready version (0 of 2 hospitals; waiting for 2 more)",),
        lambda at: ["release", "fetch", "--output", at.folder / "release", *at.agent("")[1:3]],
    ),
    "a folder that is no release": Bad(1, ("SHA256SUMS cannot be read",), lambda at: ["verify", at.folder]),
    "predicting with what is no release": Bad(
        1, ("model.onnx does not exist",), lambda at: ["predict", at.folder, "image.png"]
    ),
    "a folder that is no store": Bad(2, ("holds no registry.sqlite",), lambda at: ["status", "--store", at.folder]),
    "options before a command": Bad(
        2, ("options before `ledger` are not for it",), lambda at: ["agent", "--state", at.folder, "ledger"]
    ),
    "a ledger of nobody": Bad(2, ("is no folder",), lambda at: ["agent", "ledger", "--state", at.folder / "absent"]),
    "a demo into a folder with files": Bad(
        2, ("is not empty",), lambda at: ["demo", "--output", written(at, "file", "mine").parent]
    ),
    "a demo without a manifest": Bad(
        1,
        ("manifest.csv cannot be read",),
        lambda at: ["demo", "--output", at.folder / "out", "--data", at.folder],
    ),
}


@pytest.fixture(scope="module")
def shared(trained_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Aggregator]]:
    """An aggregator that has nothing yet, with west on its deny list."""
    with ExitStack() as running:
        site = replace(trained_site, folder=tmp_path_factory.mktemp("shared"), running=running)
        aggregator = site.aggregator(VISIT)
        (site.folder / "denied").write_text("west  # a trial\n")
        yield replace(site, folder=trained_site.folder), aggregator


@pytest.fixture(scope="module")
def ended(
    shared: tuple[Site, Aggregator], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[Process]]]:
    """Every chosen case's command, run to its end, some at a time."""
    site, aggregator = shared
    chosen = [item.callspec.params["name"] for item in request.session.items if _is_a_case(item)]

    def run(name: str) -> Process:
        folder = tmp_path_factory.mktemp("case")
        command = CASES[name].prepare(Place(folder, site, aggregator.address, aggregator.store.root))
        process = Process(command, folder / "log")
        process.wait()
        return process

    with ThreadPoolExecutor(WORKERS) as pool:
        yield {name: pool.submit(run, name) for name in chosen}


def _is_a_case(item: pytest.Item) -> bool:
    return item.path == Path(__file__) and "name" in getattr(getattr(item, "callspec", None), "params", {})


@pytest.mark.parametrize("name", CASES)
def test_it_is_told_and_nothing_else_happens(name: str, ended: dict[str, Future[Process]]):
    process, case = ended[name].result(), CASES[name]
    assert process.wait() == case.code, process.output
    for words in case.words:
        assert words in " ".join(process.output.split()), process.output
    assert "Traceback" not in process.output


def test_after_all_of_it_the_aggregator_is_as_it_was(
    shared: tuple[Site, Aggregator], ended: dict[str, Future[Process]]
):
    for case in ended.values():
        case.result()
    _, aggregator = shared
    assert aggregator.vectors() == []
    assert not list(aggregator.store.root.glob("uploads/*/*"))
    assert "Traceback" not in aggregator.process.output
    assert aggregator.process.terminate() == 0


@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--once"], 1)])
def test_an_aggregator_that_is_not_reachable_is_tried_again_until_the_agent_is_stopped(
    new_site: Site, flags: list[str], code: int
):
    agent = new_site.agent("north", f"127.0.0.1:{free_port()}", *flags)
    agent.wait_for("not reachable since ")
    agent.wait_for("next try in 1.")
    config = new_site.folder / "north" / "agent.toml"
    second = new_site.start("agent", "--config", config, "--once", log="second")
    assert second.wait() == 1
    assert "another agent uses the state folder" in second.output
    assert agent.terminate() == code
    assert "start it again to go on" in agent.output
    assert "Traceback" not in agent.output


@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--once"], 1)])
def test_an_agent_that_is_stopped_during_its_first_checks_ends_at_once(new_site: Site, flags: list[str], code: int):
    agent = new_site.agent("north", f"127.0.0.1:{free_port()}", *flags)
    agent.wait_for("ok    certificate")
    assert agent.terminate() == code
    assert "Traceback" not in agent.output


def test_a_full_disk_at_the_agent_stops_it_before_it_starts(site: Site, small_disk: Callable[[Path, int], None]):
    aggregator = site.aggregator(VISIT)
    small_disk(site.folder / "small", 3)
    agent = site.agent("north", aggregator.address, "--once", state=site.folder / "small" / "state")
    assert agent.wait() == 1
    assert "error: no space left for 47 MiB on the disk of" in agent.output
    assert "Traceback" not in agent.output


def test_a_full_disk_at_the_aggregator_refuses_the_vector_and_keeps_nothing_half(
    site: Site, small_disk: Callable[[Path, int], None]
):
    small_disk(site.folder / "fresh" / "store", 9)  # room for the base model alone
    aggregator = site.aggregator(VISIT, name="fresh")
    before = sha256_file(site.folder / "north" / "state" / "vector.safetensors")
    agent = site.agent("north", aggregator.address, "--once")
    assert agent.wait() == 1
    assert "error: the aggregator's disk is full; nothing of this call was kept" in agent.output
    assert "Traceback" not in agent.output
    assert sha256_file(site.folder / "north" / "state" / "vector.safetensors") == before
    assert aggregator.vectors() == []
    assert not list(aggregator.store.root.glob("uploads/*/*"))


class Liar(ExchangeServicer):
    """An aggregator that names files outside the folder in which they are expected."""

    def Describe(self, request: DescribeRequest, context: grpc.ServicerContext) -> DescribeReply:  # noqa: N802
        outside = [FileInfo(name="../../outside", size=1), FileInfo(name="base.json", size=1)]
        usual = [FileInfo(name="base.safetensors", size=1), FileInfo(name="base.json", size=1)]
        policies = [
            PolicyInfo(name="files", base_digest=f"sha256:{'0' * 64}", base_files=outside),
            PolicyInfo(name="digest", base_digest="sha256:../../outside", base_files=usual),
        ]
        return DescribeReply(hospital="north", policies=policies)

    def DescribeRelease(self, request: DescribeReleaseRequest, context: grpc.ServicerContext) -> DescribeReleaseReply:  # noqa: N802
        return DescribeReleaseReply(version="trial-1", files=[FileInfo(name="../outside", size=1)])


def test_an_aggregator_cannot_name_files_outside_their_folder(new_site: Site):
    certificate, key, ca = (
        (new_site.certificates / name).read_bytes() for name in ("aggregator.crt", "aggregator.key", "ca.crt")
    )
    server = grpc.server(ThreadPoolExecutor(1))
    add_ExchangeServicer_to_server(Liar(), server)
    credentials = grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        new_site.config("north", f"127.0.0.1:{port}")
        ended, printed = [], []
        for command in (
            ("agent", "--preflight", "--policy", "files"),
            ("agent", "--preflight", "--policy", "digest"),
            ("release", "fetch", "--output", new_site.folder / "release"),
        ):
            process = new_site.run("north", *command)
            ended.append(process.wait())
            printed.append(process.output)
    finally:
        server.stop(None)
    assert ended == [1, 1, 1]
    assert "announces a base model of other files" in printed[0]
    assert "policy digest names its base model 'sha256:../../outside'" in printed[1]
    assert "the aggregator names a file '../outside'" in printed[2]
    assert not list(new_site.folder.rglob("*outside*"))
