"""Tasks: what the aggregator asks of a hospital that came by. Each kind can be switched off in the settings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from agent.client import Client, inside
from agent.features import class_moments
from agent.metrics import Metrics
from agent.recalibrate import Exchange, choose_images, chosen_in_memory, measure, pooled_with
from agent.settings import AgentSettings
from agent.site import VECTOR
from agent.statistics import write_statistics
from agent.train import choose_device, evaluate_counts
from agent.upload import send_statistics
from datavector.choice import Counts
from datavector.console import progress
from datavector.data.images import ImageSet
from datavector.errors import (
    ArtifactError,
    DiskFull,
    InternalError,
    Interrupted,
    NotFound,
    QuotaExceeded,
    TryAgain,
    Unreachable,
)
from datavector.files import sha256_file
from datavector.merge.batchnorm import Moments
from datavector.merge.head import FeatureMoments
from datavector.merge.restored import tuned_tensors
from datavector.merge.statistics import KINDS as STATISTICS
from datavector.model import BaseModel
from datavector.networks import build, load_file, load_weights
from datavector.wire.v1.exchange_pb2 import (
    TASK_KIND_EVALUATE,
    TASK_KIND_RECALIBRATE_MEETING,
    TASK_KIND_RECALIBRATE_VISIT,
    TASK_KIND_STATISTICS,
    FileInfo,
    StatisticsInfo,
    Task,
)

FOLDER, SUFFIX = "tasks", ".safetensors"  # of weights to look at, in the state folder
KINDS = {
    TASK_KIND_STATISTICS: "statistics",  # first: a merge waits for them
    TASK_KIND_RECALIBRATE_VISIT: "visit",
    TASK_KIND_EVALUATE: "evaluation",
    TASK_KIND_RECALIBRATE_MEETING: "meeting",  # last: it may wait for others
}


# What may be over at the next try; anything else ends the agent.
PASSING = (TryAgain, Unreachable, ArtifactError, DiskFull, QuotaExceeded, InternalError)


@dataclass(frozen=True)
class Served:
    """What came of the tasks that waited.

    Attributes:
        poll_seconds: after which it is worth asking again.
        waiting: how many there were.
        failed: tasks that are still wanted, by id.
    """

    poll_seconds: float
    waiting: int
    failed: tuple[str, ...]


@dataclass(frozen=True)
class TaskServer:
    """Serves the tasks that wait for this hospital.

    Attributes:
        load_images: the hospital's images of a split, "train" or "val"; called when a task needs them.
        vector_sha256: of the vector in the state folder; empty where there is none.
        stop: set when the agent shall stop.
        meeting_wait_seconds: longest wait for a meeting's quorum; 0 for as long as it is wanted.
    """

    settings: AgentSettings
    client: Client
    base: BaseModel
    load_images: Callable[[str], ImageSet]
    metrics: Metrics
    show: Callable[[str], None]
    vector_sha256: str
    stop: threading.Event
    meeting_wait_seconds: int

    def serve_waiting(self) -> Served:
        """Serves what is waiting now."""
        reply = self.client.list_tasks()
        self._forget_all_but({task.version or task.id for task in reply.tasks})
        order = list(KINDS)
        in_order = sorted(reply.tasks, key=lambda task: order.index(task.kind) if task.kind in KINDS else len(order))
        failed = tuple(task.id for task in in_order if not self._serve(task))
        return Served(float(reply.poll_seconds), len(reply.tasks), failed)

    def _serve(self, task: Task) -> bool:
        """Returns whether there is nothing left to do for it."""
        kind = KINDS.get(task.kind, "unknown")
        if why := self._why_skipped(task, kind):
            self.metrics.tasks.labels(kind, "skipped").inc()
            self.show(f"task {task.id}: skipped ({why})")
            return True
        try:
            images = self._work(kind)(task)
        except (NotFound, *PASSING) as error:
            gone = isinstance(error, NotFound)  # the version was overtaken; else it is tried again at the next round
            self.metrics.tasks.labels(kind, "gone" if gone else "failed").inc()
            self.show(f"task {task.id}: {error}")
            return gone
        self.metrics.tasks.labels(kind, "done").inc()
        models = f"{len(task.weights)} models of " if len(task.weights) > 1 else ""
        what = f"for {models}{task.version}" if task.version else "of its vector"
        self.show(f"task {task.id}: {kind} {what} with {images} images")
        return True

    def _work(self, kind: str) -> Callable[[Task], int]:
        """What serves a kind of task, and returns how many images were used."""
        works = {"statistics": self._give_statistics, "evaluation": self._evaluate}
        return works.get(kind, partial(self._recalibrate, kind=kind))

    def _give_statistics(self, task: Task) -> int:
        """Measures what a merge method reads beside the hospital's vector, with the hospital's own model."""
        training, file = self.load_images("train"), inside(self.settings.state / FOLDER, f"{task.id}{SUFFIX}")
        chosen = choose_images(len(training), self.settings.tasks.max_images, 0)
        if not file.is_file():  # else an upload was stopped, and goes on
            self._measure_statistics(task.statistics, training.images[chosen], training.labels[chosen], file)
        info = StatisticsInfo(task_id=task.id, sha256=sha256_file(file), size=file.stat().st_size)
        try:
            with progress("upload of statistics") as show:
                self.metrics.sent_bytes.inc(send_statistics(self.client, task, file, info, on_progress=show))
        except ArtifactError:
            file.unlink()  # to be measured anew
            raise
        file.unlink()
        return len(chosen)

    def _measure_statistics(self, kind: str, images: torch.Tensor, labels: torch.Tensor, file: Path) -> None:
        network, names = build(self.base), (spec.name for spec in self.base.layout.tensors)
        own = tuned_tensors(self.base, self.settings.state / VECTOR)
        load_weights(network, dict(zip(names, own, strict=True)))
        device = choose_device(self.settings.training.device)
        with progress(f"{kind} statistics") as show:

            def advance(done: int, total: int) -> None:
                if self.stop.is_set():
                    raise Interrupted("stopped while measuring statistics", remedy="start it again: it begins anew")
                show(done, total)

            write_statistics(kind, file, network, self.base, images, labels, device=device, progress=advance)

    def _recalibrate(self, task: Task, kind: str) -> int:
        """One forward pass over the hospital's images with each merge's weights; returns how many were used."""
        training, device = self.load_images("train"), choose_device(self.settings.training.device)
        network, most = build(self.base), self.settings.tasks.max_images
        chosen = chosen_in_memory(network, self.base, training, max_images=most, device=device)
        images, labels = training.images[chosen], training.labels[chosen]
        if kind == "meeting":
            with self.client.meet(task, images=len(images), wait_seconds=self.meeting_wait_seconds) as meeting:
                for merge in self._load_each(task, network):
                    measure(network, self.base, images, _renamed(merge, meeting.pool), device=device)
            return len(images)
        others, moments = self.client.begin_visit(task), dict[str, Moments]()
        features, head = dict[str, FeatureMoments](), self.base.head if task.class_floor else None
        for merge in self._load_each(task, network):
            exchange = _renamed(merge, partial(pooled_with, others))
            found = measure(network, self.base, images, exchange, head=head, device=device)
            moments |= {f"{merge}/{layer}": own for layer, own in found.moments.items()}
            if found.features is not None:
                classes = len(self.base.classes)
                features[merge] = class_moments(found.features, labels, classes, floor=task.class_floor)
        self.client.complete_visit(task, moments, features, images=len(images))
        return len(images)

    def _evaluate(self, task: Task) -> int:
        """Counts of each model's answers on the hospital's validation images; returns how many those are."""
        images, device = self.load_images("val"), choose_device(self.settings.training.device)
        if not len(images):
            self.show("there are no validation images, so this hospital evaluates nothing")
            return 0
        network, counts = build(self.base), dict[str, Counts]()
        for model in self._load_each(task, network):
            counts[model] = evaluate_counts(network, self.base, images, device=device)
        self.client.evaluate(task, counts)
        return len(images)

    def _load_each(self, task: Task, network: nn.Module) -> Iterator[str]:
        """Fetches each model's weights, loads them into the network, and gives the model's name."""
        for file in task.weights:
            with self._fetched(task, file) as path:
                load_file(network.to(torch.device("cpu")), path, self.base.layout)
            yield file.name.removesuffix(SUFFIX)

    @contextmanager
    def _fetched(self, task: Task, file: FileInfo) -> Iterator[Path]:
        path = inside(self.settings.state / FOLDER, f"{task.version}-{file.name}")
        self.client.fetch(file, path, task_id=task.id)
        yield path
        path.unlink()

    def _forget_all_but(self, names: Collection[str]) -> None:
        """Removes files, also half-fetched ones, but those of these versions and tasks."""
        for path in (self.settings.state / FOLDER).glob(f"*{SUFFIX}*"):
            if not path.name.lstrip(".").startswith(tuple(f"{each}{end}" for each in names for end in "-.")):
                path.unlink()

    def _why_skipped(self, task: Task, kind: str) -> str:
        """Why a task is not for this hospital; empty where it is."""
        tasks = self.settings.tasks
        if kind == "unknown" or (kind == "statistics" and task.statistics not in STATISTICS):
            return "this agent is too old for it"
        if task.base_digest != self.base.digest:
            return "of another base model"
        if kind == "statistics" and task.vector_sha256 != self.vector_sha256:
            return "the state folder has another vector"
        switches = {"statistics": tasks.statistics, "evaluation": tasks.evaluate}
        return "" if switches.get(kind, tasks.recalibrate) else "switched off in the settings"


def _renamed(merge: str, exchange: Exchange) -> Exchange:
    """An exchange under names that tell the merges' layers apart."""
    return lambda layer, own: exchange(f"{merge}/{layer}", own)
