"""Merge methods by name. A method is a function of a block, marked with its name; its keywords are its parameters."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from datavector.errors import ConfigError
from datavector.layout import FloatArray

Block = FloatArray
"""One slice of one tensor of every vector: float32, shape (hospitals, elements)."""

Merge = Callable[[Block], FloatArray]
"""From a block to float32, shape (elements,), whatever the order of its rows and wherever its slice begins and ends."""

MethodT = TypeVar("MethodT", bound=Callable[..., FloatArray])

_METHODS: dict[str, Callable[..., FloatArray]] = {}


def method(name: str) -> Callable[[MethodT], MethodT]:
    """Registers a function as the merge method `name`."""

    def register(function: MethodT) -> MethodT:
        if name in _METHODS:
            raise ValueError(f"two merge methods are named {name!r}")
        _METHODS[name] = function
        return function

    return register


def methods() -> tuple[str, ...]:
    """Names of all merge methods, sorted."""
    return tuple(sorted(_METHODS))


def choose(name: str, parameters: Mapping[str, Any]) -> Merge:
    """A method with its parameters set, ready for blocks.

    Raises:
        ConfigError: the method or a parameter is unknown (the nearest valid one is named), or a value is no number.
    """
    if name not in _METHODS:
        raise ConfigError(f"unknown merge method {name!r}", remedy=_did_you_mean(name, methods()))
    function = _METHODS[name]
    known = [each.name for each in inspect.signature(function).parameters.values() if each.kind is each.KEYWORD_ONLY]
    for key, value in parameters.items():
        if key not in known:
            raise ConfigError(f"merge method {name!r} has no parameter {key!r}", remedy=_did_you_mean(key, known))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{name}.{key} is {value!r}", remedy="give a finite number")
    return partial(function, **{key: float(value) for key, value in parameters.items()})


def _did_you_mean(word: str, known: tuple[str, ...] | list[str]) -> str:
    if not known:
        return "remove it: this method has no parameters"
    return f"did you mean {difflib.get_close_matches(word, known, n=1, cutoff=0)[0]!r}?"
