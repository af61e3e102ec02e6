"""The registry of merge methods: one function each, found by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial

from datavector.errors import ConfigError
from datavector.layout import FloatArray

Method = Callable[..., FloatArray]
"""Takes a block, float32 (hospitals, elements), and parameters by name; gives float32 (elements,)."""

_METHODS: dict[str, Method] = {}


def method(name: str) -> Callable[[Method], Method]:
    """Registers a function as the merge method of that name."""

    def register(function: Method) -> Method:
        _METHODS[name] = function
        return function

    return register


def methods() -> tuple[str, ...]:
    """Names of all methods, sorted."""
    return tuple(sorted(_METHODS))


def bind(name: str, parameters: Mapping[str, float]) -> Callable[[FloatArray], FloatArray]:
    """The method of that name with its parameters set.

    Raises:
        ConfigError: an unknown method or parameter; the nearest valid one is named.
    """
    function = _METHODS.get(name)
    if function is None:
        raise ConfigError(f"unknown merge method {name!r}", remedy=_nearest(name, methods()))
    known = [key for key, each in inspect.signature(function).parameters.items() if each.kind is each.KEYWORD_ONLY]
    for parameter in parameters:
        if parameter not in known:
            raise ConfigError(
                f"merge method {name!r} has no parameter {parameter!r}",
                remedy=_nearest(parameter, tuple(known)) if known else "remove it: this method has none",
            )
    return partial(function, **parameters)


def _nearest(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f"did you mean {near[0]!r}? There are: {', '.join(known)}"
