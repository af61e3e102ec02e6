"""Policy files: YAML with MergePolicy documents, each in the shape of the Kubernetes resource."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel as Schema
from pydantic import ValidationError

from aggregator.resources import MergePolicy
from datavector.errors import ConfigError


def load_policies(path: Path) -> tuple[MergePolicy, ...]:
    """Reads the MergePolicy documents of a YAML file.

    Raises:
        ConfigError: not YAML, another kind, an unknown field (the nearest valid one is named), a wrong value, two
            policies of one name.
    """
    try:
        documents = [document for document in yaml.safe_load_all(path.read_text()) if document is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", remedy="give a YAML file with a MergePolicy") from error
    policies = tuple(_policy(path, document) for document in documents)
    names = [policy.name for policy in policies]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"{path} names the policies {names}", remedy="write at least one, each name once")
    return policies


def _policy(path: Path, document: Any) -> MergePolicy:
    if not isinstance(document, dict) or document.get("kind") != MergePolicy.kind_name:
        kind = document.get("kind") if isinstance(document, dict) else document
        raise ConfigError(
            f"{path} holds {kind!r}", remedy="write kind: MergePolicy, apiVersion: datavector.dev/v1alpha1"
        )
    try:
        return MergePolicy.parse(document)
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(_sentences(error))}", remedy="see docs/policy.md") from error


def _sentences(error: ValidationError) -> Sequence[str]:
    return [_sentence(detail["loc"], detail["msg"], detail["type"]) for detail in error.errors()]


def _sentence(location: tuple[int | str, ...], message: str, kind: str) -> str:
    where = ".".join(str(part) for part in location)
    if kind != "extra_forbidden":
        message = message.removeprefix("Value error, ")
        return f"{where}: {message[0].lower()}{message[1:]}"
    return f"{where} is no field here; did you mean {_nearest(where)}?"


def _nearest(unknown: str) -> str:
    """The field that an unknown one stands for: of the same name elsewhere, or of a similar name in the same part."""
    known = list(_field_paths(MergePolicy))
    part, _, name = unknown.rpartition(".")
    elsewhere = [path for path in known if path.rpartition(".")[2] == name]
    siblings = [path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == part]
    return (elsewhere or difflib.get_close_matches(name, siblings, n=1, cutoff=0))[0]


def _field_paths(schema: type[Schema], part: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        path = f"{part}{field.alias or name}"
        yield path
        if isinstance(field.annotation, type) and issubclass(field.annotation, Schema):
            yield from _field_paths(field.annotation, f"{path}.")
