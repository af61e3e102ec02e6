"""One process to a store: the lock of the embedded aggregator, and of the receiver in a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from datavector.errors import UsageError
from datavector.files import locked


@contextlib.contextmanager
def alone(store: Path) -> Iterator[None]:
    """Keeps a second aggregator or receiver off a store; the lock ends with the process, however that ends.

    Raises:
        UsageError: there is one.
    """
    taken = UsageError(f"another aggregator uses the store {store}", remedy="stop it first, or give another store")
    with locked(store / "lock", taken):
        yield
