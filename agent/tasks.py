"""Tasks: what the aggregator asks of a hospital that came by. Each kind can be switched off in the settings."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

from agent.client import Client, inside
from agent.metrics import Metrics
from agent.recalibrate import images_in_memory, measure, pooled_with
from agent.settings import AgentSettings
from agent.train import choose_device
from datavector.data.images import ImageSet
from datavector.errors import NotFound, TryAgain, Unreachable
from datavector.model import BaseModel
from datavector.networks import build, load_file
from datavector.wire.v1.exchange_pb2 import TASK_KIND_RECALIBRATE_MEETING, TASK_KIND_RECALIBRATE_VISIT, Task

FOLDER, SUFFIX = "tasks", ".safetensors"  # of merged weights, in the state folder
KINDS = {TASK_KIND_RECALIBRATE_VISIT: "visit", TASK_KIND_RECALIBRATE_MEETING: "meeting"}


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
        load_images: the hospital's training images; called once, when the first task needs them.
        meeting_wait_seconds: longest wait for a meeting's quorum; 0 for as long as it is wanted.
    """

    settings: AgentSettings
    client: Client
    base: BaseModel
    load_images: Callable[[], ImageSet]
    metrics: Metrics
    show: Callable[[str], None]
    meeting_wait_seconds: int

    def serve_waiting(self) -> Served:
        """Serves what is waiting now."""
        reply = self.client.list_tasks()
        self._forget_all_but({task.version for task in reply.tasks})
        visits_first = sorted(reply.tasks, key=lambda task: task.kind == TASK_KIND_RECALIBRATE_MEETING)
        failed = tuple(task.id for task in visits_first if not self._serve(task))
        return Served(float(reply.poll_seconds), len(reply.tasks), failed)

    def _serve(self, task: Task) -> bool:
        """Returns whether there is nothing left to do for it."""
        kind = KINDS.get(task.kind, "unknown")
        if kind == "unknown" or not self.settings.tasks.recalibrate or task.base_digest != self.base.digest:
            self.metrics.tasks.labels(kind, "skipped").inc()
            self.show(f"task {task.id}: skipped ({_why_skipped(kind, self.settings)})")
            return True
        try:
            images = self._recalibrate(task, kind)
        except (NotFound, TryAgain, Unreachable) as error:
            gone = isinstance(error, NotFound)  # the version was overtaken; else a meeting fell apart or the link broke
            self.metrics.tasks.labels(kind, "gone" if gone else "failed").inc()
            self.show(f"task {task.id}: {error}")
            return gone
        self.metrics.tasks.labels(kind, "done").inc()
        self.show(f"task {task.id}: {kind} for {task.version} with {images} images")
        return True

    def _recalibrate(self, task: Task, kind: str) -> int:
        """One forward pass over the hospital's images with the merged weights; returns how many were used."""
        weights = inside(self.settings.state / FOLDER, f"{task.version}{SUFFIX}")
        self.client.fetch(task.weights, weights, task_id=task.id)
        network, device = build(self.base), choose_device(self.settings.training.device)
        load_file(network, weights, self.base.layout)
        most = self.settings.tasks.max_images
        images = images_in_memory(network, self.base, self.load_images(), max_images=most, device=device)
        if kind == "meeting":
            with self.client.meet(task, images=len(images), wait_seconds=self.meeting_wait_seconds) as meeting:
                measure(network, self.base, images, meeting.pool, device=device)
        else:
            others = self.client.begin_visit(task)
            result = measure(network, self.base, images, partial(pooled_with, others), device=device)
            self.client.complete_visit(task, result.moments, images=result.images)
        weights.unlink()
        return len(images)

    def _forget_all_but(self, versions: Collection[str]) -> None:
        """Removes weights, also half-fetched ones, of versions that no task names any more."""
        for path in (self.settings.state / FOLDER).glob(f"*{SUFFIX}*"):
            if path.name.removeprefix(".").partition(SUFFIX)[0] not in versions:
                path.unlink()


def _why_skipped(kind: str, settings: AgentSettings) -> str:
    if kind == "unknown":
        return "this agent is too old for it"
    return "of another base model" if settings.tasks.recalibrate else "switched off in the settings"
