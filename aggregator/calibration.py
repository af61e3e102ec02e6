"""Tasks for hospitals: which calibrations want whom, visits one by one, and meetings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from aggregator.meeting import Read, Room, Write
from aggregator.metrics import Metrics
from aggregator.reconcile import quorum
from aggregator.registry import Registry
from aggregator.resources import MOST_IMAGES, CalibrationMode, Phase
from aggregator.store import Store, Visit
from datavector.errors import NotFound, ProtocolError
from datavector.merge.batchnorm import Moments, pool_layers
from datavector.model import BaseModel
from datavector.wire.v1.exchange_pb2 import MeetJoin


@dataclass(frozen=True)
class OpenCalibration:
    """What a version wants from hospitals while it is Calibrating.

    Attributes:
        bodies: the ways to merge it, each of which is calibrated.
        hospitals: whose vectors are merged; only they are asked.
        quorum: how many must take part.
        rounds: visits per hospital.
        class_floor: images of a class from which on a visitor gives its features' sums; 0 for no features.
    """

    version: str
    base_digest: str
    mode: CalibrationMode
    bodies: tuple[str, ...]
    hospitals: tuple[str, ...]
    quorum: int
    rounds: int
    class_floor: int


@dataclass(frozen=True)
class Offer:
    """A task that waits for a hospital."""

    calibration: OpenCalibration
    round: int

    @property
    def id(self) -> str:
        return f"{self.calibration.version}.{self.round}"

    @property
    def is_meeting(self) -> bool:
        return self.calibration.mode is CalibrationMode.MEETING


def batchnorm_channels(base: BaseModel, bodies: Iterable[str]) -> dict[str, int]:
    """Channels of each BatchNorm layer of each body, by `<body>/<layer>`."""
    channels = {layer: base.layout.by_name[f"{layer}.running_mean"].elements for layer in base.batchnorm_layers}
    return {f"{body}/{layer}": count for body in bodies for layer, count in channels.items()}


class Calibrations:
    """The open calibrations: those of versions that are Calibrating, under a policy that is there.

    Args:
        wake: called after every stored visit and meeting.
    """

    def __init__(
        self,
        store: Store,
        registry: Registry,
        metrics: Metrics,
        wake: Callable[[], None],
        *,
        grace_seconds: float,
        poll_seconds: float,
    ) -> None:
        self._store = store
        self._registry = registry
        self._metrics = metrics
        self._wake = wake
        self._grace = grace_seconds
        self._poll = poll_seconds
        self._rooms: dict[str, Room] = {}

    def offers(self, hospital: str) -> Iterator[Offer]:
        """What waits for a hospital: in a visit its next round, once a quorum has done the one before."""
        for calibration in self._open():
            if hospital not in calibration.hospitals:
                continue
            done = self._store.rounds(calibration.version)
            offer = Offer(calibration, done.get(hospital, 0) + 1)
            if offer.is_meeting:
                if len(done) < calibration.quorum:
                    yield Offer(calibration, 1)
            elif offer.round <= calibration.rounds:
                ready = sum(rounds >= offer.round - 1 for rounds in done.values())
                if offer.round == 1 or ready >= calibration.quorum:
                    yield offer

    def offer(self, hospital: str, task_id: str) -> Offer:
        """The offer of that name.

        Raises:
            NotFound: it does not wait for this hospital (any more).
        """
        for offer in self.offers(hospital):
            if offer.id == task_id:
                return offer
        raise not_waiting(hospital, task_id)

    def pooled(self, hospital: str, task_id: str) -> dict[str, Moments]:
        """What the other hospitals left, pooled, by layer; empty before the first of them.

        Raises:
            NotFound: the task does not wait for this hospital (any more).
            ProtocolError: it is a meeting.
        """
        offer = self.offer(hospital, task_id)
        _demand_visit(offer)
        others = [
            visit.moments for visit in self._store.visits(offer.calibration.version) if visit.hospital != hospital
        ]
        return pool_layers(others)

    def visit(self, hospital: str, task_id: str) -> Offer:
        """The visit of that name, whether it waits for this hospital or was finished before.

        Raises:
            NotFound: its calibration is not open, or this visit is not the hospital's.
            ProtocolError: it is a meeting.
        """
        version, _, number = task_id.rpartition(".")
        for calibration in self._open():
            if calibration.version == version and hospital in calibration.hospitals and number.isdecimal():
                offer = Offer(calibration, int(number))
                _demand_visit(offer)
                return offer
        raise not_waiting(hospital, task_id)

    def complete(self, hospital: str, offer: Offer, base: BaseModel, visit: Visit) -> str:
        """Stores a visit; one that was finished before stays as it is, since its answer may have got lost.

        Returns:
            What the calibration still waits for, as a sentence.

        Raises:
            NotFound: the task is no longer wanted.
            ProtocolError: layers are missing, or no image was used.
        """
        version = offer.calibration.version
        if not 1 <= offer.round <= self._store.rounds(version).get(hospital, 0):
            offer = self.offer(hospital, offer.id)
            if missing := sorted(set(batchnorm_channels(base, offer.calibration.bodies)) - set(visit.moments)):
                raise ProtocolError(
                    f"a visit lacks {len(missing)} layers, such as {missing[0]!r}", remedy="visit again"
                )
            if offer.calibration.class_floor and base.head and not visit.features:
                raise ProtocolError("a visit lacks the sums of features", remedy="use a matching version, visit again")
            demand_images(visit.images)
            self._store.save_visit(version, visit)
            self._saved(offer.calibration, 1)
        done = self._store.rounds(version)
        missing = [name for name in offer.calibration.hospitals if done.get(name, 0) < offer.round]
        return f"round {offer.round}: " + (f"waiting for {', '.join(missing)}" if missing else "complete")

    async def meet(
        self, hospital: str, offer: Offer, base: BaseModel, join: MeetJoin, read: Read, write: Write
    ) -> None:
        """Takes a hospital through the next meeting of a version; see `Room.attend`."""
        calibration = offer.calibration
        demand_images(join.images)
        room = self._rooms.get(calibration.version)
        if room is None:
            room = self._rooms[calibration.version] = Room(
                len(calibration.hospitals),
                calibration.quorum,
                batchnorm_channels(base, calibration.bodies),
                grace_seconds=self._grace,
                poll_seconds=self._poll,
                wanted=lambda: calibration in self._open(),
                save=lambda visits: self._save_meeting(calibration, visits),
            )
        try:
            await room.attend(hospital, join.images, join.wait_seconds, read, write)
        finally:
            if room.empty and self._rooms.get(calibration.version) is room:
                del self._rooms[calibration.version]

    def _open(self) -> Iterator[OpenCalibration]:
        policies = {policy.name: policy.spec for policy in self._registry.policies()}
        for version in self._registry.versions():
            policy = policies.get(version.spec.policy_ref)
            if policy is not None and version.status.phase is Phase.CALIBRATING:
                yield OpenCalibration(
                    version=version.name,
                    base_digest=version.spec.base_model_ref,
                    mode=version.spec.calibration.mode,
                    bodies=tuple(version.bodies),
                    hospitals=version.hospitals,
                    quorum=quorum(policy.calibration, version),
                    rounds=version.spec.calibration.visits,
                    class_floor=version.spec.head.floor if version.asks_features else 0,
                )

    def _save_meeting(self, calibration: OpenCalibration, visits: list[Visit]) -> None:
        self._store.save_meeting(calibration.version, visits)
        self._saved(calibration, len(visits))

    def _saved(self, calibration: OpenCalibration, visits: int) -> None:
        self._metrics.visits.labels(calibration.mode.value).inc(visits)
        self._wake()


def demand_images(images: int) -> None:
    """
    Raises:
        ProtocolError: a hospital says that it used no image, or more than there can be.
    """
    if not 1 <= images <= MOST_IMAGES:
        raise ProtocolError(f"{images} images were used", remedy="check the images and run the task again")


def _demand_visit(offer: Offer) -> None:
    if offer.is_meeting:
        version = offer.calibration.version
        raise ProtocolError(f"{version!r} is calibrated in a meeting", remedy="ask for tasks again")


def not_waiting(hospital: str, task_id: str) -> NotFound:
    """What a hospital is told of a task, of whatever kind, that nobody wants of it."""
    return NotFound(f"task {task_id!r} does not wait for {hospital!r}", remedy="ask for tasks again")
