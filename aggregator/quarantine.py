"""Releasing a quarantined vector by hand, in an embedded aggregator's store."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from aggregator.main import REGISTRY
from aggregator.registry import SqliteRegistry
from datavector.errors import NotFound, UsageError


def release_quarantine(store: Path, name: str) -> str:
    """Lets a vector be merged though it is out of line; a running aggregator sees that when it next looks.

    Returns:
        What was done, as a sentence.
    Raises:
        UsageError: there is no aggregator's registry in that folder.
        NotFound: it has no such vector, or that one is not quarantined.
    """
    path = store / REGISTRY
    if not path.is_file():
        raise UsageError(
            f"{store} is no store of an embedded aggregator",
            remedy=f"in a cluster run: kubectl patch datavector {name} --type=merge -p "
            '\'{"spec":{"released":true}}\'',
        )
    with closing(SqliteRegistry(path)) as registry:
        vector = next((each for each in registry.vectors() if each.name == name), None)
        if vector is None or not vector.quarantine:
            waiting = ", ".join(each.name for each in registry.vectors() if each.quarantine) or "none"
            raise NotFound(f"no vector {name!r} is quarantined", remedy=f"quarantined: {waiting}")
        registry.save(vector.model_copy(update={"spec": vector.spec.model_copy(update={"released": True})}))
        return f"{name}: released; it was quarantined because {vector.quarantine}"
