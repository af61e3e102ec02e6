"""What is known of a cluster's objects: from lists, watches and answers, in whatever order they come."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from aggregator.cluster import Cache, ClusterRegistry, Feed
from aggregator.kube import Api, Kind
from aggregator.resources import DataVector
from datavector.errors import ObjectMissing
from tests.aggregator.objects import vector
from tests.cluster.client import Cluster, write_kubeconfig
from tests.integration.processes import until
from tests.link import Link

NORTH, SOUTH = vector("north"), vector("south")


def content(resource: DataVector, version: int) -> dict[str, Any]:
    """The object as the API has it at a resource version."""
    dumped = resource.dump()
    return {**dumped, "metadata": {**dumped["metadata"], "resourceVersion": str(version)}}


class Listing:
    """An API that answers a list with these objects, after something else has happened."""

    def __init__(self, version: int, *contents: dict[str, Any], meanwhile: Callable[[], object] = lambda: None) -> None:
        self.version, self.contents, self.meanwhile = version, contents, meanwhile

    def list(self, kind: Kind, take: Callable[[dict[str, Any]], object]) -> str:
        for each in self.contents:
            take(each)
        self.meanwhile()
        return str(self.version)


def load(cache: Cache, listing: Any) -> None:
    cache.load(listing, DataVector)


def withdrawn(cache: Cache) -> dict[str, bool]:
    return {each.name: not each.granted for each in cache.all(DataVector)}


# --- The cache ------------------------------------------------------------------------------------------------


def test_older_news_never_replaces_newer():
    cache = Cache()
    cache.observe(DataVector, content(vector("north", withdrawn=True), 7))
    cache.observe(DataVector, content(NORTH, 5))
    assert withdrawn(cache) == {"north-1": True}


def test_a_late_answer_does_not_bring_back_what_is_gone():
    cache = Cache()
    cache.observe(DataVector, content(NORTH, 7), gone=True)
    cache.observe(DataVector, content(NORTH, 5))
    assert withdrawn(cache) == {}
    load(cache, Listing(9))
    cache.observe(DataVector, content(NORTH, 8))
    assert withdrawn(cache) == {}


def test_a_list_does_not_undo_what_was_answered_while_it_was_read():
    cache = Cache()

    def answer() -> None:
        cache.observe(DataVector, content(vector("north", withdrawn=True), 7))
        cache.observe(DataVector, content(SOUTH, 8))

    load(cache, Listing(6, content(NORTH, 5), meanwhile=answer))
    assert withdrawn(cache) == {"north-1": True, "south-1": False}


def test_a_list_forgets_what_is_not_in_it():
    cache = Cache()
    cache.observe(DataVector, content(NORTH, 5))
    load(cache, Listing(6, content(SOUTH, 4)))
    assert withdrawn(cache) == {"south-1": False}


# --- The feed -------------------------------------------------------------------------------------------------


@pytest.fixture
def link(cluster: Cluster, cut_link: Callable[[str], Link]) -> Link:
    return cut_link(cluster.url.removeprefix("https://"))


@pytest.fixture
def api(
    cluster: Cluster, crds: Any, namespace: str, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Api:
    """The API as an administrator, over a link that can be cut."""
    cluster.kubectl("create", "serviceaccount", "admin", f"--namespace={namespace}")
    role = ("--clusterrole=cluster-admin", f"--serviceaccount={namespace}:admin", f"--namespace={namespace}")
    cluster.kubectl("create", "rolebinding", "admin", *role)
    token = cluster.kubectl("create", "token", "admin", f"--namespace={namespace}").strip()
    path = tmp_path / "kubeconfig"
    write_kubeconfig(path, url=f"https://{link.address}", ca=cluster.ca, user={"token": token}, namespace=namespace)
    monkeypatch.setenv("KUBECONFIG", str(path))
    return Api(namespace)


def test_what_was_deleted_in_an_outage_is_gone_after_it(cluster, namespace, api, link):
    registry = ClusterRegistry(api, Cache())
    registry.add_vector(NORTH)
    registry.add_vector(SOUTH)
    with ExitStack() as stack:
        feed = Feed(api, registry.cache, [DataVector], lambda: None)
        stack.callback(feed.stop)
        feed.start()
        assert feed.wait_until_loaded(60)
        link.set("refuse")
        cluster.kubectl("delete", "datavectors", "north-1", f"--namespace={namespace}")
        assert set(withdrawn(registry.cache)) == {"north-1", "south-1"}
        link.set("open")
        until(lambda: set(withdrawn(registry.cache)) == {"south-1"}, "the end of north-1")


def test_a_kind_that_is_not_installed_is_named_with_what_to_do(api):
    with pytest.raises(
        ObjectMissing, match=r"strangers\.datavector\.dev is not there .* helm install with charts/crds"
    ):
        api.list(Kind("apis/datavector.dev/v1alpha1", "strangers"), print)
