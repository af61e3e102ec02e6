"""The operator against a real API server: its own process and service account, real Jobs, whose Pods run here."""

from __future__ import annotations

from datavector.networks import create_base
from datavector.release import verify_release
from tests.aggregator.objects import policy
from tests.cluster.aggregation import CLAIM, condition, in_phase, manifest, phases, waiting_for


def test_from_arrivals_to_ready_and_after_a_withdrawal_to_what_never_had_the_hospital(
    space, store, start_operator, start_kubelet, arrive, tmp_path
):
    base = create_base(tmp_path / "base", architecture="resnet18", classes=("a", "b", "c"), size=32)
    store.import_base(base.path)
    start_kubelet(volumes={CLAIM: store.root})
    operator = start_operator()
    space.apply(manifest(policy(base=base.name, quiet=0, mode="uploaded", min_hospitals=3)))
    arrive(base, "north", "south")
    space.until(lambda: waiting_for(space) == "2 of 3 hospitals; waiting for one more", why=operator.tail)
    arrive(base, "west")
    first = space.until(lambda: in_phase(space, "Ready"), why=operator.tail)[0]
    space.kubectl("wait", "--for=condition=Ready", f"mv/{first}", "--timeout=5s")
    assert verify_release(store.release(first)).ok
    assert {each["status"]["mergedIn"][0] for each in space.items("datavectors")} == {first}
    assert "Ready" in space.kubectl("describe", f"mv/{first}").partition("Events:")[2]
    arrive(base, "east")
    second = space.until(lambda: [name for name in in_phase(space, "Ready") if name != first], why=operator.tail)[0]
    (gone,) = (each for each in space.items("datavectors") if each["spec"]["hospital"] == "east")
    blob = store.blob("east", gone["spec"]["artifact"]["digest"])
    space.kubectl("patch", f"dv/{gone['metadata']['name']}", "--type=merge", '--patch={"spec":{"consent":"Withdrawn"}}')
    space.until(lambda: phases(space)[second] == "Revoked" and not blob.exists(), why=operator.tail)
    space.until(lambda: waiting_for(space) == f"{first} is Ready", why=operator.tail)
    assert not store.has_version(second)
    assert condition(space.get(f"dv/{gone['metadata']['name']}"), "Erased")["status"] == "True"
