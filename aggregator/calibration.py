"""Tasks for hospitals: which calibrations want whom, visits one by one, and meetings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from aggregator.meeting import Read, Room, Write
from aggregator.metrics import Metrics
from aggregator.resources import CalibrationMode
from aggregator.store import OpenCalibration, Store, Visit
from datavector.errors import NotFound, ProtocolError
from datavector.merge.batchnorm import Moments, pool_layers
from datavector.model import BaseModel
from datavector.wire.v1.exchange_pb2 import MeetJoin


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
        return self.calibration.mode == CalibrationMode.MEETING


def batchnorm_channels(base: BaseModel) -> dict[str, int]:
    """Channels of each BatchNorm layer."""
    return {layer: base.layout.by_name[f"{layer}.running_mean"].elements for layer in base.batchnorm_layers}


class Calibrations:
    """The open calibrations of a store.

    Args:
        wake: called after every stored visit and meeting.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        wake: Callable[[], None],
        *,
        grace_seconds: float,
        idle_timeout_seconds: float,
        poll_seconds: float,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._wake = wake
        self._grace = grace_seconds
        self._idle_timeout = idle_timeout_seconds
        self._poll = poll_seconds
        self._rooms: dict[str, Room] = {}

    def offers(self, hospital: str) -> Iterator[Offer]:
        """What waits for a hospital: in a visit its next round, once a quorum has done the one before."""
        for calibration in self._store.open_calibrations():
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
        raise _not_waiting(hospital, task_id)

    def pooled(self, hospital: str, task_id: str) -> dict[str, Moments]:
        """What the other hospitals left, pooled, by layer; empty before the first of them.

        Raises:
            NotFound: the task does not wait for this hospital (any more).
            ProtocolError: it is a meeting.
        """
        calibration = self.offer(hospital, task_id).calibration
        _demand_visits(calibration)
        others = [visit.moments for visit in self._store.visits(calibration.version) if visit.hospital != hospital]
        return pool_layers(others)

    def calibration(self, hospital: str, task_id: str) -> OpenCalibration:
        """The open calibration of a task that waits for this hospital or that it has finished.

        Raises:
            NotFound: there is none.
        """
        for calibration in self._store.open_calibrations():
            if calibration.version == task_id.rpartition(".")[0] and hospital in calibration.hospitals:
                return calibration
        raise _not_waiting(hospital, task_id)

    def complete(self, hospital: str, task_id: str, base: BaseModel, images: int, moments: dict[str, Moments]) -> str:
        """Stores a visit.

        Returns:
            What the calibration still waits for, as a sentence.

        Raises:
            NotFound: the task is no longer wanted.
            ProtocolError: it is a meeting, layers are missing, or no image was used.
        """
        _demand_visits(self.calibration(hospital, task_id))
        if not self._is_done(hospital, task_id):
            offer = self.offer(hospital, task_id)
            if missing := sorted(set(base.batchnorm_layers) - set(moments)):
                raise ProtocolError(
                    f"a visit lacks {len(missing)} layers, such as {missing[0]!r}", remedy="visit again"
                )
            if images < 1:
                raise ProtocolError("a visit used no image", remedy="check the images and visit again")
            self._store.save_visit(offer.calibration.version, Visit(hospital, images, offer.round, moments))
            self._saved(offer.calibration, 1)
        return self._waiting_for(task_id)

    async def meet(
        self, hospital: str, offer: Offer, base: BaseModel, join: MeetJoin, read: Read, write: Write
    ) -> None:
        """Takes a hospital through the next meeting of a version; see `Room.attend`."""
        calibration = offer.calibration
        room = self._rooms.get(calibration.version)
        if room is None:
            room = self._rooms[calibration.version] = Room(
                calibration,
                batchnorm_channels(base),
                grace_seconds=self._grace,
                idle_timeout_seconds=self._idle_timeout,
                poll_seconds=self._poll,
                wanted=lambda: calibration in self._store.open_calibrations(),
                save=lambda visits: self._save_meeting(calibration, visits),
            )
        try:
            await room.attend(hospital, join.images, join.wait_seconds, read, write)
        finally:
            if room.empty and self._rooms.get(calibration.version) is room:
                del self._rooms[calibration.version]

    def _is_done(self, hospital: str, task_id: str) -> bool:
        """Whether a hospital has finished this visit before: an answer that got lost is given again."""
        number = task_id.rpartition(".")[2]
        done = self._store.rounds(self.calibration(hospital, task_id).version)
        return number.isdecimal() and 0 < int(number) <= done.get(hospital, 0)

    def _save_meeting(self, calibration: OpenCalibration, visits: list[Visit]) -> None:
        self._store.save_meeting(calibration.version, visits)
        self._saved(calibration, len(visits))

    def _saved(self, calibration: OpenCalibration, visits: int) -> None:
        self._metrics.visits.labels(calibration.mode).inc(visits)
        self._wake()

    def _waiting_for(self, task_id: str) -> str:
        version, _, number = task_id.rpartition(".")
        done: Mapping[str, int] = self._store.rounds(version)
        for calibration in self._store.open_calibrations():
            if calibration.version == version:
                missing = [name for name in calibration.hospitals if done.get(name, 0) < int(number)]
                return f"round {number}: waiting for {', '.join(missing)}" if missing else f"round {number} is complete"
        return f"{version} waits for nobody"


def _demand_visits(calibration: OpenCalibration) -> None:
    if calibration.mode == CalibrationMode.MEETING:
        raise ProtocolError(f"{calibration.version!r} is calibrated in a meeting", remedy="ask for tasks again")


def _not_waiting(hospital: str, task_id: str) -> NotFound:
    return NotFound(f"task {task_id!r} does not wait for {hospital!r}", remedy="ask for tasks again")
