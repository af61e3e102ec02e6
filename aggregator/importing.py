"""Bringing a base model into a store beside a running aggregator, and its object for a cluster."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from aggregator.resources import BaseModelResource, BaseModelSpec, Metadata
from aggregator.store import Store
from datavector.errors import StoreMissing, UsageError


def import_base(source: Path, store: Path) -> str:
    """Copies a base model artifact into a store.

    Returns:
        The BaseModel object for it, as YAML.

    Raises:
        BaseModelError: the source is incomplete or altered.
        UsageError: there is no store.
        DiskFull: no space is left.
    """
    try:
        Store(store, read_only=True).check()
    except StoreMissing as error:
        raise UsageError(
            f"{store} is no aggregator's store",
            remedy="give the folder that `datavector aggregator` or `datavector receiver` made for it when it started",
        ) from error
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
