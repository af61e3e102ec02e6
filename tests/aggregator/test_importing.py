"""A base model comes into a store, with the object that a cluster needs."""

from __future__ import annotations

import yaml

from aggregator.importing import import_base
from aggregator.resources import BaseModelResource
from aggregator.store import Store


def test_the_store_has_the_base_and_the_object_names_it(tmp_path, small_base):
    text = import_base(small_base.path, tmp_path / "store")
    found = BaseModelResource.parse(yaml.safe_load(text))
    assert Store(tmp_path / "store").base(found.spec.artifact_digest).digest == small_base.digest
    assert (found.name, found.spec.classes) == ("small", small_base.classes)


def test_importing_again_changes_nothing(tmp_path, small_base):
    assert import_base(small_base.path, tmp_path / "store") == import_base(small_base.path, tmp_path / "store")
