"""The CustomResourceDefinitions of the four kinds, made of the types in `aggregator.resources`.

By hand: `python -m aggregator.crds FOLDER` writes one file for each kind. Types, bounds, patterns, defaults and
descriptions come from the Python classes; what those cannot say (what may change, and into what) is in the tables of
rules here, in CEL. Everything used is stable in Kubernetes 1.32: structural schemas, CEL with optionals and the
quantity library, `fieldPath`, `selectableFields`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from aggregator.resources import (
    API_VERSION,
    AUTO,
    GROUP,
    KINDS,
    BaseModelResource,
    BaseModelSpec,
    Candidate,
    DataVector,
    MergePolicy,
    Method,
    ModelVersion,
    Resource,
    Resources,
    Toleration,
    Trigger,
    VectorSpec,
    VersionSpec,
)
from datavector.merge import methods

HEADER = "# Generated from aggregator/resources.py and aggregator/crds.py by `make crds`. Do not edit.\n"
CATEGORY = "datavector"
KEPT = {"helm.sh/resource-policy": "keep"}  # removing a chart must not remove every object
SHORT_NAMES = {BaseModelResource: "bm", DataVector: "dv", MergePolicy: "mp", ModelVersion: "mv"}
PARTS = {"spec": "What is asked for.", "status": "What came of it; the aggregator writes it."}

Json = dict[str, Any]


# --- What may change, and what values go together -------------------------------------------------------------


def rule(expression: str, message: str, *, field: str = "") -> Json:
    """A rule in CEL; `field` is the path below the rule's place that an error names."""
    return {"rule": expression, "message": message, **({"fieldPath": field} if field else {})}


def fixed(what: str, remedy: str) -> Json:
    """A rule for what never changes."""
    return rule("self == oldSelf", f"{what} cannot change; {remedy}")


def stays(field: str, message: str) -> Json:
    """A rule for the root: a field of the status keeps its value once it has one."""
    before, after = (f"has({it}.status) && has({it}.status.{field})" for it in ("oldSelf", "self"))
    same = f"self.status.{field} == oldSelf.status.{field}"
    return rule(f"!({before}) || ({after} && {same})", message, field=f".status.{field}")


# Rules of objects, at the root, where names are seen and a status that is taken away is still noticed.
OBJECT_RULES: dict[type[Resource], list[Json]] = {
    DataVector: [
        stays("withdrawnAt", "a withdrawal stays recorded: withdrawnAt cannot change once it is set"),
        stays("erasedAt", "an erasure stays recorded: erasedAt cannot change once it is set"),
    ],
    MergePolicy: [
        # Kubernetes has checked the characters of the name: a DNS subdomain.
        rule(
            "self.metadata.name.size() <= 52",
            "metadata.name of a MergePolicy has at most 52 characters: versions and labels are named after it",
        ),
    ],
    ModelVersion: [
        rule(
            "oldSelf.?status.?phase.orValue('') != 'Revoked' || self.?status.?phase.orValue('') == 'Revoked'",
            "a Revoked version stays Revoked: it contains a vector whose consent was withdrawn",
            field=".status.phase",
        ),
    ],
}

# Rules of classes, wherever they occur.
CLASS_RULES: dict[type, list[Json]] = {
    BaseModelSpec: [fixed("the spec of a BaseModel", "create one under another name")],
    VersionSpec: [fixed("the spec of a ModelVersion", "change its MergePolicy, which makes a new version")],
    Trigger: [
        rule(
            "self.maxWaitSeconds >= self.quietPeriodSeconds",
            "maxWaitSeconds is shorter than quietPeriodSeconds",
            field=".maxWaitSeconds",
        )
    ],
    Resources: [
        rule(
            "self.limits.all(name, !(name in self.requests) || !isQuantity(self.requests[name])"
            " || !isQuantity(self.limits[name])"
            " || quantity(self.requests[name]).compareTo(quantity(self.limits[name])) <= 0)",
            "a request is larger than its limit",
            field=".requests",
        )
    ],
    Toleration: [
        rule(
            "self.operator == 'Exists' || self.?key.orValue('') != ''",
            "a toleration without a key needs operator: Exists",
            field=".operator",
        ),
        rule(
            "self.operator == 'Equal' || self.?value.orValue('') == ''",
            "a toleration with operator: Exists takes no value",
            field=".operator",
        ),
        rule(
            "!has(self.tolerationSeconds) || self.?effect.orValue('') == 'NoExecute'",
            "tolerationSeconds needs effect: NoExecute",
            field=".tolerationSeconds",
        ),
    ],
}

_QUANTITIES = rule(
    "self.all(name, isQuantity(self[name]) && !quantity(self[name]).isLessThan(quantity('0')))",
    "each value must be a quantity such as 500m, 2 or 4Gi",
)
_NEW_VECTOR = "a hospital that has something new sends a new vector"

# Rules of fields, and other keys of their schemas.
FIELD_RULES: dict[tuple[type, str], list[Json]] = {
    **{
        (VectorSpec, field): [fixed(field, _NEW_VECTOR)]
        for field in ("hospital", "baseModelRef", "sequence", "artifact", "sampleCount")
    },
    (VectorSpec, "consent"): [
        rule(
            "oldSelf == 'Granted' || self == 'Withdrawn'",
            "consent that was withdrawn cannot be granted again; the hospital sends a new vector",
        )
    ],
    (Resources, "requests"): [_QUANTITIES],
    (Resources, "limits"): [_QUANTITIES],
}
# What can be named in a field, where the type is open.
FIELD_VALUES: dict[tuple[type, str], tuple[str, ...]] = {
    (Method, "name"): (AUTO, *methods()),
    (Candidate, "name"): methods(),
}
# Lists of objects in which a field's value occurs once.
LIST_KEYS = {"conditions": "type", "inputs": "dataVector"}


# --- What kubectl shows ---------------------------------------------------------------------------------------


def column(name: str, path: str, kind: str = "string", *, wide: bool = False, description: str = "") -> Json:
    """A column of `kubectl get`; a wide one is shown with -o wide."""
    shown: Json = {"name": name, "type": kind, "jsonPath": path}
    return {**shown, **({"description": description} if description else {}), **({"priority": 1} if wide else {})}


def condition(name: str, kind: str, *, wide: bool = False) -> Json:
    """A column with a condition's status."""
    return column(name, f'.status.conditions[?(@.type=="{kind}")].status', wide=wide)


AGE = column("Age", ".metadata.creationTimestamp", "date")
# A path that finds several values shows only the first, so a version's hospitals are no column.
COLUMNS: dict[type[Resource], list[Json]] = {
    BaseModelResource: [
        column("Architecture", ".spec.architecture"),
        condition("Available", "Available"),
        column("Digest", ".spec.artifactDigest", wide=True),
        AGE,
    ],
    DataVector: [
        column("Hospital", ".spec.hospital"),
        column("Sequence", ".spec.sequence", "integer"),
        column("Images", ".spec.sampleCount", "integer"),
        column("Consent", ".spec.consent"),
        condition("Stored", "Stored"),
        condition("Quarantined", "Quarantined", wide=True),
        column("Merged-In", ".status.mergedIn", description="Ready versions that contain it."),
        column("Erased", ".status.erasedAt", "date", wide=True, description="How long ago its file was erased."),
        AGE,
    ],
    MergePolicy: [
        column("Base", ".spec.baseModelRef"),
        column("Method", ".spec.method.name"),
        column("Min", ".spec.trigger.minHospitals", "integer", description="Hospitals that a version needs."),
        column("Latest", ".status.latestVersion"),
        column("Suspended", ".spec.suspend", "boolean", wide=True),
        column("Waiting-For", ".status.waitingFor"),
        AGE,
    ],
    ModelVersion: [
        column("Policy", ".spec.policyRef"),
        column("Phase", ".status.phase"),
        column("Chosen", ".status.evaluation.chosen", wide=True, description="The candidate that was chosen."),
        column("Validated", ".status.evaluation.validated", "boolean", wide=True),
        condition("Ready", "Ready"),
        column("Message", ".status.message", wide=True),
        AGE,
    ],
}
SELECTABLE: dict[type[Resource], tuple[str, ...]] = {
    BaseModelResource: (),
    DataVector: (".spec.hospital", ".spec.baseModelRef", ".spec.consent"),
    MergePolicy: (".spec.baseModelRef",),
    ModelVersion: (".spec.policyRef", ".status.phase"),
}


# --- From the types to schemas --------------------------------------------------------------------------------

# Keys of pydantic's schemas that mean the same in a structural schema, and those that are translated. `title` is
# dropped, and so is `additionalProperties: false`: Kubernetes drops unknown fields, or refuses them where the client
# asks for that, as kubectl does.
COPIED = (
    "description", "type", "format", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems",
    "maxItems", "minProperties", "maxProperties", "required",
)  # fmt: skip
TRANSLATED = {
    "$ref", "anyOf", "title", "default", "exclusiveMinimum", "items", "additionalProperties", "properties",
}  # fmt: skip


def definitions() -> dict[str, Json]:
    """All CustomResourceDefinitions, by the plural name of their kind."""
    return {kind.plural: definition(kind) for kind in KINDS}


def definition(kind: type[Resource]) -> Json:
    """The CustomResourceDefinition of a kind."""
    version: Json = {
        "name": API_VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": COLUMNS[kind],
        "schema": {"openAPIV3Schema": schema(kind)},
    }
    if SELECTABLE[kind]:
        version["selectableFields"] = [{"jsonPath": path} for path in SELECTABLE[kind]]
    names = {
        "kind": kind.kind_name,
        "listKind": f"{kind.kind_name}List",
        "plural": kind.plural,
        "singular": kind.kind_name.lower(),
        "shortNames": [SHORT_NAMES[kind]],
        "categories": [CATEGORY],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}", "annotations": KEPT},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def schema(kind: type[Resource]) -> Json:
    """The structural schema of a kind. Its status has no defaults: what nobody wrote is not there."""
    described = kind.model_json_schema(by_alias=True)
    properties: Json = {"metadata": {"type": "object"}}
    for part, description in PARTS.items():
        source = {"description": description, **described["properties"][part]}
        properties[part] = _Translation(described["$defs"], defaults=part == "spec").schema(source)
        properties[part].pop("default", None)
    rules = OBJECT_RULES.get(kind)
    return {
        "description": described["description"],
        "type": "object",
        "required": ["spec"],
        "properties": properties,
        **({"x-kubernetes-validations": rules} if rules else {}),
    }


class _Translation:
    """From pydantic's JSON schema to a structural one; keeps what is the same on the whole way down."""

    def __init__(self, parts: dict[str, Json], *, defaults: bool) -> None:
        """Args:
        parts: pydantic's schemas of classes, by name.
        defaults: whether defaults are kept.
        """
        self._parts = parts
        self._defaults = defaults

    def schema(self, source: Json) -> Json:
        """One field's or item's schema, with those below it.

        Raises:
            ValueError: the type is bounded in a way that has no translation yet.
        """
        source, rules = self._resolve(source)
        if unknown := source.keys() - {*COPIED, *TRANSLATED}:
            raise ValueError(f"{source.get('title')} has {', '.join(sorted(unknown))}, which is not translated")
        result = {key: source[key] for key in COPIED if key in source}
        if "exclusiveMinimum" in source:
            result |= _more_than(source["exclusiveMinimum"], source["type"])
        if self._defaults and source.get("default") is not None:
            result["default"] = _plain(source["default"])
        if "items" in source:
            result["items"] = self.schema(source["items"])
        if isinstance(source.get("additionalProperties"), dict):
            result["additionalProperties"] = self.schema(source["additionalProperties"])
        if "properties" in source:
            result["properties"] = self._properties(source)
        if rules:
            result["x-kubernetes-validations"] = rules
        return result

    def _properties(self, source: Json) -> Json:
        properties = {}
        for name, field in source["properties"].items():
            result = self.schema(field)
            if values := _FIELD_VALUES.get((source["title"], name)):
                result["enum"] = list(values)
            if rules := _FIELD_RULES.get((source["title"], name)):
                result["x-kubernetes-validations"] = rules
            if name in LIST_KEYS and "items" in result:
                result |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [LIST_KEYS[name]]}
            properties[name] = result
        return properties

    def _resolve(self, source: Json) -> tuple[Json, list[Json]]:
        """A schema without its reference and its null, and the rules of its class. Absent is the only null here."""
        if "anyOf" in source:
            (value,) = (each for each in source["anyOf"] if each != {"type": "null"})
            source = {**value, **source}
        if "$ref" not in source:
            return source, []
        name = source["$ref"].rpartition("/")[2]
        return {**self._parts[name], **source}, _CLASS_RULES.get(name, [])


_CLASS_RULES = {part.__name__: rules for part, rules in CLASS_RULES.items()}
_FIELD_VALUES = {(part.__name__, field): values for (part, field), values in FIELD_VALUES.items()}
_FIELD_RULES = {(part.__name__, field): rules for (part, field), rules in FIELD_RULES.items()}


def _more_than(bound: float, kind: str) -> Json:
    """An exclusive bound in the form of OpenAPI 3.0, which has it as a mark on the minimum."""
    if kind == "integer":
        return {"minimum": int(bound) + 1}
    return {"minimum": bound, "exclusiveMinimum": True}


def _plain(value: Any) -> Any:
    """A default without nulls, and with whole numbers as such: 60, not 60.0."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# --- Files ----------------------------------------------------------------------------------------------------


def missing_fields(document: Json) -> list[str]:
    """Paths of fields that a cluster's OpenAPI document (of this group and version) does not have."""
    known = document.get("components", {}).get("schemas", {})
    prefix = ".".join(reversed(GROUP.split("."))) + f".{API_VERSION}."
    missing = []
    for kind in KINDS:
        served = known.get(prefix + kind.kind_name, {})
        missing += [f"{kind.kind_name}.{path}" for path in _lacking(schema(kind), served)]
    return missing


def _lacking(wanted: Json, served: Json) -> list[str]:
    paths = []
    for name, field in wanted.get("properties", {}).items():
        found = served.get("properties", {}).get(name)
        if found is None:
            paths.append(name)
        else:
            inner = _lacking(field.get("items", field), found.get("items", found))
            paths += [f"{name}.{path}" for path in inner]
    return paths


def files() -> dict[str, str]:
    """The text of each definition's file, by file name."""
    apart = json.loads(json.dumps(definitions()))  # what occurs twice is written twice, not as a YAML alias
    return {
        f"{plural}.yaml": HEADER + yaml.safe_dump(document, sort_keys=False, width=110)
        for plural, document in apart.items()
    }


def write(folder: Path) -> None:
    """Writes the definitions below a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m aggregator.crds FOLDER")
    write(Path(sys.argv[1]))
