"""The custom resource definitions: made of the Python types; what the newest and the oldest Kubernetes do with them."""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import pytest
import yaml
from pydantic import Field, ValidationError

from aggregator import crds as definitions
from aggregator.resources import (
    KINDS,
    BaseModelResource,
    BaseModelSpec,
    Metadata,
    Part,
    Phase,
    PolicySpec,
    Resource,
)
from aggregator.resources import Condition as StatusCondition
from tests import check_crds
from tests.aggregator.objects import BASE, START, policy, vector, version
from tests.cluster.client import Cluster, KubectlFailed

Json = dict[str, Any]

REMOVED: Any = object()
LONGEST = "a" * 52  # name of a policy
DIGEST = "sha256:" + "0" * 64
CONDITION = {"type": "Ready", "status": "True", "reason": "Ready", "lastTransitionTime": "2030-01-01T00:00:00Z"}

NORTH, SOUTH = vector("north"), vector("south")
POLICY = policy()
VERSION = version(POLICY, NORTH, SOUTH)
BASE_MODEL = BaseModelResource(
    metadata=Metadata(name="lite0"),
    spec=BaseModelSpec(
        architecture="efficientnet_lite0",
        classes=("nevus", "melanoma"),
        input_size=224,
        artifact_digest=BASE.digest,
    ),
)
EXAMPLES: dict[str, Resource] = {"bm": BASE_MODEL, "dv": NORTH, "mp": POLICY, "mv": VERSION}


class Refusal(NamedTuple):
    """A change of a valid example that makes it wrong, and what a person is told."""

    example: str
    path: str
    value: Any
    says: str
    in_python: bool = True  # a policy file is refused for it as well


NEW = [
    Refusal("mp", "spec.trigger.minHospitals", 0, "minHospitals in body should be greater than or equal to 1"),
    Refusal("mp", "spec.trigger.minHospitals", "two", 'minHospitals in body must be of type integer: "string"'),
    Refusal("mp", "spec.trigger.quietPeriodSeconds", -1, "in body should be greater than or equal to 0"),
    Refusal("mp", "spec.trigger.quietPeriodSeconds", "60s", 'in body must be of type number: "string"'),
    Refusal("mp", "spec.trigger.quietPeriodSeconds", 7200, "maxWaitSeconds is shorter than quietPeriodSeconds"),
    Refusal("mp", "spec.trigger.maxWaitSeconds", 1e12, "in body should be less than or equal to 315360000"),
    Refusal("mp", "spec.trigger.minHospital", 3, 'unknown field "spec.trigger.minHospital"'),
    Refusal("mp", "spec.trigger.min_hospitals", 3, 'unknown field "spec.trigger.min_hospitals"'),
    Refusal("mp", "spec.calibration.quorum", 0, "spec.calibration.quorum in body should be greater than or equal to 1"),
    Refusal("mp", "spec.calibration.visits", 6, "spec.calibration.visits in body should be less than or equal to 5"),
    Refusal("mp", "spec.calibration.mode", "party", 'supported values: "visit", "meeting", "uploaded", "none"'),
    Refusal("mp", "spec.export.opset", 17, "spec.export.opset in body should be greater than or equal to 18"),
    Refusal("mp", "spec.historyLimit", 0, "spec.historyLimit in body should be greater than or equal to 1"),
    Refusal("mp", "spec.suspend", [], 'spec.suspend in body must be of type boolean: "array"'),
    Refusal("mp", "spec.baseModelRef", REMOVED, "spec.baseModelRef: Required value"),
    Refusal("mp", "spec.method.name", "sun", 'supported values: "auto", "dare"', in_python=False),
    Refusal("mp", "spec.method.parameters", {"scale": "two"}, "scale in body must be of type number"),
    Refusal("mp", "spec.job.resources.requests.memory", "4GB", "must be a quantity such as", in_python=False),
    Refusal("mp", "spec.job.resources.limits.memory", "-1Gi", "must be a quantity such as", in_python=False),
    Refusal("mp", "spec.job.resources.requests.memory", "5Gi", "a request is larger than its limit", in_python=False),
    Refusal("mp", "spec.job.resources.requests.cpu", 2, 'requests.cpu in body must be of type string: "integer"'),
    Refusal("mp", "spec.job.tolerations", [{"value": "x"}], "without a key needs operator: Exists", in_python=False),
    Refusal(
        "mp", "spec.job.tolerations", [{"key": "gpu", "operator": "Exists", "value": "x"}],
        "operator: Exists takes no value", in_python=False,
    ),
    Refusal(
        "mp", "spec.job.tolerations", [{"key": "gpu", "effect": "NoSchedule", "tolerationSeconds": 3}],
        "tolerationSeconds needs effect: NoExecute", in_python=False,
    ),
    Refusal("mp", "spec.job.backoffLimit", 21, "spec.job.backoffLimit in body should be less than or equal to 20"),
    Refusal("mp", "spec.job.imagePullSecrets", ["My Secret"], "spec.job.imagePullSecrets[0] in body should match"),
    Refusal("mp", "metadata.name", LONGEST + "a", "metadata.name of a MergePolicy has at most 52 characters"),
    Refusal("mp", "metadata.name", "Brain", "a lowercase RFC 1123 subdomain must consist of"),
    Refusal("dv", "spec.hospital", "North", "spec.hospital in body should match"),
    Refusal("dv", "spec.artifact.digest", "sha256:abc", "spec.artifact.digest in body should match"),
    Refusal("dv", "spec.artifact.size", 0, "spec.artifact.size in body should be greater than or equal to 1"),
    Refusal("dv", "spec.sampleCount", 0, "spec.sampleCount in body should be greater than or equal to 1"),
    Refusal("dv", "spec.sequence", 0, "spec.sequence in body should be greater than or equal to 1"),
    Refusal("dv", "spec.consent", "Maybe", 'supported values: "Granted", "Withdrawn"'),
    Refusal("mv", "spec.inputs", [], "spec.inputs in body should have at least 1 items"),
    Refusal("mv", "spec.inputs.1.dataVector", "north-1", "spec.inputs[1]: Duplicate value", in_python=False),
    Refusal("mv", "spec.inputs.0.digest", DIGEST.upper(), "spec.inputs[0].digest in body should match"),
    Refusal("mv", "spec.method", REMOVED, "spec.method: Required value"),
    Refusal("mv", "spec.policyRef", "Brain", "spec.policyRef in body should match"),
    Refusal("bm", "spec.classes", ["nevus"], "spec.classes in body should have at least 2 items"),
    Refusal("bm", "spec.artifactDigest", DIGEST[7:], "spec.artifactDigest in body should match"),
    Refusal("bm", "spec.layers", 3, 'unknown field "spec.layers"'),
]  # fmt: skip


class Change(NamedTuple):
    """A change of an object that is there, as a merge patch, and what a person is told."""

    what: str
    patch: Json
    says: str
    subresource: str = ""


CHANGES = [
    Change("dv/north-1", {"spec": {"hospital": "south"}}, "hospital cannot change; a hospital that"),
    Change("dv/north-1", {"spec": {"baseModelRef": DIGEST}}, "baseModelRef cannot change"),
    Change("dv/north-1", {"spec": {"sequence": 2}}, "sequence cannot change"),
    Change("dv/north-1", {"spec": {"artifact": {"digest": DIGEST}}}, "artifact cannot change"),
    Change("dv/north-1", {"spec": {"sampleCount": 101}}, "sampleCount cannot change"),
    Change("dv/west-1", {"spec": {"consent": "Granted"}}, "consent that was withdrawn cannot be granted again"),
    Change("dv/west-1", {"spec": {"consent": None}}, "consent that was withdrawn cannot be granted again"),
    Change("dv/west-1", {"status": {"withdrawnAt": None}}, "withdrawnAt cannot change once it is set", "status"),
    Change("dv/west-1", {"status": {"withdrawnAt": "2031-01-01T00:00:00Z"}}, "a withdrawal stays recorded", "status"),
    Change("dv/west-1", {"status": None}, "an erasure stays recorded", "status"),
    Change("dv/west-1", {"status": {"erasedAt": None}}, "erasedAt cannot change once it is set", "status"),
    Change("dv/north-1", {"status": {"storedAt": "yesterday"}}, "storedAt in body must be of type date-time", "status"),
    Change("bm/lite0", {"spec": {"inputSize": 240}}, "the spec of a BaseModel cannot change; create one under another"),
    Change(f"mv/{VERSION.name}", {"spec": {"inputsHash": "0"}}, "ModelVersion cannot change; change its"),
    Change(f"mv/{VERSION.name}", {"spec": {"export": {"opset": 19}}}, "the spec of a ModelVersion cannot change"),
    Change(f"mv/{VERSION.name}", {"status": {"phase": "Done"}}, 'Unsupported value: "Done"', "status"),
    Change("mv/revoked", {"status": {"phase": "Ready"}}, "a Revoked version stays Revoked", "status"),
    Change("mv/revoked", {"status": None}, "a Revoked version stays Revoked", "status"),
    Change("mv/revoked", {"status": {"conditions": [CONDITION, CONDITION]}}, "Duplicate value", "status"),
    Change("mp/brain", {"status": {"conditions": [{**CONDITION, "status": "Yes"}]}}, 'values: "True"', "status"),
    Change("mp/brain", {"spec": {"trigger": {"maxWaitSeconds": 5}}}, "maxWaitSeconds is shorter than"),
]  # fmt: skip


def changed(document: Json, path: str, value: Any) -> Json:
    """A copy of a document with one value replaced, added or removed; the path has dots, and numbers for items."""
    document = copy.deepcopy(document)
    *way, last = path.split(".")
    place: Any = document
    for key in way:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if value is REMOVED:
        del place[last]
    else:
        place[last] = value
    return document


def fields(schema: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    """Every field below a schema, with its path."""
    for name, field in schema.get("properties", {}).items():
        yield f"{path}.{name}", field
        yield from fields(field.get("items", field), f"{path}.{name}")


def kind_of(document: Json) -> type[Resource]:
    return next(kind for kind in KINDS if kind.kind_name == document["kind"])


def parse(document: Json) -> Resource:
    """What the API returned as an object of ours: of the metadata, what the types know."""
    known = {field.alias for field in Metadata.model_fields.values()}
    metadata = {name: value for name, value in document["metadata"].items() if name in known}
    return kind_of(document).parse({**document, "metadata": metadata})


# --- Without a cluster ----------------------------------------------------------------------------------------


def test_the_committed_definitions_are_what_the_types_say():
    assert check_crds.stale() == []


def test_the_chart_is_for_the_versions_that_the_definitions_need():
    chart = yaml.safe_load((check_crds.FOLDER.parent / "Chart.yaml").read_text())
    assert (chart["name"], chart["kubeVersion"]) == ("datavector-crds", ">=1.32.0-0")


@pytest.mark.parametrize("text", definitions.files().values(), ids=definitions.files())
def test_a_definition_is_a_template_and_plain_yaml_at_once(text):
    assert "{{" not in text
    assert yaml.safe_load(text)["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind_name)
def test_every_field_is_described(kind):
    schema = definitions.schema(kind)
    del schema["properties"]["metadata"]
    assert schema["description"]
    assert [path for path, field in fields(schema) if not field.get("description")] == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind_name)
def test_a_status_has_no_defaults(kind):
    status = definitions.schema(kind)["properties"]["status"]
    assert [path for path, field in fields(status) if "default" in field] == []


class Ratio(Part):
    above_zero: float = Field(gt=0, description="A number.")


class Measured(Resource):
    """Something of another form."""

    kind_name: ClassVar[str] = "Measured"
    plural: ClassVar[str] = "measured"
    spec: Ratio
    status: Ratio | None = None


class Even(Part):
    number: int = Field(multiple_of=2)


class Odd(Resource):
    """Something that nobody has translated yet."""

    spec: Even
    status: Even | None = None


def test_an_exclusive_bound_is_a_mark_on_the_minimum():
    bound = definitions.schema(Measured)["properties"]["spec"]["properties"]["aboveZero"]
    assert bound == {"description": "A number.", "type": "number", "minimum": 0, "exclusiveMinimum": True}


def test_a_bound_without_a_translation_is_an_error():
    with pytest.raises(ValueError, match="Number has multipleOf, which is not translated"):
        definitions.schema(Odd)


@pytest.mark.parametrize("case", NEW, ids=lambda case: f"{case.example}-{case.path}")
def test_python_refuses_what_kubernetes_refuses_but_for_what_only_jobs_and_names_need(case: Refusal):
    document = changed(EXAMPLES[case.example].dump(), case.path, case.value)
    try:
        kind_of(document).parse(document)
    except ValidationError:
        assert case.in_python
    else:
        assert not case.in_python


# --- With one -------------------------------------------------------------------------------------------------


class Place:
    """A namespace of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.name = f"crds-{uuid.uuid4().hex[:8]}"
        cluster.kubectl("create", "namespace", self.name)

    def kubectl(self, *args: str, **options: Any) -> str:
        return self.cluster.kubectl(*args, f"--namespace={self.name}", **options)

    def create(self, document: Json, *args: str) -> Json:
        """Creates an object as strictly as kubectl does, and returns it as the API does."""
        answer = self.kubectl("create", "-f", "-", "--validate=strict", "--output=json", *args, input=document)
        created: Json = json.loads(answer)
        return created

    def patch(self, what: str, patch: Json, *args: str, subresource: str = "") -> Json:
        where = [f"--subresource={subresource}"] if subresource else []
        answer = self.kubectl(
            "patch", what, "--type=merge", f"--patch={json.dumps(patch)}", "-o", "json", *where, *args
        )
        found: Json = json.loads(answer)
        return found

    def add(self, resource: Resource) -> Json:
        """Creates an object, then writes its status, as the aggregator does."""
        document = resource.dump()
        self.create(document)
        what = f"{resource.plural}/{resource.name}"
        return self.patch(what, {"status": document.get("status", {})}, subresource="status")


@pytest.fixture
def place(served: Cluster) -> Iterator[Place]:
    """An empty namespace."""
    place = Place(served)
    yield place
    served.kubectl("delete", "namespace", place.name, "--wait=false")


@pytest.fixture(scope="module")
def furnished(served: Cluster) -> Iterator[Place]:
    """A namespace with one object of each kind, a withdrawn vector, and a revoked version; tests leave it as it is."""
    place = Place(served)
    for resource in story():
        place.add(resource)
    yield place
    served.kubectl("delete", "namespace", place.name, "--wait=false")


def story() -> tuple[Resource, ...]:
    """Objects of a collaboration in which west has withdrawn its vector."""
    stored = StatusCondition(type="Stored", status="True", reason="Stored", last_transition_time=START)
    available = StatusCondition(type="Available", status="True", reason="Stored", last_transition_time=START)
    west = vector("west", withdrawn=True)
    west = with_status(west, erased_at=START, conditions=(stored,))
    revoked = version(POLICY, NORTH, SOUTH, vector("west")).with_phase(
        Phase.REVOKED, now=START, message="it contains west-1, which was withdrawn"
    )
    ready = version(POLICY, NORTH, SOUTH, phase=Phase.READY)
    granted = (with_status(each, merged_in=(ready.name,), conditions=(stored,)) for each in (NORTH, SOUTH))
    return (
        with_status(BASE_MODEL, conditions=(available,)),
        *granted,
        west,
        with_status(POLICY, latest_version=ready.name, waiting_for="new vectors"),
        ready,
        revoked.model_copy(update={"metadata": Metadata(name="revoked")}),
    )


def with_status(resource: Any, **changes: Any) -> Any:
    return resource.model_copy(update={"status": resource.status.model_copy(update=changes)})


def test_the_definitions_are_established_and_structural(served: Cluster):
    names = [f"{kind.plural}.datavector.dev" for kind in KINDS]
    found = served.get("customresourcedefinitions", *names)["items"]
    for definition in found:
        conditions = {each["type"]: each["status"] for each in definition["status"]["conditions"]}
        assert conditions == {"Established": "True", "NamesAccepted": "True"}
    assert len(found) == 4


def test_other_tests_find_the_definitions_in_the_cluster(crds: tuple[str, ...]):
    assert [name.partition("/")[2] for name in crds] == [f"{kind.plural}.datavector.dev" for kind in KINDS]


@pytest.mark.parametrize("resource", EXAMPLES.values(), ids=EXAMPLES)
def test_what_python_writes_is_accepted_and_read_back(place: Place, resource: Resource):
    document = place.add(resource)
    again = parse(document)
    assert (again.spec, again.status) == (resource.spec, resource.status)  # type: ignore[attr-defined]
    assert again.metadata.uid
    assert again.metadata.generation == 1


def test_a_policy_shows_its_defaults(place: Place):
    minimal = {
        "apiVersion": "datavector.dev/v1alpha1",
        "kind": "MergePolicy",
        "metadata": {"name": LONGEST},
        "spec": {"baseModelRef": "lite0"},
    }
    shown = place.create(minimal)["spec"]
    assert shown == PolicySpec(base_model_ref="lite0").model_dump(mode="json", by_alias=True, exclude_none=True)


@pytest.mark.parametrize("part", ["method", "trigger", "calibration", "export", "job"])
def test_an_empty_part_of_a_policy_has_its_defaults_too(place: Place, part: str):
    document = changed(POLICY.dump(), f"spec.{part}", {})
    shown = place.create(document)
    assert parse(shown) is not None
    assert shown["spec"][part] == kind_of(document).parse(document).dump()["spec"][part]


@pytest.mark.parametrize("case", NEW, ids=lambda case: f"{case.example}-{case.path}")
def test_a_wrong_object_is_refused_in_words(furnished: Place, case: Refusal):
    document = changed(EXAMPLES[case.example].dump(), case.path, case.value)
    if not case.path.startswith("metadata"):
        document["metadata"]["name"] += "-wrong"
    with pytest.raises(KubectlFailed) as refused:
        furnished.create(document, "--dry-run=server")
    assert case.says in str(refused.value)


@pytest.mark.parametrize("case", CHANGES, ids=lambda case: f"{case.what}-{json.dumps(case.patch)[:50]}")
def test_a_change_that_may_not_be_is_refused_in_words(furnished: Place, case: Change):
    with pytest.raises(KubectlFailed) as refused:
        furnished.patch(case.what, case.patch, "--dry-run=server", subresource=case.subresource)
    assert case.says in str(refused.value)


@pytest.mark.parametrize(
    ("what", "patch", "subresource"),
    [
        ("dv/north-1", {"spec": {"consent": "Withdrawn"}}, ""),
        ("dv/north-1", {"status": {"withdrawnAt": "2031-01-01T00:00:00Z"}}, "status"),
        ("dv/west-1", {"status": {"mergedIn": []}}, "status"),
        ("mp/brain", {"spec": {"trigger": {"minHospitals": 3}, "suspend": True}}, ""),
        ("mp/brain", {"metadata": {"labels": {"team": "imaging"}}}, ""),
        ("mv/revoked", {"status": {"message": "other words"}}, "status"),
    ],
)
def test_a_change_that_may_be_is_accepted(furnished: Place, what: str, patch: Json, subresource: str):
    furnished.patch(what, patch, "--dry-run=server", subresource=subresource)


def test_a_status_is_written_only_as_a_status(place: Place):
    created = place.create(version(POLICY, NORTH, SOUTH, phase=Phase.READY).dump())
    assert "status" not in created


def test_explain_describes_the_fields(served: Cluster):
    text = " ".join(served.kubectl("explain", "mergepolicy.spec.trigger").split())
    assert "When arrivals become a version." in text
    assert "A version is made when nothing arrived for this long." in text


def test_get_answers_without_the_documentation(furnished: Place):
    vectors, policies, versions = furnished.kubectl("get", "dv,mp,mv").strip().split("\n\n")
    rows = [line.split() for line in vectors.splitlines()]
    assert rows[0] == ["NAME", "HOSPITAL", "SEQUENCE", "IMAGES", "CONSENT", "STORED", "MERGED-IN", "AGE"]
    assert rows[1][1:6] == ["north", "1", "100", "Granted", "True"]
    assert VERSION.name in rows[1][6]
    assert rows[3][1:6] == ["west", "1", "100", "Withdrawn", "True"]
    assert policies.splitlines()[0].split() == ["NAME", "BASE", "METHOD", "MIN", "LATEST", "WAITING-FOR", "AGE"]
    assert "new vectors" in policies
    assert versions.splitlines()[0].split() == ["NAME", "POLICY", "PHASE", "READY", "AGE"]
    assert versions.splitlines()[1].split()[1:4] == ["brain", "Ready", "True"]


def test_get_wide_shows_erasures_messages_and_pauses(furnished: Place):
    assert "ERASED" in furnished.kubectl("get", "dv", "--output=wide")
    assert "SUSPENDED" in furnished.kubectl("get", "mp", "--output=wide")
    assert "it contains west-1, which was withdrawn" in furnished.kubectl("get", "mv", "--output=wide")
    assert BASE.digest in furnished.kubectl("get", "bm", "--output=wide")


def test_the_category_shows_all_kinds(furnished: Place):
    names = furnished.kubectl("get", "datavector", "--output=name")
    assert {name.partition(".")[0] for name in names.split()} == {kind.kind_name.lower() for kind in KINDS}


def test_wait_sees_a_version_become_ready(place: Place):
    place.add(VERSION)
    with pytest.raises(KubectlFailed, match="timed out"):
        place.kubectl("wait", "--for=condition=Ready", f"mv/{VERSION.name}", "--timeout=1s")
    status = VERSION.with_phase(Phase.READY, now=START).dump()["status"]
    place.patch(f"mv/{VERSION.name}", {"status": status}, subresource="status")
    place.kubectl("wait", "--for=condition=Ready", f"mv/{VERSION.name}", "--timeout=10s")


@pytest.mark.parametrize(
    ("kind", "selector", "names"),
    [
        ("dv", "spec.hospital=north", {"north-1"}),
        ("dv", "spec.consent=Withdrawn", {"west-1"}),
        ("dv", f"spec.baseModelRef={BASE.digest}", {"north-1", "south-1", "west-1"}),
        ("mp", f"spec.baseModelRef={BASE.digest}", {"brain"}),
        ("mv", "status.phase=Revoked", {"revoked"}),
        ("mv", "spec.policyRef=brain,status.phase!=Revoked", {VERSION.name}),
    ],
)
def test_field_selectors_find_objects(furnished: Place, kind: str, selector: str, names: set[str]):
    found = furnished.cluster.get(kind, f"--field-selector={selector}", f"--namespace={furnished.name}")
    assert {item["metadata"]["name"] for item in found["items"]} == names
