"""Files in the store that no object names: marked when first seen, erased after a grace period.

They are left where an object was deleted by hand, or a process was killed between file and object. The mark is a file,
so a restart does not begin the period anew; an object that comes back takes the mark away.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from aggregator.resources import DataVector, ModelVersion
from aggregator.store import Store


def collect_garbage(
    store: Store, vectors: Iterable[DataVector], versions: Iterable[ModelVersion], grace: timedelta, now: datetime
) -> list[str]:
    """Marks what has no object, and erases what has been marked for longer than `grace`.

    Returns:
        What was erased.
    """
    kept = [vector.spec for vector in vectors if not vector.status.erased_at]  # an erased one may have come back
    named = {(spec.hospital, spec.artifact.digest.removeprefix("sha256:")) for spec in kept}
    blobs = {f"blob.{hospital}.{sha256}": (hospital, sha256) for hospital, sha256 in store.blobs() - named}
    known = {version.name for version in versions}
    folders = {f"version.{name}": name for name in store.versions() - known}
    overdue = store.mark_orphans({*blobs, *folders}, now - grace)
    for mark in overdue:
        if mark in blobs:
            store.erase_blob(*blobs[mark])
        else:
            store.erase_version(folders[mark])
        store.unmark_orphan(mark)
    return overdue
