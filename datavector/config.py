"""Settings: a TOML file, overridden by environment variables, overridden by flags. Unknown keys are errors.

A setting `a.b` is `[a] b = ...` in the file, `PREFIX_A__B` in the environment, and a flag where the command has one.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from datavector.errors import ConfigError


class Section(BaseModel):
    """A group of settings: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Settings = TypeVar("Settings", bound=Section)


def load_settings(
    kind: type[Settings],
    file: Path | None,
    flags: Mapping[str, Any],
    *,
    prefix: str,
    environment: Mapping[str, str] = os.environ,
) -> Settings:
    """Reads settings from all three sources.

    Args:
        flags: by dotted name; None means that the flag was not given. Text is parsed like an environment variable.
        prefix: of environment variables, for example "DATAVECTOR_AGENT_".

    Raises:
        ConfigError: an unreadable file, an unknown key (the nearest valid one is named), a missing or wrong value.
            Relative paths in a file are relative to the file.
    """
    content: dict[str, Any] = {}
    if file is not None:
        _merge(content, _read(kind, file), source=str(file), kind=kind)
    for name, value in sorted(environment.items()):
        if name.startswith(prefix):
            keys = name.removeprefix(prefix).lower().split("__")
            _merge(content, _nest(keys, value), source=f"environment variable {name}", kind=kind)
    for name, value in flags.items():
        if value is not None:
            _merge(content, _nest(name.split("."), value), source=f"flag --{name}", kind=kind)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg'].lower()}" for each in error.errors())
        raise ConfigError(
            f"settings are missing or wrong: {problems}", remedy="set them in the configuration file or as flags"
        ) from error


def _read(kind: type[Section], file: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", remedy="give a TOML file; see docs/agent.md") from error
    return _anchor(content, kind, file.parent)


def _anchor(content: dict[str, Any], kind: type[Section], folder: Path) -> dict[str, Any]:
    """Makes the paths in a file relative to that file."""
    anchored = {}
    for key, value in content.items():
        field = kind.model_fields.get(key)
        annotation = field.annotation if field else None
        if isinstance(value, dict) and isinstance(annotation, type) and issubclass(annotation, Section):
            value = _anchor(value, annotation, folder)
        elif isinstance(value, str) and annotation in (Path, Path | None):
            value = folder / value
        anchored[key] = value
    return anchored


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value  # type: ignore[no-any-return]


def _merge(target: dict[str, Any], addition: Mapping[str, Any], *, source: str, kind: type[Section]) -> None:
    for key, value in addition.items():
        field = kind.model_fields.get(key)
        if field is None:
            nearest = difflib.get_close_matches(key, kind.model_fields, n=1, cutoff=0)
            raise ConfigError(f"{source}: unknown setting {key!r}", remedy=f"did you mean {nearest[0]!r}?")
        section = field.annotation
        if isinstance(value, Mapping) and isinstance(section, type) and issubclass(section, Section):
            _merge(target.setdefault(key, {}), value, source=source, kind=section)
        else:
            target[key] = value
