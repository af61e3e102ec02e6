"""Settings: a TOML file, overridden by environment variables, overridden by flags. Unknown keys are errors.

A setting `a.b` is `[a] b = ...` in the file, `PREFIX_A__B` in the environment, and a flag where the command has one.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from datavector.errors import ConfigError

_PATHS = (Path, Path | None)


class Section(BaseModel):
    """A group of settings: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Settings = TypeVar("Settings", bound=Section)

# What Kubernetes puts into every pod's environment for a service, say one that is called datavector-aggregator.
_SERVICE_LINK = re.compile(r"SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?")


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
        if name.startswith(prefix) and not _SERVICE_LINK.fullmatch(name.removeprefix(prefix)):
            keys = name.removeprefix(prefix).lower().split("__")
            _merge(content, _nest(keys, value), source=f"environment variable {name}", kind=kind)
    for name, value in flags.items():
        if value is not None:
            _merge(content, _nest(name.split("."), value), source=f"flag --{name}", kind=kind)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        variables = prefix if file is None else ""
        problems = "; ".join(
            _problem(kind, each["loc"], each["type"], each["msg"], variables) for each in error.errors()
        )
        where = "in the environment, in a configuration file (--config)" if variables else "in the configuration file"
        raise ConfigError(
            f"settings are missing or wrong: {problems}", remedy=f"set them {where} or as flags"
        ) from error


def _read(kind: type[Section], file: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", remedy="give a TOML file that is readable") from error
    return _anchor(content, kind, file.parent)


def _anchor(content: dict[str, Any], kind: type[Section], folder: Path) -> dict[str, Any]:
    """Makes the paths in a file relative to that file."""
    anchored = {}
    for key, value in content.items():
        section = _section(kind, key)
        if isinstance(value, dict) and section:
            value = _anchor(value, section, folder)
        elif isinstance(value, str) and key in kind.model_fields and kind.model_fields[key].annotation in _PATHS:
            value = folder / value
        anchored[key] = value
    return anchored


def _section(kind: type[Section], key: str) -> type[Section] | None:
    """The section that a key opens, also where it may be absent."""
    annotation = kind.model_fields[key].annotation if key in kind.model_fields else None
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _problem(kind: type[Section], path: tuple[int | str, ...], problem: str, message: str, prefix: str) -> str:
    """A sentence about one setting: of a group that is missing, its settings; of a wrong form, the right one.

    Args:
        prefix: of the environment variables that are named beside the settings; empty for none.
    """
    names = [str(name) for name in path]
    where, last = _named(names, prefix), names[-1]
    for name in names[:-1]:
        kind = _section(kind, name) or kind
    if problem == "missing" and (group := _section(kind, last)):
        needed = [_named([*names, name], prefix) for name, field in group.model_fields.items() if field.is_required()]
        return f"{', '.join(needed)}: fields required"
    if problem == "string_pattern_mismatch" and (description := kind.model_fields[last].description):
        return f"{where} must be {description}"
    return f"{where}: {message[0].lower()}{message[1:]}"


def _named(names: list[str], prefix: str) -> str:
    """A setting by its dotted name, and its environment variable where there is a prefix."""
    return ".".join(names) + (f" ({prefix}{'__'.join(names).upper()})" if prefix else "")


def _nearest(key: str, kind: type[Section]) -> str:
    """The setting that an unknown one stands for: of the same name in a group, or of a similar name."""
    for group in kind.model_fields:
        if (section := _section(kind, group)) and key in section.model_fields:
            return f"{group}.{key}"
    return difflib.get_close_matches(key, kind.model_fields, n=1, cutoff=0)[0]


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value  # type: ignore[no-any-return]


def _merge(target: dict[str, Any], addition: Mapping[str, Any], *, source: str, kind: type[Section]) -> None:
    for key, value in addition.items():
        if key not in kind.model_fields:
            raise ConfigError(f"{source}: unknown setting {key!r}", remedy=f"did you mean {_nearest(key, kind)!r}?")
        section = _section(kind, key)
        if section is None:
            target[key] = value
        elif isinstance(value, Mapping):
            _merge(target.setdefault(key, {}), value, source=source, kind=section)
        else:
            raise ConfigError(
                f"{source}: {key!r} is a group of settings",
                remedy=f"name one: {', '.join(f'{key}.{name}' for name in section.model_fields)}",
            )
