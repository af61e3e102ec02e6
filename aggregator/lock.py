"""One process to a store: the lock of the embedded aggregator, and of the receiver in a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from datavector.console import say
from datavector.errors import UsageError
from datavector.files import locked


@contextlib.contextmanager
def alone(store: Path, *, patient: bool = False) -> Iterator[None]:
    """Keeps a second aggregator or receiver off a store; the lock ends with the process, however that ends.

    Args:
        patient: waits for the other to end, as where a Pod takes another's place.

    Raises:
        UsageError: there is one, and it is not waited for.
    """
    taken = UsageError(f"another aggregator uses the store {store}", remedy="stop it first, or give another store")
    with contextlib.ExitStack() as holding:
        try:
            holding.enter_context(locked(store / "lock", taken))
        except UsageError:
            if not patient:
                raise
            say(f"waiting for the process to end that uses the store {store}")
            holding.enter_context(locked(store / "lock"))
        yield
