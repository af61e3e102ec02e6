"""Bringing a base model into a store beside a running aggregator, and its object for a cluster."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from aggregator.resources import BaseModelResource, BaseModelSpec, Metadata
from aggregator.store import Store


def import_base(source: Path, store: Path) -> str:
    """Copies a base model artifact into a store.

    Returns:
        The BaseModel object for it, as YAML.

    Raises:
        BaseModelError: the source is incomplete or altered.
        UsageError: the store holds other files.
        DiskFull: no space is left.
    """
    base = Store(store).import_base(source)
    spec = BaseModelSpec(
        architecture=base.architecture,
        classes=base.classes,
        input_size=base.input.size,
        artifact_digest=base.digest,
    )
    name = re.sub(r"[^a-z0-9]+", "-", base.name.lower()).strip("-") or "base"
    content = BaseModelResource(metadata=Metadata(name=name), spec=spec).dump()
    del content["status"]
    text: str = yaml.safe_dump(content, sort_keys=False)
    return text
