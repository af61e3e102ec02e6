"""Is everything ready? Each check is one line that passes, or says what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import TypeVar

from agent.client import Client, demand_hospital
from agent.ledger import Ledger
from agent.settings import AgentSettings
from agent.site import AGENT
from datavector.checks import check_records
from datavector.data.records import Record, assign_splits, read_records
from datavector.errors import (
    BaseModelError,
    DataVectorError,
    DiskFull,
    Interrupted,
    ProtocolError,
    UsageError,
    WrongHospital,
)
from datavector.files import claim_folder, disk_full_at, fsync, locked
from datavector.model import DIGEST, FILES, BaseModel
from datavector.wire.certs import check_certificate
from datavector.wire.v1.exchange_pb2 import PolicyInfo

# Checkpoints hold weights and two optimiser moments, for the last and the best epoch; then come base and vector.
BASE_SIZES_ON_DISK = 8
IMAGES = "images"  # decoded ones, in the state folder
WARN_DAYS = 30


SETTINGS = {  # that a failed check is about, and values of the chart that have another name
    "certificate": "tls.certificate, tls.key, tls.ca; with Helm tls.secret",
    "state": "state; with Helm state.existingClaim",
    "aggregator": "aggregator",
    "disk": "state; with Helm state.size, state.existingClaim",
    "data": "data.path; with Helm data.hostPath, data.nfs, data.existingClaim too",
}

Found = TypeVar("Found")


class Preflight:
    """Runs checks, shows each as a line, and remembers the first error. It names the settings that it is about."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self.error: DataVectorError | None = None

    def check(self, name: str, work: Callable[[], str]) -> bool:
        """Runs one check: `work` returns what is good, or raises what is not. Returns whether it passed."""
        return self.find(name, lambda: (True, work())) is not None

    def find(self, name: str, work: Callable[[], tuple[Found, str]]) -> Found | None:
        """Runs a check that is there to find something, too.

        Returns:
            What was found, or None where the check failed.
        """
        try:
            found, detail = work()
        except DataVectorError as error:
            if name in SETTINGS and not isinstance(error, Interrupted):
                error.remedy += f" (set by: {SETTINGS[name]})"
            self.error = self.error or error
            self._show(f"FAIL  {name:<12} {error}")
            return None
        self._show(f"ok    {name:<12} {detail}")
        return found

    def demand(self) -> None:
        """Raises the first error, if there was one."""
        if self.error is not None:
            raise self.error


def certificate(settings: AgentSettings) -> str:
    """The certificate is valid, of the authority, and speaks for this hospital, or for any if none is named."""
    tls = settings.tls
    report = check_certificate(tls.certificate, tls.key, tls.ca)
    demand_hospital(report, settings.hospital)
    days = report.days_left()
    return f"speaks for {report.hospital}, valid for {days} days{'; renew it soon' * (days < WARN_DAYS)}"


def device(settings: AgentSettings) -> str:
    """The device that training will use."""
    import torch

    if torch.cuda.is_available() and settings.training.device != "cpu":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"{len(names)} x {names[0]}"
    if settings.training.device == "cuda":
        raise UsageError(
            "training.device is cuda, but no GPU is visible",
            remedy="give the container a GPU (docker run --gpus all; with Helm gpu.count), "
            "or set training.device = 'auto'",
        )
    return f"CPU, {os.cpu_count()} cores"


def state(settings: AgentSettings) -> str:
    """The state folder is the agent's, can be written, and is closed to others where it belongs to this user.

    Raises:
        UsageError: it cannot be used, or holds other files.
        DiskFull: there is no room for a single file.
    """
    try:
        settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(settings.state, os.W_OK):
            raise UsageError(f"{settings.state} is not writable", remedy="mount it writable for this user")
        with disk_full_at(settings.state):
            claim_folder(settings.state, AGENT)
        if settings.state.stat().st_uid == os.geteuid():
            settings.state.chmod(0o700)  # patients' images lie there
    except OSError as error:
        raise UsageError(
            f"{settings.state} cannot be made ({error.strerror})", remedy="set state to a folder on a writable volume"
        ) from error
    return str(settings.state)


def consent(ledger: Ledger, base_digest: str) -> str:
    """The hospital has not withdrawn, or has rejoined since."""
    ledger.demand_consent(base_digest)
    return "stands"


def disk(settings: AgentSettings, policy: PolicyInfo) -> str:
    """The state folder has room for what training leaves there."""
    needed = BASE_SIZES_ON_DISK * sum(file.size for file in policy.base_files)
    free = shutil.disk_usage(settings.state).free
    if free < needed:
        raise DiskFull(settings.state, needed=needed)
    return f"{free / 2**30:.1f} GiB free, about {needed / 2**30:.1f} GiB needed"


def aggregator(settings: AgentSettings, client: Client) -> tuple[PolicyInfo, str]:
    """The aggregator's policy that this hospital takes part in.

    Raises:
        Unreachable: nobody answers for as long as the client is patient.
        UsageError: there is none, or several and the settings name none of them.
        BaseModelError: it merges another base model than the pinned one.
        WrongHospital: the aggregator takes the certificate for another hospital.
    """
    reply = client.describe()
    if reply.hospital != client.hospital:
        raise WrongHospital(certificate=reply.hospital, claimed=client.hospital)
    found = [policy for policy in reply.policies if settings.policy in (None, policy.name)]
    if len(found) != 1:
        names = ", ".join(policy.name for policy in reply.policies) or "none"
        raise UsageError(f"the aggregator has these policies: {names}", remedy="set policy to the one to take part in")
    (policy,) = found
    if settings.base is not None and policy.base_digest != settings.base:
        raise BaseModelError(
            f"policy {policy.name} merges base {policy.base_digest}, but {settings.base} is pinned here",
            remedy="ask the aggregation site which is right, then change base",
        )
    if not policy.base_digest:
        raise BaseModelError(
            f"policy {policy.name} has no base model yet", remedy="ask the aggregation site to import it"
        )
    return policy, f"{settings.aggregator}, policy {policy.name}: {policy.waiting_for}"


def base_model(settings: AgentSettings, client: Client, policy: PolicyInfo) -> tuple[BaseModel, str]:
    """The base model by digest: from the cache, else from the aggregator.

    Raises:
        ProtocolError: the policy's digest is none, or it announces other files than a base model's.
        BaseModelError, WrongDigest: what is there, or arrives, is not what the digest says.
    """
    digest = policy.base_digest
    if not DIGEST.fullmatch(digest):  # it becomes a path here
        raise ProtocolError(
            f"policy {policy.name} names its base model {digest!r}", remedy="do not trust it: ask the aggregation site"
        )
    folder = settings.state / "bases" / digest.removeprefix("sha256:")
    if sorted(file.name for file in policy.base_files) != sorted(FILES):
        raise ProtocolError(
            f"policy {policy.name} announces a base model of other files than {' and '.join(FILES)}",
            remedy="do not trust it: ask the aggregation site",
        )
    where = "cached"
    folder.parent.mkdir(exist_ok=True)
    with locked(folder.with_suffix(".lock")):  # `--preflight` fetches beside a running agent
        if not folder.is_dir():
            where = "fetched"
            partial = folder.with_suffix(".partial")
            for file in policy.base_files:
                client.fetch(file, partial / file.name, base_digest=digest)
            BaseModel.load(partial, digest=digest)
            partial.rename(folder)
            fsync(folder.parent)
    base = BaseModel.load(folder, digest=digest)
    return base, f"{base.architecture}, {len(base.classes)} classes, {digest[:19]}, {where}"


def data(settings: AgentSettings, base: BaseModel) -> tuple[list[Record], str]:
    """The images can be listed, fit the base model, and have room in the state folder once they are decoded.

    Returns:
        Every image's record, with the split that it belongs to.
    Raises:
        DataError: no image, one class only, a class the base lacks, an unreadable folder.
        DiskFull: the decoded images do not fit.
        UsageError: the settings name no data.
    """
    from datavector.data.images import cache_size, unused_caches  # torch takes seconds to import

    if settings.data is None:
        raise UsageError("data.path is not set", remedy="set it to the image folder or manifest (--data)")
    records = read_records(settings.data.path)
    summary = check_records(records, base.classes)
    records = assign_splits(records, validation=settings.data.validation, seed=settings.training.seed)
    lists, size, cache = by_split(records).values(), base.input.size, settings.state / IMAGES
    needed = sum(cache_size(each, size, cache) for each in lists)
    unused = sum(file.stat().st_size for file in unused_caches(lists, size, cache))  # they make room first
    if shutil.disk_usage(settings.state).free + unused < needed:
        raise DiskFull(settings.state, needed=needed)
    return records, " ".join((f"{summary}.", *summary.warnings))


def by_split(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records to train on ("train") and to choose the best epoch with ("val")."""
    return {split: [record for record in records if record.split == split] for split in ("train", "val")}
