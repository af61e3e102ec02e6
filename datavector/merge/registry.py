"""Merge methods by name. A method is a function marked with its name; its keywords are its parameters."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from datavector.errors import ConfigError
from datavector.layout import FloatArray
from datavector.merge.cohort import Cohort

Merge = Callable[[Any], FloatArray]
"""From a Block to float32, shape (elements,), wherever it begins and ends; or from a WholeTensor to its shape."""

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


@dataclass(frozen=True)
class Range:
    """What a parameter may be: from `low` to `high`; whole numbers only, with `whole`."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high and (not self.whole or value == int(value))

    def __str__(self) -> str:
        return f"a {'whole ' if self.whole else ''}number from {self.low:g} to {self.high:g}"


Fraction = Annotated[float, Range(0.0001, 1)]
Scale = Annotated[float, Range(-100, 100)]


@dataclass(frozen=True)
class Method:
    """A registered merge method.

    Attributes:
        function: of a Block, or of a WholeTensor where `whole`; and of what `prepare` gave, if there is one.
        prepare: looks at all vectors once, before the first block.
        whole: whether it takes tensors as a whole.
        exact: whether it is exact whatever the order of the hospitals; any other gets them sorted by digest.
        keyed: whether it reads the vectors' digests.
        weighs: whether it reads how many images each hospital trained on.
        statistics: which statistics of the hospitals it reads beside the vectors: "fisher", "regmean" or none.
        parameters: the defaults by name.
    """

    name: str
    function: Callable[..., FloatArray]
    prepare: Callable[..., Any] | None
    whole: bool
    exact: bool
    keyed: bool
    weighs: bool
    statistics: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first line of the method's module, which says what it is and where it comes from."""
        return (inspect.getdoc(inspect.getmodule(self.function)) or "").partition("\n\n")[0].replace("\n", " ")


@dataclass(frozen=True)
class Chosen:
    """A method with all its parameters."""

    method: Method
    parameters: Mapping[str, float]

    def ready(self, cohort: Cohort) -> Merge:
        """The function of blocks (or of whole tensors), after looking at the vectors if it must."""
        function, prepare, parameters = self.method.function, self.method.prepare, self.parameters
        if prepare is None:
            return lambda part: function(part, **parameters)
        prepared = prepare(cohort, **parameters)
        return lambda part: function(part, prepared, **parameters)


_METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    prepare: Callable[..., Any] | None = None,
    whole: bool = False,
    exact: bool = False,
    keyed: bool = False,
    weighs: bool = False,
    statistics: str = "",
) -> Callable[[FunctionT], FunctionT]:
    """Registers a function as the merge method `name`; see `Method` for the rest."""

    def register(function: FunctionT) -> FunctionT:
        if name in _METHODS:
            raise ValueError(f"two merge methods are named {name!r}")
        hints = get_type_hints(function, include_extras=True)
        keywords = [each for each in inspect.signature(function).parameters.values() if each.kind is each.KEYWORD_ONLY]
        defaults = {each.name: float(each.default) for each in keywords}
        ranges = {each.name: _range(hints[each.name]) for each in keywords}
        _METHODS[name] = Method(name, function, prepare, whole, exact, keyed, weighs, statistics, defaults, ranges)
        return function

    return register


def methods() -> tuple[str, ...]:
    """Names of all merge methods, sorted."""
    return tuple(sorted(_METHODS))


def find(name: str) -> Method:
    """
    Raises:
        ConfigError: there is no such method; the nearest one is named.
    """
    if name not in _METHODS:
        raise ConfigError(f"unknown merge method {name!r}", remedy=_did_you_mean(name, methods()))
    return _METHODS[name]


def choose(name: str, parameters: Mapping[str, Any]) -> Chosen:
    """A method with its parameters set and checked.

    Raises:
        ConfigError: the method or a parameter is unknown (the nearest valid one is named), or a value is no number or
            out of range.
    """
    found = find(name)
    for key, value in parameters.items():
        if key not in found.parameters:
            known = tuple(found.parameters)
            raise ConfigError(f"merge method {name!r} has no parameter {key!r}", remedy=_did_you_mean(key, known))
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not found.ranges[key].holds(value):
            raise ConfigError(f"{name}.{key} is {value!r}", remedy=f"give {found.ranges[key]}")
    return Chosen(found, {**found.parameters, **{key: float(value) for key, value in parameters.items()}})


def body_id(name: str, parameters: Mapping[str, float]) -> str:
    """A plain name for one way to merge: the method's, with what is not its default, such as `ties-density0.3`."""
    usual = _METHODS[name].parameters if name in _METHODS else {}
    changed = sorted((key, value) for key, value in parameters.items() if value != usual.get(key))
    return "-".join([name, *(f"{key}{_plain(value)}" for key, value in changed)])


def _plain(value: float) -> str:
    """A number in full, without signs that a name may not have."""
    return repr(float(value)).removesuffix(".0").replace("+", "")


def _range(hint: Any) -> Range:
    return next((each for each in get_args(hint)[1:] if isinstance(each, Range)), Range(-1e6, 1e6))


def _did_you_mean(word: str, known: tuple[str, ...]) -> str:
    if not known:
        return "remove it: this method has no parameters"
    return f"did you mean {difflib.get_close_matches(word, known, n=1, cutoff=0)[0]!r}?"
