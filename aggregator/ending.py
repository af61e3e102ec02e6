"""Calls that somebody else can end while they wait for their hospital."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from datavector.errors import DataVectorError


class Ending:
    """How a running call is ended from outside."""

    def __init__(self, timer: asyncio.Timeout) -> None:
        self._timer = timer
        self._reason: DataVectorError | None = None

    def end(self, reason: DataVectorError, *, at_once: bool = True) -> None:
        """Lets the call end with `reason`: at once, wherever it waits, or else at its next `check`."""
        self._reason = self._reason or reason
        if at_once:
            with suppress(RuntimeError):  # it is ending already
                self._timer.reschedule(asyncio.get_running_loop().time())

    def check(self) -> None:
        """Raises the reason, if the call was ended."""
        if self._reason is not None:
            raise self._reason


@asynccontextmanager
async def endable() -> AsyncIterator[Ending]:
    """Runs a block that others can end.

    Raises:
        DataVectorError: the reason for which it was ended.
    """
    ending = None
    try:
        async with asyncio.timeout(None) as timer:
            ending = Ending(timer)
            yield ending
    except TimeoutError:
        if ending:
            ending.check()
        raise
