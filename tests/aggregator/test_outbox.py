"""The receiver in a cluster: objects in the Kubernetes API, and nothing lost while that is away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agent.client import Client
from agent.ledger import Ledger
from agent.upload import Delivery, upload
from aggregator.cluster import decode
from aggregator.reconcile import Base, World, desired_version
from aggregator.resources import DataVector, ModelVersion, Phase
from aggregator.uploads import Arrival
from datavector.errors import AlreadyWithdrawn, NotReady
from tests.aggregator.cluster_site import ClusterSite
from tests.aggregator.objects import at
from tests.cluster.control_plane import ControlPlane
from tests.cluster.roles import RECEIVER, rule
from tests.integration.processes import until
from tests.serving import announce, policy_of, write_tau

Connect = Callable[..., Client]


def send(client: Client, site: ClusterSite, *, seed: int = 1, sequence: int = 1) -> Delivery:
    path = write_tau(site.folder / f"tau-{seed}", site.base, seed=seed)
    return upload(client, path, announce(path, site.base, sequence=sequence))


def release_of(site: ClusterSite, *names: str) -> ModelVersion:
    """A Ready version of the vectors of these names, as the operator makes it."""
    vectors = tuple(decode(DataVector, site.vectors()[name]) for name in names)
    world = World(policy_of(site.base), Base(site.base.digest, has_batchnorm=True))
    version = desired_version(world, vectors)
    return version.with_phase(Phase.READY, now=at(0), ready_at=at(0))


def stored(site: ClusterSite, name: str) -> dict[str, Any]:
    return until(lambda: site.vectors().get(name), f"the object {name}")


def until_withdrawn(site: ClusterSite, name: str) -> None:
    until(lambda: site.vectors().get(name, {}).get("spec", {}).get("consent") == "Withdrawn", f"{name} withdrawn")


def serves(client: Client) -> bool:
    try:
        return bool(client.describe_release("small").version)
    except NotReady:
        return False


# --- Vectors become objects -----------------------------------------------------------------------------------


def test_an_upload_makes_one_object_of_a_spec_alone_however_often_it_comes(site, connect):
    receiver = site.start()
    client = connect(receiver.address)
    delivery = send(client, site)
    content = stored(site, delivery.vector)
    info = announce(site.folder / "tau-1", site.base)
    assert delivery.vector == Arrival.parse("north", site.base, info).name
    assert content["spec"] == {
        "hospital": "north",
        "baseModelRef": site.base.digest,
        "sequence": 1,
        "artifact": {"digest": f"sha256:{info.sha256}", "size": info.size},
        "sampleCount": 10,
        "consent": "Granted",
        "released": False,
    }
    assert "status" not in content
    receiver.until_metric('datavector_vectors{consent="Granted"}', 1)
    assert send(client, site) == Delivery(delivery.vector, 0)
    assert list(site.vectors()) == [delivery.vector]
    assert site.vectors()[delivery.vector]["metadata"]["uid"] == content["metadata"]["uid"]
    assert receiver.process.terminate() == 0


def test_a_policy_may_name_a_base_model_object_and_says_what_it_waits_for(site, connect):
    client = connect(site.start().address)
    site.patch("mergepolicies", "small", {"status": {"waitingFor": "2 hospitals"}}, "--subresource=status")
    until(lambda: client.describe().policies[0].waiting_for == "2 hospitals", "the sentence")
    assert client.describe().policies[0].base_digest == site.base.digest


# --- Without the API ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_uploads_and_withdrawals_are_answered_in_an_outage_and_carried_out_after_it(
    site, connect, control_plane: ControlPlane
):
    receiver = site.start()
    north, south = connect(receiver.address), connect(receiver.address, "south")
    merged = send(north, site)
    stored(site, merged.vector)
    version = release_of(site, merged.vector)
    site.release(version)
    until(lambda: serves(south), "the release")
    control_plane.stop_api_server()

    kept, taken = send(south, site, seed=2), send(north, site, seed=3, sequence=2)
    assert set(site.outbox()) == {f"{kept.vector}.json", f"{taken.vector}.json"}
    assert receiver.metric("datavector_receiver_outbox") == 2
    reply = north.withdraw()
    assert set(reply.vectors) == {merged.vector, taken.vector}
    assert list(reply.revoked_versions) == [version.name]
    assert not serves(south)
    forgetful = connect(receiver.address, ledger=Ledger(site.folder / "another.jsonl"))
    with pytest.raises(AlreadyWithdrawn, match=f"{taken.vector} was withdrawn"):
        send(forgetful, site, seed=3, sequence=2)
    assert {name for name, content in site.outbox().items() if content["spec"]["consent"] == "Withdrawn"} == {
        f"{merged.vector}.json",
        f"{taken.vector}.json",
    }

    control_plane.start_api_server()
    until_withdrawn(site, merged.vector)
    until_withdrawn(site, taken.vector)
    assert stored(site, kept.vector)["spec"]["consent"] == "Granted"
    receiver.until_metric("datavector_receiver_outbox", 0)
    assert site.outbox() == {}
    assert not serves(south)
    assert "Traceback" not in receiver.process.output


def test_what_a_killed_receiver_left_in_the_outbox_is_sent_by_the_next_one(site, connect):
    link = site.link()
    first = site.start(url=f"https://{link.address}")
    client = connect(first.address)
    link.set("refuse")
    delivery = send(client, site)
    first.process.kill()
    assert set(site.outbox()) == {f"{delivery.vector}.json"}
    assert site.vectors() == {}

    second = site.start(name="second")
    stored(site, delivery.vector)
    until(lambda: not site.outbox(), "an empty outbox")
    assert send(connect(second.address), site) == Delivery(delivery.vector, 0)


def test_a_receiver_says_what_it_waits_for_and_ends_when_told(site):
    link = site.link()
    link.set("refuse")
    receiver = site.start(url=f"https://{link.address}")
    missing = receiver.process.wait_for(f"waiting for the Kubernetes API at https://{link.address} to list ")
    assert missing == f"basemodels, datavectors, mergepolicies, modelversions of namespace {site.namespace}"
    receiver.process.wait_for("Connection refused); this is tried again until it is")
    assert receiver.process.terminate() == 0
    assert "Traceback" not in receiver.process.output


# --- Withdrawals ----------------------------------------------------------------------------------------------


def test_a_consent_that_is_withdrawn_with_kubectl_counts_at_once(site, connect):
    receiver = site.start()
    north, south = connect(receiver.address), connect(receiver.address, "south")
    delivery = send(north, site)
    stored(site, delivery.vector)
    site.release(release_of(site, delivery.vector))
    until(lambda: serves(south), "the release")
    site.patch("datavectors", delivery.vector, {"spec": {"consent": "Withdrawn"}})
    until(lambda: not serves(south), "the end of the release")
    with pytest.raises(AlreadyWithdrawn, match=f"{delivery.vector} was withdrawn"):
        send(north, site)


def test_what_is_forbidden_holds_up_nothing_else_and_is_done_once_it_is_allowed(site, connect):
    readable = rule("basemodels mergepolicies modelversions", "get list watch")
    site.allow([readable, rule("datavectors", "get list watch create")])
    receiver = site.start()
    client = connect(receiver.address)
    first = send(client, site)
    stored(site, first.vector)
    client.withdraw()
    receiver.process.wait_for(f"not allowed to PATCH datavectors.datavector.dev {first.vector} ")
    second = send(connect(receiver.address, "south"), site, seed=2)
    stored(site, second.vector)
    site.allow(RECEIVER)
    until_withdrawn(site, first.vector)
    receiver.process.wait_for("what waited for the Kubernetes API has been sent")
    assert "Traceback" not in receiver.process.output


# --- Starting -------------------------------------------------------------------------------------------------


def test_a_missing_right_is_said_in_one_sentence_and_waited_for(site, connect):
    site.allow([])
    receiver = site.start()
    line = receiver.process.wait_for("not allowed to GET modelversions.datavector.dev ")
    assert "give the service account the Role" in line
    receiver.process.wait_for("waiting for the Kubernetes API")
    site.allow(RECEIVER)
    assert connect(receiver.address).describe().hospital == "north"
    assert "Traceback" not in receiver.process.output


def test_a_second_receiver_on_a_store_takes_the_firsts_place_once_that_has_ended(site):
    first = site.start()
    assert first.address
    second = site.start(name="second").process
    second.wait_for("waiting for the process to end")
    assert first.process.terminate() == 0
    second.wait_for("listening on ")


def test_an_outbox_that_is_not_understood_is_named(site):
    path = site.store.root / "outbox" / "north-1.json"
    path.parent.mkdir()
    path.write_text('{"kind": "DataVector"}')
    process = site.start().process
    assert process.wait() == 2
    assert f"{path} cannot be read" in process.output
    assert path.exists()
