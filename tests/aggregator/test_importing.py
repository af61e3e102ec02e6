"""A base model comes into a store, with the object that a cluster needs."""

from __future__ import annotations

import pytest
import yaml

from aggregator.importing import import_base
from aggregator.resources import BaseModelResource
from aggregator.store import Store
from datavector.errors import UsageError


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store").root


def test_the_store_has_the_base_and_the_object_names_it(store, small_base):
    text = import_base(small_base.path, store)
    found = BaseModelResource.parse(yaml.safe_load(text))
    assert Store(store).base(found.spec.artifact_digest).digest == small_base.digest
    assert (found.name, found.spec.classes) == ("small", small_base.classes)


def test_importing_again_changes_nothing(store, small_base):
    assert import_base(small_base.path, store) == import_base(small_base.path, store)


def test_a_mistyped_path_does_not_become_a_store(tmp_path, small_base):
    with pytest.raises(UsageError, match="sotre is no aggregator's store"):
        import_base(small_base.path, tmp_path / "sotre")
    assert not (tmp_path / "sotre").exists()
