"""A hospital's main job, from top to bottom: preflight, base model, training, vector, upload, tasks.

What needs torchvision is imported after the preflight: it takes seconds, and what is wrong should be said at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.json_format import MessageToDict, Parse, ParseError

from agent import preflight
from agent.ledger import Ledger
from agent.settings import AgentSettings
from agent.site import LEDGER, VECTOR, Site, connect, only_agent, open_site, stop_by_signal
from agent.upload import upload
from datavector.console import progress, say
from datavector.data.records import Record
from datavector.errors import DataVectorError, Interrupted, TryAgain, Unreachable
from datavector.files import write_json
from datavector.model import BaseModel
from datavector.monitoring import serve_metrics
from datavector.vector import write_vector
from datavector.wire.v1.exchange_pb2 import PolicyInfo, VectorInfo

if TYPE_CHECKING:
    from agent.train import EpochReport
    from datavector.data.images import ImageSet

Stored = TypeVar("Stored", PolicyInfo, VectorInfo)

VECTOR_INFO, POLICY = "vector.json", "policy.json"


@dataclass(frozen=True)
class Ready:
    """What the preflight found; every record has its split."""

    policy: PolicyInfo
    base: BaseModel
    records: list[Record]


def run(settings: AgentSettings, *, once: bool) -> None:
    """Trains, delivers the vector, then serves tasks until stopped (or leaves, with `once`).

    Raises:
        DataVectorError: a check failed, or the aggregator refuses the vector.
    """
    stop_by_signal(exit_code=1 if once else 0)
    try:
        _check_this_machine(settings)
        with only_agent(settings.state), open_site(settings) as site:
            if settings.metrics_port:
                serve_metrics(site.metrics.registry, settings.metrics_port)
            ready = _prepare(site, partial(_policy, site))
            vector = train_vector(site, ready)
            deliver(site, vector)
            if not once:
                serve_tasks(site, ready, until_stopped=True)
    except Interrupted as stopped:
        if once:
            raise
        say(f"{stopped.message}; {stopped.remedy}")  # an orderly end of what otherwise has none


def serve_waiting_tasks(settings: AgentSettings) -> None:
    """Serves the tasks that are waiting, and leaves.

    Raises:
        TryAgain: one of them could not be served, though it is still wanted.
    """
    stop_by_signal(exit_code=1)
    _check_this_machine(settings)
    with only_agent(settings.state), open_site(settings) as site:
        serve_tasks(site, _prepare(site, partial(_policy, site)), until_stopped=False)


def check(settings: AgentSettings) -> None:
    """Checks everything and starts nothing; an aggregator that does not answer at once has failed its check."""
    _check_this_machine(settings)
    with open_site(settings, patience_seconds=0) as site:
        _prepare(site, partial(preflight.aggregator, settings, site.client))
    say("ready")


# --- The steps ------------------------------------------------------------------------------------------------


def _check_this_machine(settings: AgentSettings) -> None:
    """Runs the checks for which nobody else is needed.

    Raises:
        DataVectorError: the first check that failed; all of them were shown.
    """
    checks = preflight.Preflight(say)
    checks.check("certificate", partial(preflight.certificate, settings))
    checks.check("device", partial(preflight.device, settings))
    checks.check("state", partial(preflight.state, settings))
    checks.demand()


def _prepare(site: Site, ask: Callable[[], tuple[PolicyInfo, str]]) -> Ready:
    """Runs the other checks, fetches the base model, and reads the list of images.

    Args:
        ask: finds the policy to take part in.
    Raises:
        DataVectorError: the first check that failed; all of them were shown.
    """
    settings, checks = site.settings, preflight.Preflight(say)
    policy, base, records = checks.find("aggregator", ask), None, None
    if policy is not None:
        checks.check("consent", partial(preflight.consent, Ledger(settings.state / LEDGER), policy.base_digest))
    if policy is not None and checks.check("disk", partial(preflight.disk, settings, policy)):
        write_json(settings.state / POLICY, MessageToDict(policy))
        base = checks.find("base model", partial(preflight.base_model, settings, site.client, policy))
    if base is not None:
        records = checks.find("data", partial(preflight.data, settings, base))
    checks.demand()
    assert policy is not None  # noqa: S101  else demand() would have raised
    assert base is not None  # noqa: S101
    assert records is not None  # noqa: S101
    return Ready(policy, base, records)


def train_vector(site: Site, ready: Ready) -> VectorInfo:
    """Fine-tunes (or goes on, or finds it done); the data vector and its description are then in the state folder."""
    from agent.train import TrainSettings, train

    settings, base, metrics = site.settings, ready.base, site.metrics
    training, validation = _load_images(site, ready, ("train", "val"))

    def show(report: EpochReport) -> None:
        metrics.epoch.set(report.epoch)
        metrics.loss.set(report.train_loss)
        metrics.validation.set(report.val_balanced_accuracy)
        say(
            f"epoch {report.epoch} of {report.epochs}: loss {report.train_loss:.3f}, "
            f"validation loss {report.val_loss:.3f}, "
            f"balanced accuracy {report.val_balanced_accuracy:.1%}, {report.images_per_second:.0f} images/s"
        )

    result = train(
        base,
        training,
        validation,
        TrainSettings(**settings.training.model_dump()),
        settings.state / "training",
        on_epoch=show,
        stop=site.stop,
    )
    vector = settings.state / VECTOR
    sha256 = write_vector(vector, base, result.tensors(base))
    say(f"trained on {result.images} images, kept epoch {result.epoch}; vector of {vector.stat().st_size:,} bytes")
    # How it was announced. Where that is lost it is announced anew: the aggregator knows a vector by its digest.
    known = _stored(settings.state / VECTOR_INFO, VectorInfo())
    if known is None or (known.sha256, known.base_digest) != (sha256, base.digest):
        sequence = 1 + max(ready.policy.last_sequence, known.sequence if known else 0)
        known = VectorInfo(
            base_digest=base.digest,
            sha256=sha256,
            size=vector.stat().st_size,
            sequence=sequence,
            sample_count=result.images,
        )
        write_json(settings.state / VECTOR_INFO, MessageToDict(known))
    return known


def deliver(site: Site, info: VectorInfo) -> None:
    """Uploads the vector, however often the link breaks."""
    uploads = site.metrics.uploads
    with progress("upload") as show:
        try:
            delivery = upload(site.client, site.settings.state / VECTOR, info, on_progress=show)
        except DataVectorError as error:
            uploads.labels(type(error).__name__).inc()
            raise
    uploads.labels("committed" if delivery.sent else "repeated").inc()
    site.metrics.sent_bytes.inc(delivery.sent)
    say(f"delivered: {delivery.vector} (sequence {info.sequence}, SHA-256 {info.sha256[:16]}...)")


def serve_tasks(site: Site, ready: Ready, *, until_stopped: bool) -> None:
    """Serves the tasks that wait for this hospital: once, or until SIGTERM."""
    from agent.tasks import TaskServer

    server = TaskServer(
        settings=site.settings,
        client=site.client,
        base=ready.base,
        load_images=lambda split: _load_images(site, ready, (split,))[0],
        metrics=site.metrics,
        show=say,
        vector_sha256=_vector_sha256(site.settings),
        stop=site.stop,
        meeting_wait_seconds=0 if until_stopped else site.settings.tasks.meeting_wait_seconds,
    )
    while True:
        served = server.serve_waiting()
        if not until_stopped:
            if not served.waiting:
                say("no task waits for this hospital")
            if served.failed:
                raise TryAgain(f"not served: {', '.join(served.failed)}", remedy="see above, then run it again")
            return
        if site.stop.wait(served.poll_seconds):
            raise Interrupted("stopped while waiting for tasks", remedy="start it again to go on")


def _load_images(site: Site, ready: Ready, splits: Sequence[str]) -> list[ImageSet]:
    """The images of each split; corrupt ones are named, and left out. What earlier settings had decoded is removed.

    Raises:
        CorruptImages: too many, of those of all splits.
        Interrupted: the agent shall stop.
    """
    from datavector.data.images import demand_few, load_images, unused_caches

    settings = site.settings
    assert settings.data is not None  # noqa: S101  the preflight demands it
    base, cache, records = ready.base, settings.state / preflight.IMAGES, preflight.by_split(ready.records)
    for file in unused_caches(records.values(), base.input.size, cache):
        file.unlink()
    sets: list[ImageSet] = []
    for split in splits:
        with progress(f"decoding {split} images") as show:
            images = load_images(
                records[split],
                base.classes,
                base.input.size,
                cache=cache,
                max_corrupt=1,  # judged below, over all splits: one of few validation images may well be corrupt
                progress=partial(_advance, site, show),
            )
        for path, reason in images.corrupt:
            say(f"corrupt image left out: {path} ({reason})")
        site.metrics.corrupt_images.labels(split).set(len(images.corrupt))
        sets.append(images)
    corrupt = [each for images in sets for each in images.corrupt]
    demand_few(corrupt, sum(map(len, records.values())), settings.data.max_corrupt)
    return sets


def _advance(site: Site, show: Callable[[int, int], None], done: int, total: int) -> None:
    """Shows how far the decoding is, unless it shall stop."""
    if site.stop.is_set():
        raise Interrupted("stopped while decoding images", remedy="start it again to go on")
    show(done, total)


def _policy(site: Site) -> tuple[PolicyInfo, str]:
    """What the aggregator says of its policy; while it is away, what it said last: training needs nobody."""
    settings = site.settings
    try:
        with connect(settings, patience_seconds=0) as impatient:
            return preflight.aggregator(settings, impatient)
    except Unreachable as error:
        if (last := _last_policy(settings)) is not None:
            return last, f"{error.message}; going on with the policy that it had last"
        return preflight.aggregator(settings, site.client)


def _last_policy(settings: AgentSettings) -> PolicyInfo | None:
    """The policy at the last start, if it is still the one to take part in."""
    policy = _stored(settings.state / POLICY, PolicyInfo())
    if policy is None or not policy.base_digest:
        return None
    fits = settings.policy in (None, policy.name) and settings.base in (None, policy.base_digest)
    return policy if fits else None


def _vector_sha256(settings: AgentSettings) -> str:
    """Of the vector in the state folder; empty where there is none."""
    info = _stored(settings.state / VECTOR_INFO, VectorInfo())
    return info.sha256 if info and (settings.state / VECTOR).is_file() else ""


def _stored(path: Path, message: Stored) -> Stored | None:
    """Fills a message with what an earlier start left; None where that is absent, damaged or of a newer version."""
    try:
        return Parse(path.read_text(), message)
    except FileNotFoundError:
        return None
    except (ParseError, ValueError) as error:
        say(f"{path} cannot be read and is made anew ({' '.join(str(error).split())})")
        return None
