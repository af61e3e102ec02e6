"""Meeting calibration: several hospitals make one forward pass together, layer by layer.

At every BatchNorm layer each hospital gives the moments of its own input and gets those of everybody present, pooled;
it normalises with them and goes on, so the pass equals one over all images in one batch. A hospital that is lost or
stalls drops out from that layer on; below the quorum everybody starts again.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from aggregator.ending import Ending, endable
from aggregator.store import Visit
from datavector.errors import DataVectorError, NotFound, ProtocolError, TryAgain
from datavector.merge.batchnorm import Moments, pool
from datavector.wire.moments import from_message, to_message
from datavector.wire.v1.exchange_pb2 import MeetDone, MeetReply, MeetRequest, MeetStart

log = logging.getLogger(__name__)

Read = Callable[[], Awaitable[MeetRequest | None]]
Write = Callable[[MeetReply], Awaitable[None]]


@dataclass(eq=False)
class Seat:
    """A hospital that has joined.

    Attributes:
        step: resolves when everybody present has come as far: first to None (the start), then to pooled moments.
        layer: whose moments it has given for the current step; "" while it is still computing.
        given: its own moments so far.
    """

    hospital: str
    images: int
    ending: Ending
    step: asyncio.Future[Moments | None]
    layer: str = ""
    given: dict[str, Moments] = field(default_factory=dict)

    def step_on(self, pooled: Moments | None) -> None:
        """Lets the hospital go on, to the next step."""
        self.layer = ""
        resolved, self.step = self.step, asyncio.get_running_loop().create_future()
        if not resolved.done():  # its call was cancelled just now
            resolved.set_result(pooled)


class Room:
    """Where the hospitals of one version meet. Who joins while a meeting is on waits for the next.

    Args:
        hospitals: how many may come at most.
        quorum: how many must take part.
        channels: the base model's BatchNorm layers with their numbers of channels.
        grace_seconds: how long a full quorum waits for the rest.
        wanted: whether the version still wants its calibration; asked every `poll_seconds` and before saving.
        save: takes the visits of those who stayed until the last layer.
    """

    def __init__(
        self,
        hospitals: int,
        quorum: int,
        channels: Mapping[str, int],
        *,
        grace_seconds: float,
        poll_seconds: float,
        wanted: Callable[[], bool],
        save: Callable[[list[Visit]], None],
    ) -> None:
        self._hospitals = hospitals
        self._quorum = quorum
        self._channels = channels
        self._grace = grace_seconds
        self._poll = poll_seconds
        self._wanted = wanted
        self._save = save
        self._waiting: dict[str, Seat] = {}
        self._present: dict[str, Seat] = {}
        self._done: MeetDone | None = None
        self._start: asyncio.TimerHandle | None = None

    @property
    def empty(self) -> bool:
        return not self._waiting and not self._present

    async def attend(self, hospital: str, images: int, wait_seconds: int, read: Read, write: Write) -> None:
        """Takes a hospital through the next meeting.

        Args:
            wait_seconds: longest wait for the meeting's start; 0 for as long as the version wants it.
        Raises:
            TryAgain: no meeting started in time, it stalled, or too few hospitals are left.
            NotFound: the version no longer wants it, or the meeting took place without this hospital.
            ProtocolError: what it sends are not the moments of the layer at which the others are.
        """
        async with endable() as ending:
            seat = Seat(hospital, images, ending, asyncio.get_running_loop().create_future())
            try:
                start = seat.step
                self._join(seat)
                await self._until(start, wait_seconds)
                await write(MeetReply(start=MeetStart(hospitals=sorted(self._present))))
                while len(seat.given) < len(self._channels):
                    message = await read()
                    ending.check()
                    layer, moments = self._read_layer(seat, message)
                    pooled = await self._give(seat, layer, moments)
                    await write(MeetReply(pooled=to_message(layer, pooled)))
                await write(MeetReply(done=self._done))
            finally:
                self._leave(seat)

    # --- One hospital

    def _join(self, seat: Seat) -> None:
        if older := self._waiting.pop(seat.hospital, None):
            older.ending.end(TryAgain(f"{seat.hospital!r} joined again on another connection", remedy="join once"))
        self._waiting[seat.hospital] = seat
        self._consider_start()

    async def _until(self, start: asyncio.Future[Moments | None], wait_seconds: int) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (wait_seconds or math.inf)
        while not start.done():
            if not self._wanted():
                raise _unwanted()
            if loop.time() >= deadline:
                raise TryAgain(
                    f"{len(self._waiting)} of {self._quorum} hospitals came within {wait_seconds} s",
                    remedy="agree on a time and join again",
                )
            await asyncio.wait([start], timeout=min(self._poll, deadline - loop.time()))

    def _read_layer(self, seat: Seat, message: MeetRequest | None) -> tuple[str, Moments]:
        if message is None or message.WhichOneof("part") != "layer" or message.layer.layer in seat.given:
            raise ProtocolError("a meeting wants each layer's moments once", remedy="use a matching version")
        return message.layer.layer, from_message(message.layer, self._channels)

    async def _give(self, seat: Seat, layer: str, moments: Moments) -> Moments:
        """Moments in, everybody's moments out."""
        seat.layer, seat.given[layer] = layer, moments
        step = seat.step
        self._advance()
        pooled = await step
        assert pooled is not None  # noqa: S101  only the start resolves to None
        return pooled

    def _leave(self, seat: Seat) -> None:
        if self._waiting.get(seat.hospital) is seat:
            del self._waiting[seat.hospital]
        if self._present.get(seat.hospital) is seat:
            del self._present[seat.hospital]
            self._advance()
        self._consider_start()

    # --- All together

    def _consider_start(self) -> None:
        if self._present or len(self._waiting) < self._quorum:
            if self._start:
                self._start.cancel()
            self._start = None
        elif len(self._waiting) == self._hospitals:
            self._begin()
        elif self._start is None:
            self._start = asyncio.get_running_loop().call_later(self._grace, self._begin)

    def _begin(self) -> None:
        if self._start:
            self._start.cancel()
        self._start = None
        self._present, self._waiting = self._waiting, {}
        for seat in self._present.values():
            seat.step_on(None)

    def _advance(self) -> None:
        """Pools a layer once everybody present has given it; ends the meeting below the quorum or after the last."""
        seats = [self._present[hospital] for hospital in sorted(self._present)]
        if len(seats) < self._quorum:
            self._end(TryAgain(f"{len(seats)} of {self._quorum} hospitals are left", remedy="join again"))
            return
        if not all(seat.layer for seat in seats):
            return
        layer = Counter(seat.layer for seat in seats).most_common(1)[0][0]
        if stray := [seat for seat in seats if seat.layer != layer]:
            for seat in stray:
                del self._present[seat.hospital]
                seat.ending.end(
                    ProtocolError(f"the others are at {layer!r}, not {seat.layer!r}", remedy="fetch the base again")
                )
            self._advance()
            return
        try:
            pooled = pool([seat.given[layer] for seat in seats])
            if len(seats[0].given) == len(self._channels):
                self._conclude(seats)
        except Exception as error:  # nobody may be left waiting for a step that never comes
            if not isinstance(error, DataVectorError):
                log.exception("a meeting failed")
                error = TryAgain("the meeting failed at the aggregator", remedy="join again")
            self._end(error)
            return
        for seat in seats:
            seat.step_on(pooled)

    def _conclude(self, seats: list[Seat]) -> None:
        """Saves what those who stayed have given; the meeting is over."""
        if not self._wanted():
            raise _unwanted()
        self._save([Visit(seat.hospital, seat.images, 1, seat.given) for seat in seats])
        self._done = MeetDone(hospitals=[seat.hospital for seat in seats], images=sum(seat.images for seat in seats))
        self._present = {}
        for seat in self._waiting.values():
            seat.ending.end(NotFound("the meeting took place without this hospital", remedy="ask for tasks again"))
        self._waiting = {}

    def _end(self, reason: DataVectorError) -> None:
        seats, self._present = self._present, {}
        for seat in seats.values():
            seat.ending.end(reason)


def _unwanted() -> NotFound:
    return NotFound("this calibration is no longer wanted", remedy="ask for tasks again")
